"""Every Prometheus metric, in one place: names with units, labels with few values.

A process makes one `Metrics` in its app.py and passes it down; nothing is registered at import.
"""

from __future__ import annotations

from collections import Counter as Multiset
from collections.abc import Iterator

from prfaas.common import log
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
DECISION_BUCKETS_S = (1e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1e-2)
RATIO_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class RouterMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "prfaas_router_requests", "Requests by route and HTTP status", ["route", "status"], registry=registry
        )
        self.decisions = Counter(
            "prfaas_router_decisions", "Routing decisions, refusals among them", ["reason"], registry=registry
        )
        self.offloads = Counter(
            "prfaas_router_offloads", "Requests that were prefilled in another region", registry=registry
        )
        self.decision_seconds = Histogram(
            "prfaas_router_decision_seconds", "One routing decision", buckets=DECISION_BUCKETS_S, registry=registry
        )
        self.threshold_tokens = Gauge(
            "prfaas_router_threshold_tokens", "Offload threshold now, by home region", ["region"], registry=registry
        )
        self.link_bandwidth = Gauge(
            "prfaas_router_link_bytes_per_s",
            "KV bytes/s that decisions reckon a link to carry",
            ["source", "target"],
            registry=registry,
        )
        self.prefix_blocks = Gauge("prfaas_router_prefix_blocks", "Prefix blocks in the index", registry=registry)
        self.held_tokens = Counter(
            "prfaas_router_held_tokens",
            "Prompt tokens that a node's prefix pool had, where both roles took part",
            ["role"],
            registry=registry,
        )
        self.fetches = Counter(
            "prfaas_router_fetches",
            "Prefixes that prefill nodes were to fetch: done, or why not",
            ["outcome"],
            registry=registry,
        )
        self.fetched_tokens = Counter("prfaas_router_fetched_tokens", "Tokens of prefixes fetched", registry=registry)
        self.continuations = Counter(
            "prfaas_router_continuations",
            "Streams that went on elsewhere behind the tokens that the client had, by what was lost",
            ["reason"],
            registry=registry,
        )
        self.fallbacks = Counter(
            "prfaas_router_fallbacks", "Requests that went another way than decided", ["reason"], registry=registry
        )
        self.cancels = Counter("prfaas_router_cancels", "Requests cancelled, by whom", ["reason"], registry=registry)
        self.quota_refusals = Counter(
            "prfaas_router_quota_refusals", "Requests refused for their API key's quota, by its name", ["key"],
            registry=registry,
        )  # fmt: skip
        self.output_tokens = Counter("prfaas_router_output_tokens", "Output tokens relayed", registry=registry)
        self.prompt_tokens = Counter("prfaas_router_prompt_tokens", "Prompt tokens received", registry=registry)
        self.ttft_seconds = Histogram(
            "prfaas_router_ttft_seconds", "Time to first token", buckets=LATENCY_BUCKETS_S, registry=registry
        )
        self.e2e_seconds = Histogram(
            "prfaas_router_e2e_seconds", "Whole life of a request", buckets=LATENCY_BUCKETS_S, registry=registry
        )
        self.inflight_requests = Gauge("prfaas_router_inflight_requests", "Requests in flight", registry=registry)
        self.nodes = Gauge("prfaas_router_nodes", "Nodes by role and state", ["role", "state"], registry=registry)
        self.heartbeats = Counter("prfaas_router_heartbeats", "Heartbeats by outcome", ["outcome"], registry=registry)
        self.plans = Counter(
            "prfaas_router_plans",
            "Plans of the slow planner, one a home region: convert, or why nothing is converted",
            ["region", "reason"],
            registry=registry,
        )
        self.role_calls = Counter(
            "prfaas_router_role_calls",
            "Nodes told to change role, by their answer",
            ["role", "outcome"],
            registry=registry,
        )
        self.planner_lease = Gauge(
            "prfaas_router_planner_lease", "1: this router holds the planner's lease", registry=registry
        )


class NodeMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "prfaas_node_requests", "Calls by route and outcome", ["route", "outcome"], registry=registry
        )
        self.running_requests = Gauge("prfaas_node_running_requests", "Requests in the engine", registry=registry)
        self.queued_tokens = Gauge("prfaas_node_queued_tokens", "Prompt tokens waiting for prefill", registry=registry)
        self.free_kv_bytes = Gauge("prfaas_node_free_kv_bytes", "Free arena memory", registry=registry)
        self.arena_bytes = Gauge("prfaas_node_arena_bytes", "Arena memory", registry=registry)
        self.local_prefills = Counter(
            "prfaas_node_local_prefills", "Prefills done by a decode node itself", registry=registry
        )
        self.kv_unused = Counter(
            "prfaas_node_kv_unused",
            "Transfers whose KV the engine did not take (held: it had the prompt; prefix_gone: not any more what comes "
            "before; other_prompt: than was sent); it has computed what it lacked",
            ["reason"],
            registry=registry,
        )
        self.prefix_asked_tokens = Counter(
            "prfaas_node_prefix_asked_tokens", "Prompt tokens looked up in the prefix pool", ["role"], registry=registry
        )
        self.prefix_held_tokens = Counter(
            "prfaas_node_prefix_held_tokens", "Of these, what the pool had", ["role"], registry=registry
        )
        self.fetched_tokens = Counter(
            "prfaas_node_fetched_tokens", "Prefix tokens that came from other nodes", registry=registry
        )
        self.fetched_bytes = Counter("prfaas_node_fetched_bytes", "Their bytes on the wire", registry=registry)
        self.fetch_failures = Counter(
            "prfaas_node_fetch_failures", "Fetches that brought nothing", ["reason"], registry=registry
        )
        self.prefix_used_bytes = Gauge("prfaas_node_prefix_used_bytes", "In the prefix pool", registry=registry)
        self.prefix_capacity_bytes = Gauge("prfaas_node_prefix_capacity_bytes", "The pool's bound", registry=registry)
        self.output_tokens = Counter("prfaas_node_output_tokens", "Tokens sampled", registry=registry)
        self.queue_seconds = Histogram(
            "prfaas_node_prefill_queue_seconds", "Wait for prefill", buckets=LATENCY_BUCKETS_S, registry=registry
        )
        self.prefill_seconds = Histogram(
            "prfaas_node_prefill_seconds", "Prefill of one request", buckets=LATENCY_BUCKETS_S, registry=registry
        )
        self.exposed_seconds = Histogram(
            "prfaas_node_exposed_transfer_seconds",
            "Last layer's arrival after the end of prefill",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.itl_seconds = Histogram(
            "prfaas_node_itl_seconds", "Gap between output tokens", buckets=STEP_BUCKETS_S, registry=registry
        )
        self.leases_freed = Counter(
            "prfaas_node_leases_freed", "Requests freed without their client's word", ["reason"], registry=registry
        )
        self.role_changes = Counter(
            "prfaas_node_role_changes",
            "Changes of role that have ended, by the role asked for: done, or given_up (what ran took too long)",
            ["role", "outcome"],
            registry=registry,
        )
        self.drain_seconds = Histogram(
            "prfaas_node_drain_seconds",
            "From the call to change role to the end of the last request",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.heartbeats = Counter(
            "prfaas_node_heartbeats", "Heartbeats sent, by outcome", ["outcome"], registry=registry
        )


class SharedGauge:
    """A gauge whose series may be several holders' at once, as two sessions to one peer: a series is there until the
    last of those that hold it lets go. Of one thread."""

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self._holders: Multiset[tuple[str, ...]] = Multiset()

    def hold(self, *labels: str) -> None:
        """Once for each holder, before it sets."""
        self._holders[labels] += 1

    def set(self, value: float, *labels: str) -> None:
        self.gauge.labels(*labels).set(value)

    def let_go(self, *labels: str) -> None:
        """Once for each `hold`."""
        self._holders[labels] -= 1
        if not self._holders[labels]:
            del self._holders[labels]
            self.gauge.remove(*labels)


class TransportMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.sent_bytes = Counter(
            "prfaas_transport_sent_bytes", "KV bytes sent: raw = before the codec", ["form"], registry=registry
        )
        self.received_bytes = Counter(
            "prfaas_transport_received_bytes", "KV bytes received: raw = after the codec", ["form"], registry=registry
        )
        self.transfers = Counter(
            "prfaas_transport_transfers", "Transfers ended", ["direction", "outcome"], registry=registry
        )
        self.transfer_seconds = Histogram(
            "prfaas_transport_transfer_seconds",
            "A completed transfer, from the receiver's word that it has room to the last acknowledgement",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.codec_ratio = Histogram(
            "prfaas_transport_codec_ratio",
            "Wire bytes to KV bytes of a completed transfer: 1 and a little is raw",
            buckets=RATIO_BUCKETS,
            registry=registry,
        )
        self.resent_chunks = Counter(
            "prfaas_transport_resent_chunks", "Chunks sent again because they arrived damaged", registry=registry
        )
        self.checksum_failures = Counter(
            "prfaas_transport_checksum_failures", "Chunks that arrived damaged", registry=registry
        )
        self.backend_fallbacks = Counter(
            "prfaas_transport_backend_fallbacks",
            "Sessions over TCP where transport.backend asks for another: not_here, not_offered, unreachable",
            ["reason"],
            registry=registry,
        )
        self.moved_chunks = Counter(
            "prfaas_transport_moved_chunks", "Chunks sent again because their lane was lost", registry=registry
        )
        self.codec = SharedGauge(
            Gauge(
                "prfaas_transport_codec",
                "1: chunks of this kind leave in this codec now",
                ["peer", "kind", "codec"],
                registry=registry,
            )
        )
        self.link = SharedGauge(
            Gauge(
                "prfaas_transport_link",
                "What a session has measured of its way to the peer: bandwidth_bytes_per_s, rtt_s, min_rtt_s, loss, "
                "utilisation, queued_bytes",
                ["peer", "what"],
                registry=registry,
            )
        )
        self.lanes = Gauge("prfaas_transport_lanes", "Open lanes", registry=registry)
        self.lane_losses = Counter("prfaas_transport_lane_losses", "Lanes lost", ["reason"], registry=registry)
        self.refusals = Counter(
            "prfaas_transport_refusals", "Frames, HELLOs and OPENs refused", ["reason"], registry=registry
        )


class _LogMetrics(Collector):
    """The log is the process's, not an app's: what it has counted is asked for."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(
            "prfaas_log_lines_dropped",
            "Log lines that could not be written: no room, or nobody read them in time",
            value=log.lines_dropped(),
        )


class Metrics:
    """All of them, on one registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.router = RouterMetrics(self.registry)
        self.node = NodeMetrics(self.registry)
        self.transport = TransportMetrics(self.registry)
        self.registry.register(_LogMetrics())

    def render(self) -> bytes:
        """The text that `/metrics` answers, of type CONTENT_TYPE."""
        return generate_latest(self.registry)
