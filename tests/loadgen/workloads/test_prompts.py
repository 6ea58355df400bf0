"""Prompts: token ids and words from (seed, stream, position)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.prefixes import Segment
from prfaas.loadgen.workloads.prompts import BYTES_PER_WORD, TextPrompts, TokenPrompts
from prfaas.loadgen.workloads.words import WORDS

streams = st.integers(-(2**62), 2**62)


@settings(deadline=None)
@given(stream=streams, cut=st.integers(0, 300), tokens=st.integers(1, 300), seed=st.integers(0, 2**63 - 1))
def test_a_piece_of_a_stream_is_that_piece(stream, cut, tokens, seed):
    """Tokens made in two pieces are those made in one."""
    prompts = TokenPrompts(seed, 50_000, 3)
    whole = prompts.token_ids([Segment(stream, 0, cut + tokens)])
    parts = prompts.token_ids([Segment(stream, 0, cut), Segment(stream, cut, tokens)])
    assert whole.tolist() == parts.tolist()
    assert whole.dtype == np.int32


@settings(deadline=None)
@given(stream=streams, cut=st.integers(1, 300), tokens=st.integers(1, 300), ratio=st.floats(0.3, 8))
def test_a_longer_text_begins_with_the_shorter(stream, cut, tokens, ratio):
    """A prompt that goes on keeps its text, at any number of tokens a word, and the pieces make up the whole."""
    prompts = TextPrompts(5, ratio)
    short = [Segment(stream, 0, cut)]
    whole = prompts.text([Segment(stream, 0, cut + tokens)]).split()
    if round(cut / ratio):
        assert whole[: len(prompts.text(short).split())] == prompts.text(short).split()
    assert prompts.text([*short, Segment(stream, cut, tokens)]).split() == whole


@pytest.mark.parametrize("vocab", [1, 2, 1000, 128_256, 1 << 31])
def test_tokens_are_uniform_over_the_vocabulary(vocab):
    """Every id lies within the vocabulary; mean and spread are those of the uniform distribution."""
    ids = TokenPrompts(1, vocab).token_ids([Segment(9, 0, 100_000)]).astype(np.float64)
    assert 0 <= ids.min() <= ids.max() < vocab
    assert ids.mean() == pytest.approx((vocab - 1) / 2, abs=max(5 * vocab / (12 * 100_000) ** 0.5, 1e-9))
    assert ids.var() == pytest.approx((vocab**2 - 1) / 12, rel=0.03)


def test_streams_and_seeds_have_nothing_in_common():
    """Two streams, two seeds, and neighbouring positions of one stream agree no more than chance would have it."""
    a = TokenPrompts(1, 1000).token_ids([Segment(1, 0, 20_000)])
    others = [
        TokenPrompts(1, 1000).token_ids([Segment(2, 0, 20_000)]),
        TokenPrompts(1, 1000).token_ids([Segment(-2, 0, 20_000)]),
        TokenPrompts(2, 1000).token_ids([Segment(1, 0, 20_000)]),
        np.roll(a, 1),
    ]
    for other in others:
        assert np.count_nonzero(a == other) < 20 + 5 * 20**0.5


def test_tokens_dont_change_with_a_library():
    """The prompts of a seed are written down here: a report of another year must be repeatable."""
    assert TokenPrompts(0, 32_000).token_ids([Segment(0, 0, 6)]).tolist() == [4438, 31075, 8890, 28883, 21048, 10082]
    assert TextPrompts(0).text([Segment(0, 0, 6)]) == "up brought because object step own"


def splitmix64(x):
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@settings(deadline=None)
@given(stream=streams, start=st.integers(0, 2**24), seed=st.integers(0, 2**63 - 1), vocab=st.integers(1, 1 << 31))
def test_tokens_are_those_of_whole_numbers(stream, start, seed, vocab):
    """The arrays that wrap around give what Python's whole numbers give."""
    key = splitmix64(splitmix64(seed) + (stream % 2**64) & (2**64 - 1))
    gap = 0x9E3779B97F4A7C15
    words = [splitmix64((key + position * gap) & (2**64 - 1)) for position in range(start, start + 5)]
    ids = TokenPrompts(seed, vocab).token_ids([Segment(stream, start, 5)])
    assert ids.tolist() == [(word >> 32) * vocab >> 32 for word in words]


@pytest.mark.parametrize("ratio", [1.0, 1.3, BYTES_PER_WORD])
def test_text_has_about_the_tokens_asked_for(ratio):
    """10,000 tokens are 10,000 / ratio words; where a byte is a token, the text is that long within 2 %."""
    text = TextPrompts(3, ratio).text([Segment(0, 0, 10_000)])
    assert len(text.split()) == round(10_000 / ratio)
    if ratio == BYTES_PER_WORD:
        assert len(text) == pytest.approx(10_000, rel=0.02)


@pytest.mark.model
@pytest.mark.parametrize("tokens", [1, 64, 8192])
def test_a_real_vocabulary_makes_the_tokens_asked_for(smollm2_dir, tokens):
    """With one token a word the real model's tokenizer counts exactly what was asked for, and a prompt that goes on
    keeps its tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    short, long = (
        tokenizer.encode(TextPrompts(3).text([Segment(5, 0, n)]), add_special_tokens=False).ids
        for n in (tokens, 2 * tokens)
    )
    assert len(short) == tokens
    assert long[:tokens] == short


def test_no_prompt_is_empty():
    """Fewer tokens than a word has are one word."""
    assert TextPrompts(3, 8.0).text([Segment(0, 0, 1)]) == WORDS[0]


def test_first_tokens_can_be_spared():
    """Control tokens at the vocabulary's beginning are left out."""
    assert TokenPrompts(1, 110, 100).token_ids([Segment(0, 0, 1000)]).min() == 100


@pytest.mark.parametrize(
    "make",
    [
        lambda: TokenPrompts(1, 0),
        lambda: TokenPrompts(1, 10, 10),
        lambda: TokenPrompts(1, 10, -1),
        lambda: TokenPrompts(1, (1 << 31) + 1),
        lambda: TextPrompts(1, 0.0),
        lambda: TextPrompts(1, float("nan")),
    ],
)
def test_prompts_that_cannot_be_are_refused(make):
    """Empty or too large vocabularies, and a word of no tokens."""
    with pytest.raises(ConfigError):
        make()
