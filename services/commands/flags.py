"""Flags from the configuration's keys: each key has its long flag, a few have a short one; `--help` shows the short.

A parser collects text only. `common.config.load` merges file, environment and flags and reports every mistake at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from prfaas.common import config as settings
from prfaas.common.command_line import Parser
from prfaas.common.config import Config
from prfaas.common.errors import ConfigError, UsageError


def new_parser(prog: str, description: str, example: str = "") -> Parser:
    """`example`: a command line, where the description has none."""
    return Parser(
        prog=prog,
        usage=f"{prog} [flags]",
        description=description,
        epilog=f"example:\n  {example}" if example else None,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=30, width=min(110, shutil.get_terminal_size().columns)
        ),
        allow_abbrev=False,
    )


def whole(least: int, most: int) -> Callable[[str], int]:
    """A flag's type."""

    def check(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from {least} to {most}")
        return int(text)

    return check


def number(least: float, most: float) -> Callable[[str], float]:
    """A flag's type."""

    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} must be a number from {least:g} to {most:.0f}")
        return value

    return check


def add_config_flags(parser: Parser, aliases: Mapping[str, str], *, show_all: bool) -> None:
    """`--config`, the short flags, and the long flag of every key (shown with `--help-all` only)."""
    parser.add_argument("--config", metavar="FILE", help="TOML file of the cluster; flags and PRFAAS_* win over it")
    known = settings.keys()
    for flag, key in aliases.items():
        _add(parser, flag, key, known[key], show=show_all or flag not in settings.RARE_FLAGS)
    for key, spec in known.items():
        flag = long_flag(key)
        if flag not in aliases:
            _add(parser, flag, key, spec, show=show_all)
    parser.add_argument("--help-all", action="store_true", help="every setting, with its long flag")


def long_flag(key: str) -> str:
    return "--" + key.replace(".", "-").replace("_", "-")


def parse_config_command(
    prog: str, description: str, example: str, aliases: Mapping[str, str], argv: Sequence[str]
) -> Config:
    """The whole command line of a service. Exits 0 after --help and --help-all, 2 on a mistake of spelling; raises
    ConfigError for wrong values."""
    show_all = "--help-all" in argv
    parser = new_parser(prog, description, example)
    add_config_flags(parser, aliases, show_all=show_all)
    if show_all:
        parser.print_help()
        parser.exit(0)
    return load_config(parser.parse_args(argv))


def load_config(given: argparse.Namespace) -> Config:
    """Merge file, environment and the flags in `given`."""
    known = settings.keys()
    flags = {key: value for key, value in vars(given).items() if key in known and value is not None}
    file_name = given.config or ""
    return settings.load(read_toml(file_name), os.environ, flags, file_name or "config file")


def read_toml(file_name: str) -> dict[str, Any]:
    if not file_name:
        return {}
    try:
        return tomllib.loads(Path(file_name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {file_name}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file_name} is not TOML: {error}"]) from None


def _add(parser: Parser, flag: str, key: str, spec: dataclasses.Field[Any], *, show: bool) -> None:
    kind = settings.field_type(key)
    if typing.get_origin(kind) is Literal:
        metavar = "|".join(typing.get_args(kind))
    else:
        metavar = "N" if kind in (int, float) else "TEXT"
        if kind is str and "bind" in key:
            metavar = "HOST:PORT"
    default = spec.default if spec.default is not dataclasses.MISSING else ""
    shown = ",".join(default) if isinstance(default, tuple) else default
    text = f"{spec.metadata['help']}{f' [{shown}]' if shown not in ('', None) else ''}".replace("%", "%%")
    parser.add_argument(flag, dest=key, metavar=metavar, help=text if show else argparse.SUPPRESS)


def complain(prog: str, problems: Sequence[str]) -> None:
    """One line a problem, on stderr."""
    for problem in problems:
        sys.stderr.write(f"{prog}: {problem}\n")
