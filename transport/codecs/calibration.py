"""Measures codecs: a shell, since it reads a clock. CPU time of one thread, so that a busy machine doesn't count."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np
import zstandard
from prfaas.common.kv_layout import DTYPE_BYTES, TensorKind
from prfaas.transport.codecs.api import ChunkForm, Codec, CodecError
from prfaas.transport.codecs.choice import CodecSpeed
from prfaas.transport.codecs.floats import FLOAT_TYPES, from_float32
from prfaas.transport.codecs.planes import from_planes, to_planes
from prfaas.transport.codecs.registry import CODECS

Chunk = tuple[memoryview, ChunkForm]

_CHANNELS = 64
_SAMPLE_BYTES = 256 << 10
_SHORTEST_S = 1e-9


class ZstdOnPlanes:
    """Plain zstd at level 1 over all planes: what our codecs are measured beside. Never on the wire."""

    name = "zstd-1 on planes"
    number = 0
    lossless = True

    def encode(self, data: memoryview, form: ChunkForm) -> bytes | None:
        wire = zstandard.ZstdCompressor(level=1).compress(to_planes(data, form.dtype).data)
        return wire if len(wire) < len(data) else None

    def decode(self, wire: memoryview, out: memoryview, form: ChunkForm) -> None:
        width = DTYPE_BYTES[form.dtype]
        flat = np.frombuffer(zstandard.ZstdDecompressor().decompress(wire, max_output_size=len(out)), np.uint8)
        whole = len(out) // width * width
        from_planes(list(flat[:whole].reshape(width, -1)), out[:whole], form.dtype)
        out[whole:] = flat[whole:].data


def measure(codec: Codec, chunks: Sequence[Chunk], rounds: int = 3) -> CodecSpeed:
    """The best of some rounds over all of `chunks`. What doesn't shrink counts as raw on the wire and as decoded in no
    time. Raises CodecError if a lossless codec doesn't give back every byte."""
    raw_bytes = sum(len(data) for data, _ in chunks)
    wires: list[bytes | None] = []
    encode_s = decode_s = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        wires = [codec.encode(data, form) for data, form in chunks]
        encode_s = min(encode_s, time.thread_time() - start)
    out = memoryview(bytearray(max((len(data) for data, _ in chunks), default=0)))
    for _ in range(rounds):
        seconds = 0.0
        for wire, (data, form) in zip(wires, chunks, strict=True):
            if wire is None:
                continue
            start = time.thread_time()
            codec.decode(memoryview(wire), out[: len(data)], form)
            seconds += time.thread_time() - start
            if codec.lossless and out[: len(data)] != data:
                raise CodecError(f"{codec.name}: a chunk of {len(data)} bytes came back changed")
        decode_s = min(decode_s, seconds)
    wire_bytes = sum(len(data if wire is None else wire) for wire, (data, _) in zip(wires, chunks, strict=True))
    return CodecSpeed(
        raw_bytes / max(1, wire_bytes),
        raw_bytes / max(_SHORTEST_S, encode_s),
        raw_bytes / max(_SHORTEST_S, decode_s),
    )


def calibrate(codec: Codec, kind: TensorKind, dtype: str = "bfloat16") -> CodecSpeed:
    """What to expect of a codec before a chunk was sent, from 256 KiB like KV. Some milliseconds."""
    return measure(codec, [kv_like(kind, dtype)], rounds=2)


def calibrate_all(
    codecs: Iterable[Codec] = tuple(CODECS.values()), dtype: str = "bfloat16"
) -> dict[tuple[str, TensorKind], CodecSpeed]:
    """For `CodecSpeeds`; in a thread, as it takes some hundredths of a second."""
    return {(codec.name, kind): calibrate(codec, kind, dtype) for codec in codecs for kind in TensorKind}


def kv_like(kind: TensorKind, dtype: str) -> Chunk:
    """Normal values, with the means and spreads by channel that keys have; always the same. Of a type of one byte:
    its bytes, uneven likewise."""
    rng = np.random.default_rng(0)
    tokens = _SAMPLE_BYTES // (_CHANNELS * DTYPE_BYTES[dtype])
    values = rng.normal(size=(tokens, _CHANNELS))
    if kind is TensorKind.KEY:
        values *= np.exp(0.5 * rng.normal(size=_CHANNELS))
        values += rng.normal(size=_CHANNELS)
    if dtype in FLOAT_TYPES:
        elements = np.empty(values.size, FLOAT_TYPES[dtype])
        from_float32(values.astype(np.float32).reshape(-1), elements)
        data = elements.tobytes()
    else:
        data = np.clip(values * 40, -127, 127).astype(np.int8).tobytes()
    return memoryview(data), ChunkForm(kind, dtype, _CHANNELS)
