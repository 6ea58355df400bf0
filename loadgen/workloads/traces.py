"""Readers of public traces: lengths, times and block ids, no text.

- Mooncake JSONL (kvcache-ai/Mooncake, FAST '25): `timestamp` in ms, `input_length`, `output_length`, and `hash_ids`,
  one id for each block of 512 tokens of the prompt, equal ids meaning equal whole prefixes.
- Azure CSV (Azure/AzurePublicDataset): `TIMESTAMP`, `ContextTokens`, `GeneratedTokens`.

A file may be plain or gzip. It is read line by line within the bounds of `lines.py`; the first line that is wrong ends
the reading with a ConfigError that names it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.lengths import MAX_LENGTH_TOKENS
from prfaas.loadgen.workloads.tables import Line, csv_rows, shown, whole_cell
from prfaas.loadgen.workloads.workload import MAX_REQUESTS, Workload

MOONCAKE_BLOCK_TOKENS = 512
MAX_BLOCK_IDS = 50_000_000
"""Of a whole trace: 400 MB."""
MAX_ID = 2**63 - 1
MAX_TIME_S = 1e9
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


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
    for number, cells in csv_rows(lines, name, AZURE_COLUMNS):
        try:
            at = datetime.fromisoformat(cells[0])
        except ValueError:
            columns.refuse(number, f"TIMESTAMP is {shown(cells[0])}; it is like 2023-11-16 18:15:46.6805900")
        if zone is not None and zone != (at.tzinfo is not None):
            columns.refuse(number, f"TIMESTAMP is {shown(cells[0])}; all have a time zone, or none")
        zone = at.tzinfo is not None
        epoch = datetime(1970, 1, 1, tzinfo=at.tzinfo)
        prompt, output = (whole_cell(name, number, *cell) for cell in zip(AZURE_COLUMNS[1:], cells[1:], strict=True))
        columns.add(number, (at - epoch).total_seconds(), prompt, output, [])
    return columns.trace()


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
        # Typed arrays: lists of ten million Python numbers would be gigabytes.
        self._at_s = array("d")
        self._prompts = array("q")
        self._outputs = array("q")
        self._offsets = array("q", [0])
        self._ids = array("q")
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
        if len(self._ids) + blocks > MAX_BLOCK_IDS:
            self.refuse(number, f"more than {MAX_BLOCK_IDS:,} blocks; cut the trace, or take larger blocks")
        if len(ids) > blocks:
            self.refuse(
                number,
                f"{len(ids)} hash_ids for {prompt} tokens; blocks of {self._block_tokens} tokens make it {blocks}",
            )
        if ids and not 0 <= min(ids) <= max(ids) <= MAX_ID:
            self.refuse(number, f"a hash_id is {min(ids)}; they are from 0 to 2^63 - 1")
        self._ids.extend(ids)
        fresh = self._fresh + blocks - len(ids)
        self._ids.extend(range(-1 - self._fresh, -1 - fresh, -1))
        self._fresh = fresh
        self._offsets.append(len(self._ids))
        self._at_s.append(at_s)
        self._prompts.append(prompt)
        self._outputs.append(max(output, 1))
        self._raised += output == 0

    def trace(self) -> Trace:
        if not self._at_s:
            raise ConfigError([f"{self._name} has no requests"])
        at_s, ids = np.array(self._at_s), np.array(self._ids)
        offsets = np.array(self._offsets)
        order = np.argsort(at_s, kind="stable")
        if np.any(np.diff(order) < 0):
            ids = np.concatenate([ids[offsets[i] : offsets[i + 1]] for i in order.tolist()])
            offsets = np.concatenate(([0], np.cumsum(np.diff(offsets)[order])))
        return Trace(
            name=self._name,
            at_s=at_s[order] - at_s[order[0]],
            prompt_tokens=np.array(self._prompts)[order],
            output_tokens=np.array(self._outputs)[order],
            block_tokens=self._block_tokens,
            block_offsets=offsets,
            block_ids=ids,
            raised_outputs=self._raised,
        )


def _json_problem(error: msgspec.DecodeError) -> str:
    text = str(error)
    if "unknown field" in text:
        return f"unknown column {text.split('`')[1]}; the columns are timestamp, input_length, output_length, hash_ids"
    if "missing required field" in text:
        return f"no column {text.split('`')[1]}; the columns are timestamp, input_length, output_length, hash_ids"
    return text[0].lower() + text[1:] if isinstance(error, msgspec.ValidationError) else f"not JSON: {text}"
