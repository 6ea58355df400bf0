"""The flags of `prfaas-loadgen simulate` and what it prints. UsageError and ConfigError are for the caller to show,
with exit status 2."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from prfaas.common.errors import UsageError
from prfaas.loadgen.report.objective import Objective
from prfaas.loadgen.report.outputs import add_output_arguments, check_writable, objective_from, put_out
from prfaas.loadgen.report.plots import Run
from prfaas.loadgen.simulator import case_paper, results
from prfaas.loadgen.simulator.deployment import add_deployment_arguments, deployment_from
from prfaas.loadgen.simulator.outcome_records import records
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
OBJECTIVE = Objective(ttft_s=10.0, tpot_s=0.0275, ttft_prefills=2.0)
"""Of goodput, where --goodput names no other: what the policies admit by."""
MAX_SEEDS = 1000
MAX_REQUESTS = 1_000_000
MIN_REQUESTS = 10
"""Of --case, a seed: its saturated throughput is taken between two shares of them."""


def add_arguments(parser: argparse.ArgumentParser, *, show_all: bool = False) -> None:
    """The subcommand's flags."""
    group = parser.add_argument_group("what to simulate")
    group.add_argument("--case", choices=("paper",), help="the paper's three systems under the same requests")
    group.add_argument("--seeds", metavar="N", help=f"of --case [{case_paper.DEFAULT_SEEDS}]")
    group.add_argument("--requests", metavar="N", help=f"of --case, a seed [{case_paper.DEFAULT_REQUESTS}]")
    group.add_argument("--results", metavar="FILE", help="all scenarios, written as a page of Markdown")
    group.add_argument("--traces", metavar="DIR", help="for --results: where the conversation trace lies")
    add_deployment_arguments(parser)
    add_workload_arguments(parser, show_all=show_all)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Simulate and print."""
    if args.case and args.results:
        raise UsageError("--results does --case paper as well; leave one of the two out")
    if args.traces and not args.results:
        raise UsageError("--traces is for --results; a trace alone is --dataset")
    seeds = _whole("--seeds", args.seeds, 1, MAX_SEEDS, case_paper.DEFAULT_SEEDS)
    requests = _whole("--requests", args.requests, MIN_REQUESTS, MAX_REQUESTS, case_paper.DEFAULT_REQUESTS)
    if args.case:
        _only(args, {"case", "seeds", "requests", "json"}, "--case paper")
        made = _with_progress(seeds, requests)
        _print(args.json, made, case_paper.as_text(made))
    elif args.results:
        _only(args, {"results", "traces", "seeds", "requests", "json"}, "--results")
        _write_results(Path(args.results), None if args.traces is None else Path(args.traces), seeds, requests, args)
    else:
        if args.seeds or args.requests:
            raise UsageError("--seeds and --requests belong to --case paper; a workload has --seed and --num-prompts")
        _simulate(args)
    return 0


def _simulate(args: argparse.Namespace) -> None:
    """The workload of the flags on the deployment of the flags; the report is that of a live run."""
    objective = objective_from(args) or OBJECTIVE
    check_writable(args)
    workload = workload_from(args)
    deployment = deployment_from(args, workload)
    outcome, conversions = deployment.run(workload)
    snapshot = deployment.cluster.snapshot()
    rows = records(outcome, snapshot.names, snapshot.region_names)
    if not args.json:
        sys.stdout.write("\n".join([deployment.as_text(), *conversions]) + "\n\n")
    about = {
        "policy": deployment.policy_name,
        "threshold": deployment.threshold_tokens,
        "nodes": deployment.nodes,
        "conversions": conversions,
    }
    name, notes = f"{workload.name}, {deployment.policy_name}", [deployment.as_text(), *conversions]
    put_out(args, [Run(name, rows)], objective, "A simulation", notes=notes, deployment=about)


def _only(args: argparse.Namespace, allowed: set[str], what: str) -> None:
    """Raises UsageError for flags that would say nothing."""
    parser = argparse.ArgumentParser()
    add_arguments(parser, show_all=True)
    defaults = vars(parser.parse_args([]))
    wrong = [name for name, default in defaults.items() if name not in allowed and getattr(args, name) != default]
    if wrong:
        flags = ", ".join("--" + name.replace("_", "-") for name in wrong)
        raise UsageError(f"{what} has its own workload, deployment and output; leave out {flags}")


def _with_progress(seeds: int, requests: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for made in case_paper.reports(seeds, requests):
        if "done" in made:
            _progress(f"{made['done']}: done")
    return made


def _write_results(path: Path, traces: Path | None, seeds: int, requests: int, args: argparse.Namespace) -> None:
    found = find(traces) if traces is not None else None
    # A broken trace, or a page that can't be written, shows before anything takes time.
    wanted = results.all_scenarios(traces)
    check_writable(args, ("results",))
    paper = _with_progress(seeds, requests)
    made = list(results.summaries(wanted, _progress))
    drifted = list(results.drift_summaries(_progress))
    page = results.document(made, drifted, paper, traces_given=found is not None)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--results {path}: {error.strerror}") from None
    _print(args.json, {"paper": paper, "scenarios": made, "drifts": drifted}, f"wrote {path}")


def _print(as_json: bool, made: dict[str, Any], words: str) -> None:
    sys.stdout.write((json.dumps(_known(made), allow_nan=False) if as_json else words) + "\n")


def _known(value: Any) -> Any:
    """null for numbers that aren't known or have no bound: JSON has no others."""
    if isinstance(value, dict):
        return {key: _known(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_known(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _progress(words: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{words}")
        sys.stderr.flush()


def _whole(flag: str, given: str | None, least: int, most: int, default: int) -> int:
    if given is None:
        return default
    if not (given.isascii() and given.isdigit()) or not least <= int(given) <= most:
        raise UsageError(f"{flag} {given} must be a whole number from {least} to {most:,}")
    return int(given)
