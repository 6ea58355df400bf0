"""The KV of one prompt in a file: `prfaas capture-kv` writes it, `prfaas bench codec` reads it.

    offset  bytes
    0       8         magic b"PRFAASKV"
    8       4         format version, little-endian; 1
    12      4         length of the header, little-endian; at most MAX_HEADER_BYTES
    16      ...       header: one JSON object in UTF-8 (`Header`), padded with spaces to a multiple of 64 bytes
    ...     to end    KV of tokens [0, n − 1) of the prompt, in wire order: layer by layer, tensor by tensor, row by row
                      (`common/kv_layout.py`), nothing in between; its length follows from layout and tokens

The header holds no code and names no file. A file that ends early, is too long, or whose KV doesn't hash to the
header's checksum is refused.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
import xxhash
from prfaas.common.errors import ConfigError, SetupError
from prfaas.common.kv_layout import DTYPE_BYTES, MAX_TOKENS, Extent, KvLayout, TensorLayout, TokenRange
from prfaas.transport.codecs.api import ChunkForm, form_of

MAGIC = b"PRFAASKV"
VERSION = 1
MAX_HEADER_BYTES = 16 << 20
"""Two million token ids of seven digits."""
MAX_KV_BYTES = 1 << 36
"""The file is read into memory as a whole."""
_PREFIX = struct.Struct("<8sII")
_ALIGN_BYTES = 64
"""A cache line: where the KV begins in the file."""
_MAX_ID = (1 << 31) - 1


class KvFileError(SetupError):
    """Not a KV file, another version of it, or a damaged one."""


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """prompt_token_ids: n tokens, of which KV of the first n − 1 is in the file. following_token_ids: how the text
    went on (possibly empty), for measuring how well it is predicted. kv_xxh3: xxh3-64 of the KV, 16 hex digits."""

    model: str
    model_fingerprint: str
    layout: dict[str, Any]
    prompt_token_ids: list[int]
    following_token_ids: list[int]
    kv_xxh3: str


class Prompt(NamedTuple):
    """A prompt, and KV (in wire order) of all its tokens but the last."""

    token_ids: Sequence[int]
    kv: bytes | bytearray


class Chunk(NamedTuple):
    """Bytes [start, end) of `KvCapture.data`, that cross the wire as one chunk."""

    form: ChunkForm
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class KvCapture:
    """`data` is the KV of tokens [0, n − 1) of the prompt in wire order, `layout.total_bytes(tokens)` bytes."""

    model: str
    model_fingerprint: str
    layout: KvLayout
    prompt_token_ids: tuple[int, ...]
    following_token_ids: tuple[int, ...]
    data: bytes | bytearray

    @property
    def tokens(self) -> TokenRange:
        return TokenRange(0, len(self.prompt_token_ids) - 1)

    @property
    def has_prefixes(self) -> bool:
        """Whether the KV of a shorter prompt is a part of this one: not with states or windows."""
        return all(
            not tensor.kind.is_state and tensor.window_tokens is None
            for layer in self.layout.layers
            for tensor in layer.tensors
        )

    def prefix(self, prompt_tokens: int) -> KvCapture:
        """The same for the prompt's first tokens; what comes after them is text that follows."""
        if prompt_tokens == len(self.prompt_token_ids):
            return self
        if not self.has_prefixes or not 2 <= prompt_tokens <= len(self.prompt_token_ids):
            raise ValueError(f"no prefix of {prompt_tokens} tokens")
        kept = TokenRange(0, prompt_tokens - 1)
        data = bytearray()
        for row in rows(self.layout, self.tokens):
            data += memoryview(self.data)[row.start : row.start + kept.end * row.tensor.row_bytes_per_token]
        ids = self.prompt_token_ids
        return KvCapture(
            self.model,
            self.model_fingerprint,
            self.layout,
            ids[:prompt_tokens],
            ids[prompt_tokens:] + self.following_token_ids,
            data,
        )

    def chunks(self, chunk_bytes: int, step_tokens: int) -> list[Chunk]:
        """Cut as a transfer would be: what one prefill step of `step_tokens` computes of a row, in chunks of at most
        `chunk_bytes` that end between two tokens (unless a token is larger)."""
        return [
            Chunk(form_of(row.tensor), start, end)
            for row in rows(self.layout, self.tokens)
            for start, end in _cut_row(row, chunk_bytes, step_tokens)
        ]


class Row(NamedTuple):
    """A row of a tensor of a layer, and where its bytes begin in the wire order."""

    layer: int
    tensor_index: int
    tensor: TensorLayout
    extent: Extent
    row: int
    start: int


def rows(layout: KvLayout, tokens: TokenRange) -> Iterator[Row]:
    """In wire order."""
    start = 0
    for layer, extents in enumerate(layout.extents(tokens)):
        for index, extent in enumerate(extents):
            for row in range(extent.rows):
                yield Row(layer, index, layout.layers[layer].tensors[index], extent, row, start)
                start += extent.row_bytes


def _cut_row(row: Row, chunk_bytes: int, step_tokens: int) -> Iterator[tuple[int, int]]:
    begin, end = row.start, row.start + row.extent.row_bytes
    token_bytes = row.tensor.row_bytes_per_token
    if row.tensor.kind.is_state or token_bytes > chunk_bytes:
        element_bytes = DTYPE_BYTES[row.tensor.dtype]
        stride = max(chunk_bytes // element_bytes, 1) * element_bytes
        yield from ((at, min(at + stride, end)) for at in range(begin, end, stride))
        return
    most_tokens = chunk_bytes // token_bytes
    at = row.extent.token_start
    last = at + row.extent.tokens
    while at < last:
        step_end = (at // step_tokens + 1) * step_tokens
        until = min(at + most_tokens, step_end, last)
        origin = row.extent.token_start
        yield begin + (at - origin) * token_bytes, begin + (until - origin) * token_bytes
        at = until


# -- the file ---------------------------------------------------------------------------------------------------------


def write(path: Path, capture: KvCapture) -> None:
    """Complete or not at all: it is written beside `path` and renamed. Raises OSError."""
    header = msgspec.json.encode(
        Header(
            capture.model,
            capture.model_fingerprint,
            capture.layout.to_dict(),
            list(capture.prompt_token_ids),
            list(capture.following_token_ids),
            xxhash.xxh3_64_hexdigest(capture.data),
        )
    )
    header += b" " * (-(_PREFIX.size + len(header)) % _ALIGN_BYTES)
    if len(header) > MAX_HEADER_BYTES:
        raise KvFileError(f"{path}: a header of {len(header)} bytes is over {MAX_HEADER_BYTES}; capture fewer tokens")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(_PREFIX.pack(MAGIC, VERSION, len(header)))
            file.write(header)
            file.write(capture.data)
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def read(path: Path) -> KvCapture:
    """Raises KvFileError in one line, OSError."""
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header = _read_header(path, file)
        layout, kv_bytes = _checked(path, header)
        expected = file.tell() + kv_bytes
        if file_bytes != expected:
            relation = "ends early" if file_bytes < expected else "is too long"
            raise KvFileError(f"{path} {relation}: {file_bytes} bytes, its header announces {expected}; capture again")
        data = bytearray(kv_bytes)
        if file.readinto(data) != kv_bytes:
            raise KvFileError(f"{path} ends early: it became shorter while it was read")
    if xxhash.xxh3_64_hexdigest(data) != header.kv_xxh3:
        raise KvFileError(f"{path} is damaged: its KV doesn't hash to {header.kv_xxh3}; capture again")
    return KvCapture(
        header.model,
        header.model_fingerprint,
        layout,
        tuple(header.prompt_token_ids),
        tuple(header.following_token_ids),
        data,
    )


def _read_header(path: Path, file: IO[bytes]) -> Header:
    prefix = file.read(_PREFIX.size)
    if not prefix.startswith(MAGIC):
        raise KvFileError(f"{path} is not a KV file; make one with prfaas capture-kv")
    if len(prefix) < _PREFIX.size:
        raise KvFileError(f"{path} ends early: after {len(prefix)} bytes; capture again")
    _, version, header_bytes = _PREFIX.unpack(prefix)
    if version != VERSION:
        raise KvFileError(f"{path} has format version {version}, this prfaas reads {VERSION}; capture again")
    if header_bytes > MAX_HEADER_BYTES:
        raise KvFileError(
            f"{path}: its header announces {header_bytes} bytes, more than {MAX_HEADER_BYTES}; capture again"
        )
    body = file.read(header_bytes)
    if len(body) < header_bytes:
        raise KvFileError(f"{path} ends early: inside its header; capture again")
    try:
        return msgspec.json.decode(body, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise KvFileError(f"{path}: its header is wrong: {error}; capture again") from None


def _checked(path: Path, header: Header) -> tuple[KvLayout, int]:
    """Everything that the header announces, bounded before memory is taken for it."""
    ids = header.prompt_token_ids
    if not 2 <= len(ids) <= MAX_TOKENS:
        raise KvFileError(
            f"{path}: its header is wrong: {len(ids)} prompt tokens, not from 2 to {MAX_TOKENS}; capture again"
        )
    if not all(0 <= token <= _MAX_ID for token in (*ids, *header.following_token_ids)):
        raise KvFileError(f"{path}: its header is wrong: a token id is not from 0 to {_MAX_ID}; capture again")
    try:
        layout = KvLayout.from_dict(header.layout)
        tokens = TokenRange(0, len(ids) - 1)
        kv_bytes = layout.total_bytes(tokens)
        whole = all(isinstance(n, int) for layer in layout.layers for t in layer.tensors for n in (t.heads, *t.dims))
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise KvFileError(f"{path}: its header is wrong: layout: {error!r}; capture again") from None
    if not whole or not 1 <= kv_bytes <= MAX_KV_BYTES:
        raise KvFileError(
            f"{path}: its header is wrong: layout of {kv_bytes} bytes, not from 1 to {MAX_KV_BYTES}; capture again"
        )
    return layout, kv_bytes
