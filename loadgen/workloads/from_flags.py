"""From flags to a recipe, with every mistake reported, each in a line that names its flag."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar, cast

from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.arrivals import MAX_CONCURRENCY, Gaps, Load, Rate, RateCurve, SteadyRate
from prfaas.loadgen.workloads.flags import (
    AZURE,
    CONVERSATION,
    DATASETS,
    DEFAULT_INPUT_TOKENS,
    DEFAULT_OUTPUT_TOKENS,
    DEFAULT_PREFIX_TOKENS,
    DEFAULT_PREFIXES,
    DEFAULT_PROMPTS,
    DEFAULT_SUFFIX_TOKENS,
    DEFAULT_TURNS,
    PREFIX,
    RANDOM,
    SAME_DATASET,
    TRACES,
    WHAT,
    WHEN,
)
from prfaas.loadgen.workloads.length_specs import parse_lengths
from prfaas.loadgen.workloads.lengths import (
    MAX_LENGTH_TOKENS,
    PAPER_INPUT_LENGTHS,
    PAPER_OUTPUT_LENGTHS,
    Fixed,
    Lengths,
    Uniform,
)
from prfaas.loadgen.workloads.lines import read_lines
from prfaas.loadgen.workloads.prefixes import DEFAULT_BLOCK_TOKENS
from prfaas.loadgen.workloads.rates import parse_rate_schedule, read_rate_series, read_rates
from prfaas.loadgen.workloads.recipe import Recipe, SyntheticRecipe, TraceRecipe
from prfaas.loadgen.workloads.replay import TraceCut, TraceTimes
from prfaas.loadgen.workloads.rngs import MAX_SEED
from prfaas.loadgen.workloads.synthetic import MAX_SHARED_PREFIXES, SharedPrefixes, SyntheticShape, Turns
from prfaas.loadgen.workloads.traces import read_azure, read_mooncake
from prfaas.loadgen.workloads.workload import MAX_REQUESTS, Workload

MAX_NUMBER = 1e12
MIN_RATE_PER_S, MAX_RATE_PER_S = 1e-4, 1e6
"""One request in three hours, and more than any client sends."""
MIN_SPEEDUP, MAX_SPEEDUP = 1e-3, 1e6
MAX_CURVE_S = 1e9
"""The last change of a rate: thirty years."""
GAPS = ("poisson", "gamma", "constant")
CURVES = ("request_rate_series", "rate_schedule", "rate_curve")

Made = TypeVar("Made")


def workload_from(args: argparse.Namespace) -> Workload:
    """The workload of the flags, under their own seed. Raises ConfigError with one line a mistake."""
    return recipe_from(args).workload()


def recipe_from(args: argparse.Namespace) -> Recipe:
    """Reads the flags and the files that they name. Raises ConfigError with one line a mistake."""
    given = _Given(args)
    dataset = given.dataset()
    seed = given.whole("seed", 0, MAX_SEED, 0)
    block_tokens = given.whole("isl_block_size", 1, MAX_LENGTH_TOKENS, DEFAULT_BLOCK_TOKENS)
    read: Callable[[_Given, str, int, int], Recipe | None] = _trace if dataset in TRACES else _synthetic
    recipe = read(given, dataset, seed, block_tokens)
    if given.problems or recipe is None:
        raise ConfigError(given.problems)
    return recipe


class _Given:
    """Reads flags one by one and remembers what was wrong; a wrong one reads as its default."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._flags = {flag.dest: flag for flag in (*WHAT, *WHEN)}
        self.problems: list[str] = []

    def text(self, dest: str) -> str | None:
        return cast("str | None", getattr(self._args, dest, None))

    def has(self, *dests: str) -> bool:
        return any(self.text(dest) is not None for dest in dests)

    def name(self, dest: str) -> str:
        return self._flags[dest].names[0]

    def wrong(self, dest: str, problem: str) -> None:
        self.problems.append(f"{self.name(dest)} {self.text(dest)}: {problem}")

    def dataset(self) -> str:
        """Also says which flags are for other data sets."""
        name = self.text("dataset_name") or RANDOM
        name = SAME_DATASET.get(name, name)
        if name not in DATASETS:
            self.wrong("dataset_name", f"there are {', '.join(DATASETS)}")
            return RANDOM
        for flag in self._flags.values():
            if self.has(flag.dest) and name not in flag.datasets:
                self.problems.append(f"{flag.names[0]} is not for {name}, but for {', '.join(flag.datasets)}")
        return name

    def whole(self, dest: str, low: int, high: int, default: int) -> int:
        text = self.text(dest)
        if text is None:
            return default
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            self.wrong(dest, f"it is a whole number from {low:,} to {high:,}")
            return default
        return value

    def maybe_whole(self, dest: str, low: int, high: int) -> int | None:
        return self.whole(dest, low, high, low) if self.has(dest) else None

    def decimal(self, dest: str, default: float, low: float = 0.0, *, above: bool = False) -> float:
        """`above`: `low` itself is not allowed."""
        text = self.text(dest)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= MAX_NUMBER or (above and value == low):
            self.wrong(dest, f"it is a number {'above' if above else 'from'} {low:g}{'' if above else ' upwards'}")
            return default
        return value

    def within(self, dest: str, default: float, low: float, high: float) -> float:
        value = self.decimal(dest, default, above=True)
        if self.has(dest) and value != default and not low <= value <= high:
            self.wrong(dest, f"it is a number from {low:g} to {high:g}")
            return default
        return value

    def made(self, make: Callable[[], Made], *dests: str) -> Made | None:
        """What `make` makes; its ConfigError becomes mistakes of the first of `dests` that was given, or of none."""
        try:
            return make()
        except ConfigError as error:
            dest = next((dest for dest in dests if self.has(dest)), None)
            for problem in error.problems:
                if dest is None:
                    self.problems.append(problem)
                elif problem.lstrip("'").startswith(self.text(dest) or ""):
                    self.problems.append(f"{self.name(dest)}: {problem}")
                else:
                    self.wrong(dest, problem)
            return None

    def lengths(self, dest: str, default: int, paper: Lengths) -> Lengths:
        text = self.text(dest)
        if text is None:
            return Fixed(default)
        return self.made(lambda: parse_lengths(text, paper), dest) or Fixed(default)


def _synthetic(given: _Given, dataset: str, seed: int, block_tokens: int) -> SyntheticRecipe | None:
    prefix = dataset == PREFIX
    new = given.lengths(
        "prefix_repetition_suffix_len" if prefix else "random_input_len",
        DEFAULT_SUFFIX_TOKENS if prefix else DEFAULT_INPUT_TOKENS,
        PAPER_INPUT_LENGTHS,
    )
    output = given.lengths(
        "prefix_repetition_output_len" if prefix else "random_output_len", DEFAULT_OUTPUT_TOKENS, PAPER_OUTPUT_LENGTHS
    )
    new, output = _ranged(given, new, output)
    prefixes, turns = _prefixes(given, dataset), _turns(given, dataset)
    context = given.whole("max_context_length", 1, MAX_LENGTH_TOKENS, MAX_LENGTH_TOKENS)
    load = _load(given)
    if given.has("speedup") and not given.has("rate_curve"):
        given.problems.append("--speedup is for the times of a trace or of --rate-curve; change the rate instead")
    if given.has("num_prompts", "conversation_num") and given.has("num_prompts") == given.has("conversation_num"):
        given.problems.append("--num-prompts and --conversation-num both say how much; give one")
    requests = given.maybe_whole("num_prompts", 1, MAX_REQUESTS)
    conversations = given.maybe_whole("conversation_num", 1, MAX_REQUESTS)
    if requests is None and conversations is None and (load is None or load.rate is None or _endless(load)):
        requests = DEFAULT_PROMPTS
    if load is None or prefixes is None or turns is None:
        return None
    shape = given.made(
        lambda: SyntheticShape(new, output, prefixes, turns, context, block_tokens),
        "max_context_length",
        "random_input_len",
        "prefix_repetition_suffix_len",
    )
    if shape is None:
        return None
    if requests is None and conversations is None and given.made(load.enough, "benchmark_duration") is None:
        return None
    return SyntheticRecipe(dataset, seed, shape, load, requests, conversations)


def _endless(load: Load) -> bool:
    return math.isinf(load.until_s) or (load.rate is not None and math.isinf(load.rate.mean()))


def _ranged(given: _Given, new: Lengths, output: Lengths) -> tuple[Lengths, Lengths]:
    if not given.has("random_range_ratio"):
        return new, output
    ratio = given.decimal("random_range_ratio", 0.0)
    if not (isinstance(new, Fixed) and isinstance(output, Fixed)):
        given.problems.append("--random-range-ratio is for fixed lengths; write uniform:LOW:HIGH, or leave it out")
        return new, output
    both = (new.tokens, output.tokens)
    ranged = given.made(lambda: [Uniform.around(tokens, ratio) for tokens in both], "random_range_ratio")
    return (ranged[0], ranged[1]) if ranged else (new, output)


def _prefixes(given: _Given, dataset: str) -> SharedPrefixes | None:
    shared = dataset == PREFIX
    tokens = given.whole("prefix_repetition_prefix_len", 0, MAX_LENGTH_TOKENS, DEFAULT_PREFIX_TOKENS if shared else 0)
    default = DEFAULT_PREFIXES if shared else int(tokens > 0)
    count = given.whole("prefix_repetition_num_prefixes", 0, MAX_SHARED_PREFIXES, default)
    if count and not tokens and given.has("prefix_repetition_num_prefixes"):
        given.problems.append("--prefix-repetition-num-prefixes without --prefix-repetition-prefix-len says nothing")
    zipf = given.decimal("prefix_zipf", 0.0)
    return given.made(lambda: SharedPrefixes(count, tokens, zipf), "prefix_zipf")


def _turns(given: _Given, dataset: str) -> Turns | None:
    return given.made(
        lambda: Turns(
            given.decimal("conversation_turn_mean", DEFAULT_TURNS if dataset == CONVERSATION else 1, 1.0),
            given.decimal("conversation_turn_stddev", 0.0),
            given.decimal("conversation_turn_delay_mean", 0.0) / 1000,
            given.decimal("conversation_turn_delay_stddev", 0.0) / 1000,
        ),
        "conversation_turn_mean",
    )


def _load(given: _Given) -> Load | None:
    """The load of the flags; None after a mistake in them."""
    before = len(given.problems)
    rate = _rate(given)
    cap = given.maybe_whole("max_concurrency", 1, MAX_CONCURRENCY)
    burstiness = given.decimal("burstiness", 1.0, above=True)
    gaps = given.text("arrival_pattern") or ("gamma" if burstiness != 1.0 else "poisson")
    if gaps not in GAPS:
        given.wrong("arrival_pattern", f"there are {', '.join(GAPS)}")
    elif gaps != "gamma" and burstiness != 1.0:
        given.problems.append(f"--burstiness is the shape of gamma gaps; --arrival-pattern {gaps} has none")
    until_s = given.decimal("benchmark_duration", math.inf, above=True)
    if len(given.problems) > before:
        return None
    endless = rate is None or math.isinf(rate.mean())
    if endless and cap is not None:
        return Load(None, max_concurrency=cap, until_s=until_s)
    return Load(rate or SteadyRate(math.inf), cast("Gaps", gaps), burstiness, cap, until_s)


def _rate(given: _Given) -> Rate | None:
    """None: none was given."""
    curves = [dest for dest in CURVES if given.has(dest)]
    if len(curves) > 1:
        given.problems.append(f"{' and '.join(given.name(dest) for dest in curves)} both give a rate; give one")
        return None
    steady = _steady(given)
    if not curves:
        if given.has("rate_curve_category"):
            given.problems.append("--rate-curve-category without --rate-curve says nothing")
        return steady
    if curves != ["rate_curve"]:
        if given.has("request_rate"):
            given.problems.append(f"--request-rate and {given.name(curves[0])} both give a rate; give one")
        made = given.made(lambda: _curve(given, curves[0]), curves[0])
        return None if made is None else _bounded(given, made, curves[0])
    curve = given.made(lambda: _curve(given, "rate_curve"), "rate_curve")
    if curve is None:
        return None
    curve = curve.faster(given.within("speedup", 1.0, MIN_SPEEDUP, MAX_SPEEDUP))
    if steady is None:
        return _bounded(given, curve, "rate_curve")
    if math.isinf(steady.requests_per_s):
        given.problems.append("--request-rate inf has no curve; give the mean rate, or leave it out")
        return None
    mean = curve.mean()
    if not mean > 0:
        given.wrong("rate_curve", "all its rates are 0, so that none can be scaled to --request-rate")
        return None
    return _bounded(given, curve.scaled(steady.requests_per_s / mean), "rate_curve")


def _bounded(given: _Given, curve: RateCurve, dest: str) -> RateCurve:
    """The curve; one that would take for ever, or no time at all, is a mistake. A rate of 0 in between is none."""
    lasting = curve.mean() if curve.period_s is not None else float(curve.requests_per_s[-1])
    if not lasting >= MIN_RATE_PER_S or not max(float(curve.requests_per_s.max()), curve.mean()) <= MAX_RATE_PER_S:
        given.wrong(dest, f"a rate is a number from {MIN_RATE_PER_S:g} to {MAX_RATE_PER_S:g} requests/s")
    if curve.starts_s[-1] > MAX_CURVE_S:
        given.wrong(dest, f"its last change is at {curve.starts_s[-1]:g} s; it must be by {MAX_CURVE_S:g} s")
    return curve


def _steady(given: _Given) -> SteadyRate | None:
    if not given.has("request_rate"):
        return None
    if (given.text("request_rate") or "").lower() in ("inf", "infinity"):
        return SteadyRate(math.inf)
    return SteadyRate(given.within("request_rate", math.inf, MIN_RATE_PER_S, MAX_RATE_PER_S))


def _curve(given: _Given, dest: str) -> RateCurve:
    text = given.text(dest) or ""
    if dest == "rate_schedule":
        return parse_rate_schedule(text)
    if dest == "request_rate_series":
        return read_rate_series(read_lines(text), text)
    return read_rates(read_lines(text), text, given.text("rate_curve_category"))


def _trace(given: _Given, dataset: str, seed: int, block_tokens: int) -> TraceRecipe | None:
    times = _trace_times(given)
    start_ms = given.decimal("fixed_schedule_start_offset", 0.0)
    end_ms = given.decimal("fixed_schedule_end_offset", math.inf)
    if start_ms >= end_ms:
        given.problems.append("--fixed-schedule-start-offset is not before --fixed-schedule-end-offset")
    cut = TraceCut(start_ms / 1000, end_ms / 1000, given.maybe_whole("num_prompts", 1, MAX_REQUESTS))
    path = given.text("dataset_path")
    if not path:
        given.problems.append(f"--dataset-name {dataset} needs its file: --dataset-path FILE")
        return None
    read = read_azure if dataset == AZURE else read_mooncake
    trace = given.made(lambda: read(read_lines(path), path, block_tokens=block_tokens))
    if trace is None or times is None:
        return None
    if start_ms < end_ms:
        given.made(lambda: cut.rows(trace.at_s, path), "num_prompts", "fixed_schedule_start_offset")
    return TraceRecipe(seed, trace, times, cut)


def _trace_times(given: _Given) -> Load | TraceTimes | None:
    own, others = given.has("fixed_schedule"), given.has("no_fixed_schedule")
    rated = given.has("request_rate", *CURVES)
    if own and (others or rated):
        given.problems.append("--fixed-schedule keeps the trace's own times; leave it out to give a rate")
    if rated or others:
        if given.has("speedup") and not given.has("rate_curve"):
            given.problems.append("--speedup is for the trace's own times; change the rate instead")
        return _load(given)
    for dest in ("burstiness", "arrival_pattern"):
        if given.has(dest):
            given.problems.append(f"{given.name(dest)} needs a rate; the trace keeps its own times without one")
    before = len(given.problems)
    times = TraceTimes(
        given.within("speedup", 1.0, MIN_SPEEDUP, MAX_SPEEDUP),
        given.decimal("trace_tick_s", 0.0) if given.has("trace_tick_s") else None,
        given.maybe_whole("max_concurrency", 1, MAX_CONCURRENCY),
        given.decimal("benchmark_duration", math.inf, above=True),
    )
    return None if len(given.problems) > before else times
