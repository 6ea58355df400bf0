"""How soon a client that leaves frees the decode node's memory and stops prefill. Real processes.

    python -m tests.benchmarks.bench_cancel --runs 20
    python -m tests.benchmarks.bench_cancel --engine transformers --model smollm2 --streams 4 --runs 10

Each run: some streams decode; a client leaves while its long prompt is being prefilled in the other region, then
another one in the middle of its output. The bound is 100 ms plus the one-way delay, for each node. The nodes' own
metrics are asked every few ms, which is the resolution. Prints one JSON object with medians and maxima.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import secrets
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median

import aiohttp
from prfaas.services.commands.demo import Demo, parser
from prfaas.services.commands.demo.cluster import HOST, Cluster, Plan, running
from prfaas.services.model_store import ensure_model
from rich.console import Console

POLL_S = 0.002
DELAY_MS = 20.0
RATE_MBIT = 500.0
MAX_PAUSE_S = 0.5
"""Behind the beginning of prefill, at random: the client leaves anywhere in a step."""
WARM_TOKENS = 4
STREAM_TOKENS = 2000
FREE, ARENA = "prfaas_node_free_kv_bytes", "prfaas_node_arena_bytes"
# 8,000 tokens at 1,000 a second: the client leaves while most of the prompt is still to be computed.
SETTINGS = {
    "emulated": {"PRFAAS_ENGINE_ARENA_BYTES": "1G", "PRFAAS_ENGINE_PREFILL_TOKENS_PER_S": "1000"},
    "transformers": {"PRFAAS_ENGINE_ARENA_BYTES": "1G"},
}
PROMPT_TOKENS = {"emulated": 8000, "transformers": 2048}


async def gauge(session: aiohttp.ClientSession, port: int, name: str) -> float:
    async with session.get(f"http://{HOST}:{port}/metrics") as response:
        text = await response.text()
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))


async def until(session: aiohttp.ClientSession, port: int, name: str, value: float) -> float:
    """The instant at which the metric was first seen at `value`."""
    while await gauge(session, port, name) != value:
        await asyncio.sleep(POLL_S)
    return time.monotonic()


class Clients:
    """Requests to one cluster; each leaves when its task is cancelled."""

    def __init__(self, session: aiohttp.ClientSession, cluster: Cluster, model: str) -> None:
        self.session = session
        self.ports = cluster.ports
        self._url = f"{cluster.router_url}/v1/completions"
        self._model = model

    async def complete(self, prompt_tokens: int, max_tokens: int, started: asyncio.Event) -> None:
        """`started` is set when WARM_TOKENS have come."""
        ids = [32 + (i * 7919 + prompt_tokens) % 90 for i in range(prompt_tokens)]
        body = {"model": self._model, "prompt": ids, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        async with self.session.post(self._url, json=body) as response:
            response.raise_for_status()
            tokens = 0
            async for line in response.content:
                tokens += line.startswith(b"data: {")
                if tokens >= WARM_TOKENS:
                    started.set()

    @contextlib.asynccontextmanager
    async def streaming(self, prompt_tokens: int) -> AsyncIterator[asyncio.Task[None]]:
        """A client that is in the middle of its output; it leaves at the block's end at the latest."""
        started = asyncio.Event()
        task = asyncio.create_task(self.complete(prompt_tokens, STREAM_TOKENS, started))
        try:
            waiting = asyncio.create_task(started.wait())
            await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
            if not started.is_set():
                waiting.cancel()
                await task
                raise RuntimeError("a stream ended before it had begun")
            yield task
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def free_bytes(self) -> float:
        return await gauge(self.session, self.ports.decode, FREE)

    async def freed(self, free_bytes: float) -> float:
        return await until(self.session, self.ports.decode, FREE, free_bytes)

    async def prefill_stopped(self) -> float:
        """Its memory is free: the device doesn't compute into it any more."""
        arena_bytes = await gauge(self.session, self.ports.prefill, ARENA)
        return await until(self.session, self.ports.prefill, FREE, arena_bytes)


async def leave_in_prefill(clients: Clients, prompt_tokens: int, pause_s: float) -> tuple[float, float]:
    """Seconds from the client's leaving to prefill's stop and to the decode node's memory being free."""
    free_bytes = await clients.free_bytes()
    task = asyncio.create_task(clients.complete(prompt_tokens, 8, asyncio.Event()))
    while await clients.free_bytes() == free_bytes:
        await asyncio.sleep(POLL_S)
    await asyncio.sleep(pause_s)
    task.cancel()
    left_s = time.monotonic()
    stopped_s, freed_s = await asyncio.gather(clients.prefill_stopped(), clients.freed(free_bytes))
    return stopped_s - left_s, freed_s - left_s


async def leave_in_output(clients: Clients) -> float:
    """Seconds from the client's leaving to its memory being free, while the other streams go on."""
    free_bytes = await clients.free_bytes()
    async with clients.streaming(23) as task:
        task.cancel()
        left_s = time.monotonic()
        return await clients.freed(free_bytes) - left_s


async def one_run(clients: Clients, streams: int, prompt_tokens: int, pause_s: float) -> tuple[float, float, float]:
    async with contextlib.AsyncExitStack() as stack:
        for number in range(streams):
            await stack.enter_async_context(clients.streaming(24 + number))
        stopped_s, freed_s = await leave_in_prefill(clients, prompt_tokens, pause_s)
        output_freed_s = await leave_in_output(clients)
    await clients.freed(await gauge(clients.session, clients.ports.decode, ARENA))
    return stopped_s, freed_s, output_freed_s


async def measure(cluster: Cluster, model: str, runs: int, streams: int) -> dict[str, float]:
    pauses_s = [random.Random(run).uniform(0, MAX_PAUSE_S) for run in range(runs)]
    async with aiohttp.ClientSession() as session:
        clients = Clients(session, cluster, model)
        prompt_tokens = PROMPT_TOKENS[cluster.plan.engine]
        found = [await one_run(clients, streams, prompt_tokens, pause_s) for pause_s in pauses_s]
    figures: dict[str, float] = {"bound_ms": 100 + DELAY_MS, "streams": streams, "runs": runs}
    for index, name in enumerate(("prefill_stopped", "memory_freed_in_prefill", "memory_freed_in_output")):
        took_ms = [run[index] * 1e3 for run in found]
        figures[f"{name}_median_ms"] = round(median(took_ms), 1)
        figures[f"{name}_max_ms"] = round(max(took_ms), 1)
    return figures


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--engine", choices=sorted(SETTINGS), default="emulated")
    flags.add_argument("--model", default="smollm2", help="for --engine transformers")
    flags.add_argument("--dtype", default="bfloat16")
    flags.add_argument("--streams", type=int, default=4, help="that decode meanwhile")
    flags.add_argument("--runs", type=int, default=20)
    given = flags.parse_args()
    model = "bytes" if given.engine == "emulated" else str(ensure_model(given.model))
    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS[given.engine]
        plan = Plan(
            given.engine, model, given.dtype, RATE_MBIT, DELAY_MS, secrets.token_hex(16), Path(folder), settings
        )
        with running(plan) as cluster:
            demo = Demo(parser().parse_args([]), Console(quiet=True), cluster)
            demo.settle()
            print(json.dumps(asyncio.run(measure(cluster, demo.model, given.runs, given.streams)), indent=1))


if __name__ == "__main__":
    main()
