"""The flags of what is written, shared by `run` and `report` (and whoever has records), and the writing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from prfaas.common.errors import ConfigError, UsageError
from prfaas.loadgen.records import Records
from prfaas.loadgen.report import files
from prfaas.loadgen.report.objective import Objective, parse_objective
from prfaas.loadgen.report.page import page
from prfaas.loadgen.report.plots import Run
from prfaas.loadgen.report.summary import Summary, summarise
from prfaas.loadgen.report.tables import tables


def add_output_arguments(parser: argparse.ArgumentParser, *, jsonl: bool = True) -> None:
    group = parser.add_argument_group("what comes of it")
    group.add_argument(
        "--goodput", nargs="+", default=[], metavar="NAME:MS", help="the objective: any of ttft, tpot, e2el; in ms"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    if jsonl:
        group.add_argument("--jsonl", metavar="FILE", help="save every request; prfaas-loadgen report reads it")
    group.add_argument("--csv", metavar="FILE", help="save the figures")
    group.add_argument("--html", metavar="FILE", help="save one page with tables and plots")


def objective_from(args: argparse.Namespace) -> Objective:
    """Raises ConfigError."""
    return parse_objective(args.goodput)


def check_writable(args: argparse.Namespace, names: Sequence[str] = ("jsonl", "csv", "html")) -> None:
    """Before a long run, not after it. Raises UsageError."""
    for name in names:
        if (path := getattr(args, name, None)) is not None:
            try:
                with open(path, "ab"):  # noqa: PTH123
                    pass
            except OSError as error:
                raise UsageError(f"--{name} {path}: {error.strerror}") from None


def put_out(
    args: argparse.Namespace,
    runs: Sequence[Run],
    objective: Objective,
    title: str,
    *,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
    **more: Any,
) -> list[Summary]:
    """Print and write what the flags ask for; `more` goes into the JSON. Raises UsageError."""
    summaries = [summarise(run.records, objective, run.name) for run in runs]
    # Files first: whoever reads the output may stop reading.
    if getattr(args, "jsonl", None):
        files.write(args.jsonl, files.jsonl_lines(_only(runs)))
    if args.csv:
        files.write(args.csv, files.as_csv(summaries))
    if args.html:
        files.write(args.html, page(title, summaries, runs, notes, warnings))
    if args.json:
        sys.stdout.write(files.as_json(summaries, **more).decode())
    else:
        from prfaas.loadgen.report.console import show

        show(tables(summaries))
    return summaries


def _only(runs: Sequence[Run]) -> Records:
    if len(runs) != 1:
        raise ConfigError(["--jsonl saves one run"])
    return runs[0].records
