"""Workloads made of distributions: single requests, shared prefixes, conversations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.arrivals import Load
from prfaas.loadgen.workloads.lengths import MAX_LENGTH_TOKENS, Lengths
from prfaas.loadgen.workloads.prefixes import DEFAULT_BLOCK_TOKENS, NO_GROUP, StreamPrefixes
from prfaas.loadgen.workloads.rngs import Rngs
from prfaas.loadgen.workloads.workload import MAX_REQUESTS, Workload

MAX_TURNS = 10_000
MAX_SHARED_PREFIXES = 1_000_000
CONVERSATIONS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """`count` prefixes of `tokens` each, one of which every conversation (or single request) begins with. `zipf` is the
    exponent of their popularity: the k-th is chosen in proportion to k^−zipf; 0 = all alike."""

    count: int = 0
    tokens: int = 0
    zipf: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.count <= MAX_SHARED_PREFIXES:
            problems.append(f"shared prefixes number 0 to {MAX_SHARED_PREFIXES:,}, not {self.count:,}")
        if not 0 <= self.tokens <= MAX_LENGTH_TOKENS:
            problems.append(f"a shared prefix has 0 to {MAX_LENGTH_TOKENS:,} tokens, not {self.tokens:,}")
        if not (math.isfinite(self.zipf) and self.zipf >= 0):
            problems.append(f"the Zipf exponent of shared prefixes is 0 or above, not {self.zipf:g}")
        if problems:
            raise ConfigError(problems)

    def choose(self, n: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """The prefix of each of `n` conversations, shape [n]; NO_GROUP when there are none."""
        if not self.count or not self.tokens:
            return np.full(n, NO_GROUP, np.int32)
        share = np.cumsum(np.arange(1, self.count + 1, dtype=np.float64) ** -self.zipf)
        chosen = np.searchsorted(share, rng.random(n) * share[-1], side="right")
        return np.asarray(np.minimum(chosen, self.count - 1), np.int32)


@dataclass(frozen=True, slots=True)
class Turns:
    """Turns a conversation and the time between them, both normal and cut off below, as in aiperf: at least 1 turn, at
    least 0 seconds. One turn without spread: single requests."""

    mean: float = 1.0
    stddev: float = 0.0
    think_mean_s: float = 0.0
    think_stddev_s: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.mean <= MAX_TURNS:
            problems.append(f"a conversation has 1 to {MAX_TURNS:,} turns, not {self.mean:g}")
        for what, value in (("turns", self.stddev), ("think times", self.think_stddev_s)):
            if not 0 <= value < math.inf:
                problems.append(f"the standard deviation of {what} is 0 or above, not {value:g}")
        if not 0 <= self.think_mean_s < math.inf:
            problems.append(f"a think time is 0 or above, not {self.think_mean_s:g} s")
        if problems:
            raise ConfigError(problems)

    def counts(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        drawn = np.rint(self.mean + self.stddev * rng.standard_normal(n))
        return np.clip(drawn, 1, MAX_TURNS).astype(np.int64)

    def think_s(self, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
        return np.maximum(self.think_mean_s + self.think_stddev_s * rng.standard_normal(n), 0.0)


@dataclass(frozen=True, slots=True)
class SyntheticShape:
    """What the requests look like. `input_lengths`: tokens that a turn adds, after the shared prefix. A turn's prompt
    is the prefix, everything said before, outputs included, and the new tokens; a conversation ends before a turn whose
    prompt and output would be longer than `max_context_tokens`."""

    input_lengths: Lengths
    output_lengths: Lengths
    prefixes: SharedPrefixes = field(default_factory=SharedPrefixes)
    turns: Turns = field(default_factory=Turns)
    max_context_tokens: int = MAX_LENGTH_TOKENS
    block_tokens: int = DEFAULT_BLOCK_TOKENS

    def __post_init__(self) -> None:
        if self.block_tokens < 1:
            raise ConfigError([f"a block has at least 1 token, not {self.block_tokens}"])
        longest = self.prefixes.tokens * (self.prefixes.count > 0) + self.input_lengths.high + self.output_lengths.high
        if longest > self.max_context_tokens:
            raise ConfigError(
                [
                    f"a first turn can have {longest:,} tokens with its output, above the context of "
                    f"{self.max_context_tokens:,}; shorten the lengths or raise the context"
                ]
            )


def synthetic_workload(
    name: str,
    shape: SyntheticShape,
    load: Load,
    rngs: Rngs,
    *,
    requests: int | None = None,
    conversations: int | None = None,
) -> Workload:
    """So many conversations, or else so many requests (the last conversation may be cut short by the count), or, when
    both are None, as many as come before `load.until_s`."""
    if requests is None and conversations is None:
        requests = load.enough()
    conversation, turn, new, output, said = _draw(shape, requests, conversations, rngs)
    n = conversation.size
    count = int(conversation[-1]) + 1
    group = shape.prefixes.choose(count, rngs.prefix_choice)[conversation]
    shared = np.where(group == NO_GROUP, 0, shape.prefixes.tokens)
    think_s = np.where(turn > 0, shape.turns.think_s(n, rngs.thinking), 0.0)
    arrival_s = np.full(n, np.nan)
    arrival_s[turn == 0] = load.times(count, rngs.arrivals, share=count / n)
    kept = n
    if load.rate is not None and not math.isinf(load.until_s):
        starts = np.flatnonzero(turn == 0)
        late = np.flatnonzero(arrival_s[starts] > load.until_s)
        kept = int(starts[late[0]]) if late.size else n
    if not kept:
        raise ConfigError([f"{name}: no request arrives within {load.until_s:g} s; raise the rate or the duration"])
    return Workload(
        name=name,
        arrival_s=arrival_s[:kept],
        prompt_tokens=(shared + said + new)[:kept],
        output_tokens=output[:kept],
        conversation=conversation[:kept],
        turn=turn.astype(np.int32)[:kept],
        think_s=think_s[:kept],
        prefixes=StreamPrefixes(
            block_tokens=shape.block_tokens,
            group_tokens=np.full(shape.prefixes.count, shape.prefixes.tokens, np.int64),
            group=group[:kept],
            own=conversation[:kept],
            own_tokens=(said + new)[:kept],
            new_tokens=new[:kept],
            output_tokens=output[:kept],
        ),
        content_seed=rngs.content_seed,
        max_concurrency=load.max_concurrency,
        until_s=load.until_s,
    )


def _draw(
    shape: SyntheticShape, requests: int | None, conversations: int | None, rngs: Rngs
) -> tuple[NDArray[np.int64], ...]:
    """(conversation, turn, new tokens, output tokens, tokens said before), columns over requests."""
    if conversations is not None:
        requests = None
    wanted = requests if conversations is None else conversations
    assert wanted is not None
    if not 1 <= wanted <= MAX_REQUESTS:
        raise ConfigError([f"a workload has 1 to {MAX_REQUESTS:,} requests, not {wanted:,}"])
    batches: list[tuple[NDArray[np.int64], ...]] = []
    drawn = total = done = 0
    while done < wanted:
        most = wanted - done if shape.turns == Turns() else min(wanted - done, CONVERSATIONS_AT_ONCE)
        batches.append(_batch(shape, most, drawn, rngs))
        drawn += most
        total += batches[-1][0].size
        if total > MAX_REQUESTS:
            raise ConfigError([f"a workload has at most {MAX_REQUESTS:,} requests; ask for fewer conversations"])
        done = total if requests is not None else drawn
    columns = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
    return tuple(column[:requests] for column in columns)


def _batch(shape: SyntheticShape, conversations: int, first: int, rngs: Rngs) -> tuple[NDArray[np.int64], ...]:
    """(conversation, turn, new tokens, output tokens, tokens said before) of whole conversations, first … onwards."""
    counts = shape.turns.counts(conversations, rngs.turns)
    total = int(counts.sum())
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    conversation = np.repeat(np.arange(first, first + conversations), counts)
    turn = np.arange(total) - starts
    new = shape.input_lengths.sample(total, rngs.input_lengths)
    output = shape.output_lengths.sample(total, rngs.output_lengths)
    before = np.concatenate(([0], np.cumsum(new + output)))
    said = before[:-1] - before[starts]
    shared = shape.prefixes.tokens if shape.prefixes.count else 0
    fits = shared + said + new + output <= shape.max_context_tokens
    return conversation[fits], turn[fits], new[fits], output[fits], said[fits]
