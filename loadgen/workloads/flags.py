"""The flags of a workload, shared by `prfaas-loadgen run`, `simulate` and `plan`.

Names come from `vllm bench serve` where it has one, else from aiperf, else they are ours; the other tool's name for the
same thing is taken too, unlisted in `--help`.

| flag | vLLM | aiperf | ours |
|---|---|---|---|
| what | --dataset-name, --dataset-path, --num-prompts, --seed | --custom-dataset-type, --input-file, --request-count, \
--random-seed | |
| lengths | --random-input-len, --random-output-len, --random-range-ratio | --isl, --osl | grammar of LENGTHS |
| shared prefixes | --prefix-repetition-prefix-len, -suffix-len, -output-len, -num-prefixes | --prefix-prompt-length, \
--num-prefix-prompts | --prefix-zipf |
| conversations | | --conversation-num, --conversation-turn-mean, -stddev, --conversation-turn-delay-mean, -stddev, \
--max-context-length | |
| arrivals | --request-rate, --burstiness, --max-concurrency | --arrival-pattern, --arrival-smoothness, --concurrency, \
--request-rate-series, --benchmark-duration | --rate-schedule, --rate-curve, --rate-curve-category |
| traces | --self-timed, --timed-trace-chunk-hash-size | --fixed-schedule, --fixed-schedule-start-offset, -end-offset, \
--isl-block-size, --replay-speedup | --speedup, --trace-tick-s |

As in vLLM an infinite rate sends everything at once, and with --max-concurrency it is a closed loop. Unlike there, a
trace keeps its own times unless a rate, or --no-fixed-schedule, is given. The parser collects text only;
`from_flags.py` reads it and reports all mistakes together.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from prfaas.loadgen.workloads.prefixes import DEFAULT_BLOCK_TOKENS

RANDOM, PREFIX, CONVERSATION, MOONCAKE, AZURE = (
    "random",
    "prefix_repetition",
    "conversation",
    "mooncake_trace",
    "azure_trace",
)
DATASETS = (RANDOM, PREFIX, CONVERSATION, MOONCAKE, AZURE)
TRACES = (MOONCAKE, AZURE)
SYNTHETIC = (RANDOM, PREFIX, CONVERSATION)
SAME_DATASET = {"timed_trace": MOONCAKE}
"""vLLM's name for the format."""
DEFAULT_PROMPTS = 1000
DEFAULT_INPUT_TOKENS, DEFAULT_OUTPUT_TOKENS = 1024, 128
DEFAULT_PREFIX_TOKENS, DEFAULT_PREFIXES, DEFAULT_SUFFIX_TOKENS = 256, 10, 256
DEFAULT_TURNS = 4


@dataclass(frozen=True, slots=True)
class Flag:
    """`names`: the first is listed, the others are taken as well. `datasets`: those that it means something to."""

    names: tuple[str, ...]
    metavar: str
    help: str
    datasets: tuple[str, ...] = DATASETS
    common: bool = False
    """Listed without `show_all`."""
    switch: bool = False

    @property
    def dest(self) -> str:
        return self.names[0].removeprefix("--").replace("-", "_")


WHAT = (
    Flag(("--dataset-name", "--custom-dataset-type"), "NAME", f"{', '.join(DATASETS)} [{RANDOM}]", common=True),
    Flag(("--dataset-path", "--input-file"), "FILE", "the trace, plain or .gz", TRACES, common=True),
    Flag(
        ("--num-prompts", "--request-count", "--num-requests"),
        "N",
        f"requests [{DEFAULT_PROMPTS}; of a trace: all]",
        common=True,
    ),
    Flag(("--seed", "--random-seed"), "N", "of lengths, arrivals and prompts [0]", common=True),
    Flag(
        ("--random-input-len", "--input-len", "--isl", "--synthetic-input-tokens-mean", "--prompt-input-tokens-mean"),
        "LENGTHS",
        f"prompt tokens, a turn's new ones: N, uniform:LOW:HIGH, lognormal:MU:SIGMA:LOW:HIGH, empirical:FILE, paper "
        f"[{DEFAULT_INPUT_TOKENS}]",
        (RANDOM, CONVERSATION),
        common=True,
    ),
    Flag(
        ("--random-output-len", "--output-len", "--osl", "--output-tokens-mean", "--prompt-output-tokens-mean"),
        "LENGTHS",
        f"output tokens, likewise [{DEFAULT_OUTPUT_TOKENS}]",
        (RANDOM, CONVERSATION),
        common=True,
    ),
    Flag(
        ("--random-range-ratio",),
        "R",
        "fixed lengths become uniform over N × (1 ± R) [0]",
        (RANDOM, CONVERSATION),
    ),
    Flag(
        ("--prefix-repetition-prefix-len", "--prefix-prompt-length", "--prompt-prefix-length"),
        "N",
        f"tokens of a shared prefix [{DEFAULT_PREFIX_TOKENS}; conversations: 0]",
        (PREFIX, CONVERSATION),
    ),
    Flag(
        (
            "--prefix-repetition-num-prefixes",
            "--num-prefix-prompts",
            "--prompt-prefix-pool-size",
            "--prefix-prompt-pool-size",
        ),
        "N",
        f"shared prefixes [{DEFAULT_PREFIXES}; conversations: 1]",
        (PREFIX, CONVERSATION),
    ),
    Flag(
        ("--prefix-repetition-suffix-len",), "LENGTHS", f"tokens after the prefix [{DEFAULT_SUFFIX_TOKENS}]", (PREFIX,)
    ),
    Flag(("--prefix-repetition-output-len",), "LENGTHS", f"output tokens [{DEFAULT_OUTPUT_TOKENS}]", (PREFIX,)),
    Flag(("--prefix-zipf",), "S", "the k-th prefix is chosen in proportion to k^-S [0]", (PREFIX, CONVERSATION)),
    Flag(
        ("--conversation-num", "--num-conversations", "--num-sessions"),
        "N",
        "conversations, instead of --num-prompts",
        (CONVERSATION,),
    ),
    Flag(
        ("--conversation-turn-mean", "--session-turns-mean"),
        "X",
        f"turns a conversation [{DEFAULT_TURNS}]",
        (CONVERSATION,),
    ),
    Flag(("--conversation-turn-stddev", "--session-turns-stddev"), "X", "their deviation [0]", (CONVERSATION,)),
    Flag(
        ("--conversation-turn-delay-mean", "--session-turn-delay-mean"),
        "MS",
        "think time between an answer and the next turn [0]",
        (CONVERSATION,),
    ),
    Flag(
        ("--conversation-turn-delay-stddev", "--session-turn-delay-stddev"), "MS", "its deviation [0]", (CONVERSATION,)
    ),
    Flag(
        ("--max-context-length",),
        "N",
        "a conversation ends before a turn with more tokens, output included",
        SYNTHETIC,
    ),
    Flag(
        (
            "--isl-block-size",
            "--timed-trace-chunk-hash-size",
            "--prompt-input-tokens-block-size",
            "--synthetic-input-tokens-block-size",
        ),
        "N",
        f"tokens a prefix block [{DEFAULT_BLOCK_TOKENS}]",
    ),
)
WHEN = (
    Flag(("--request-rate",), "RATE", "requests/s; inf: all at once, or a closed loop [inf]", common=True),
    Flag(
        ("--burstiness", "--arrival-smoothness", "--vllm-burstiness"),
        "B",
        "shape of gamma gaps: below 1 bursty, 1 Poisson, above 1 even [1]",
        common=True,
    ),
    Flag(("--arrival-pattern", "--request-rate-mode"), "NAME", "poisson, gamma or constant gaps [by --burstiness]"),
    Flag(
        ("--max-concurrency", "--concurrency"),
        "N",
        "most requests in flight; without a rate a closed loop of N users",
        common=True,
    ),
    Flag(("--request-rate-series",), "FILE", 'rates in straight lines: {"points": [{"time_s": 0, "qps": 5}, …]}'),
    Flag(("--rate-schedule",), "T:RATE,…", "rates in steps, such as a burst: 0:2,600:8,720:2"),
    Flag(("--rate-curve",), "FILE", "rates of a day from ServeGen's CSV; --request-rate sets their mean"),
    Flag(("--rate-curve-category",), "NAME", "which of the curves in the file"),
    Flag(("--benchmark-duration",), "S", "nothing is sent that is scheduled later"),
    Flag(
        ("--speedup", "--replay-speedup", "--synthesis-speedup-ratio"),
        "X",
        "times of a trace, or of --rate-curve, pass X times as fast [1]",
        common=True,
    ),
    Flag(("--fixed-schedule", "--self-timed"), "", "the trace's own times (the default)", TRACES, switch=True),
    Flag(("--no-fixed-schedule", "--no-self-timed"), "", "not the trace's own times", TRACES, switch=True),
    Flag(("--fixed-schedule-start-offset",), "MS", "only the trace from there", TRACES),
    Flag(("--fixed-schedule-end-offset",), "MS", "only the trace up to there", TRACES),
    Flag(
        ("--trace-tick-s",),
        "S",
        "times recorded in ticks of S are spread within them; 0: kept [as found in the trace]",
        TRACES,
    ),
)


def add_workload_arguments(parser: argparse.ArgumentParser, *, show_all: bool = False) -> None:
    """Adds the flags in two groups. `--help` lists the common ones, with `show_all` all; all are taken either way."""
    for title, flags in (("what is asked for", WHAT), ("when", WHEN)):
        group = parser.add_argument_group(title)
        for flag in flags:
            shown = flag.common or show_all
            for place, name in enumerate(flag.names):
                text = flag.help.replace("%", "%%") if shown and not place else argparse.SUPPRESS
                if flag.switch:
                    group.add_argument(name, dest=flag.dest, action="store_true", default=None, help=text)
                else:
                    group.add_argument(name, dest=flag.dest, metavar=flag.metavar, help=text)
