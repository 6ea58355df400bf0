"""What a codec is."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

from prfaas.common.errors import PrfaasError
from prfaas.common.kv_layout import DTYPE_BYTES, TensorKind, TensorLayout


class CodecError(PrfaasError):
    """The bytes on the wire don't decode to what their header says; treated like a checksum mismatch."""


class ChunkForm(NamedTuple):
    """What a chunk's bytes are, as both sides know it from the layout: C-ordered elements `[token, channels]` of one
    head, or for a state (`channels` = all of it) elements of its whole. A chunk may be any byte range of that; sent
    chunks begin and end between two tokens unless a token is larger than a chunk."""

    kind: TensorKind
    dtype: str
    """A key of `kv_layout.DTYPE_BYTES`."""
    channels: int
    """Elements a token has in a row."""

    @property
    def token_bytes(self) -> int:
        return self.channels * DTYPE_BYTES[self.dtype]


def form_of(tensor: TensorLayout) -> ChunkForm:
    return ChunkForm(tensor.kind, tensor.dtype, math.prod(tensor.dims))


class Codec(Protocol):
    """Every chunk stands alone. Both methods release the GIL for most of their time, so they run in threads."""

    @property
    def name(self) -> str: ...

    @property
    def number(self) -> int:
        """In the chunk's header."""
        ...

    @property
    def lossless(self) -> bool:
        """A lossless codec's chunk is checksummed over its decoded bytes, a lossy one's over its encoded bytes: what
        the sender has and what the receiver gets are different numbers, and only the latter must not change on the
        way."""
        ...

    def encode(self, data: memoryview, form: ChunkForm) -> bytes | None:
        """Fewer bytes than `data`, or None: it doesn't shrink, or the codec is not for such a form; it goes raw."""
        ...

    def decode(self, wire: memoryview, out: memoryview, form: ChunkForm) -> None:
        """Fill `out` exactly. Never makes more than `len(out)` bytes, whatever `wire` says. Raises CodecError; `out`
        may then be half written."""
        ...
