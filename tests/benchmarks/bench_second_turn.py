"""What a conversation's second turn costs beside its first. Real processes, the real model, the emulated WAN.

    python -m tests.benchmarks.bench_second_turn --model smollm2 --prompt-tokens 2000 --runs 5

Each run is a new conversation: a first turn, a second one (prompt, answer and some tokens more), and the second turn's
prompt once more for a tenant who shares nothing, which is what it costs without a cache. All are prefilled in the other
region. Prints one JSON object: of each the time to the first token at the client, the prefill's share of it, and the KV
bytes that crossed; medians of the runs.
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
from typing import Any

import aiohttp
from prfaas.services.commands.demo import Demo, parser
from prfaas.services.commands.demo.cluster import Plan, running
from prfaas.services.model_store import ensure_model
from rich.console import Console

HEADERS = {"x-prfaas-pin-route": "offload"}


class Conversations:
    def __init__(self, session: aiohttp.ClientSession, url: str, model: str) -> None:
        self._session = session
        self._url = url
        self._model = model

    async def turn(self, prompt: list[int], output_tokens: int, tenant: str) -> tuple[dict[str, float], list[int]]:
        """What it cost, and what it said."""
        body = {"model": self._model, "prompt": prompt, "max_tokens": output_tokens, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True, "cache_salt": tenant}
        sent_s, first_s = time.monotonic(), 0.0
        async with self._session.post(f"{self._url}/v1/completions", json=body, headers=HEADERS) as response:
            response.raise_for_status()
            request_id = response.headers["x-request-id"]
            async for line in response.content:
                if not first_s and line.startswith(b"data: {") and b'"text":""' not in line:
                    first_s = time.monotonic()
        timeline = await self._timeline(request_id)
        prefill_s = (timeline["prefill_ended_s"] or 0.0) - (timeline["prefill_started_s"] or 0.0)
        cost = {
            "ttft_s": first_s - sent_s,
            "prefill_s": prefill_s,
            "kv_bytes": timeline["kv_raw_bytes"],
            "kv_wire_bytes": timeline["kv_wire_bytes"],
        }
        return cost, timeline["output_token_ids"]

    async def _timeline(self, request_id: str) -> dict[str, Any]:
        async with self._session.get(f"{self._url}/requests/{request_id}/timeline") as response:
            response.raise_for_status()
            found: dict[str, Any] = await response.json()
            return found


async def one_run(url: str, model: str, seed: int, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    ids = [1000 + (i * 7919 + seed * 104729) % 40000 for i in range(given.prompt_tokens + given.more_tokens)]
    async with aiohttp.ClientSession() as session:
        conversations = Conversations(session, url, model)
        first, said = await conversations.turn(ids[: given.prompt_tokens], given.output_tokens, "bench")
        prompt = [*ids[: given.prompt_tokens], *said, *ids[given.prompt_tokens :]]
        second, with_cache = await conversations.turn(prompt, 8, "bench")
        cold, without = await conversations.turn(prompt, 8, f"nobody-{seed}")
    return {"first": first, "second": second, "second_without_cache": cold, "same": {"tokens": with_cache == without}}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--model", default="smollm2")
    flags.add_argument("--dtype", default="bfloat16")
    flags.add_argument("--prompt-tokens", type=int, default=2000)
    flags.add_argument("--output-tokens", type=int, default=48)
    flags.add_argument("--more-tokens", type=int, default=100)
    flags.add_argument("--rate-mbit", type=float, default=500.0)
    flags.add_argument("--delay-ms", type=float, default=20.0)
    flags.add_argument("--runs", type=int, default=5)
    given = flags.parse_args()
    model = str(ensure_model(given.model))
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            "transformers",
            model,
            given.dtype,
            given.rate_mbit,
            given.delay_ms,
            secrets.token_hex(16),
            Path(folder),
            {"PRFAAS_ENGINE_PREFIX_BYTES": "256M"},
        )
        with running(plan) as cluster:
            demo = Demo(parser().parse_args([]), Console(quiet=True), cluster)
            demo.settle()
            runs = [asyncio.run(one_run(cluster.router_url, demo.model, seed, given)) for seed in range(given.runs)]
    turns = ("first", "second", "second_without_cache")
    medians = {turn: {key: median(run[turn][key] for run in runs) for key in runs[0][turn]} for turn in turns}
    same = sum(run["same"]["tokens"] for run in runs)
    print(json.dumps({"medians": medians, "runs_with_the_same_tokens": same, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
