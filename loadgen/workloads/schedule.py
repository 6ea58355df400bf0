"""When each request of a workload leaves: the same state machine for the live client and the simulator.

It knows no clock: callers say what time it is, in seconds since the workload's beginning, and when requests ended.
"""

from __future__ import annotations

import heapq
import math
from collections import deque

import msgspec
import numpy as np
from prfaas.loadgen.workloads.workload import Workload


class Due(msgspec.Struct, frozen=True, gc=False):
    index: int
    scheduled_s: float
    """When it should have left. Latency counts from here: waiting for a slot, or for a late caller, is latency."""


class Schedule:
    """Ask `due` for what leaves now, send it, tell `ended`; sleep until `next_s`, or an end.

    With arrival times: a request is due when it arrives, or, in a later turn, `think_s` after the turn before has
    ended; while `max_concurrency` requests are in flight the due ones wait, first scheduled, first sent. Closed loop:
    `max_concurrency` users, each with a conversation from its first request to its last end, thinking in between; a
    user who has done takes the next conversation at once.
    """

    def __init__(self, workload: Workload) -> None:
        self._turn = workload.turn
        self._think_s = workload.think_s
        self._arrival_s = workload.arrival_s
        self._closed = workload.closed_loop
        self._starts = np.flatnonzero(workload.turn == 0)
        self._next_start = 0
        self._later: list[tuple[float, int]] = []
        self._waiting: deque[Due] = deque()
        self._in_flight = 0
        self._cap = math.inf if workload.max_concurrency is None else workload.max_concurrency
        users = min(int(self._cap), self._starts.size) if self._closed else 0
        self._free_since: deque[float] = deque([0.0] * users)
        self._unsent = len(workload)
        self._until_s = workload.until_s

    @property
    def unsent(self) -> int:
        """Requests that `due` has not given out; when `finished`, it never will."""
        return self._unsent

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def finished(self) -> bool:
        return self._in_flight == 0 and self.next_s() == math.inf

    def due(self, now_s: float) -> list[Due]:
        """What leaves now, in the order of its schedule; each index once in the life of this object."""
        if self._closed:
            return self._due_closed(now_s)
        self._collect(now_s)
        slots = self._cap - self._in_flight
        sent = [self._waiting.popleft() for _ in range(int(min(slots, len(self._waiting))))]
        self._give_out(len(sent))
        return sent

    def next_s(self) -> float:
        """When `due` will have something next if nothing ends before; infinity: only after an end."""
        if self._closed:
            if self._free_since and self._next_start < self._starts.size:
                return self._free_since[0]
            return self._later[0][0] if self._later else math.inf
        if self._waiting and self._in_flight < self._cap:
            return self._waiting[0].scheduled_s
        return min(self._start_s(), self._later[0][0] if self._later else math.inf)

    def ended(self, index: int, now_s: float, *, go_on: bool = True) -> int:
        """Request `index` has ended, well or not. `go_on` False gives up the rest of its conversation, as does a next
        turn that would be scheduled after the workload's `until_s`; returns how many requests that were."""
        self._in_flight -= 1
        following = index + 1
        if go_on and self._is_later_turn(following):
            next_s = now_s + float(self._think_s[following])
            if next_s <= self._until_s:
                heapq.heappush(self._later, (next_s, following))
                return 0
        if self._closed and now_s <= self._until_s:
            self._free_since.append(now_s)
        left = 0
        while self._is_later_turn(following + left):
            left += 1
        return left

    def _due_closed(self, now_s: float) -> list[Due]:
        sent = []
        while self._later and self._later[0][0] <= now_s:
            scheduled_s, index = heapq.heappop(self._later)
            sent.append(Due(index, scheduled_s))
        while self._free_since and self._free_since[0] <= now_s and self._next_start < self._starts.size:
            sent.append(Due(int(self._starts[self._next_start]), self._free_since.popleft()))
            self._next_start += 1
        sent.sort(key=lambda due: due.scheduled_s)
        self._give_out(len(sent))
        return sent

    def _collect(self, now_s: float) -> None:
        while True:
            start_s = self._start_s()
            later_s = self._later[0][0] if self._later else math.inf
            if min(start_s, later_s) > now_s or (start_s == later_s == math.inf):
                return
            if later_s < start_s:
                scheduled_s, index = heapq.heappop(self._later)
                self._waiting.append(Due(index, scheduled_s))
            else:
                self._waiting.append(Due(int(self._starts[self._next_start]), start_s))
                self._next_start += 1

    def _start_s(self) -> float:
        if self._next_start == self._starts.size:
            return math.inf
        return float(self._arrival_s[self._starts[self._next_start]])

    def _is_later_turn(self, index: int) -> bool:
        return index < self._turn.size and bool(self._turn[index] > 0)

    def _give_out(self, count: int) -> None:
        self._in_flight += count
        self._unsent -= count
