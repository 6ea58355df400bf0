"""Readers of traces: what they take, what they refuse and in which words, and the way back."""

import gzip
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.arrivals import Load, SteadyRate
from prfaas.loadgen.workloads.lengths import MAX_LENGTH_TOKENS
from prfaas.loadgen.workloads.lines import read_lines
from prfaas.loadgen.workloads.replay import TraceCut, TraceTimes, trace_workload
from prfaas.loadgen.workloads.rngs import Rngs
from prfaas.loadgen.workloads.traces import read_azure, read_mooncake, write_mooncake

from tests.loadgen.workloads.shapes import assert_ids_are_prefixes, shapes, tokens_of, workload_of

MOONCAKE = """\
{"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 0, "input_length": 1500, "output_length": 50, "hash_ids": [0, 2, 3]}
{"timestamp": 3000, "input_length": 512, "output_length": 1, "hash_ids": [0]}
{"timestamp": 3000, "input_length": 700, "output_length": 9}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:15:46.6805900,374,44\r
2023-11-16 18:15:50.9951690,396,109\r
2023-11-16 18:15:48.0000000,10,1\r
"""


def lines_of(text):
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def mooncake(text=MOONCAKE, **options):
    return read_mooncake(lines_of(text), "t.jsonl", **options)


def azure(text=AZURE):
    return read_azure(lines_of(text), "t.csv")


def problems_of(read, *args):
    with pytest.raises(ConfigError) as raised:
        read(*args)
    return raised.value.problems


def test_mooncake_rows():
    """Lengths, seconds and ids are as in the file; blocks without an id get one that nobody else has."""
    trace = mooncake()
    assert trace.at_s.tolist() == [0, 0, 3, 3]
    assert trace.prompt_tokens.tolist() == [1000, 1500, 512, 700]
    assert trace.output_tokens.tolist() == [5, 50, 1, 9]
    assert trace.block_offsets.tolist() == [0, 2, 5, 6, 8]
    assert trace.block_ids.tolist() == [0, 1, 0, 2, 3, 0, -1, -2]


def test_azure_rows_in_the_order_of_time():
    """Times count from the first request; rows out of order are put in order; CRLF is no part of a cell."""
    trace = azure()
    assert trace.at_s == pytest.approx([0, 1.31941, 4.314579])
    assert trace.prompt_tokens.tolist() == [374, 10, 396]
    assert trace.output_tokens.tolist() == [44, 1, 109]
    assert len(set(trace.block_ids.tolist())) == 3


def test_columns_may_stand_in_any_order(tmp_path):
    """The header says where a column is, behind a byte order mark, in quotes or not."""
    path = tmp_path / "t.csv"
    path.write_text('"GeneratedTokens",TIMESTAMP,ContextTokens\n7,2024-05-10 00:00:00.009930+00:00,20\n', "utf-8-sig")
    trace = read_azure(read_lines(str(path)), "t.csv")
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([20], [7])


def test_an_output_of_nothing_is_one_token():
    """A request recorded without output is sent for one token, and counted."""
    trace = mooncake('{"timestamp": 0, "input_length": 3, "output_length": 0}')
    assert (trace.output_tokens.tolist(), trace.raised_outputs) == ([1], 1)


GOOD = '{"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]}\n'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"timestamp": 1, "input_length": 5', "not JSON"),
        ("[1, 2]", "expected `object`, got `array`"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 5, "session": 1}', "unknown column session"),
        ('{"timestamp": 1, "input_length": 5}', "no column output_length"),
        ('{"timestamp": 1, "input_length": -5, "output_length": 5}', "the input length is -5"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 5}', "the input length is 0"),
        ('{"timestamp": 1, "input_length": 5, "output_length": -1}', "the output length is -1"),
        ('{"timestamp": 1, "input_length": 5.5, "output_length": 5}', "$.input_length"),
        ('{"timestamp": 1, "input_length": "5", "output_length": 5}', "$.input_length"),
        ('{"timestamp": 1, "input_length": 99999999999999999999, "output_length": 5}', "is 99999999999999999999;"),
        (f'{{"timestamp": 1, "input_length": {MAX_LENGTH_TOKENS + 1}, "output_length": 5}}', "the input length is"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 5}', "timestamp is -1"),
        ('{"timestamp": 1e300, "input_length": 5, "output_length": 5}', "timestamp is 1e+300"),
        ('{"timestamp": null, "input_length": 5, "output_length": 5}', "$.timestamp"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": [1, 2]}', "2 hash_ids for 5 tokens"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": [-1]}', "a hash_id is -1"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": [9223372036854775808]}', "hash_id"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": ["a"]}', "$.hash_ids[0]"),
    ],
)
def test_a_broken_mooncake_line_is_named(line, says):
    """One problem, which says the file, the line and what is wrong there."""
    (problem,) = problems_of(mooncake, GOOD + "\n" + line + "\n" + GOOD)
    assert problem.startswith("t.jsonl line 3: ")
    assert says in problem
    assert "\n" not in problem


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,3,4\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("2023-11-16 18:15:46,3", "2 columns"),
        ("2023-11-16 18:15:46,3,4,5", "4 columns"),
        ("yesterday,3,4", "TIMESTAMP is 'yesterday'"),
        ("2023-11-16 18:15:46+00:00,3,4", "time zone"),
        ("2023-11-16 18:15:46,-3,4", "the input length is -3"),
        ("2023-11-16 18:15:46,3,-4", "the output length is -4"),
        ("2023-11-16 18:15:46,0,4", "the input length is 0"),
        ("2023-11-16 18:15:46,3.5,4", "ContextTokens is '3.5'"),
        ("2023-11-16 18:15:46,,4", "ContextTokens is ''"),
        ("2023-11-16 18:15:46,3,1_0", "GeneratedTokens is '1_0'"),
        ("2023-11-16 18:15:46,3," + "9" * 50, "GeneratedTokens is '9999"),
    ],
)
def test_a_broken_azure_line_is_named(line, says):
    """One problem, which says the file, the line and what is wrong there."""
    (problem,) = problems_of(azure, HEADER + line + "\n")
    assert problem.startswith("t.csv line 3: ")
    assert says in problem


def test_columns_that_are_unknown_or_missing_are_all_named():
    """Each wrong column of a header is a problem of its own; the last says which there are."""
    problems = problems_of(azure, "TIMESTAMP,ContextTokens,Model,Cost\n")
    assert problems[0] == "t.csv line 1: unknown column 'Model'"
    assert problems[1] == "t.csv line 1: unknown column 'Cost'"
    assert problems[2].startswith("t.csv line 1: no column GeneratedTokens; the columns are TIMESTAMP,")
    assert "twice" in problems_of(azure, "TIMESTAMP,ContextTokens,GeneratedTokens,TIMESTAMP\n")[0]


def test_an_empty_trace_is_refused():
    """Neither no line nor no row is a trace."""
    assert problems_of(azure, "") == ["t.csv is empty; its first line is TIMESTAMP,ContextTokens,GeneratedTokens"]
    assert problems_of(azure, HEADER.splitlines()[0]) == ["t.csv has no requests"]
    assert problems_of(mooncake, "\n\n") == ["t.jsonl has no requests"]


def test_plain_and_gzip_read_alike(tmp_path):
    """gzip is known by its bytes, whatever the name."""
    plain, packed = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"
    plain.write_text(MOONCAKE)
    packed.write_bytes(gzip.compress(MOONCAKE.encode()))
    assert list(read_lines(str(plain))) == list(read_lines(str(packed))) == lines_of(MOONCAKE)


def test_files_that_cannot_be_read_are_named(tmp_path):
    """Not there, a directory, not UTF-8, gzip cut short or damaged: a ConfigError with the file and the line."""
    packed = gzip.compress(
        np.random.default_rng(1).integers(48, 58, 50_000).astype(np.uint8).tobytes().replace(b"7", b"\n")
    )
    files = {
        "missing": None,
        "utf8": b"good\n\xff\xfe\n",
        "short": packed[: len(packed) // 2],
        "damaged": packed[:2000] + b"\0" * 50 + packed[2050:],
        "checksum": packed[:-8] + b"\0" * 8,
    }
    said = {}
    for name, content in files.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        (said[name],) = problems_of(list, read_lines(str(path)))
        assert said[name].startswith(str(path))
    assert "No such file" in said["missing"]
    assert said["utf8"].endswith("utf8 line 2: not UTF-8")
    assert all("breaks off after line" in said[name] for name in ("short", "damaged", "checksum"))
    assert "directory" in problems_of(list, read_lines(str(tmp_path)))[0]


def test_lines_and_their_number_are_bounded(tmp_path):
    """A line that never ends and a file that never ends stop at their bounds, packed or not."""
    path = tmp_path / "long"
    path.write_bytes(b"a\n" + b"x" * 101 + b"\n")
    assert problems_of(list, read_lines(str(path), max_line_bytes=100)) == [f"{path} line 2: longer than 100 bytes"]
    path.write_bytes(gzip.compress(b"\n" * 11))
    assert problems_of(list, read_lines(str(path), max_lines=10)) == [f"{path}: more than 10 lines; cut it"]


def test_a_gzip_bomb_is_stopped_while_it_unpacks(tmp_path):
    """64 MiB of one line in 64 KiB are refused without being held in memory."""
    import tracemalloc

    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb") as stream:
        for _ in range(64):
            stream.write(b" " * (1 << 20))
    tracemalloc.start()
    assert "longer than" in problems_of(list, read_lines(str(path)))[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def problems_if_any(read, *args):
    try:
        read(*args)
    except ConfigError as error:
        return error.problems
    return []


def replay(trace, seed=1, times=None, cut=None):
    return trace_workload(trace, Rngs.from_seed(seed), times or TraceTimes(), cut)


def test_a_replay_has_the_traces_prefixes():
    """Equal hash_ids are equal tokens, different ones are different, and unnamed blocks are shared with nobody."""
    workload = replay(mooncake())
    assert_ids_are_prefixes(workload)
    assert tokens_of(workload, 0)[:512] == tokens_of(workload, 1)[:512] == tokens_of(workload, 2)
    assert [len(tokens_of(workload, i)) for i in range(4)] == [1000, 1500, 512, 700]
    assert workload.prefixes.sequence_block_ids(1).tolist() == [0, 2]


def test_ticks_are_spread_and_a_speedup_divides():
    """The 3-second ticks are found and spread before the speedup; a tick of 0 leaves the times."""
    rows = [f'{{"timestamp": {3000 * (i // 10)}, "input_length": 5, "output_length": 1}}' for i in range(200)]
    trace = mooncake("\n".join(rows))
    ticks = np.arange(200) // 10 * 3.0
    spread = replay(trace).arrival_s
    assert np.all((spread >= ticks) & (spread < ticks + 3))
    assert len(set(spread.tolist())) == 200
    assert replay(trace, times=TraceTimes(speedup=10)).arrival_s == pytest.approx(spread / 10)
    assert replay(trace, times=TraceTimes(tick_s=0)).arrival_s.tolist() == ticks.tolist()
    assert replay(trace, seed=2).arrival_s.tolist() != spread.tolist()
    assert replay(trace, seed=1).arrival_s.tolist() == spread.tolist()


def test_a_cut_of_a_trace():
    """From and to count trace time, the end excluded; times count from the cut's start; a count takes the first."""
    rows = [f'{{"timestamp": {1000 * i}, "input_length": {i + 1}, "output_length": 1}}' for i in range(10)]
    trace = mooncake("\n".join(rows))
    workload = replay(trace, times=TraceTimes(speedup=2), cut=TraceCut(3.0, 7.0))
    assert workload.prompt_tokens.tolist() == [4, 5, 6, 7]
    assert workload.arrival_s.tolist() == [0, 0.5, 1, 1.5]
    assert tokens_of(workload, 0) == tokens_of(replay(trace), 3)
    assert replay(trace, cut=TraceCut(requests=2)).prompt_tokens.tolist() == [1, 2]
    assert replay(trace, times=TraceTimes(until_s=2.5)).prompt_tokens.tolist() == [1, 2, 3]
    assert "10 requests there; 11 are" in problems_of(replay, trace, 1, None, TraceCut(requests=11))[0]
    assert "no request from 20 s" in problems_of(replay, trace, 1, None, TraceCut(20.0))[0]


def test_a_trace_at_another_rate_keeps_its_requests():
    """With a load the lengths keep their order and the times are the load's."""
    trace = mooncake()
    workload = replay(trace, times=Load(SteadyRate(2.0), "constant", max_concurrency=7))
    assert workload.arrival_s.tolist() == [0, 0.5, 1.0, 1.5]
    assert workload.prompt_tokens.tolist() == trace.prompt_tokens.tolist()
    assert workload.max_concurrency == 7
    assert replay(trace, times=Load(None, max_concurrency=2)).closed_loop


@pytest.mark.parametrize(
    "options", [{"speedup": 0.0}, {"speedup": math.nan}, {"tick_s": -1.0}, {"until_s": 0.0}, {"max_concurrency": 0}]
)
def test_times_that_cannot_be_are_refused(options):
    """Speedups, ticks, durations and caps outside their bounds raise ConfigError."""
    with pytest.raises(ConfigError):
        TraceTimes(**options)


@settings(deadline=None, max_examples=60)
@given(shape=shapes(), seed=st.integers(0, 99))
def test_a_workload_written_as_a_trace_reads_back(shape, seed):
    """Times to the microsecond, lengths and the identity of prefixes survive Mooncake's format."""
    from dataclasses import replace

    from prfaas.loadgen.workloads.synthetic import Turns

    workload = workload_of(replace(shape, turns=Turns()), 20, seed)
    text = b"".join(write_mooncake(workload)).decode()
    back = replay(mooncake(text, block_tokens=shape.block_tokens), times=TraceTimes(tick_s=0))
    assert back.arrival_s + workload.arrival_s[0] == pytest.approx(workload.arrival_s, abs=2e-6)
    assert back.prompt_tokens.tolist() == workload.prompt_tokens.tolist()
    assert back.output_tokens.tolist() == workload.output_tokens.tolist()
    for i in range(20):
        assert back.prefixes.block_ids(i).tolist() == workload.prefixes.block_ids(i).tolist()


def test_what_has_no_time_is_no_trace():
    """A closed loop can't be written as a trace."""
    (problem,) = problems_of(list, write_mooncake(replay(mooncake(), times=Load(None, max_concurrency=2))))
    assert "closed loop" in problem


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(alphabet=st.sampled_from(list('{}[]":,.-0123456789etimsapnul_hrgo\n')), max_size=300),
    kind=st.sampled_from([mooncake, azure]),
)
def test_no_text_crashes_a_reader(text, kind):
    """Whatever the text: a trace or a ConfigError, never another exception."""
    for body in (text, MOONCAKE + text, HEADER + text):
        assert not any("\n" in problem for problem in problems_if_any(kind, body))
