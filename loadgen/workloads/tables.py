"""Tables in text: numbered lines into cells, and into numbers, with errors that name the line and the column."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from prfaas.common.errors import ConfigError

MAX_CELL = 1e9
MAX_UNKNOWN_NAMED = 5
Line = tuple[int, str]
"""Its number in the file, from 1, and its text without the end of line; see `lines.read_lines`."""


def csv_rows(lines: Iterable[Line], name: str, wanted: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells in the order of `wanted`) of each line after the header."""
    places: list[int] | None = None
    for number, text in lines:
        cells = [cell.strip().strip('"') for cell in text.split(",")]
        if places is None:
            places = _places(cells, name, number, wanted)
        elif len(cells) != len(wanted):
            raise ConfigError([f"{name} line {number}: {len(cells)} columns; the header has {len(wanted)}"])
        else:
            yield number, [cells[place] for place in places]
    if places is None:
        raise ConfigError([f"{name} is empty; its first line is {','.join(wanted)}"])


def _places(header: list[str], name: str, number: int, wanted: tuple[str, ...]) -> list[int]:
    unknown = [shown(column) for column in header if column not in wanted][:MAX_UNKNOWN_NAMED]
    missing = [column for column in wanted if column not in header]
    problems = [f"{name} line {number}: unknown column {column}" for column in unknown]
    problems += [f"{name} line {number}: no column {column}" for column in missing]
    if not problems and len(header) != len(wanted):
        problems.append(f"{name} line {number}: a column stands twice")
    if problems:
        problems[-1] += f"; the columns are {','.join(wanted)}"
        raise ConfigError(problems)
    return [header.index(column) for column in wanted]


def whole_cell(name: str, number: int, column: str, cell: str) -> int:
    # int() would take 1_000 and Arabic digits too.
    if not (cell.isascii() and cell.removeprefix("-").isdigit()) or len(cell) > 20:
        raise ConfigError([f"{name} line {number}: {column} is {shown(cell)}; it is a whole number"])
    return int(cell)


def decimal_cell(name: str, number: int, column: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_CELL:
        raise ConfigError([f"{name} line {number}: {column} is {shown(cell)}; it is a number, 0 or above"])
    return value


def shown(cell: str) -> str:
    return repr(cell if len(cell) <= 40 else cell[:40] + "…")
