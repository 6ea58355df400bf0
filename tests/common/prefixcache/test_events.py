"""A pool's events reach an index over a link that loses, repeats and delays batches."""

from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prfaas.common.prefixcache.events import (
    MAX_EVENT_KEYS,
    RESTART,
    BlocksAdded,
    BlocksEvicted,
    Event,
    EventBatch,
    EventStream,
    Reset,
    SnapshotsAdded,
    added,
)
from prfaas.common.prefixcache.index import PrefixIndex
from prfaas.common.prefixcache.pool import PrefixPool
from prfaas.common.prefixcache.sizes import CacheSizes

HYBRID = CacheSizes(block_bytes=10, fixed_bytes=15)
PROMPTS = [[1, 2, 3, 4], [1, 2, 5, 6], [1, 7], [8, 9, 10], [11]]
HOLDER = 2


class StreamMachine(RuleBasedStateMachine):
    """One pool, one index. sent: every event of this epoch by its number; heard: of the epoch that the index last heard
    of, the node's present one or that before."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.epoch = 0
        self.heard: dict[int, Event] = {}
        self.delayed: list[EventBatch] = []
        self.start()

    def start(self) -> None:
        self.pool = PrefixPool(HYBRID, 100, max_pending_keys=12)
        self.stream = EventStream(self.epoch, max_pending_keys=12)
        self.sent: dict[int, Event] = {}

    def matches(self) -> list[int]:
        return [self.pool.match(prompt) for prompt in PROMPTS]

    def batch(self, max_keys: int) -> EventBatch:
        self.stream.add(self.pool.drain_events())
        if self.stream.needs_restart:
            self.stream.restart(self.pool.contents())
        batch = self.stream.batch(max_keys)
        for number, event in enumerate(batch.events, batch.sequence):
            assert self.sent.setdefault(number, event) == event, "a number stands for one event"
        return batch

    def delivered(self, batch: EventBatch) -> int:
        self.heard = self.sent
        return self.index.apply(HOLDER, batch)

    @rule(prompt=st.sampled_from(PROMPTS), snapshot=st.booleans())
    def use(self, prompt: list[int], snapshot: bool) -> None:
        lease = self.pool.acquire(prompt)
        if self.pool.insert(lease, prompt) and snapshot:
            self.pool.add_snapshot(lease, len(prompt))
        self.pool.release(lease)

    @rule(max_keys=st.integers(1, 10), lost=st.booleans(), answer_lost=st.booleans(), late=st.booleans())
    def heartbeat(self, max_keys: int, lost: bool, answer_lost: bool, late: bool) -> None:
        batch = self.batch(max_keys)
        if late:
            self.delayed.append(batch)
        if not lost:
            answer = self.delivered(batch)
            if not answer_lost:
                self.stream.acknowledge(answer)

    @precondition(lambda self: self.delayed)
    @rule(data=st.data())
    def an_old_batch_comes(self, data: st.DataObject) -> None:
        self.delivered(self.delayed.pop(data.draw(st.integers(0, len(self.delayed) - 1))))

    @rule()
    def the_router_forgets(self) -> None:
        """It was restarted; so late batches of before go nowhere."""
        self.index = PrefixIndex()
        self.delayed.clear()

    @rule()
    def the_node_starts_anew(self) -> None:
        """With another epoch; its connection, and what was on it, is gone."""
        self.epoch += 1
        self.delayed.clear()
        self.start()

    @rule(max_keys=st.integers(1, 10))
    def all_arrives(self, max_keys: int) -> None:
        """When the link is good the index knows the pool exactly, after a restart of the stream at most."""
        for _ in range(2):  # the first round's last answer may be that the index doesn't know the stream
            while True:
                batch = self.batch(max_keys)
                self.stream.acknowledge(self.delivered(batch))
                if not batch.events:
                    break
        assert [self.index.match_exact(prompt).longest for prompt in PROMPTS] == self.matches()

    @invariant()
    def never_more_than_was_true_at_some_time(self) -> None:
        """What the index has is what the events up to some number say, since the last reset before it; or nothing."""
        known = self.known()
        assert not known or any(known == self.replayed(end) for end in range(1, max(self.heard, default=0) + 2))

    def known(self) -> dict[int, int]:
        return {i: length for i, prompt in enumerate(PROMPTS) if (length := self.index.match(prompt).longest)}

    def replayed(self, end: int) -> dict[int, int]:
        held: set[Any] = set()
        for number in range(end):
            match self.heard.get(number):
                case Reset():
                    held.clear()
                case BlocksAdded(keys=keys):
                    held.update(keys)
                case BlocksEvicted(keys=keys):
                    held.difference_update(keys)
        lengths = ((i, next((n for n, key in enumerate(p) if key not in held), len(p))) for i, p in enumerate(PROMPTS))
        return {i: length for i, length in lengths if length}


TestStream = StreamMachine.TestCase
TestStream.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def batch(sequence: int, *events: Event, epoch: int = 1) -> EventBatch:
    return EventBatch(epoch, sequence, events)


def test_a_gap_costs_what_was_known_until_the_stream_starts_over() -> None:
    """What isn't known to be there isn't claimed."""
    index = PrefixIndex()
    assert index.apply(0, batch(0, Reset(), BlocksAdded(None, (1, 2)))) == 2
    assert index.apply(0, batch(3, BlocksAdded(2, (3,)))) == RESTART
    assert index.match([1, 2, 3]).longest == 0
    assert index.apply(0, batch(2, BlocksAdded(2, (3,)))) == RESTART
    assert index.apply(0, batch(0, Reset(), BlocksAdded(None, (1, 2)))) == RESTART, "a late copy of the first beginning"
    assert index.match([1, 2, 3]).longest == 0
    assert index.apply(0, batch(4, Reset(), BlocksAdded(None, (1,)))) == 6
    assert index.match([1, 2, 3]).longest == 1


def test_overlapping_batches_count_once() -> None:
    """A batch that was sent again, with more behind it."""
    index = PrefixIndex()
    first = batch(0, Reset(), BlocksAdded(None, (1, 2)), SnapshotsAdded((2,)))
    assert [index.apply(0, first), index.apply(0, first)] == [3, 3]
    more = batch(1, BlocksAdded(None, (1, 2)), SnapshotsAdded((2,)), BlocksEvicted((2,)))
    assert [index.apply(0, more), index.apply(0, first)] == [4, 4]
    assert index.match([1, 2]).longest == 1


def test_an_index_that_knows_nothing_says_so_when_there_is_no_news() -> None:
    """A new router learns of what its nodes have had for long."""
    assert PrefixIndex().apply(0, batch(17)) == RESTART


def test_another_epoch_must_begin_with_a_reset() -> None:
    """The numbers of a node's earlier life say nothing about this one's."""
    index = PrefixIndex()
    index.apply(0, batch(0, Reset(), BlocksAdded(None, (1,)), epoch=1))
    assert index.apply(0, batch(1, BlocksAdded(1, (2,)), epoch=2)) == RESTART
    assert index.match([1]).longest == 0
    assert index.apply(0, batch(0, Reset(), BlocksAdded(None, (5,)), epoch=2)) == 2
    assert [index.match([1]).longest, index.match([5]).longest] == [0, 1]


def test_a_stream_keeps_to_its_bound() -> None:
    """Too much outstanding: it drops it and starts over, with other numbers."""
    stream = EventStream(7, max_pending_keys=4)
    assert stream.needs_restart
    stream.add([BlocksAdded(None, (9,))])
    assert stream.batch() == EventBatch(7, 0, ())
    stream.restart([])
    stream.add([BlocksAdded(None, (1, 2, 3))])
    assert stream.batch(1) == EventBatch(7, 0, (Reset(),))
    assert stream.batch(2) == EventBatch(7, 0, (Reset(),)), "an event is not divided"
    stream.acknowledge(1)
    assert stream.batch(1) == EventBatch(7, 1, (BlocksAdded(None, (1, 2, 3)),))
    stream.add([BlocksAdded(3, (4, 5, 6))])
    assert stream.needs_restart
    stream.restart([BlocksAdded(None, (1, 2, 3, 4, 5, 6))])
    assert stream.batch() == EventBatch(7, 3, (Reset(), BlocksAdded(None, (1, 2, 3, 4, 5, 6))))
    stream.acknowledge(2)
    stream.acknowledge(5)
    stream.acknowledge(4)
    assert stream.batch() == EventBatch(7, 5, ())
    assert not stream.needs_restart
    stream.acknowledge(6)
    assert stream.needs_restart, "the receiver means another stream"


def test_events_cross_the_wire() -> None:
    """As msgpack, with keys of hash chains or of traces; what is too long or no key is refused when it is decoded."""
    sent = batch(3, Reset(), BlocksAdded(b"k" * 16, (b"l" * 16,)), BlocksEvicted((5,)), SnapshotsAdded((7,)))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=EventBatch) == sent
    for keys in ((b"short",), (-1,), (), tuple(range(MAX_EVENT_KEYS + 1)), ("text",)):
        data = msgspec.msgpack.encode([1, 0, [["block-", list(keys)]]])
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(data, type=EventBatch)


def test_a_long_run_is_several_events() -> None:
    """Each with the key before it as parent."""
    keys = list(range(2 * MAX_EVENT_KEYS + 5))
    events = list(added(None, keys))
    assert [len(event.keys) for event in events] == [MAX_EVENT_KEYS, MAX_EVENT_KEYS, 5]
    assert [event.parent for event in events] == [None, MAX_EVENT_KEYS - 1, 2 * MAX_EVENT_KEYS - 1]
    assert [key for event in events for key in event.keys] == keys
