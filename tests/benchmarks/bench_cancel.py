"""How soon a client that leaves frees the decode node's memory and stops prefill. Real processes, emulated engines.

    python tests/benchmarks/bench_cancel.py --runs 20

The bound is 100 ms plus the one-way delay, for each node. The nodes' own metrics are asked every few ms, which
is the resolution. Prints one JSON object with medians and maxima.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import tempfile
import time
from pathlib import Path
from statistics import median

import aiohttp
from prfaas.services.commands.demo.cluster import HOST, Cluster, Plan, running

POLL_S = 0.002
DELAY_MS = 20.0
PROMPT_TOKENS = 8000
# 8,000 tokens at 1,000 a second: the client leaves while most of the prompt is still to be computed.
SETTINGS = {"PRFAAS_ENGINE_ARENA_BYTES": "512M", "PRFAAS_ENGINE_PREFILL_TOKENS_PER_S": "1000"}


async def gauge(session: aiohttp.ClientSession, port: int, name: str) -> float:
    async with session.get(f"http://{HOST}:{port}/metrics") as response:
        text = await response.text()
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))


async def until(session: aiohttp.ClientSession, port: int, name: str, value: float) -> float:
    """The instant at which the metric was first seen at `value`."""
    while await gauge(session, port, name) != value:
        await asyncio.sleep(POLL_S)
    return time.monotonic()


async def one_run(session: aiohttp.ClientSession, cluster: Cluster, free_bytes: float) -> tuple[float, float]:
    """Seconds from the client's leaving to prefill's stop and to the decode node's memory being free."""
    ports = cluster.ports
    body = {"model": "emulated", "prompt": [65] * PROMPT_TOKENS, "max_tokens": 8, "stream": True}
    call = asyncio.create_task(session.post(f"{cluster.router_url}/v1/completions", json=body))
    while await gauge(session, ports.decode, "prfaas_node_free_kv_bytes") == free_bytes:
        await asyncio.sleep(POLL_S)
    call.cancel()
    left_s = time.monotonic()
    stopped_s, freed_s = await asyncio.gather(
        until(session, ports.prefill, "prfaas_node_queued_tokens", 0),
        until(session, ports.decode, "prfaas_node_free_kv_bytes", free_bytes),
    )
    return stopped_s - left_s, freed_s - left_s


async def measure(cluster: Cluster, runs: int) -> dict[str, float]:
    async with aiohttp.ClientSession() as session:
        free_bytes = await gauge(session, cluster.ports.decode, "prfaas_node_free_kv_bytes")
        while not await gauge(session, cluster.ports.decode, "prfaas_transport_lanes"):
            await asyncio.sleep(POLL_S)
        found = [await one_run(session, cluster, free_bytes) for _ in range(runs)]
    stopped, freed = ([run[i] * 1e3 for run in found] for i in (0, 1))
    return {
        "bound_ms": 100 + DELAY_MS,
        "prefill_stopped_median_ms": round(median(stopped), 1),
        "prefill_stopped_max_ms": round(max(stopped), 1),
        "memory_freed_median_ms": round(median(freed), 1),
        "memory_freed_max_ms": round(max(freed), 1),
        "runs": runs,
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--runs", type=int, default=20)
    given = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan("emulated", "bytes", "auto", 500, DELAY_MS, secrets.token_hex(16), Path(folder), SETTINGS)
        with running(plan) as cluster:
            print(json.dumps(asyncio.run(measure(cluster, given.runs)), indent=1))


if __name__ == "__main__":
    main()
