"""Sections: how codecs put several streams of bytes into one chunk.

    | method u8 | length u32 | `length` bytes |        little-endian, one after another, nothing behind the last

    method 0   stored: the bytes themselves, `length` of them
    method 1   one zstd frame (RFC 8878) of `length` bytes, with its content size in the frame's header, no dictionary
    method 2   one lz4 block (not frame) of `length` bytes

Both sides know from the chunk's form and decoded length how many bytes each section holds once decoded; a section of
none is left out. A reader takes any method in any section. It never allocates more than the section holds: it refuses
a frame that announces another size, and gives lz4 a buffer of that size.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, Generic, TypeVar

import lz4.block
import numpy as np
import zstandard
from numpy.typing import NDArray
from prfaas.transport.codecs.api import CodecError

Bytes = NDArray[np.uint8]
T = TypeVar("T")

_HEAD = struct.Struct("<BI")
_STORED = 0
_ZSTD = 1
_LZ4 = 2

# zstd's own level 1 searches for matches that planes of floats don't have, and takes chance ones that cost more than
# Huffman-coded literals. A tiny table and the longest minimal match leave the entropy coder alone: three times faster,
# and smaller. (Negative levels would skip the search too, but don't code literals.)
_ENTROPY = zstandard.ZstdCompressionParameters(
    window_log=20, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0, strategy=zstandard.STRATEGY_FAST
)
_SEARCH = zstandard.ZstdCompressionParameters.from_level(1)
_SAMPLE_BYTES = 4096
_WORTH = 63 / 64  # a section that shrinks by less is stored: decoding it again would cost more than it saves


class Pool(Generic[T]):
    """Contexts that one thread at a time may use. Making one takes as long as compressing some tens of KiB: their
    memory is fresh pages."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make: Final = make
        self._free: Final[list[T]] = []

    @contextmanager
    def lent(self) -> Iterator[T]:
        try:
            context = self._free.pop()
        except IndexError:
            context = self._make()
        try:
            yield context
        finally:
            self._free.append(context)


class Method(enum.Enum):
    """How to look for something to save."""

    ENTROPY = _ZSTD, _ENTROPY
    """zstd for bytes that are uneven, but don't repeat."""
    SEARCH = _ZSTD, _SEARCH
    """zstd at level 1: repeated strings too."""
    LZ4 = _LZ4, None
    """Repeated strings alone."""

    def compress(self, data: Bytes) -> bytes:
        _, parameters = self.value
        if parameters is None:
            block: bytes = lz4.block.compress(data.data, store_size=False)
            return block
        with _COMPRESSORS[self].lent() as compressor:
            return compressor.compress(data.data)


_COMPRESSORS = {
    method: Pool(partial(zstandard.ZstdCompressor, compression_params=method.value[1]))
    for method in (Method.ENTROPY, Method.SEARCH)
}
_DECOMPRESSORS = Pool(zstandard.ZstdDecompressor)


def repeats(data: Bytes) -> bool:
    """Whether a sample of bytes that look random finds matches in itself (repeated tokens, zeros)."""
    sample = data[:_SAMPLE_BYTES]
    return len(Method.SEARCH.compress(sample)) < _WORTH * len(sample)


class SectionWriter:
    def __init__(self) -> None:
        self._parts: list[bytes | memoryview] = []

    def store(self, data: Bytes) -> None:
        """`data` (C-contiguous) must not change until `join`."""
        if len(data):
            self._parts += (_HEAD.pack(_STORED, len(data)), data.data)

    def compress(self, data: Bytes, method: Method) -> None:
        """If that shrinks it; else `store`."""
        if not len(data):
            return
        body = method.compress(data)
        if len(body) < _WORTH * len(data):
            self._parts += (_HEAD.pack(method.value[0], len(body)), body)
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
            data = _from_zstd(body, size)
        elif method == _LZ4:
            data = _from_lz4(body, size)
        else:
            raise CodecError(f"unknown section method {method}")
        if len(data) != size:
            raise CodecError(f"a section of {len(data)} bytes, not {size}")
        return np.frombuffer(data, np.uint8)

    def end(self) -> None:
        if len(self._rest):
            raise CodecError(f"{len(self._rest)} bytes behind the last section")


def _from_zstd(frame: memoryview, size: int) -> bytes:
    try:
        # The library allocates what the frame announces: look before letting it.
        announced = zstandard.frame_content_size(frame)
        if announced != size:
            raise CodecError(f"a frame announces {announced} bytes, not {size}")
        with _DECOMPRESSORS.lent() as decompressor:
            return decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"zstd: {error}") from None


def _from_lz4(block: memoryview, size: int) -> bytes:
    try:
        data: bytes = lz4.block.decompress(block, uncompressed_size=size)
    except lz4.block.LZ4BlockError as error:
        raise CodecError(f"lz4: {error}") from None
    return data
