"""What is asked for, of `prfaas-loadgen plan`: lengths by the flags of `run` and `simulate`, as distributions.

Only what lengths and prefixes say matters here, not when requests come. A log-normal stays in closed form, so that a
plan has no noise of sampling; a trace and a histogram count as they are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError, UsageError
from prfaas.common.perfmodel import lengths as distributions
from prfaas.common.perfmodel.lengths import LengthDistribution
from prfaas.common.scheduling.planner import Demand
from prfaas.loadgen.workloads import lengths as sampled
from prfaas.loadgen.workloads.length_specs import parse_lengths
from prfaas.loadgen.workloads.lines import read_lines
from prfaas.loadgen.workloads.traces import MOONCAKE_BLOCK_TOKENS, Trace, read_azure, read_mooncake

MAX_FILE_BYTES = 1 << 28
READERS = {"mooncake_trace": read_mooncake, "azure_trace": read_azure}
RANDOM = "random"
OTHER_NAMES = {
    "--dataset-path": ("--input-file",),
    "--random-input-len": ("--input-len", "--isl"),
    "--random-output-len": ("--output-len", "--osl"),
}
"""Taken as well, as by `run`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags named as those of `run` and `simulate`, which take more."""
    add = parser.add_argument
    add("--dataset-name", choices=(RANDOM, *READERS), metavar="NAME", help=f"{RANDOM}, {', '.join(READERS)} [{RANDOM}]")
    add("--dataset-path", metavar="FILE", help="the trace, plain or .gz")
    add("--isl-block-size", type=int, metavar="N", help=f"tokens a block of the trace [{MOONCAKE_BLOCK_TOKENS}]")
    add("--prefix-hits", choices=("none", "all"), help="are blocks seen earlier in the trace cached? [none]")
    add("--random-input-len", metavar="LENGTHS", help="uncached tokens: N, uniform:LOW:HIGH ... [paper]")
    add("--random-output-len", metavar="LENGTHS", help="output tokens, likewise [paper: 1024]")
    add("--histogram", metavar="FILE", help='uncached tokens as JSON: {"lengths": [...], "weights": [...]}')
    for shown, others in OTHER_NAMES.items():
        for other in others:
            add(other, dest=shown.removeprefix("--").replace("-", "_"), help=argparse.SUPPRESS)


def read(options: argparse.Namespace) -> tuple[Demand, str]:
    """The demand, and a word on it for the report. Raises UsageError, ConfigError."""
    name = options.dataset_name or RANDOM
    if name != RANDOM:
        return _of_trace(options, name)
    for flag in ("dataset_path", "isl_block_size", "prefix_hits"):
        if getattr(options, flag) is not None:
            raise UsageError(f"--{flag.replace('_', '-')} is for --dataset-name {' or '.join(READERS)}")
    output = lengths_from("--random-output-len", options.random_output_len or "paper").mean()
    if options.histogram is not None:
        if options.random_input_len is not None:
            raise UsageError("--histogram and --random-input-len both say the lengths; leave one out")
        return Demand(read_histogram(Path(options.histogram)), output), options.histogram
    text = options.random_input_len or "paper"
    try:
        made = distribution(lengths_from("--random-input-len", text))
    except ValueError as error:
        raise UsageError(f"--random-input-len {text}: {error}") from None
    return Demand(made, output), f"{text} ({_words(made)})" if text == "paper" else text


def lengths_from(flag: str, text: str) -> sampled.Lengths:
    """What the value of `flag`, --random-input-len or --random-output-len, says. Raises ConfigError that names the flag
    and its shortest other name, which may be the one that was given."""
    paper = sampled.PAPER_INPUT_LENGTHS if flag == "--random-input-len" else sampled.PAPER_OUTPUT_LENGTHS
    try:
        return parse_lengths(text, paper)
    except ConfigError as error:
        where = f"{flag} ({OTHER_NAMES[flag][-1]}) {text}"
        raise ConfigError([f"{where}: {problem}" for problem in error.problems]) from None


def distribution(of: sampled.Lengths) -> LengthDistribution:
    """The same lengths, for the planner."""
    match of:
        case sampled.Fixed():
            return distributions.fixed(of.tokens)
        case sampled.Uniform():
            return distributions.uniform(of.low, of.high)
        case sampled.TruncatedLogNormal() if of.low < of.high:
            return distributions.TruncatedLogNormal(of.mu, of.sigma, of.low, of.high)
        case sampled.Empirical():
            return distributions.sample_of(of.values)
    return distributions.fixed(of.low)


def _words(made: LengthDistribution) -> str:
    if isinstance(made, distributions.TruncatedLogNormal):
        return f"log-normal μ {made.mu:g}, σ {made.sigma:g} in {made.low:,.0f} to {made.high:,.0f}"
    return f"{made.low:,.0f} to {made.high:,.0f}"


# -- traces -----------------------------------------------------------------------------------------------------------


def _of_trace(options: argparse.Namespace, name: str) -> tuple[Demand, str]:
    for flag in ("random_input_len", "random_output_len", "histogram"):
        if getattr(options, flag) is not None:
            raise UsageError(f"--{flag.replace('_', '-')} is for --dataset-name {RANDOM}")
    if options.dataset_path is None:
        raise UsageError(f"--dataset-name {name} needs the file: --dataset-path")
    block_tokens = MOONCAKE_BLOCK_TOKENS if options.isl_block_size is None else options.isl_block_size
    trace = READERS[name](read_lines(options.dataset_path), options.dataset_path, block_tokens=block_tokens)
    cached = options.prefix_hits == "all"
    uncached = uncached_tokens(trace) if cached else trace.prompt_tokens
    output = float(trace.output_tokens.mean())
    held = float(trace.prompt_tokens.mean()) + output / 2
    words = f"{trace.name}, {trace.prompt_tokens.size:,} requests, prefix hits: {'all' if cached else 'none'}"
    return Demand(distributions.sample_of(uncached), output, held), words


def uncached_tokens(trace: Trace) -> NDArray[np.int64]:
    """[requests]: tokens of each prompt in blocks that no earlier request had, at least 1: what a cache without bounds
    leaves to compute. Equal ids mean equal whole prefixes, so the blocks that were seen come first."""
    counts = np.diff(trace.block_offsets)
    request = np.repeat(np.arange(counts.size), counts)
    _, first, inverse = np.unique(trace.block_ids, return_index=True, return_inverse=True)
    seen = request[first][inverse] < request
    hits = np.bincount(request, seen, counts.size).astype(np.int64)
    left: NDArray[np.int64] = np.maximum(trace.prompt_tokens - hits * trace.block_tokens, 1)
    return left


# -- histograms -------------------------------------------------------------------------------------------------------


def read_histogram(path: Path) -> distributions.Empirical:
    """A JSON list of lengths in tokens, or {"lengths": [...], "weights": [...]}. Raises ConfigError with the place."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError([f"{path}: more than {MAX_FILE_BYTES} bytes"])
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from None
    except ValueError as error:
        raise ConfigError([f"{path}: not JSON: {error}"]) from None
    parts = document if isinstance(document, dict) else {"lengths": document}
    if unknown := sorted(set(parts) - {"lengths", "weights"}):
        raise ConfigError([f"{path}: unknown key {unknown[0]!r}; there are lengths and weights"])
    try:
        lengths = _array(parts.get("lengths"), "lengths")
        weights = None if parts.get("weights") is None else _array(parts["weights"], "weights")
        return distributions.Empirical(lengths, weights)
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from None


def _array(values: Any, name: str) -> NDArray[np.float64]:
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list of numbers")
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name}: item {i + 1} is {value!r}; it must be a number")
    return np.array(values, np.float64)
