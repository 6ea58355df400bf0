"""Workload flags: names of other tools, what each means, and every mistake reported together."""

import argparse
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.flags import WHAT, WHEN, add_workload_arguments
from prfaas.loadgen.workloads.from_flags import recipe_from, workload_from
from prfaas.loadgen.workloads.prompt_flags import add_prompt_arguments, prompts_from
from prfaas.loadgen.workloads.prompts import TextPrompts, TokenPrompts

from tests.loadgen.workloads.shapes import columns_of
from tests.loadgen.workloads.test_traces import AZURE, MOONCAKE

RATES = """\
category,window_start_s,total_rate_req_per_s
chat,0,1
code,0,7
chat,600,3
code,600,7
"""
PEAK = "category,window_start_s,total_rate_req_per_s\na,0,9\na,600,0\n"


def parser(**options):
    made = argparse.ArgumentParser(allow_abbrev=False)
    add_workload_arguments(made, **options)
    add_prompt_arguments(made)
    return made


def args_of(line):
    return parser().parse_args(line.split())


def workload(line):
    return workload_from(args_of(line))


def problems(line):
    with pytest.raises(ConfigError) as raised:
        workload(line)
    assert all("\n" not in problem for problem in raised.value.problems)
    return raised.value.problems


@pytest.fixture
def files(tmp_path):
    for name, text in (
        ("m.jsonl", MOONCAKE),
        ("a.csv", AZURE),
        ("r.csv", RATES),
        ("peak.csv", PEAK),
    ):
        (tmp_path / name).write_text(text)
    (tmp_path / "s.json").write_text('{"points": [{"time_s": 0, "qps": 2}, {"time_s": 10, "qps": 6}]}')
    return tmp_path


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--request-rate 1e-320", "--request-rate 1e-320: it is a number from 0.0001 to 1e+06"),
        ("--request-rate 1e-12", "--request-rate 1e-12: it is a number from 0.0001 to 1e+06"),
        ("--request-rate 1e9", "--request-rate 1e9: it is a number from 0.0001 to 1e+06"),
        ("--rate-schedule 0:1e-300", "--rate-schedule 0:1e-300: a rate is a number from 0.0001 to 1e+06 requests/s"),
        ("--rate-schedule 0:0,9:1e9", "--rate-schedule 0:0,9:1e9: a rate is a number from 0.0001 to 1e+06 requests/s"),
        ("--rate-schedule 0:0,1e20:2", "its last change is at 1e+20 s; it must be by 1e+09 s"),
        ("--rate-curve {r} --rate-curve-category chat --speedup 1e-9", "--speedup 1e-9: it is a number from 0.001"),
        ("--dataset-name mooncake_trace --dataset-path {m} --speedup 1e-300", "--speedup 1e-300: it is a number from"),
    ],
)
def test_rates_that_take_for_ever_or_no_time_are_refused(files, line, says):
    """One line that names the flag and the bounds."""
    made = problems(line.format(r=files / "r.csv", m=files / "m.jsonl"))
    assert len(made) == 1
    assert says in made[0]


def test_nothing_given_is_vllms_default():
    """1,000 prompts of 1,024 and 128 tokens, all at once, as `vllm bench serve` without flags."""
    made = workload("")
    assert (len(made), made.name, made.closed_loop) == (1000, "random", False)
    assert set(made.prompt_tokens.tolist()) == {1024}
    assert set(made.output_tokens.tolist()) == {128}
    assert not made.arrival_s.any()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("--num-prompts 9", "--request-count 9"),
        ("--num-prompts 9 --seed 3", "--num-requests 9 --random-seed 3"),
        ("--num-prompts 9 --random-input-len 50", "--num-prompts 9 --isl 50"),
        ("--num-prompts 9 --random-output-len 50", "--num-prompts 9 --osl 50"),
        (
            "--num-prompts 9 --request-rate 2 --burstiness 0.5",
            "--num-prompts 9 --request-rate 2 --arrival-smoothness 0.5",
        ),
        ("--num-prompts 9 --max-concurrency 3", "--num-prompts 9 --concurrency 3"),
        (
            "--num-prompts 9 --request-rate 2 --arrival-pattern constant",
            "--num-prompts 9 --request-rate 2 --request-rate-mode constant",
        ),
        (
            "--num-prompts 9 --dataset-name prefix_repetition --prefix-repetition-prefix-len 30",
            "--num-prompts 9 --dataset-name prefix_repetition --prefix-prompt-length 30",
        ),
        (
            "--num-prompts 9 --dataset-name conversation --conversation-turn-mean 3",
            "--num-prompts 9 --dataset-name conversation --session-turns-mean 3",
        ),
        ("--dataset-name mooncake_trace --dataset-path {m}", "--custom-dataset-type mooncake_trace --input-file {m}"),
        (
            "--dataset-name mooncake_trace --dataset-path {m}",
            "--dataset-name timed_trace --self-timed --dataset-path {m}",
        ),
        (
            "--dataset-name mooncake_trace --dataset-path {m} --speedup 3",
            "--dataset-name mooncake_trace --dataset-path {m} --synthesis-speedup-ratio 3",
        ),
    ],
)
def test_the_names_of_other_tools_mean_the_same(files, ours, theirs):
    """vLLM's and aiperf's names for one thing give the same workload."""
    one, two = (workload(line.format(m=files / "m.jsonl")) for line in (ours, theirs))
    assert columns_of(one) == columns_of(two)


@pytest.mark.parametrize("flag", [flag for flag in (*WHAT, *WHEN) if not flag.switch], ids=lambda flag: flag.names[0])
def test_every_name_of_every_flag_is_taken(flag):
    """Each name fills the flag's one place."""
    for name in flag.names:
        assert getattr(args_of(f"{name} value"), flag.dest) == "value"


def test_help_fits_a_screen_unless_all_is_asked_for():
    """`--help` lists the common flags only, each under one name; with show_all all flags."""
    short, long = parser().format_help(), parser(show_all=True).format_help()
    assert len(short.splitlines()) <= 45
    for flag in (*WHAT, *WHEN):
        assert (f"{flag.names[0]}" in short.split()) == flag.common
        assert flag.names[0] in long
        assert all(name not in long.split() for name in flag.names[1:])


def test_a_random_workload():
    """Lengths by the grammar and the range ratio; Poisson arrivals at the rate; a cap on what is in flight."""
    made = workload(
        "--random-input-len paper --random-output-len paper --request-rate 3.2 --num-prompts 4000 --max-concurrency 64"
    )
    assert 26_000 < made.prompt_tokens.mean() < 29_000
    assert set(made.output_tokens.tolist()) == {1024}
    assert made.arrival_s[-1] == pytest.approx(1250, abs=5 * 1250 / math.sqrt(4000))
    assert (made.max_concurrency, made.closed_loop) == (64, False)
    made = workload("--random-input-len 1000 --random-output-len 10 --random-range-ratio 0.5 --num-prompts 3000")
    assert (made.prompt_tokens.min(), made.prompt_tokens.max()) == (500, 1500)
    assert (made.output_tokens.min(), made.output_tokens.max()) == (5, 15)


def test_a_cap_without_a_rate_is_a_closed_loop():
    """As in vLLM, an infinite rate under a cap keeps that many in flight."""
    for line in ("--max-concurrency 8", "--max-concurrency 8 --request-rate inf"):
        made = workload(line)
        assert (made.closed_loop, made.max_concurrency) == (True, 8)


def test_a_prefix_workload():
    """vLLM's defaults: 10 prefixes of 256 tokens, 256 after them."""
    made = workload("--dataset-name prefix_repetition --num-prompts 500")
    assert set(made.prompt_tokens.tolist()) == {512}
    starts = {made.prefixes.segments(i)[0] for i in range(500)}
    assert {segment.tokens for segment in starts} == {256}
    assert len(starts) == 10


def test_a_conversation_workload():
    """Turns and think times in aiperf's units; milliseconds become seconds; a prefix that all share."""
    made = workload(
        "--dataset-name conversation --conversation-num 50 --conversation-turn-mean 3 "
        "--conversation-turn-delay-mean 2500 --prefix-repetition-prefix-len 64 "
        "--random-input-len 100 --random-output-len 10 --request-rate 5"
    )
    assert (made.conversations, len(made)) == (50, 150)
    assert set(made.think_s[made.turn > 0].tolist()) == {2.5}
    assert made.prompt_tokens[:3].tolist() == [164, 274, 384]
    assert len({made.prefixes.segments(i)[0] for i in range(150)}) == 1


def test_traces(files):
    """Traces keep their own times; a rate, a closed loop, a part and a speedup change them."""
    mooncake = f"--dataset-name mooncake_trace --dataset-path {files}/m.jsonl"
    assert workload(f"{mooncake} --trace-tick-s 0").arrival_s.tolist() == [0, 0, 3, 3]
    assert workload(f"{mooncake} --trace-tick-s 0 --speedup 2").arrival_s.tolist() == [0, 0, 1.5, 1.5]
    assert workload(f"{mooncake} --request-rate 2 --arrival-pattern constant").arrival_s.tolist() == [0, 0.5, 1, 1.5]
    assert workload(f"{mooncake} --no-fixed-schedule --max-concurrency 2").closed_loop
    assert workload(f"{mooncake} --num-prompts 3").prompt_tokens.tolist() == [1000, 1500, 512]
    assert workload(f"{mooncake} --fixed-schedule-start-offset 3000").prompt_tokens.tolist() == [512, 700]
    azure = workload(f"--dataset-name azure_trace --dataset-path {files}/a.csv --fixed-schedule-end-offset 2000")
    assert azure.prompt_tokens.tolist() == [374, 10]


def test_rates_that_change(files):
    """Steps, straight lines, and a day's curve whose mean --request-rate sets; a duration decides how many."""
    burst = workload("--rate-schedule 0:5,100:20,200:5 --benchmark-duration 300").arrival_s
    counts = [np.count_nonzero((burst >= a) & (burst < a + 100)) for a in (0, 100, 200)]
    assert counts == pytest.approx([500, 2000, 500], abs=5 * math.sqrt(2000))
    series = recipe_from(args_of(f"--request-rate-series {files}/s.json")).times.rate
    assert series.expected(10.0) == pytest.approx(40.0)
    curve = recipe_from(args_of(f"--rate-curve {files}/r.csv --rate-curve-category chat --request-rate 20")).times.rate
    assert (curve.period_s, curve.mean()) == (1200.0, pytest.approx(20.0))
    assert curve.requests_per_s.tolist() == [10.0, 30.0]
    fast = recipe_from(args_of(f"--rate-curve {files}/r.csv --rate-curve-category chat --speedup 4")).times.rate
    assert (fast.period_s, fast.mean()) == (300.0, pytest.approx(8.0))


def test_other_seeds_of_one_recipe(files):
    """A recipe reads its files once and gives the workload of any seed; its own seed is the flag's."""
    recipe = recipe_from(args_of(f"--dataset-name mooncake_trace --dataset-path {files}/m.jsonl --seed 5"))
    (files / "m.jsonl").unlink()
    own, same, other = recipe.workload(), recipe.workload(seed=5), recipe.workload(seed=6)
    assert columns_of(own) == columns_of(same)
    assert own.arrival_s.tolist() != other.arrival_s.tolist()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--dataset-name shakespeare", "--dataset-name shakespeare: there are random, prefix_repetition"),
        ("--num-prompts 0", "--num-prompts 0: it is a whole number from 1 to 10,000,000"),
        ("--num-prompts 1e3", "--num-prompts 1e3: it is a whole number"),
        ("--num-prompts 99999999999", "--num-prompts 99999999999: it is a whole number"),
        ("--seed -1", "--seed -1: it is a whole number from 0"),
        ("--request-rate 0", "--request-rate 0: it is a number above 0"),
        ("--request-rate -1", "--request-rate -1: it is a number above 0"),
        ("--request-rate nan", "--request-rate nan: it is a number above 0"),
        ("--request-rate fast", "--request-rate fast: it is a number above 0"),
        ("--burstiness 0 --request-rate 1", "--burstiness 0: it is a number above 0"),
        ("--max-concurrency 0", "--max-concurrency 0: it is a whole number from 1"),
        ("--arrival-pattern bursty", "--arrival-pattern bursty: there are poisson, gamma, constant"),
        ("--arrival-pattern constant --burstiness 2", "--burstiness is the shape of gamma gaps"),
        ("--random-input-len -5", "--random-input-len -5: lengths from -5 to -5 tokens"),
        ("--random-input-len much", "--random-input-len: 'much' is no distribution of lengths"),
        ("--random-input-len empirical:/no/file", "--random-input-len empirical:/no/file: /no/file: No such file"),
        ("--random-range-ratio 1", "--random-range-ratio 1: a range ratio is from 0 to below 1, not 1"),
        ("--random-range-ratio 0.1 --random-input-len paper", "--random-range-ratio is for fixed lengths"),
        ("--benchmark-duration 0", "--benchmark-duration 0: it is a number above 0"),
        ("--benchmark-duration 1e9 --request-rate 1e6", "--benchmark-duration 1e9: 1e+15 requests"),
        ("--speedup 2", "--speedup is for the times of a trace"),
        ("--dataset-path x", "--dataset-path is not for random, but for mooncake_trace, azure_trace"),
        ("--conversation-turn-mean 3", "--conversation-turn-mean is not for random, but for conversation"),
        ("--isl-block-size 0", "--isl-block-size 0: it is a whole number from 1"),
        ("--max-context-length 1000", "--max-context-length 1000: a first turn can have 1,152 tokens"),
        ("--rate-schedule 0:1,x", "--rate-schedule 0:1,x: 'x' is not SECONDS:RATE"),
        ("--rate-schedule 5:1", "--rate-schedule 5:1: the times of a rate curve begin at 0"),
        ("--rate-schedule 0:1,5:0", "--rate-schedule 0:1,5:0: the last rate of a curve without a period"),
        ("--rate-schedule 0:-1", "--rate-schedule 0:-1: the rates of a rate curve are finite and not negative"),
        ("--rate-schedule 0:1 --request-rate 2", "--request-rate and --rate-schedule both give a rate"),
        ("--rate-schedule 0:1 --request-rate-series {d}/s.json", "both give a rate"),
        ("--rate-curve {d}/r.csv", "r.csv has several categories: chat, code; name one"),
        ("--rate-curve {d}/r.csv --rate-curve-category cat", "has no category 'cat'; it has chat, code"),
        ("--rate-curve {d}/r.csv --rate-curve-category chat --request-rate inf", "--request-rate inf has no curve"),
        ("--rate-curve {d}/peak.csv --request-rate 900000", "peak.csv: a rate is a number from 0.0001 to 1e+06"),
        ("--rate-curve-category chat", "--rate-curve-category without --rate-curve"),
        ("--request-rate-series {d}/m.jsonl", "m.jsonl: "),
        ("--dataset-name mooncake_trace", "--dataset-name mooncake_trace needs its file: --dataset-path FILE"),
        ("--dataset-name mooncake_trace --dataset-path /no/file", "/no/file: No such file"),
        ("--dataset-name mooncake_trace --dataset-path {d}/a.csv", "a.csv line 1: not JSON"),
        ("--dataset-name azure_trace --dataset-path {d}/a.csv --num-prompts 4", "3 requests there; 4 are asked for"),
        ("--dataset-name azure_trace --dataset-path {d}/a.csv --speedup 0", "--speedup 0: it is a number above 0"),
        (
            "--dataset-name azure_trace --dataset-path {d}/a.csv --speedup 2 --request-rate 1",
            "--speedup is for the trace",
        ),
        ("--dataset-name azure_trace --dataset-path {d}/a.csv --burstiness 2", "--burstiness needs a rate"),
        (
            "--dataset-name azure_trace --dataset-path {d}/a.csv --fixed-schedule --request-rate 1",
            "--fixed-schedule keeps",
        ),
        (
            "--dataset-name azure_trace --dataset-path {d}/a.csv --fixed-schedule-start-offset 9e6",
            "has no request from",
        ),
        (
            "--dataset-name azure_trace --dataset-path {d}/a.csv --fixed-schedule-start-offset 5 "
            "--fixed-schedule-end-offset 5",
            "--fixed-schedule-start-offset is not before",
        ),
        ("--dataset-name conversation --conversation-turn-mean 0", "--conversation-turn-mean 0: it is a number from 1"),
        ("--dataset-name conversation --conversation-num 5 --num-prompts 5", "both say how much; give one"),
        ("--dataset-name conversation --prefix-repetition-num-prefixes 5", "says nothing"),
        ("--dataset-name prefix_repetition --prefix-zipf -1", "--prefix-zipf -1: it is a number from 0"),
    ],
)
def test_a_mistake_is_one_clear_line(files, line, says):
    """Each mistake is one line that names the flag or the file, what was given, and what it must be."""
    (problem,) = problems(line.format(d=files))
    assert says in problem


def test_a_file_of_another_kind_is_refused(files):
    """Every column that is unknown or missing is named, with the line and the file."""
    found = problems(f"--rate-curve {files}/a.csv")
    assert found[0] == f"--rate-curve: {files}/a.csv line 1: unknown column 'TIMESTAMP'"
    assert len(found) == 6
    found = problems(f"--dataset-name azure_trace --dataset-path {files}/m.jsonl")
    assert all(f"{files}/m.jsonl line 1: " in problem for problem in found)
    assert "no column GeneratedTokens; the columns are" in found[-1]


def test_all_mistakes_are_reported_together():
    """Six mistakes, six lines."""
    found = problems(
        "--num-prompts 0 --seed x --request-rate 0 --random-input-len 0 --burstiness -1 --isl-block-size 0"
    )
    named = {problem.split()[0].rstrip(":") for problem in found}
    assert named == {
        "--num-prompts",
        "--seed",
        "--request-rate",
        "--random-input-len",
        "--burstiness",
        "--isl-block-size",
    }
    assert len(found) == 6


VALUES = st.sampled_from(["0", "-1", "1", "2.5", "inf", "nan", "", "paper", "uniform:1:3", "1e30", "x", "0:1", "/no"])


@settings(deadline=None, max_examples=300)
@given(
    given_flags=st.dictionaries(
        st.sampled_from(
            [flag.names[0] for flag in (*WHAT, *WHEN) if not flag.switch and flag.names[0] != "--dataset-name"]
        ),
        VALUES,
        max_size=6,
    ),
    dataset=st.sampled_from(["random", "prefix_repetition", "conversation", "mooncake_trace", "azure_trace"]),
)
def test_no_flags_crash(given_flags, dataset):
    """Any flags with any values: a workload or a ConfigError with at least one line, nothing else."""
    words = [f"{name}={value}" for name, value in {**given_flags, "--dataset-name": dataset}.items()]
    try:
        recipe = recipe_from(parser().parse_args(words))
    except ConfigError as error:
        found = error.problems
    else:
        found = ["none"] if recipe.workload() else []
    assert found


def test_prompts_from_flags():
    """Text by default, token ids below a vocabulary; the seed is the workload's."""
    assert prompts_from(args_of(""), 4) == TextPrompts(4, 1.0)
    assert prompts_from(args_of("--tokens-per-word 1.3"), 4) == TextPrompts(4, 1.3)
    assert prompts_from(args_of("--prompt-format token-ids --vocab-size 500"), 4) == TokenPrompts(4, 500)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--prompt-format words", "--prompt-format words: there are text, token-ids"),
        ("--vocab-size 5", "--vocab-size is for --prompt-format token-ids"),
        ("--prompt-format token-ids --tokens-per-word 1", "--tokens-per-word is for --prompt-format text"),
        ("--prompt-format token-ids --vocab-size 0", "--vocab-size 0: it is a whole number"),
        ("--prompt-format token-ids --vocab-size 2.5", "--vocab-size 2.5: it is a whole number"),
        ("--prompt-format token-ids --vocab-size x", "--vocab-size x: it is a whole number"),
        ("--tokens-per-word 0", "--tokens-per-word 0: it is a number above 0"),
        ("--tokens-per-word nan", "--tokens-per-word nan: it is a number above 0"),
        ("--tokens-per-word x", "--tokens-per-word x: it is a number above 0"),
    ],
)
def test_wrong_prompt_flags_are_refused(line, says):
    """One line a mistake."""
    with pytest.raises(ConfigError) as raised:
        prompts_from(args_of(line), 1)
    (problem,) = raised.value.problems
    assert says in problem
