"""Single requests, shared prefixes and conversations: what their prompts share, and what a seed decides."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.arrivals import Load, SteadyRate
from prfaas.loadgen.workloads.lengths import PAPER_INPUT_LENGTHS, Fixed, Uniform
from prfaas.loadgen.workloads.rngs import Rngs
from prfaas.loadgen.workloads.synthetic import SharedPrefixes, SyntheticShape, Turns, synthetic_workload
from prfaas.loadgen.workloads.workload import MAX_REQUESTS

from tests.loadgen.workloads.shapes import assert_ids_are_prefixes, columns_of, shapes, tokens_of, workload_of


@settings(deadline=None, max_examples=60)
@given(shape=shapes())
def test_block_ids_say_exactly_which_prompts_begin_alike(shape):
    """Two blocks have one id exactly when the token ids up to their ends are the same."""
    assert_ids_are_prefixes(workload_of(shape))


@settings(deadline=None, max_examples=60)
@given(shape=shapes())
def test_a_turn_extends_the_turn_before(shape):
    """A turn's prompt begins with the prompt before and has room for its output; the rest is the turn's new tokens."""
    workload = workload_of(shape)
    for request in workload:
        tokens = tokens_of(workload, request.index)
        assert len(tokens) == request.prompt_tokens
        new = sum(segment.tokens for segment in workload.prefixes.new_segments(request.index))
        if request.turn == 0:
            assert workload.prefixes.new_segments(request.index) == workload.prefixes.segments(request.index)
            continue
        before = workload[request.index - 1]
        assert (before.conversation, before.turn) == (request.conversation, request.turn - 1)
        assert tokens[: before.prompt_tokens] == tokens_of(workload, before.index)
        assert request.prompt_tokens == before.prompt_tokens + before.output_tokens + new


@settings(deadline=None, max_examples=60)
@given(shape=shapes())
def test_what_a_cache_holds_after_a_turn_begins_the_next(shape):
    """The whole blocks of prompt and output are the first blocks of the next turn's prompt."""
    workload = workload_of(shape)
    for request in workload:
        held = workload.prefixes.sequence_block_ids(request.index).tolist()
        assert len(held) == (request.prompt_tokens + request.output_tokens) // shape.block_tokens
        if request.index + 1 < len(workload) and workload[request.index + 1].turn:
            assert workload.prefixes.block_ids(request.index + 1).tolist()[: len(held)] == held
        whole = request.prompt_tokens // shape.block_tokens
        assert workload.prefixes.block_ids(request.index).tolist()[:whole] == held[:whole]


@settings(deadline=None, max_examples=60)
@given(shape=shapes(), fewer=st.integers(1, 20))
def test_a_longer_workload_begins_with_the_shorter(shape, fewer):
    """Under one seed the first requests don't depend on how many follow (their times only as far as the last
    conversation is whole)."""
    short, long = workload_of(shape, fewer), workload_of(shape, 30)
    assert short.prompt_tokens.tolist() == long.prompt_tokens[:fewer].tolist()
    assert short.think_s.tolist() == long.think_s[:fewer].tolist()
    for index in range(fewer):
        assert tokens_of(short, index) == tokens_of(long, index)


@settings(deadline=None, max_examples=60)
@given(shape=shapes())
def test_a_context_bound_ends_conversations(shape):
    """No prompt with its output is longer than the context, every conversation keeps its first turn, and turns follow
    one another without a gap."""
    workload = workload_of(shape, 40)
    assert np.all(workload.prompt_tokens + workload.output_tokens <= shape.max_context_tokens)
    conversations, turns = workload.conversation.tolist(), workload.turn.tolist()
    for i, turn in enumerate(turns):
        assert (conversations[i], turn) == ((conversations[i - 1], turns[i - 1] + 1) if turn else (conversations[i], 0))
    assert sorted(set(conversations)) == list(range(workload.conversations))


SHAPE = SyntheticShape(PAPER_INPUT_LENGTHS, Uniform(10, 500), SharedPrefixes(5, 100), Turns(3, 1, 2.0, 1.0))


def test_the_same_seed_gives_the_same_workload():
    """Two builds agree in every column and in their tokens; another seed agrees in none."""
    one, two, other = (workload_of(SHAPE, 200, seed) for seed in (4, 4, 5))
    assert columns_of(one) == columns_of(two)
    assert tokens_of(one, 7) == tokens_of(two, 7)
    assert one.prompt_tokens.tolist() != other.prompt_tokens.tolist()
    assert one.arrival_s[:3].tolist() != other.arrival_s[:3].tolist()
    assert tokens_of(one, 7)[:9] != tokens_of(other, 7)[:9]


@pytest.mark.parametrize(
    "load",
    [Load(SteadyRate(99.0)), Load(SteadyRate(5.0), "gamma", 0.3), Load(None, max_concurrency=4)],
    ids=["faster", "bursty", "closed"],
)
def test_another_load_keeps_the_requests(load):
    """Lengths, turns, prefixes and think times stay as they are when only the arrivals change."""
    one, two = workload_of(SHAPE, 300), workload_of(SHAPE, 300, load=load)
    first, second = columns_of(one), columns_of(two)
    assert first.pop("arrival_s") != second.pop("arrival_s")
    assert first == second
    assert [one.prefixes.segments(i) for i in range(300)] == [two.prefixes.segments(i) for i in range(300)]


def test_other_lengths_keep_the_arrivals():
    """Arrival times, turns and think times stay as they are when only the lengths change."""
    one = workload_of(SHAPE, 300)
    two = workload_of(SyntheticShape(Fixed(7), Fixed(9), SHAPE.prefixes, SHAPE.turns), 300)
    first, second = columns_of(one), columns_of(two)
    for name in ("arrival_s", "turn", "think_s", "conversation"):
        assert first[name] == second[name]


def test_columns_follow_the_distributions():
    """Means of turns, think times and new tokens against what was asked for, within five standard errors."""
    shape = SyntheticShape(Fixed(10), Fixed(5), turns=Turns(6, 1, 3.0, 0.5))
    workload = workload_of(shape, 60_000)
    later = workload.turn > 0
    assert len(workload) / workload.conversations == pytest.approx(6, abs=5 * 1.05 / math.sqrt(10_000))
    assert workload.think_s[later].mean() == pytest.approx(3.0, abs=5 * 0.5 / math.sqrt(50_000))
    assert not workload.think_s[~later].any()
    assert np.all(workload.prompt_tokens == 10 + 15 * workload.turn)


def test_the_rate_counts_requests_not_conversations():
    """Conversations of 5 turns begin at a fifth of the rate, so that requests come at the whole of it."""
    workload = workload_of(SyntheticShape(Fixed(10), Fixed(5), turns=Turns(5)), 20_000, load=Load(SteadyRate(10.0)))
    starts = workload.arrival_s[workload.turn == 0]
    assert np.isnan(workload.arrival_s[workload.turn > 0]).all()
    assert starts.size == 4000
    assert starts[-1] == pytest.approx(2000, abs=5 * 2000 / math.sqrt(4000))


@pytest.mark.parametrize(("zipf", "shares"), [(0.0, [1 / 3] * 3), (1.0, [6 / 11, 3 / 11, 2 / 11])])
def test_prefixes_are_as_popular_as_asked(zipf, shares):
    """Prefix k is chosen in proportion to k^-zipf."""
    shape = SyntheticShape(Fixed(10), Fixed(5), SharedPrefixes(3, 100, zipf))
    workload = workload_of(shape, 30_000)
    counts = np.bincount(workload.prefixes.group, minlength=3) / 30_000
    assert counts == pytest.approx(shares, abs=5 * 0.5 / math.sqrt(30_000))


def test_shared_prefixes_are_nobodys_own_text():
    """No stream of a shared prefix is the stream of a conversation."""
    workload = workload_of(SHAPE, 300)
    pairs = [workload.prefixes.segments(i) for i in range(300)]
    assert not {shared.stream for shared, _ in pairs} & {own.stream for _, own in pairs}


def test_what_is_drawn_for_one_purpose_says_nothing_about_another():
    """Lengths, outputs, gaps, turns, think times and prefixes are uncorrelated, though all come from one seed."""
    rngs = Rngs.from_seed(9)
    generators = [getattr(rngs, name) for name in Rngs.__slots__ if name != "content_seed"]
    drawn = np.array([generator.random(20_000) for generator in generators])
    apart = np.abs(np.corrcoef(drawn) - np.eye(len(generators)))
    assert apart.max() < 5 / math.sqrt(20_000)


def test_a_duration_decides_how_much():
    """Without a count, requests come until the duration is over, and none after it."""
    workload = synthetic_workload("t", SHAPE, Load(SteadyRate(50.0), until_s=100.0), Rngs.from_seed(1))
    starts = workload.arrival_s[workload.turn == 0]
    assert starts.max() <= 100.0
    assert len(workload) == pytest.approx(5000, abs=5 * math.sqrt(5000 * 3))
    with pytest.raises(ConfigError, match="no request arrives"):
        synthetic_workload("t", SHAPE, Load(SteadyRate(1e-9), until_s=1.0), Rngs.from_seed(1))


def test_conversations_can_be_counted_instead():
    """So many conversations, each with all its turns."""
    workload = synthetic_workload("t", SHAPE, Load(SteadyRate(1.0)), Rngs.from_seed(1), conversations=50)
    assert workload.conversations == 50
    assert len(workload) > 50


def test_rows_and_columns_agree():
    """Iteration, indexing and columns give the same; columns are read-only; outside there is an IndexError."""
    workload = workload_of(SHAPE, 50)
    rows = list(workload)
    assert [row.index for row in rows] == list(range(50))
    assert [row.prompt_tokens for row in rows] == workload.prompt_tokens.tolist()
    assert workload[3].think_s == rows[3].think_s
    for index in (-1, 50):
        with pytest.raises(IndexError):
            workload[index]
    with pytest.raises(ValueError, match="read-only"):
        workload.prompt_tokens[0] = 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: workload_of(SHAPE, 0),
        lambda: workload_of(SHAPE, MAX_REQUESTS + 1),
        lambda: synthetic_workload("t", SHAPE, Load(SteadyRate(1.0)), Rngs.from_seed(1)),
        lambda: synthetic_workload("t", SHAPE, Load(None, max_concurrency=2), Rngs.from_seed(1)),
        lambda: SharedPrefixes(-1, 5),
        lambda: SharedPrefixes(1, -5),
        lambda: SharedPrefixes(1, 5, -1.0),
        lambda: SharedPrefixes(1, 5, math.nan),
        lambda: Turns(0.5),
        lambda: Turns(math.nan),
        lambda: Turns(2, -1),
        lambda: Turns(2, 0, -1.0),
        lambda: Turns(2, 0, 1.0, math.inf),
        lambda: SyntheticShape(Fixed(10), Fixed(5), block_tokens=0),
        lambda: SyntheticShape(Fixed(10), Fixed(5), SharedPrefixes(1, 90), max_context_tokens=100),
    ],
)
def test_a_workload_that_is_none_is_refused(make):
    """Counts, shares, turns and times outside their bounds raise ConfigError."""
    with pytest.raises(ConfigError):
        make()


def test_a_million_requests_are_columns():
    """A million requests are built as arrays: 8 bytes a column and request, no object each."""
    workload = workload_of(SyntheticShape(PAPER_INPUT_LENGTHS, Fixed(1024)), 1_000_000, load=Load(SteadyRate(500.0)))
    assert len(workload) == 1_000_000
    assert workload.prompt_tokens.nbytes == 8_000_000
    assert workload.prompt_tokens.mean() == pytest.approx(PAPER_INPUT_LENGTHS.mean(), rel=0.005)
    assert workload.prefixes.block_ids(999_999).size == -(-int(workload.prompt_tokens[-1]) // 512)
