"""The two halves of one transfer as pure state: what to send next, what has arrived. No socket, no clock, no thread.

`SendingTransfer` turns ready pieces into chunks in layer order and keeps what is unacknowledged; `ReceivingTransfer`
says where a chunk belongs, whether it is new, and which layers are complete. Both compute the same extents from the
layout, the token range and the shard.
"""

from __future__ import annotations

import bisect
import enum
import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from prfaas.common.errors import ChecksumError, ProtocolError
from prfaas.common.kv_layout import Extent, KvLayout
from prfaas.transport.api import KvPiece, TransferSpec
from prfaas.transport.frames import FrameHeader

MAX_ATTEMPTS = 2
"""A chunk is sent once more after a checksum mismatch, and no more: twice is no accident."""

CREDIT_STEP = 4
"""A CREDIT is due when a quarter of the window has been consumed since the last: few frames, never a stall."""


MAX_GAPS = 65_536
"""Between the bytes of all rows that have come. Chunks of a row leave in its order, so lanes that overtake one another
leave few; a peer that sends every other byte would take a hundred bytes of bookkeeping for each."""
MAX_DAMAGED = 1024
"""Places of a transfer that arrived damaged once: by accident there are a few."""

TIME_RAN_OUT = "the request's time ran out"


class Cut(NamedTuple):
    """A chunk to send: `data` is the engine's memory."""

    sequence: int
    layer: int
    tensor: int
    row: int
    offset_bytes: int
    data: memoryview
    attempt: int

    @property
    def place(self) -> tuple[int, int, int, int]:
        return self.layer, self.tensor, self.row, self.offset_bytes


def check_place(
    extents: Sequence[Sequence[Extent]], layer: int, tensor: int, row: int, offset_bytes: int, nbytes: int
) -> str | None:
    """What is wrong with a byte range, or None."""
    if layer >= len(extents) or tensor >= len(extents[layer]):
        return f"layer {layer} tensor {tensor} is not in the layout"
    extent = extents[layer][tensor]
    if row >= extent.rows or offset_bytes + nbytes > extent.row_bytes:
        return (
            f"row {row} bytes [{offset_bytes}, {offset_bytes + nbytes}) of layer {layer} tensor {tensor} is outside "
            f"its {extent.rows} rows of {extent.row_bytes} bytes"
        )
    return None


class SendingTransfer:
    """put → next_chunk → sent → acknowledged (or damaged: once more). Raises ValueError on pieces that don't fit."""

    def __init__(self, layout: KvLayout, spec: TransferSpec, chunk_bytes: int) -> None:
        self._extents = layout.extents(spec.tokens, spec.shard)
        self._total_bytes = sum(e.total_bytes for layer in self._extents for e in layer)
        self._chunk_bytes = chunk_bytes
        self._ready: list[tuple[int, int, int, int, memoryview]] = []
        self._resend: list[Cut] = []
        self._unacknowledged: dict[int, Cut] = {}
        self._unsent = 0
        self._put_bytes = 0
        self._used_credit_bytes = 0
        self._granted_bytes = 0
        self._next_sequence = 0
        self._finishing = False
        self._finish_sent = False
        self.resent_chunks = 0
        self.finished = False
        """The receiver has said that it has everything."""

    def opened(self, credit_bytes: int) -> None:
        """OPEN was accepted. Chunks are at most half the window, so that one can be sent while one is consumed."""
        self._chunk_bytes = max(1, min(self._chunk_bytes, credit_bytes // 2))
        self.grant(credit_bytes)

    def grant(self, granted_bytes: int) -> None:
        """`granted_bytes` counts from the start; a late CREDIT changes nothing."""
        self._granted_bytes = max(self._granted_bytes, granted_bytes)

    def put(self, pieces: Iterable[KvPiece]) -> None:
        for piece in pieces:
            data = memoryview(piece.data).cast("B")
            problem = check_place(self._extents, piece.layer, piece.tensor, piece.row, piece.offset_bytes, len(data))
            if problem is None and self._finishing:
                problem = "a piece was put after finish()"
            if problem is not None:
                raise ValueError(problem)
            if len(data):
                self._put_bytes += len(data)
                heapq.heappush(self._ready, (piece.layer, piece.offset_bytes, piece.tensor, piece.row, data))

    def finish(self) -> None:
        """Raises ValueError when bytes of the range were never put: the receiver would wait for them for ever."""
        if self._put_bytes != self._total_bytes:
            raise ValueError(f"finish() after {self._put_bytes} of {self._total_bytes} bytes were put")
        self._finishing = True

    def next_chunk(self) -> Cut | None:
        """The chunk that leaves next, by layer, then token; None when nothing is ready or the credit is used up."""
        if self._resend:
            size = len(self._resend[-1].data)
            return self._start(self._resend.pop()) if self._has_credit(size) else None
        if not self._ready:
            return None
        layer, offset, tensor, row, data = self._ready[0]
        size = min(len(data), self._chunk_bytes)
        if not self._has_credit(size):
            return None
        if size == len(data):
            heapq.heappop(self._ready)
        else:
            heapq.heapreplace(self._ready, (layer, offset + size, tensor, row, data[size:]))
            data = data[:size]
        return self._start(Cut(self._sequence(), layer, tensor, row, offset, data, 1))

    def _has_credit(self, size: int) -> bool:
        return self._used_credit_bytes + size <= self._granted_bytes

    def _start(self, cut: Cut) -> Cut:
        self._used_credit_bytes += len(cut.data)
        self._unacknowledged[cut.sequence] = cut
        self._unsent += 1
        return cut

    def _sequence(self) -> int:
        self._next_sequence += 1
        return self._next_sequence

    def sent(self, sequence: int) -> None:
        """The chunk's last byte was handed to a socket."""
        self._unsent -= 1

    def acknowledged(self, sequences: Iterable[int]) -> None:
        for sequence in sequences:
            self._unacknowledged.pop(sequence, None)

    def damaged(self, sequences: Iterable[int]) -> None:
        """Send them once more. Raises ChecksumError when one was sent twice already."""
        for sequence in sequences:
            cut = self._unacknowledged.pop(sequence, None)
            if cut is None:
                continue
            if cut.attempt >= MAX_ATTEMPTS:
                raise ChecksumError(f"a chunk of layer {cut.layer} arrived damaged {cut.attempt} times")
            self.resent_chunks += 1
            self._resend.append(cut._replace(sequence=self._sequence(), attempt=cut.attempt + 1))

    @property
    def unacknowledged(self) -> Iterable[int]:
        return self._unacknowledged.keys()

    @property
    def finish_due(self) -> bool:
        """FINISH may leave: everything was put and every chunk handed to a socket."""
        return self._finishing and not self._finish_sent and not self._ready and not self._resend and self._unsent == 0

    def finish_sent(self) -> None:
        self._finish_sent = True


class Placement(enum.Enum):
    NEW = 1
    DUPLICATE = 2


class ByteRanges:
    """Disjoint ranges [start, end) of one row, neighbours merged."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __len__(self) -> int:
        return len(self._starts)

    def overlap(self, start: int, end: int) -> int:
        """How many bytes of [start, end) are in."""
        i = bisect.bisect_right(self._ends, start)
        total = 0
        while i < len(self._starts) and self._starts[i] < end:
            total += min(end, self._ends[i]) - max(start, self._starts[i])
            i += 1
        return total

    def add(self, start: int, end: int) -> None:
        """[start, end) must not overlap what is in."""
        i = bisect.bisect_left(self._starts, start)
        if i < len(self._starts) and self._starts[i] == end:
            end = self._ends[i]
            del self._starts[i], self._ends[i]
        if i > 0 and self._ends[i - 1] == start:
            self._ends[i - 1] = end
        else:
            self._starts.insert(i, start)
            self._ends.insert(i, end)

    def remove(self, start: int, end: int) -> None:
        """Take out a range that was added; it may have been merged with its neighbours."""
        i = bisect.bisect_right(self._starts, start) - 1
        old_start, old_end = self._starts[i], self._ends[i]
        rest = [(s, e) for s, e in ((old_start, start), (end, old_end)) if s < e]
        self._starts[i : i + 1] = [s for s, _ in rest]
        self._ends[i : i + 1] = [e for _, e in rest]


class ReceivingTransfer:
    """place → (bytes come) → arrived. A range is claimed from `place` on: no two lanes ever write the same one."""

    def __init__(self, layout: KvLayout, spec: TransferSpec, window_bytes: int) -> None:
        self._extents = layout.extents(spec.tokens, spec.shard)
        self._missing = [sum(e.total_bytes for e in layer) for layer in self._extents]
        self._missing_layers = sum(1 for nbytes in self._missing if nbytes)
        self._claimed: dict[tuple[int, int, int], ByteRanges] = {}
        self._damaged: set[tuple[int, int, int, int]] = set()
        self._gaps = 0
        self._window_bytes = window_bytes
        self._begun_bytes = 0
        self._consumed_bytes = 0
        self._granted_bytes = window_bytes
        self._finish_arrived = False
        self.duplicate_chunks = 0

    @property
    def window_bytes(self) -> int:
        return self._window_bytes

    def empty_layers(self) -> list[int]:
        """Layers that are complete from the start."""
        return [layer for layer, nbytes in enumerate(self._missing) if nbytes == 0]

    def place(self, chunk: FrameHeader) -> Placement:
        """Where a chunk that is about to arrive belongs; NEW claims its range. Raises ProtocolError."""
        end = chunk.offset_bytes + chunk.raw_bytes
        problem = check_place(self._extents, chunk.layer, chunk.tensor, chunk.row, chunk.offset_bytes, chunk.raw_bytes)
        if problem is not None:
            raise ProtocolError(f"CHUNK: {problem}")
        self._begun_bytes += chunk.raw_bytes
        if self._begun_bytes > self._granted_bytes:
            raise ProtocolError(f"CHUNK: {self._begun_bytes} bytes sent, {self._granted_bytes} were granted")
        key = (chunk.layer, chunk.tensor, chunk.row)
        ranges = self._claimed.get(key)
        if ranges is None:
            ranges = self._claimed[key] = ByteRanges()
        held = ranges.overlap(chunk.offset_bytes, end)
        if held == 0:
            before = len(ranges) or 1  # the first of a row is no gap
            ranges.add(chunk.offset_bytes, end)
            self._gaps += len(ranges) - before
            if self._gaps > MAX_GAPS:
                raise ProtocolError(f"CHUNKs leave more than {MAX_GAPS} gaps between them")
            return Placement.NEW
        if held < chunk.raw_bytes:
            raise ProtocolError(
                f"CHUNK overlaps {held} bytes that are here already: layer {chunk.layer} tensor {chunk.tensor} "
                f"row {chunk.row} [{chunk.offset_bytes}, {end})"
            )
        self.duplicate_chunks += 1
        return Placement.DUPLICATE

    def arrived(self, chunk: FrameHeader) -> bool:
        """A NEW chunk is in its place and its checksum matched. True: this completed its layer."""
        self._consumed_bytes += chunk.raw_bytes
        self._missing[chunk.layer] -= chunk.raw_bytes
        if self._missing[chunk.layer]:
            return False
        self._missing_layers -= 1
        return True

    def damaged(self, chunk: FrameHeader) -> None:
        """A NEW chunk's checksum did not match: its range is open again. Raises ChecksumError at the second time."""
        self._consumed_bytes += chunk.raw_bytes
        self._release(chunk)
        place = (chunk.layer, chunk.tensor, chunk.row, chunk.offset_bytes)
        if place in self._damaged:
            raise ChecksumError(
                f"layer {chunk.layer} tensor {chunk.tensor} row {chunk.row} byte {chunk.offset_bytes}: "
                f"the checksum did not match, twice"
            )
        if len(self._damaged) >= MAX_DAMAGED:
            raise ChecksumError(f"more than {MAX_DAMAGED} chunks arrived damaged")
        self._damaged.add(place)

    def drained(self, chunk: FrameHeader) -> None:
        """A duplicate's bytes went to the sink."""
        self._consumed_bytes += chunk.raw_bytes

    def _release(self, chunk: FrameHeader) -> None:
        ranges = self._claimed[chunk.layer, chunk.tensor, chunk.row]
        before = len(ranges)
        ranges.remove(chunk.offset_bytes, chunk.offset_bytes + chunk.raw_bytes)
        self._gaps += (len(ranges) or 1) - before

    def finish(self) -> None:
        self._finish_arrived = True

    @property
    def complete(self) -> bool:
        """All layers and FINISH are here."""
        return self._finish_arrived and self._missing_layers == 0

    @property
    def granted_bytes(self) -> int:
        return self._granted_bytes

    def credit_due(self) -> int | None:
        """What to grant now, or None: too little was consumed since the last time."""
        granted = self._consumed_bytes + self._window_bytes
        if granted - self._granted_bytes < max(1, self._window_bytes // CREDIT_STEP):
            return None
        self._granted_bytes = granted
        return granted
