"""The paper's case study with real queues: its three systems under the same requests.

Saturated throughput is that of a closed loop, always `CONCURRENCY` requests under way. It finds E[T(L)], the mean time,
where the paper's equations 3 to 5 put T(E[L]), the time of the mean length: prefill time grows faster than length, so
each system carries a little less than planned. Latencies are of open loops (Poisson), everything admitted: at a share
of each system's own saturated throughput, and of all three at one rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.scheduling.policies import ADMIT_ALL, AdaptiveThreshold, HomogeneousPd, OffloadAll, StaticThreshold
from prfaas.common.scheduling.types import AdmittingPolicy, ClusterSnapshot
from prfaas.loadgen.plan import case_paper as planned
from prfaas.loadgen.simulator.cluster import Cluster, Group
from prfaas.loadgen.simulator.columns import Load, Outcome
from prfaas.loadgen.simulator.measures import Interval, interval, latencies, saturated_throughput
from prfaas.loadgen.simulator.simulation import Simulation
from prfaas.loadgen.workloads.lengths import PAPER_INPUT_LENGTHS, PAPER_OUTPUT_LENGTHS
from prfaas.loadgen.workloads.rngs import Rngs

SYSTEMS = ("prfaas", "homogeneous", "naive")
HOME, AWAY = "pd", "prfaas"
RTT_S = 0.02
"""Between the regions; the paper doesn't say. Some 2,000 km of fibre, there and back."""
CONCURRENCY = 200
"""Requests under way when saturated: about 60 s of work for the best system, 20 for each prefill node."""
OWN_SHARE = 0.8
COMMON_SHARE = 0.9
DEFAULT_SEEDS = 10
DEFAULT_REQUESTS = 5000


@dataclass(frozen=True, slots=True)
class System:
    """policy: makes a new one a run, since it may hold state."""

    cluster: Cluster
    policy: Callable[[], AdmittingPolicy]


def systems() -> dict[str, System]:
    """The three of Table 6, as `plan --case paper` plans them, and ours with its threshold held fast."""
    made = {}
    for name, system in planned.systems().items():
        groups = [Group(HOME, "prefill", system.home.profile, system.plan.n_prefill)]
        groups += [Group(HOME, "decode", system.home.profile, system.plan.n_decode)]
        links = {}
        for pool in system.offload:
            groups.append(Group(AWAY, "prefill", pool.profile, pool.nodes))
            links[AWAY, HOME] = LinkProfile(pool.link.bandwidth_bytes_per_s, RTT_S)
        cluster = Cluster(groups, links)
        made[name] = System(cluster, _policy(name, system.plan.threshold_tokens))
        if name == "prfaas":
            made["prfaas_static"] = System(cluster, _policy("prfaas_static", system.plan.threshold_tokens))
    return made


def _policy(name: str, threshold_tokens: float) -> Callable[[], AdmittingPolicy]:
    if name == "prfaas":
        return lambda: AdaptiveThreshold(ADMIT_ALL, planned_tokens=threshold_tokens)
    if name == "prfaas_static":
        return lambda: StaticThreshold(ADMIT_ALL, threshold_tokens=threshold_tokens)
    return lambda: HomogeneousPd(ADMIT_ALL) if name == "homogeneous" else OffloadAll(ADMIT_ALL)


def load(seed: int, requests: int, rate_per_s: float) -> Load:
    """The same requests and the same gaps, stretched by the rate, for every system with this seed."""
    rngs = Rngs.from_seed(seed)
    gaps = rngs.arrivals.exponential(1.0, requests)
    return Load(
        np.cumsum(gaps) / rate_per_s,
        PAPER_INPUT_LENGTHS.sample(requests, rngs.input_lengths),
        PAPER_OUTPUT_LENGTHS.sample(requests, rngs.output_lengths),
    )


def run(system: System, requests: Load, concurrency: int = 0) -> Outcome:
    """One run; an adaptive policy is given a tick a second."""
    policy = system.policy()
    adapt: Callable[[float, ClusterSnapshot], None] | None = getattr(policy, "adapt", None)
    return Simulation(system.cluster, requests, policy, concurrency=concurrency, on_tick=adapt).run()


def report(seeds: int = DEFAULT_SEEDS, requests: int = DEFAULT_REQUESTS) -> dict[str, Any]:
    """Keys: the systems, each {planned_lambda_max, lambda_max, at_own_0.8, at_homogeneous_0.9}; ratio_homogeneous,
    ratio_naive, ttft_reduction; each figure with its 95 % confidence interval over seeds."""
    return list(reports(seeds, requests))[-1]


def reports(seeds: int, requests: int) -> Iterator[dict[str, Any]]:
    """The same after each system's share of the work, the last one complete: for a line of progress."""
    made = systems()
    own: dict[str, list[float]] = {name: [] for name in made}
    for name, system in made.items():
        for seed in range(seeds):
            own[name].append(saturated_throughput(run(system, load(seed, requests, 1.0), CONCURRENCY)))
        yield {"done": f"{name}, saturated"}
    common = COMMON_SHARE * interval(own["homogeneous"]).mean
    result: dict[str, Any] = {"seeds": seeds, "requests": requests, "concurrency": CONCURRENCY, "rtt_s": RTT_S}
    plans = {name: system.plan.lambda_max for name, system in planned.systems().items()}
    means: dict[str, list[float]] = {}
    for name, system in made.items():
        rate = OWN_SHARE * interval(own[name]).mean
        at_own = [latencies(run(system, load(seed, requests, rate))) for seed in range(seeds)]
        at_common = [latencies(run(system, load(seed, requests, common))) for seed in range(seeds)]
        means[name] = [each["ttft_mean_s"] for each in at_common]
        result[name] = {
            "planned_lambda_max": plans[name.removesuffix("_static")],
            "lambda_max": interval(own[name]).as_dict(),
            f"at_own_{OWN_SHARE}": {"rate_per_s": rate, **_over_seeds(at_own)},
            f"at_homogeneous_{COMMON_SHARE}": {"rate_per_s": common, **_over_seeds(at_common)},
        }
        yield {"done": f"{name}, open loops"}
    for other in SYSTEMS[1:]:
        result[f"ratio_{other}"] = _paired(own["prfaas"], own[other]).as_dict()
        result[f"ratio_static_{other}"] = _paired(own["prfaas_static"], own[other]).as_dict()
    reduced = [1 - a / b for a, b in zip(means["prfaas"], means["homogeneous"], strict=True)]
    result["ttft_reduction"] = interval(reduced).as_dict()
    result["objective"] = "TTFT <= max(10 s, 2 x bare prefill of the pool that serves), TPOT <= 27.5 ms"
    yield result


def _paired(ours: list[float], theirs: list[float]) -> Interval:
    """The ratio seed by seed: the same requests were given to both."""
    return interval([a / b for a, b in zip(ours, theirs, strict=True)])


def _over_seeds(each: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {key: interval([run[key] for run in each]).as_dict() for key in each[0]}


def as_text(made: dict[str, Any]) -> str:
    """A table for people."""
    counts = f"{made['seeds']} seeds of {made['requests']} requests"
    lines = [f"the paper's case study, simulated: {counts}, 95 % intervals", ""]
    names = [name for name in made if isinstance(made[name], dict) and "lambda_max" in made[name]]
    lines.append(f"{'':34}" + "".join(f"{name:>22}" for name in names))
    lines.append(_row("planned Λ_max, requests/s", [f"{made[name]['planned_lambda_max']:.2f}" for name in names]))
    lines.append(_row("saturated, requests/s", [_cell(made[name]["lambda_max"]) for name in names]))
    for key in (f"at_own_{OWN_SHARE}", f"at_homogeneous_{COMMON_SHARE}"):
        lines += ["", _row(f"{key}: rate, requests/s", [f"{made[name][key]['rate_per_s']:.2f}" for name in names])]
        for figure in made[names[0]][key]:
            if figure != "rate_per_s":
                lines.append(_row("  " + figure, [_cell(made[name][key][figure]) for name in names]))
    lines.append("")
    for key in ("ratio_homogeneous", "ratio_naive", "ratio_static_homogeneous", "ratio_static_naive", "ttft_reduction"):
        lines.append(f"{key:34}{_cell(made[key])}")
    return "\n".join([*lines, "", f"good: {made['objective']}"])


def _row(title: str, cells: list[str]) -> str:
    return f"{title:34}" + "".join(f"{cell:>22}" for cell in cells)


def _cell(value: dict[str, float]) -> str:
    half = (value["ci95_high"] - value["ci95_low"]) / 2
    digits = 4 if abs(value["mean"]) < 0.1 else 3
    # Adding 0 makes of what rounds to −0 a plain one.
    return f"{round(value['mean'], digits) + 0.0:.{digits}f} ± {half:.{digits}f}"
