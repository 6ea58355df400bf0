"""Which nodes there are, how loaded, and what this router has sent them. Pure: `now_s` is an argument.

A node is usable while its lease lasts (each heartbeat renews it), it isn't draining, and the last call to it
connected. All nodes serve one model with one KV layout; one that differs is refused while others are alive.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import RequestError
from prfaas.common.scheduling.types import ROLE_DECODE, ROLE_PREFILL, ClusterSnapshot
from prfaas.services.messages import Heartbeat, KvAddressMessage, LoadMessage, Peer
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
MAX_KV_ADDRESSES = 256
MAX_COUNT = 1 << 53
"""Of tokens, requests or bytes that a node reports: sums of them fit the snapshot's 64 bits."""

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
    reachable: bool = True
    failures: int = 0
    """Calls in a row that did not reach it, those together counted once."""
    retry_at_s: float = 0.0
    """Heartbeats before it don't make the node reachable."""
    own_requests: int = 0
    own_tokens: int = 0
    """Dispatched by this router and not done."""
    own_requests_reported: int = 0
    own_tokens_reported: int = 0
    """The same at the last heartbeat, whose load counts them already."""
    reported_requests: int = 0
    reported_tokens: int = 0

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


class Registry:
    def __init__(self) -> None:
        self._nodes: list[Node | None] = []
        self._by_name: dict[str, Node] = {}
        self._snapshot = ClusterSnapshot()
        self._lease_until_s: NDArray[np.float64] = np.zeros(0)
        self._admitted: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.model = ""
        """As the nodes report it; the last known one when none is alive."""
        self.max_model_tokens = 0

    # -- heartbeats --------------------------------------------------------------------------------------------------

    def heartbeat(self, message: Heartbeat, now_s: float) -> Registered:
        """Register or renew. Raises RequestError when the heartbeat is malformed or the node doesn't fit."""
        role, url = _checked(message)
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
            elif now_s >= known.retry_at_s and (not known.reachable or known.lease_until_s <= now_s):
                news = "back"
        node = known or Node(
            row, message.node, message.epoch, message.region, message.role, url, [], "", "", "", 0, 0.0, False, 0.0
        )
        _renew(node, message, url, now_s)
        self._by_name[node.name] = node
        self._write_row(node, role)
        self._admit(node)
        self._count_load(node, message.load)
        self._learn_model(now_s)
        return Registered(node, news)

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
        for column in ("region", "role", "usable", "inflight_requests", "inflight_tokens", "free_kv_bytes"):
            setattr(
                snapshot, column, np.append(getattr(snapshot, column), np.zeros(1, getattr(snapshot, column).dtype))
            )
        self._lease_until_s = np.append(self._lease_until_s, 0.0)
        self._admitted = np.append(self._admitted, False)
        return len(self._nodes) - 1

    def _write_row(self, node: Node, role: int) -> None:
        snapshot, row = self._snapshot, node.row
        self._nodes[row] = node
        snapshot.names[row] = node.name
        snapshot.regions[row] = node.region
        if node.region not in snapshot.region_names:
            snapshot.region_names.append(node.region)
        snapshot.region[row] = snapshot.region_names.index(node.region)
        snapshot.role[row] = role

    def _remove(self, node: Node) -> None:
        del self._by_name[node.name]
        self._nodes[node.row] = None
        self._admitted[node.row] = False
        self._lease_until_s[node.row] = 0.0
        self._snapshot.names[node.row] = ""

    def _learn_model(self, now_s: float) -> None:
        alive = [node for node in self._by_name.values() if node.lease_until_s > now_s]
        self.model = alive[0].model
        self.max_model_tokens = min(node.max_model_tokens for node in alive)

    # -- dispatches --------------------------------------------------------------------------------------------------

    def snapshot(self, now_s: float) -> ClusterSnapshot:
        """The columns as of now; the same arrays every time."""
        np.greater(self._lease_until_s, now_s, out=self._snapshot.usable)
        self._snapshot.usable &= self._admitted
        return self._snapshot

    def node(self, row: int) -> Node:
        node = self._nodes[row]
        if node is None:
            raise LookupError(f"row {row} has no node")
        return node

    @contextmanager
    def dispatched(self, node: Node, tokens: int) -> Iterator[None]:
        """Count one request of `tokens` on `node` while the block runs. If the node has left or restarted meanwhile,
        it is forgotten there already."""
        self._add(node, 1, tokens)
        try:
            yield
        finally:
            self._add(node, -1, -tokens)

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

    def _add(self, node: Node, requests: int, tokens: int) -> None:
        node.own_requests += requests
        node.own_tokens += tokens
        self._write_load(node)

    def _count_load(self, node: Node, load: LoadMessage) -> None:
        prefill = node.role == "prefill"
        node.reported_requests = load.queued_requests + load.running_requests
        node.reported_tokens = load.queued_tokens + (0 if prefill else load.context_tokens)
        node.own_requests_reported = node.own_requests
        node.own_tokens_reported = node.own_tokens
        self._snapshot.free_kv_bytes[node.row] = load.free_kv_bytes
        self._write_load(node)

    def _write_load(self, node: Node) -> None:
        """What the node reported, plus what this router has sent and minus what has ended since; never less than what
        it has there itself: a heartbeat may have left before a request that was sent earlier arrived."""
        if self._nodes[node.row] is not node:
            return
        requests = node.reported_requests + node.own_requests - node.own_requests_reported
        tokens = node.reported_tokens + node.own_tokens - node.own_tokens_reported
        self._snapshot.inflight_requests[node.row] = max(requests, node.own_requests)
        self._snapshot.inflight_tokens[node.row] = max(tokens, node.own_tokens)

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
    if not 1 <= message.max_model_tokens <= MAX_COUNT:
        raise RequestError(f"max_model_tokens must be from 1 to {MAX_COUNT}", param="max_model_tokens")
    if not all(0 <= count <= MAX_COUNT for count in msgspec.structs.astuple(message.load)):
        raise RequestError(f"load must hold counts from 0 to {MAX_COUNT}", param="load")
    try:
        url = URL(message.url)
        good = url.scheme in ("http", "https") and url.host is not None
    except ValueError:
        good = False
    if not good:
        raise RequestError(f"url must look like http://host:port, not {message.url[:200]!r}", param="url")
    return ROLES[message.role], url


def _renew(node: Node, message: Heartbeat, url: URL, now_s: float) -> None:
    node.region, node.role, node.url = message.region, message.role, url
    node.kv_addresses = message.kv_addresses
    node.model, node.model_fingerprint = message.model, message.model_fingerprint
    node.layout_hash, node.max_model_tokens = message.layout_hash, message.max_model_tokens
    node.clock_error_s = message.clock_error_s
    node.draining = message.draining
    node.reachable = now_s >= node.retry_at_s
    node.lease_until_s = now_s + LEASE_S
