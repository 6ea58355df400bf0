"""`python -m prfaas.loadgen.plan`: the subcommand by itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from prfaas.common.errors import ConfigError, PrfaasError, UsageError
from prfaas.loadgen.plan import command

EXIT_FAILURE = 1
EXIT_USAGE = 2


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; try {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 planned, 1 failed, 2 called wrongly or not feasible."""
    parser = Parser(
        prog="prfaas-loadgen plan",
        usage="%(prog)s [flags]",
        description=command.DESCRIPTION,
        epilog=command.EXAMPLE,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36),
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    try:
        return command.run(parser.parse_args(argv))
    except ConfigError as error:
        return _failed(error.problems, EXIT_USAGE)
    except UsageError as error:
        return _failed([str(error)], EXIT_USAGE)
    except (PrfaasError, OSError) as error:
        return _failed([str(error)], EXIT_FAILURE)


def _failed(problems: Sequence[str], status: int) -> int:
    for problem in problems:
        sys.stderr.write(f"prfaas-loadgen plan: {problem}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
