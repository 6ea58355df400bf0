"""The flags of `prfaas-loadgen plan` and what it prints. UsageError (with InfeasibleError) and ConfigError are for the
caller to show, with exit status 2."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from prfaas.common.errors import InfeasibleError, UsageError
from prfaas.common.perfmodel.profiles import NodeProfile
from prfaas.common.perfmodel.throughput import kv_throughput, role_imbalance, threshold_imbalance
from prfaas.common.scheduling.planner import Plan, plan, require
from prfaas.loadgen.plan import case_paper, case_public, page, purchase, sensitivity, text, workload
from prfaas.loadgen.plan.inputs import Inputs, read
from prfaas.loadgen.plan.inputs import add_arguments as add_inputs
from prfaas.loadgen.report.outputs import check_writable

DESCRIPTION = "Best threshold and prefill : decode split, most requests/s, egress, bottleneck, and what changes them."
EXAMPLE = """\
examples:
  prfaas-loadgen plan --case paper
  prfaas-loadgen plan --link-gbps 8 --html plan.html
  prfaas-loadgen plan --profile lab.json --gpus 64 --isl uniform:100:4000"""

_PUBLIC_GPUS, _PUBLIC_TOKENS = 512, "32768"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument(
        "--case", choices=("paper", "public"), help="the paper's Table 6; the KV rates of its public models"
    )
    add_inputs(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", metavar="FILE", help="also write a page with plots")


def run(args: argparse.Namespace) -> int:
    """Print the report. Raises UsageError and ConfigError for wrong input, InfeasibleError when nothing can be served
    or the wanted rate can't be carried."""
    check_writable(args)
    if args.case == "public":
        _only(args, {"case", "json", "gpus", "random_input_len"})
        tokens = workload.lengths_from("--random-input-len", args.random_input_len or _PUBLIC_TOKENS).mean()
        made = case_public.report(args.gpus or _PUBLIC_GPUS, tokens)
        words = case_public.as_text(made)
    elif args.case == "paper":
        _only(args, {"case", "json", "html"})
        made = case_paper.report()
        words = case_paper.as_text(made)
        _write_page(args.html, "The paper's case study", words, *case_paper.as_inputs())
    else:
        inputs, best = planned(read(args))
        made = report(inputs, best)
        words = text.as_text(made)
        _write_page(args.html, "A plan for prefill and decode", words, inputs, best)
    sys.stdout.write((json.dumps(made) if args.json else words) + "\n")
    return 0


def planned(inputs: Inputs) -> tuple[Inputs, Plan]:
    """The inputs with all nodes named, and the plan for them."""
    if inputs.total_gpus is not None or inputs.budget is not None:
        inputs = purchase.divide(inputs)
    pools = (inputs.demand, inputs.home, inputs.offload, inputs.settings)
    if inputs.rate_per_s is None:
        return inputs, plan(*pools, threshold_tokens=inputs.threshold_tokens)
    if inputs.threshold_tokens is None:
        best = require(inputs.rate_per_s, *pools)
    else:
        best = plan(*pools, threshold_tokens=inputs.threshold_tokens)
    carried = purchase.affordable_rate(inputs, best)
    if carried < inputs.rate_per_s:
        short = "another --threshold" if best.lambda_max < inputs.rate_per_s else "dollars for egress"
        raise InfeasibleError(f"{inputs.rate_per_s:g} requests/s are wanted, {carried:.4g} carried; missing: {short}")
    return inputs, best


def report(inputs: Inputs, best: Plan) -> dict[str, Any]:
    """inputs: what was planned, with each curve's provenance. plan: as `--case paper` names its figures, and more.
    cost: dollars, where prices were given. sensitivity: one entry a changed input. notes: what to beware of."""
    carried = purchase.affordable_rate(inputs, best)
    rate = min(inputs.rate_per_s or carried, carried)
    cost = purchase.cost(inputs, best, rate)
    return {
        "inputs": _inputs(inputs),
        "plan": {
            **case_paper.figures(best),
            "threshold": sensitivity.finite(best.threshold_tokens),
            "share_offloaded": best.share_offloaded,
            "mean_long_tokens": _number(best.mean_long_tokens),
            "mean_short_tokens": _number(best.mean_short_tokens),
            "link_utilisation": best.link_utilisation,
            "bottleneck": best.bottleneck,
            "decode_batch": best.decode_batch,
            "decode_step_s": best.decode_step_s,
            "kv_gbps_per_node": _kv_gbps(inputs, best),
            "threshold_imbalance": _threshold_imbalance(best),
            "role_imbalance": role_imbalance(best.theta_prfaas, best.theta_pd_prefill, best.theta_pd_decode),
        },
        "cost": {
            "rate_per_s": rate,
            "gpus_per_hour": cost.gpus,
            "egress_per_hour": cost.egress,
            "egress_gb_per_hour": rate * purchase.bytes_per_request(best) / purchase.GB * purchase.HOUR_S,
            "per_million_requests": cost.per_million_requests,
        },
        "sensitivity": sensitivity.report(sensitivity.rows(inputs, best), best),
        "notes": notes(inputs),
    }


def _kv_gbps(inputs: Inputs, best: Plan) -> float | None:
    """Equation 1 at the mean offloaded length: what one busy node of the prefill region sends."""
    length = best.mean_long_tokens
    if not inputs.offload or not math.isfinite(length):
        return None
    profile = inputs.far.profile
    return kv_throughput(profile.kv_bytes.at(length), profile.prefill_s.at(length)) * 8e-9


def _threshold_imbalance(best: Plan) -> float | None:
    """Equation 7; None where one side gets no requests."""
    if not 0 < best.share_offloaded < 1:
        return None
    return float(threshold_imbalance(best.theta_prfaas, best.share_offloaded, best.theta_pd_prefill))


def _inputs(inputs: Inputs) -> dict[str, Any]:
    def pool(profile: NodeProfile, nodes: int) -> dict[str, Any]:
        return {
            "profile": profile.name,
            "model": profile.model,
            "hardware": profile.hardware,
            "nodes": nodes,
            "gpus": nodes * profile.gpus,
            "provenance": dict(profile.provenance),
        }

    return {
        "workload": inputs.workload,
        "mean_input_tokens": inputs.demand.uncached.mean(),
        "output_tokens": inputs.demand.output_tokens,
        "prefill_region": pool(inputs.far.profile, inputs.far.nodes),
        "home_region": pool(inputs.home.profile, inputs.home.nodes),
        "link_gbps": inputs.far.link.gbps,
        "link_loss": inputs.far.link.loss,
        "link_share": inputs.settings.link_share,
        "wire_ratio": inputs.settings.wire_ratio,
        "tpot_limit_s": inputs.settings.tpot_limit_s,
        "mode": inputs.settings.mode,
    }


def notes(inputs: Inputs) -> list[str]:
    """What a reader should know of these inputs."""
    made = []
    longest = inputs.demand.uncached.high
    for profile in dict.fromkeys((inputs.far.profile.name, inputs.home.profile.name)):
        points = inputs.far.profile if profile == inputs.far.profile.name else inputs.home.profile
        if longest > 1.05 * points.prefill_s.longest:
            made.append(
                f"lengths up to {longest:,.0f} tokens, but profile {profile} was measured up to"
                f" {points.prefill_s.longest:,.0f}: what lies beyond is extrapolated straight, and prefill is slower"
            )
        fitted = [name for name, kind in points.provenance.items() if kind == "fitted"]
        if fitted:
            made.append(f"profile {profile}: {' and '.join(fitted)} fitted, not measured")
    return made


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _only(args: argparse.Namespace, allowed: set[str]) -> None:
    """Raises UsageError for a flag that a case doesn't take."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, default in vars(parser.parse_args([])).items():
        if name not in allowed and getattr(args, name) != default:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"--case {args.case} fixes what {flag} sets; leave one of the two out")


def _write_page(file: str | None, title: str, words: str, inputs: Inputs, best: Plan) -> None:
    if file is None:
        return
    try:
        Path(file).write_text(page.page(title, words, page.plots(inputs, best)), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html {file}: {error.strerror}") from None
