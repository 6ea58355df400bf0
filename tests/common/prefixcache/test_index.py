"""The index against one that keeps every holder's blocks apart."""

from itertools import product
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from prfaas.common.errors import ConfigError
from prfaas.common.prefixcache.index import IndexSettings, PrefixIndex

HOLDERS = 3
DEPTH = 4
CHAINS = list(product((0, 1), repeat=DEPTH))


def key(prefix: tuple[int, ...]) -> int:
    """A number for each prefix."""
    return int("".join(map(str, (1, *prefix))), 2)


def keys(chain: tuple[int, ...], start: int = 0) -> list[int]:
    return [key(chain[:end]) for end in range(start + 1, len(chain) + 1)]


KEYS = sorted({each for chain in CHAINS for each in keys(chain)})
SOME_KEYS = st.lists(st.sampled_from(KEYS), max_size=6)
HOLDER = st.integers(0, HOLDERS - 1)


class Naive:
    """The blocks and snapshots of each holder; a match looks at them one by one."""

    def __init__(self) -> None:
        self.blocks: list[set[int]] = [set() for _ in range(HOLDERS)]
        self.snapshots: list[set[int]] = [set() for _ in range(HOLDERS)]

    def match(self, holder: int, chain: list[int]) -> int:
        return next((i for i, each in enumerate(chain) if each not in self.blocks[holder]), len(chain))

    def match_exact(self, holder: int, chain: list[int]) -> int:
        held = chain[: self.match(holder, chain)]
        return max((i for i, each in enumerate(held, 1) if each in self.snapshots[holder]), default=0)


class IndexMachine(RuleBasedStateMachine):
    """Any changes, blocks in any order: parents after children, inner blocks evicted."""

    max_blocks = 1000

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(IndexSettings(self.max_blocks, HOLDERS))
        self.naive = Naive()

    @rule(holder=HOLDER, chain=st.sampled_from(CHAINS), start=st.integers(0, DEPTH), end=st.integers(0, DEPTH))
    def add(self, holder: int, chain: tuple[int, ...], start: int, end: int) -> None:
        new = keys(chain[:end], start)
        self.index.add(holder, key(chain[:start]) if start else None, new)
        self.naive.blocks[holder].update(new)

    @rule(holder=HOLDER, gone=SOME_KEYS)
    def evict(self, holder: int, gone: list[int]) -> None:
        self.index.evict(holder, gone)
        self.naive.blocks[holder].difference_update(gone)

    @rule(holder=HOLDER, new=SOME_KEYS)
    def add_snapshots(self, holder: int, new: list[int]) -> None:
        self.index.add_snapshots(holder, new)
        self.naive.snapshots[holder].update(new)

    @rule(holder=HOLDER, gone=SOME_KEYS)
    def evict_snapshots(self, holder: int, gone: list[int]) -> None:
        self.index.evict_snapshots(holder, gone)
        self.naive.snapshots[holder].difference_update(gone)

    @rule(holder=HOLDER)
    def remove(self, holder: int) -> None:
        self.index.remove(holder)
        self.naive.blocks[holder].clear()
        self.naive.snapshots[holder].clear()

    @rule()
    def all_leave(self) -> None:
        """Then nothing stays in memory, once there have been some changes."""
        for holder in range(HOLDERS):
            self.remove(holder)
        for _ in range(2 + len(KEYS)):
            self.index.evict(0, [])
        assert len(self.index) == 0

    @invariant()
    def agrees(self) -> None:
        for chain in map(keys, CHAINS):
            assert dict(self.index.match(chain).pairs()) == self.expected(self.naive.match, chain)
            assert dict(self.index.match_exact(chain).pairs()) == self.expected(self.naive.match_exact, chain)

    def expected(self, match: Any, chain: list[int]) -> dict[int, int]:
        return {holder: blocks for holder in range(HOLDERS) if (blocks := match(holder, chain))}

    @invariant()
    def columns_say_the_same(self) -> None:
        chain = keys(CHAINS[0])
        for match in (self.index.match(chain), self.index.match_exact(chain)):
            pairs = dict(match.pairs())
            rows, blocks = match.deepest(HOLDERS)
            assert dict(zip(rows.tolist(), blocks, strict=True)) == pairs
            assert blocks == sorted(blocks, reverse=True)
            assert match.lengths(HOLDERS + 1).tolist() == [pairs.get(holder, 0) for holder in range(HOLDERS + 1)]


class BoundedIndexMachine(IndexMachine):
    """With room for less than there is."""

    max_blocks = 5

    @invariant()
    def agrees(self) -> None:
        """It keeps to its bound, and claims nothing that isn't there."""
        assert len(self.index) <= self.max_blocks
        for chain in map(keys, CHAINS):
            for holder, blocks in self.index.match(chain).pairs():
                assert blocks <= self.naive.match(holder, chain)
            for holder, blocks in self.index.match_exact(chain).pairs():
                assert blocks <= self.naive.match(holder, chain)
                assert chain[blocks - 1] in self.naive.snapshots[holder]


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBoundedIndex = BoundedIndexMachine.TestCase
TestBoundedIndex.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def chain_of(name: int, blocks: int) -> list[int]:
    return [name * 1000 + i for i in range(blocks)]


def test_lengths_are_columns_over_holders() -> None:
    """Few holders or many, in any number; holders above the number asked for are left out."""
    index = PrefixIndex()
    chain = chain_of(1, 100)
    for holder in range(300):
        index.add(holder, None, chain[: 1 + holder % 100])
    lengths = index.match(chain).lengths(1000)
    assert lengths.tolist() == [1 + holder % 100 if holder < 300 else 0 for holder in range(1000)]
    assert index.match(chain).lengths(7).tolist() == [1, 2, 3, 4, 5, 6, 7]
    for most in (1, 10, 64, 2000):
        rows, blocks = index.match(chain).deepest(most)
        assert len(rows) == len(blocks) == min(most, int((lengths > 0).sum()))
        assert blocks == sorted(lengths.tolist(), reverse=True)[: len(rows)]
        assert lengths[rows].tolist() == blocks
    assert index.match(chain).longest == 100
    assert index.match([]).longest == index.match(chain_of(2, 3)).longest == 0
    assert index.match(chain[:50]).lengths(300).max() == 50


def test_a_snapshot_counts_where_the_blocks_before_it_are() -> None:
    """The deepest usable one, for each holder; never a length between."""
    index = PrefixIndex()
    chain = chain_of(1, 8)
    for holder, blocks, snapshots in [(0, 8, [2, 5]), (1, 8, [8]), (2, 4, [2, 5]), (3, 8, []), (4, 1, [1])]:
        index.add(holder, None, chain[:blocks])
        index.add_snapshots(holder, [chain[end - 1] for end in snapshots])
    assert dict(index.match_exact(chain).pairs()) == {0: 5, 1: 8, 2: 2, 4: 1}
    assert dict(index.match_exact(chain[:7]).pairs()) == {0: 5, 2: 2, 4: 1}
    index.evict(0, [chain[3]])
    assert dict(index.match_exact(chain).pairs()) == {0: 2, 1: 8, 2: 2, 4: 1}


def test_what_was_matched_lately_is_forgotten_last() -> None:
    """And the rest of a chain that lost its tip goes before other chains."""
    index = PrefixIndex(IndexSettings(max_blocks=9))
    first, second, third = (chain_of(name, 3) for name in (1, 2, 3))
    for chain in (first, second, third):
        index.add(0, None, chain)
    index.match(first)
    index.add(0, None, chain_of(4, 4))
    assert [index.match(chain).longest for chain in (first, second, third)] == [3, 0, 2]
    assert index.forgotten == 4


def test_a_prompt_longer_than_the_bound_is_known_up_to_it() -> None:
    index = PrefixIndex(IndexSettings(max_blocks=5))
    index.add(0, None, chain_of(1, 9))
    assert index.match(chain_of(1, 9)).longest == 5
    index.add(1, None, chain_of(2, 9))
    assert index.match(chain_of(2, 9)).longest == 5
    assert len(index) == 5


def test_room_for_a_block_may_come_from_its_only_sibling() -> None:
    """The parent is a tip for a moment, and must not be taken for one afterwards."""
    index = PrefixIndex(IndexSettings(max_blocks=3))
    index.add(0, None, [1, 2])
    index.add(1, None, [8])
    for sibling in (3, 4, 5):
        index.add(0, 1, [sibling])
        assert dict(index.match([1, sibling]).pairs()) == {0: 2}
        assert index.match([8]).longest == 1
    assert (len(index), index.forgotten) == (3, 3)


def test_blocks_in_another_order_are_not_taken() -> None:
    """A key names a whole prefix, so it has one place; a reporter who says otherwise is wrong, and counted."""
    index = PrefixIndex()
    index.add(0, None, [1, 2, 3])
    index.add(1, None, [2, 3])
    index.add(1, 7, [7])
    index.add(1, None, [5, 5])
    assert index.conflicts == 3
    assert dict(index.match([1, 2, 3]).pairs()) == {0: 3}
    assert dict(index.match([2, 3]).pairs()) == {0: 2}, "asked with keys that are no chain: not more than it holds"
    assert dict(index.match([5]).pairs()) == {1: 1}


def test_holders_that_come_and_go_take_no_more_room() -> None:
    """Bits are used again: sets stay as small as the number of holders."""
    index = PrefixIndex(IndexSettings(max_holders=4))
    chain = chain_of(1, 50)
    for life in range(1000):
        index.remove(life % 4)
        index.add(life % 4, None, chain)
    assert all(bits.bit_length() <= 9 for _, bits in index.match(chain).steps)
    assert dict(index.match(chain).pairs()) == dict.fromkeys(range(4), 50)


def test_a_bit_that_is_used_again_says_nothing_of_its_holder_before() -> None:
    """Also where others have the same blocks and snapshots, so that these stay."""
    index = PrefixIndex(IndexSettings(max_holders=3))
    chain = chain_of(1, 5)
    for holder in (0, 1):
        index.add(holder, None, chain)
        index.add_snapshots(holder, [chain[4]])
    for life in range(20):
        index.remove(0)
        index.evict(1, [])
        index.add(0, None, [9000 + life] if life % 2 else chain[:1])
        assert dict(index.match(chain).pairs()) == ({1: 5} if life % 2 else {0: 1, 1: 5})
        assert dict(index.match_exact(chain).pairs()) == {1: 5}


def test_bounds_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"max_blocks 0.*max_holders 0"):
        IndexSettings(0, 0)
    index = PrefixIndex(IndexSettings(max_holders=4))
    for holder in (-1, 4):
        with pytest.raises(ValueError, match="holder"):
            index.add(holder, None, [1])
