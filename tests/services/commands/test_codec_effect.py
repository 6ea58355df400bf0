"""What `prfaas bench codec` calls the effect of a lossy codec: its definitions, on a model that is a formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from prfaas.services.commands import codec_effect
from prfaas.services.commands.codec_effect import Case, Comparison, Effect, Logits
from prfaas.services.kv_file import Prompt

VOCABULARY = 8


class FormulaModel:
    """The next token is the last one + 1, more likely the larger the KV's first byte; KV that begins with 0 makes it
    the last one + 2. The batches that it was given are kept."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def _logits(self, kv: bytes | bytearray, last: int) -> Logits:
        logits = np.zeros(VOCABULARY, np.float32)
        logits[(last + (1 if kv[0] else 2)) % VOCABULARY] = kv[0] or 1
        return logits

    def logits(self, prompt: Prompt, continuation: Sequence[int]) -> Iterator[Logits]:
        assert continuation, "the engine has no place to put no token"
        fed = [prompt.token_ids[-1], *continuation[:-1]]
        for at in range(0, len(fed), 3):  # in blocks, as the engine gives them
            yield np.stack([self._logits(prompt.kv, last) for last in fed[at : at + 3]])

    def greedy(
        self, prompts: Sequence[Prompt], output_tokens: int, counted: Callable[[int, int], None]
    ) -> list[list[int]]:
        self.batches.append(len(prompts))
        outputs = []
        for prompt in prompts:
            tokens = [prompt.token_ids[-1]]
            for _ in range(output_tokens):
                tokens.append(int(self._logits(prompt.kv, tokens[-1]).argmax()))
            outputs.append(tokens[1:])
        return outputs


def silent(what: str, done: int, total: int) -> None:
    pass


def measure(lossy: dict[str, bytes], text: Sequence[int] = (), free: Sequence[str] | None = None) -> dict[str, Effect]:
    case = Case([5, 6, 7], b"\3", lossy, text)
    return codec_effect.measure(FormulaModel(), [case], list(lossy) if free is None else free, 10, silent)


def test_kv_that_did_not_change_has_no_effect() -> None:
    effect = measure({"same": b"\3"}, [1, 2, 3, 4])["same"].report()
    assert effect["greedy_same"] == 1.0
    assert effect["first_change"] == [10]
    for compared in (effect["continuation"], effect["text"]):
        assert (compared["kl_nats"], compared["top1_same"], compared["perplexity_change"]) == (0.0, 1.0, 0.0)


def test_a_flatter_distribution_shows_in_kl_and_perplexity_only() -> None:
    """Logits 3 and 1 for the likely token of 8: the figures are what the definitions say."""
    effect = measure({"flat": b"\1"})["flat"].report()
    exact, flat = [[math.exp(x) / (math.exp(x) + 7), 1 / (math.exp(x) + 7)] for x in (3, 1)]
    kl = exact[0] * math.log(exact[0] / flat[0]) + 7 * exact[1] * math.log(exact[1] / flat[1])
    found = effect["continuation"]
    assert found["kl_nats"] == pytest.approx(kl, rel=1e-5)
    assert found["perplexity_exact"] == pytest.approx(1 / exact[0], rel=1e-5)
    assert found["perplexity_change"] == pytest.approx(exact[0] / flat[0] - 1, rel=1e-5)
    assert (found["top1_same"], effect["greedy_same"]) == (1.0, 1.0)


def test_another_most_likely_token_shows_everywhere() -> None:
    effect = measure({"broken": b"\0"})["broken"].report()
    assert effect["first_change"] == [0]
    assert effect["greedy_same"] < 0.5
    assert effect["continuation"]["top1_same"] == 0.0


def test_greedy_is_judged_by_position_and_until_the_first_change() -> None:
    effect = Effect()
    effect.note_greedy([1, 2, 3, 4], [1, 2, 9, 4])
    effect.note_greedy([1, 2, 3, 4], [1, 2, 3, 4])
    assert (effect.report()["greedy_same"], effect.report()["first_change"]) == (7 / 8, [2, 4])


def test_positions_of_all_prompts_count_alike() -> None:
    """Not the mean of means: three positions of one prompt weigh three times one of another."""
    comparison = Comparison()
    sure, unsure = np.log(np.array([[0.9, 0.1]], np.float32)), np.log(np.array([[0.5, 0.5]], np.float32))
    comparison.note(np.repeat(sure, 3, 0), np.repeat(sure, 3, 0), np.array([0, 0, 0]))
    comparison.note(sure, unsure, np.array([0]))
    kl = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    report = comparison.report()
    assert report is not None
    assert report["kl_nats"] == pytest.approx(kl / 4, rel=1e-5)


def test_without_text_after_the_prompt_only_the_continuation_is_compared() -> None:
    assert measure({"same": b"\3"})["same"].report()["text"] is None


def test_a_variant_that_does_not_run_freely_is_compared_all_the_same() -> None:
    effects = measure({"a": b"\3", "a key": b"\1"}, free=["a"])
    assert effects["a key"].report()["greedy_same"] is None
    assert effects["a key"].report()["continuation"]["kl_nats"] > 0


def test_prompts_decode_in_batches_of_bounded_size_with_their_reference() -> None:
    model = FormulaModel()
    cases = [Case([i], b"\3", {"x": b"\1"}, ()) for i in range(20)]
    codec_effect.measure(model, cases, ["x"], 4, silent)
    assert model.batches == [32, 8]
