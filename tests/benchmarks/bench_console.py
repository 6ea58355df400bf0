"""What the console costs the router, and how smoothly it shows 200 nodes. By hand; needs Chromium.

    python -m tests.benchmarks.bench_console --json

One router and two emulated nodes serve 100 requests/s; 198 more nodes are heartbeats alone. Periods without a viewer
and with one (a real headless Chromium) take turns: CPU of the router's process, from /proc. In the page: the time
between two updates, and the longest gap between two frames. Chromium draws on the CPU here, on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import msgspec
from prfaas.common.config import ClusterConfig, PlannerConfig, RouterConfig
from prfaas.common.metrics import Metrics
from prfaas.services.commands.demo.cluster import Child
from prfaas.services.messages import Heartbeat, LoadMessage, to_json
from prfaas.services.router.console.state import Console
from prfaas.services.router.decision import make_policy
from prfaas.services.router.planning import Planning
from prfaas.services.router.timeline import Record, RequestFacts, RouterInstants, Timelines
from prfaas.services.web import Signer, signed_post
from yarl import URL

from tests.benchmarks.bench_decision import registry_of
from tests.benchmarks.bench_roles import usable
from tests.browser import Page, browser
from tests.e2e.conftest import free_ports

HERE = "127.0.0.1"
NODES, RATE_PER_S, BEAT_S = 200, 100.0, 2.0
FRAMES = """
new Promise((done) => { const gaps = [], news = []; let last = performance.now(), seen = lastAt;
  const end = last + %d;
  const frame = (now) => { gaps.push(now - last); last = now;
    if (lastAt !== seen) { if (seen) news.push(lastAt - seen); seen = lastAt; }
    if (now < end) requestAnimationFrame(frame);
    else done([Math.max(...gaps), gaps.length, Math.max(...news), news.length]); };
  requestAnimationFrame((now) => { last = now; requestAnimationFrame(frame); }); })
"""


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.secret = secrets.token_hex(16)
        ports = free_ports(3)
        self.url = f"http://{HERE}:{ports[0]}"
        env = {**os.environ, "PRFAAS_CLUSTER_SECRET": self.secret, "OMP_NUM_THREADS": "1"}
        start = [sys.executable, "-m", "prfaas.services"]
        router = ["router", "--bind", f"{HERE}:{ports[0]}", "--model", "bytes", "--log-level", "warning"]
        self.router = Child("router", [*start, *router], folder, env)
        self._children = [self.router]
        for i in (1, 2):
            node = ["decode", "--name", f"n{i}", "--bind", f"{HERE}:{ports[i]}", "--kv-bind", f"{HERE}:0"]
            node += ["--routers", self.url, "--engine", "emulated", "--engine-decode-step-s", "0.001"]
            self._children.append(Child(f"n{i}", [*start, *node, "--engine-arena-bytes", "64M"], folder, env))

    def cpu_s(self) -> float:
        """Of the router's process, user and system."""
        fields = Path(f"/proc/{self.router.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        for child in self._children:
            child.stop()
        for child in self._children:
            child.reap(time.monotonic() + 10)


async def beat(session: aiohttp.ClientSession, cluster: Cluster, like: Heartbeat) -> None:
    """198 nodes that drain, so that nothing is sent to them."""
    signer, url = Signer.of(cluster.secret.encode(), ClusterConfig()), URL(cluster.url) / "nodes" / "heartbeat"
    names = [f"{'prefill' if i % 2 else 'decode'}-{i:03}" for i in range(NODES - 2)]
    while True:
        began_s = time.monotonic()
        for i, name in enumerate(names):
            load = LoadMessage(i % 7, i * 100, i % 5, i * 50, (1 << 30) - (i + int(began_s)) % 100 * 10_000_000)
            role = name.partition("-")[0]
            changes = {"node": name, "role": role, "region": f"region-{i % 4}", "load": load, "draining": True}
            fields = {key: getattr(like, key) for key in like.__struct_fields__} | changes
            async with await signed_post(session, url, to_json(Heartbeat(**fields)), signer) as response:
                await response.read()
            await asyncio.sleep(max(0.0, began_s + BEAT_S * (i + 1) / len(names) - time.monotonic()))


async def load(session: aiohttp.ClientSession, url: str) -> None:
    """100 requests/s, evenly."""
    body = {"model": "emulated", "prompt": [65] * 30, "max_tokens": 2, "temperature": 0, "stream": True}
    tasks: set[asyncio.Task[None]] = set()

    async def one() -> None:
        async with session.post(url + "/v1/completions", json=body) as response:
            await response.read()

    due_s = time.monotonic()
    while True:
        task = asyncio.create_task(one())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        due_s += 1 / RATE_PER_S
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))


async def share_of_cpu(cluster: Cluster, seconds: float) -> float:
    """Of one core."""
    cpu_s, began_s = cluster.cpu_s(), time.monotonic()
    await asyncio.sleep(seconds)
    return (cluster.cpu_s() - cpu_s) / (time.monotonic() - began_s)


async def watched(cluster: Cluster, seconds: float, page: Page) -> tuple[float, list[float]]:
    await page.open(cluster.url + "/console")
    await page.until(f"document.querySelectorAll('#nodes tbody tr').length >= {NODES}")
    share, frames = await asyncio.gather(share_of_cpu(cluster, seconds), page.value(FRAMES % int(seconds * 1000)))
    await page.open("about:blank#away")
    return share, frames


async def measured(given: argparse.Namespace) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="bench-console-"))
    cluster = Cluster(folder)
    like = Heartbeat("n", "1", "home", "decode", "http://127.0.0.1:9", [], "emulated", "", "", 1 << 17, LoadMessage())
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
            browser(folder) as page,
            asyncio.timeout(600),
        ):
            await page.look()
            while await usable(session, cluster.url) != (0, 2):
                await asyncio.sleep(0.2)
            like = await learned(session, cluster, like)
            tasks = [asyncio.create_task(beat(session, cluster, like)), asyncio.create_task(load(session, cluster.url))]
            await asyncio.sleep(2 * BEAT_S)
            alone, seen = [], []
            for _ in range(given.periods):
                alone.append(await share_of_cpu(cluster, given.seconds))
                seen.append(await watched(cluster, given.seconds, page))
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
    finally:
        cluster.stop()
    differences = [with_ - without for (with_, _), without in zip(seen, alone, strict=True)]
    return {
        "nodes": NODES,
        "requests_per_s": RATE_PER_S,
        "router_cpu_alone": [round(each, 4) for each in alone],
        "router_cpu_watched": [round(each, 4) for each, _ in seen],
        "added_cpu_median": round(median(differences), 4),
        "state_made_in_ms": round(state_s() * 1e3, 3),
        "longest_frame_ms": [round(frames[0], 1) for _, frames in seen],
        "frames_per_s": [round(frames[1] / given.seconds, 1) for _, frames in seen],
        "longest_between_updates_ms": [round(frames[2]) for _, frames in seen],
    }


def state_s() -> float:
    """To make one state of 200 nodes, mean of many."""
    registry, timelines = registry_of(NODES, 100.0), Timelines(256)
    policy = make_policy(RouterConfig())
    planning = Planning(PlannerConfig(), "r", "r/1", registry, policy, Metrics().router)
    for i in range(256):
        facts = RequestFacts(f"{i:032}", "done", "offloaded", [], "p", "d", 1000, 10, "uncached=1000")
        timelines.add(Record(facts, RouterInstants(0.0, ended_s=1.0), None))
    console, cluster = Console("r", "0", registry, policy, planning, timelines), registry.snapshot(100.0)
    began_s = time.perf_counter()
    for _ in range(200):
        msgspec.json.encode(console.state(cluster, 1.0, 3, whole=False))
    return (time.perf_counter() - began_s) / 200


async def learned(session: aiohttp.ClientSession, cluster: Cluster, like: Heartbeat) -> Heartbeat:
    """A heartbeat of the cluster's model: what a node that fits must say, the router tells one that doesn't."""
    signer, url = Signer.of(cluster.secret.encode(), ClusterConfig()), URL(cluster.url) / "nodes" / "heartbeat"
    async with await signed_post(session, url, to_json(like), signer) as response:
        text = await response.text()
    fingerprint, layout = text.partition("here emulated, ")[2].partition(")")[0].split(", ")
    fields = {key: getattr(like, key) for key in like.__struct_fields__}
    return Heartbeat(**(fields | {"model_fingerprint": fingerprint, "layout_hash": layout}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--periods", type=int, default=5, help="without a viewer and with one, each")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each")
    parser.add_argument("--json", action="store_true", help="print one line")
    given = parser.parse_args()
    print(json.dumps(asyncio.run(measured(given)), indent=None if given.json else 2))


if __name__ == "__main__":
    main()
