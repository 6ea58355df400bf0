"""Does a joining request hold up the streams that run? Real processes, the real model, the emulated WAN.

    python -m tests.benchmarks.bench_join --model smollm2 --streams 4 --runs 5

Each run: some streams decode; then a long prompt is prefilled in the other region and joins. Prints one JSON object:
the streams' median step, their longest gap while the prompt joined, and the bound 1.5 x median step + 20 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import secrets
import tempfile
import time
from pathlib import Path
from statistics import median

import aiohttp
from prfaas.services.commands.demo import Demo, parser
from prfaas.services.commands.demo.cluster import Plan, running
from prfaas.services.model_store import ensure_model
from rich.console import Console

ALLOWED_STEPS, ALLOWED_S = 1.5, 0.02
WARM_TOKENS = 10
STREAM_TOKENS = 2000


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, object], times_s: list[float]) -> None:
    """Appends the instant of each chunk with text; ends with the stream."""
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {") and b'"text":""' not in line:
                times_s.append(time.monotonic())  # noqa: PERF401 - others read it meanwhile


async def one_run(url: str, model: str, streams: int, prompt_tokens: int) -> dict[str, float]:
    def body(tokens: int, most: int) -> dict[str, object]:
        ids = [1000 + (i * 7919 + tokens) % 40000 for i in range(tokens)]
        fields = {"model": model, "prompt": ids, "max_tokens": most, "temperature": 0}
        return fields | {"stream": True, "ignore_eos": True}

    async with aiohttp.ClientSession() as session:
        times: list[list[float]] = [[] for _ in range(streams)]
        tasks = [asyncio.create_task(stream(session, url, body(24 + i, STREAM_TOKENS), t)) for i, t in enumerate(times)]
        while min(map(len, times)) < WARM_TOKENS:
            await asyncio.sleep(0.01)
        sent_s, joined_s = time.monotonic(), list[float]()
        await stream(session, url, body(prompt_tokens, 4), joined_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    gaps = [(a, b - a) for t in times for a, b in itertools.pairwise(t) if sent_s <= a <= joined_s[-1]]
    return {
        "ttft_s": joined_s[0] - sent_s,
        "median_step_s": median(gap for _, gap in gaps),
        "longest_gap_s": max(gap for _, gap in gaps),
        "gaps_over_bound": sum(gap > ALLOWED_STEPS * median(g for _, g in gaps) + ALLOWED_S for _, gap in gaps),
        "gaps": len(gaps),
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--model", default="smollm2")
    flags.add_argument("--dtype", default="bfloat16")
    flags.add_argument("--streams", type=int, default=4)
    flags.add_argument("--prompt-tokens", type=int, default=1024)
    flags.add_argument("--runs", type=int, default=5)
    given = flags.parse_args()
    model = str(ensure_model(given.model))
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan("transformers", model, given.dtype, 500.0, 20.0, secrets.token_hex(16), Path(folder))
        with running(plan) as cluster:
            demo = Demo(parser().parse_args([]), Console(quiet=True), cluster)
            demo.settle()
            runs = [
                asyncio.run(one_run(cluster.router_url, demo.model, given.streams, given.prompt_tokens))
                for _ in range(given.runs)
            ]
    step_s, gap_s = (median(run[key] for run in runs) for key in ("median_step_s", "longest_gap_s"))
    bound_s = ALLOWED_STEPS * step_s + ALLOWED_S
    print(json.dumps({"median_step_s": step_s, "longest_gap_s": gap_s, "bound_s": bound_s, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
