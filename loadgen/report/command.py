"""`prfaas-loadgen report`: tables and pages again from saved requests; several files are compared."""

from __future__ import annotations

import argparse
from pathlib import Path

from prfaas.common.errors import UsageError
from prfaas.loadgen.report.files import read_jsonl
from prfaas.loadgen.report.outputs import add_output_arguments, check_writable, objective_from, put_out
from prfaas.loadgen.report.plots import Run

DESCRIPTION = "Tables and pages from the requests that `run --jsonl` or `simulate --jsonl` saved."
EXAMPLE = """\
Latencies count from the scheduled send. Give the objective again to have goodput.

examples:
  prfaas-loadgen report run.jsonl --html run.html
  prfaas-loadgen report home.jsonl prfaas.jsonl --names home prfaas --goodput ttft:2000 tpot:50"""
MAX_FILES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s FILE.jsonl ... [flags]"
    parser.add_argument("files", nargs="+", metavar="FILE", help="saved requests, plain or .gz")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what to call the runs [the files' names]")
    add_output_arguments(parser, jsonl=False)


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError for a file that isn't right, UsageError for flags that don't fit."""
    if len(args.files) > MAX_FILES:
        raise UsageError(f"{len(args.files)} files; at most {MAX_FILES} are compared")
    if args.names is not None and len(args.names) != len(args.files):
        raise UsageError(f"--names has {len(args.names)} names for {len(args.files)} files")
    objective = objective_from(args)
    check_writable(args)
    names = args.names or [Path(file).name.removesuffix(".gz").removesuffix(".jsonl") for file in args.files]
    runs = [Run(name, read_jsonl(file)) for name, file in zip(names, args.files, strict=True)]
    title = "Requests: " + ", ".join(names)
    put_out(
        args, runs, objective, title, notes=[f"{name}: {file}" for name, file in zip(names, args.files, strict=True)]
    )
    return 0
