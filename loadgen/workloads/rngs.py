"""One random stream a purpose, all from one seed: another arrival process doesn't change the lengths, nor reverse."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Rngs:
    """The generators of one workload; each is used for what its name says and for nothing else.

    `content_seed` names the tokens of prompts (`prompts.py`), which are computed, not drawn.
    """

    input_lengths: np.random.Generator
    output_lengths: np.random.Generator
    arrivals: np.random.Generator
    ticks: np.random.Generator
    turns: np.random.Generator
    thinking: np.random.Generator
    prefix_choice: np.random.Generator
    content_seed: int

    @classmethod
    def from_seed(cls, seed: int) -> Rngs:
        """`seed`: 0 to 2^63 − 1. The key of a stream is its place in the list above, so new ones go to its end."""
        names = [field.name for field in fields(cls) if field.name != "content_seed"]
        made = {name: np.random.Generator(np.random.PCG64(_child(seed, key))) for key, name in enumerate(names)}
        return cls(**made, content_seed=seed)


def _child(seed: int, key: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(key,))
