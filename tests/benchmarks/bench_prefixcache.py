"""What the prefix cache's bookkeeping costs: hashing, the pool, the index.

    python tests/benchmarks/bench_prefixcache.py [--json]

Microseconds a call unless the name says otherwise; median (and 90th percentile) of many. The peers in the same run:
xxh3-128 for the hash, a walk over the holders' sets, one by one, for the match.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np
import xxhash
from prfaas.common.prefixcache.hashes import BlockHasher
from prfaas.common.prefixcache.index import IndexSettings, PrefixIndex
from prfaas.common.prefixcache.pool import PrefixPool
from prfaas.common.prefixcache.sizes import CacheSizes

Figures = dict[str, dict[str, float]]
FULL = CacheSizes(block_bytes=17_280 * 512, block_tokens=512)
HYBRID = CacheSizes(block_bytes=17_280 * 512, block_tokens=512, fixed_bytes=182_373_581)


def timed(call: Callable[[], Any], times: int) -> dict[str, float]:
    spent = []
    for _ in range(times):
        start = time.perf_counter_ns()
        call()
        spent.append(time.perf_counter_ns() - start)
    return summary(spent)


def summary(spent_ns: Sequence[int]) -> dict[str, float]:
    p50, p90 = np.percentile(spent_ns, (50, 90)) / 1e3
    return {"p50_us": round(float(p50), 2), "p90_us": round(float(p90), 2)}


def hashing() -> Figures:
    tokens = np.random.default_rng(1).integers(0, 150_000, 131_072)
    figures = {}
    for size in (16, 64, 512):
        hasher = BlockHasher("0123456789abcdef", "tenant", size)
        for name, ids in (("uint32", tokens.astype(np.uint32)), ("int64", tokens)):
            figures[f"hash 128K tokens, {name}, blocks of {size}"] = timed(lambda h=hasher, i=ids: h.keys(i), 30)
        data = tokens.astype("<u4").data.cast("B")
        figures[f"  peer: xxh3-128, blocks of {size}"] = timed(lambda d=data, n=4 * size: xxh3(d, n), 30)
    listed = tokens.tolist()
    figures["  a list of as many ids to an array"] = timed(lambda: np.asarray(listed), 10)
    return figures


def xxh3(data: memoryview, block_bytes: int) -> list[bytes]:
    key, keys = b"", []
    for start in range(0, len(data), block_bytes):
        key = xxhash.xxh3_128_digest(key + data[start : start + block_bytes])
        keys.append(key)
    return keys


def pool(sizes: CacheSizes, blocks: int) -> Figures:
    """A full pool of 1 TB; every request finds half of its prompt and inserts the other half, which evicts as much."""
    held = PrefixPool(sizes, 10**12)
    numbers = count()
    first: list[int] = []

    def prompt(prefix: Sequence[int]) -> list[int]:
        return [*prefix, *(next(numbers) for _ in range(blocks - len(prefix)))]

    def request(keys: list[int], spent: list[list[int]]) -> None:
        times = [time.perf_counter_ns()]
        lease = held.acquire(keys)
        times.append(time.perf_counter_ns())
        held.insert(lease, keys)
        if sizes.needs_snapshot:
            held.add_snapshot(lease, len(keys))
            held.add_snapshot(lease, len(keys) // 2)
        times.append(time.perf_counter_ns())
        held.release(lease)
        times.append(time.perf_counter_ns())
        spent.append(np.diff(times).tolist())
        held.drain_events()

    spent: list[list[int]] = []
    while held.used_bytes < 0.99 * held.capacity_bytes:
        request(first := prompt([]), spent)
    spent.clear()
    for turn in range(2000):
        if turn % 5 == 0:
            request(first := prompt([]), spent)
            spent.pop()
        request(prompt(first[: blocks // 2]), spent)
    name = f"{'hybrid' if sizes.needs_snapshot else 'full'} pool, {blocks} blocks"
    columns = dict(zip(("acquire", "insert + evict", "release"), zip(*spent, strict=True), strict=True))
    figures = {f"{name}: {what}": summary(times) for what, times in columns.items()}
    return figures | {f"{name}: match": timed(lambda: held.match(first), 2000)}


def index(holders: int, blocks: int) -> Figures:
    """A prompt whose first eighth (a system prompt) everybody holds, half of it 8 holders, all of it one."""
    table = PrefixIndex(IndexSettings(max_blocks=1_000_000, max_holders=holders))
    sets: list[set[int]] = []
    keys = list(range(blocks))
    for holder in range(holders):
        share = blocks if holder == holders // 2 else blocks // 2 if holder % (holders // 8) == 1 else blocks // 8
        own = range((holder + 1) << 20, ((holder + 1) << 20) + 100)
        table.add(holder, None, keys[:share])
        table.add_snapshots(holder, [keys[share - 1]])
        table.add(holder, None, own)
        sets.append({*keys[:share], *own})
    name = f"index, {holders} holders, {blocks} blocks"
    fresh = iter(range(1 << 40, 1 << 41))

    def come_and_go() -> None:
        new = [next(fresh) for _ in range(30)]
        table.add(3, keys[0], new)
        table.evict(3, new[::-1])

    assert table.match(keys).lengths(holders).tolist() == walk(sets, keys)
    return {
        f"{name}: match": timed(lambda: table.match(keys), 2000),
        f"{name}: match, lengths as a column": timed(lambda: table.match(keys).lengths(holders), 2000),
        f"{name}: match_exact, lengths as a column": timed(lambda: table.match_exact(keys).lengths(holders), 2000),
        f"{name}: add and evict 30 blocks": timed(come_and_go, 1000),
        f"  peer: walk over {holders} sets": timed(lambda: walk(sets, keys), 3),
    }


def walk(sets: list[set[int]], keys: list[int]) -> list[int]:
    return [next((place for place, key in enumerate(keys) if key not in held), len(keys)) for held in sets]


def memory() -> Figures:
    """Chains of 100 blocks, each with one holder of 1,000, and one block in ten with two more."""
    table = PrefixIndex(IndexSettings(max_blocks=100_000))
    for holder in range(1000):
        table.add(holder, None, [holder.to_bytes(16, "big")])
    tracemalloc.start()
    for chain in range(1000):
        keys = [(chain << 64 | place).to_bytes(16, "big") for place in range(1, 101)]
        for holder, share in ((chain, 100), ((chain + 1) % 1000, 10), ((chain + 2) % 1000, 10)):
            table.add(holder, None, keys[:share])
    used_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    blocks = len(table)
    start = time.perf_counter_ns()
    table.remove(500)
    removed_us = (time.perf_counter_ns() - start) / 1e3
    return {
        "index, 1000 holders: memory a block": {"bytes": round(used_bytes / blocks, 1), "blocks": blocks},
        "index, 1000 holders: remove one": {"p50_us": round(removed_us, 2)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    figures = hashing()
    for blocks in (30, 256):
        figures |= pool(FULL, blocks) | pool(HYBRID, blocks)
    for holders in (100, 1000):
        for blocks in (30, 400, 2048):
            figures |= index(holders, blocks)
    figures |= memory()
    if given.json:
        print(json.dumps(figures, indent=1))
        return
    for name, values in figures.items():
        print(f"{name:64}", "  ".join(f"{unit} {value:>10,}" for unit, value in values.items()))


if __name__ == "__main__":
    main()
