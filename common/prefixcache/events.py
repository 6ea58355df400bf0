"""What a pool's contents became, on its way to an index that may miss some of it.

A pool makes *events*. An `EventStream` numbers them for one receiver and sends them again until they are acknowledged;
the receiver (`PrefixIndex.apply`) takes each once and in order, and answers which number it wants next. Where that
can't be mended (the receiver is new, the sender is new, too much is outstanding) the stream starts over with the pool's
contents: a `Reset`, then everything as if it had just been added. Until then the receiver believes nothing of the
holder, since a prefix that isn't there costs more than one that nobody knew of.

    node   pool.drain_events() ──▶ stream.add ──▶ stream.batch ══heartbeat══▶ index.apply   router
           stream.acknowledge ◀═══════════════════answer═══════════════════ next sequence, or RESTART
           if stream.needs_restart: stream.restart(pool.contents())

In one process nothing is lost: `index.take(holder, pool.drain_events())`.

Events are msgspec structs, so that a heartbeat's body can carry them. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Annotated

import msgspec
from prfaas.common.prefixcache.hashes import KEY_BYTES, BlockKey

MAX_EVENT_KEYS = 1024
"""A longer run is several events, so that a batch can be of any size."""
MAX_BATCH_KEYS = 1 << 17
RESTART = -1
"""The answer of an index that can't go on from a batch."""

_HashKey = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
_TraceKey = Annotated[int, msgspec.Meta(ge=0)]
_Keys = Annotated[tuple[_HashKey | _TraceKey, ...], msgspec.Meta(min_length=1, max_length=MAX_EVENT_KEYS)]


class BlocksAdded(msgspec.Struct, frozen=True, array_like=True, tag="block+"):
    """`keys` follow one another, the first of them `parent` (None: it begins a prompt)."""

    parent: _HashKey | _TraceKey | None
    keys: _Keys


class BlocksEvicted(msgspec.Struct, frozen=True, array_like=True, tag="block-"):
    """In any order; blocks behind them may be there still, unreachable."""

    keys: _Keys


class SnapshotsAdded(msgspec.Struct, frozen=True, array_like=True, tag="state+"):
    """Exact-length state at the ends of these blocks."""

    keys: _Keys


class SnapshotsEvicted(msgspec.Struct, frozen=True, array_like=True, tag="state-"):
    keys: _Keys


class Reset(msgspec.Struct, frozen=True, array_like=True, tag="reset"):
    """The holder has nothing but what the events behind this one say."""


Event = BlocksAdded | BlocksEvicted | SnapshotsAdded | SnapshotsEvicted | Reset


class EventBatch(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive events; `sequence` is the first one's number. epoch: of the stream, another one after each start of
    the sender's process, so that numbers of different lives are not confused."""

    epoch: int
    sequence: Annotated[int, msgspec.Meta(ge=0)]
    events: Annotated[tuple[Event, ...], msgspec.Meta(max_length=MAX_BATCH_KEYS)]


def in_runs(keys: Sequence[BlockKey]) -> Iterator[tuple[BlockKey, ...]]:
    """`keys` in tuples that fit into an event."""
    for start in range(0, len(keys), MAX_EVENT_KEYS):
        yield tuple(keys[start : start + MAX_EVENT_KEYS])


def added(parent: BlockKey | None, keys: Sequence[BlockKey]) -> Iterator[BlocksAdded]:
    for run in in_runs(keys):
        yield BlocksAdded(parent, run)
        parent = run[-1]


def key_count(event: Event) -> int:
    """What an event counts for in bounds."""
    return 1 if isinstance(event, Reset) else len(event.keys)


class EventStream:
    """One pool's events to one receiver. Holds what isn't acknowledged, up to `max_pending_keys` beside the contents
    that it started with; beyond that it drops everything and starts over."""

    def __init__(self, epoch: int, max_pending_keys: int = 1 << 17) -> None:
        self._epoch = epoch
        self._max_pending_keys = max_pending_keys
        self._limit_keys = max_pending_keys
        self._pending: deque[Event] = deque()
        self._pending_keys = 0
        self._sequence = 0  # of _pending[0]
        self._lost = True

    @property
    def needs_restart(self) -> bool:
        """The next thing must be `restart`; a new stream needs it, too."""
        return self._lost

    def restart(self, contents: Iterable[Event]) -> None:
        """contents: `PrefixPool.contents()`, which don't count against `max_pending_keys`."""
        self._drop(len(self._pending))
        self._lost = False
        self._take([Reset(), *contents])
        self._limit_keys = self._pending_keys + self._max_pending_keys

    def add(self, events: Iterable[Event]) -> None:
        """What `PrefixPool.drain_events` gave. Has no effect while a restart is needed: it will tell of them."""
        if self._lost:
            return
        self._take(events)
        if self._pending_keys > self._limit_keys:
            self._drop(len(self._pending))
            self._lost = True

    def batch(self, max_keys: int = MAX_BATCH_KEYS) -> EventBatch:
        """From the first unacknowledged event on, at most `max_keys` keys, but one event at least if there is any. The
        same events come again until they are acknowledged. Send it even when it is empty: the answer tells whether the
        receiver still knows this stream."""
        count = keys = 0
        for event in self._pending:
            keys += key_count(event)
            if count and keys > max_keys:
                break
            count += 1
        return EventBatch(self._epoch, self._sequence, tuple(islice(self._pending, count)))

    def acknowledge(self, next_sequence: int) -> None:
        """The receiver's answer to a batch; answers that come late or twice do no harm."""
        if next_sequence == RESTART or next_sequence > self._sequence + len(self._pending):
            self._drop(len(self._pending))
            self._lost = True
        elif next_sequence > self._sequence:
            self._drop(next_sequence - self._sequence)

    def _take(self, events: Iterable[Event]) -> None:
        for event in events:
            self._pending.append(event)
            self._pending_keys += key_count(event)

    def _drop(self, count: int) -> None:
        """Their numbers are never used again."""
        for _ in range(count):
            self._pending_keys -= key_count(self._pending.popleft())
        self._sequence += count
