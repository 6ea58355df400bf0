"""Sections: how codecs put several streams of bytes into one chunk.

    | method u8 | length u32 | `length` bytes |        little-endian, one after another, nothing behind the last

    method 0   stored: the bytes themselves, `length` of them
    method 1   one zstd frame (RFC 8878) of `length` bytes, with its content size in the frame's header, no dictionary

Both sides know from the chunk's form and decoded length how many bytes each section holds once decoded; a section of
none is left out. A reader refuses a frame that announces another size before anything is allocated for it.
"""

from __future__ import annotations

import struct

import numpy as np
import zstandard
from numpy.typing import NDArray
from prfaas.transport.codecs.api import CodecError

Bytes = NDArray[np.uint8]

_HEAD = struct.Struct("<BI")
_STORED = 0
_ZSTD = 1

# zstd's own level 1 searches for matches that planes of floats don't have, and takes chance ones that cost more than
# Huffman-coded literals. A tiny table and the longest minimal match leave the entropy coder alone: three times faster,
# and smaller. (Negative levels would skip the search too, but don't code literals.)
_ENTROPY = zstandard.ZstdCompressionParameters(
    window_log=20, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0, strategy=zstandard.STRATEGY_FAST
)
_SEARCH = zstandard.ZstdCompressionParameters.from_level(1)
_SAMPLE_BYTES = 8192
_WORTH = 31 / 32  # a section that shrinks by less is stored: decoding it again would cost more than it saves


def repeats(data: Bytes) -> bool:
    """Whether a sample of bytes that look random finds matches in itself (repeated tokens, zeros)."""
    sample = data[:_SAMPLE_BYTES]
    return len(_compress(sample, search=True)) < _WORTH * len(sample)


def _compress(data: Bytes, *, search: bool) -> bytes:
    # (De)compressor objects are not thread-safe and cheap beside a chunk.
    parameters = _SEARCH if search else _ENTROPY
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data.data)


class SectionWriter:
    def __init__(self) -> None:
        self._parts: list[bytes | memoryview] = []

    def store(self, data: Bytes) -> None:
        """`data` (C-contiguous) must not change until `join`."""
        if len(data):
            self._parts += (_HEAD.pack(_STORED, len(data)), data.data)

    def compress(self, data: Bytes, *, search: bool = False) -> None:
        """With zstd if that shrinks it. search: look for repeated strings too, not only for uneven bytes."""
        if not len(data):
            return
        frame = _compress(data, search=search)
        if len(frame) < _WORTH * len(data):
            self._parts += (_HEAD.pack(_ZSTD, len(frame)), frame)
        else:
            self.store(data)

    def join(self, head: bytes, limit_bytes: int) -> bytes | None:
        """`head` and all sections; None if that isn't less than `limit_bytes`."""
        if len(head) + sum(len(part) for part in self._parts) >= limit_bytes:
            return None
        return b"".join((head, *self._parts))


class SectionReader:
    def __init__(self, wire: memoryview) -> None:
        self._rest = wire

    def take(self, size: int) -> Bytes:
        """The next section, which holds `size` bytes; read-only. Raises CodecError."""
        if not size:
            return np.empty(0, np.uint8)
        if len(self._rest) < _HEAD.size:
            raise CodecError(f"{len(self._rest)} bytes where a section begins")
        method, length = _HEAD.unpack_from(self._rest)
        body = self._rest[_HEAD.size : _HEAD.size + length]
        if len(body) != length:
            raise CodecError(f"a section of {length} bytes where {len(body)} are left")
        self._rest = self._rest[_HEAD.size + length :]
        if method == _STORED:
            data: bytes | memoryview = body
        elif method == _ZSTD:
            data = _decompress(body, size)
        else:
            raise CodecError(f"unknown section method {method}")
        if len(data) != size:
            raise CodecError(f"a section of {len(data)} bytes, not {size}")
        return np.frombuffer(data, np.uint8)

    def end(self) -> None:
        if len(self._rest):
            raise CodecError(f"{len(self._rest)} bytes behind the last section")


def _decompress(frame: memoryview, size: int) -> bytes:
    try:
        # The library allocates what the frame announces: look before letting it.
        announced = zstandard.frame_content_size(frame)
        if announced != size:
            raise CodecError(f"a frame announces {announced} bytes, not {size}")
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"zstd: {error}") from None
