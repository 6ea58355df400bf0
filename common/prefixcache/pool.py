"""One pool of prefix KV: what it keeps, who uses it, and what goes when room is needed. Numbers only; the engine maps
block ids and snapshot ids to its memory.

    acquire ──▶ Lease: the longest usable prefix, pinned           (the engine reads it, or copies from it)
    reserve ──▶ room for the tokens to be computed, no names yet   (transfer-cache blocks in the paper; optional)
    insert  ──▶ complete blocks get their names                    (prefix-cache blocks: others can use them now)
    add_snapshot ▶ exact-length state at the end of a named block
    release ──▶ pins go, what has no name is freed; what has one stays until it is evicted

Blocks form a tree: a block's parent is the block before it. A pinned block pins its parent, and what isn't pinned is in
one queue, in the order in which it was let go, a block before its parent and a snapshot before its block. Whoever uses
a block uses all before it, so the queue's head is always the least recently used of what nothing else depends on:
evicting from the head keeps every block that stays reachable, in O(1).

With a model that needs snapshots, blocks that no snapshot can use (none at their end or behind them) are dropped at
once.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence

from prfaas.common.errors import ConfigError
from prfaas.common.prefixcache.events import (
    BlocksEvicted,
    Event,
    Reset,
    SnapshotsAdded,
    SnapshotsEvicted,
    added,
    in_runs,
    key_count,
)
from prfaas.common.prefixcache.hashes import BlockKey
from prfaas.common.prefixcache.sizes import CacheSizes


class _Block:
    """refs: leases that end here, and children that are pinned. children: blocks, pinned or not."""

    __slots__ = ("block_id", "children", "depth", "key", "parent", "refs", "snapshot")

    def __init__(self, key: BlockKey, parent: _Block | None, block_id: int) -> None:
        self.key = key
        self.parent = parent
        self.block_id = block_id
        self.depth: int = 1 if parent is None else parent.depth + 1
        self.children = 0
        self.refs = 0
        self.snapshot: _Snapshot | None = None


class _Snapshot:
    """refs: leases that use it."""

    __slots__ = ("block", "refs", "size_bytes", "snapshot_id")

    def __init__(self, block: _Block, snapshot_id: int, size_bytes: int) -> None:
        self.block = block
        self.snapshot_id = snapshot_id
        self.size_bytes = size_bytes
        self.refs = 0


class _Ids:
    """Small numbers, used again: never more of them than are in use at one time."""

    __slots__ = ("_free", "_next", "_on_give")

    def __init__(self, on_give: Callable[[int], None] | None) -> None:
        self._free: list[int] = []
        self._next = 0
        self._on_give = on_give

    def take(self) -> int:
        if self._free:
            return self._free.pop()
        self._next += 1
        return self._next - 1

    def give(self, number: int) -> None:
        self._free.append(number)
        if self._on_give is not None:
            self._on_give(number)


class Lease:
    """What one request holds of a pool. Made by `acquire`, ended by `release`; only the pool changes it.

    matched: blocks that were usable when it was acquired. held: blocks of this prompt that the pool had then, more than
    `matched` where no snapshot lets them be used (`snapshot_points`). named: blocks, from the first, that are pinned.
    """

    __slots__ = ("_copies", "_reserved", "_snapshots", "_tail_bytes", "_tip", "held", "matched", "named", "open")

    def __init__(self, tip: _Block | None, held: int) -> None:
        self.matched = self.named = 0 if tip is None else tip.depth
        self.held = held
        self.open = True
        self._tip = tip
        self._snapshots: list[_Snapshot] = []
        self._reserved: deque[int] = deque()  # block ids without a name, for the blocks after `named`
        self._copies: list[int] = []  # block ids whose block got its name from somebody else's copy
        self._tail_bytes = 0

    @property
    def snapshot_id(self) -> int | None:
        """Of the state to start from, `matched` blocks long; None: none is needed or there is none."""
        return self._snapshots[0].snapshot_id if self._snapshots and self.matched else None


class PrefixPool:
    """Not for several threads at once. Raises ValueError for calls that no correct engine makes, changing nothing."""

    def __init__(
        self,
        sizes: CacheSizes,
        capacity_bytes: int,
        *,
        max_pending_keys: int = 1 << 16,
        on_block_freed: Callable[[int], None] | None = None,
        on_snapshot_freed: Callable[[int], None] | None = None,
    ) -> None:
        """capacity_bytes: bound on everything in the pool. max_pending_keys: of events that nobody has fetched; beyond
        it `drain_events` tells the whole contents instead; 0: there are no events. on_*_freed: told each block's or
        snapshot's id when its memory is free, before the id is used again. Raises ConfigError."""
        if capacity_bytes < 0 or max_pending_keys < 0:
            raise ConfigError([f"prefix pool: a bound is negative ({capacity_bytes} bytes, {max_pending_keys} keys)"])
        self.sizes = sizes
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        """Named, reserved and snapshots; never more than the capacity."""
        self.pinned_bytes = 0
        """Of `used_bytes`, what can't be evicted now."""
        self._block_bytes = sizes.paged_block_bytes
        self._exact = sizes.needs_snapshot
        self._blocks: dict[BlockKey, _Block] = {}
        self._unpinned: OrderedDict[_Block | _Snapshot, None] = OrderedDict()
        self._block_ids = _Ids(on_block_freed)
        self._snapshot_ids = _Ids(on_snapshot_freed)
        self._snapshots = 0
        self._events: list[Event] = []
        self._pending_keys = 0
        self._max_pending_keys = max_pending_keys
        self._overflowed = False
        self._gone: list[BlockKey] = []  # evicted during the current call
        self._gone_snapshots: list[BlockKey] = []

    def __len__(self) -> int:
        """Named blocks."""
        return len(self._blocks)

    @property
    def snapshots(self) -> int:
        return self._snapshots

    @property
    def room_bytes(self) -> int:
        """The most that can be had now, if everything that isn't pinned goes."""
        return self.capacity_bytes - self.pinned_bytes

    # -- asking -------------------------------------------------------------------------------------------------------

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Usable blocks of a prompt with these keys, without touching anything. O(log(keys)), and for a model with
        snapshots the way from the last block that is held back to one with a snapshot."""
        block = self._usable(self._deepest(keys))
        return 0 if block is None else block.depth

    def contents(self) -> list[Event]:
        """Everything that is there as events, parents first, with a Reset before them."""
        events: list[Event] = [Reset()]
        run: list[BlockKey] = []
        last: _Block | None = None
        start: _Block | None = None
        # A parent is older than its children: it can't be evicted before them. So insertion order is parents first.
        for block in self._blocks.values():
            if not run or block.parent is not last:
                events.extend(added(start.key if start else None, run))
                run, start = [], block.parent
            run.append(block.key)
            last = block
        events.extend(added(start.key if start else None, run))
        with_snapshot = [block.key for block in self._blocks.values() if block.snapshot is not None]
        events.extend(SnapshotsAdded(run) for run in in_runs(with_snapshot))
        return events

    def drain_events(self) -> list[Event]:
        """What changed since the last call, in order; everything, with a Reset first, when that was too much."""
        events = self.contents() if self._overflowed else self._events
        self._events, self._pending_keys, self._overflowed = [], 0, False
        return events

    def block_ids(self, lease: Lease) -> list[int]:
        """The ids of blocks 0, 1, … of the lease: the named ones, then the reserved ones."""
        ids = []
        block = lease._tip
        while block is not None:
            ids.append(block.block_id)
            block = block.parent
        return [*reversed(ids), *lease._reserved]

    # -- a request's way ----------------------------------------------------------------------------------------------

    def acquire(self, keys: Sequence[BlockKey]) -> Lease:
        """Pin the longest usable prefix. keys: of the complete blocks of the first n−1 prompt tokens."""
        deepest = self._deepest(keys)
        tip = self._usable(deepest)
        lease = Lease(tip, 0 if deepest is None else deepest.depth)
        if tip is not None:
            self._pin(tip)
            if tip.snapshot is not None:
                self._pin_snapshot(lease, tip.snapshot)
        return lease

    def acquire_tip(self, key: BlockKey) -> Lease | None:
        """Pin the prefix that ends with this block, for somebody who knows only its last key. None: it isn't held, or
        no snapshot lets it be used."""
        tip = self._blocks.get(key)
        if tip is None or (self._exact and tip.snapshot is None):
            return None
        lease = Lease(tip, tip.depth)
        self._pin(tip)
        if tip.snapshot is not None:
            self._pin_snapshot(lease, tip.snapshot)
        return lease

    def reserve(self, lease: Lease, tokens: int) -> bool:
        """Room for the prompt's first `tokens` tokens, what is named already included, the incomplete block as well.
        May be called again with more. False: no room, nothing has changed."""
        self._check_open(lease)
        complete, tail = divmod(tokens, self.sizes.block_tokens)
        blocks = max(0, complete - lease.named - len(lease._reserved))
        tail_bytes = self.sizes.tail_bytes(tail) if complete >= lease.named else 0
        need = blocks * self._block_bytes + tail_bytes - lease._tail_bytes
        if not self._make_room(need):
            return False
        lease._reserved.extend(self._block_ids.take() for _ in range(blocks))
        lease._tail_bytes = tail_bytes
        self.used_bytes += need
        self.pinned_bytes += need
        return True

    def insert(self, lease: Lease, keys: Sequence[BlockKey]) -> bool:
        """Name the lease's blocks up to `len(keys)`; they are pinned by it. Blocks that were reserved keep their ids,
        the others get new ones. Where another request has named the same block meanwhile, that one is used from now on,
        and the lease's own copy stays until its release. keys: from the prompt's first block on. False: no room, no
        block is new."""
        self._check_open(lease)
        held = self._held(keys)
        self._check_chain(lease, keys, held)
        while lease.named < held:
            self._follow(lease, self._blocks[keys[lease.named]])
        new = keys[lease.named :]
        if not new:
            return True
        if not self._make_room(max(0, len(new) - len(lease._reserved)) * self._block_bytes):
            return False
        parent = lease._tip
        self._name(lease, new)
        self._tell(added(parent.key if parent else None, new))
        return True

    def add_snapshot(self, lease: Lease, blocks: int) -> int | None:
        """Keep the state after `blocks` blocks, which are named by this lease; pinned by it. The snapshot's id; that of
        the one that is there already, if there is one. None: no room, nothing has changed."""
        self._check_open(lease)
        if not self._exact or not 1 <= blocks <= lease.named:
            raise ValueError(f"no snapshot belongs after {blocks} of {lease.named} named blocks of this model")
        block = lease._tip
        while block is not None and block.depth > blocks:
            block = block.parent
        assert block is not None
        snapshot = block.snapshot
        if snapshot is None:
            size_bytes = self.sizes.snapshot_bytes(blocks)
            if not self._make_room(size_bytes):
                return None
            snapshot = block.snapshot = _Snapshot(block, self._snapshot_ids.take(), size_bytes)
            self._snapshots += 1
            self.used_bytes += size_bytes
            self._unpinned[snapshot] = None
            self._tell([SnapshotsAdded((block.key,))])
        if snapshot not in lease._snapshots:
            self._pin_snapshot(lease, snapshot)
        return snapshot.snapshot_id

    def release(self, lease: Lease) -> None:
        """End it. What it named stays, most recently used of all. Idempotent."""
        if not lease.open:
            return
        lease.open = False
        unnamed = [*lease._reserved, *lease._copies]
        for block_id in unnamed:
            self._block_ids.give(block_id)
        freed = len(unnamed) * self._block_bytes + lease._tail_bytes
        self.used_bytes -= freed
        self.pinned_bytes -= freed
        # Snapshots before blocks, blocks before their parents: see the top. Of the snapshots first the one that it
        # began with: the conversation's next turn wants the newer.
        for snapshot in lease._snapshots:
            snapshot.refs -= 1
            if snapshot.refs == 0:
                self.pinned_bytes -= snapshot.size_bytes
                self._unpinned[snapshot] = None
        self._unpin(lease._tip)
        self._tell_gone()

    # -- within -------------------------------------------------------------------------------------------------------

    def _held(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the first, are there. Whatever is there has its parents there: a binary search."""
        low, high, blocks = 0, len(keys), self._blocks
        while low < high:
            middle = (low + high) // 2
            if keys[middle] in blocks:
                low = middle + 1
            else:
                high = middle
        return low

    def _deepest(self, keys: Sequence[BlockKey]) -> _Block | None:
        held = self._held(keys)
        return self._blocks[keys[held - 1]] if held else None

    def _usable(self, block: _Block | None) -> _Block | None:
        if self._exact:
            while block is not None and block.snapshot is None:
                block = block.parent
        return block

    def _check_open(self, lease: Lease) -> None:
        if not lease.open:
            raise ValueError("the lease has been released")

    def _check_chain(self, lease: Lease, keys: Sequence[BlockKey], held: int) -> None:
        """Keys that are no chain, or another prompt's, are a mistake of the caller that would spoil the tree."""
        blocks, named, tip = self._blocks, lease.named, lease._tip
        if len(keys) < named or (tip is not None and keys[named - 1] != tip.key):
            raise ValueError("the keys are not those of the lease's prompt")
        block = blocks[keys[held - 1]] if held else None
        for key in reversed(keys[named:held]):
            if block is None or block.key != key:
                raise ValueError("the keys are not one chain: one has come behind other blocks")
            block = block.parent
        new = keys[max(held, named) :]
        if (held > named and block is not tip) or not blocks.keys().isdisjoint(new) or len(set(new)) < len(new):
            raise ValueError("the keys are not one chain: one has come at another place")

    def _pin(self, block: _Block | None) -> None:
        while block is not None:
            block.refs += 1
            if block.refs > 1:
                return
            del self._unpinned[block]
            self.pinned_bytes += self._block_bytes
            block = block.parent

    def _unpin(self, block: _Block | None) -> None:
        while block is not None:
            block.refs -= 1
            if block.refs:
                return
            self.pinned_bytes -= self._block_bytes
            parent = block.parent
            if self._exact and not block.children and block.snapshot is None:
                self._forget(block)
            else:
                self._unpinned[block] = None
            block = parent

    def _pin_snapshot(self, lease: Lease, snapshot: _Snapshot) -> None:
        if snapshot.refs == 0:
            del self._unpinned[snapshot]
            self.pinned_bytes += snapshot.size_bytes
        snapshot.refs += 1
        lease._snapshots.append(snapshot)

    def _follow(self, lease: Lease, block: _Block) -> None:
        """The lease's pin moves on to a child of its tip that is there already."""
        if block.refs:
            block.refs += 1
            if block.parent is not None:
                block.parent.refs -= 1  # the child's own reference stays
        else:
            # The lease's reference to the parent becomes the child's.
            del self._unpinned[block]
            block.refs = 1
            self.pinned_bytes += self._block_bytes
        if lease._reserved:
            lease._copies.append(lease._reserved.popleft())
        lease._tip = block
        lease.named += 1

    def _name(self, lease: Lease, keys: Sequence[BlockKey]) -> None:
        tip, blocks, reserved = lease._tip, self._blocks, lease._reserved
        fresh = max(0, len(keys) - len(reserved)) * self._block_bytes
        for key in keys:
            block = _Block(key, tip, reserved.popleft() if reserved else self._block_ids.take())
            block.refs = 1  # the lease's reference to the parent becomes the child's
            if tip is not None:
                tip.children += 1
            blocks[key] = tip = block
        lease._tip = tip
        lease.named += len(keys)
        self.used_bytes += fresh
        self.pinned_bytes += fresh

    def _make_room(self, need_bytes: int) -> bool:
        """Evict until `need_bytes` are free. False: there is no such room; nothing was evicted."""
        if need_bytes > self.capacity_bytes - self.pinned_bytes:
            return False
        while need_bytes > self.capacity_bytes - self.used_bytes:
            oldest, _ = self._unpinned.popitem(last=False)
            if isinstance(oldest, _Block):
                self._forget(oldest)
            else:
                self._forget_snapshot(oldest)
        self._tell_gone()
        return True

    def _forget(self, block: _Block) -> None:
        """Not in the queue, nothing depends on it. Its parents go, too, if no snapshot can use them now."""
        while True:
            del self._blocks[block.key]
            self.used_bytes -= self._block_bytes
            self._block_ids.give(block.block_id)
            self._gone.append(block.key)
            parent = block.parent
            if parent is None:
                return
            parent.children -= 1
            if not self._useless(parent):
                return
            del self._unpinned[parent]
            block = parent

    def _forget_snapshot(self, snapshot: _Snapshot) -> None:
        block = snapshot.block
        block.snapshot = None
        self._snapshots -= 1
        self.used_bytes -= snapshot.size_bytes
        self._snapshot_ids.give(snapshot.snapshot_id)
        self._gone_snapshots.append(block.key)
        if self._useless(block):
            del self._unpinned[block]
            self._forget(block)

    def _useless(self, block: _Block) -> bool:
        return self._exact and block.refs == 0 and block.children == 0 and block.snapshot is None

    def _tell_gone(self) -> None:
        if self._gone_snapshots:
            self._tell([SnapshotsEvicted(run) for run in in_runs(self._gone_snapshots)])
            self._gone_snapshots = []
        if self._gone:
            self._tell([BlocksEvicted(run) for run in in_runs(self._gone)])
            self._gone = []

    def _tell(self, events: Iterable[Event]) -> None:
        if self._overflowed or not self._max_pending_keys:
            return
        for event in events:
            self._events.append(event)
            self._pending_keys += key_count(event)
        if self._pending_keys > self._max_pending_keys:
            self._events, self._pending_keys, self._overflowed = [], 0, True
