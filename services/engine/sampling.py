"""From logits to token ids, on numpy: pure, and the same whatever else is in the batch.

A draw is keyed by (seed, output position), not by a stream of random numbers: a request that goes on in another batch,
on another node or after a restart draws the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import EngineError
from prfaas.services.engine.api import SamplingParams

_SEED_MASK = (1 << 64) - 1
# Sorting a whole vocabulary costs milliseconds; nearly always this many of the largest hold the top_p mass.
_NUCLEUS_GUESS = 1024


@dataclass(frozen=True, slots=True)
class Draw:
    """One row's wishes. `position` counts output tokens from 0; `seed` is the request's, or one the engine drew."""

    params: SamplingParams
    position: int
    seed: int
    eos_token_ids: tuple[int, ...] = ()


def is_stop(token_id: int, params: SamplingParams, eos_token_ids: Sequence[int]) -> bool:
    """Whether this token ends the output (it is not part of it)."""
    return token_id in params.stop_token_ids or (not params.ignore_eos and token_id in eos_token_ids)


def sample(logits: NDArray[np.float32], draws: Sequence[Draw]) -> list[int | EngineError]:
    """One token id a row, or why this row, and no other, has none. logits: float32 [rows, vocabulary], left unchanged.

    Logits that are not finite are an error of their row: a NaN would be drawn as a token that does not exist.
    """
    return [_token_or_error(row, draw) for row, draw in zip(logits, draws, strict=True)]


def _token_or_error(logits: NDArray[np.float32], draw: Draw) -> int | EngineError:
    try:
        return _sample_row(logits, draw)
    except Exception as error:  # whatever it is, the other rows have done nothing wrong
        return EngineError(f"no token could be sampled: {error}")


def _banned(draw: Draw) -> tuple[int, ...]:
    """Tokens that would end the output before min_tokens."""
    if draw.position >= draw.params.min_tokens:
        return ()
    return draw.params.stop_token_ids + (() if draw.params.ignore_eos else draw.eos_token_ids)


def _sample_row(logits: NDArray[np.float32], draw: Draw) -> int:
    banned = [token for token in _banned(draw) if 0 <= token < logits.size]
    if banned:
        logits = logits.copy()
        logits[banned] = -np.inf
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):  # argmax finds a NaN before anything else
        raise EngineError(f"the model's logits have {logits[best]} as their largest")
    if draw.params.temperature <= 0:
        return best
    return _draw(_weights(logits, draw.params), draw)


def _weights(logits: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    """Unnormalised probabilities, zero where top_k or top_p cut; in vocabulary order."""
    below = logits.astype(np.float64) - logits.max()
    with np.errstate(over="ignore"):  # a temperature of 1e-307 makes all but the largest -inf, which is right
        weights: NDArray[np.float64] = np.exp(below / params.temperature)
    if 0 < params.top_k < weights.size:
        keep = np.argpartition(weights, weights.size - params.top_k)[-params.top_k :]
        cut = np.zeros_like(weights)
        cut[keep] = weights[keep]
        weights = cut
    if params.top_p < 1:
        keep = _nucleus(weights, params.top_p)
        cut = np.zeros_like(weights)
        cut[keep] = weights[keep]
        weights = cut
    return weights


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Indices of the fewest largest weights that hold at least `top_p` of the mass; never none."""
    wanted = top_p * weights.sum()
    guess = min(_NUCLEUS_GUESS, weights.size)
    largest = np.argpartition(weights, weights.size - guess)[-guess:]
    if weights[largest].sum() < wanted:
        largest = np.arange(weights.size)
    # Ties in vocabulary order, so that the cut does not depend on how the partition left them.
    ordered = largest[np.lexsort((largest, -weights[largest]))]
    count = int(np.searchsorted(np.cumsum(weights[ordered]), wanted)) + 1
    return ordered[:count]


def _draw(weights: NDArray[np.float64], draw: Draw) -> int:
    """By inverse distribution: rounding in the logits moves a boundary a little and changes hardly any draw."""
    key = np.array([draw.seed & _SEED_MASK, draw.position], dtype=np.uint64)
    cumulative = np.cumsum(weights)
    point = np.random.Generator(np.random.Philox(key=key)).random() * cumulative[-1]
    return int(np.searchsorted(cumulative, point, side="right"))
