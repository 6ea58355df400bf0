"""How many nodes in which region: the best use of a number of GPUs, or of dollars an hour."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from prfaas.common.errors import InfeasibleError
from prfaas.common.scheduling.planner import Plan, plan
from prfaas.loadgen.plan.inputs import MAX_GPUS, Inputs

GB = 1e9
HOUR_S = 3600.0
MAX_TRIED = 256
"""Divisions that are planned at first; more are thinned out evenly, and the neighbours of the best are tried after."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Dollars an hour at `rate_per_s`; None where a price is missing."""

    gpus: float | None
    egress: float | None
    per_million_requests: float | None


def cost(inputs: Inputs, made: Plan, rate_per_s: float) -> Cost:
    """Of a plan that carries `rate_per_s` requests/s. GPUs cost the same however busy they are, egress what is sent. An
    egress without a price leaves the total at the GPUs' share."""
    gpus = gpus_per_hour(inputs)
    sent = None
    if inputs.prices.egress is not None:
        sent = rate_per_s * bytes_per_request(made) / GB * HOUR_S * inputs.prices.egress
    total = None if gpus is None else gpus + (sent or 0.0)
    per_request = None if total is None or rate_per_s <= 0 else total / (rate_per_s * HOUR_S)
    return Cost(gpus, sent, None if per_request is None else per_request * 1e6)


def gpus_per_hour(inputs: Inputs) -> float | None:
    """None: a price is missing for GPUs that are there."""
    total = 0.0
    for pool, price in ((inputs.far, inputs.prices.prefill), (inputs.home, inputs.prices.decode)):
        if price is None and pool.nodes:
            return None
        total += pool.nodes * pool.profile.gpus * (price or 0.0)
    return total


def bytes_per_request(made: Plan) -> float:
    """On the wire, averaged over all requests."""
    return made.egress_bytes_per_s / made.lambda_max if made.lambda_max else 0.0


def affordable_rate(inputs: Inputs, made: Plan) -> float:
    """Λ, or less where the budget's rest pays for less egress than Λ needs."""
    if inputs.budget is None or not inputs.prices.egress:
        return made.lambda_max
    dollars_per_request = bytes_per_request(made) / GB * inputs.prices.egress
    if dollars_per_request == 0:
        return made.lambda_max
    rest = max(inputs.budget - (gpus_per_hour(inputs) or 0.0), 0.0) / HOUR_S
    return min(made.lambda_max, rest / dollars_per_request)


def divide(inputs: Inputs) -> Inputs:
    """The same with the nodes that carry the most within `total_gpus` and `budget`. Every number of prefill nodes is
    tried, the rest goes to the home region. Raises InfeasibleError when nothing that can be had serves anything."""
    most = _most(inputs)
    if most < 0:
        raise InfeasibleError(_too_little(inputs))
    best: tuple[float, int] | None = None
    why = ""

    def tried(numbers: Iterable[int]) -> None:
        nonlocal best, why
        for n_far in numbers:
            candidate = _with(inputs, n_far)
            try:
                made = plan(
                    candidate.demand,
                    candidate.home,
                    candidate.offload,
                    candidate.settings,
                    threshold_tokens=candidate.threshold_tokens,
                )
            except InfeasibleError as error:
                why = why or str(error)
                continue
            rate = affordable_rate(candidate, made)
            if rate > 0 and (best is None or rate > best[0]):
                best = rate, n_far

    stride = max(1, (most + 1) // MAX_TRIED)
    tried(range(0, most + 1, stride))
    if best is not None and stride > 1:
        around = best[1]
        tried(range(max(0, around - stride + 1), min(most, around + stride - 1) + 1))
    if best is None:
        raise InfeasibleError(why or _too_little(inputs))
    return _with(inputs, best[1])


def _most(inputs: Inputs) -> int:
    """Prefill nodes that leave enough for one home node; below 0: not even that one can be had."""
    return _bought(inputs, inputs.far.profile.gpus, inputs.prices.prefill, home_nodes=1)


def _with(inputs: Inputs, n_far: int) -> Inputs:
    gpus = inputs.far.profile.gpus * n_far
    total = None if inputs.total_gpus is None else inputs.total_gpus - gpus
    budget = None if inputs.budget is None else inputs.budget - gpus * (inputs.prices.prefill or 0.0)
    n_home = _count(inputs.home.profile.gpus, inputs.prices.decode, total, budget)
    return replace(inputs, far=replace(inputs.far, nodes=n_far), home=replace(inputs.home, nodes=n_home))


def _bought(inputs: Inputs, gpus: int, price: float | None, home_nodes: int) -> int:
    home = home_nodes * inputs.home.profile.gpus
    total = None if inputs.total_gpus is None else inputs.total_gpus - home
    budget = None if inputs.budget is None else inputs.budget - home * (inputs.prices.decode or 0.0)
    if (total is not None and total < 0) or (budget is not None and budget < 0):
        return -1
    return _count(gpus, price, total, budget)


def _count(gpus: int, price: float | None, total: int | None, budget: float | None) -> int:
    """Whole nodes within both limits."""
    limits = [] if total is None else [total / gpus]
    if budget is not None and price:
        limits.append(budget / (price * gpus) * (1 + 1e-12))
    return max(0, min(int(min(limits, default=MAX_GPUS)), MAX_GPUS))


def _too_little(inputs: Inputs) -> str:
    profile = inputs.home.profile
    given = f"--gpus {inputs.total_gpus}" if inputs.total_gpus is not None else f"--budget {inputs.budget:g}"
    price = "" if inputs.budget is None else f", {profile.gpus * (inputs.prices.decode or 0):g} dollars an hour"
    return f"{given} has no home node; missing: {profile.gpus} GPUs of {profile.name}{price}"
