"""Nodes that change their role under an open load: what is lost, and which answers are later than the SLO.

    python -m tests.benchmarks.bench_roles --json
    python -m tests.benchmarks.bench_roles --mode threshold     # the same load, nodes keep their roles

One router and six emulated nodes of one region. First long prompts come, for which one prefill node is too few; then
long answers, for which the decode nodes that are left are. Arrivals are Poisson and the same for every mode. The router
refuses what it predicts to be late (429: a violation that was predicted); of what it takes, answers whose first token
was later than the SLO are the ones that were not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from prfaas.services.commands.demo.cluster import Child
from prfaas.services.engine.emulated.output import OutputTokens

from tests.e2e.conftest import free_ports

HERE = "127.0.0.1"
ENGINE = ["--engine", "emulated", "--engine-prefill-tokens-per-s", "5000", "--engine-decode-step-s", "0.02"]
ENGINE += ["--engine-max-batch", "8", "--engine-arena-bytes", "64M", "--engine-prefix-bytes", "0"]
ENGINE += ["--node-heartbeat-s", "0.5"]
PLANNER = {"period-s": "2", "cool-down-s": "6", "demand-s": "20", "min-requests": "40", "switch-s": "2"}
PLANNER |= {"lease-s": "4", "busy-queue-s": "0.5", "horizon-s": "60"}
NODES = 6
LONG_PROMPTS, LONG_ANSWERS = (1000, 8), (50, 100)
"""Tokens of prompt and output: a prefill node computes 5 of the first a second, a decode node makes 4 of the second."""


@dataclass(frozen=True, slots=True)
class Answer:
    """at_s: of its arrival, since the start. ttft_s: None: refused."""

    at_s: float
    phase: str
    status: int
    ttft_s: float | None
    predicted_s: float | None
    right: bool


class Cluster:
    """One prefill node, the rest decode, and a router that plans."""

    def __init__(self, mode: str, slo_s: float, folder: Path) -> None:
        secret = folder / "secret"
        secret.write_text(secrets.token_hex(16))
        ports = free_ports(1 + NODES)
        self.url = f"http://{HERE}:{ports[0]}"
        env = {k: v for k, v in os.environ.items() if not k.startswith("PRFAAS_")} | {"OMP_NUM_THREADS": "1"}
        planner = [word for key, value in PLANNER.items() for word in (f"--planner-{key}", value)]
        router = ["router", "--bind", f"{HERE}:{ports[0]}", "--model", "bytes", "--planner-mode", mode, *planner]
        commands = {"router": [*router, "--router-slo-ttft-s", str(slo_s)]}
        for i in range(NODES):
            role = "decode" if i else "prefill"
            bind = ["--bind", f"{HERE}:{ports[1 + i]}", "--kv-bind", f"{HERE}:0", "--routers", self.url]
            commands[f"n{i}"] = [role, "--name", f"n{i}", "--region", "home", *bind, *ENGINE]
        start = [sys.executable, "-m", "prfaas.services"]
        self._children = [
            Child(name, [*start, *command, "--secret-file", str(secret)], folder, env)
            for name, command in commands.items()
        ]

    def stop(self) -> None:
        for child in self._children:
            child.stop()
        for child in self._children:
            child.reap(time.monotonic() + 10)


@asynccontextmanager
async def running(mode: str, slo_s: float, session: aiohttp.ClientSession) -> AsyncIterator[Cluster]:
    cluster = Cluster(mode, slo_s, Path(tempfile.mkdtemp(prefix="bench-roles-")))
    try:
        async with asyncio.timeout(60):
            while await usable(session, cluster.url) != (1, NODES - 1):
                await asyncio.sleep(0.2)
        # Nodes grant the lease after its time, and the router cools down.
        await asyncio.sleep(float(PLANNER["cool-down-s"]))
        yield cluster
    finally:
        cluster.stop()


async def usable(session: aiohttp.ClientSession, url: str) -> tuple[int, int]:
    """Prefill and decode nodes."""
    try:
        async with session.get(url + "/metrics") as response:
            text = await response.text()
    except aiohttp.ClientError:
        return 0, 0
    found = dict(re.findall(r'prfaas_router_nodes\{role="(\w+)",state="usable"\} (\d+)', text))
    return int(found.get("prefill", 0)), int(found.get("decode", 0))


class Load:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self._began_s = time.monotonic()
        self.answers: list[Answer] = []

    async def phase(self, name: str, kind: tuple[int, int], rate_per_s: float, seconds: float, seed: int) -> None:
        """Poisson arrivals; returns when the last answer is there."""
        rng = random.Random(seed)
        tasks, due_s = [], time.monotonic()
        until_s = due_s + seconds
        while due_s < until_s:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            prompt = [rng.randrange(32, 127) for _ in range(kind[0])]
            tasks.append(asyncio.create_task(self._ask(name, prompt, kind[1], due_s)))
            due_s += rng.expovariate(rate_per_s)
        await asyncio.gather(*tasks)

    async def _ask(self, phase: str, prompt: list[int], output: int, due_s: float) -> None:
        body = {"model": "emulated", "prompt": prompt, "max_tokens": output, "temperature": 0, "stream": True}
        text, ttft_s, predicted_s = "", None, None
        async with self._session.post(self._url + "/v1/completions", json=body) as response:
            if response.status == 200:
                found = re.search(r"ttft=([0-9.]+)s", response.headers["x-prfaas-decision"])
                predicted_s = float(found[1]) if found else None
            async for line in response.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    if "choices" not in chunk:
                        break
                    ttft_s = ttft_s or time.monotonic() - due_s
                    text += chunk["choices"][0]["text"]
        expected = OutputTokens(prompt, None)
        right = text == bytes(expected.token(i) for i in range(output)).decode()
        at_s = due_s - self._began_s
        self.answers.append(Answer(at_s, phase, response.status, ttft_s, predicted_s, right))


def figures(answers: list[Answer], slo_s: float) -> dict[str, Any]:
    """Of one phase, or of a part of it."""
    served = [answer for answer in answers if answer.status == 200]
    late = [answer for answer in served if answer.ttft_s is None or answer.ttft_s > slo_s]
    wrong = [answer for answer in served if not answer.right]
    ratios = sorted(a.ttft_s / a.predicted_s for a in served if a.ttft_s and a.predicted_s)
    return {
        "requests": len(answers),
        "refused": sum(answer.status == 429 for answer in answers),
        "lost": len(wrong) + sum(answer.status not in (200, 429) for answer in answers),
        "late_unpredicted": len(late),
        "latest_s": round(max((a.ttft_s or 0.0 for a in served), default=0.0), 3),
        "ttft_by_predicted_median": round(ratios[len(ratios) // 2], 3) if ratios else None,
    }


async def measured(given: argparse.Namespace) -> dict[str, Any]:
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session,
        running(given.mode, given.slo, session) as cluster,
    ):
        load, result = Load(session, cluster.url), {"mode": given.mode, "slo_s": given.slo}
        phases = (("prompts", LONG_PROMPTS, given.prompt_rate), ("answers", LONG_ANSWERS, given.answer_rate))
        for seed, (name, kind, rate) in enumerate(phases):
            began_s = time.monotonic() - load._began_s
            await load.phase(name, kind, rate, given.seconds, seed)
            own = [answer for answer in load.answers if answer.phase == name]
            halves = (
                [a for a in own if a.at_s < began_s + given.seconds / 2],
                [a for a in own if a.at_s >= began_s + given.seconds / 2],
            )
            result[name] = {
                "first_half": figures(halves[0], given.slo),
                "second_half": figures(halves[1], given.slo),
                "nodes_after": await usable(session, cluster.url),
            }
        async with session.get(cluster.url + "/plan") as response:
            history = (await response.json())["history"]
        result["conversions"] = [past["why"].split(":  ")[0] for past in history if past["to_prefill"]]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("convert", "threshold"), default="convert", help="planner.mode")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each phase")
    parser.add_argument("--slo", type=float, default=2.0, help="time to the first token, s")
    parser.add_argument("--prompt-rate", type=float, default=12.0, help="long prompts a second")
    parser.add_argument("--answer-rate", type=float, default=14.0, help="long answers a second")
    parser.add_argument("--json", action="store_true", help="print one line")
    given = parser.parse_args()
    print(json.dumps(asyncio.run(measured(given)), indent=None if given.json else 2))


if __name__ == "__main__":
    main()
