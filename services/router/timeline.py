"""What happened to a request when, as GET /requests/{id}/timeline tells it. Pure.

All `_s` instants are seconds since the request arrived at the router. The decode node's clock is mapped with the
offset that the heartbeats measured, the prefill node's with that and the lanes'; `clock_error_s` bounds the sum.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice

import msgspec
from prfaas.services.messages import DecodeNodeTimeline


@dataclass(slots=True)
class RouterInstants:
    """What the router saw itself, in its monotonic clock. None = it didn't come to that."""

    arrived_s: float
    decided_s: float | None = None
    """Tokenized and routed; the call to the decode node leaves."""
    ticket_s: float | None = None
    """The ticket came; the call to the prefill node leaves."""
    first_token_s: float | None = None
    """Of a stream; of a whole response only the decode node knows."""
    last_token_s: float | None = None
    ended_s: float | None = None

    def token_came(self, now_s: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.last_token_s = now_s


class LayerTimes(msgspec.Struct, frozen=True):
    layer: int
    computed_s: float | None
    sent_s: float | None
    arrived_s: float | None
    used_s: float | None


class TtftParts(msgspec.Struct, frozen=True):
    """They sum to ttft_s. An instant that the clocks' error puts out of order is moved to its neighbour."""

    router_s: float
    """Arrival to prefill's queue: the router's work, the calls to both nodes, the way there."""
    queue_s: float
    prefill_s: float
    exposed_s: float
    """End of prefill to the arrival of the last layer."""
    first_step_s: float
    """From there to the first token at the router."""


class Timeline(msgspec.Struct, frozen=True):
    request_id: str
    outcome: str
    """done | cancelled | failed"""
    decision: str
    fallbacks: list[str]
    prefill_node: str | None
    decode_node: str
    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None
    time_to_second_token_s: float | None
    last_token_s: float | None
    """At the router, as far as tokens that came together can be told apart: at the decode node plus its clock."""
    decided_s: float | None
    ticket_s: float | None
    decode_received_s: float | None
    queued_s: float | None
    prefill_started_s: float | None
    prefill_ended_s: float | None
    first_token_sampled_s: float | None
    ended_s: float | None
    ttft_parts: TtftParts | None
    layers: list[LayerTimes]
    kv_raw_bytes: int
    kv_wire_bytes: int
    local_prefill: bool
    clock_error_s: float | None
    """None: the router's and the node's clocks have not been compared yet, and the node's instants are left out."""
    output_token_ids: list[int] = []


@dataclass(frozen=True, slots=True)
class RequestFacts:
    request_id: str
    outcome: str
    decision: str
    fallbacks: list[str]
    prefill_node: str | None
    decode_node: str
    prompt_tokens: int
    output_tokens: int
    words: str = ""
    """What it was decided by, as in the response header."""
    offloaded: bool = False
    """Its prefill was in another region than its decode."""
    ended_unix_s: float = 0.0


@dataclass(slots=True)
class Counts:
    """Of all requests that have ended, since the start."""

    ended: int = 0
    offloaded: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, facts: RequestFacts) -> None:
        self.ended += 1
        self.offloaded += facts.offloaded
        self.reasons[facts.decision] = self.reasons.get(facts.decision, 0) + 1


def build_timeline(facts: RequestFacts, router: RouterInstants, node: DecodeNodeTimeline | None) -> Timeline:
    """`node`: None when the decode node told nothing (it died, or was cancelled)."""
    placed = node if node is not None and _clock_is_known(node) else None
    # From the node's clock to seconds since arrival.
    shift_s = 0.0 if placed is None else placed.clock_offset_s - router.arrived_s

    def at(instant_s: float | None) -> float | None:
        return None if instant_s is None or placed is None else instant_s + shift_s

    def here(instant_s: float | None) -> float | None:
        return None if instant_s is None else instant_s - router.arrived_s

    sampled_s = at(node.first_token_s) if node else None
    first_token_s = sampled_s if router.first_token_s is None else here(router.first_token_s)
    return Timeline(
        request_id=facts.request_id,
        outcome=facts.outcome,
        decision=facts.decision,
        fallbacks=facts.fallbacks,
        prefill_node=facts.prefill_node,
        decode_node=facts.decode_node,
        prompt_tokens=facts.prompt_tokens,
        output_tokens=facts.output_tokens,
        ttft_s=first_token_s,
        time_to_second_token_s=at(node.second_token_s) if node else None,
        last_token_s=here(router.last_token_s),
        decided_s=here(router.decided_s),
        ticket_s=here(router.ticket_s),
        decode_received_s=at(node.received_s) if node else None,
        queued_s=at(node.queued_s) if node else None,
        prefill_started_s=at(node.started_s) if node else None,
        prefill_ended_s=at(node.ended_s) if node else None,
        first_token_sampled_s=sampled_s,
        ended_s=here(router.ended_s),
        ttft_parts=_ttft_parts(first_token_s, placed, shift_s),
        layers=_layers(placed, shift_s),
        kv_raw_bytes=node.kv_raw_bytes if node else 0,
        kv_wire_bytes=node.kv_wire_bytes if node else 0,
        local_prefill=node.local_prefill if node else False,
        clock_error_s=None if placed is None else placed.clock_error_s + placed.router_clock_error_s,
    )


def _clock_is_known(node: DecodeNodeTimeline) -> bool:
    """Before its first heartbeat was answered a node sends zeros; a measured error is never 0."""
    return node.router_clock_error_s > 0


def _ttft_parts(first_token_s: float | None, node: DecodeNodeTimeline | None, shift_s: float) -> TtftParts | None:
    if first_token_s is None or node is None:
        return None
    arrivals = [s for s in node.arrived_s if s is not None]
    marks = [node.queued_s, node.started_s, node.ended_s, max(arrivals, default=None)]
    # Without prefill (all held, or a one-token prompt) everything up to the decode node's door is the router's.
    before, parts = 0.0, []
    for mark in [node.received_s if marks[0] is None else marks[0], *marks[1:]]:
        now = before if mark is None else min(max(mark + shift_s, before), first_token_s)
        parts.append(now - before)
        before = now
    router_s, queue_s, prefill_s, exposed_s = parts
    return TtftParts(router_s, queue_s, prefill_s, exposed_s, first_token_s - before)


def _layers(node: DecodeNodeTimeline | None, shift_s: float) -> list[LayerTimes]:
    if node is None:
        return []
    columns = (node.computed_s, node.sent_s, node.arrived_s, node.used_s)
    count = max(map(len, columns), default=0)

    def at(column: list[float | None], layer: int) -> float | None:
        value = column[layer] if layer < len(column) else None
        return None if value is None else value + shift_s

    return [LayerTimes(layer, *(at(column, layer) for column in columns)) for layer in range(count)]


@dataclass(frozen=True, slots=True)
class Record:
    """Kept as it came; the timeline is built when someone asks."""

    facts: RequestFacts
    router: RouterInstants
    node: bytes | None
    """JSON of DecodeNodeTimeline."""
    token_ids: bytes = b""
    """Of the output: decimal numbers with commas between."""

    def timeline(self) -> Timeline:
        """Raises msgspec.DecodeError when the node's part is not what it should be."""
        node = None if self.node is None else msgspec.json.decode(self.node, type=DecodeNodeTimeline)
        timeline = build_timeline(self.facts, self.router, node)
        return msgspec.structs.replace(timeline, output_token_ids=msgspec.json.decode(b"[%b]" % self.token_ids))


class Timelines:
    """The last `most` requests by id; a repeated id replaces the older one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._records: OrderedDict[str, Record] = OrderedDict()
        self.counts = Counts()

    def add(self, record: Record) -> None:
        self.counts.add(record.facts)
        self._records.pop(record.facts.request_id, None)
        self._records[record.facts.request_id] = record
        while len(self._records) > self._most:
            self._records.popitem(last=False)

    def get(self, request_id: str) -> Record | None:
        return self._records.get(request_id)

    def newest(self, most: int) -> list[Record]:
        """Of those that are kept, the last one first."""
        return list(islice(reversed(self._records.values()), most))
