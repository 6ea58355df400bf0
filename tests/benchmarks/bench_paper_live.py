"""The paper's case study through the real services, beside the simulator. By hand, as root, from the repository's root:

    python -m tests.benchmarks.bench_paper_live --requests 300 --json
    python -m tests.benchmarks.bench_paper_live --systems prfaas --skip open

Twelve emulated nodes and a router as processes of their own: home on one host of an emulated WAN, the prefill region on
the other. So that two cores can carry it, time runs slower and KV is smaller, the link in proportion to both; the
output has 128 tokens and a decode step takes 200 ms instead of 1,024 and 25, which is the same throughput of decode.
The simulator gets the same, the slower times and the smaller bytes included, since the policies' own times (how long
a queue is long) are not scaled; what is printed of both is divided by the time scale. Throughput is that of a closed
loop, over the requests that end between a fifth and four fifths of all; latencies are of an open loop at a share of
what the simulator says each system carries.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from prfaas.common.perfmodel.curves import Curve, Surface
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.perfmodel.profiles import NodeProfile, save
from prfaas.loadgen.client.endpoint import Endpoint
from prfaas.loadgen.client.live import run_live
from prfaas.loadgen.records import Records
from prfaas.loadgen.simulator import case_paper
from prfaas.loadgen.simulator.case_paper import HOME, System
from prfaas.loadgen.simulator.cluster import Cluster
from prfaas.loadgen.simulator.columns import Load, Outcome
from prfaas.loadgen.simulator.measures import latencies, saturated_throughput
from prfaas.loadgen.workloads.prefixes import NO_GROUP, StreamPrefixes
from prfaas.loadgen.workloads.prompts import TokenPrompts
from prfaas.loadgen.workloads.workload import Workload
from prfaas.services.commands.demo.cluster import Child

from tests.wan_link import WanLink, missing, wan_link

OUTPUT_TOKENS, STEP_S = 128, 0.2
LINK_BITS_PER_S = 100e9
ROUTER_PORT, FIRST_PORT = 8000, 8100
READY_TIMEOUT_S = 120.0
VOCABULARY = 256
"""Of the emulated engine's prompts: bytes."""
ARENA_BYTES = 256 << 20
POLICIES = {"prfaas": "adaptive", "homogeneous": "homogeneous", "naive": "offload-all"}
TOLERANCE = 0.10
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much slower and smaller the live cluster is."""

    time: float
    bytes: float


# -- the two sides ----------------------------------------------------------------------------------------------------


def short_output(system: System) -> System:
    """The same system with 128 tokens of output at 200 ms a step."""
    groups = [replace(group, profile=_slow_steps(group.profile)) for group in system.cluster.groups]
    return System(Cluster(groups, system.cluster.links), system.policy)


def scaled(system: System, scale: Scale) -> System:
    """As the live cluster is, for the simulator."""
    groups = [replace(group, profile=_scaled(group.profile, scale)) for group in system.cluster.groups]
    links = {
        pair: LinkProfile(link.bandwidth_bytes_per_s * scale.bytes / scale.time, link.rtt_s * scale.time)
        for pair, link in system.cluster.links.items()
    }
    return System(Cluster(groups, links), system.policy)


def _scaled(profile: NodeProfile, scale: Scale) -> NodeProfile:
    def curve(given: Curve, factor: float) -> Curve:
        return replace(given, values=tuple(value * factor for value in given.values))

    steps = profile.decode_step_s
    return replace(
        profile,
        prefill_s=curve(profile.prefill_s, scale.time),
        kv_bytes=curve(profile.kv_bytes, scale.bytes),
        decode_step_s=None
        if steps is None
        else replace(steps, values=tuple(tuple(value * scale.time for value in row) for row in steps.values)),
    )


def _slow_steps(profile: NodeProfile) -> NodeProfile:
    if profile.decode_step_s is None:
        return profile
    return replace(profile, decode_step_s=Surface((float(profile.max_batch),), (0.0,), ((STEP_S,),)))


def requests(seed: int, count: int, rate_per_s: float) -> Load:
    drawn = case_paper.load(seed, count, rate_per_s)
    return Load(drawn.arrival_s, drawn.prompt_tokens, np.full(count, OUTPUT_TOKENS, np.int64))


def workload(load: Load, scale: Scale, concurrency: int | None, seed: int) -> Workload:
    """The same requests for the live client, on its slower clock; a closed loop where there is a concurrency."""
    n = load.prompt_tokens.size
    alone = np.arange(n)
    return Workload(
        name="paper",
        arrival_s=np.full(n, np.nan) if concurrency else load.arrival_s * scale.time,
        prompt_tokens=load.prompt_tokens.copy(),
        output_tokens=load.output_tokens.copy(),
        conversation=alone,
        turn=np.zeros(n, np.int32),
        think_s=np.zeros(n),
        prefixes=StreamPrefixes(
            block_tokens=64,
            group_tokens=np.zeros(0, np.int64),
            group=np.full(n, NO_GROUP, np.int32),
            own=alone,
            own_tokens=load.prompt_tokens.copy(),
            new_tokens=load.prompt_tokens.copy(),
            output_tokens=load.output_tokens.copy(),
        ),
        content_seed=seed,
        max_concurrency=concurrency,
    )


class Services:
    """One system's processes."""

    def __init__(self, link: WanLink, name: str, system: System, scale: Scale, folder: Path) -> None:
        self._link = link
        self._scale = scale
        self._folder = folder
        self._children: list[Child] = []
        self._ports: list[tuple[str, int]] = [(link.near.address, ROUTER_PORT)]
        self._env = {**os.environ, "PRFAAS_CLUSTER_SECRET": secrets.token_hex(16), "OMP_NUM_THREADS": "1"}
        policy = system.policy()
        threshold = getattr(policy, "planned_tokens", 0.0)
        self._spawn(
            "router",
            link.near.address,
            "router",
            *("--bind", f"{link.near.address}:{ROUTER_PORT}", "--model", "bytes"),
            *("--router-policy", POLICIES[name], "--threshold", str(round(threshold))),
            *("--router-request-timeout-s", "7200", "--planner-mode", "off"),
        )
        for group in system.cluster.groups:
            for i in range(group.nodes):
                self._node(group.region, group.role, group.profile, i)

    @property
    def url(self) -> str:
        return f"http://{self._link.near.address}:{ROUTER_PORT}"

    def wait_ready(self) -> None:
        until_s = time.monotonic() + READY_TIMEOUT_S
        while not all(_answers(*at) for at in self._ports):
            for child in self._children:
                child.check()
            if time.monotonic() > until_s:
                raise SystemExit(f"not all processes got ready in {READY_TIMEOUT_S:g} s; logs are in {self._folder}")
            time.sleep(0.2)

    def stop(self) -> None:
        for child in self._children:
            child.stop()
        until_s = time.monotonic() + 5.0
        for child in self._children:
            child.reap(until_s)

    def _node(self, region: str, role: str, profile: NodeProfile, i: int) -> None:
        host = self._link.near.address if region == HOME else self._link.far.address
        port = FIRST_PORT + len(self._ports)
        path = self._folder / f"{profile.name}.json"
        save(profile, path)
        self._ports.append((host, port))
        self._spawn(
            f"{region}-{role}-{i}",
            host,
            role,
            *("--name", f"{region}-{role}-{i}", "--region", region, "--routers", self.url),
            *("--bind", f"{host}:{port}", "--kv-bind", f"{host}:0"),
            *("--engine", "emulated", "--profile", str(path), "--engine-prefix-bytes", "0"),
            *("--time-scale", f"{self._scale.time:g}", "--bytes-scale", f"{self._scale.bytes:g}"),
            *("--engine-arena-bytes", str(ARENA_BYTES), "--engine-max-prefills", "1"),
            # A saturated cluster whose time runs slower keeps requests in its queues for minutes.
            *("--transport-ticket-s", "3600"),
        )

    def _spawn(self, name: str, address: str, *command: str) -> None:
        host = self._link.near if address == self._link.near.address else self._link.far
        full = host.command(sys.executable, "-m", "prfaas.services", *command)
        self._children.append(Child(name, full, self._folder, self._env))


def _answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=2.0)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def services(link: WanLink, name: str, system: System, scale: Scale) -> Iterator[Services]:
    made = Services(link, name, system, scale, Path(tempfile.mkdtemp(prefix=f"paper-live-{name}-")))
    try:
        made.wait_ready()
        yield made
    finally:
        made.stop()


def run_client(running: Services, given: Workload, timeout_s: float) -> Records:
    import uvloop

    endpoint = Endpoint(running.url, "completions", "", TokenPrompts(given.content_seed, VOCABULARY), ignore_eos=True)
    live = uvloop.run(run_live(given, endpoint, timeout_s=timeout_s, quiet=False))
    if live.records is None or not live.records.ok.all():
        raise SystemExit(f"not every request was answered: {live.errors}")
    for warning in live.health.warnings:
        print(f"bench_paper_live: {warning}", file=sys.stderr)
    return live.records


# -- figures ----------------------------------------------------------------------------------------------------------


def live_throughput(records: Records, scale: Scale) -> float:
    """As `saturated_throughput`, on the simulator's clock."""
    ends = np.sort(records.end_s)
    first, last = int(ends.size * 0.2), int(ends.size * 0.8) - 1
    return float((last - first) / (ends[last] - ends[first])) * scale.time


def live_latencies(records: Records, scale: Scale) -> Figures:
    """Over the requests that `latencies` looks at."""
    later = np.argsort(records.index)[int(records.index.size * 0.1) :]
    ttft = (records.first_token_s - records.scheduled_s)[later] / scale.time
    parts = {name: float(np.nanmean(getattr(records, name)[later])) / scale.time for name in PARTS}
    return {
        "ttft_mean_s": float(ttft.mean()),
        "ttft_p50_s": float(np.quantile(ttft, 0.5)),
        "ttft_p90_s": float(np.quantile(ttft, 0.9)),
        "share_offloaded": float((records.offloaded[later] == 1).mean()),
        **parts,
    }


PARTS = ("router_s", "queue_s", "prefill_s", "exposed_s", "first_step_s")


def simulated_throughput(system: System, load: Load, concurrency: int, scale: Scale) -> float:
    return saturated_throughput(case_paper.run(scaled(system, scale), load, concurrency)) * scale.time


def saturated(running: Services, system: System, options: argparse.Namespace, scale: Scale) -> Figures:
    load = requests(options.seed, options.requests, 1.0)
    expected = simulated_throughput(system, load, options.concurrency, scale)
    given = workload(load, scale, options.concurrency, options.seed)
    got = live_throughput(run_client(running, given, options.timeout_s), scale)
    return {"simulated": round(expected, 4), "live": round(got, 4), "live_by_simulated": round(got / expected, 4)}


def open_loop(running: Services, system: System, rate: float, options: argparse.Namespace, scale: Scale) -> Figures:
    load = requests(options.seed + 1, options.requests, rate)
    slow = Load(load.arrival_s * scale.time, load.prompt_tokens, load.output_tokens)
    outcome: Outcome = case_paper.run(scaled(system, scale), slow)
    shares = ("share_offloaded", "share_good", "share_refused")
    expected = {key: value if key in shares else value / scale.time for key, value in latencies(outcome).items()}
    got = live_latencies(run_client(running, workload(load, scale, None, options.seed + 1), options.timeout_s), scale)
    return {
        "rate_per_s": round(rate, 4),
        "simulated": {key: round(value, 4) for key, value in expected.items()},
        "live": {key: round(value, 4) for key, value in got.items()},
        "ttft_live_by_simulated": round(got["ttft_mean_s"] / expected["ttft_mean_s"], 4),
    }


def measure(options: argparse.Namespace) -> Figures:
    scale = Scale(options.time_scale, options.bytes_scale)
    all_systems = {name: short_output(system) for name, system in case_paper.systems().items() if name in POLICIES}
    made: Figures = {"time_scale": scale.time, "bytes_scale": scale.bytes, "requests": options.requests}
    made["concurrency"] = options.concurrency
    rate = LINK_BITS_PER_S * scale.bytes / scale.time
    with wan_link(rate_bits_per_s=rate, rtt_s=case_paper.RTT_S * scale.time) as link:
        link.near.enter()
        for name in options.systems:
            system, figures = all_systems[name], made.setdefault(name, {})
            load = requests(options.seed, options.requests, 1.0)
            own = simulated_throughput(system, load, options.concurrency, scale)
            with services(link, name, system, scale) as running:
                if "saturated" not in options.skip:
                    figures["saturated"] = saturated(running, system, options, scale)
                    print(json.dumps({name: figures["saturated"]}), file=sys.stderr, flush=True)
                if "open" not in options.skip:
                    figures["open"] = open_loop(running, system, options.share * own, options, scale)
                    print(json.dumps({name: figures["open"]}), file=sys.stderr, flush=True)
    made["ratios"] = ratios(made)
    return made


def ratios(made: Figures) -> Figures:
    """Of the saturated throughputs, ours to each other system's, live and simulated."""
    found = {}
    for other in ("homogeneous", "naive"):
        if "saturated" in made.get("prfaas", {}) and "saturated" in made.get(other, {}):
            ours, theirs = made["prfaas"]["saturated"], made[other]["saturated"]
            live, simulated = (ours[side] / theirs[side] for side in ("live", "simulated"))
            found[other] = {"live": round(live, 4), "simulated": round(simulated, 4)}
    return found


def verdicts(made: Figures) -> dict[str, bool]:
    """What must be within a tenth of the simulator."""
    pairs = {}
    for name in POLICIES:
        figures = made.get(name, {})
        if "saturated" in figures:
            pairs[f"{name}.throughput"] = figures["saturated"]["live_by_simulated"]
        if "open" in figures:
            pairs[f"{name}.ttft_mean"] = figures["open"]["ttft_live_by_simulated"]
    for other, sides in made["ratios"].items():
        pairs[f"ratio_{other}"] = sides["live"] / sides["simulated"]
    return {key: abs(value - 1) <= TOLERANCE for key, value in pairs.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=tuple(POLICIES), default=list(POLICIES))
    parser.add_argument("--skip", nargs="*", choices=("saturated", "open"), default=[])
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--concurrency", type=int, default=130)
    parser.add_argument("--share", type=float, default=0.8, help="of the simulated throughput, in the open loop")
    parser.add_argument("--time-scale", type=float, default=5.0)
    parser.add_argument("--bytes-scale", type=float, default=0.002)
    parser.add_argument("--timeout-s", type=float, default=7200.0, help="of one request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if (why := missing()) is not None:
        raise SystemExit(f"bench_paper_live {why}")
    made = measure(options)
    made["within_a_tenth"] = verdicts(made)
    print(json.dumps(made, indent=None if options.json else 1))
    return 0 if all(made["within_a_tenth"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
