"""Readers of public traces: lengths, times and block ids, no text.

- Mooncake JSONL (kvcache-ai/Mooncake, FAST '25): `timestamp` in ms, `input_length`, `output_length`, and `hash_ids`,
  one id for each block of 512 tokens of the prompt, equal ids meaning equal whole prefixes.
- Azure CSV (Azure/AzurePublicDataset): `TIMESTAMP`, `ContextTokens`, `GeneratedTokens`.
- ServeGen rates, CSV: `category`, `window_start_s`, `total_rate_req_per_s`.

A file may be plain or gzip. It is read line by line within the bounds of `lines.py`; the first line that is wrong ends
the reading with a ConfigError that names it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.arrivals import RateCurve
from prfaas.loadgen.workloads.lengths import MAX_LENGTH_TOKENS
from prfaas.loadgen.workloads.workload import MAX_REQUESTS, Workload

MOONCAKE_BLOCK_TOKENS = 512
MAX_BLOCK_IDS = 50_000_000
"""Of a whole trace: 400 MB."""
MAX_ID = 2**63 - 1
MAX_TIME_S = 1e9
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
RATE_COLUMNS = ("category", "window_start_s", "total_rate_req_per_s")

Line = tuple[int, str]
"""Its number in the file, from 1, and its text without the end of line."""


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Columns over requests, shape [n], in the order of time; `at_s` from 0 at the first. `block_ids[block_offsets[i] :
    block_offsets[i + 1]]` are request i's, ceil(prompt_tokens / block_tokens) of them; negative ones are nobody else's.
    """

    name: str
    at_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    block_tokens: int
    block_offsets: NDArray[np.int64]
    block_ids: NDArray[np.int64]
    raised_outputs: int = 0
    """Requests recorded with no output token; they have 1 here, since a request without a first token can't be sent."""


class _MooncakeRow(msgspec.Struct, forbid_unknown_fields=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def read_mooncake(lines: Iterable[Line], name: str, *, block_tokens: int = MOONCAKE_BLOCK_TOKENS) -> Trace:
    """`name` stands in errors. A row may have fewer `hash_ids` than blocks (or none): the others are nobody else's."""
    columns = _Columns(name, block_tokens)
    decoder = msgspec.json.Decoder(_MooncakeRow)
    for number, text in lines:
        try:
            row = decoder.decode(text)
        except msgspec.DecodeError as error:
            columns.refuse(number, _json_problem(error))
        if not 0 <= row.timestamp <= MAX_TIME_S * 1000:
            columns.refuse(number, f"timestamp is {row.timestamp:g}; it is in ms, 0 or above")
        columns.add(number, row.timestamp / 1000, row.input_length, row.output_length, row.hash_ids)
    return columns.trace()


def read_azure(lines: Iterable[Line], name: str, *, block_tokens: int = MOONCAKE_BLOCK_TOKENS) -> Trace:
    """The trace knows no prefixes, so every block is nobody else's."""
    columns = _Columns(name, block_tokens)
    zone: bool | None = None
    for number, cells in _csv_rows(lines, name, AZURE_COLUMNS):
        try:
            at = datetime.fromisoformat(cells[0])
        except ValueError:
            columns.refuse(number, f"TIMESTAMP is {_shown(cells[0])}; it is like 2023-11-16 18:15:46.6805900")
        if zone is not None and zone != (at.tzinfo is not None):
            columns.refuse(number, f"TIMESTAMP is {_shown(cells[0])}; all have a time zone, or none")
        zone = at.tzinfo is not None
        epoch = datetime(1970, 1, 1, tzinfo=at.tzinfo)
        prompt, output = (_whole(columns, number, *cell) for cell in zip(AZURE_COLUMNS[1:], cells[1:], strict=True))
        columns.add(number, (at - epoch).total_seconds(), prompt, output, [])
    return columns.trace()


def read_rates(lines: Iterable[Line], name: str, category: str | None = None) -> RateCurve:
    """The curve of one category, which may be left out where there is but one. After its last window it repeats."""
    windows: dict[str, list[tuple[float, float]]] = {}
    for number, (key, *cells) in _csv_rows(lines, name, RATE_COLUMNS):
        start_s, rate = (_decimal(name, number, *cell) for cell in zip(RATE_COLUMNS[1:], cells, strict=True))
        windows.setdefault(key, []).append((start_s, rate))
    if not windows:
        raise ConfigError([f"{name} has no windows"])
    known = ", ".join(sorted(windows))
    if category is None and len(windows) > 1:
        raise ConfigError([f"{name} has several categories: {known}; name one of them"])
    if category is not None and category not in windows:
        raise ConfigError([f"{name} has no category {_shown(category)}; it has {known}"])
    starts_s, rates = np.array(sorted(windows[category or known])).T
    if starts_s.size < 2:
        raise ConfigError([f"{name} has a single window of {category or known}; a curve needs at least two"])
    width_s = float(np.median(np.diff(starts_s)))
    try:
        return RateCurve(starts_s - starts_s[0], rates, float(starts_s[-1] - starts_s[0]) + width_s)
    except ConfigError as error:
        raise ConfigError([f"{name}: {problem}" for problem in error.problems]) from None


def write_mooncake(workload: Workload) -> Iterator[bytes]:
    """The workload as lines of Mooncake's JSONL, for other tools that read it. Raises ConfigError for requests without
    a time of their own (later turns, a closed loop)."""
    if np.isnan(workload.arrival_s).any():
        raise ConfigError(
            [f"{workload.name}: a trace has a time for each request; later turns and a closed loop have none"]
        )
    for request in workload:
        row = {
            "timestamp": round(request.arrival_s * 1000, 3),
            "input_length": request.prompt_tokens,
            "output_length": request.output_tokens,
            "hash_ids": workload.prefixes.block_ids(request.index).tolist(),
        }
        yield msgspec.json.encode(row) + b"\n"


class _Columns:
    """Collects rows, and says which line is wrong."""

    def __init__(self, name: str, block_tokens: int) -> None:
        if not 1 <= block_tokens <= MAX_LENGTH_TOKENS:
            raise ConfigError([f"a block has 1 to {MAX_LENGTH_TOKENS:,} tokens, not {block_tokens:,}"])
        self._name = name
        self._block_tokens = block_tokens
        self._at_s: list[float] = []
        self._prompts: list[int] = []
        self._outputs: list[int] = []
        self._ids: list[NDArray[np.int64]] = []
        self._id_count = 0
        self._fresh = 0
        self._raised = 0

    def refuse(self, number: int, problem: str) -> NoReturn:
        raise ConfigError([f"{self._name} line {number}: {problem}"])

    def add(self, number: int, at_s: float, prompt: int, output: int, ids: Sequence[int]) -> None:
        if len(self._at_s) == MAX_REQUESTS:
            self.refuse(number, f"more than {MAX_REQUESTS:,} requests; cut the trace")
        if not 1 <= prompt <= MAX_LENGTH_TOKENS:
            self.refuse(number, f"the input length is {prompt}; it is from 1 to {MAX_LENGTH_TOKENS:,} tokens")
        if not 0 <= output <= MAX_LENGTH_TOKENS:
            self.refuse(number, f"the output length is {output}; it is from 0 to {MAX_LENGTH_TOKENS:,} tokens")
        blocks = -(-prompt // self._block_tokens)
        self._id_count += blocks
        if self._id_count > MAX_BLOCK_IDS:
            self.refuse(number, f"more than {MAX_BLOCK_IDS:,} blocks; cut the trace, or take larger blocks")
        if len(ids) > blocks:
            self.refuse(
                number,
                f"{len(ids)} hash_ids for {prompt} tokens; blocks of {self._block_tokens} tokens make it {blocks}",
            )
        if ids and not 0 <= min(ids) <= max(ids) <= MAX_ID:
            self.refuse(number, f"a hash_id is {min(ids)}; they are from 0 to 2^63 - 1")
        own = blocks - len(ids)
        fresh = np.arange(-1 - self._fresh, -1 - self._fresh - own, -1, dtype=np.int64)
        self._fresh += own
        self._ids.append(np.concatenate((np.array(ids, np.int64), fresh)))
        self._at_s.append(at_s)
        self._prompts.append(prompt)
        self._outputs.append(max(output, 1))
        self._raised += output == 0

    def trace(self) -> Trace:
        if not self._at_s:
            raise ConfigError([f"{self._name} has no requests"])
        at_s = np.array(self._at_s)
        order = np.argsort(at_s, kind="stable")
        ids = [self._ids[i] for i in order.tolist()]
        return Trace(
            name=self._name,
            at_s=at_s[order] - at_s[order[0]],
            prompt_tokens=np.array(self._prompts, np.int64)[order],
            output_tokens=np.array(self._outputs, np.int64)[order],
            block_tokens=self._block_tokens,
            block_offsets=np.concatenate(([0], np.cumsum([part.size for part in ids]))),
            block_ids=np.concatenate(ids),
            raised_outputs=self._raised,
        )


def _csv_rows(lines: Iterable[Line], name: str, wanted: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
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
    header[0] = header[0].removeprefix("\ufeff")
    unknown = [_shown(column) for column in header if column not in wanted]
    missing = [column for column in wanted if column not in header]
    problems = [f"{name} line {number}: unknown column {column}" for column in unknown]
    problems += [f"{name} line {number}: no column {column}" for column in missing]
    if not problems and len(header) != len(wanted):
        problems.append(f"{name} line {number}: a column stands twice")
    if problems:
        problems[-1] += f"; the columns are {','.join(wanted)}"
        raise ConfigError(problems)
    return [header.index(column) for column in wanted]


def _whole(columns: _Columns, number: int, column: str, cell: str) -> int:
    # int() would take 1_000 and Arabic digits too.
    if not (cell.isascii() and cell.removeprefix("-").isdigit()) or len(cell) > 20:
        columns.refuse(number, f"{column} is {_shown(cell)}; it is a whole number")
    return int(cell)


def _decimal(name: str, number: int, column: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_TIME_S:
        raise ConfigError([f"{name} line {number}: {column} is {_shown(cell)}; it is a number, 0 or above"])
    return value


def _json_problem(error: msgspec.DecodeError) -> str:
    text = str(error)
    if "unknown field" in text:
        return f"unknown column {text.split('`')[1]}; the columns are timestamp, input_length, output_length, hash_ids"
    if "missing required field" in text:
        return f"no column {text.split('`')[1]}; the columns are timestamp, input_length, output_length, hash_ids"
    return text[0].lower() + text[1:] if isinstance(error, msgspec.ValidationError) else f"not JSON: {text}"


def _shown(cell: str) -> str:
    return repr(cell if len(cell) <= 40 else cell[:40] + "…")
