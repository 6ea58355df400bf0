"""The paper's case study (Table 6), planned with its own arithmetic, each figure beside the paper's.

32 H200 in the prefill region, 64 H20 in the home region, 100 Gbps between them; log-normal lengths; 1,024 output tokens
at 40 tokens/s. Homogeneous: 96 H20. Naive: all prefill is offloaded, all H20 decode. The H200 profile is measured, the
H20's is fitted to Table 6 itself: what depends on it shows that the arithmetic is the paper's, it predicts nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from prfaas.common.perfmodel.lengths import TruncatedLogNormal
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.perfmodel.profiles import NodeProfile, shipped
from prfaas.common.scheduling.planner import PAPER, Demand, HomePool, OffloadPool, Plan, plan
from prfaas.loadgen.plan.inputs import Inputs, Prices

DEMAND = Demand(TruncatedLogNormal(9.90, 1.00, 128, 131072), output_tokens=1024)
LINK = LinkProfile.of_gbps(100)
SYSTEMS = ("prfaas", "homogeneous", "naive")
FIGURES = (
    "threshold",
    "n_prfaas",
    "n_p",
    "n_d",
    "lambda_max",
    "theta_prfaas",
    "theta_pd_p",
    "theta_pd_d",
    "egress_gbps",
)

# Table 6; None: the paper gives no figure.
TABLE_6: dict[str, dict[str, float | None]] = {
    "prfaas": dict(zip(FIGURES, (19400, 4, 3, 5, 3.24, 1.61, 1.64, 3.91, 13.0), strict=True)),
    "homogeneous": dict(zip(FIGURES, (None, None, 9, 3, 2.11, None, 2.11, 2.35, None), strict=True)),
    "naive": dict(zip(FIGURES, (None, 4, None, 8, 2.45, 2.45, None, 6.25, None), strict=True)),
}
TABLE_6_RATIOS = {"ratio_homogeneous": 1.54, "ratio_naive": 3.24 / 2.45}
TABLE_6_TTFT_S = {"prfaas": (2.22, 3.51), "homogeneous": (4.44, 9.73), "naive": (1.74, 3.51)}
_QUANTILES = 2048


@dataclass(frozen=True, slots=True)
class System:
    """One column of Table 6: pools, and the plan for them."""

    home: HomePool
    offload: tuple[OffloadPool, ...]
    plan: Plan


def systems() -> dict[str, System]:
    """By name, in the order of Table 6."""
    h20, h200 = shipped("paper-h20"), shipped("paper-h200")
    region = (OffloadPool(h200, 4, LINK),)
    shared, alone = HomePool(h20, 8), HomePool(h20, 12)
    return {
        "prfaas": System(shared, region, plan(DEMAND, shared, region, PAPER)),
        "homogeneous": System(alone, (), plan(DEMAND, alone, (), PAPER)),
        "naive": System(shared, region, plan(DEMAND, shared, region, PAPER, threshold_tokens=0, n_prefill=0)),
    }


def report() -> dict[str, Any]:
    """prfaas, homogeneous, naive: the figures. ratio_*: of Λ. paper: Table 6, null where it has none. inputs: for each
    figure, whether all that went into it was measured, and what that is. bare_prefill_s: mean and P90 of prefill alone,
    without queue or transfer, which is what the paper's TTFTs look like."""
    planned = systems()
    made: dict[str, Any] = {name: figures(system.plan) for name, system in planned.items()}
    rate = planned["prfaas"].plan.lambda_max
    made["ratio_homogeneous"] = rate / planned["homogeneous"].plan.lambda_max
    made["ratio_naive"] = rate / planned["naive"].plan.lambda_max
    made["paper"] = {**TABLE_6, **TABLE_6_RATIOS}
    made["inputs"] = {name: inputs(system) for name, system in planned.items()}
    made["inputs"]["ratio_homogeneous"] = made["inputs"]["ratio_naive"] = made["inputs"]["prfaas"]["lambda_max"]
    made["bare_prefill_s"] = {
        name: {**bare_prefill(system), "paper_mean_ttft": paper[0], "paper_p90_ttft": paper[1]}
        for (name, system), paper in zip(planned.items(), TABLE_6_TTFT_S.values(), strict=True)
    }
    made["mode"] = PAPER.mode
    return made


def as_inputs() -> tuple[Inputs, Plan]:
    """The PrfaaS system, as the flags would describe it, for its plots."""
    system = systems()["prfaas"]
    inputs = Inputs(DEMAND, "the paper's", system.home, system.offload[0], PAPER, Prices(), None, None, None, None)
    return inputs, system.plan


def figures(made: Plan) -> dict[str, float | int | None]:
    """threshold: tokens; null where the system has none. thetas and lambda_max: requests/s."""
    has_threshold = 0 < made.threshold_tokens < math.inf
    return {
        "threshold": made.threshold_tokens if has_threshold else None,
        "n_prfaas": made.n_prfaas,
        "n_p": made.n_prefill,
        "n_d": made.n_decode,
        "lambda_max": made.lambda_max,
        "theta_prfaas": made.theta_prfaas,
        "theta_pd_p": made.theta_pd_prefill,
        "theta_pd_d": made.theta_pd_decode,
        "egress_gbps": made.egress_bytes_per_s * 8e-9,
    }


def inputs(system: System) -> dict[str, dict[str, Any]]:
    """For each figure: `kind`, measured only if all that it was computed from was, and `from`: profile and curve.

    What was searched for (threshold, split) depends on everything, and so does what is computed at the threshold found.
    Of the PrfaaS system that leaves nothing measured; naive offloads all, which no threshold decides.
    """
    far = system.offload[0].profile if system.offload else None
    home = system.home.profile
    prfaas = [_source(far, "prefill_s")] if far else []
    kv = [_source(far, "kv_bytes")] if far else []
    pd_prefill, pd_decode = [_source(home, "prefill_s")], [_source(home, "decode_step_s")]
    searched = system.plan.n_prefill > 0
    everything = [*prfaas, *pd_prefill, *pd_decode]
    rate = everything if searched else prfaas
    per_figure = {"lambda_max": rate, "theta_prfaas": rate if far else [], "theta_pd_d": pd_decode}
    if searched:
        per_figure |= {"n_p": everything, "n_d": everything, "theta_pd_p": everything if far else pd_prefill}
    if far:
        per_figure |= {"egress_gbps": [*rate, *kv]}
    if far and searched:
        per_figure |= {"threshold": everything}
    return {
        name: {"kind": "fitted" if any("(fitted)" in s for s in sources) else "measured", "from": sources}
        for name, sources in per_figure.items()
        if sources
    }


def _source(profile: NodeProfile, curve: str) -> str:
    return f"{profile.name} {curve} ({profile.provenance[curve]})"


def bare_prefill(system: System) -> dict[str, float]:
    """Mean and P90 over requests of T_prefill in the pool that the threshold sends them to, seconds."""
    shares = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    lengths = np.array([DEMAND.uncached.quantile(q) for q in shares])
    times = system.home.profile.prefill_s(lengths)
    if system.offload:
        far = system.offload[0].profile.prefill_s(lengths)
        times = np.where(lengths > system.plan.threshold_tokens, far, times)
    return {"mean": float(times.mean()), "p90": float(np.quantile(times, 0.9))}


# -- for people -------------------------------------------------------------------------------------------------------


def as_text(made: dict[str, Any]) -> str:
    lines = ["the paper's case study: planned here / the paper's Table 6  (m: from measured input, f: from fitted)", ""]
    lines.append(f"{'':14}" + "".join(f"{name:>24}" for name in SYSTEMS))
    lines += [
        f"{figure:14}" + "".join(f"{_cell(made, name, figure):>24}" for name in SYSTEMS).rstrip() for figure in FIGURES
    ]
    lines.append("")
    for key, of in (("ratio_homogeneous", "homogeneous"), ("ratio_naive", "naive")):
        kind = made["inputs"][key]["kind"][0]
        lines.append(f"Λ of prfaas over {of}: {made[key]:.2f} / {made['paper'][key]:.2f} {kind}")
    lines.append("")
    lines.append("mean and P90 of prefill alone, s / the paper's TTFT (no queue and no transfer are in either):")
    for name in SYSTEMS:
        bare = made["bare_prefill_s"][name]
        lines.append(
            f"  {name:12}{bare['mean']:>6.2f} / {bare['paper_mean_ttft']:.2f}"
            f"{bare['p90']:>9.2f} / {bare['paper_p90_ttft']:.2f}"
        )
    lines.append("")
    lines.append(
        "Times are T(E[L]), as in the paper. H20 prefill and decode were fitted to Table 6: no prediction of it."
    )
    return "\n".join(lines)


def _cell(made: dict[str, Any], system: str, figure: str) -> str:
    paper = made["paper"][system][figure]
    kind = made["inputs"][system].get(figure, {}).get("kind", " ")[0]
    value = made[system][figure]
    if paper is None and not value:
        return "- / -  "
    return f"{_number(figure, value)} / {_number(figure, paper)} {kind}"


def _number(figure: str, value: float | None) -> str:
    if value is None:
        return "-"
    if figure.startswith("n_"):
        return f"{value:.0f}"
    return f"{value:,.0f}" if figure == "threshold" else f"{value:.2f}"
