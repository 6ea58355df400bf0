"""Sampling is pure: no torch, no model."""

from __future__ import annotations

import numpy as np
import pytest
from prfaas.services.engine.api import SamplingParams
from prfaas.services.engine.sampling import Draw, is_stop, sample

VOCABULARY = 5000
EOS = (2,)


def logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocabulary)).astype(np.float32)


def draw(position: int = 0, seed: int = 7, **params: object) -> Draw:
    return Draw(SamplingParams(**params), position, seed, EOS)  # type: ignore[arg-type]


def test_greedy_takes_the_largest_of_each_row() -> None:
    """Temperature 0 is argmax, in a batch of its own or mixed with rows that draw."""
    values = logits(3)
    largest = values.argmax(axis=1).tolist()
    assert sample(values, [draw(temperature=0)] * 3) == largest
    mixed = sample(values, [draw(temperature=0), draw(temperature=1), draw(temperature=0)])
    assert mixed[0] == largest[0]
    assert mixed[2] == largest[2]


@pytest.mark.parametrize("temperature", [1e-3, 1e-307, 5e-324])
def test_a_tiny_temperature_takes_the_largest(temperature: float) -> None:
    """Whatever a client may send: logits divided by it overflow, and a NaN would draw a token that doesn't exist."""
    values = logits(1)
    assert sample(values, [draw(temperature=temperature)]) == [int(values.argmax())]


def test_draws_follow_the_distribution() -> None:
    """Over many positions the tokens come as often as softmax(logits / temperature) says."""
    values = np.array([[0.0, 1.0, 2.0, -1.0]], dtype=np.float32)
    expected = np.exp(values[0] / 0.7)
    expected /= expected.sum()
    tokens = [sample(values, [draw(position, temperature=0.7)])[0] for position in range(4000)]
    assert np.bincount(tokens, minlength=4) / 4000 == pytest.approx(expected, abs=0.025)


def test_top_k_keeps_the_k_most_likely() -> None:
    """Nothing outside the k largest is drawn, and all of them are."""
    values = logits(1, vocabulary=50)
    allowed = set(np.argsort(values[0])[-3:].tolist())
    drawn = {sample(values, [draw(position, temperature=5, top_k=3)])[0] for position in range(200)}
    assert drawn == allowed


@pytest.mark.parametrize("vocabulary", [40, VOCABULARY])
@pytest.mark.parametrize("temperature", [1.0, 50.0])
def test_top_p_keeps_the_smallest_set_that_holds_p(vocabulary: int, temperature: float) -> None:
    """Only tokens of the nucleus are drawn, also when it is larger than the first guess (flat distributions)."""
    values = logits(1, vocabulary=vocabulary)
    weights = np.exp(values[0] / temperature)
    order = np.argsort(-weights)
    count = int(np.searchsorted(np.cumsum(weights[order]), 0.8 * weights.sum())) + 1
    drawn = {sample(values, [draw(position, temperature=temperature, top_p=0.8)])[0] for position in range(300)}
    assert drawn <= set(order[:count].tolist())
    assert len(drawn) > 1


def test_top_p_zero_is_greedy() -> None:
    """The nucleus is never empty."""
    values = logits(1)
    assert sample(values, [draw(temperature=1, top_p=0.0)]) == [int(values.argmax())]


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    """The same token alone, in any batch, and when the stream goes on elsewhere; another position or seed: anew."""
    values = np.repeat(logits(1), 8, axis=0)
    alone = [sample(values[:1], [draw(position, temperature=1)])[0] for position in range(8)]
    assert sample(values, [draw(position, temperature=1) for position in range(8)]) == alone
    assert sample(values, [draw(position, temperature=1) for position in reversed(range(8))]) == alone[::-1]
    assert len(set(alone)) > 1
    assert [sample(values[:1], [draw(position, seed=8, temperature=1)])[0] for position in range(8)] != alone


@pytest.mark.parametrize("seed", [0, -1, 1 << 63, (1 << 64) + 5])
def test_every_integer_is_a_seed(seed: int) -> None:
    """Negative and huge seeds draw like any other."""
    assert 0 <= sample(logits(1), [draw(seed=seed, temperature=1)])[0] < VOCABULARY


def test_no_end_before_min_tokens() -> None:
    """End-of-sequence and stop tokens can't come before min_tokens, greedy or drawn; after that they can."""
    values = np.full((1, 10), -5.0, dtype=np.float32)
    values[0, [2, 4]] = 50
    values[0, 7] = 1
    early = draw(position=2, temperature=0, min_tokens=3, stop_token_ids=(4, 999))
    assert sample(values, [early]) == [7]
    assert values[0, 2] == 50, "the caller's logits are left alone"
    assert sample(values, [draw(position=3, temperature=0, min_tokens=3)]) == [2]
    drawn = {sample(values, [draw(p, temperature=1, min_tokens=99, stop_token_ids=(4,))])[0] for p in range(50)}
    assert not drawn & {2, 4}


def test_what_ends_an_output() -> None:
    """End-of-sequence unless ignored; stop tokens always."""
    assert is_stop(2, SamplingParams(), EOS)
    assert not is_stop(2, SamplingParams(ignore_eos=True), EOS)
    assert is_stop(9, SamplingParams(ignore_eos=True, stop_token_ids=(9,)), EOS)
    assert not is_stop(3, SamplingParams(), EOS)
