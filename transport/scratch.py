"""Recycled buffers for encoded chunks: fresh memory would fault page by page while it is received into."""

from __future__ import annotations

BUFFER_BYTES = 1 << 20
"""Fits a chunk of the default size. Larger ones are allocated as they come; MAX_CHUNK_BYTES bounds them."""
KEPT_BUFFERS = 16
SMALL_BYTES = BUFFER_BYTES // 8
"""Such a chunk makes no whole buffer: a peer's many tiny ones would take a thousand times the credit they had."""


class ScratchPool:
    def __init__(self) -> None:
        self._free: list[bytearray] = []

    def take(self, nbytes: int) -> memoryview:
        if SMALL_BYTES < nbytes <= BUFFER_BYTES:
            buffer = self._free.pop() if self._free else bytearray(BUFFER_BYTES)
            return memoryview(buffer)[:nbytes]
        return memoryview(bytearray(nbytes))

    def give_back(self, view: memoryview) -> None:
        """`view` came from `take`; nobody may use it any more."""
        buffer = view.obj
        if isinstance(buffer, bytearray) and len(buffer) == BUFFER_BYTES and len(self._free) < KEPT_BUFFERS:
            self._free.append(buffer)
