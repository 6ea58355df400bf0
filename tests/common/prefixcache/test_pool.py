"""The pool against one that looks at everything each time, and what an index learns from its events."""

from dataclasses import dataclass, field
from itertools import product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prfaas.common.errors import ConfigError
from prfaas.common.prefixcache.events import BlocksAdded, BlocksEvicted, Reset, SnapshotsAdded, SnapshotsEvicted
from prfaas.common.prefixcache.index import PrefixIndex
from prfaas.common.prefixcache.pool import Lease, PrefixPool
from prfaas.common.prefixcache.sizes import CacheSizes

BLOCK_TOKENS = 4
Chain = tuple[int, ...]
DEPTH = 5
CHAINS: list[Chain] = list(product((0, 1), repeat=DEPTH))


def key(prefix: Chain) -> int:
    return int("".join(map(str, (1, *prefix))), 2)


def keys(chain: Chain) -> list[int]:
    return [key(chain[:end]) for end in range(1, len(chain) + 1)]


@dataclass
class NaiveLease:
    path: Chain
    snapshots: list[Chain] = field(default_factory=list)
    reserved: int = 0
    copies: int = 0
    tail_bytes: int = 0


class NaivePool:
    """Sets of prefixes; who was let go when; everything else is computed anew each time."""

    def __init__(self, sizes: CacheSizes, capacity_bytes: int) -> None:
        self.sizes = sizes
        self.capacity_bytes = capacity_bytes
        self.blocks: set[Chain] = set()
        self.snapshots: set[Chain] = set()
        self.let_go: dict[tuple[str, Chain], int] = {}
        self.leases: list[NaiveLease] = []

    def bytes_of(self, blocks: set[Chain], snapshots: set[Chain]) -> int:
        block_bytes = self.sizes.paged_block_bytes
        unnamed = sum((x.reserved + x.copies) * block_bytes + x.tail_bytes for x in self.leases)
        return len(blocks) * block_bytes + sum(self.sizes.snapshot_bytes(len(s)) for s in snapshots) + unnamed

    @property
    def used_bytes(self) -> int:
        return self.bytes_of(self.blocks, self.snapshots)

    def block_pinned(self, block: Chain) -> bool:
        return any(lease.path[: len(block)] == block for lease in self.leases)

    def snapshot_pinned(self, snapshot: Chain) -> bool:
        return any(snapshot in lease.snapshots for lease in self.leases)

    @property
    def pinned_bytes(self) -> int:
        return self.bytes_of(
            set(filter(self.block_pinned, self.blocks)), set(filter(self.snapshot_pinned, self.snapshots))
        )

    def held(self, chain: Chain) -> int:
        return next((i for i in range(len(chain)) if chain[: i + 1] not in self.blocks), len(chain))

    def match(self, chain: Chain) -> int:
        held = self.held(chain)
        if not self.sizes.needs_snapshot:
            return held
        return max((i for i in range(1, held + 1) if chain[:i] in self.snapshots), default=0)

    def free_block(self, block: Chain) -> bool:
        """Nobody uses it, nothing depends on it."""
        children = any((*block, last) in self.blocks for last in (0, 1))
        return not (children or block in self.snapshots or self.block_pinned(block))

    def drop_useless(self) -> None:
        while self.sizes.needs_snapshot and (useless := set(filter(self.free_block, self.blocks))):
            self.blocks -= useless

    def make_room(self, need_bytes: int) -> bool:
        if need_bytes > self.capacity_bytes - self.pinned_bytes:
            return False
        while need_bytes > self.capacity_bytes - self.used_bytes:
            candidates = [("block", block) for block in self.blocks if self.free_block(block)]
            candidates += [("snapshot", s) for s in self.snapshots if not self.snapshot_pinned(s)]
            kind, oldest = min(candidates, key=self.let_go.__getitem__)
            (self.blocks if kind == "block" else self.snapshots).remove(oldest)
            self.drop_useless()
        return True

    def acquire(self, chain: Chain) -> NaiveLease:
        path = chain[: self.match(chain)]
        lease = NaiveLease(path, [path] if path in self.snapshots else [])
        self.leases.append(lease)
        return lease

    def reserve(self, lease: NaiveLease, tokens: int) -> bool:
        complete, tail = divmod(tokens, BLOCK_TOKENS)
        blocks = max(0, complete - len(lease.path) - lease.reserved)
        tail_bytes = self.sizes.tail_bytes(tail) if complete >= len(lease.path) else 0
        if not self.make_room(blocks * self.sizes.paged_block_bytes + tail_bytes - lease.tail_bytes):
            return False
        lease.reserved += blocks
        lease.tail_bytes = tail_bytes
        return True

    def insert(self, lease: NaiveLease, chain: Chain) -> bool:
        there = chain[: max(self.held(chain), len(lease.path))]
        copies = min(lease.reserved, len(there) - len(lease.path))
        lease.path, lease.reserved, lease.copies = there, lease.reserved - copies, lease.copies + copies
        new = len(chain) - len(there)
        if not self.make_room(max(0, new - lease.reserved) * self.sizes.paged_block_bytes):
            return False
        lease.reserved = max(0, lease.reserved - new)
        lease.path = chain
        self.blocks.update(chain[:end] for end in range(len(there) + 1, len(chain) + 1))
        return True

    def add_snapshot(self, lease: NaiveLease, blocks: int) -> bool:
        snapshot = lease.path[:blocks]
        if snapshot not in self.snapshots:
            if not self.make_room(self.sizes.snapshot_bytes(blocks)):
                return False
            self.snapshots.add(snapshot)
        if snapshot not in lease.snapshots:
            lease.snapshots.append(snapshot)
        return True

    def release(self, lease: NaiveLease) -> None:
        self.leases = [other for other in self.leases if other is not lease]
        for snapshot in lease.snapshots:
            if not self.snapshot_pinned(snapshot):
                self.let_go["snapshot", snapshot] = len(self.let_go_times())
        for end in range(len(lease.path), 0, -1):
            if not self.block_pinned(lease.path[:end]):
                self.let_go["block", lease.path[:end]] = len(self.let_go_times())
        self.drop_useless()

    def let_go_times(self) -> range:
        self.clock = getattr(self, "clock", 0) + 1
        return range(self.clock)


FULL = CacheSizes(block_bytes=10, block_tokens=BLOCK_TOKENS)
HYBRID = CacheSizes(block_bytes=10, block_tokens=BLOCK_TOKENS, fixed_bytes=15, windows=((6, 1),))
PAGED = CacheSizes(block_bytes=10, block_tokens=BLOCK_TOKENS, fixed_bytes=15, page_bytes=8)


class PoolMachine(RuleBasedStateMachine):
    """Requests at any stage beside one another, in a pool that is too small for them."""

    sizes = FULL
    capacity_bytes = 95

    def __init__(self) -> None:
        super().__init__()
        self.pool = PrefixPool(self.sizes, self.capacity_bytes, max_pending_keys=20)
        self.naive = NaivePool(self.sizes, self.capacity_bytes)
        self.open: list[tuple[Lease, NaiveLease, Chain]] = []
        self.index = PrefixIndex()

    def drawn(self, data: st.DataObject) -> tuple[Lease, NaiveLease, Chain]:
        return self.open[data.draw(st.integers(0, len(self.open) - 1), label="lease")]

    @rule(chain=st.sampled_from(CHAINS), length=st.integers(0, DEPTH))
    def acquire(self, chain: Chain, length: int) -> None:
        chain = chain[:length]
        matched, held = self.naive.match(chain), self.naive.held(chain)
        assert self.pool.match(keys(chain)) == matched
        lease = self.pool.acquire(keys(chain))
        assert (lease.matched, lease.held, lease.named) == (matched, held, matched)
        assert (lease.snapshot_id is not None) == (matched > 0 and self.sizes.needs_snapshot)
        self.open.append((lease, self.naive.acquire(chain), chain))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), tokens=st.integers(0, BLOCK_TOKENS * (DEPTH + 1)))
    def reserve(self, data: st.DataObject, tokens: int) -> None:
        lease, naive, _ = self.drawn(data)
        assert self.pool.reserve(lease, tokens) == self.naive.reserve(naive, tokens)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), blocks=st.integers(0, DEPTH))
    def insert(self, data: st.DataObject, blocks: int) -> None:
        lease, naive, chain = self.drawn(data)
        chain = chain[: max(blocks, lease.named)]
        assert self.pool.insert(lease, keys(chain)) == self.naive.insert(naive, chain)
        assert lease.named == len(naive.path)

    @precondition(lambda self: self.sizes.needs_snapshot and any(lease.named for lease, *_ in self.open))
    @rule(data=st.data())
    def add_snapshot(self, data: st.DataObject) -> None:
        lease, naive, _ = data.draw(st.sampled_from([each for each in self.open if each[0].named]))
        blocks = data.draw(st.integers(1, lease.named))
        got = self.pool.add_snapshot(lease, blocks)
        assert (got is not None) == self.naive.add_snapshot(naive, blocks)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Twice is once."""
        lease, naive, _ = ended = self.drawn(data)
        self.open.remove(ended)
        self.pool.release(lease)
        self.pool.release(lease)
        self.naive.release(naive)

    @rule()
    def tell(self) -> None:
        """The index hears of everything, though nobody fetched events when there were many."""
        self.index.take(0, self.pool.drain_events())
        for chain in CHAINS:
            match = self.index.match_exact if self.sizes.needs_snapshot else self.index.match
            assert match(keys(chain)).longest == self.pool.match(keys(chain))

    @invariant()
    def agrees(self) -> None:
        """The same blocks and snapshots are there, so nothing pinned was evicted, and what was evicted was the
        oldest."""
        pool, naive = self.pool, self.naive
        assert (pool.used_bytes, pool.pinned_bytes) == (naive.used_bytes, naive.pinned_bytes)
        assert 0 <= pool.pinned_bytes <= pool.used_bytes <= pool.capacity_bytes
        assert (len(pool), pool.snapshots) == (len(naive.blocks), len(naive.snapshots))
        for chain in CHAINS:
            assert pool.match(keys(chain)) == naive.match(chain)
        for lease, path, _ in self.open:
            assert path.path in naive.blocks or not path.path
            assert lease.named == len(path.path)

    @invariant()
    def memory_has_one_owner(self) -> None:
        """A block id stands for one block, whoever uses it, or for one lease's room."""
        owner: dict[int, object] = {}
        for lease, naive, _ in self.open:
            for place, block_id in enumerate(self.pool.block_ids(lease)):
                user = naive.path[: place + 1] if place < len(naive.path) else (id(lease), place)
                assert owner.setdefault(block_id, user) == user
        assert all(block_id <= self.capacity_bytes // self.sizes.paged_block_bytes for block_id in owner)

    def teardown(self) -> None:
        """When all leases have ended nothing is pinned."""
        for lease, *_ in self.open:
            self.pool.release(lease)
        assert self.pool.pinned_bytes == 0
        assert self.pool.room_bytes == self.capacity_bytes


class HybridPoolMachine(PoolMachine):
    sizes = HYBRID
    capacity_bytes = 150


class PagedPoolMachine(PoolMachine):
    sizes = PAGED
    capacity_bytes = 163


TestFullPool = PoolMachine.TestCase
TestHybridPool = HybridPoolMachine.TestCase
TestPagedPool = PagedPoolMachine.TestCase
TestFullPool.settings = TestHybridPool.settings = TestPagedPool.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None
)


def filled(pool: PrefixPool, prompt: list[int], *snapshots: int) -> None:
    lease = pool.acquire(prompt)
    assert pool.insert(lease, prompt)
    for blocks in snapshots:
        assert pool.add_snapshot(lease, blocks) is not None
    pool.release(lease)


def test_the_least_recently_used_goes_tip_first() -> None:
    """What is kept of a prompt is its beginning, so that it stays reachable; a use of it counts for all before it."""
    pool = PrefixPool(FULL, 60)
    filled(pool, [1, 2, 3])
    filled(pool, [11, 12, 13])
    pool.release(pool.acquire([1, 2]))
    filled(pool, [21])
    assert [pool.match(chain) for chain in ([1, 2, 3], [11, 12, 13], [21])] == [2, 3, 1]
    filled(pool, [21, 22, 23])
    assert [pool.match(chain) for chain in ([1, 2, 3], [11, 12, 13], [21, 22, 23])] == [2, 1, 3]


def test_what_is_pinned_stays_and_the_insert_that_needs_it_is_refused() -> None:
    """And a refused insert evicts nothing."""
    pool = PrefixPool(FULL, 40)
    filled(pool, [1, 2, 3])
    user = pool.acquire([1, 2])
    other = pool.acquire([5])
    assert not pool.insert(other, [5, 6, 7])
    assert pool.match([1, 2, 3]) == 3
    assert pool.insert(other, [5, 6])
    assert pool.match([1, 2, 3]) == 2
    pool.release(user)
    assert pool.insert(other, [5, 6, 7, 8])
    assert pool.match([1, 2, 3]) == 0


def test_two_requests_that_compute_the_same_block_share_it_afterwards() -> None:
    """The second one's own copy stays until it is released: it may be on its way to the decode node."""
    pool = PrefixPool(FULL, 100)
    first, second = pool.acquire([1, 2]), pool.acquire([1, 2])
    assert pool.reserve(first, 2 * BLOCK_TOKENS)
    assert pool.reserve(second, 2 * BLOCK_TOKENS)
    assert pool.insert(first, [1, 2])
    own = pool.block_ids(second)
    assert pool.insert(second, [1, 2])
    assert pool.block_ids(first) == pool.block_ids(second) != own
    assert pool.used_bytes == pool.pinned_bytes == 40
    pool.release(second)
    assert pool.used_bytes == pool.pinned_bytes == 20
    pool.release(first)
    assert (pool.used_bytes, pool.pinned_bytes) == (20, 0)


def test_a_tail_lives_for_one_transfer() -> None:
    """The incomplete block has no name: its room is free again at release."""
    pool = PrefixPool(FULL, 100)
    lease = pool.acquire([1])
    assert pool.reserve(lease, BLOCK_TOKENS + 3)
    assert pool.used_bytes == 18
    assert pool.insert(lease, [1])
    assert pool.used_bytes == 18
    pool.release(lease)
    assert (pool.used_bytes, pool.match([1])) == (10, 1)


def test_recurrent_state_is_used_at_its_exact_length_only() -> None:
    """The blocks of a longer prompt are there, but no state to go on from; `held` says where one would pay."""
    pool = PrefixPool(HYBRID, 1000)
    filled(pool, [1, 2, 3, 4, 5], 3, 5)
    assert [pool.match(chain) for chain in ([1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6])] == [0, 3, 3, 5]
    lease = pool.acquire([1, 2, 3, 4, 7])
    assert (lease.matched, lease.held) == (3, 4)
    assert pool.insert(lease, [1, 2, 3, 4, 7])
    assert pool.add_snapshot(lease, 4) is not None
    pool.release(lease)
    assert pool.match([1, 2, 3, 4, 8]) == 4


def test_blocks_that_no_snapshot_can_use_are_not_kept() -> None:
    """Nor behind the last snapshot that is left; of a prompt without one nothing stays."""
    pool = PrefixPool(HYBRID, 90)
    filled(pool, [1, 2, 3], 1)
    assert len(pool) == 1
    filled(pool, [5, 6])
    assert len(pool) == 1
    filled(pool, [1, 2, 3], 3)
    pool.release(pool.acquire([1]))
    filled(pool, [9, 10], 2)
    assert [pool.match([1, 2, 3]), pool.match([9, 10])] == [1, 2]
    assert (len(pool), pool.snapshots) == (3, 2)


def test_the_state_that_a_turn_began_with_goes_before_the_one_it_left() -> None:
    """The conversation's next turn wants the newer one."""
    pool = PrefixPool(HYBRID, 72)
    filled(pool, [1, 2], 2)
    filled(pool, [1, 2, 3], 3)
    filled(pool, [9])
    assert pool.match([1, 2, 3]) == 3
    assert pool.match([1, 2]) == 0


def test_events_tell_what_came_and_went() -> None:
    """In order; runs of blocks with what comes before them."""
    pool = PrefixPool(HYBRID, 72)
    filled(pool, [1, 2], 2)
    filled(pool, [1, 2, 3], 3)
    filled(pool, [5], 1)
    assert pool.drain_events() == [
        BlocksAdded(None, (1, 2)),
        SnapshotsAdded((2,)),
        BlocksAdded(2, (3,)),
        SnapshotsAdded((3,)),
        SnapshotsEvicted((2,)),
        BlocksAdded(None, (5,)),
        SnapshotsEvicted((3,)),
        BlocksEvicted((3, 2, 1)),
        SnapshotsAdded((5,)),
    ]
    assert pool.contents() == [Reset(), BlocksAdded(None, (5,)), SnapshotsAdded((5,))]


def test_a_pool_that_nobody_asks_for_events_keeps_none() -> None:
    """Beyond the bound, what it tells is its contents; with a bound of 0 nothing."""
    pool, silent = PrefixPool(FULL, 100, max_pending_keys=3), PrefixPool(FULL, 100, max_pending_keys=0)
    for each in (pool, silent):
        filled(each, [1, 2])
        filled(each, [3, 4, 5])
    assert pool.drain_events() == [Reset(), BlocksAdded(None, (1, 2)), BlocksAdded(None, (3, 4, 5))]
    filled(pool, [6])
    assert pool.drain_events() == [BlocksAdded(None, (6,))]
    assert silent.drain_events() == []


def test_wrong_calls_are_refused_and_change_nothing() -> None:
    """Each would spoil the tree or the counts."""
    pool = PrefixPool(FULL, 100)
    filled(pool, [1, 2, 3])
    lease = pool.acquire([1, 2])
    for wrong in ([1], [2, 1], [1, 2, 4, 3], [1, 2, 5, 5], [1, 2, 1]):
        with pytest.raises(ValueError, match="keys"):
            pool.insert(lease, wrong)
    other = pool.acquire([9])
    for wrong in ([3], [2, 3], [9, 2], [9, 2, 3]):
        with pytest.raises(ValueError, match="keys"):
            pool.insert(other, wrong)
    with pytest.raises(ValueError, match="no snapshot"):
        pool.add_snapshot(lease, 1)
    assert (len(pool), pool.used_bytes, pool.pinned_bytes) == (3, 30, 20)
    pool.release(lease)
    for call in (lambda: pool.insert(lease, [1, 2]), lambda: pool.reserve(lease, 1)):
        with pytest.raises(ValueError, match="released"):
            call()
    hybrid = PrefixPool(HYBRID, 1000)
    lease = hybrid.acquire([1])
    for blocks in (0, 1):
        with pytest.raises(ValueError, match="no snapshot"):
            hybrid.add_snapshot(lease, blocks)
    with pytest.raises(ConfigError, match="negative"):
        PrefixPool(FULL, -1)
