"""The JSON bodies that travel between router and nodes over HTTP (msgspec; unknown fields are ignored, so that
version N and N−1 can talk). ARCHITECTURE.md, "Between the services", draws who sends what.

    node   -> router   POST /nodes/heartbeat   Heartbeat        -> HeartbeatAnswer
    router -> decode   POST /decode            DecodeCall       -> SSE, first event `ticket`: TicketEvent
    router -> prefill  POST /prefill           PrefillCall      -> SSE, last event `done`: PrefillResult, or `error`
    router -> node     POST /role              RoleCall         -> RoleAnswer, at once; the rest is in heartbeats
    command -> router  GET /plan               PlanReport

The decode node's SSE: `event: ticket` first (token range empty or local prefill: a ticket of ""),
`: ping` every 2 s, before each `data:` line one comment `: ids 12,345` with the token ids of its text, before the end
one comment `: timeline {json}` (DecodeNodeTimeline), then `data: [DONE]` when streaming. Not streaming: one `data:`
line with the whole response object. A failure: `event: error` with an ErrorBody, and the stream ends.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import msgspec
from prfaas.common.prefixcache.events import EventBatch
from prfaas.transport.api import LinkEstimate

FIRST_PRIORITY, LAST_PRIORITY = -100, 100
Priority = Annotated[int, msgspec.Meta(ge=FIRST_PRIORITY, le=LAST_PRIORITY)]


class KvAddressMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    host: str
    port: int
    rank: int = 0


class LoadMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """services.engine.api.EngineLoad."""

    queued_requests: int = 0
    queued_tokens: int = 0
    running_requests: int = 0
    context_tokens: int = 0
    free_kv_bytes: int = 0
    max_requests: int = 0
    """A node with so many is full; 0: no such bound."""
    decoding_requests: int = 0
    waiting_requests: int = 0


class LinkMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """transport.api.LinkEstimate, of the way to a peer."""

    peer: str
    bandwidth_bytes_per_s: float = 0.0
    rtt_s: float = 0.0
    min_rtt_s: float = 0.0
    loss: float = 0.0
    utilisation: float = 0.0
    queued_bytes: int = 0

    @staticmethod
    def of(peer: str, estimate: LinkEstimate) -> LinkMessage:
        return LinkMessage(peer, **dataclasses.asdict(estimate))


class Heartbeat(msgspec.Struct, frozen=True, omit_defaults=True):
    """Every 2 s from each node to each router; it is also the registration."""

    node: str
    epoch: str
    """Random a process start: a node with a new epoch has lost all it held."""
    region: str
    role: str
    """prefill | decode."""
    url: str
    """Where the router reaches the node's HTTP, as advertised."""
    kv_addresses: list[KvAddressMessage]
    model: str
    model_fingerprint: str
    layout_hash: str
    max_model_tokens: int
    load: LoadMessage
    draining: bool = False
    leaving: bool = False
    """The last heartbeat of a process that ends: forget it now."""
    sent_s: float = 0.0
    """The node's monotonic clock at sending."""
    clock_offset_s: float = 0.0
    """router_monotonic − node_monotonic as the node reckons from earlier answers, ± clock_error_s."""
    clock_error_s: float = 1e9
    model_path: str = ""
    """The tokenizer's directory as the node sees it, for information."""
    links: list[LinkMessage] = []
    """What its KV sessions have measured of the ways to its peers."""
    routers: int = 1
    """That answer its heartbeats: as many send it requests."""
    prefix_block_tokens: int = 0
    """Of its prefix pool's blocks; 0: it has no pool. All nodes of a cluster have blocks of one size."""
    prefix_exact: bool = False
    """Prefixes are usable at snapshots alone: the model has recurrent state or windows."""
    prefix_events: EventBatch | None = None
    """What its prefix pool has taken in and given up since the last acknowledged batch."""
    profile_id: str = ""
    """Of the node's NodeProfile: a hash of its file's bytes; "": it has none."""
    profile: str = ""
    """The file itself (common/perfmodel/profiles.py), sent when the last answer wanted it."""
    next_role: str = ""
    """It is draining to change into this role; "": it isn't."""
    planner_holder: str = ""
    """The router to which this node has granted the planner's lease (common/scheduling/planner_lease.py); "": none."""
    planner_bid_s: float = 0.0
    """By that router's bid of this instant of its clock."""
    nodes_counted: int = 0
    """The most nodes that a router says there are."""
    forwards: bool = False
    """As a decode node it takes clients' bodies as they are: its engine has an OpenAI server of its own."""
    adapters: list[str] = []
    """Names of fine-tuned variants (LoRA) that its engine serves beside the model, of which KV is their own."""


class Peer(msgspec.Struct, frozen=True, omit_defaults=True):
    node: str
    region: str
    role: str
    kv_addresses: list[KvAddressMessage]


class HeartbeatAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    router: str
    received_s: float
    """The router's monotonic clock when the heartbeat came, and when this answer left."""
    answered_s: float
    peers: list[Peer]
    """Nodes of the other role: sessions to them are opened before they are needed."""
    prefix_next: int | None = None
    """The number of the prefix event that is wanted next, or events.RESTART; None: the heartbeat had none."""
    wants_profile: bool = False
    """This router doesn't know the profile with this id."""
    routers: list[str] = []
    """This address is shared by several routers, none of which has registered the node: heartbeat to these."""
    nodes: int = 0
    """That this router knows, lost ones included."""
    planner_bid: str = ""
    """It asks for the planner's lease under this name, as of `answered_s`; "": it doesn't."""
    planner_lease_s: float = 0.0


class RoleCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """Take nothing new, let what runs end, then serve the other role."""

    router: str
    planner: str
    """The name under which that router holds the planner's lease: a node obeys nobody else."""
    role: str
    reason: str = ""
    """For the node's log."""
    drain_s: float = 300.0
    """If what runs hasn't ended by then, the node goes on in its old role."""


class RoleAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """state: serving (it has this role already) | draining (it will have it)."""

    state: str
    role: str
    """That it was asked for."""
    running_requests: int = 0
    """That must end first."""


class PlannerStanding(msgspec.Struct, frozen=True):
    """The planner's lease, as one router sees it. router: who has it or is about to get it, "": nobody. mine: this
    router has it. grants: of nodes, to this router; `needed` are a majority."""

    router: str
    mine: bool
    grants: int
    needed: int


class PlanFigures(msgspec.Struct, frozen=True):
    """common/scheduling/planner.py's Plan. threshold_tokens None: nothing is offloaded."""

    threshold_tokens: float | None
    n_prfaas: int
    n_prefill: int
    n_decode: int
    requests_per_s: float
    """Most that the cluster carries so."""
    bottleneck: str
    share_offloaded: float
    egress_bytes_per_s: float
    link_utilisation: float
    decode_step_s: float


class ChangingNode(msgspec.Struct, frozen=True):
    node: str
    role: str
    next_role: str


class RegionPlan(msgspec.Struct, frozen=True):
    """Of a region that decodes: what is, and what a plan made now would be."""

    region: str
    prefill_nodes: int
    decode_nodes: int
    changing: list[ChangingNode]
    to_prefill: int
    """Nodes that would go from decode to prefill now; negative: the other way."""
    wanted_to_prefill: int
    """The same, were there no reason against it."""
    reason: str
    why: str
    """In a sentence."""
    gain: float | None
    """Relative rise of the requests/s that would be carried; None: from nothing."""
    requests_per_s: float
    """That come to this router."""
    prefill_utilisation: float
    prefill_queue_s: float
    decode_utilisation: float
    decode_queue_s: float
    threshold_tokens: float | None
    """That holds now, None: nothing is offloaded; it moves about the planned one."""
    planned_threshold_tokens: float | None
    next_plan_in_s: float
    cool_down_left_s: float
    plan: PlanFigures | None
    """None: nothing could be planned."""


class PastDecision(msgspec.Struct, frozen=True):
    at_s: float
    """Unix time."""
    region: str
    reason: str
    to_prefill: int
    why: str


class PlanReport(msgspec.Struct, frozen=True):
    """GET /plan. mode: planner.mode. why_off: "": this router plans."""

    router: str
    at_s: float
    mode: str
    why_off: str
    period_s: float
    lease: PlannerStanding
    regions: list[RegionPlan]
    history: list[PastDecision]


class SamplingMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    """Strings; matched by the decode node on the text, not by the engine."""
    include_stop_str_in_output: bool = False


class FormatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the decode node writes the response."""

    kind: str
    """chat | completion."""
    id: str
    created: int
    model: str
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    """usage in every chunk (stream_options.continuous_usage_stats, as vLLM has it)."""
    echo: bool = False


class DecodeCall(msgspec.Struct, frozen=True, omit_defaults=True):
    request_id: str
    router: str
    """The router that leases: its leases are freed when it stops answering heartbeats."""
    prompt_token_ids: list[int]
    max_output_tokens: int
    sampling: SamplingMessage
    format: FormatMessage
    local_prefill: bool = False
    prefill_node: str = ""
    """Who may present the ticket."""
    tenant: str = ""
    """Whose cached prefixes may be used (prefixcache/hashes.py)."""
    output_token_ids: list[int] = []
    text_offset: int | None = None
    """Characters of the text of output_token_ids that the client has already; None: all of them, …"""
    text_ahead: int = 0
    """… and so many of what follows, whose ids it was not told."""
    timeout_s: float | None = None
    traceparent: str = ""
    """W3C Trace Context of the router's span; "": it traces nothing."""
    priority: Priority = 0
    """As the client's: lower is sooner."""
    forward: dict[str, Any] | None = None
    """The client's own body, for a node that forwards: its engine renders the prompt and writes the response.
    prompt_token_ids are then the router's guess."""


class TicketEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """`ticket` is opaque to all but the decode process that made it; "" = no prefill needed."""

    ticket: str
    kv_addresses: list[KvAddressMessage]
    token_start: int
    """Tokens before it are in the decode node's own pool, and pinned from now on."""
    token_end: int
    prompt_token_ids: list[int] = []
    """Of a forwarded request, where the engine renders another prompt than the call had; prefill is to compute this."""


class FetchFrom(msgspec.Struct, frozen=True, omit_defaults=True):
    """A node of another region that holds more of the prompt than the prefill node's own pool."""

    node: str
    kv_addresses: list[KvAddressMessage]
    tokens: int
    """It holds [0, tokens)."""
    timeout_s: float | None = None
    """A fetch that takes longer is given up: computing would have been sooner."""


class PrefillCall(msgspec.Struct, frozen=True, omit_defaults=True):
    request_id: str
    router: str
    prompt_token_ids: list[int]
    decode_node: str
    ticket: str
    kv_addresses: list[KvAddressMessage]
    timeout_s: float | None = None
    tenant: str = ""
    fetch: FetchFrom | None = None
    traceparent: str = ""
    priority: Priority = 0
    adapter: str = ""
    """As the decode node's engine will use; "": the model itself."""


class PrefillResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """Instants in the prefill node's monotonic clock."""

    queued_s: float
    started_s: float
    ended_s: float
    raw_bytes: int
    wire_bytes: int
    held_tokens: int = 0
    """Prefix that was not computed: it was in the node's pool, or was fetched into it."""
    fetched_tokens: int = 0
    """Of these, what came from another region, …"""
    fetched_wire_bytes: int = 0
    fetch_failed: str = ""
    """… or why nothing came, in one word: the prefix was computed instead."""


class DecodeNodeTimeline(msgspec.Struct, frozen=True, omit_defaults=True):
    """All instants in the decode node's monotonic clock; those of the prefill node are mapped by the lanes' PING clock
    and true within ± clock_error_s. None = did not happen (local prefill, empty range)."""

    received_s: float
    first_token_s: float
    second_token_s: float | None = None
    last_token_s: float | None = None
    queued_s: float | None = None
    """Prefill entered its queue, started, ended."""
    started_s: float | None = None
    ended_s: float | None = None
    computed_s: list[float | None] = []
    sent_s: list[float | None] = []
    arrived_s: list[float | None] = []
    used_s: list[float | None] = []
    clock_error_s: float = 0.0
    kv_raw_bytes: int = 0
    kv_wire_bytes: int = 0
    local_prefill: bool = False
    held_tokens: int = 0
    """Prefix that this node had in its own pool, and that nobody sent."""
    clock_offset_s: float = 0.0
    """router_monotonic − decode_monotonic, ± router_clock_error_s: the router maps all of the above with it."""
    router_clock_error_s: float = 0.0


class ErrorDetail(msgspec.Struct, frozen=True):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


def to_json(message: Any) -> bytes:
    return msgspec.json.encode(message)
