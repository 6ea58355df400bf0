"""Routers that share nothing and see the same nodes between two heartbeats: they must not all send to the same one."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
import pytest
from prfaas.common.config import RouterConfig
from prfaas.common.perfmodel.curves import Curve, Surface
from prfaas.common.perfmodel.profiles import NodeProfile, dumps, profile_id
from prfaas.common.scheduling.types import Decision, RequestSnapshot
from prfaas.services.messages import Heartbeat, KvAddressMessage, LoadMessage
from prfaas.services.router.decision import make_policy, shares
from prfaas.services.router.registry import Registry

ROUTERS = 10
PREFILL, DECODE = 30, 20
HEARTBEAT_S = 2.0
PROFILE = NodeProfile(
    "lab",
    "m",
    "h",
    1,
    Curve((1.0, 1000.0), (0.001, 1.0), "linear"),
    Curve((0.0,), (0.0,)),
    Surface((1.0,), (0.0,), ((0.01,),)),
    max_batch=64,
)
FILE = dumps(PROFILE)
PREFILL_S = 0.5
STAY_S = 4.0
TOKENS = 500


@dataclass
class Node:
    """What a node really has, whoever sent it: instants at which its requests end."""

    name: str
    role: str
    ends_s: list[float] = field(default_factory=list)

    def take(self, now_s: float) -> None:
        if self.role == "prefill":
            self.ends_s.append(max([now_s, *self.ends_s]) + PREFILL_S)
        else:
            self.ends_s.append(now_s + STAY_S)

    def load(self, now_s: float) -> int:
        self.ends_s = [end for end in self.ends_s if end > now_s]
        return len(self.ends_s)

    def heartbeat(self, now_s: float, routers: int) -> Heartbeat:
        count = self.load(now_s)
        queued = count * TOKENS if self.role == "prefill" else 0
        load = LoadMessage(0, queued, count, 0 if queued else count * TOKENS, 1 << 40)
        return Heartbeat(
            node=self.name,
            epoch="1",
            region="away" if self.role == "prefill" else "home",
            role=self.role,
            url="http://127.0.0.1:1",
            kv_addresses=[KvAddressMessage("h", 1)],
            model="m",
            model_fingerprint="f",
            layout_hash="l",
            max_model_tokens=1 << 20,
            load=load,
            routers=routers,
            profile_id=profile_id(FILE),
            profile=FILE.decode(),
        )


def most_over_mean(rate: float, seconds: float, spread: bool, seed: int) -> dict[str, float]:
    """Virtual time: requests come at `rate` to routers in turn, nodes heartbeat to all routers every two seconds, all
    at once (the worst case). By role: the 95th percentile, over the instants before heartbeats, of the most loaded
    node's load above the mean, in requests."""
    rng = np.random.default_rng(seed)
    nodes = [Node(f"p{i}", "prefill") for i in range(PREFILL)] + [Node(f"d{i}", "decode") for i in range(DECODE)]
    by_name = {node.name: node for node in nodes}
    routers = [
        (Registry(rng=np.random.default_rng(seed * 100 + i) if spread else None), make_policy(RouterConfig()))
        for i in range(ROUTERS)
    ]
    ends: list[tuple[float, int, object]] = []
    above: dict[str, list[float]] = {"prefill": [], "decode": []}
    next_beat_s = now_s = 0.0
    turn = 0
    while now_s < seconds:
        now_s += float(rng.exponential(1 / rate))
        while next_beat_s <= now_s:
            _look(nodes, next_beat_s, above)
            for registry, _ in routers:
                for node in nodes:
                    registry.heartbeat(node.heartbeat(next_beat_s, ROUTERS), next_beat_s)
            next_beat_s += HEARTBEAT_S
        while ends and ends[0][0] <= now_s:
            _, _, held = heapq.heappop(ends)
            held.__exit__(None, None, None)  # type: ignore[attr-defined]
        registry, decide = routers[turn % ROUTERS]
        cluster = registry.snapshot(now_s)
        decision = decide(RequestSnapshot("r", TOKENS, 16, TOKENS), cluster)
        assert isinstance(decision, Decision)
        assert decision.prefill_node is not None
        mine, theirs = shares(decision, cluster, TOKENS, 16)
        for row, share in ((decision.decode_node, mine), (decision.prefill_node, theirs)):
            known = registry.node(row)
            node = by_name[known.name]
            node.take(now_s)
            held = registry.dispatched(known, TOKENS, share)
            held.__enter__()
            heapq.heappush(ends, (node.ends_s[-1], len(ends) + 1000 * turn, held))
        turn += 1
    return {role: float(np.percentile(seen[2:], 95)) for role, seen in above.items()}


def _look(nodes: list[Node], now_s: float, above: dict[str, list[float]]) -> None:
    for role, seen in above.items():
        loads = [node.load(now_s) for node in nodes if node.role == role]
        seen.append(max(loads) - sum(loads) / len(loads))


@pytest.mark.parametrize("rate", [10.0, 40.0])
def test_ten_routers_do_not_herd(rate: float) -> None:
    """At a sixth and at two thirds of what the prefill nodes can do: the most loaded node of a role has at most
    4 + 2 · √mean requests more than the mean of its role (chance alone, with nobody looking at loads, gives some
    2 · √mean). Without the spread they all choose the same nodes, and the bound is broken."""
    mean = {"prefill": rate * PREFILL_S / PREFILL, "decode": rate * STAY_S / DECODE}
    bound = {role: 4 + 2 * each**0.5 for role, each in mean.items()}
    spread = most_over_mean(rate, 60.0, spread=True, seed=1)
    assert spread["prefill"] <= bound["prefill"]
    assert spread["decode"] <= bound["decode"]
    herded = most_over_mean(rate, 60.0, spread=False, seed=1)
    assert herded["prefill"] > bound["prefill"]
    assert herded["decode"] > bound["decode"]


def test_one_router_alone_adds_nothing() -> None:
    """Its picture is complete: ties go to the lower row, and the idlest node is taken."""
    registry = Registry(rng=np.random.default_rng(1))
    for name, role in (("d", "decode"), ("p", "prefill")):
        registry.heartbeat(Node(name, role).heartbeat(0.0, 1), 0.0)
    snapshot = registry.snapshot(0.0)
    assert snapshot.prefill_jitter_s is None
    assert snapshot.decode_jitter is None
