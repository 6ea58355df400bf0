"""Recycled buffers for encoded chunks: fresh memory would fault page by page while it is received into."""

from __future__ import annotations

BUFFER_BYTES = 1 << 20
"""Fits a chunk of the default size. Larger ones are allocated as they come; MAX_CHUNK_BYTES bounds them."""
KEPT_BUFFERS = 16


class ScratchPool:
    def __init__(self) -> None:
        self._free: list[bytearray] = []

    def take(self, nbytes: int) -> memoryview:
        if nbytes > BUFFER_BYTES:
            return memoryview(bytearray(nbytes))
        buffer = self._free.pop() if self._free else bytearray(BUFFER_BYTES)
        return memoryview(buffer)[:nbytes]

    def give_back(self, view: memoryview) -> None:
        """`view` came from `take`; nobody may use it any more."""
        buffer = view.obj
        if isinstance(buffer, bytearray) and len(buffer) == BUFFER_BYTES and len(self._free) < KEPT_BUFFERS:
            self._free.append(buffer)
