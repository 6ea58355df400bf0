"""The `prfaas-loadgen` command. A subcommand is a module with `add_arguments` and `run`, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from prfaas.common import command_line
from prfaas.common.command_line import EXIT_USAGE, Parser

HELP = """\
usage: prfaas-loadgen COMMAND [flags]

Load for an OpenAI-compatible server, and the same load on paper: measured,
simulated, planned.

commands:
  run       send a workload to a server and measure every answer
  simulate  the same workload through simulated regions, links and nodes
  plan      best threshold and split, most requests/s, egress, bottleneck
  report    tables and pages again from saved requests; compares several

Every command has --help with an example; --help-all lists the rarer flags.

examples:
  prfaas-loadgen run --url http://127.0.0.1:8000 --request-rate 2 --num-prompts 100
  prfaas-loadgen plan --case paper
  prfaas-loadgen report run.jsonl --html run.html
"""

COMMANDS = {
    "run": "prfaas.loadgen.client.command",
    "simulate": "prfaas.loadgen.simulator.command",
    "plan": "prfaas.loadgen.plan.command",
    "report": "prfaas.loadgen.report.command",
}


class Command(Protocol):
    """What a subcommand's module has. A module with SHOWS_ALL = True has rarer flags: `add_arguments` also takes
    `show_all`, True for --help-all; elsewhere --help-all is --help."""

    DESCRIPTION: str
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser, /, **options: bool) -> None: ...

    def run(self, args: argparse.Namespace, /) -> int: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 called wrongly or not feasible, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return command_line.run(" ".join(["prfaas-loadgen", *arguments[:1]]), _run, arguments)


def _run(given: Sequence[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0 if given else EXIT_USAGE
    if given[0] in ("-V", "--version"):
        from importlib.metadata import version

        sys.stdout.write(f"prfaas-loadgen {version('prfaas')}\n")
        return 0
    name, arguments = given[0], given[1:]
    if name not in COMMANDS:
        raise command_line.no_such_command("prfaas-loadgen", name, COMMANDS)
    command = cast("Command", importlib.import_module(COMMANDS[name]))
    parser = Parser(
        prog=f"prfaas-loadgen {name}",
        usage="%(prog)s [flags]",
        description=command.DESCRIPTION,
        epilog=command.EXAMPLE,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=36, width=min(120, shutil.get_terminal_size().columns)
        ),
        allow_abbrev=False,
    )
    has_rarer = getattr(command, "SHOWS_ALL", False)
    if has_rarer:
        command.add_arguments(parser, show_all="--help-all" in arguments)
    else:
        command.add_arguments(parser)
    parser.add_argument("--help-all", action="help", help="every flag" if has_rarer else argparse.SUPPRESS)
    return command.run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
