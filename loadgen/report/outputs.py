"""The flags of what is written, shared by `run` and `report` (and whoever has records), and the writing."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prfaas.common.errors import ConfigError, UsageError
from prfaas.loadgen.records import Records
from prfaas.loadgen.report import files
from prfaas.loadgen.report.objective import Objective, parse_objective
from prfaas.loadgen.report.page import page
from prfaas.loadgen.report.plots import Run
from prfaas.loadgen.report.summary import Summary, summarise
from prfaas.loadgen.report.tables import tables

OUTPUTS = ("jsonl", "csv", "html")
INPUTS = (
    "files",
    "dataset_path",
    "histogram",
    "request_rate_series",
    "rate_curve",
    "profile",
    "prefill_profile",
    "decode_profile",
    "api_key_file",
    "cacert",
)
"""Flags of any command whose value is a file, or may be one. Lengths are one as empirical:FILE."""
FILE_OF_LENGTHS = "empirical:"


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


def check_writable(args: argparse.Namespace, names: Sequence[str] = OUTPUTS) -> None:
    """Before a long run, not after it. No output may be another output, or a file that another flag names: it would be
    overwritten. Leaves no file behind. Raises UsageError."""
    taken = {_identity(path): flag for flag, path in _other_files(args)}
    for name in names:
        path = getattr(args, name, None)
        if path is None:
            continue
        if (other := taken.setdefault(_identity(path), f"--{name}")) != f"--{name}":
            raise UsageError(f"--{name} {path} is the file of {other}, which it would overwrite; name another")
        try:
            _try_to_write(Path(os.path.realpath(path)))
        except OSError as error:
            raise UsageError(f"--{name} {path}: {error.strerror}") from None


def _other_files(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(flag, file) of what is read."""
    for name, given in vars(args).items():
        flag = "FILE" if name == "files" else f"--{name.replace('_', '-')}"
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, str) and (name in INPUTS or value.startswith(FILE_OF_LENGTHS)):
                yield flag, value.removeprefix(FILE_OF_LENGTHS)


def _identity(path: str) -> object:
    """Equal for two names of one file, whether or not it is there yet. What is no plain file, such as /dev/null, can
    be written to by several."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return os.path.realpath(path)
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else object()


def _try_to_write(path: Path) -> None:
    """Raises OSError where that can't be."""
    try:
        with path.open("xb"):
            pass
        path.unlink()
    except FileExistsError:
        with path.open("ab"):
            pass


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
