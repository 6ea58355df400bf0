"""KV memory that has been touched before it is needed.

Receiving into memory that was never touched runs at a fifteenth of the speed: each page faults in the middle of the
copy. An arena maps all its memory at start and hands out regions of it.

`Allocator` is the accounting alone (pure); `Arena` adds the memory.
"""

from __future__ import annotations

import bisect
import contextlib
import mmap
from dataclasses import dataclass

DEFAULT_ALIGN_BYTES = 64
"""A cache line; also the widest vector load."""


class Allocator:
    """First fit over a sorted list of free spans, neighbours merged. Offsets are aligned, sizes rounded up."""

    def __init__(self, total_bytes: int) -> None:
        if total_bytes < 1:
            raise ValueError(f"an arena of {total_bytes} bytes")
        self.total_bytes = total_bytes
        self.free_bytes = total_bytes
        self._starts = [0]
        self._ends = [total_bytes]

    def allocate(self, nbytes: int, align: int = DEFAULT_ALIGN_BYTES) -> tuple[int, int] | None:
        """(start, end) of a span of at least `nbytes` (0 counts as 1), or None when no free span is large enough."""
        if nbytes < 0 or align < 1 or align & (align - 1):
            raise ValueError(f"cannot allocate {nbytes} bytes aligned to {align} (a power of two)")
        size = -(-max(nbytes, 1) // align) * align
        for i, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            aligned = -(-start // align) * align
            # The last bytes of an arena may be fewer than a whole step of alignment.
            stop = min(aligned + size, self.total_bytes)
            if aligned + max(nbytes, 1) <= end and stop <= end:
                self._take(i, aligned, stop)
                return aligned, stop
        return None

    def _take(self, i: int, start: int, end: int) -> None:
        before, after = self._starts[i], self._ends[i]
        rest = [(s, e) for s, e in ((before, start), (end, after)) if s < e]
        self._starts[i : i + 1] = [s for s, _ in rest]
        self._ends[i : i + 1] = [e for _, e in rest]
        self.free_bytes -= end - start

    def free(self, start: int, end: int) -> None:
        """Give a span back, just as `allocate` returned it. Raises ValueError when part of it is free already."""
        i = bisect.bisect_left(self._starts, start)
        if (i < len(self._starts) and self._starts[i] < end) or (i > 0 and self._ends[i - 1] > start):
            raise ValueError(f"bytes [{start}, {end}) are free already")
        self.free_bytes += end - start
        if i < len(self._starts) and self._starts[i] == end:
            end = self._ends[i]
            del self._starts[i], self._ends[i]
        if i > 0 and self._ends[i - 1] == start:
            self._ends[i - 1] = end
        else:
            self._starts.insert(i, start)
            self._ends.insert(i, end)


@dataclass(slots=True)
class Region:
    """`view` has the bytes that were asked for. Whoever holds the region owns them until `free`."""

    offset: int
    view: memoryview
    _arena: Arena
    _end: int
    _freed: bool = False

    def free(self) -> None:
        """Give the memory back; idempotent. Arrays made from `view` must not be used any more."""
        if not self._freed:
            self._freed = True
            self._arena.release(self.offset, self._end)


class Arena:
    """`total_bytes` of memory, all touched when the constructor returns (about 1 GB/s to 4 GB/s): anonymous, or that
    of a descriptor which other processes map as well (`shared`; it stays the caller's)."""

    def __init__(self, total_bytes: int, shared: int | None = None) -> None:
        self._allocator = Allocator(total_bytes)
        if shared is None:
            self._map = mmap.mmap(-1, total_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._map = mmap.mmap(shared, total_bytes, flags=mmap.MAP_SHARED)
        _touch(self._map, total_bytes)
        self._view = memoryview(self._map)

    @property
    def total_bytes(self) -> int:
        return self._allocator.total_bytes

    @property
    def free_bytes(self) -> int:
        return self._allocator.free_bytes

    def allocate(self, nbytes: int, align: int = DEFAULT_ALIGN_BYTES) -> Region | None:
        """A region of `nbytes`, with whatever the last owner left in it; None = no room now."""
        span = self._allocator.allocate(nbytes, align)
        if span is None:
            return None
        start, end = span
        return Region(start, self._view[start : start + nbytes], self, end)

    def release(self, start: int, end: int) -> None:
        """`Region.free` calls this."""
        self._allocator.free(start, end)


def _touch(memory: mmap.mmap, total_bytes: int) -> None:
    """Make every page present: huge pages where the kernel gives them, populated in one call where it knows how."""
    populate_write = 23  # MADV_POPULATE_WRITE, Linux 5.14; not named in Python's mmap module
    with contextlib.suppress(AttributeError, OSError):  # a kernel without transparent huge pages: ordinary ones do
        memory.madvise(mmap.MADV_HUGEPAGE)
    try:
        memory.madvise(populate_write)
    except OSError:
        page_bytes = mmap.PAGESIZE
        for offset in range(0, total_bytes, page_bytes):
            memory[offset] = 0
