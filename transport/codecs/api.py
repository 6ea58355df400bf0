"""What a codec is."""

from __future__ import annotations

from typing import Protocol

from prfaas.common.errors import PrfaasError


class CodecError(PrfaasError):
    """The bytes on the wire don't decode to what their header says; treated like a checksum mismatch."""


class Codec(Protocol):
    """Lossless; every chunk stands alone. Both methods release the GIL for most of their time, so they run in threads.

    dtype is the tensor's wire dtype, a key of `kv_layout.DTYPE_BYTES`.
    """

    @property
    def name(self) -> str: ...

    @property
    def number(self) -> int:
        """In the chunk's header."""
        ...

    def encode(self, data: memoryview, dtype: str) -> bytes | None:
        """Fewer bytes than `data`, or None: it doesn't shrink and goes raw."""
        ...

    def decode(self, wire: memoryview, out: memoryview, dtype: str) -> None:
        """Fill `out` exactly. Never makes more than `len(out)` bytes, whatever `wire` says. Raises CodecError; `out`
        may then be half written."""
        ...
