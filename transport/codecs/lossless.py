"""lz4 and zstd: lossless codecs behind byte planes (see `planes`), for bytes of any type and length.

Mantissas are noise and stay as they are; what shrinks is the plane of exponents. On the wire, with `n` = bytes // bytes
of an element, and sections as in `sections`:

    flags u8      bit 0: there are references; the other bits are 0
    references    a section of `channels` bytes; only if flags has bit 0
    planes        a section of n bytes for each byte of an element, upper plane first
    rest          a section of the bytes beyond whole elements

With references (only for chunks of whole tokens; `channels` as in the chunk's form), the upper plane holds (byte −
reference of its channel) mod 256 instead of each byte. Any reference is right; a typical value makes the channels of
different scale alike, so that one code fits all. Any section may come in any method.

On bfloat16 KV of a real model zstd takes the exponents from 8 bits to ~2.6, a ratio of 1.51 (16 / (8 + entropy of the
exponents) is 1.494 taken together, 1.53 channel by channel), and lz4, which codes no entropy, gets ~1.2.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from prfaas.common.kv_layout import DTYPE_BYTES, TensorKind
from prfaas.transport.codecs.api import ChunkForm, CodecError
from prfaas.transport.codecs.planes import from_planes, to_planes
from prfaas.transport.codecs.sections import Bytes, Method, SectionReader, SectionWriter, repeats

_REFERENCED = 1
_SAMPLED_TOKENS = 32
# References cost a byte a channel. They save about 0.3 bits an element of keys and 0.03 of the others.
_FEWEST_KEY_TOKENS = 64
_FEWEST_TOKENS = 512


class PlaneCodec:
    lossless = True

    def __init__(self, name: str, number: int, method: Method) -> None:
        self.name = name
        self.number = number
        self._method: Final = method

    def encode(self, data: memoryview, form: ChunkForm) -> bytes | None:
        width = DTYPE_BYTES[form.dtype]
        elements = len(data) // width
        flat = to_planes(data, form.dtype)
        planes, rest = flat[: width * elements].reshape(width, elements), flat[width * elements :]
        # In one-byte types exponent and mantissa can't be told apart.
        repeating = [width == 1, *(repeats(plane) for plane in planes[1:])]
        upper, flags, writer = planes[0], 0, SectionWriter()
        if self._method is not Method.LZ4 and _takes_references(form, len(data)):
            by_channel = upper.reshape(-1, form.channels)
            references = _references(by_channel)
            upper = np.subtract(by_channel, references, out=by_channel).reshape(-1)
            writer.store(references)
            flags = _REFERENCED
        method = Method.SEARCH if self._method is Method.ENTROPY and any(repeating) else self._method
        writer.compress(upper, method)
        for plane, shrinks in zip(planes[1:], repeating[1:], strict=True):
            if shrinks:
                writer.compress(plane, method)
            else:
                writer.store(plane)
        writer.store(rest)
        return writer.join(bytes([flags]), len(data))

    def decode(self, wire: memoryview, out: memoryview, form: ChunkForm) -> None:
        width = DTYPE_BYTES[form.dtype]
        elements = len(out) // width
        if not len(wire) or wire[0] & ~_REFERENCED:
            raise CodecError(f"{self.name}: no flags, or unknown ones")
        reader = SectionReader(wire[1:])
        references = None
        if wire[0] & _REFERENCED:
            if len(out) % form.token_bytes:
                raise CodecError(f"{self.name}: references, and {len(out)} bytes are not whole tokens")
            references = reader.take(form.channels)
        planes = [reader.take(elements) for _ in range(width)]
        rest = reader.take(len(out) - width * elements)
        reader.end()
        if references is not None:
            planes[0] = (planes[0].reshape(-1, form.channels) + references).reshape(-1)
        from_planes(planes, out[: width * elements], form.dtype)
        out[width * elements :] = rest.data


def _takes_references(form: ChunkForm, size_bytes: int) -> bool:
    fewest = _FEWEST_KEY_TOKENS if form.kind is TensorKind.KEY else _FEWEST_TOKENS
    return (
        DTYPE_BYTES[form.dtype] > 1
        and not form.kind.is_state
        and size_bytes % form.token_bytes == 0
        and size_bytes >= fewest * form.token_bytes
    )


def _references(by_channel: Bytes) -> Bytes:
    """Of each channel of `[token, channels]` the median of some tokens."""
    sample = by_channel[:: len(by_channel) // _SAMPLED_TOKENS][:_SAMPLED_TOKENS]
    return np.ascontiguousarray(np.partition(sample.T, _SAMPLED_TOKENS // 2, axis=1)[:, _SAMPLED_TOKENS // 2])


LZ4 = PlaneCodec("lz4", 1, Method.LZ4)
ZSTD = PlaneCodec("zstd", 2, Method.ENTROPY)
