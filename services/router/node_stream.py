"""The SSE stream of a node, cut into what the client gets and what the router keeps. Pure.

The client gets the `data:` lines byte for byte. Comments and named events are the router's:

    : ids 12,345              token ids of the `data:` line that follows
    : timeline {json}         DecodeNodeTimeline
    : ping
    event: ticket | done | error, then its data
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prfaas.common.errors import ProtocolError

MAX_EVENT_BYTES = 64 << 20
"""A whole response that is not streamed is one event: 1M tokens of text and their ids fit."""

_IDS = b": ids "
_TIMELINE = b": timeline "
_DATA = b"data: "
_EVENT = b"event: "


@dataclass(slots=True)
class Batch:
    """What one read brought. `relay`: whole events for the client, in order, each with its empty line."""

    relay: list[bytes] = field(default_factory=list)
    output_tokens: int = 0
    token_ids: list[bytes] = field(default_factory=list)
    """Of the outputs in `relay`: decimal numbers with commas between."""
    timeline: bytes | None = None
    events: list[tuple[str, bytes]] = field(default_factory=list)
    """Named events: (name, data)."""


class NodeStream:
    """Feed it what the socket brings; an event may be split anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Batch:
        """Raises ProtocolError when an event grows beyond MAX_EVENT_BYTES."""
        if self._rest:
            data = self._rest + data
        batch = Batch()
        *blocks, self._rest = data.split(b"\n\n")
        for block in blocks:
            _sort(block, batch)
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ProtocolError(f"a node sent an event of more than {MAX_EVENT_BYTES} bytes")
        return batch


def _sort(block: bytes, batch: Batch) -> None:
    while block.startswith(b":"):
        comment, _, block = block.partition(b"\n")
        if comment.startswith(_IDS):
            batch.output_tokens += comment.count(b",") + 1
            batch.token_ids.append(comment[len(_IDS) :])
        elif comment.startswith(_TIMELINE):
            batch.timeline = comment[len(_TIMELINE) :]
    if block.startswith(_DATA):
        batch.relay.append(block + b"\n\n")
    elif block.startswith(_EVENT):
        name, _, data = block[len(_EVENT) :].partition(b"\n")
        batch.events.append((name.decode("ascii", "replace"), data.removeprefix(_DATA)))


def response_body(relay: list[bytes]) -> bytes:
    """The one `data:` line of a response that is not streamed, as a JSON body. Raises ProtocolError."""
    if len(relay) != 1:
        raise ProtocolError(f"a decode node sent {len(relay)} data lines where one response belongs")
    return relay[0].removeprefix(_DATA).rstrip(b"\n")
