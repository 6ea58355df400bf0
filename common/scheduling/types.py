"""What a policy sees and what it answers: (RequestSnapshot, ClusterSnapshot) -> Decision or Refused.

The cluster is columnar, one numpy array a property and one entry a node, because a Python loop over 1,000 node
objects costs 80 µs and an argmin costs 2. The shell updates the arrays in place; to a policy they are read-only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from prfaas.common.perfmodel.profiles import NodeProfile

ROLE_PREFILL = 0
ROLE_DECODE = 1

PinnedRoute = Literal["offload", "home", "local"]
"""In another region, by a prefill node of the home region, by the decode node itself."""


@dataclass(frozen=True, slots=True)
class PrefixMatches:
    """How much of a request's prompt caches hold, sparse: only where something is held. Tokens are of whole usable
    prefixes (for a hybrid model: up to a stored state).

    There are two kinds of pools. One a region, which all of its nodes read over the fast network inside (the paper's,
    and the simulator's): `region_tokens` is then what any of them has. One a node (the live ones; `region_nodes` is
    given): a node has what it holds itself, and takes from another what it fetches first.
    """

    regions: NDArray[np.int32]
    """Indices into `region_names` [matching regions]."""
    region_tokens: NDArray[np.int64]
    """Longest prefix that the region's pool, or the best of its nodes, holds [matching regions]."""
    nodes: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """Rows of nodes that hold some of it themselves, longest first [matching nodes]. Of many only the first ones."""
    node_tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Longest prefix on the node [matching nodes]."""
    region_nodes: NDArray[np.int32] | None = None
    """Row of the node that holds `region_tokens`, which a FETCH asks [matching regions]; None: pools are regions'."""
    held_by: Callable[[int], int] | None = None
    """Tokens that the node of a row holds, for those that `nodes` leaves out; None: it leaves out none."""

    def in_region(self, region: int) -> int:
        """Tokens that this region's pool holds, 0 = none."""
        found = self.region_tokens[self.regions == region]
        return int(found[0]) if found.size else 0

    def on_node(self, row: int) -> int:
        """Tokens that this node holds itself, 0 = none."""
        if self.held_by is not None:
            return self.held_by(row)
        found = self.node_tokens[self.nodes == row]
        return int(found[0]) if found.size else 0

    def usable_on(self, row: int, region: int) -> int:
        """Tokens that this node of this region needn't compute or be sent."""
        return self.in_region(region) if self.region_nodes is None else self.on_node(row)


@dataclass(frozen=True, slots=True)
class RequestSnapshot:
    """One request at the moment of its routing; lengths in tokens."""

    request_id: str
    prompt_tokens: int
    max_output_tokens: int
    uncached_tokens: int
    """What the region that decodes doesn't hold; without caches, the prompt."""
    remaining_s: float | None = None
    """Until the client's deadline for the first token; None = none."""
    home_region: int | None = None
    """The region that must decode; None = whichever has room."""
    prefixes: PrefixMatches | None = None
    waited_s: float = 0.0
    """Since the request's arrival: above 0 when it is routed again after a failure."""
    admitted: bool = False
    """It has been admitted before and is routed again: it is not refused for being late."""
    pinned_route: PinnedRoute | None = None
    """Where it must be prefilled; None = where the policy wants."""


@dataclass(slots=True)
class LinkColumns:
    """The WAN, one entry a pair of regions [from, to]; bandwidth 0 = no link. Egress of `from` is ingress of `to`."""

    bandwidth_bytes_per_s: NDArray[np.float64]
    """What the link carries now, as estimated."""
    utilisation: NDArray[np.float64]
    """Bytes sent of those that it could have, lately, 0 to 1."""
    queued_bytes: NDArray[np.float64]
    """Bytes on the wire that dispatched requests will still send: those whose prefill hasn't begun count whole."""
    rtt_s: NDArray[np.float64]

    @classmethod
    def none(cls, regions: int) -> LinkColumns:
        """No links between so many regions."""
        return cls(*(np.zeros((regions, regions)) for _ in range(4)))


class Pool(NamedTuple):
    """Nodes of one role, region and profile. rows: a slice where they lie together (a view costs a tenth of a copy)."""

    region: int
    profile: int
    rows: slice | NDArray[np.int64]
    first: int
    """rows[0]: added to an index into a slice's view it gives the row."""


@dataclass(slots=True)
class ClusterSnapshot:
    """Columns over nodes, all of the same length. `inflight_*` include what this router has dispatched itself since
    the node's last heartbeat, else every request between two heartbeats goes to the same idle node.

    `LeastLoaded` reads the columns down to `free_kv_bytes`; the policies of `policies.py` all of them.
    """

    names: list[str] = field(default_factory=list)
    regions: list[str] = field(default_factory=list)
    region: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """Index of the node's region in `region_names`."""
    region_names: list[str] = field(default_factory=list)
    role: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, np.int8))
    usable: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """Alive by lease, not draining, and reachable when last tried."""
    inflight_requests: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    inflight_tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Uncached prompt tokens queued or being prefilled (prefill), or context tokens held (decode)."""
    free_kv_bytes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Memory for KV that no dispatched request will need."""
    profile: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """Index of the node's profile in `profiles`."""
    profiles: list[NodeProfile] = field(default_factory=list)
    prefill_free_at_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """When the node will have prefilled all that it was given, as predicted, on the clock of `now_s`: an instant needs
    no update while time passes."""
    decode_free_at_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """When a place in the batch will be free for one more request, as predicted from what was dispatched; an instant
    that has passed: there is one."""
    max_inflight_requests: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """A node with so many is full."""
    decoding_requests: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """In the batch of a decode node now. It and the next are for the slow planner; no policy looks at them."""
    waiting_requests: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """On a decode node with all their KV, for want of a place in its batch."""
    links: LinkColumns = field(default_factory=lambda: LinkColumns.none(0))
    prefill_jitter_s: NDArray[np.float64] | None = None
    """Added to when a node is free where nodes are compared, so that routers with one picture of the nodes don't all
    choose the same one: drawn by each router for itself, as large as what the others may have sent. None: no others."""
    decode_jitter: NDArray[np.float64] | None = None
    """The same for decode nodes, in requests."""
    now_s: float = 0.0
    layout_version: int = 0
    """The shell raises it when a node comes, goes, or changes its region, role or profile: the pools follow."""
    _pools: dict[int, list[Pool]] = field(default_factory=dict, repr=False)
    _pools_version: int = field(default=-1, repr=False)

    def closed_nodes(self) -> NDArray[np.bool_]:
        """Not usable, or full [nodes]."""
        found = self.inflight_requests >= self.max_inflight_requests
        found |= ~self.usable
        return found

    def pools(self, role: int) -> list[Pool]:
        """The nodes of a role, by region and profile; kept until `layout_version` changes."""
        if self._pools_version != self.layout_version:
            self._pools = {role: _pools_of(self, role) for role in (ROLE_PREFILL, ROLE_DECODE)}
            self._pools_version = self.layout_version
        return self._pools[role]


def _pools_of(cluster: ClusterSnapshot, role: int) -> list[Pool]:
    rows = np.flatnonzero(cluster.role == role)
    keys = sorted({(int(cluster.region[row]), int(cluster.profile[row])) for row in rows})
    pools = []
    for region, profile in keys:
        own = rows[(cluster.region[rows] == region) & (cluster.profile[rows] == profile)]
        together = own[-1] - own[0] + 1 == own.size
        pools.append(Pool(region, profile, slice(int(own[0]), int(own[-1]) + 1) if together else own, int(own[0])))
    return pools


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes and why. Node fields are indices into the snapshot.

    prefill_node: None = the decode node prefills locally. token_start: tokens [0, token_start) are held by the decode
    node already. reason: one of the words that the metrics and the `x-prfaas-reason` header carry.
    """

    prefill_node: int | None
    decode_node: int
    token_start: int
    reason: str
    prefill_start: int = 0
    """Tokens [0, prefill_start) come from a cache on the prefill side, so prefill computes the rest of the prompt."""
    fetch_region: int | None = None
    """Where tokens up to `prefill_start` are fetched from over the WAN first; None = the prefill region has them."""
    predicted_ttft_s: float = float("nan")
    fetch_node: int | None = None
    """The node of `fetch_region` that holds it, where pools are nodes'."""
    prefill_s: float = 0.0
    """Bare, of the node that prefills."""
    wire_bytes: float = 0.0
    """KV that crosses the WAN for it, as predicted."""
    threshold_tokens: float = float("nan")
    """That it was decided with; nan: none."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Not admitted. The router answers 429 with `Retry-After` when `reason` is "deadline", 503 otherwise."""

    reason: str
    """deadline: nobody would be in time; full: no node has room; pinned: the pinned route isn't there; no_decode_node,
    no_prefill_node."""
    retry_after_s: float


class AdmittingPolicy(Protocol):
    """Pure: no clock, no I/O, no randomness of its own. It may hold state of its own (a cursor, a threshold)."""

    def __call__(self, request: RequestSnapshot, cluster: ClusterSnapshot) -> Decision | Refused: ...
