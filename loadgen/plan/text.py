"""A plan for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FULL = {
    "prfaas_prefill": "prefill in the prefill region",
    "link": "the link",
    "pd_prefill": "prefill at home",
    "pd_decode": "decode at home",
}


def as_text(made: dict[str, Any]) -> str:
    """Of `command.report`."""
    return "\n".join(
        [*_inputs(made["inputs"]), "", *_plan(made), *_cost(made["cost"]), "", *_changes(made), *_notes(made)]
    )


def _inputs(given: dict[str, Any]) -> Iterator[str]:
    for name, key in (("prefill region", "prefill_region"), ("home region", "home_region")):
        pool = given[key]
        provenance = ", ".join(f"{curve} {kind}" for curve, kind in pool["provenance"].items())
        yield f"{name:16}{pool['nodes']} nodes, {pool['gpus']} GPUs, profile {pool['profile']} ({provenance})"
    means = f"mean {given['mean_input_tokens']:,.0f} in, {given['output_tokens']:,.0f} out"
    yield f"{'workload':16}{given['workload']}; {means}"
    yield (
        f"{'link':16}{given['link_gbps']:g} Gbps, filled to {given['link_share']:.0%} at most,"
        f" {given['wire_ratio']:g} × the KV's bytes on the wire"
    )
    times = "E[T(L)], what queues find" if given["mode"] == "mean_time" else "T(E[L]), the paper's"
    yield f"{'times':16}{times}; decode step at most {given['tpot_limit_s'] * 1e3:g} ms"


def _plan(made: dict[str, Any]) -> Iterator[str]:
    plan = made["plan"]
    threshold = plan["threshold"]
    if threshold is None:
        yield f"{'threshold':16}none: nothing is offloaded"
    elif threshold == 0:
        yield f"{'threshold':16}0: everything is offloaded"
    else:
        yield (
            f"{'threshold':16}{threshold:,.0f} tokens: {plan['share_offloaded']:.1%} of the requests are offloaded,"
            f" {plan['mean_long_tokens'] or 0:,.0f} tokens on average"
        )
    yield f"{'home nodes':16}{plan['n_p']} prefill : {plan['n_d']} decode (batch {plan['decode_batch']})"
    yield f"{'Λ_max':16}{plan['lambda_max']:.3f} requests/s; full first: {FULL[plan['bottleneck']]}"
    yield (
        f"{'Θ':16}prefill region {plan['theta_prfaas']:.3f}, prefill at home {plan['theta_pd_p']:.3f},"
        f" decode {plan['theta_pd_d']:.3f} requests/s"
    )
    for name, said in zip(("balance", ""), _balance(plan), strict=False):
        yield f"{name:16}{said}"
    sends = "" if plan["kv_gbps_per_node"] is None else f"; a busy prefill node sends {plan['kv_gbps_per_node']:.2f}"
    yield f"{'egress':16}{plan['egress_gbps']:.2f} Gbps, {plan['link_utilisation']:.1%} of the link{sends}"


def _balance(plan: dict[str, Any]) -> list[str]:
    """Equations 7 and 8: how far from level the two kinds of prefill are, and all prefill and decode."""
    roles = plan["role_imbalance"]
    more, less = ("prefill", "decode") if roles > 0 else ("decode", "prefill")
    said = f"{more} could carry {abs(roles):.3f} requests/s more than {less} (equation 8)"
    between = plan["threshold_imbalance"]
    if between is None:
        return [said]
    larger, smaller = ("the prefill region", "prefill at home")[:: 1 if between > 0 else -1]
    return [f"{larger} could carry {abs(between):.3f} requests/s more than {smaller} (equation 7)", said]


def _cost(cost: dict[str, Any]) -> Iterator[str]:
    yield f"{'':16}{cost['egress_gb_per_hour']:,.0f} GB an hour at {cost['rate_per_s']:.3f} requests/s"
    parts = [
        f"{cost[key]:,.2f} for {name}"
        for key, name in (("gpus_per_hour", "GPUs"), ("egress_per_hour", "egress"))
        if cost[key] is not None
    ]
    if parts:
        per_million = cost["per_million_requests"]
        more = f"; {per_million:,.2f} a million requests" if per_million is not None else ""
        yield f"{'dollars an hour':16}{', '.join(parts)}{more}"


def _changes(made: dict[str, Any]) -> Iterator[str]:
    yield f"{'if it were':30}{'Λ_max':>8}{'change':>9}{'threshold':>11}{'split':>9}{'Gbps':>8}  full first"
    for row in made["sensitivity"]:
        head = f"{row['what']:15}{row['value']:15}"
        if row["bottleneck"] is None:
            yield f"{head}{0:>8.3f}{row['change']:>9.1%}  nothing is served"
            continue
        threshold = "none" if row["threshold"] is None else f"{row['threshold']:,.0f}"
        split = f"{row['n_p']} : {row['n_d']}"
        yield (
            f"{head}{row['lambda_max']:>8.3f}{row['change']:>+9.1%}{threshold:>11}{split:>9}"
            f"{row['egress_gbps']:>8.2f}  {FULL[row['bottleneck']]}"
        )


def _notes(made: dict[str, Any]) -> list[str]:
    return ["", *(f"note: {note}" for note in made["notes"])] if made["notes"] else []
