"""How small codecs make captured KV and how fast, on one core, beside plain zstd in the same run.

The contenders take turns, repetition by repetition, so that a slow moment of the machine hits all of them. Speed is
bytes of KV for each second of processor time, all threads of the process counted: MB/s per core, whatever else runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray
from prfaas.common.kv_layout import DTYPE_BYTES
from prfaas.services.kv_file import Chunk, KvCapture
from prfaas.transport.codecs.api import Codec, CodecError
from prfaas.transport.codecs.planes import to_planes

MB = 1e6
_LEVEL = 1
"""zstd's, of what codecs are compared with."""
_CLOCK_STEP_S = 1e-6
"""Of the processor's clock: nothing is taken for faster."""


class Contender(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def lossless(self) -> bool: ...

    def prepare(self, data: memoryview, chunks: Sequence[Chunk]) -> None:
        """Untimed, once."""
        ...

    def encode(self, index: int) -> bytes | None:
        """Chunk `index`; None: it goes raw."""
        ...

    def decode(self, index: int, wire: bytes, out: memoryview) -> None: ...


class CodecContender:
    """One of the transport's codecs, as the transport calls it."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.name = codec.name
        self.lossless = codec.lossless

    def prepare(self, data: memoryview, chunks: Sequence[Chunk]) -> None:
        self._data = data
        self._chunks = chunks

    def encode(self, index: int) -> bytes | None:
        form, start, end = self._chunks[index]
        return self._codec.encode(self._data[start:end], form)

    def decode(self, index: int, wire: bytes, out: memoryview) -> None:
        self._codec.decode(memoryview(wire), out, self._chunks[index].form)


class PlainZstd:
    """The baseline: zstd level 1, one frame a chunk, over byte planes that exist already. Making and undoing the planes
    isn't counted."""

    name = "plain zstd-1"
    lossless = False  # what it decodes to are planes

    def prepare(self, data: memoryview, chunks: Sequence[Chunk]) -> None:
        self._planes: list[NDArray[np.uint8]] = [
            to_planes(data[start:end], form.dtype).copy() for form, start, end in chunks
        ]

    def encode(self, index: int) -> bytes | None:
        planes = self._planes[index]
        wire = zstandard.ZstdCompressor(level=_LEVEL).compress(planes.data)
        return wire if len(wire) < len(planes) else None

    def decode(self, index: int, wire: bytes, out: memoryview) -> None:
        zstandard.ZstdDecompressor().decompress(wire, max_output_size=len(out))


class PlainZstdByPlane:
    """A second one: a frame for each byte plane. In chunks below zstd's block of 128 KiB a common frame gives exponents
    and mantissas a common code, which costs a tenth of the ratio."""

    name = "zstd-1 by plane"
    lossless = False

    def prepare(self, data: memoryview, chunks: Sequence[Chunk]) -> None:
        self._planes: list[list[NDArray[np.uint8]]] = []
        for form, start, end in chunks:
            planes = to_planes(data[start:end], form.dtype).copy()
            self._planes.append(np.split(planes, DTYPE_BYTES[form.dtype]) if planes.size else [])
        self._frames: list[list[bytes]] = [[] for _ in chunks]

    def encode(self, index: int) -> bytes | None:
        frames = [zstandard.ZstdCompressor(level=_LEVEL).compress(plane.data) for plane in self._planes[index]]
        self._frames[index] = frames
        return b"".join(frames)

    def decode(self, index: int, wire: bytes, out: memoryview) -> None:
        for frame, plane in zip(self._frames[index], self._planes[index], strict=True):
            zstandard.ZstdDecompressor().decompress(frame, max_output_size=len(plane))


@dataclass(slots=True)
class Speed:
    """One contender. The lists have one entry a repetition, in the contenders' common order."""

    name: str
    lossless: bool
    raw_bytes: int = 0
    wire_bytes: int = 0
    raw_chunks: int = 0
    """Chunks that the codec left as they are."""
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)
    """kind -> (raw bytes, wire bytes)"""
    encode_mb_per_s: list[float] = field(default_factory=list)
    decode_mb_per_s: list[float] = field(default_factory=list)


def measure(
    contenders: Sequence[Contender],
    capture: KvCapture,
    chunks: Sequence[Chunk],
    repetitions: int,
    tick: Callable[[], None],
) -> list[Speed]:
    """In the contenders' order; `tick` is called after each turn. Raises CodecError when a lossless codec gives other
    bytes back than it got."""
    data = memoryview(capture.data)
    speeds = [Speed(contender.name, contender.lossless) for contender in contenders]
    for contender, speed in zip(contenders, speeds, strict=True):
        contender.prepare(data, chunks)
        _check(contender, speed, data, chunks)  # also the warm-up: the first pass of a codec is slower
        tick()
    for _ in range(repetitions):
        for contender, speed in zip(contenders, speeds, strict=True):
            _time(contender, speed, len(data), chunks)
            tick()
    return speeds


def _time(contender: Contender, speed: Speed, kv_bytes: int, chunks: Sequence[Chunk]) -> None:
    """One pass each way over all the KV. Raw chunks decode for nothing, as on the wire."""
    out = memoryview(bytearray(max(end - start for _, start, end in chunks)))
    begin_s = time.process_time()
    wires = [contender.encode(index) for index in range(len(chunks))]
    encoded_s = time.process_time()
    for index, wire in enumerate(wires):
        if wire is not None:
            contender.decode(index, wire, out[: chunks[index].end - chunks[index].start])
    decoded_s = time.process_time()
    speed.encode_mb_per_s.append(kv_bytes / MB / max(encoded_s - begin_s, _CLOCK_STEP_S))
    speed.decode_mb_per_s.append(kv_bytes / MB / max(decoded_s - encoded_s, _CLOCK_STEP_S))


def _check(contender: Contender, speed: Speed, data: memoryview, chunks: Sequence[Chunk]) -> None:
    """Sizes, and that lossless is true."""
    for index, (form, start, end) in enumerate(chunks):
        wire = contender.encode(index)
        wire_bytes = end - start if wire is None else len(wire)
        speed.raw_chunks += wire is None
        speed.raw_bytes += end - start
        speed.wire_bytes += wire_bytes
        raw_before, wire_before = speed.kinds.get(form.kind, (0, 0))
        speed.kinds[str(form.kind)] = (raw_before + end - start, wire_before + wire_bytes)
        if wire is not None and contender.lossless:
            out = bytearray(end - start)
            contender.decode(index, wire, memoryview(out))
            if out != data[start:end]:
                raise CodecError(f"{contender.name} calls itself lossless and changed bytes [{start}, {end}) of the KV")


def through(
    codec: Codec, capture: KvCapture, chunks: Sequence[Chunk], kinds: frozenset[str] | None = None
) -> bytearray:
    """The KV as the receiver has it when the chunks went through `codec`; `kinds`: only those, the others exact."""
    data = memoryview(capture.data)
    received = bytearray(capture.data)
    out = memoryview(received)
    for form, start, end in chunks:
        if kinds is not None and form.kind not in kinds:
            continue
        wire = codec.encode(data[start:end], form)
        if wire is not None:
            codec.decode(memoryview(wire), out[start:end], form)
    return received


def paired_ratio(mine: Sequence[float], others: Sequence[float]) -> float:
    """The median ratio, turn by turn, since the machine's speed drifts from one to the next."""
    return statistics.median(a / b for a, b in zip(mine, others, strict=True))
