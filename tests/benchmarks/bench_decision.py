"""What a decision of the live router costs: its registry's snapshot, the policy, hashing, who holds what.

    python -m tests.benchmarks.bench_decision [--json] [--check]

1,000 nodes in three regions, registered by heartbeats with profiles, links and loads. Medians (and 90th percentiles)
of many calls, µs. --check: exit status 1 where a decision takes more than 30 µs, hashing 128K tokens more than 3 ms,
or a match at 1,000 nodes more than three times what it takes at 10.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from prfaas.common.config import RouterConfig
from prfaas.common.perfmodel.profiles import dumps, profile_id, shipped
from prfaas.common.prefixcache.events import EventBatch, Reset, added
from prfaas.common.prefixcache.hashes import BlockHasher
from prfaas.common.scheduling.types import AdmittingPolicy, PrefixMatches, RequestSnapshot
from prfaas.services.messages import Heartbeat, KvAddressMessage, LinkMessage, LoadMessage
from prfaas.services.router.decision import make_policy, shares
from prfaas.services.router.prefixes import Prefixes
from prfaas.services.router.registry import Registry

DECISION_US, HASH_US, MATCH_RATIO = 30.0, 3000.0, 3.0
BLOCK_TOKENS = 64
Figures = dict[str, dict[str, float]]


def timed(call: Callable[[int], Any], times: int) -> dict[str, float]:
    spent = []
    for i in range(times):
        start = time.perf_counter_ns()
        call(i)
        spent.append(time.perf_counter_ns() - start)
    p50, p90 = np.percentile(spent, (50, 90)) / 1e3
    return {"p50_us": round(float(p50), 1), "p90_us": round(float(p90), 1)}


def heartbeat(name: str, role: str, region: str, rng: random.Random, peer: str) -> Heartbeat:
    profile = dumps(shipped("paper-h20" if region != "prfaas" else "paper-h200"))
    queued = rng.randrange(4) if role == "prefill" else 0
    return Heartbeat(
        node=name,
        epoch="1",
        region=region,
        role=role,
        url="http://127.0.0.1:1",
        kv_addresses=[KvAddressMessage("h", 1)],
        model="m",
        model_fingerprint="f",
        layout_hash="l",
        max_model_tokens=1 << 20,
        load=LoadMessage(queued, queued * 20_000, rng.randrange(8) if role == "decode" else 0, 0, 1 << 45),
        links=[LinkMessage(peer, 1e10, 0.02, 0.02, 0.0, 0.4, 1 << 20)],
        routers=2,
        profile_id=profile_id(profile),
        profile=profile.decode(),
    )


def registry_of(nodes: int, now_s: float) -> Registry:
    """A fifth prefills for two homes, of whose nodes two in five prefill."""
    registry, rng = Registry(rng=np.random.default_rng(1)), random.Random(1)
    for i in range(nodes):
        region = "prfaas" if i % 5 == 0 else ("east", "west")[i % 2]
        role = "prefill" if region == "prfaas" or i % 5 in (1, 2) else "decode"
        registry.heartbeat(heartbeat(f"n{i}", role, region, rng, f"n{max(0, i - 4)}"), now_s)
    return registry


def request(i: int, rng: random.Random, prefixes: PrefixMatches | None = None) -> RequestSnapshot:
    tokens = rng.randrange(200, 100_000)
    return RequestSnapshot(str(i), tokens, 1024, tokens, 30.0, None, prefixes, 0.001)


def decisions(nodes: int) -> Figures:
    now_s = 100.0
    registry, rng = registry_of(nodes, now_s), random.Random(2)
    figures: Figures = {}
    asked = [request(i, rng) for i in range(2000)]
    prefixes, keys = prefixes_of(nodes, 400)
    cluster = registry.snapshot(now_s)
    figures[f"snapshot, {nodes} nodes"] = timed(lambda i: registry.snapshot(now_s), 2000)
    matches = prefixes.matches(keys, cluster)
    warm = [request(i, rng, matches) for i in range(2000)]
    for name in ("adaptive", "static", "homogeneous", "offload-all", "round-robin", "least-loaded"):
        policy: AdmittingPolicy = make_policy(RouterConfig(policy=name, offload_threshold_tokens=19_400))  # type: ignore[arg-type]
        figures[f"{name}, {nodes} nodes"] = timed(lambda i, p=policy: p(asked[i], cluster), 2000)
        if name == "adaptive":
            figures[f"{name} with prefixes, {nodes} nodes"] = timed(lambda i, p=policy: p(warm[i], cluster), 2000)
            decision: Any = policy(asked[0], cluster)
            figures["counting a dispatch and its end"] = timed(lambda i, d=decision: dispatch(registry, d), 2000)
    return figures


def dispatch(registry: Registry, decision: Any) -> None:
    mine, _ = shares(decision, registry.snapshot(100.0), 5000, 1024)
    with registry.dispatched(registry.node(decision.decode_node), 5000, mine):
        pass


def prefixes_of(nodes: int, blocks: int) -> tuple[Prefixes, list[bytes]]:
    """All nodes hold the first 20 blocks, and four of them as much more as there is, in four steps."""
    ids = np.random.default_rng(3).integers(0, 150_000, blocks * BLOCK_TOKENS + 1)
    keys = BlockHasher("f", "", BLOCK_TOKENS).keys(ids[:-1])
    prefixes, rng = Prefixes(1_000_000), random.Random(1)
    for row in range(nodes):
        held = keys[: 20 if row % (nodes // 4) else blocks * (row // (nodes // 4) + 1) // 4]
        batch = EventBatch(1, 0, (Reset(), *added(None, held)))
        beat = heartbeat(f"n{row}", "prefill", "east", rng, "")
        beat = Heartbeat(
            **{name: getattr(beat, name) for name in beat.__struct_fields__}
            | {"prefix_events": batch, "prefix_block_tokens": BLOCK_TOKENS}
        )
        prefixes.heard(row, beat)
    return prefixes, keys


def matching(nodes: int) -> Figures:
    cluster = registry_of(nodes, 100.0).snapshot(100.0)
    prefixes, keys = prefixes_of(nodes, 2048)
    return {f"match of 128K tokens, {nodes} nodes": timed(lambda i: prefixes.matches(keys, cluster), 500)}


def hashing() -> Figures:
    from prfaas.services.router.prompts import Prompt, keys_of

    ids = np.random.default_rng(1).integers(0, 150_000, 131_072).tolist()
    prompt = Prompt(ids, None)  # type: ignore[arg-type]
    hasher = BlockHasher("f", "", BLOCK_TOKENS)
    return {"hash 128K tokens": timed(lambda i: keys_of(hasher, prompt), 50)}


def too_slow(figures: Figures) -> list[str]:
    limits = {"adaptive, 1000 nodes": DECISION_US, "hash 128K tokens": HASH_US}
    few = figures["match of 128K tokens, 10 nodes"]["p50_us"]
    limits["match of 128K tokens, 1000 nodes"] = MATCH_RATIO * few
    return [
        f"{name}: {figures[name]['p50_us']} µs is more than {most:.0f}"
        for name, most in limits.items()
        if figures[name]["p50_us"] > most
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    figures = decisions(10) | decisions(1000) | hashing() | matching(10) | matching(1000)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, each in figures.items():
            print(f"{name:42} {each['p50_us']:9.1f} µs   p90 {each['p90_us']:9.1f}")
    problems = too_slow(figures) if options.check else []
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
