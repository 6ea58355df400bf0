"""What a lossy codec does to the model's output. For each prompt of n tokens, with KV of its first n − 1 tokens:

    reference        greedy continuation c of N tokens from exact KV
    greedy           greedy continuation from the KV that went through the codec, in the same decode batch:
                     greedy_same    share of the N positions that have the reference's token
                     first_change   tokens before the first that differs (N: none)
    teacher-forced   c is given, token by token, over both KVs:
                     kl_nats        mean over positions of KL(exact || lossy) of the next token's distribution
                     top1_same      share of positions with the same most likely token
                     perplexity     of c, exp of the mean −log p
    text             kl_nats, top1_same and perplexity, given how the text really goes on after the prompt

A greedy continuation that has changed once is another text, so greedy_same says mostly when that happened, and one
near-tie decides it. A small model's greedy text also falls into loops, which are easy to predict. The figures on the
real text are the steadiest, and the strictest.

`Model` is what the engine gives (services/engine/transformers/offline.py); nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from prfaas.services.kv_file import Prompt

Logits = NDArray[np.float32]
_MAX_BATCH_ROWS = 32
_MAX_BATCH_BYTES = 2 << 30
"""Of KV in one batch, all variants together."""


class Model(Protocol):
    def logits(self, prompt: Prompt, continuation: Sequence[int]) -> Iterable[Logits]:
        """Blocks of [positions, vocabulary], one row for each token of the continuation, in order."""
        ...

    def greedy(
        self, prompts: Sequence[Prompt], output_tokens: int, counted: Callable[[int, int], None]
    ) -> list[list[int]]: ...


class Case(NamedTuple):
    """One prompt: its exact KV, the lossy ones by variant, and how its text goes on (possibly empty)."""

    token_ids: Sequence[int]
    exact: bytes | bytearray
    lossy: Mapping[str, bytes | bytearray]
    text: Sequence[int]


@dataclass(slots=True)
class Comparison:
    """Sums over positions at which both were given the same tokens; `nll`: −log p of the token that was given."""

    positions: int = 0
    kl_nats_sum: float = 0.0
    top1_same_sum: int = 0
    exact_nll_sum: float = 0.0
    lossy_nll_sum: float = 0.0

    def note(self, exact: Logits, lossy: Logits, given: NDArray[np.int64]) -> None:
        """`exact`, `lossy`: log-probabilities [positions, vocabulary]; `given`: the token at each position."""
        rows = np.arange(len(given))
        self.positions += len(given)
        self.kl_nats_sum += float((np.exp(exact) * (exact - lossy)).sum(dtype=np.float64))
        self.top1_same_sum += int((exact.argmax(1) == lossy.argmax(1)).sum())
        self.exact_nll_sum -= float(exact[rows, given].sum(dtype=np.float64))
        self.lossy_nll_sum -= float(lossy[rows, given].sum(dtype=np.float64))

    def report(self) -> dict[str, float] | None:
        """None: nothing was compared. perplexity_change is relative: 0.01 = one percent higher."""
        if not self.positions:
            return None
        return {
            "kl_nats": self.kl_nats_sum / self.positions,
            "top1_same": self.top1_same_sum / self.positions,
            "perplexity_exact": math.exp(self.exact_nll_sum / self.positions),
            "perplexity": math.exp(self.lossy_nll_sum / self.positions),
            "perplexity_change": math.expm1((self.lossy_nll_sum - self.exact_nll_sum) / self.positions),
        }


@dataclass(slots=True)
class Effect:
    """Of one variant, over all prompts."""

    continuation: Comparison = field(default_factory=Comparison)
    """Given the reference's greedy continuation."""
    text: Comparison = field(default_factory=Comparison)
    """Given how the text goes on."""
    greedy_positions: int = 0
    greedy_same_sum: int = 0
    first_changes: list[int] = field(default_factory=list)

    def note_greedy(self, reference: Sequence[int], found: Sequence[int]) -> None:
        same = [a == b for a, b in zip(reference, found, strict=True)]
        self.greedy_positions += len(same)
        self.greedy_same_sum += sum(same)
        self.first_changes.append(same.index(False) if False in same else len(same))

    def report(self) -> dict[str, Any]:
        """None: not measured."""
        return {
            "greedy_same": self.greedy_same_sum / self.greedy_positions if self.greedy_positions else None,
            "first_change": self.first_changes or None,
            "continuation": self.continuation.report(),
            "text": self.text.report(),
        }


Tick = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""


def measure(
    model: Model, cases: Sequence[Case], free_running: Sequence[str], tokens: int, tick: Tick
) -> dict[str, Effect]:
    """The effect of each variant, over all cases. `free_running`: the variants that also decode greedily on their own
    and are judged on the real text; the others are only compared over the reference's continuation."""
    effects = {name: Effect() for case in cases for name in case.lossy}
    references: list[list[int]] = []
    for group in _groups(cases, len(free_running)):
        references += _greedy(effects, model, group, free_running, tokens, tick)
    for number, (case, reference) in enumerate(zip(cases, references, strict=True)):
        tick("comparing distributions", number, len(cases))
        for exact, lossy, given in _aligned(model, case, list(case.lossy), reference):
            for name, other in lossy.items():
                effects[name].continuation.note(exact, other, given)
        for exact, lossy, given in _aligned(model, case, list(case.lossy), case.text[:tokens]):
            for name, other in lossy.items():
                effects[name].text.note(exact, other, given)
    return effects


def _groups(cases: Sequence[Case], variants: int) -> Iterator[list[Case]]:
    """Cases that decode as one batch: reading the weights once for all of them takes a third of the time."""
    group: list[Case] = []
    kv_bytes = 0
    for case in cases:
        needed = (variants + 1) * len(case.exact)
        if group and (kv_bytes + needed > _MAX_BATCH_BYTES or (len(group) + 1) * (variants + 1) > _MAX_BATCH_ROWS):
            yield group
            group, kv_bytes = [], 0
        group.append(case)
        kv_bytes += needed
    if group:
        yield group


def _greedy(
    effects: Mapping[str, Effect],
    model: Model,
    cases: Sequence[Case],
    names: Sequence[str],
    tokens: int,
    tick: Tick,
) -> list[list[int]]:
    """Returns the references."""
    prompts = [
        Prompt(case.token_ids, kv) for case in cases for kv in (case.exact, *(case.lossy[name] for name in names))
    ]
    outputs = model.greedy(prompts, tokens, lambda done, total: tick("decoding", done, total))
    references = []
    for at in range(0, len(outputs), len(names) + 1):
        references.append(outputs[at])
        for name, found in zip(names, outputs[at + 1 : at + 1 + len(names)], strict=True):
            effects[name].note_greedy(outputs[at], found)
    return references


def _aligned(
    model: Model, case: Case, names: Sequence[str], continuation: Sequence[int]
) -> Iterator[tuple[Logits, dict[str, Logits], NDArray[np.int64]]]:
    """Blocks of log-probabilities from exact KV, from each variant's, and the tokens that were given."""
    if not continuation:
        return
    at = 0
    passes = [
        model.logits(Prompt(case.token_ids, kv), continuation) for kv in (case.exact, *(case.lossy[n] for n in names))
    ]
    for exact, *others in zip(*passes, strict=True):
        given = np.asarray(continuation[at : at + len(exact)], np.int64)
        at += len(exact)
        yield log_softmax(exact), {n: log_softmax(o) for n, o in zip(names, others, strict=True)}, given


def log_softmax(logits: Logits) -> Logits:
    shifted: Logits = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
