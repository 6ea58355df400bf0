"""How the plan changes when one input is another: a table of plans, each the best for its changed input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from prfaas.common.errors import InfeasibleError
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.scheduling.planner import Plan, plan
from prfaas.loadgen.plan.inputs import Inputs

FACTORS = (0.25, 0.5, 0.75, 1.5, 2.0, 4.0)
_FEWER = (0.5, 0.75, 1.5, 2.0)


@dataclass(frozen=True, slots=True)
class Row:
    """One changed input. plan: None when nothing is served any more."""

    what: str
    value: str
    plan: Plan | None


def rows(inputs: Inputs, base: Plan) -> list[Row]:
    """Link, threshold, split, nodes, lengths and output, around a plan; only `threshold` and `split` are pinned."""
    return [*_link(inputs), *_threshold(inputs, base), *_split(inputs, base), *_nodes(inputs), *_workload(inputs)]


def report(made: list[Row], base: Plan) -> list[dict[str, Any]]:
    """change: of lambda_max against the plan's, relative."""
    return [
        {
            "what": row.what,
            "value": row.value,
            "lambda_max": row.plan.lambda_max if row.plan else 0.0,
            "change": (row.plan.lambda_max if row.plan else 0.0) / base.lambda_max - 1,
            "threshold": finite(row.plan.threshold_tokens) if row.plan else None,
            "n_p": row.plan.n_prefill if row.plan else None,
            "n_d": row.plan.n_decode if row.plan else None,
            "egress_gbps": row.plan.egress_bytes_per_s * 8e-9 if row.plan else 0.0,
            "bottleneck": row.plan.bottleneck if row.plan else None,
        }
        for row in made
    ]


def finite(threshold_tokens: float) -> float | None:
    """JSON has no inf: a threshold of null offloads nothing."""
    return threshold_tokens if threshold_tokens < float("inf") else None


def replanned(inputs: Inputs, **pinned: Any) -> Plan | None:
    try:
        return plan(inputs.demand, inputs.home, inputs.offload, inputs.settings, **pinned)
    except InfeasibleError:
        return None


def with_link(inputs: Inputs, gbps: float) -> Inputs:
    link = inputs.far.link
    return replace(inputs, far=replace(inputs.far, link=LinkProfile.of_gbps(gbps, link.rtt_s, link.loss)))


def _link(inputs: Inputs) -> Iterator[Row]:
    if not inputs.far.nodes:
        return
    yield Row("link", "0 Gbps", replanned(with_link(inputs, 0.0)))
    for factor in FACTORS:
        gbps = inputs.far.link.gbps * factor
        yield Row("link", f"{gbps:g} Gbps", replanned(with_link(inputs, gbps)))


def _threshold(inputs: Inputs, base: Plan) -> Iterator[Row]:
    if not inputs.far.nodes:
        return
    yield Row("threshold", "0 (all)", replanned(inputs, threshold_tokens=0.0))
    if finite(base.threshold_tokens):
        for factor in _FEWER:
            tokens = base.threshold_tokens * factor
            yield Row("threshold", f"{tokens:,.0f}", replanned(inputs, threshold_tokens=tokens))
    yield Row("threshold", "none offloaded", replanned(inputs, threshold_tokens=float("inf")))


def _split(inputs: Inputs, base: Plan) -> Iterator[Row]:
    for n in range(base.n_prefill - 2, base.n_prefill + 3):
        if n != base.n_prefill and 0 <= n < inputs.home.nodes:
            yield Row("split", f"{n} : {inputs.home.nodes - n}", replanned(inputs, n_prefill=n))


def _nodes(inputs: Inputs) -> Iterator[Row]:
    def changed(pool: str, by: int) -> Inputs:
        now: Any = getattr(inputs, pool)
        return replace(inputs, **{pool: replace(now, nodes=now.nodes + by)})

    for pool, name in (("home", "home nodes"), ("far", "prefill nodes")):
        now: Any = getattr(inputs, pool)
        for by in (-1, 1):
            if now.nodes + by >= 0:
                yield Row(name, f"{now.nodes + by}", replanned(changed(pool, by)))


def _workload(inputs: Inputs) -> Iterator[Row]:
    demand = inputs.demand
    for factor in _FEWER:
        longer = replace(demand, uncached=demand.uncached.scaled(factor))
        yield Row("input", f"{longer.uncached.mean():,.0f} tokens", replanned(replace(inputs, demand=longer)))
    for factor in _FEWER:
        more = replace(demand, output_tokens=demand.output_tokens * factor)
        yield Row("output", f"{more.output_tokens:,.0f} tokens", replanned(replace(inputs, demand=more)))


def over_link(inputs: Inputs, gbps: list[float]) -> list[float]:
    """Λ_max at each bandwidth, for a plot."""
    plans = (replanned(with_link(inputs, g)) for g in gbps)
    return [made.lambda_max if made else 0.0 for made in plans]


def over_split(inputs: Inputs, numbers: list[int]) -> list[float]:
    """Λ_max at each number of prefilling home nodes, each with its own best threshold, for a plot."""
    plans = (replanned(inputs, n_prefill=n) for n in numbers)
    return [made.lambda_max if made else 0.0 for made in plans]
