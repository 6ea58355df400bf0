"""A workload: the requests of one run, in columns, the same for every system that is given them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.prefixes import Prefixes

MAX_REQUESTS = 10_000_000
"""Of one workload: some 600 MB of columns."""
ROWS_AT_ONCE = 65_536


class Request(msgspec.Struct, frozen=True, gc=False):
    """One row. `index` is its place in the workload, by which `Workload.prefixes` and `prompts.py` know it."""

    index: int
    arrival_s: float
    """After the workload's beginning. NaN: it has no time of its own (a later turn, or a closed loop)."""
    prompt_tokens: int
    output_tokens: int
    conversation: int
    turn: int
    """0 = the first. Later turns follow the request with the index before theirs."""
    think_s: float
    """Between the end of the turn before and this one's sending; 0 in first turns."""


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Columns over requests, all of shape [n] and read-only.

    Turns of a conversation stand together, in order. First turns stand in the order of their arrival. `arrival_s`
    float64, NaN where a request has no time of its own: later turns, and all requests of a closed loop, where
    `max_concurrency` users take the next conversation when theirs ends. With arrival times, `max_concurrency` is a cap
    on the requests in flight (None = none). `schedule.Schedule` is the state machine of that.
    """

    name: str
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    conversation: NDArray[np.int64]
    turn: NDArray[np.int32]
    think_s: NDArray[np.float64]
    prefixes: Prefixes
    content_seed: int
    max_concurrency: int | None = None
    until_s: float = math.inf
    """Nothing is sent that is scheduled later."""

    def __post_init__(self) -> None:
        n = self.prompt_tokens.size
        if not 1 <= n <= MAX_REQUESTS:
            raise ConfigError([f"{self.name}: a workload has 1 to {MAX_REQUESTS:,} requests, not {n:,}"])
        for column in self._columns():
            if column.shape != (n,):
                raise ValueError(f"a column of shape {column.shape} in a workload of {n} requests")
            column.flags.writeable = False

    def __len__(self) -> int:
        return int(self.prompt_tokens.size)

    def __getitem__(self, index: int) -> Request:
        """Raises IndexError outside 0 … len − 1."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return next(self._rows(index, index + 1))

    def __iter__(self) -> Iterator[Request]:
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield from self._rows(start, min(start + ROWS_AT_ONCE, len(self)))

    @property
    def closed_loop(self) -> bool:
        return math.isnan(self.arrival_s[0])

    @property
    def conversations(self) -> int:
        return int(np.count_nonzero(self.turn == 0))

    def _columns(self) -> tuple[NDArray[np.float64] | NDArray[np.int64] | NDArray[np.int32], ...]:
        return (
            self.arrival_s,
            self.prompt_tokens,
            self.output_tokens,
            self.conversation,
            self.turn,
            self.think_s,
        )

    def _rows(self, start: int, end: int) -> Iterator[Request]:
        # Lists of Python numbers: reading numpy scalars one by one costs ten times as much.
        columns = (column[start:end].tolist() for column in self._columns())
        return map(Request, range(start, end), *columns)
