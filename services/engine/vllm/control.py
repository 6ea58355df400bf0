"""What our node and the connector in a vLLM worker say to each other over a Unix socket. Pure.

The worker listens at `<control folder>/rank-<r>.sock`; one node at a time connects. A frame is four bytes of length
(big-endian) and a msgpack body. The node speaks first: Attach, with the descriptor of the shared memory (SCM_RIGHTS)
beside its first byte; the worker answers Ready. From then on:

    node → worker    Begin, Arrived, Abort, Close
    worker → node    Begun, Saved, SaveEnded, Loaded, Closed

The memory of a transfer is the node's to free once Closed has come from every rank. When the connection ends, the
worker touches none of that node's memory any more.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
from prfaas.common.errors import ProtocolError

VERSION = 1
MAX_FRAME_BYTES = 4 << 20
LENGTH = struct.Struct(">I")
PARAMS_KEY = "prfaas"
"""In a request's `kv_transfer_params`: a dict with transfer_id, kind, start and end."""


class Attach(msgspec.Struct, frozen=True, tag=True):
    version: int
    memory_bytes: int
    """Of the shared memory."""
    layer_wait_s: float
    """Longest that a decode step waits for a layer."""


class Begin(msgspec.Struct, frozen=True, tag=True):
    """A transfer's KV has room from offset_bytes on (staging.py says how it lies there). save: copy it out as it is
    computed; load: copy it in as vLLM asks for it."""

    transfer_id: str
    kind: Literal["save", "load"]
    start: int
    end: int
    offset_bytes: int


class Arrived(msgspec.Struct, frozen=True, tag=True):
    """These layers of a load are complete in the shared memory."""

    transfer_id: str
    layers: list[int]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """The rest of a load won't come: nobody is to wait for it."""

    transfer_id: str
    reason: str


class Close(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """layout: KvLayout.to_dict of the whole model. heads: of each rank's sharded tensors, [head_start, head_end)."""

    version: int
    vllm: str
    rank: int
    ranks: int
    layout: dict[str, Any]
    block_tokens: int
    kv_tokens: int
    """That vLLM's cache has room for."""


class Begun(msgspec.Struct, frozen=True, tag=True):
    """From now on vLLM may be given the request."""

    transfer_id: str


class Saved(msgspec.Struct, frozen=True, tag=True):
    """Tokens [start, end) of heads [head_start, head_end) of these tensors of a layer lie in the shared memory; of a
    state, all of it."""

    transfer_id: str
    layer: int
    tensors: list[int]
    start: int
    end: int
    head_start: int
    head_end: int
    at_s: float
    """time.monotonic() of the machine, as all instants here."""


class SaveEnded(msgspec.Struct, frozen=True, tag=True):
    """The last token of the range has been computed, and everything Saved; or (problem) no more will be."""

    transfer_id: str
    problem: str = ""


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """vLLM has the KV, or goes on without it. used_s: when each layer was first used. problem: why not all of it was
    copied in. skipped: nothing was, and vLLM computes the prompt itself."""

    transfer_id: str
    used_s: list[float]
    problem: str = ""
    skipped: str = ""


class Closed(msgspec.Struct, frozen=True, tag=True):
    transfer_id: str


ToWorker = Attach | Begin | Arrived | Abort | Close
ToNode = Ready | Begun | Saved | SaveEnded | Loaded | Closed

_encoder = msgspec.msgpack.Encoder()
to_worker_decoder = msgspec.msgpack.Decoder(ToWorker)
to_node_decoder = msgspec.msgpack.Decoder(ToNode)


def frame(message: ToWorker | ToNode) -> bytes:
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


class Frames:
    """Bodies out of bytes as they come."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Raises ProtocolError for a length over MAX_FRAME_BYTES."""
        self._data += data
        while len(self._data) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._data)
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a control frame of {length} bytes; at most {MAX_FRAME_BYTES}")
            if len(self._data) < LENGTH.size + length:
                return
            yield bytes(self._data[LENGTH.size : LENGTH.size + length])
            del self._data[: LENGTH.size + length]
