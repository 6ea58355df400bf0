"""The SSE stream of a node, cut into what the client gets and what the router keeps. Pure.

The client gets the `data:` lines byte for byte. Comments and named events are the router's:

    : ids 12,345              token ids of the `data:` line that follows
    : timeline {json}         DecodeNodeTimeline
    : ping
    event: ticket | done | error, then its data
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prfaas.common.errors import ProtocolError

MAX_EVENT_BYTES = 64 << 20
"""A whole response that is not streamed is one event: 1M tokens of text and their ids fit."""

DONE = b"data: [DONE]\n\n"
"""Ends OpenAI's streams."""

_IDS = b": ids "
_TIMELINE = b": timeline "
_DATA = b"data: "
_EVENT = b"event: "


@dataclass(slots=True)
class Batch:
    """What one read brought."""

    relay: bytes = b""
    """Whole events for the client, in order, each with its empty line."""
    output_tokens: int = 0
    token_ids: bytes = b""
    """Of the outputs in `relay`: decimal numbers with commas between."""
    timeline: bytes | None = None
    events: Sequence[tuple[str, bytes]] = ()
    """Named events: (name, data)."""
    done: bool = False
    """The last event in `relay` is DONE."""


class NodeStream:
    """Feed it what the socket brings; an event may be split anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Batch:
        """Raises ProtocolError when an event grows beyond MAX_EVENT_BYTES."""
        if self._rest:
            data = self._rest + data
        if (batch := _one_output(data)) is not None:
            self._rest = b""
            return batch
        *blocks, self._rest = data.split(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ProtocolError(f"a node sent an event of more than {MAX_EVENT_BYTES} bytes")
        return _sort(blocks)


def _one_output(data: bytes) -> Batch | None:
    """The batch, if `data` is one comment with ids and one `data:` line: nearly every read of a running stream is.
    `_sort` would say the same; this takes half the time, which is the router's own share of a token's cost."""
    if not data.startswith(_IDS) or data.find(b"\n\n") != len(data) - 2:
        return None
    ids, _, event = data.partition(b"\n")
    if not event.startswith(_DATA):
        return None
    ids = ids[len(_IDS) :]
    return Batch(event, ids.count(b",") + 1, ids, None, (), event == DONE)


def _sort(blocks: list[bytes]) -> Batch:
    batch, relay, token_ids, events = Batch(), [], [], []
    for block in blocks:
        while block.startswith(b":"):
            comment, _, block = block.partition(b"\n")
            if comment.startswith(_IDS):
                token_ids.append(comment[len(_IDS) :])
                batch.output_tokens += comment.count(b",") + 1
            elif comment.startswith(_TIMELINE):
                batch.timeline = comment[len(_TIMELINE) :]
        if block.startswith(_DATA):
            relay.append(block + b"\n\n")
        elif block.startswith(_EVENT):
            name, _, data = block[len(_EVENT) :].partition(b"\n")
            events.append((name.decode("ascii", "replace"), data.removeprefix(_DATA)))
    batch.relay, batch.token_ids, batch.events = b"".join(relay), b",".join(token_ids), events
    batch.done = bool(relay) and relay[-1] == DONE
    return batch


def response_body(relay: bytes) -> bytes:
    """The one `data:` line of a response that is not streamed, as a JSON body. Raises ProtocolError."""
    lines = relay.count(b"\n\n")
    if lines != 1:
        raise ProtocolError(f"a decode node sent {lines} data lines where one response belongs")
    return relay.removeprefix(_DATA).rstrip(b"\n")
