"""What the commands have in common: argparse with mistakes for people, and how errors become exit statuses."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from prfaas.common.errors import ConfigError, PrfaasError, UsageError

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line with a mend."""

    def error(self, message: str) -> NoReturn:
        words = [w for w in message.split() if w.startswith("--")]
        known = [flag for action in self._actions for flag in action.option_strings]
        wrong = words[0].split("=")[0].rstrip(":,") if words else ""
        close = [] if wrong in known else difflib.get_close_matches(wrong, known, n=1)
        mend = f"did you mean {close[0]}?" if close else f"try {self.prog} --help"
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; {mend}\n")


def no_such_command(program: str, name: str, known: Iterable[str]) -> UsageError:
    """With the command that was probably meant."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return UsageError(f"no such command; {f'did you mean {program} {close[0]}?' if close else f'try {program} --help'}")


def run(called: str, command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """`command(arguments)` as a process: its exit status, or that of what it raised, which is told in a line each on
    stderr that begins with `called`. 0 done, 1 failed, 2 called or configured wrongly, 130 interrupted."""
    _open_closed_streams()
    try:
        return _flushed(command, arguments)
    except ConfigError as error:
        return _failed(called, error.problems, EXIT_USAGE)
    except UsageError as error:
        return _failed(called, [str(error)], EXIT_USAGE)
    except (PrfaasError, TimeoutError) as error:
        return _failed(called, [str(error) or type(error).__name__], EXIT_FAILURE)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("prfaas"):
            raise
        return _failed(called, [f"{error.name} is not installed; the mend: pip install 'prfaas[torch]'"], EXIT_FAILURE)
    except BrokenPipeError:
        _discard(sys.stdout)
        return EXIT_FAILURE
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _discard(sys.stdout)
        return _failed(called, [str(error)], EXIT_FAILURE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _flushed(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """A full disk shows now, while it can be told, and not at exit. `--help` leaves by SystemExit."""
    try:
        status = command(arguments)
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status


def _open_closed_streams() -> None:
    """Or the first socket takes the place of a standard error that the caller has closed, and a peer gets the log."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - until the process ends


def _discard(stream: TextIO) -> None:
    """What is still buffered can't be written; Python would complain once more, and end with 120, when it flushes at
    exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _failed(called: str, problems: Sequence[str], status: int) -> int:
    try:
        for problem in problems:
            sys.stderr.write(f"{called}: {problem}\n")
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)
    return status
