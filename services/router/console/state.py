"""What the console shows: the cluster as this router sees it, now and in the last minutes. Pure."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import msgspec
import numpy as np
from prfaas.common.scheduling.types import ROLE_DECODE, AdmittingPolicy, ClusterSnapshot
from prfaas.services.router.planning import Planning
from prfaas.services.router.registry import Node, Registry
from prfaas.services.router.timeline import Record, Timelines

HISTORY = 600
"""Points, one a second."""
REQUESTS = 40
"""That are listed, the newest first."""
RATE_S = 10
"""Requests/s and the share offloaded are of so many seconds."""


class NodeState(msgspec.Struct, frozen=True):
    """queue_s: of prefill, as predicted. kv_used: share of the memory that was ever free. batch, places: requests in
    decode, and how many fit."""

    name: str
    region: str
    role: str
    state: str
    next_role: str
    requests: int
    queue_s: float
    kv_used: float
    batch: int
    waiting: int
    places: int


class LinkState(msgspec.Struct, frozen=True):
    source: str
    target: str
    bandwidth_bytes_per_s: float
    utilisation: float
    queued_bytes: float
    rtt_s: float


class RegionState(msgspec.Struct, frozen=True):
    """threshold_tokens None: nothing is offloaded, or the policy has none. why: the planner's sentence."""

    name: str
    threshold_tokens: float | None
    prefill_nodes: int
    decode_nodes: int
    why: str


class RequestState(msgspec.Struct, frozen=True):
    """One that has ended."""

    request_id: str
    ended_s: float
    outcome: str
    reason: str
    decision: str
    prefill: str | None
    decode: str
    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None
    e2e_s: float
    fallbacks: list[str]


class Point(msgspec.Struct, frozen=True):
    """Of the history. thresholds, prefill_nodes: by home region, in the order of `ConsoleState.regions`' names."""

    at_s: float
    requests_per_s: float
    offloaded: float
    regions: dict[str, tuple[float | None, int, int]]
    """Threshold, prefill nodes, decode nodes."""


class ConsoleState(msgspec.Struct, frozen=True):
    router: str
    version: str
    model: str
    at_s: float
    """Unix time."""
    inflight: int
    ended: int
    nodes: list[NodeState]
    links: list[LinkState]
    regions: list[RegionState]
    requests: list[RequestState]
    reasons: dict[str, int]
    """Requests by why they went where they did, since the start."""
    points: list[Point]
    """The newest, which may have been sent before; all that are kept, in a viewer's first message."""


@dataclass(slots=True)
class Console:
    """`tick` once a second, `state` when someone looks."""

    router: str
    version: str
    registry: Registry
    policy: AdmittingPolicy
    planning: Planning
    timelines: Timelines
    history: deque[Point] = field(default_factory=lambda: deque(maxlen=HISTORY))
    _counts: deque[tuple[float, int, int]] = field(default_factory=lambda: deque(maxlen=RATE_S + 1))

    def tick(self, cluster: ClusterSnapshot, unix_s: float) -> None:
        """One point of the history."""
        counts = self.timelines.counts
        self._counts.append((cluster.now_s, counts.ended, counts.offloaded))
        began_s, ended, offloaded = self._counts[0]
        count, seconds = counts.ended - ended, cluster.now_s - began_s
        share = (counts.offloaded - offloaded) / count if count else 0.0
        regions = {region.name: (region.threshold_tokens, region.prefill_nodes, region.decode_nodes)
                   for region in self._regions(cluster, with_why=False)}  # fmt: skip
        self.history.append(Point(unix_s, count / seconds if seconds > 0 else 0.0, share, regions))

    def state(self, cluster: ClusterSnapshot, unix_s: float, inflight: int, *, whole: bool) -> ConsoleState:
        """whole: with all of the history."""
        points = list(self.history) if whole else list(self.history)[-1:]
        counts = self.timelines.counts
        return ConsoleState(
            self.router,
            self.version,
            self.registry.model,
            unix_s,
            inflight,
            counts.ended,
            [_node(node, cluster) for node in self.registry.nodes()],
            _links(cluster),
            self._regions(cluster, with_why=True),
            [_request(record) for record in self.timelines.newest(REQUESTS)],
            dict(counts.reasons),
            points,
        )

    def _regions(self, cluster: ClusterSnapshot, *, with_why: bool) -> list[RegionState]:
        """Those that decode; the others have no threshold."""
        found = []
        for index in sorted({pool.region for pool in cluster.pools(ROLE_DECODE)}):
            here = (cluster.region == index) & cluster.usable
            decode = int(np.count_nonzero(here & (cluster.role == ROLE_DECODE)))
            threshold = getattr(self.policy, "threshold_of", lambda region: math.nan)(index)
            found.append(
                RegionState(
                    cluster.region_names[index],
                    threshold if math.isfinite(threshold) else None,
                    int(np.count_nonzero(here)) - decode,
                    decode,
                    self.planning.last_word(cluster.region_names[index]) if with_why else "",
                )
            )
        return found


def _node(node: Node, cluster: ClusterSnapshot) -> NodeState:
    row, now_s = node.row, cluster.now_s
    most = node.most_free_kv_bytes
    used = 1.0 - max(0, node.reported_free_kv_bytes) / most if most > 0 else 0.0
    return NodeState(
        node.name,
        node.region,
        node.role,
        node.state(now_s),
        node.next_role,
        cluster.inflight_requests.item(row),
        max(0.0, cluster.prefill_free_at_s.item(row) - now_s) if node.role == "prefill" else 0.0,
        used,
        cluster.decoding_requests.item(row),
        cluster.waiting_requests.item(row),
        cluster.profiles[node.profile].max_batch,
    )


def _links(cluster: ClusterSnapshot) -> list[LinkState]:
    """Between regions that have nodes, where something is known of the way."""
    links, names = cluster.links, cluster.region_names
    present = {int(region) for region in cluster.region[cluster.role >= 0]}
    return [
        LinkState(
            names[source],
            names[target],
            links.bandwidth_bytes_per_s.item(source, target),
            links.utilisation.item(source, target),
            links.queued_bytes.item(source, target),
            links.rtt_s.item(source, target),
        )
        for source in sorted(present)
        for target in sorted(present)
        if source != target and (links.rtt_s.item(source, target) > 0 or links.queued_bytes.item(source, target) > 0)
    ]


def _request(record: Record) -> RequestState:
    facts, router = record.facts, record.router
    first_s, ended_s = router.first_token_s, router.ended_s
    return RequestState(
        facts.request_id,
        facts.ended_unix_s,
        facts.outcome,
        facts.decision,
        facts.words,
        facts.prefill_node,
        facts.decode_node,
        facts.prompt_tokens,
        facts.output_tokens,
        None if first_s is None else first_s - router.arrived_s,
        0.0 if ended_s is None else ended_s - router.arrived_s,
        facts.fallbacks,
    )
