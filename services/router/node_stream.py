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

import msgspec
from prfaas.common.errors import ProtocolError
from prfaas.services.messages import FormatMessage

MAX_EVENT_BYTES = 64 << 20
"""A whole response that is not streamed is one event: 1M tokens of text and their ids fit."""

DONE = b"data: [DONE]\n\n"
"""Ends OpenAI's streams."""

_GOES_ON = b'"finish_reason":null'
"""In every chunk but the last ones. Within a text its quotes would be escaped."""
_NO_CHOICES = b'"choices":[]'
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
    finished: bool = False
    """The chunk with the finish reason is in `relay`."""
    usage: bool = False
    """And the chunk with the usage, which has no choices."""
    text_ahead: int = 0
    """Characters of text in `relay` behind the last ids: their ids were not told yet."""


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
    return Batch(event, ids.count(b",") + 1, ids, None, (), event == DONE, _GOES_ON not in event)


def _sort(blocks: list[bytes]) -> Batch:
    batch, relay, token_ids, events = Batch(), [], [], []
    for block in blocks:
        told = False
        while block.startswith(b":"):
            comment, _, block = block.partition(b"\n")
            if comment.startswith(_IDS):
                token_ids.append(comment[len(_IDS) :])
                batch.output_tokens += comment.count(b",") + 1
                told = True
            elif comment.startswith(_TIMELINE):
                batch.timeline = comment[len(_TIMELINE) :]
        if block.startswith(_DATA):
            relay.append(block + b"\n\n")
            batch.text_ahead = 0 if told else batch.text_ahead + _text_chars(block)
            if _NO_CHOICES in block:
                batch.usage = True
            elif _GOES_ON not in block and relay[-1] != DONE:
                batch.finished = True
        elif block.startswith(_EVENT):
            name, _, data = block[len(_EVENT) :].partition(b"\n")
            events.append((name.decode("ascii", "replace"), data.removeprefix(_DATA)))
    batch.relay, batch.token_ids, batch.events = b"".join(relay), b",".join(token_ids), events
    batch.done = bool(relay) and relay[-1] == DONE
    return batch


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    delta: _Delta | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []


def _text_chars(block: bytes) -> int:
    """Of a `data:` line without ids, which is rare: half a character, or what may begin a stop string, was held."""
    try:
        choices = msgspec.json.decode(block.removeprefix(_DATA), type=_Chunk).choices
    except msgspec.DecodeError:  # [DONE], or a whole response
        return 0
    return sum(len(choice.text) + len((choice.delta and choice.delta.content) or "") for choice in choices)


def usage_event(format: FormatMessage, prompt_tokens: int, completion_tokens: int) -> bytes:
    """The chunk that a decode node would have sent behind the last text."""
    kind = "chat.completion.chunk" if format.kind == "chat" else "text_completion"
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    head = {"id": format.id, "object": kind, "created": format.created, "model": format.model}
    return b"data: " + msgspec.json.encode(head | {"choices": [], "usage": usage}) + b"\n\n"


def response_body(relay: bytes) -> bytes:
    """The one `data:` line of a response that is not streamed, as a JSON body. Raises ProtocolError."""
    lines = relay.count(b"\n\n")
    if lines != 1:
        raise ProtocolError(f"a decode node sent {lines} data lines where one response belongs")
    return relay.removeprefix(_DATA).rstrip(b"\n")
