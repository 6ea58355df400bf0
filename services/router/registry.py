"""Which nodes there are, how loaded, and what this router has sent them. Pure: `now_s` and `rng` are arguments.

A node is usable while its lease lasts (each heartbeat renews it), it isn't draining, and the last call to it
connected. All nodes serve one model with one KV layout; one that differs is refused while others are alive.

Between heartbeats the snapshot follows what this router does itself: seconds of prefill, places and memory of decode
nodes, bytes on links, each until the request that asked for it ends. What other routers do meanwhile it can't know;
`Spread` draws how far nodes that look alike are told apart, so that routers don't all choose the same one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import RequestError
from prfaas.common.scheduling.planner_lease import MAX_HOLDER, Vote
from prfaas.common.scheduling.types import ROLE_DECODE, ROLE_PREFILL, ClusterSnapshot
from prfaas.services.messages import Heartbeat, KvAddressMessage, LinkMessage, LoadMessage, Peer
from prfaas.services.router.links import Links
from prfaas.services.router.profiles import Profiles
from prfaas.services.router.share import Share, busy_s
from prfaas.services.router.spread import Spread
from yarl import URL

LEASE_S = 10.0
"""A node that sent no heartbeat (one every 2 s) for so long is lost."""
FORGET_S = 600.0
"""A node that has been silent for so long loses its row; until then `nodes` shows it as lost."""
BACK_OFF_S = 2.0
"""A node whose heartbeats come but which calls don't reach is left alone, longer each time …"""
MAX_BACK_OFF_S = 30.0
"""… up to this."""
MAX_NODES = 4096
MAX_REGIONS = 256
"""Links are kept by pairs of regions."""
MAX_KV_ADDRESSES = 256
MAX_LINKS = 1 << 14
"""Sessions that a heartbeat reports."""
MAX_ROUTERS = 1 << 10
MANY = 1 << 60
STAY_WEIGHT = 0.05
"""Of one request's stay in a decode node, in the moving average."""
MAX_STAY_RATIO = 10.0
"""Of one request: one that waited long for its prefill says little of decode."""
FIRST_STAY_S = 10.0
"""Until one has ended."""
NO_ROLE = -1
"""Of a row without a node."""
MAX_COUNT = 1 << 53
"""Of tokens, requests or bytes that a node reports: sums of them fit the snapshot's 64 bits."""

MAX_ADAPTERS = 1000
"""Of one node."""
ROLES = {"prefill": ROLE_PREFILL, "decode": ROLE_DECODE}
_NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""Node names go into response headers, logs and metrics."""


@dataclass(slots=True, eq=False)
class Node:
    """One process. A new epoch of the same name is a new Node in the same row."""

    row: int
    name: str
    epoch: str
    region: str
    role: str
    url: URL
    kv_addresses: list[KvAddressMessage]
    model: str
    model_fingerprint: str
    layout_hash: str
    max_model_tokens: int
    lease_until_s: float
    draining: bool
    clock_error_s: float
    forwards: bool = False
    adapters: Sequence[str] = ()
    reachable: bool = True
    failures: int = 0
    """Calls in a row that did not reach it, those together counted once."""
    retry_at_s: float = 0.0
    """Heartbeats before it don't make the node reachable."""
    own: list[Share] = field(default_factory=list)
    """Dispatched by this router and not done, oldest first."""
    own_tokens: int = 0
    own_kv_bytes: int = 0
    own_stay_s: float = 0.0
    """Of these."""
    own_requests_reported: int = 0
    own_tokens_reported: int = 0
    own_kv_bytes_reported: int = 0
    """The same at the last heartbeat, whose load counts them already."""
    reported_requests: int = 0
    reported_tokens: int = 0
    reported_free_kv_bytes: int = 0
    most_free_kv_bytes: int = 0
    """Ever reported: what there is when nothing runs."""
    others_until_s: float = 0.0
    """When the node will have prefilled what other routers have sent it, as of the last heartbeat."""
    running_since_s: float = 0.0
    """When the oldest of our prefills there could begin: its dispatch, or the end of the one before."""
    region_index: int = -1
    profile: int = -1
    """Slot in the snapshot's profiles."""
    profile_id: str = ""
    routers: int = 1
    next_role: str = ""
    """It is draining to take this one; "": it isn't."""
    planner_holder: str = ""
    planner_bid_s: float = 0.0
    """To whom it has granted the planner's lease, by the bid of when (the holder's clock)."""
    nodes_counted: int = 0
    """The most nodes that a router has told it of."""

    def state(self, now_s: float) -> str:
        if self.lease_until_s <= now_s:
            return "lost"
        if self.draining:
            return "draining"
        return "usable" if self.reachable else "unreachable"


@dataclass(frozen=True, slots=True)
class Registered:
    """What changed: `news` is a word for the log, or None when it was a plain renewal."""

    node: Node | None
    news: str | None


_COLUMNS = (
    "region",
    "role",
    "usable",
    "inflight_requests",
    "inflight_tokens",
    "free_kv_bytes",
    "profile",
    "prefill_free_at_s",
    "decode_free_at_s",
    "max_inflight_requests",
    "decoding_requests",
    "waiting_requests",
)
"""Of the snapshot, with an entry a node."""


class Registry:
    def __init__(
        self,
        assumed_link_bytes_per_s: float = 1.25e9,
        rng: np.random.Generator | None = None,
        on_row_free: Callable[[int], None] = lambda row: None,
    ) -> None:
        """assumed_link_bytes_per_s: of a link that nobody has measured. rng: None: as if there were no other routers.
        on_row_free: called with the row of a node that is gone or has begun anew."""
        self._on_row_free = on_row_free
        self._nodes: list[Node | None] = []
        self._by_name: dict[str, Node] = {}
        self._snapshot = ClusterSnapshot()
        self.links = Links(assumed_link_bytes_per_s)
        self.profiles = Profiles()
        self._snapshot.profiles = self.profiles.table
        self._spread = Spread(rng)
        self._in_region: list[int] = []
        """Nodes in each region."""
        self._stay_s = FIRST_STAY_S
        """How long a request is in a decode node, on the average; of those that other routers have sent."""
        self._stay_ratio = 1.0
        """How long one of this router's requests really is there, against `Share.stay_s`: outputs end sooner than they
        may, and a place is taken while prefill computes."""
        self._lease_until_s: NDArray[np.float64] = np.zeros(0)
        self._admitted: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.model = ""
        """As the nodes report it; the last known one when none is alive."""
        self.max_model_tokens = 0
        self.forwards = False
        """All decode nodes take clients' bodies as they are."""
        self.adapters: frozenset[str] = frozenset()
        """That all decode nodes serve."""

    # -- heartbeats --------------------------------------------------------------------------------------------------

    def heartbeat(self, message: Heartbeat, now_s: float) -> Registered:
        """Register or renew. Raises RequestError when the heartbeat is malformed or the node doesn't fit."""
        role, url = _checked(message)
        self._snapshot.now_s = now_s
        known = self._by_name.get(message.node)
        if message.leaving:
            if known is not None and known.epoch == message.epoch:
                self._remove(known)
                return Registered(None, "left")
            return Registered(None, None)
        self._refuse_misfit(message, now_s)
        news = None
        if known is None:
            news, row = "registered", self._free_row(now_s)
        else:
            row = known.row
            if known.epoch != message.epoch:
                news, known = "restarted", None
            elif known.role != message.role:
                news = "converted"
            elif now_s >= known.retry_at_s and (not known.reachable or known.lease_until_s <= now_s):
                news = "back"
        region = self._region(message.region)
        node = known or Node(
            row, message.node, message.epoch, message.region, message.role, url, [], "", "", "", 0, 0.0, False, 0.0
        )
        _renew(node, message, url, now_s)
        self._by_name[node.name] = node
        if message.profile:
            self.profiles.take(node.name, message.profile_id, message.profile)
        self._write_row(node, role, region, message)
        self._admit(node)
        self._count_load(node, message.load)
        self._hear_links(node, message.links)
        self._spread.draw(node.row, node.routers)
        self._learn_model(now_s)
        return Registered(node, news)

    def wants_profile(self, message: Heartbeat) -> bool:
        return self.profiles.wants(message.profile_id)

    def peers_of(self, message: Heartbeat, now_s: float) -> list[Peer]:
        """Live nodes of the other role."""
        return [
            Peer(node.name, node.region, node.role, node.kv_addresses)
            for node in self._by_name.values()
            if node.role != message.role and node.lease_until_s > now_s
        ]

    def _refuse_misfit(self, message: Heartbeat, now_s: float) -> None:
        for other in self._by_name.values():
            if other.name == message.node or other.lease_until_s <= now_s:
                continue
            if (other.model_fingerprint, other.layout_hash) != (message.model_fingerprint, message.layout_hash):
                what = "model" if other.model_fingerprint != message.model_fingerprint else "KV layout"
                raise RequestError(
                    f"node {message.node} has another {what} than node {other.name} "
                    f"({message.model}, fingerprint {message.model_fingerprint}, layout {message.layout_hash}; "
                    f"here {other.model}, {other.model_fingerprint}, {other.layout_hash}): "
                    "all nodes of a cluster load the same files",
                    code="model_mismatch",
                )
            return

    def _free_row(self, now_s: float) -> int:
        for node in list(self._by_name.values()):
            if node.lease_until_s + FORGET_S <= now_s:
                self._remove(node)
        if None in self._nodes:
            return self._nodes.index(None)
        if len(self._nodes) >= MAX_NODES:
            raise RequestError(f"this router knows {MAX_NODES} nodes and takes no more", code="too_many_nodes")
        self._nodes.append(None)
        snapshot = self._snapshot
        snapshot.names.append("")
        snapshot.regions.append("")
        for column in _COLUMNS:
            old = getattr(snapshot, column)
            setattr(snapshot, column, np.append(old, np.zeros(1, old.dtype)))
        snapshot.role[-1] = NO_ROLE
        self._lease_until_s = np.append(self._lease_until_s, 0.0)
        self._admitted = np.append(self._admitted, False)
        self._spread.grow(len(self._nodes))
        return len(self._nodes) - 1

    def _region(self, name: str) -> int:
        """Its index; of a new one that of a region which has no nodes any more, if there is one."""
        snapshot = self._snapshot
        if name in snapshot.region_names:
            return snapshot.region_names.index(name)
        if 0 in self._in_region:
            index = self._in_region.index(0)
            snapshot.region_names[index] = name
            self.links.forget_region(index)
            return index
        if len(snapshot.region_names) >= MAX_REGIONS:
            raise RequestError(f"this router knows {MAX_REGIONS} regions and takes no more", code="too_many_regions")
        snapshot.region_names.append(name)
        self._in_region.append(0)
        snapshot.links = self.links.grow(len(snapshot.region_names))
        return len(snapshot.region_names) - 1

    def _write_row(self, node: Node, role: int, region: int, message: Heartbeat) -> None:
        snapshot, row = self._snapshot, node.row
        before = self._nodes[row]
        if before is not None and before is not node:
            self._forget_row(before)
        if node.profile < 0 or (node.profile_id != message.profile_id) or self._profile_came(node):
            if node.profile >= 0:
                self.profiles.leave(node.profile)
            node.profile_id = message.profile_id
            node.profile = self.profiles.use(node.name, message.profile_id, message.load.max_requests)
        if node.region_index != region:
            if node.region_index >= 0:
                self.links.forget_node(row, node.region_index)
                self._in_region[node.region_index] -= 1
            node.region_index = region
            self._in_region[region] += 1
        self._nodes[row] = node
        snapshot.names[row] = node.name
        snapshot.regions[row] = node.region
        now = (role, region, node.profile)
        if before is None or now != (snapshot.role[row], snapshot.region[row], snapshot.profile[row]):
            snapshot.layout_version += 1
        snapshot.role[row], snapshot.region[row], snapshot.profile[row] = now

    def _profile_came(self, node: Node) -> bool:
        return self.profiles.slot(node.profile_id) not in (None, node.profile)

    def _remove(self, node: Node) -> None:
        row = node.row
        del self._by_name[node.name]
        self._forget_row(node)
        self._nodes[row] = None
        self._admitted[row] = False
        self._lease_until_s[row] = 0.0
        self._snapshot.names[row] = ""
        self._snapshot.role[row] = NO_ROLE
        self._snapshot.layout_version += 1

    def _forget_row(self, node: Node) -> None:
        """What others keep of it by its row."""
        self._on_row_free(node.row)
        self.links.forget_node(node.row, node.region_index)
        self.profiles.leave(node.profile)
        self._in_region[node.region_index] -= 1

    def _hear_links(self, node: Node, links: list[LinkMessage]) -> None:
        known = [(peer.region_index, link) for link in links if (peer := self._by_name.get(link.peer)) is not None]
        self.links.heard(node.row, node.region_index, known)

    def _learn_model(self, now_s: float) -> None:
        alive = [node for node in self._by_name.values() if node.lease_until_s > now_s]
        self.model = alive[0].model
        self.max_model_tokens = min(node.max_model_tokens for node in alive)
        decode = [node for node in alive if node.role == "decode"]
        self.forwards = bool(decode) and all(node.forwards for node in decode)
        self.adapters = (
            frozenset.intersection(*(frozenset(node.adapters) for node in decode)) if decode else frozenset()
        )

    # -- dispatches --------------------------------------------------------------------------------------------------

    def snapshot(self, now_s: float) -> ClusterSnapshot:
        """The columns as of now; the same arrays every time, until nodes are added."""
        snapshot = self._snapshot
        snapshot.now_s = now_s
        np.greater(self._lease_until_s, now_s, out=snapshot.usable)
        snapshot.usable &= self._admitted
        self._spread.write(snapshot)
        return snapshot

    def node(self, row: int) -> Node:
        node = self._nodes[row]
        if node is None:
            raise LookupError(f"row {row} has no node")
        return node

    @contextmanager
    def dispatched(self, node: Node, tokens: int, share: Share | None = None) -> Iterator[None]:
        """Count one request on `node` while the block runs, as of the last `snapshot`. share: what it asks for; None:
        nothing is predicted of it but its tokens. If the node has left or restarted meanwhile, it is forgotten there
        already."""
        share = share or Share(tokens)
        began_s = self._snapshot.now_s
        self._begin(node, share, began_s)
        try:
            yield
        finally:
            self._end(node, share, began_s, self._snapshot.now_s)

    def _begin(self, node: Node, share: Share, now_s: float) -> None:
        if not node.own:
            node.running_since_s = now_s
        node.own.append(share)
        node.own_tokens += share.tokens
        node.own_kv_bytes += share.kv_bytes
        node.own_stay_s += share.stay_s
        if share.link is not None:
            self.links.dispatched(share.link, share.wire_bytes)
        if self._nodes[node.row] is node:
            self._spread.dispatched(node.row, ROLES[node.role], share.prefill_s)
            free_at_s = self._snapshot.prefill_free_at_s
            free_at_s[node.row] = max(free_at_s.item(node.row), now_s) + share.prefill_s
        self._write_load(node)

    def _end(self, node: Node, share: Share, began_s: float, now_s: float) -> None:
        node.own.remove(share)
        node.own_tokens -= share.tokens
        node.own_kv_bytes -= share.kv_bytes
        node.own_stay_s = node.own_stay_s - share.stay_s if node.own else 0.0
        node.running_since_s = now_s
        if share.link is not None:
            self.links.dispatched(share.link, -share.wire_bytes)
        if self._nodes[node.row] is node:
            if node.role == "decode" and now_s > began_s:
                self._stay_s += STAY_WEIGHT * (now_s - began_s - self._stay_s)
                if share.stay_s > 0:
                    real = min(MAX_STAY_RATIO, (now_s - began_s) / share.stay_s)
                    self._stay_ratio += STAY_WEIGHT * (real - self._stay_ratio)
            # One that was cancelled, or done early, leaves its time to those behind it.
            rest_s = sum(other.prefill_s for other in node.own)
            free_at_s = self._snapshot.prefill_free_at_s
            free_at_s[node.row] = min(free_at_s.item(node.row), max(now_s, node.others_until_s) + rest_s)
        self._write_load(node)

    def unreachable(self, node: Node, now_s: float) -> None:
        """A call to it failed: not usable until its next heartbeat; when that was in vain, until a later one."""
        if node.reachable:
            back_off_s = min(MAX_BACK_OFF_S, BACK_OFF_S * 2 ** min(node.failures - 1, 10)) if node.failures else 0.0
            node.retry_at_s = now_s + back_off_s
            node.failures += 1
            node.reachable = False
            self._admit(node)

    def reached(self, node: Node) -> None:
        """A call to it was answered."""
        node.failures = 0

    # -- roles -------------------------------------------------------------------------------------------------------

    def votes(self, now_s: float) -> list[Vote]:
        """Of all nodes, those included that were lost lately: to whom each has granted the planner's lease."""
        return [
            Vote(node.planner_holder, node.planner_bid_s, node.nodes_counted, node.lease_until_s > now_s)
            for node in self._by_name.values()
        ]

    def changing(self, region: str, now_s: float) -> list[Node]:
        """Nodes there that are about to take another role."""
        nodes = self._by_name.values()
        return [node for node in nodes if node.region == region and node.next_role and node.lease_until_s > now_s]

    def changes_role(self, node: Node, role: str) -> None:
        """It has been told to, and said yes: known before its next heartbeat."""
        node.next_role, node.draining = role, True
        self._admit(node)

    def _count_load(self, node: Node, load: LoadMessage) -> None:
        snapshot, row, now_s = self._snapshot, node.row, self._snapshot.now_s
        prefill = node.role == "prefill"
        node.reported_requests = load.queued_requests + load.running_requests
        node.reported_tokens = load.queued_tokens + (0 if prefill else load.context_tokens)
        node.reported_free_kv_bytes = load.free_kv_bytes
        node.most_free_kv_bytes = max(node.most_free_kv_bytes, load.free_kv_bytes)
        node.own_requests_reported = len(node.own)
        node.own_tokens_reported = node.own_tokens
        node.own_kv_bytes_reported = node.own_kv_bytes
        snapshot.max_inflight_requests[row] = load.max_requests or MANY
        snapshot.decoding_requests[row] = load.decoding_requests
        snapshot.waiting_requests[row] = load.waiting_requests
        running_for_s = now_s - node.running_since_s if node.own else 0.0
        own = node.own if prefill else []
        wait_s = busy_s(snapshot.profiles[node.profile], load, own, running_for_s)
        snapshot.prefill_free_at_s[row] = now_s + wait_s
        node.others_until_s = now_s + max(0.0, wait_s - sum(share.prefill_s for share in own))
        self._write_load(node)

    def _write_load(self, node: Node) -> None:
        """What the node reported, plus what this router has sent and minus what has ended since; never less than what
        it has there itself: a heartbeat may have left before a request that was sent earlier arrived."""
        if self._nodes[node.row] is not node:
            return
        snapshot, row, own = self._snapshot, node.row, len(node.own)
        requests = max(node.reported_requests + own - node.own_requests_reported, own)
        tokens = node.reported_tokens + node.own_tokens - node.own_tokens_reported
        snapshot.inflight_requests[row] = requests
        snapshot.inflight_tokens[row] = max(tokens, node.own_tokens)
        free = node.reported_free_kv_bytes - (node.own_kv_bytes - node.own_kv_bytes_reported)
        snapshot.free_kv_bytes[row] = min(free, node.most_free_kv_bytes - node.own_kv_bytes)
        batch = snapshot.profiles[node.profile].max_batch
        ahead = requests - batch + 1
        stay_s = self._stay_ratio * node.own_stay_s / own if node.own_stay_s > 0 else self._stay_s
        free_at_s = snapshot.now_s + ahead * stay_s / batch if ahead > 0 else 0.0
        snapshot.decode_free_at_s[row] = free_at_s

    def _admit(self, node: Node) -> None:
        if self._nodes[node.row] is node:
            self._admitted[node.row] = node.reachable and not node.draining
            self._lease_until_s[node.row] = node.lease_until_s

    # -- for people --------------------------------------------------------------------------------------------------

    def why_not_ready(self, now_s: float) -> str | None:
        snapshot = self.snapshot(now_s)
        if bool(np.any(snapshot.usable & (snapshot.role == ROLE_DECODE))):
            return None
        return "no usable decode node"

    def nodes(self) -> list[Node]:
        """All of them, by name."""
        return [self._by_name[name] for name in sorted(self._by_name)]

    def __len__(self) -> int:
        """Of all nodes, those included that were lost lately."""
        return len(self._by_name)

    def count(self, role: str, state: str, now_s: float) -> int:
        return sum(node.role == role and node.state(now_s) == state for node in self._by_name.values())


def _checked(message: Heartbeat) -> tuple[int, URL]:
    """The role and the URL. Raises RequestError."""
    if not _NAME.fullmatch(message.node):
        raise RequestError("a node's name has 1 to 128 letters, digits and ._:-", param="node")
    if message.role not in ROLES:
        raise RequestError(f"role must be prefill or decode, not {message.role[:50]!r}", param="role")
    if len(message.region) > 128 or len(message.epoch) > 128 or len(message.model) > 512:
        raise RequestError("region, epoch or model is too long", param="region")
    if len(message.kv_addresses) > MAX_KV_ADDRESSES:
        raise RequestError(f"more than {MAX_KV_ADDRESSES} KV addresses", param="kv_addresses")
    if not all(1 <= len(a.host) <= 255 and 0 < a.port < 65536 for a in message.kv_addresses):
        raise RequestError("a KV address needs a host of at most 255 characters and a port", param="kv_addresses")
    if len(message.links) > MAX_LINKS or not all(_is_sane(link) for link in message.links):
        raise RequestError(f"links must be at most {MAX_LINKS}, with finite numbers of at least 0", param="links")
    if len(message.profile_id) > 128 or not 1 <= message.routers <= MAX_ROUTERS:
        raise RequestError(f"profile_id is too long, or routers is not from 1 to {MAX_ROUTERS}", param="routers")
    if not 1 <= message.max_model_tokens <= MAX_COUNT:
        raise RequestError(f"max_model_tokens must be from 1 to {MAX_COUNT}", param="max_model_tokens")
    if not all(0 <= count <= MAX_COUNT for count in msgspec.structs.astuple(message.load)):
        raise RequestError(f"load must hold counts from 0 to {MAX_COUNT}", param="load")
    _check_roles(message)
    try:
        url = URL(message.url)
        good = url.scheme in ("http", "https") and url.host is not None
    except ValueError:
        good = False
    if not good:
        raise RequestError(f"url must look like http://host:port, not {message.url[:200]!r}", param="url")
    return ROLES[message.role], url


def _check_roles(message: Heartbeat) -> None:
    if message.next_role not in ("", *ROLES) or not 0 <= message.nodes_counted <= MAX_NODES:
        raise RequestError(f"next_role is no role, or nodes_counted is not from 0 to {MAX_NODES}", param="next_role")
    if len(message.planner_holder) > MAX_HOLDER or not 0 <= message.planner_bid_s <= MAX_COUNT:
        raise RequestError("planner_holder is too long, or planner_bid_s is no time", param="planner_holder")


def _is_sane(link: LinkMessage) -> bool:
    values = (link.bandwidth_bytes_per_s, link.rtt_s, link.utilisation, link.queued_bytes)
    return all(0 <= value <= MAX_COUNT for value in values)


def _renew(node: Node, message: Heartbeat, url: URL, now_s: float) -> None:
    node.region, node.role, node.url = message.region, message.role, url
    node.kv_addresses = message.kv_addresses
    node.model, node.model_fingerprint = message.model, message.model_fingerprint
    node.layout_hash, node.max_model_tokens = message.layout_hash, message.max_model_tokens
    node.clock_error_s = message.clock_error_s
    node.forwards, node.adapters = message.forwards, message.adapters[:MAX_ADAPTERS]
    node.routers = message.routers
    node.next_role = message.next_role
    node.planner_holder, node.planner_bid_s = message.planner_holder, message.planner_bid_s
    node.nodes_counted = message.nodes_counted
    node.draining = message.draining
    node.reachable = now_s >= node.retry_at_s
    node.lease_until_s = now_s + LEASE_S
