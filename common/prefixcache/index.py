"""Which holders (nodes or regions) have how much of a prompt.

One entry a block, with the set of its holders as the bits of an int. `held` are those that said they have the block;
`closed` are those of them that have every block before it, too. Along a chain `closed` only shrinks, so a match
searches for the few places where it does: O(log blocks) dictionary look-ups for each different length among the
holders, however many holders there are. Who evicts an inner block leaves `closed` of the blocks behind it, and comes
back when the inner block does; with a pool that evicts tips first that never walks far.

Each life of a holder has a bit of its own. Dropping a holder retires its bit, which costs nothing; entries are cleaned
of retired bits bit by bit, a few at each later change, and then the bits are used again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError
from prfaas.common.prefixcache.events import (
    RESTART,
    BlocksAdded,
    BlocksEvicted,
    Event,
    EventBatch,
    Reset,
    SnapshotsAdded,
    SnapshotsEvicted,
)
from prfaas.common.prefixcache.hashes import BlockKey

MAX_HOLDERS = 1 << 16
_FEW_HOLDERS = 16
_FEW_AT_ONCE = 6
"""Bits that are found one by one sooner than by numpy."""
_SWEEP_STEP = 64


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """max_blocks: entries (some 300 bytes each with a thousand holders); beyond it the index forgets the tips that were
    longest neither added nor matched, and so claims less than is there. max_holders: numbers from 0 below it."""

    max_blocks: int = 1_000_000
    max_holders: int = 4096

    def __post_init__(self) -> None:
        problems = []
        if self.max_blocks < 1:
            problems.append(f"prefix index: max_blocks {self.max_blocks} is less than 1")
        if not 1 <= self.max_holders <= MAX_HOLDERS:
            problems.append(f"prefix index: max_holders {self.max_holders} is not from 1 to {MAX_HOLDERS}")
        if problems:
            raise ConfigError(problems)


class Match:
    """Who has how much of one prompt; valid until the index changes."""

    __slots__ = ("_holders", "steps")

    def __init__(self, steps: list[tuple[int, int]], holders: _Holders) -> None:
        self.steps = steps
        """(blocks, holder bits): those who have exactly so many, in no holder twice, most blocks last."""
        self._holders = holders

    @property
    def longest(self) -> int:
        """Blocks that the best holder has."""
        return self.steps[-1][0] if self.steps else 0

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(holder, blocks) of all who have any."""
        for blocks, bits in self.steps:
            for number in _numbers(bits):
                yield int(self._holders.of_bit[number]), blocks

    def deepest(self, most: int) -> tuple[NDArray[np.int32], list[int]]:
        """(holders, blocks of each) of those with most blocks, longest first. Without a loop over holders."""
        numbers: list[int] = []
        lengths: list[int] = []
        for blocks, bits in reversed(self.steps):
            room = most - len(numbers)
            if room <= 0:
                break
            few = bits.bit_count() <= _FEW_AT_ONCE
            found = list(_numbers(bits)) if few else np.flatnonzero(_bits(bits))[:room].tolist()
            numbers += found[:room]
            lengths += [blocks] * min(room, len(found))
        return self._holders.of_bit[numbers], lengths

    def blocks_of(self, holder: int) -> int:
        """Of one holder; 0 = none."""
        number = self._holders.bit_of.item(holder)
        for blocks, bits in self.steps:
            if bits >> number & 1:
                return blocks
        return 0

    def lengths(self, holders: int) -> NDArray[np.int64]:
        """Blocks of the holders 0 to `holders` − 1, [holders] int64; higher ones are left out."""
        by_bit = np.zeros(len(self._holders.of_bit), np.int64)
        for blocks, bits in self.steps:
            if bits.bit_count() <= _FEW_HOLDERS:
                for number in _numbers(bits):
                    by_bit[number] = blocks
            else:
                members = _bits(bits)
                np.copyto(by_bit[: members.size], blocks, where=members.view(np.bool_))
        lengths = np.zeros(holders, np.int64)
        bit_of = self._holders.bit_of[:holders]
        lengths[: len(bit_of)] = by_bit[bit_of]
        return lengths


def _bits(bits: int) -> NDArray[np.uint8]:
    """0 or 1 a bit [at least bit_length], the lowest first."""
    raw = np.frombuffer(bits.to_bytes((bits.bit_length() + 7) // 8, "little"), np.uint8)
    return np.unpackbits(raw, bitorder="little", count=bits.bit_length())


def _numbers(bits: int) -> Iterator[int]:
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


class _Holders:
    """The numbers of holders' bits. of_bit: holder by bit number; bit_of: bit number by holder. Bit 0 is nobody's, and
    the bit of those that have none."""

    __slots__ = ("bit_of", "of_bit")

    def __init__(self, max_holders: int) -> None:
        self.of_bit = np.full(1, -1, np.int32)
        self.bit_of = np.zeros(max_holders, np.int32)


class _Entry:
    """parent: None for a block whose own place is not known yet, since only its children were heard of."""

    __slots__ = ("closed", "first_child", "held", "key", "next", "parent", "previous", "touched")

    def __init__(self, key: BlockKey, parent: _Entry | None) -> None:
        self.key = key
        self.parent: _Entry | None = None
        self.held = 0
        self.closed = 0
        self.first_child: _Entry | None = None
        self.next: _Entry | None = None
        self.previous: _Entry | None = None
        self.touched = False
        if parent is not None:
            self.attach(parent)

    def attach(self, parent: _Entry) -> None:
        self.parent = parent
        self.next = parent.first_child
        if self.next is not None:
            self.next.previous = self
        parent.first_child = self

    def detach(self) -> None:
        if self.parent is None:
            return
        if self.previous is None:
            self.parent.first_child = self.next
        else:
            self.previous.next = self.next
        if self.next is not None:
            self.next.previous = self.previous
        self.parent = self.next = self.previous = None

    def children(self) -> Iterator[_Entry]:
        child = self.first_child
        while child is not None:
            yield child
            child = child.next


@dataclass(slots=True)
class _Stream:
    """Of one holder's event batches: which number comes next. broken: only a new beginning, which is no earlier,
    may."""

    epoch: int
    sequence: int
    broken: bool = False


def _begins(batch: EventBatch) -> bool:
    return bool(batch.events) and isinstance(batch.events[0], Reset)


class PrefixIndex:
    """Not for several threads at once. `apply` takes numbered batches; `take`, and `add`, `evict`, `add_snapshots` and
    `evict_snapshots`, are for those who miss nothing, as the simulator.

    After any sequence of changes it answers as if it kept every holder's blocks apart, except that it claims less when
    it had to forget. It never claims what its holder hasn't reported, or has reported as evicted.
    """

    def __init__(self, settings: IndexSettings | None = None) -> None:
        self.settings = settings or IndexSettings()
        self.forgotten = 0
        """Blocks dropped at the bound, ever."""
        self.conflicts = 0
        """Runs of blocks that were not taken, ever, because the order in them is not that of earlier ones: a key names
        a whole prefix, so one reporter is wrong."""
        self._root = _Entry(b"", None)
        self._root.closed = self._root.held = -1  # every holder has the empty prefix
        self._entries: dict[BlockKey, _Entry] = {}
        self._snapshots: dict[BlockKey, int] = {}
        self._tips: OrderedDict[_Entry, None] = OrderedDict()
        self._streams: dict[int, _Stream] = {}
        self._bits: dict[int, int] = {}  # holder -> its bit, as an int with that bit set
        self._holders = _Holders(self.settings.max_holders)
        self._free_bits: list[int] = []
        self._live = 0
        self._retired = 0
        self._sweeping = 0
        self._to_sweep: list[BlockKey] = []

    def __len__(self) -> int:
        """Entries."""
        return len(self._entries)

    # -- asking -------------------------------------------------------------------------------------------------------

    def match(self, keys: Sequence[BlockKey]) -> Match:
        """How many blocks each holder has without a gap from the first on. keys: a chain."""
        return Match(self._steps(keys), self._holders)

    def match_exact(self, keys: Sequence[BlockKey]) -> Match:
        """For a model with snapshots: the longest prefix at whose end the holder has a snapshot, and every block
        before. keys: of the first n−1 prompt tokens, since a snapshot behind them is of no use."""
        steps = self._steps(keys)
        snapshots = self._snapshots
        found: list[tuple[int, int]] = []
        active = 0  # those who have all blocks up to here, and no snapshot behind
        for step in range(len(steps) - 1, -1, -1):
            blocks, bits = steps[step]
            active |= bits
            fewer = steps[step - 1][0] if step else 0
            # The places that have snapshots, from the deepest down; `compress` finds them without a loop in Python.
            has_snapshot = map(snapshots.__contains__, reversed(keys[fewer:blocks]))
            for place in compress(range(blocks, fewer, -1), has_snapshot):
                usable = snapshots[keys[place - 1]] & active
                if usable:
                    found.append((place, usable))
                    active ^= usable
                    if not active:
                        break
        found.reverse()
        return Match(found, self._holders)

    def _steps(self, keys: Sequence[BlockKey]) -> list[tuple[int, int]]:
        get, live, count = self._entries.get, self._live, len(keys)
        entry = get(keys[0]) if count else None
        holders = entry.closed & live if entry is not None else 0
        steps: list[tuple[int, int]] = []
        last = 0  # the last place known to have `holders`
        while holders:
            # Gallop, then halve, to the first place with fewer.
            fewer, stride, remain = count, 1, 0
            while (place := last + stride) < fewer:
                found = get(keys[place])
                there = found.closed & live if found is not None else 0
                if there == holders:
                    last, entry = place, found
                    stride *= 2
                else:
                    fewer, remain = place, there
                    break
            while fewer - last > 1:
                place = (last + fewer) // 2
                found = get(keys[place])
                there = found.closed & live if found is not None else 0
                if there == holders:
                    last, entry = place, found
                else:
                    fewer, remain = place, there
            steps.append((last + 1, holders & ~remain))
            holders, last = remain, fewer
            if remain:
                entry = get(keys[fewer])
        if entry is not None:
            self._touch(entry)
        return steps

    # -- changing -----------------------------------------------------------------------------------------------------

    def apply(self, holder: int, batch: EventBatch) -> int:
        """Take what is new of a batch from the holder's present process. The number of the event that is wanted next,
        or RESTART when this one can't be connected to what came before: the holder counts for nothing until its stream
        starts over. Batches that come twice do no harm."""
        self._check(holder)
        stream = self._streams.get(holder)
        events = batch.events
        end = batch.sequence + len(events)
        known = stream is not None and stream.epoch == batch.epoch
        if stream is not None and known and not stream.broken and batch.sequence <= stream.sequence:
            events = events[stream.sequence - batch.sequence :]
            stream.sequence = max(stream.sequence, end)
        elif _begins(batch) and (stream is None or not known or batch.sequence >= stream.sequence):
            # Numbers are never used twice in an epoch, so a late copy of an earlier beginning is told apart.
            stream = self._streams[holder] = _Stream(batch.epoch, end)
        else:
            self._retire(holder)
            if stream is not None:
                stream.broken = True
                stream.sequence = max(stream.sequence, end) if known else stream.sequence
            return RESTART
        self.take(holder, events)
        return stream.sequence

    def take(self, holder: int, events: Iterable[Event]) -> None:
        """Events in order, none of them missing: what `PrefixPool.drain_events` gave, with no link between."""
        for event in events:
            self._take(holder, event)

    def _take(self, holder: int, event: Event) -> None:
        match event:
            case BlocksAdded():
                self.add(holder, event.parent, event.keys)
            case BlocksEvicted():
                self.evict(holder, event.keys)
            case SnapshotsAdded():
                self.add_snapshots(holder, event.keys)
            case SnapshotsEvicted():
                self.evict_snapshots(holder, event.keys)
            case Reset():
                self._retire(holder)

    def add(self, holder: int, parent: BlockKey | None, keys: Sequence[BlockKey]) -> None:
        """`keys` follow one another behind `parent` (None: they begin a prompt). The parent need not be known."""
        bit = self._bit(holder)
        self._sweep(_SWEEP_STEP + len(keys))
        before = self._root if parent is None else self._entry(parent)
        for key in keys:
            if before is None:
                return
            entry = self._entries.get(key)
            if entry is None:
                entry = self._make(key, before)
                if entry is None:
                    return
            elif entry.parent is not before and not self._place(entry, before):
                self.conflicts += 1
                self._prune(before)
                return
            self._hold(entry, bit)
            before = entry
        if before is not None:
            self._touch(before)

    def evict(self, holder: int, keys: Sequence[BlockKey]) -> None:
        """In any order; what the holder doesn't have is left out."""
        bit = self._bits.get(holder, 0)
        self._sweep(_SWEEP_STEP + len(keys))
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or not entry.held & bit:
                continue
            if entry.closed & bit:
                self._open(entry, bit)
            entry.held ^= bit
            if entry.closed == entry.held:
                entry.closed = entry.held
            self._prune(entry)

    def add_snapshots(self, holder: int, keys: Sequence[BlockKey]) -> None:
        bit = self._bit(holder)
        for key in keys:
            if self._entry(key) is not None:
                self._snapshots[key] = self._snapshots.get(key, 0) | bit

    def evict_snapshots(self, holder: int, keys: Sequence[BlockKey]) -> None:
        bit = self._bits.get(holder, 0)
        for key in keys:
            self._drop_snapshots(key, bit)
            self._prune(self._entries.get(key))

    def remove(self, holder: int) -> None:
        """It is gone, or can't be believed any more. O(1)."""
        self._retire(holder)
        self._streams.pop(holder, None)

    # -- entries ------------------------------------------------------------------------------------------------------

    def _entry(self, key: BlockKey) -> _Entry | None:
        return self._entries.get(key) or self._make(key, None)

    def _make(self, key: BlockKey, parent: _Entry | None) -> _Entry | None:
        """None: it would be one too many, and there is nothing else to forget."""
        tips = self._tips
        if len(self._entries) >= self.settings.max_blocks:
            was_tip = parent if parent in tips else None
            if was_tip is not None:
                del tips[was_tip]  # or it might be what is forgotten
            if not self._forget_one():
                if was_tip is not None:
                    tips[was_tip] = None
                return None
        if parent is not None:
            tips.pop(parent, None)  # again: what was forgotten may have been its last child
        entry = self._entries[key] = _Entry(key, parent)
        tips[entry] = None
        return entry

    def _place(self, entry: _Entry, parent: _Entry) -> bool:
        """Of an entry whose children alone were known, now that its own place is."""
        if entry.parent is not None:
            return False
        above: _Entry | None = parent
        while above is not None:
            if above is entry:
                return False
            above = above.parent
        entry.attach(parent)
        self._tips.pop(parent, None)
        closed = entry.held & parent.closed
        while closed:
            bit = closed & -closed
            self._close(entry, bit)
            closed ^= bit
        return True

    def _hold(self, entry: _Entry, bit: int) -> None:
        if not entry.held & bit:
            # The two sets are one object as long as they are equal, which is nearly always.
            if entry.held is entry.closed or entry.held == entry.closed:
                entry.held = entry.held | bit
                assert entry.parent is not None
                if entry.parent.closed & bit:
                    entry.closed = entry.held
                    self._close_children(entry, bit)
                return
            entry.held |= bit
        assert entry.parent is not None
        if entry.parent.closed & bit and not entry.closed & bit:
            self._close(entry, bit)

    def _close(self, entry: _Entry, bit: int) -> None:
        """The holder has this block and all before it."""
        entry.closed |= bit
        if entry.closed == entry.held:
            entry.closed = entry.held
        self._close_children(entry, bit)

    def _close_children(self, entry: _Entry, bit: int) -> None:
        if entry.first_child is None:
            return
        ready = [entry]
        while ready:
            for child in ready.pop().children():
                if child.held & bit and not child.closed & bit:
                    child.closed |= bit
                    if child.closed == child.held:
                        child.closed = child.held
                    ready.append(child)

    def _open(self, entry: _Entry, bit: int) -> None:
        """The holder has a gap here: what is behind it doesn't count."""
        entry.closed ^= bit
        if entry.first_child is None:
            return
        ready = [entry]
        while ready:
            for child in ready.pop().children():
                if child.closed & bit:
                    child.closed ^= bit
                    ready.append(child)

    def _drop_snapshots(self, key: BlockKey, bits: int) -> None:
        holders = self._snapshots.get(key, 0)
        if holders & bits:
            holders &= ~bits
            if holders:
                self._snapshots[key] = holders
            else:
                del self._snapshots[key]

    def _prune(self, entry: _Entry | None) -> None:
        """Drop it if it says nothing, then its parents likewise."""
        while entry is not None and entry is not self._root:
            if entry.held or entry.first_child is not None or entry.key in self._snapshots:
                return
            entry = self._drop(entry)

    def _drop(self, entry: _Entry) -> _Entry | None:
        """A tip. Its parent, which may be a tip now."""
        parent = entry.parent
        entry.detach()
        del self._entries[entry.key]
        self._tips.pop(entry, None)
        if parent is not None and parent is not self._root and parent.first_child is None:
            # It is as old as the tip was, unless a match ended at it since.
            self._tips[parent] = None
            if not parent.touched:
                self._tips.move_to_end(parent, last=False)
            parent.touched = False
        return parent

    def _touch(self, entry: _Entry) -> None:
        if entry in self._tips:
            self._tips.move_to_end(entry)
        else:
            entry.touched = True

    def _forget_one(self) -> bool:
        if not self._tips:
            return False
        entry = next(iter(self._tips))
        self._snapshots.pop(entry.key, None)
        self._drop(entry)
        self.forgotten += 1
        return True

    # -- holders' bits ------------------------------------------------------------------------------------------------

    def _bit(self, holder: int) -> int:
        bit = self._bits.get(holder)
        if bit is None:
            self._check(holder)
            holders = self._holders
            if not self._free_bits and len(holders.of_bit) > 2 * self.settings.max_holders:
                self._sweep(2 * len(self._entries) + 2)
            number = self._free_bits.pop() if self._free_bits else len(holders.of_bit)
            if number == len(holders.of_bit):
                holders.of_bit = np.append(holders.of_bit, np.int32(holder))
            holders.of_bit[number] = holder
            holders.bit_of[holder] = number
            bit = self._bits[holder] = 1 << number
            self._live |= bit
        return bit

    def _check(self, holder: int) -> None:
        if not 0 <= holder < self.settings.max_holders:
            raise ValueError(f"holder {holder} is not from 0 to {self.settings.max_holders - 1}")

    def _retire(self, holder: int) -> None:
        bit = self._bits.pop(holder, 0)
        if bit:
            self._holders.bit_of[holder] = 0
            self._live &= ~bit
            self._retired |= bit

    def _sweep(self, entries: int) -> None:
        """Clean up to so many entries of retired bits; bits that none has any more are free."""
        while entries > 0 and (self._sweeping or self._retired):
            if not self._sweeping:
                # What retires from here on has to wait for the next round.
                self._sweeping, self._retired = self._retired, 0
                self._to_sweep = list(self._entries)
            keep = ~self._sweeping
            while self._to_sweep and entries > 0:
                entries -= 1
                key = self._to_sweep.pop()
                entry = self._entries.get(key)
                if entry is None:
                    continue
                entry.held &= keep
                entry.closed &= keep
                if entry.closed == entry.held:
                    entry.closed = entry.held
                self._drop_snapshots(key, self._sweeping)
                self._prune(entry)
            if not self._to_sweep:
                bits = self._sweeping
                while bits:
                    lowest = bits & -bits
                    self._free_bits.append(lowest.bit_length() - 1)
                    bits ^= lowest
                self._sweeping = 0
