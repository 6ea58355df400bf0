"""The flags of `prfaas-loadgen simulate` and what it prints. UsageError and ConfigError are for the caller to show,
with exit status 2."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from prfaas.common.errors import UsageError
from prfaas.loadgen.simulator import case_paper, results
from prfaas.loadgen.simulator.deployment import add_deployment_arguments, deployment_from
from prfaas.loadgen.simulator.measures import latencies
from prfaas.loadgen.simulator.simulation import DONE
from prfaas.loadgen.simulator.trace_scenario import find
from prfaas.loadgen.workloads.flags import add_workload_arguments
from prfaas.loadgen.workloads.from_flags import workload_from

SHOWS_ALL = True
DESCRIPTION = "A workload through simulated regions, links and nodes, under the live router's policies."
EXAMPLE = """\
examples:
  prfaas-loadgen simulate --case paper
  prfaas-loadgen simulate --request-rate 2.5 --num-prompts 5000 --link-gbps 10
  prfaas-loadgen simulate --results docs/results.md --traces traces/"""
MAX_SEEDS = 1000
MAX_REQUESTS = 1_000_000


def add_arguments(parser: argparse.ArgumentParser, *, show_all: bool = False) -> None:
    """The subcommand's flags."""
    group = parser.add_argument_group("what to simulate")
    group.add_argument("--case", choices=("paper",), help="the paper's three systems under the same requests")
    group.add_argument("--seeds", metavar="N", help=f"of --case [{case_paper.DEFAULT_SEEDS}]")
    group.add_argument("--requests", metavar="N", help=f"of --case, a seed [{case_paper.DEFAULT_REQUESTS}]")
    group.add_argument("--results", metavar="FILE", help="all scenarios, written as a page of Markdown")
    group.add_argument("--traces", metavar="DIR", help="for --results: where the conversation trace lies")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    add_deployment_arguments(parser)
    add_workload_arguments(parser, show_all=show_all)


def run(args: argparse.Namespace) -> int:
    """Simulate and print."""
    if args.case and args.results:
        raise UsageError("--results does --case paper as well; leave one of the two out")
    if args.traces and not args.results:
        raise UsageError("--traces is for --results; a trace alone is --dataset")
    seeds = _whole("--seeds", args.seeds, MAX_SEEDS, case_paper.DEFAULT_SEEDS)
    requests = _whole("--requests", args.requests, MAX_REQUESTS, case_paper.DEFAULT_REQUESTS)
    if args.case:
        made = _with_progress(seeds, requests)
        _print(args.json, made, case_paper.as_text(made))
    elif args.results:
        _write_results(Path(args.results), None if args.traces is None else Path(args.traces), seeds, requests, args)
    else:
        if args.seeds or args.requests:
            raise UsageError("--seeds and --requests belong to --case paper; a workload has --seed and --num-prompts")
        made = simulated(args)
        _print(args.json, made, as_text(made))
    return 0


def simulated(args: argparse.Namespace) -> dict[str, Any]:
    """The workload of the flags on the deployment of the flags."""
    workload = workload_from(args)
    deployment = deployment_from(args, workload)
    outcome = deployment.run(workload)
    served = latencies(outcome, 0.0)
    ends = outcome.end_s[outcome.end_s == outcome.end_s]
    lasted_s = float(ends.max() - outcome.arrival_s.min()) if ends.size else 0.0
    return {
        "workload": workload.name,
        "requests": int(outcome.arrival_s.size),
        "policy": deployment.policy_name,
        "threshold": deployment.threshold_tokens,
        "nodes": deployment.nodes,
        "lasted_s": lasted_s,
        "requests_per_s": float((outcome.status == DONE).sum()) / lasted_s if lasted_s else 0.0,
        **served,
        "egress_gbps": sum(outcome.link_bytes.values()) / lasted_s * 8e-9 if lasted_s else 0.0,
        "reasons": outcome.reasons,
    }


def as_text(made: dict[str, Any]) -> str:
    """A line a figure."""
    lines = []
    for key, value in made.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        if isinstance(value, dict):
            shown = ", ".join(f"{name} {count}" for name, count in value.items())
        lines.append(f"{key:22} {shown}")
    return "\n".join(lines)


def _with_progress(seeds: int, requests: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for made in case_paper.reports(seeds, requests):
        if "done" in made:
            _progress(f"{made['done']}: done")
    return made


def _write_results(path: Path, traces: Path | None, seeds: int, requests: int, args: argparse.Namespace) -> None:
    found = find(traces) if traces is not None else None
    # A broken trace shows before anything takes time.
    wanted = results.all_scenarios(traces)
    paper = _with_progress(seeds, requests)
    made = list(results.summaries(wanted, _progress))
    page = results.document(made, paper, traces_given=found is not None)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--results {path}: {error.strerror}") from None
    _print(args.json, {"paper": paper, "scenarios": made}, f"wrote {path}")


def _print(as_json: bool, made: dict[str, Any], words: str) -> None:
    sys.stdout.write((json.dumps(made) if as_json else words) + "\n")


def _progress(words: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{words}")
        sys.stderr.flush()


def _whole(flag: str, given: str | None, most: int, default: int) -> int:
    if given is None:
        return default
    if not (given.isascii() and given.isdigit()) or not 1 <= int(given) <= most:
        raise UsageError(f"{flag} {given} must be a whole number from 1 to {most:,}")
    return int(given)
