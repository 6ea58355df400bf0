"""What prompts say: token ids or words, computed from (content seed, stream, position).

Nothing is drawn in order, so any piece of any prompt is made alone, and prompts that share a prefix's identity
(`prefixes.py`) share its tokens, words included. The mixing function is splitmix64's, written out here, so that prompts
don't change with a library's version.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.prefixes import Segment
from prfaas.loadgen.workloads.words import WORDS

MAX_VOCAB_TOKENS = 1 << 31
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class TokenPrompts:
    """Token ids, uniform over [first_token, vocab_tokens). The first ids of most vocabularies are control tokens."""

    content_seed: int
    vocab_tokens: int
    first_token: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.first_token < self.vocab_tokens <= MAX_VOCAB_TOKENS:
            raise ConfigError(
                [
                    f"token ids from {self.first_token:,} to below {self.vocab_tokens:,}; they must ascend, between 0 "
                    f"and {MAX_VOCAB_TOKENS:,}"
                ]
            )

    def token_ids(self, segments: Iterable[Segment]) -> NDArray[np.int32]:
        """Of the segments one after the other, shape [sum of their tokens]."""
        span = self.vocab_tokens - self.first_token
        parts = [_choices(self.content_seed, s.stream, s.start, s.tokens, span) for s in segments]
        return (np.concatenate(parts) + self.first_token).astype(np.int32)


@dataclass(frozen=True, slots=True)
class TextPrompts:
    """Words of a built-in list with spaces between. `tokens_per_word`: what the server's tokenizer makes of such a word
    and its space; near 1 for the byte-pair vocabularies in use, `BYTES_PER_WORD` where a byte is a token. The token
    count asked for is met as nearly as whole words and that ratio allow."""

    content_seed: int
    tokens_per_word: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tokens_per_word) and self.tokens_per_word > 0):
            raise ConfigError([f"tokens a word are above 0, not {self.tokens_per_word:g}"])

    def text(self, segments: Iterable[Segment]) -> str:
        """Of the segments one after the other; a longer segment's text begins with the shorter one's. Never empty."""
        words: list[str] = []
        for stream, start, tokens in segments:
            first, end = self._words_before(start), self._words_before(start + tokens)
            chosen = _choices(self.content_seed, stream, first, end - first, len(WORDS))
            words.extend(WORDS[i] for i in chosen.tolist())
        return " ".join(words) or WORDS[0]

    def _words_before(self, tokens: int) -> int:
        return round(tokens / self.tokens_per_word)


BYTES_PER_WORD = 1 + sum(map(len, WORDS)) / len(WORDS)


def _choices(seed: int, stream: int, start: int, count: int, among: int) -> NDArray[np.int64]:
    """`count` numbers below `among` (at most 2^31), a function of seed, stream and position alone, shape [count]."""
    key = _mixed(_mixed(np.array([seed], np.uint64)) + np.array([stream & 0xFFFFFFFFFFFFFFFF], np.uint64))
    positions = np.arange(start, start + count, dtype=np.uint64)
    high = _mixed(key + positions * GOLDEN) >> np.uint64(32)
    # 32 bits times below 2^31, shifted back: uniform over [0, among) up to 2^-32 · among.
    return ((high * np.uint64(among)) >> np.uint64(32)).astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's output function (Steele, Lea and Flood, 2014), modulo 2^64 as numpy's arrays are."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
