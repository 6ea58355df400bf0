"""The two halves of one transfer as pure state: what to send next, what has arrived. No socket, no clock, no thread.

`SendingTransfer` turns ready pieces into chunks in layer order and keeps what is unacknowledged; `ReceivingTransfer`
says where a chunk belongs, whether it is new, and which layers are complete. Both compute the same extents from the
layout, the token range and the shard.
"""

from __future__ import annotations

import bisect
import enum
import heapq
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from prfaas.common.errors import ChecksumError, LaneLostError, ProtocolError
from prfaas.common.kv_layout import Extent, KvLayout
from prfaas.transport.api import KvPiece, TransferSpec
from prfaas.transport.frames import FrameHeader

MAX_ATTEMPTS = 2
"""A chunk is sent once more after a checksum mismatch, and no more: twice is no accident."""

MAX_MOVES = 16
"""Lanes that one chunk may lose: what kills every lane that carries it is no accident of the lanes."""

CREDIT_STEP = 4
"""A CREDIT is due when a quarter of the window has been consumed since the last: few frames, never a stall."""


MAX_GAPS = 65_536
"""Between the bytes of all rows that have come. Chunks of a row leave in its order, so lanes that overtake one another
leave few; a peer that sends every other byte would take a hundred bytes of bookkeeping for each."""
MAX_DAMAGED = 1024
"""Places of a transfer that arrived damaged once: by accident there are a few."""

Place = tuple[int, int, int, int]
"""Layer, tensor, row, offset_bytes."""

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
    copy: int = 0
    """Lanes that were lost with it."""

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
    """put → next_chunk → sent → acknowledged. Damaged: once more, as a new chunk; its lane lost: again, as the same.
    Raises ValueError on pieces that don't fit.

    Credit counts each byte of the KV once, however often it is sent: so does the receiver, which counts what it has and
    what is coming, and takes back what was damaged or lost with its lane."""

    def __init__(self, layout: KvLayout, spec: TransferSpec, chunk_bytes: int) -> None:
        self._extents = layout.extents(spec.tokens, spec.shard)
        self._token_bytes = [[t.row_bytes_per_token for t in layer.tensors] for layer in layout.layers]
        self._total_bytes = sum(e.total_bytes for layer in self._extents for e in layer)
        self._chunk_bytes = chunk_bytes
        self._ready: list[tuple[int, int, int, int, memoryview]] = []
        self._again: deque[Cut] = deque()
        self._unacknowledged: dict[int, Cut] = {}
        self._unsent: set[int] = set()
        self._acknowledged_bytes = 0
        self._put_bytes = 0
        self._ready_bytes = 0
        self._head_bytes = 0
        self._used_credit_bytes = 0
        self._granted_bytes = 0
        self._next_sequence = 0
        self._finishing = False
        self._finish_sent = False
        self.resent_chunks = 0
        self.moved_chunks = 0
        self.finished = False
        """The receiver has said that it has everything."""

    def opened(self, credit_bytes: int) -> None:
        """OPEN was accepted. Chunks are at most half the window, so that one can be sent while one is consumed."""
        self._chunk_bytes = max(1, min(self._chunk_bytes, credit_bytes // 2))
        self._head_bytes = 0
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
                self._ready_bytes += len(data)
                self._head_bytes = 0
                heapq.heappush(self._ready, (piece.layer, piece.offset_bytes, piece.tensor, piece.row, data))

    def finish(self) -> None:
        """Raises ValueError when bytes of the range were never put: the receiver would wait for them for ever."""
        if self._put_bytes != self._total_bytes:
            raise ValueError(f"finish() after {self._put_bytes} of {self._total_bytes} bytes were put")
        self._finishing = True

    @property
    def next_bytes(self) -> int:
        """Of the chunk that `next_chunk` would give; 0: none."""
        if self._again:
            return len(self._again[0].data)
        if not self._ready:
            return 0
        size = self._head_bytes or self._measure_head()
        return size if self._has_credit(size) else 0

    @property
    def ready_bytes(self) -> int:
        """Put, and not yet begun."""
        return self._ready_bytes

    @property
    def unacknowledged_bytes(self) -> int:
        """Put, and not known to be in its place."""
        return self._put_bytes - self._acknowledged_bytes

    @property
    def missing_bytes(self) -> int:
        """Of the whole transfer, put or not, what is not known to be in its place."""
        return self._total_bytes - self._acknowledged_bytes

    def next_chunk(self) -> Cut | None:
        """The chunk that leaves next: what was lost or damaged, then by layer, then token; None when nothing is ready
        or the credit is used up."""
        if self._again:
            return self._start(self._again.popleft())
        if not self._ready:
            return None
        size = self._head_bytes or self._measure_head()
        if not self._has_credit(size):
            return None
        layer, offset, tensor, row, data = self._ready[0]
        self._head_bytes = 0
        self._ready_bytes -= size
        self._used_credit_bytes += size
        if size == len(data):
            heapq.heappop(self._ready)
        else:
            heapq.heapreplace(self._ready, (layer, offset + size, tensor, row, data[size:]))
            data = data[:size]
        return self._start(Cut(self._sequence(), layer, tensor, row, offset, data, 1))

    def _measure_head(self) -> int:
        """The next chunk's size, kept: it is asked for often. Cut between two tokens where a chunk holds any, since
        codecs look at whole tokens."""
        layer, offset, tensor, _, data = self._ready[0]
        ready_bytes = len(data)
        size = min(ready_bytes, self._chunk_bytes)
        token = self._token_bytes[layer][tensor]
        if size < ready_bytes and size > token > 0:
            size -= (offset + size) % token
        self._head_bytes = size
        return size

    def _has_credit(self, size: int) -> bool:
        return self._used_credit_bytes + size <= self._granted_bytes

    def _start(self, cut: Cut) -> Cut:
        self._unacknowledged[cut.sequence] = cut
        self._unsent.add(cut.sequence)
        return cut

    def _sequence(self) -> int:
        self._next_sequence += 1
        return self._next_sequence

    def sent(self, sequence: int) -> None:
        """The chunk's last byte was handed to a socket."""
        self._unsent.discard(sequence)

    def acknowledged(self, sequences: Iterable[int]) -> None:
        for sequence in sequences:
            cut = self._unacknowledged.pop(sequence, None)
            if cut is not None:
                self._acknowledged_bytes += len(cut.data)
                self._unsent.discard(sequence)
                if self._again:  # a copy has arrived after all
                    self._again = deque(other for other in self._again if other.sequence != sequence)

    def lost(self, sequences: Iterable[int]) -> None:
        """The lane that took these chunks is gone: those that were not acknowledged leave again, first. The receiver
        may have them already; to it they are the same chunks. Raises LaneLostError when one has lost too many lanes."""
        for sequence in sequences:
            cut = self._unacknowledged.get(sequence)
            if cut is None:
                continue
            self._unsent.discard(sequence)
            if cut.copy >= MAX_MOVES:
                raise LaneLostError(f"{cut.copy} lanes were lost in turn, each with one chunk of layer {cut.layer}")
            self._unacknowledged[sequence] = moved = cut._replace(copy=cut.copy + 1)
            self._again.append(moved)
            self.moved_chunks += 1

    def damaged(self, sequences: Iterable[int]) -> None:
        """Send them once more. Raises ChecksumError when one was sent twice already."""
        for sequence in sequences:
            cut = self._unacknowledged.pop(sequence, None)
            if cut is None:
                continue
            if cut.attempt >= MAX_ATTEMPTS:
                raise ChecksumError(f"a chunk of layer {cut.layer} arrived damaged {cut.attempt} times")
            self.resent_chunks += 1
            self._unsent.discard(sequence)
            self._again.append(cut._replace(sequence=self._sequence(), attempt=cut.attempt + 1, copy=0))

    @property
    def unacknowledged(self) -> Iterable[int]:
        return self._unacknowledged.keys()

    @property
    def finish_due(self) -> bool:
        """FINISH may leave: everything was put and every chunk handed to a socket."""
        waiting = self._ready or self._again or self._unsent
        return self._finishing and not self._finish_sent and not waiting

    def finish_sent(self) -> None:
        self._finish_sent = True

    def finish_lost(self) -> None:
        """FINISH was on a lane that is gone: it is due again."""
        self._finish_sent = False


class Placement(enum.Enum):
    NEW = 1
    """Its range was free and is claimed now."""
    TAKEN_OVER = 2
    """Another lane was receiving an older copy: the sender has given that lane up, this one has the claim now. The
    caller sees to it that the other lane writes no more."""
    DUPLICATE = 3
    """It is here, or being checked, or a newer copy of it is being received."""


class Standing(enum.Enum):
    HELD = 1
    CHECKING = 2
    RECEIVING = 3
    """By a lane."""
    FREE = 4
    """Found damaged, or lost with its lane, since the copy began to be drained."""


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
        if not self._ends or start >= self._ends[-1]:
            return 0  # the usual way: a row's chunks come in its order
        i = bisect.bisect_right(self._ends, start)
        total = 0
        while i < len(self._starts) and self._starts[i] < end:
            total += min(end, self._ends[i]) - max(start, self._starts[i])
            i += 1
        return total

    def add(self, start: int, end: int) -> None:
        """[start, end) must not overlap what is in."""
        if self._ends and self._ends[-1] == start:
            self._ends[-1] = end
            return
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
    """place → (bytes come) → received → arrived or damaged. A range is claimed from `place` on: no two lanes ever write
    the same one.

        free --place--> receiving by one lane --received--> checking --arrived--> held
          ^                 |      ^---place by another lane     |
          '----lane_lost----'                                    |
          '------------------------damaged-----------------------'

    `lane` is anything hashable that tells lanes apart."""

    def __init__(self, layout: KvLayout, spec: TransferSpec, window_bytes: int) -> None:
        self._extents = layout.extents(spec.tokens, spec.shard)
        self._missing = [sum(e.total_bytes for e in layer) for layer in self._extents]
        self._missing_layers = sum(1 for nbytes in self._missing if nbytes)
        self._claimed: dict[tuple[int, int, int], ByteRanges] = {}
        self._receiving: dict[Hashable, FrameHeader] = {}
        self._lane_of: dict[Place, Hashable] = {}
        self._checking: set[Place] = set()
        self._damaged: set[Place] = set()
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

    def place(self, chunk: FrameHeader, lane: Hashable) -> Placement:
        """Where a chunk that is about to arrive on `lane` belongs. Raises ProtocolError."""
        place = layer, tensor, row, start = place_of(chunk)
        size = chunk.raw_bytes
        end = start + size
        problem = check_place(self._extents, layer, tensor, row, start, size)
        if problem is not None:
            raise ProtocolError(f"CHUNK: {problem}")
        ranges = self._claimed.get(place[:3])
        if ranges is None:
            ranges = self._claimed[place[:3]] = ByteRanges()
        held = ranges.overlap(start, end)
        if held == 0:
            begun = self._begun_bytes + size
            if begun > self._granted_bytes:
                raise ProtocolError(f"CHUNK: {begun} bytes sent, {self._granted_bytes} were granted")
            self._begun_bytes = begun
            before = len(ranges) or 1  # the first of a row is no gap
            ranges.add(start, end)
            self._gaps += len(ranges) - before
            if self._gaps > MAX_GAPS:
                raise ProtocolError(f"CHUNKs leave more than {MAX_GAPS} gaps between them")
            self._receiving[lane] = chunk
            self._lane_of[place] = lane
            return Placement.NEW
        if held < chunk.raw_bytes:
            raise ProtocolError(
                f"CHUNK overlaps {held} bytes that are here already: layer {layer} tensor {tensor} "
                f"row {row} [{start}, {end})"
            )
        other = self._lane_of.get(place)
        if other is not None:
            older = self._receiving[other]
            if older.raw_bytes != chunk.raw_bytes:
                raise ProtocolError(f"CHUNK of {chunk.raw_bytes} bytes where another lane is receiving another number")
            if chunk.copy > older.copy:
                del self._receiving[other]
                self._receiving[lane] = chunk
                self._lane_of[place] = lane
                return Placement.TAKEN_OVER
        self.duplicate_chunks += 1
        return Placement.DUPLICATE

    def standing(self, chunk: FrameHeader) -> Standing:
        """Of a chunk's range, for a copy of it that was drained."""
        place = place_of(chunk)
        if place in self._lane_of:
            return Standing.RECEIVING
        if place in self._checking:
            return Standing.CHECKING
        ranges = self._claimed[place[:3]]
        held = ranges.overlap(chunk.offset_bytes, chunk.offset_bytes + chunk.raw_bytes)
        return Standing.HELD if held == chunk.raw_bytes else Standing.FREE

    def lane_lost(self, lane: Hashable) -> None:
        """The range that it was receiving is free again: the chunk comes once more, on another lane."""
        chunk = self._receiving.pop(lane, None)
        if chunk is not None:
            del self._lane_of[place_of(chunk)]
            self._begun_bytes -= chunk.raw_bytes
            self._release(chunk)

    def received(self, chunk: FrameHeader) -> None:
        """All bytes of a claimed chunk are here; `arrived` or `damaged` follows."""
        place = place_of(chunk)
        del self._receiving[self._lane_of.pop(place)]
        self._checking.add(place)

    def received_good(self, chunk: FrameHeader) -> bool:
        """`received` and `arrived` in one, for a chunk that was checked as it came."""
        del self._receiving[self._lane_of.pop(place_of(chunk))]
        return self._consumed(chunk)

    def arrived(self, chunk: FrameHeader) -> bool:
        """A received chunk is in its place and its checksum matched. True: this completed its layer."""
        self._checking.discard(place_of(chunk))
        return self._consumed(chunk)

    def _consumed(self, chunk: FrameHeader) -> bool:
        self._consumed_bytes += chunk.raw_bytes
        self._missing[chunk.layer] -= chunk.raw_bytes
        if self._missing[chunk.layer]:
            return False
        self._missing_layers -= 1
        return True

    def damaged(self, chunk: FrameHeader) -> None:
        """A received chunk's checksum did not match: its range is free again. Raises ChecksumError at the second
        time."""
        place = place_of(chunk)
        self._checking.discard(place)
        self._begun_bytes -= chunk.raw_bytes
        self._release(chunk)
        if place in self._damaged:
            raise ChecksumError(
                f"layer {chunk.layer} tensor {chunk.tensor} row {chunk.row} byte {chunk.offset_bytes}: "
                f"the checksum did not match, twice"
            )
        if len(self._damaged) >= MAX_DAMAGED:
            raise ChecksumError(f"more than {MAX_DAMAGED} chunks arrived damaged")
        self._damaged.add(place)

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


def place_of(chunk: FrameHeader) -> Place:
    return chunk[8:12]
