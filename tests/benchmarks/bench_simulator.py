"""A million requests on 1,250 instances in three regions: how long, how much memory. And one decision of a policy.

python -m tests.benchmarks.bench_simulator [requests] [--check]

--check: exit status 1 where the run takes more than 120 s of CPU or 2 GiB of memory, which is what a million requests
may take.
"""

import argparse
import resource
import sys
import time
import timeit

import numpy as np
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.perfmodel.profiles import shipped
from prfaas.common.scheduling.policies import AdaptiveThreshold, HomogeneousPd, OffloadAll, RoundRobin, StaticThreshold
from prfaas.common.scheduling.types import RequestSnapshot
from prfaas.loadgen.simulator.cluster import Cluster, Group
from prfaas.loadgen.simulator.columns import Load
from prfaas.loadgen.simulator.measures import latencies
from prfaas.loadgen.simulator.simulation import Simulation
from prfaas.loadgen.workloads.lengths import PAPER_INPUT_LENGTHS
from prfaas.loadgen.workloads.rngs import Rngs

RATE = 280.0
HOMES = ("east", "west")
REQUESTS = 1_000_000
MAX_CPU_S = 120.0
MAX_RSS_MIB = 2048.0


def cluster() -> Cluster:
    """400 H200 and 2 × (160 + 265) H20 instances."""
    h200, h20 = shipped("paper-h200"), shipped("paper-h20")
    groups = [Group("prfaas", "prefill", h200, 400)]
    for home in HOMES:
        groups += [Group(home, "prefill", h20, 160), Group(home, "decode", h20, 265)]
    return Cluster(groups, {("prfaas", home): LinkProfile.of_gbps(6000, 0.02) for home in HOMES})


def simulate(requests: int) -> tuple[float, float]:
    """CPU seconds of the run, and the most MiB that this process has held."""
    rngs = Rngs.from_seed(1)
    load = Load(
        np.cumsum(rngs.arrivals.exponential(1 / RATE, requests)),
        PAPER_INPUT_LENGTHS.sample(requests, rngs.input_lengths),
        np.full(requests, 1024),
        rngs.prefix_choice.integers(1, 1 + len(HOMES), requests).astype(np.int32),
    )
    policy = AdaptiveThreshold(planned_tokens=19_400)
    began, wall = time.process_time(), time.perf_counter()
    made = Simulation(cluster(), load, policy, on_tick=policy.adapt).run()
    used, passed = time.process_time() - began, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{requests} requests, 1250 instances: {used:.1f} s of CPU, {passed:.1f} s wall, {peak:.0f} MiB at most")
    print({key: round(value, 4) for key, value in latencies(made).items()})
    return used, peak


def decide() -> None:
    snapshot = cluster().snapshot()
    rng = np.random.default_rng(0)
    snapshot.prefill_free_at_s[:] = rng.uniform(0, 5, len(snapshot.names))
    snapshot.inflight_requests[:] = rng.integers(0, 20, len(snapshot.names))
    ask = RequestSnapshot("r", 20_000, 1024, 20_000, home_region=1)
    for kind in (AdaptiveThreshold, StaticThreshold, HomogeneousPd, OffloadAll, RoundRobin):
        policy = kind()
        best = min(timeit.repeat(lambda policy=policy: policy(ask, snapshot), number=2000, repeat=5)) / 2000
        print(f"{kind.__name__:20} {best * 1e6:6.1f} µs a decision, {len(snapshot.names)} nodes")


def exceeded(cpu_s: float, rss_mib: float) -> list[str]:
    """A line for each limit that isn't kept."""
    limits = (("s of CPU", cpu_s, MAX_CPU_S), ("MiB", rss_mib, MAX_RSS_MIB))
    return [f"{value:.1f} {unit}; at most {most:g} are allowed" for unit, value, most in limits if value > most]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", nargs="?", type=int, default=REQUESTS)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.requests < 1:
        parser.error(f"requests: {options.requests} must be 1 or above")
    decide()
    problems = exceeded(*simulate(options.requests))
    for problem in problems if options.check else ():
        print(problem, file=sys.stderr)
    return 1 if options.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
