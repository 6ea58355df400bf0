"""What goes into a simulation and what comes out of it: requests in columns, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError
from prfaas.common.scheduling.types import PrefixMatches

MAX_REQUESTS = 100_000_000
DONE, REFUSED, FAILED = 5, 6, 8
"""Of `Outcome.status`."""


class PrefixCaches(Protocol):
    """What the regions' pools hold; `i` is the request's index in the load."""

    def matches(self, i: int) -> PrefixMatches | None: ...

    def prefilled(self, i: int, region: int, node: int) -> None:
        """The prompt's KV is complete in this region, on this node."""
        ...

    def decoded(self, i: int, region: int) -> None:
        """So is that of its output."""
        ...


@dataclass(frozen=True)
class Load:
    """Requests in order of arrival, one entry each. arrival_s: non-decreasing. home_region: index of the region that
    must decode, −1 = any; None = any for all. Raises ConfigError for what is none of this."""

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    home_region: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        count = self.arrival_s.size
        if not 1 <= count <= MAX_REQUESTS:
            raise ConfigError([f"{count} requests; a simulation has 1 to {MAX_REQUESTS}"])
        if self.prompt_tokens.size != count or self.output_tokens.size != count:
            raise ConfigError(["arrival_s, prompt_tokens and output_tokens must be of one length"])
        for name, least in (("prompt_tokens", 1), ("output_tokens", 1), ("arrival_s", 0)):
            column = getattr(self, name)
            if (wrong := np.flatnonzero(~(column >= least))).size:
                raise ConfigError(
                    [f"request {wrong[0] + 1}: {name} is {column[wrong[0]]}; it must be at least {least}"]
                )
        if (wrong := np.flatnonzero(np.diff(self.arrival_s) < 0)).size:
            raise ConfigError([f"request {wrong[0] + 2} arrives before the one ahead of it"])


@dataclass(slots=True)
class Outcome:
    """What became of each request, one entry each; NaN where it didn't get there. Instants on the load's clock."""

    index: NDArray[np.int64]
    """In the load."""
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    status: NDArray[np.int8]
    """DONE, REFUSED, or FAILED: its KV is on a link that doesn't carry any more."""
    prefill_node: NDArray[np.int32]
    """−1: none, or the decode node itself."""
    decode_node: NDArray[np.int32]
    offloaded: NDArray[np.int8]
    retries: NDArray[np.int32]
    cached_tokens: NDArray[np.int64]
    prefill_start_s: NDArray[np.float64]
    prefill_s: NDArray[np.float64]
    """Bare, of the pool that served it."""
    kv_ready_s: NDArray[np.float64]
    joined_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    second_token_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    wire_bytes: NDArray[np.float64]
    """Of its own transfer."""
    fetched_bytes: NDArray[np.float64]
    """On the wire of the prefixes that were fetched for it."""
    reason: NDArray[np.int32]
    """Of the last decision or refusal; indices into `reasons`."""
    reasons: dict[str, int]
    """How often each reason of a decision or refusal was given."""
    link_bytes: dict[tuple[str, str], float]
    """What crossed each link, cancelled transfers and fetched prefixes included."""
    wire_ratio: float
    """Bytes on the wire for a byte of KV."""
    busy_prefill_s: float
    """Seconds of prefill that were begun and not lost."""


class Source(Protocol):
    """When requests come that depend on when others end (`workloads.schedule.Schedule`)."""

    def due(self, now_s: float) -> Sequence[DueRequest]: ...

    def next_s(self) -> float: ...

    def ended(self, index: int, now_s: float, *, go_on: bool = True) -> int: ...


class DueRequest(Protocol):
    @property
    def index(self) -> int: ...

    @property
    def scheduled_s(self) -> float: ...
