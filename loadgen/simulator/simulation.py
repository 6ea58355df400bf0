"""The event loop. Pure: time is virtual, and the only randomness is in the load that it is given.

    arrival ─▶ policy ─▶ prefill node's queue ─▶ prefill ═ link ═▶ decode node's batch ─▶ end
                 │ refused                           layer-wise, shared

A prefill node serves one request at a time, in order of dispatch (Θ = N / T), so that the instants of a request's
prefill are known when it is dispatched, and the queue needs no events. A request has two to four events in all.
"""

from __future__ import annotations

import heapq
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError
from prfaas.common.scheduling.routes import fetch_seconds
from prfaas.common.scheduling.slow_planner import SlowDecision, SlowPlanner, to_convert
from prfaas.common.scheduling.types import (
    ROLE_DECODE,
    ROLE_PREFILL,
    AdmittingPolicy,
    ClusterSnapshot,
    Decision,
    PrefixMatches,
    Refused,
    RequestSnapshot,
)
from prfaas.loadgen.simulator.cluster import (
    ROLES,
    Change,
    Cluster,
    LinkChange,
    NodesBack,
    NodesLost,
    RoleChange,
    check_changes,
)
from prfaas.loadgen.simulator.columns import DONE, FAILED, REFUSED, Load, Outcome, PrefixCaches, Source
from prfaas.loadgen.simulator.decode import DecodeNode
from prfaas.loadgen.simulator.link import SharedLink

_START, _PREFILLED, _LINK, _KV_READY, _DECODE, _TICK, _CHANGE, _SWITCHED, _ARRIVE, _LEARNED = range(10)
_NEW, _PREFILL, _TRANSFER, _WAITING, _DECODING = range(5)
_PARKED = 7
"""Stages of a request; the last ones of a life, DONE, REFUSED and FAILED, are 5, 6 and 8."""
_INF = float("inf")
NEVER_S = 1e7
"""A transfer that would take longer than this (four months) has a dead link."""
QUIET_TICKS = 100
"""When nothing has happened for so many ticks a policy is at rest; the next one comes with the next event."""
LINK_DEAD = "link_dead"
_AT_ONCE_S = 1e-9


@dataclass
class Simulation:
    """One run. Give it a load, a cluster and a policy, call `run` once.

    concurrency: 0 = open loop, by the load's arrivals; else so many requests are always under way, in the load's order.
    source: says instead when each request of the load comes; the load's own arrivals are then not looked at.
    hold: what finds all nodes full waits at the router rather than being refused. on_tick: called each `tick_s` with
    the snapshot, to adapt the policy. slow: plans roles and thresholds, from what it sees of the run, at its own pace.
    stop_s: no later events; what isn't done then stays without an end.
    """

    cluster: Cluster
    load: Load
    policy: AdmittingPolicy
    changes: Sequence[Change] = ()
    concurrency: int = 0
    source: Source | None = None
    hold: bool = False
    caches: PrefixCaches | None = None
    on_tick: Callable[[float, ClusterSnapshot], None] | None = None
    tick_s: float = 1.0
    slow: SlowPlanner | None = None
    stop_s: float = _INF
    layers: int = 64
    wire_ratio: float = 1.0

    snapshot: ClusterSnapshot = field(init=False)
    _heap: list[tuple[float, int, int, int, int]] = field(init=False, default_factory=list)
    _seq: int = field(init=False, default=0)
    _links: list[SharedLink] = field(init=False, default_factory=list)
    _pairs: list[tuple[int, int]] = field(init=False, default_factory=list)
    _link_of: dict[tuple[int, int], int] = field(init=False, default_factory=dict)
    _pending_bytes: list[float] = field(init=False, default_factory=list)
    _rtt_s: list[float] = field(init=False, default_factory=list)
    _link_due_s: list[float] = field(init=False, default_factory=list)
    _sent_before: list[float] = field(init=False, default_factory=list)
    _decode: dict[int, DecodeNode] = field(init=False, default_factory=dict)
    _decode_due_s: dict[int, float] = field(init=False, default_factory=dict)
    _places: dict[int, list[float]] = field(init=False, default_factory=dict)
    """Of each decode node, as dispatched: when each place of its batch will be free; a heap."""
    _draining: dict[int, int] = field(init=False, default_factory=dict)
    _dead: set[int] = field(init=False, default_factory=set)
    _parked: deque[int] = field(init=False, default_factory=deque)
    _next: int = field(init=False, default=0)
    _live: int = field(init=False, default=0)
    _quiet_ticks: int = field(init=False, default=0)
    _reasons: dict[str, int] = field(init=False, default_factory=dict)
    _reason_codes: dict[str, int] = field(init=False, default_factory=dict)
    _busy_s: float = field(init=False, default=0.0)
    _fetches: int = field(init=False, default=0)
    """On a link a request's transfer is a flow with its number, the n-th fetch one with −n."""
    slow_decisions: list[tuple[float, SlowDecision]] = field(init=False, default_factory=list)
    """(when, what) of each step of the slow planner."""

    def __post_init__(self) -> None:
        check_changes(self.cluster, self.changes)
        self.snapshot = self.cluster.snapshot()
        self._prepare_links()
        self._prepare_requests()
        for row in np.flatnonzero(self.snapshot.role == ROLE_DECODE).tolist():
            self._add_decode(row)

    def _prepare_links(self) -> None:
        for (source, target), link in self.cluster.links.items():
            names = self.snapshot.region_names
            pair = names.index(source), names.index(target)
            self._link_of[pair] = len(self._links)
            self._pairs.append(pair)
            self._links.append(SharedLink(link.goodput_bytes_per_s))
        self._rtt_s = [link.rtt_s for link in self.cluster.links.values()]
        self._pending_bytes = [0.0] * len(self._links)
        self._link_due_s = [_INF] * len(self._links)
        self._sent_before = [0.0] * len(self._links)

    def _prepare_requests(self) -> None:
        load, count = self.load, self.load.arrival_s.size

        def blank(kind: str, value: float | int) -> array:  # type: ignore[type-arg]
            return array(kind, [value]) * count

        nan = float("nan")
        self._arrival = array("d", load.arrival_s.astype(np.float64).tobytes())
        self._prompt = array("q", load.prompt_tokens.astype(np.int64).tobytes())
        self._output = array("q", load.output_tokens.astype(np.int64).tobytes())
        self._home = None if load.home_region is None else array("i", load.home_region.astype(np.int32).tobytes())
        self._stage = blank("b", _NEW)
        self._attempt = blank("i", 0)
        self._prefill_node, self._decode_node = blank("i", -1), blank("i", -1)
        self._link_used = blank("i", -1)
        self._retries = blank("i", 0)
        self._cached = blank("q", 0)
        self._begun, self._bare, self._kv_ready = blank("d", nan), blank("d", nan), blank("d", nan)
        self._joined, self._first, self._second = blank("d", nan), blank("d", nan), blank("d", nan)
        self._end, self._wire, self._fetched = blank("d", nan), blank("d", 0.0), blank("d", 0.0)
        self._reason = blank("i", 0)
        self._kv_held = blank("q", 0)

    def _add_decode(self, row: int) -> None:
        self._decode[row] = DecodeNode(self.snapshot.profiles[int(self.snapshot.profile[row])])
        self._decode_due_s[row] = _INF
        self._places[row] = []
        self.snapshot.decode_free_at_s[row] = 0.0

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """All arrivals, until the last request has ended."""
        for k, change in enumerate(sorted(self.changes, key=lambda c: c.at_s)):
            self._push(change.at_s, _CHANGE, k, 0)
        if self.concurrency:
            for _ in range(min(self.concurrency, self.load.arrival_s.size)):
                self._admit_next(0.0)
        now_s, stopped = self._until_nothing_happens(0.0)
        # Who is given up makes room for the next of a closed loop.
        while not stopped and self._give_up(now_s):
            now_s, stopped = self._until_nothing_happens(now_s)
        return self._outcome()

    def _until_nothing_happens(self, now_s: float) -> tuple[float, bool]:
        """The last event's time, and whether there were later ones than `stop_s`."""
        if self._links or self.on_tick is not None or self.slow is not None:
            self._push(now_s + self.tick_s, _TICK, 0, 0)
        count = self.load.arrival_s.size
        heap, arrival = self._heap, self._arrival
        closed = self.concurrency > 0
        source = self.source
        handlers = (
            self._on_start,
            self._on_prefilled,
            self._on_link,
            self._on_kv_ready,
            self._on_decode,
            self._on_tick,
            self._on_change,
            self._on_switched,
            self._on_arrive,
            self._on_learned,
        )
        while True:
            if source is not None:
                arrives_s = source.next_s()
            else:
                arrives_s = _INF if closed or self._next >= count else arrival[self._next]
            if heap and heap[0][0] <= arrives_s:
                at_s, _, kind, index, stamp = heapq.heappop(heap)
                if at_s > self.stop_s:
                    return now_s, True
                now_s = at_s
                if kind != _TICK:
                    self._quiet_ticks = 0
                handlers[kind](now_s, index, stamp)
            elif arrives_s == _INF or arrives_s > self.stop_s:
                return now_s, arrives_s < _INF
            elif source is not None:
                self._quiet_ticks = 0
                self._take_due(source, arrives_s)
            else:
                self._quiet_ticks = 0
                i = self._next
                self._next = i + 1
                self._live += 1
                self._dispatch(i, arrives_s)

    def _give_up(self, now_s: float) -> bool:
        """Nothing will happen any more: who waits for a node is refused, who is on a dead link fails. False when there
        was nobody."""
        waiting, self._parked = list(self._parked), deque()
        for i in waiting:
            self._ended(i, REFUSED, now_s)
        on_link = [i for i in range(self._next) if self._stage[i] == _TRANSFER]
        for i in on_link:
            self._attempt[i] += 1
            self._links[self._link_used[i]].cancel(i, now_s)
            self._decode_left(i, self._decode_node[i])
            self._reason[i] = self._reason_codes.setdefault(LINK_DEAD, len(self._reason_codes))
            self._reasons[LINK_DEAD] = self._reasons.get(LINK_DEAD, 0) + 1
            self._ended(i, FAILED, now_s)
        return bool(waiting or on_link)

    def _push(self, at_s: float, kind: int, index: int, stamp: int) -> None:
        self._seq += 1
        heapq.heappush(self._heap, (at_s, self._seq, kind, index, stamp))

    def _take_due(self, source: Source, now_s: float) -> None:
        for due in source.due(now_s):
            self._arrival[due.index] = due.scheduled_s
            self._next = max(self._next, due.index + 1)
            self._live += 1
            self._dispatch(due.index, now_s)

    def _admit_next(self, now_s: float) -> None:
        """Closed loop: the next request takes the place of one that has ended."""
        if self._next < len(self._arrival):
            i = self._next
            self._next = i + 1
            self._arrival[i] = now_s
            self._live += 1
            self._push(now_s, _ARRIVE, i, 0)

    def _on_arrive(self, now_s: float, i: int, _: int) -> None:
        self._dispatch(i, now_s)

    # -- one request -------------------------------------------------------------------------------------------------

    def _dispatch(self, i: int, now_s: float) -> None:
        snapshot = self.snapshot
        snapshot.now_s = now_s
        queued = snapshot.links.queued_bytes
        for k, pair in enumerate(self._pairs):
            queued[pair] = self._pending_bytes[k] + self._links[k].remaining_bytes(now_s)
        prefixes = None if self.caches is None else self.caches.matches(i)
        home = None if self._home is None or self._home[i] < 0 else self._home[i]
        prompt, output = self._prompt[i], self._output[i]
        request = RequestSnapshot(
            str(i), prompt, output, prompt, None, home, prefixes, max(0.0, now_s - self._arrival[i])
        )
        answer = self.policy(request, snapshot)
        if self.slow is not None and self._stage[i] == _NEW and not self._retries[i]:
            self._arrived(self.slow, request, answer, now_s)
        self._reasons[answer.reason] = self._reasons.get(answer.reason, 0) + 1
        self._reason[i] = self._reason_codes.setdefault(answer.reason, len(self._reason_codes))
        if isinstance(answer, Refused):
            if self.hold and answer.reason != "deadline":
                self._stage[i] = _PARKED
                self._parked.append(i)
            else:
                self._ended(i, REFUSED, now_s)
            return
        self._send(i, answer, prefixes, now_s)

    def _arrived(self, slow: SlowPlanner, request: RequestSnapshot, answer: Decision | Refused, now_s: float) -> None:
        """Its share of the demand that the slow planner plans for."""
        prompt, output = request.prompt_tokens, request.max_output_tokens
        held, home = 0, request.home_region
        if isinstance(answer, Decision):
            held, home = answer.prefill_start, self.snapshot.region.item(answer.decode_node)
        slow.arrived(now_s, prompt - held, output, prompt + output // 2, home)

    def _send(self, i: int, decision: Decision, prefixes: PrefixMatches | None, now_s: float) -> None:
        snapshot, prompt = self.snapshot, self._prompt[i]
        decode = decision.decode_node
        prefill = decode if decision.prefill_node is None else decision.prefill_node
        profile = snapshot.profiles[snapshot.profile.item(prefill)]
        need = int(snapshot.profiles[snapshot.profile.item(decode)].kv_bytes.at(prompt + self._output[i]))
        snapshot.inflight_requests[decode] += 1
        snapshot.inflight_tokens[decode] += prompt
        snapshot.free_kv_bytes[decode] -= need
        uncached = prompt - decision.prefill_start
        prefill_s = profile.prefill_s.at(uncached)
        fetched_s = self._fetch(i, decision, prefixes, prefill, now_s)
        start_s = max(snapshot.prefill_free_at_s.item(prefill), now_s + fetched_s)
        done_s = start_s + prefill_s
        snapshot.prefill_free_at_s[prefill] = done_s
        self._take_place(decode, answer_s=now_s + max(0.0, decision.predicted_ttft_s), output=self._output[i])
        if prefill != decode:
            snapshot.inflight_requests[prefill] += 1
            snapshot.inflight_tokens[prefill] += uncached
        self._kv_held[i] = need
        self._prefill_node[i], self._decode_node[i] = prefill, decode
        self._begun[i], self._bare[i], self._cached[i] = start_s, prefill_s, decision.prefill_start
        self._stage[i] = _PREFILL
        self._busy_s += prefill_s
        attempt = self._attempt[i]
        pair = snapshot.region.item(prefill), snapshot.region.item(decode)
        if pair[0] == pair[1]:
            self._link_used[i] = -1
            self._wire[i] = 0.0
        else:
            k = self._link_of[pair]
            wire = profile.kv_bytes.at(prompt - decision.token_start) * self.wire_ratio
            self._link_used[i], self._wire[i] = k, wire
            self._pending_bytes[k] += wire
            self._push(start_s, _START, i, attempt)
        self._push(done_s, _PREFILLED, i, attempt)

    def _take_place(self, row: int, answer_s: float, output: int) -> None:
        """Book a place in the batch of a decode node, from the predicted first token to the last one."""
        node, places = self._decode[row], self._places[row]
        batch = node.profile.max_batch
        step_s = node.step_s or node.profile.step_s(1, 0)
        if len(places) >= batch:
            heapq.heapreplace(places, max(answer_s, places[0]) + output * step_s)
        else:
            heapq.heappush(places, answer_s + output * step_s)
        self.snapshot.decode_free_at_s[row] = places[0] if len(places) >= batch else 0.0

    def _fetch(self, i: int, decision: Decision, prefixes: PrefixMatches | None, prefill: int, now_s: float) -> float:
        """Begin to move a prefix over the WAN, if one is fetched; the seconds that it is predicted to take, after which
        prefill begins. The bytes share the link with all others, so that they may really arrive a little later."""
        if decision.fetch_region is None:
            return 0.0
        snapshot = self.snapshot
        target = snapshot.region.item(prefill)
        own = 0 if prefixes is None else min(prefixes.in_region(target), self._prompt[i] - 1)
        kv_bytes = snapshot.profiles[snapshot.profile.item(prefill)].kv_bytes
        moved = (kv_bytes.at(decision.prefill_start) - (kv_bytes.at(own) if own else 0.0)) * self.wire_ratio
        seconds = fetch_seconds(snapshot, decision.fetch_region, target, moved)
        k = self._link_of[decision.fetch_region, target]
        if moved <= 0:
            return seconds
        self._fetches += 1
        # There is no prefill to follow: all of it is ready at once.
        self._links[k].start(-self._fetches, moved, _AT_ONCE_S, now_s)
        self._fetched[i] += moved
        self._schedule_link(k)
        return seconds

    def _on_start(self, now_s: float, i: int, attempt: int) -> None:
        if attempt != self._attempt[i]:
            return
        k = self._link_used[i]
        self._pending_bytes[k] -= self._wire[i]
        self._links[k].start(i, self._wire[i], self._bare[i], now_s)
        self._schedule_link(k)

    def _on_prefilled(self, now_s: float, i: int, attempt: int) -> None:
        if attempt != self._attempt[i]:
            return
        node = self._prefill_node[i]
        self._prefill_left(i, node, now_s)
        if self.caches is not None:
            self.caches.prefilled(i, self.snapshot.region.item(node), node)
        k = self._link_used[i]
        if k < 0:
            self._on_kv_ready(now_s, i, attempt)
            return
        self._stage[i] = _TRANSFER
        link = self._links[k]
        if link.produced(i, now_s):
            tail_s = self._wire[i] / self.layers / max(link.free_bytes_per_s(), 1.0)
            self._push(now_s + tail_s + self._half_rtt_s(k), _KV_READY, i, attempt)
        self._schedule_link(k)

    def _half_rtt_s(self, k: int) -> float:
        return self._rtt_s[k] / 2

    def _prefill_left(self, i: int, node: int, now_s: float) -> None:
        if node != self._decode_node[i]:
            self.snapshot.inflight_requests[node] -= 1
            self.snapshot.inflight_tokens[node] -= self._prompt[i] - self._cached[i]
            if self._draining:
                self._check_drained(node, now_s)

    def _on_kv_ready(self, now_s: float, i: int, attempt: int) -> None:
        if attempt != self._attempt[i]:
            return
        self._kv_ready[i] = now_s
        if self.caches is not None and self._link_used[i] >= 0:
            decode = self._decode_node[i]
            self.caches.prefilled(i, self.snapshot.region.item(decode), decode)
        node = self._decode_node[i]
        if self._decode[node].offer(i, self._output[i], self._prompt[i], now_s):
            self._joins(i, node, now_s)
            self._schedule_decode(node)
        else:
            self._stage[i] = _WAITING

    def _joins(self, i: int, node: int, now_s: float) -> None:
        step_s = self._decode[node].step_s
        self._stage[i] = _DECODING
        self._joined[i] = now_s
        if self._first[i] != self._first[i]:
            self._first[i] = now_s + step_s
            self._second[i] = now_s + 2 * step_s

    def _on_decode(self, now_s: float, row: int, _: int) -> None:
        if now_s != self._decode_due_s.get(row):
            return
        self._decode_due_s[row] = _INF
        ended, joined = self._decode[row].done(now_s)
        for i in joined:
            self._joins(i, row, now_s)
        for i in ended:
            self._decode_left(i, row)
            if self.caches is not None:
                self.caches.decoded(i, self.snapshot.region.item(row))
            self._ended(i, DONE, now_s)
        self._schedule_decode(row)
        if self._draining:
            self._check_drained(row, now_s)

    def _decode_left(self, i: int, row: int) -> None:
        snapshot = self.snapshot
        snapshot.inflight_requests[row] -= 1
        snapshot.inflight_tokens[row] -= self._prompt[i]
        snapshot.free_kv_bytes[row] += self._kv_held[i]
        self._kv_held[i] = 0

    def _ended(self, i: int, stage: int, now_s: float) -> None:
        self._stage[i] = stage
        self._end[i] = now_s
        self._live -= 1
        if self.source is not None:
            self.source.ended(i, now_s, go_on=stage == DONE)
        elif self.concurrency:
            self._admit_next(now_s)
        if self._parked and stage == DONE:
            self._unpark(now_s)

    def _unpark(self, now_s: float) -> None:
        for _ in range(len(self._parked)):
            i = self._parked.popleft()
            self._dispatch(i, now_s)
            if self._stage[i] == _PARKED:
                self._parked.rotate(1)
                return

    def _schedule_decode(self, row: int) -> None:
        due_s = self._decode[row].next_done_s()
        if due_s < self._decode_due_s[row]:
            self._decode_due_s[row] = due_s
            self._push(due_s, _DECODE, row, 0)

    # -- links -------------------------------------------------------------------------------------------------------

    def _schedule_link(self, k: int) -> None:
        link = self._links[k]
        due_s = link.next_through_s()
        if due_s - link._now_s <= NEVER_S and due_s < self._link_due_s[k]:
            self._link_due_s[k] = due_s
            self._push(due_s, _LINK, k, 0)

    def _on_link(self, now_s: float, k: int, _: int) -> None:
        if now_s != self._link_due_s[k]:
            return
        self._link_due_s[k] = _INF
        for i in self._links[k].through(now_s):
            if i >= 0 and self._stage[i] == _TRANSFER:
                self._push(now_s + self._half_rtt_s(k), _KV_READY, i, self._attempt[i])
        self._schedule_link(k)

    def _on_tick(self, now_s: float, _: int, __: int) -> None:
        links = self.snapshot.links
        for k, pair in enumerate(self._pairs):
            link = self._links[k]
            link.advance(now_s)
            could = link.rate_bytes_per_s * self.tick_s
            links.utilisation[pair] = min(1.0, (link.sent_bytes - self._sent_before[k]) / could) if could else 1.0
            links.queued_bytes[pair] = self._pending_bytes[k] + link.remaining_bytes(now_s)
            self._sent_before[k] = link.sent_bytes
        self.snapshot.now_s = now_s
        if self.on_tick is not None:
            self.on_tick(now_s, self.snapshot)
        if self.slow is not None:
            self._step_slow(self.slow, now_s)
        self._quiet_ticks += 1
        # There is one tick at a time, so that all that is on the heap are other events.
        next_s = min(self._heap[0][0] if self._heap and self._live else _INF, self._next_arrival_s())
        if next_s == _INF:
            return
        tick_s = now_s + self.tick_s
        self._push(tick_s if self._quiet_ticks < QUIET_TICKS else max(tick_s, next_s), _TICK, 0, 0)

    def _next_arrival_s(self) -> float:
        if self.source is not None:
            return self.source.next_s()
        return _INF if self.concurrency or self._next >= len(self._arrival) else self._arrival[self._next]

    # -- what happens to the cluster ---------------------------------------------------------------------------------

    def _on_change(self, now_s: float, index: int, _: int) -> None:
        change = sorted(self.changes, key=lambda c: c.at_s)[index]
        if isinstance(change, LinkChange):
            self._change_link(change, now_s)
        elif isinstance(change, NodesLost):
            self._lose_nodes(change, now_s)
        elif isinstance(change, NodesBack):
            self._nodes_back(change, now_s)
        else:
            self._begin_role_change(change, now_s)

    def _change_link(self, change: LinkChange, now_s: float) -> None:
        names = self.snapshot.region_names
        pair = names.index(change.source), names.index(change.target)
        if pair not in self._link_of:
            raise ConfigError([f"there is no link {change.source} → {change.target} to change"])
        k = self._link_of[pair]
        rate = change.link.goodput_bytes_per_s
        self._links[k].set_rate(rate, now_s)
        self._rtt_s[k] = change.link.rtt_s
        self._schedule_link(k)
        self._push(now_s + self.cluster.link_estimate_s, _LEARNED, k, 0)

    def _on_learned(self, now_s: float, k: int, _: int) -> None:
        """The estimate that policies see has followed the link."""
        links, pair = self.snapshot.links, self._pairs[k]
        links.bandwidth_bytes_per_s[pair] = self._links[k].rate_bytes_per_s
        links.rtt_s[pair] = self._rtt_s[k]
        self._unpark(now_s)

    def _lose_nodes(self, change: NodesLost, now_s: float) -> None:
        snapshot = self.snapshot
        region = snapshot.region_names.index(change.region)
        lost: set[int] = set()
        for role in (ROLE_PREFILL, ROLE_DECODE):
            if change.role is not None and ROLES[change.role] != role:
                continue
            rows = np.flatnonzero((snapshot.role == role) & (snapshot.region == region))
            alive = [row for row in rows.tolist() if row not in self._dead]
            lost.update(alive[len(alive) - round(len(alive) * change.share) :])
        if not lost:
            return
        self._dead |= lost
        for row in lost:
            snapshot.usable[row] = False
            self._draining.pop(row, None)
        self._reroute(lost, now_s)
        for row in lost:
            snapshot.prefill_free_at_s[row] = now_s

    def _reroute(self, lost: set[int], now_s: float) -> None:
        """Requests on dead nodes begin anew elsewhere; those that had output already keep it."""
        again = []
        for i in range(self._next):
            stage = self._stage[i]
            if stage not in (_PREFILL, _TRANSFER, _WAITING, _DECODING):
                continue
            prefill, decode = self._prefill_node[i], self._decode_node[i]
            if decode in lost or (stage == _PREFILL and prefill in lost) or (stage == _TRANSFER and prefill in lost):
                again.append(i)
        left: dict[int, float] = {}
        for row in lost:
            if row in self._decode:
                left.update(self._decode[row].lose(now_s))
                self._decode_due_s[row] = _INF
                self._places[row] = []
                self.snapshot.decode_free_at_s[row] = 0.0
        for i in again:
            self._withdraw(i, lost, now_s)
            if i in left and left[i] >= 0:
                made = self._output[i] - max(1, round(left[i]))
                self._prompt[i] += made
                self._output[i] -= made
            if self._first[i] > now_s:
                self._first[i] = self._second[i] = float("nan")
        for i in again:
            self._dispatch(i, now_s)
        for k in range(len(self._links)):
            self._schedule_link(k)

    def _withdraw(self, i: int, lost: set[int], now_s: float) -> None:
        """Take a request from where it is. A prefill queue that it leaves early keeps its predicted end: the node idles
        for the time that was set aside, as if the cancel had come too late."""
        self._attempt[i] += 1
        self._retries[i] += 1
        stage, k = self._stage[i], self._link_used[i]
        if k >= 0 and stage in (_PREFILL, _TRANSFER):
            if stage == _PREFILL and self._begun[i] > now_s:
                self._pending_bytes[k] -= self._wire[i]
            else:
                self._links[k].cancel(i, now_s)
        if stage == _PREFILL:
            self._prefill_left(i, self._prefill_node[i], now_s)
        self._decode_left(i, self._decode_node[i])
        if self._draining:
            self._check_drained(self._decode_node[i], now_s)
        self._stage[i] = _NEW

    def _nodes_back(self, change: NodesBack, now_s: float) -> None:
        snapshot = self.snapshot
        region = snapshot.region_names.index(change.region)
        for row in sorted(self._dead):
            if snapshot.region[row] == region:
                self._dead.discard(row)
                snapshot.usable[row] = True
                snapshot.prefill_free_at_s[row] = now_s
        self._unpark(now_s)

    def _step_slow(self, slow: SlowPlanner, now_s: float) -> None:
        """What the live router does every second: look, and when a plan is due carry it out."""
        snapshot = self.snapshot
        for row, node in self._decode.items():
            snapshot.decoding_requests[row] = len(node.running)
            snapshot.waiting_requests[row] = len(node.waiting)
        slow.observe(snapshot)
        if not slow.due(now_s):
            return
        for decision in slow.step(snapshot):
            self.slow_decisions.append((now_s, decision))
            if decision.threshold_tokens is not None and (plan := getattr(self.policy, "plan", None)) is not None:
                plan(decision.home_region, decision.threshold_tokens)
            if decision.to_prefill:
                region = snapshot.region_names[decision.home_region]
                to_role: Literal["prefill", "decode"] = "prefill" if decision.to_prefill > 0 else "decode"
                self._begin_role_change(RoleChange(now_s, region, to_role, abs(decision.to_prefill)), now_s)

    def _begin_role_change(self, change: RoleChange, now_s: float) -> None:
        snapshot = self.snapshot
        region, to_role = snapshot.region_names.index(change.region), ROLES[change.to_role]
        for row in to_convert(snapshot, region, to_role)[: change.nodes].tolist():
            snapshot.usable[row] = False
            self._draining[row] = to_role
            self._check_drained(row, now_s)

    def _check_drained(self, row: int, now_s: float) -> None:
        if row in self._draining and self.snapshot.inflight_requests[row] == 0:
            self._push(now_s + self.cluster.role_switch_s, _SWITCHED, row, self._draining.pop(row))

    def _on_switched(self, now_s: float, row: int, to_role: int) -> None:
        snapshot = self.snapshot
        if row in self._dead:
            return
        snapshot.role[row] = to_role
        snapshot.decoding_requests[row] = snapshot.waiting_requests[row] = 0
        snapshot.usable[row] = True
        snapshot.prefill_free_at_s[row] = now_s
        snapshot.layout_version += 1
        if to_role == ROLE_DECODE:
            self._add_decode(row)
        else:
            self._decode.pop(row)
            self._decode_due_s.pop(row)
            self._places.pop(row)
        self._unpark(now_s)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _outcome(self) -> Outcome:
        for i in self._parked:
            self._stage[i] = REFUSED
        # Of a source, requests that never came (the rest of a conversation that was given up) lie between the others.
        seen = np.frombuffer(self._stage, np.int8) != _NEW

        def column(values: array, kind: type) -> NDArray:  # type: ignore[type-arg]
            made: NDArray = np.frombuffer(values, kind)[seen]  # type: ignore[type-arg]
            return made

        offloaded = np.frombuffer(self._link_used, np.int32)[seen] >= 0
        prefill = column(self._prefill_node, np.int32)
        names = self.snapshot.region_names
        for k in range(len(self._links)):
            self._links[k].advance(min(self.stop_s, self._links[k]._now_s))
        return Outcome(
            arrival_s=column(self._arrival, np.float64),
            index=np.flatnonzero(seen),
            prompt_tokens=self.load.prompt_tokens[seen],
            output_tokens=self.load.output_tokens[seen],
            status=column(self._stage, np.int8),
            prefill_node=prefill,
            decode_node=column(self._decode_node, np.int32),
            offloaded=offloaded.astype(np.int8),
            retries=column(self._retries, np.int32),
            cached_tokens=column(self._cached, np.int64),
            prefill_start_s=column(self._begun, np.float64),
            prefill_s=column(self._bare, np.float64),
            kv_ready_s=column(self._kv_ready, np.float64),
            joined_s=column(self._joined, np.float64),
            first_token_s=column(self._first, np.float64),
            second_token_s=column(self._second, np.float64),
            end_s=column(self._end, np.float64),
            wire_bytes=column(self._wire, np.float64),
            fetched_bytes=column(self._fetched, np.float64),
            reason=column(self._reason, np.int32),
            reasons=dict(self._reasons),
            wire_ratio=self.wire_ratio,
            link_bytes={
                (names[a], names[b]): link.sent_bytes for (a, b), link in zip(self._pairs, self._links, strict=True)
            },
            busy_prefill_s=self._busy_s,
        )
