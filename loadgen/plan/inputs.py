"""What the flags of `prfaas-loadgen plan` describe: demand, pools, prices. Raises UsageError, ConfigError."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

from prfaas.common.errors import ConfigError, UsageError
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.perfmodel.profiles import NodeProfile, named
from prfaas.common.scheduling.planner import Demand, HomePool, OffloadPool, PlannerSettings
from prfaas.loadgen.plan import workload

MAX_GPUS = 1 << 20
MAX_NUMBER = 1e12
DEFAULT_PREFILL, DEFAULT_DECODE = "paper-h200", "paper-h20"
DEFAULT_PREFILL_GPUS, DEFAULT_DECODE_GPUS = 32, 64


@dataclass(frozen=True, slots=True)
class Prices:
    """Dollars; None: not given. prefill, decode: of a GPU-hour in that region. egress: of a GB (10⁹ bytes) that leaves
    the prefill region."""

    prefill: float | None = None
    decode: float | None = None
    egress: float | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is planned. `home.nodes` and `far.nodes` are what the flags say or, with a total or a budget, not yet
    known."""

    demand: Demand
    workload: str
    home: HomePool
    far: OffloadPool
    settings: PlannerSettings
    prices: Prices
    total_gpus: int | None
    budget: float | None
    threshold_tokens: float | None
    rate_per_s: float | None

    @property
    def offload(self) -> tuple[OffloadPool, ...]:
        return (self.far,) if self.far.nodes else ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the deployment, the workload, the link and the limits."""
    add = parser.add_argument
    known = "shipped name or file"
    add("--profile", metavar="P", help=f"{known}: nodes of both regions")
    add("--prefill-profile", metavar="P", help=f"{known}: nodes of the prefill region [{DEFAULT_PREFILL}]")
    add("--decode-profile", metavar="P", help=f"{known}: home nodes, which take both roles [{DEFAULT_DECODE}]")
    add("--prefill-gpus", type=_whole(0, MAX_GPUS), metavar="N", help=f"prefill region [{DEFAULT_PREFILL_GPUS}]")
    add("--decode-gpus", type=_whole(1, MAX_GPUS), metavar="N", help=f"home region [{DEFAULT_DECODE_GPUS}]")
    add("--gpus", type=_whole(1, MAX_GPUS), metavar="N", help="in both regions together: how are they best shared?")
    add("--budget", type=_number(above=0), metavar="$", help="an hour, for GPUs and egress: what is best bought?")
    add("--prefill-gpu-cost", type=_number(), metavar="$", help="a GPU-hour in the prefill region")
    add("--decode-gpu-cost", type=_number(), metavar="$", help="a GPU-hour in the home region")
    add("--egress-cost", type=_number(), metavar="$", help="a GB that leaves the prefill region")
    add("--link-gbps", type=_number(), default=100.0, metavar="G", help="between the regions [100]")
    add("--link-loss", type=_number(), default=0.0, metavar="X", help="share of bytes that are sent again [0]")
    add("--link-share", type=_number(above=0), metavar="X", help="most of the link that may be filled [0.9]")
    add("--wire-ratio", type=_number(above=0), default=1.0, metavar="X", help="bytes sent for a byte of KV [1]")
    workload.add_arguments(parser)
    add("--tpot", type=_number(above=0), default=25.0, metavar="MS", help="longest decode step, ms [25]")
    add("--request-rate", type=_number(above=0), metavar="RATE", help="requests/s to be carried, else exit 2")
    add("--threshold", type=_number(), metavar="TOKENS", help="plan with this threshold instead of the best")
    add("--mode", choices=("mean_time", "time_of_mean"), help="E[T(L)], as queues find it, or the paper's T(E[L])")


def read(options: argparse.Namespace) -> Inputs:
    """Check the flags against one another and load what they name."""
    far, home = _profiles(options)
    searched = options.gpus is not None or options.budget is not None
    if searched and (options.prefill_gpus is not None or options.decode_gpus is not None):
        raise UsageError("--gpus and --budget search for --prefill-gpus and --decode-gpus: give one or the other")
    prices = Prices(options.prefill_gpu_cost, options.decode_gpu_cost, options.egress_cost)
    if options.budget is not None and (prices.prefill is None or prices.decode is None):
        raise UsageError("--budget needs the prices: --prefill-gpu-cost and --decode-gpu-cost")
    if options.budget is not None and options.gpus is None and (prices.prefill == 0 or prices.decode == 0):
        raise UsageError("--budget buys any number of GPUs that cost nothing: name a price, or the most GPUs by --gpus")
    demand, words = workload.read(options)
    try:
        link = LinkProfile.of_gbps(options.link_gbps, loss=options.link_loss)
        settings = PlannerSettings(
            mode=options.mode or PlannerSettings().mode,
            tpot_limit_s=options.tpot * 1e-3,
            link_share=options.link_share or PlannerSettings().link_share,
            wire_ratio=options.wire_ratio,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    return Inputs(
        demand=demand,
        workload=words,
        home=HomePool(home, 0 if searched else _nodes(options.decode_gpus, DEFAULT_DECODE_GPUS, home, "decode")),
        far=OffloadPool(
            far, 0 if searched else _nodes(options.prefill_gpus, DEFAULT_PREFILL_GPUS, far, "prefill"), link
        ),
        settings=settings,
        prices=prices,
        total_gpus=options.gpus,
        budget=options.budget,
        threshold_tokens=options.threshold,
        rate_per_s=options.request_rate,
    )


def _profiles(options: argparse.Namespace) -> tuple[NodeProfile, NodeProfile]:
    if options.profile and options.prefill_profile and options.decode_profile:
        raise UsageError("--profile names nodes of both regions; --prefill-profile and --decode-profile already do")
    problems: list[str] = []
    found: list[NodeProfile] = []
    for name in (
        options.prefill_profile or options.profile or DEFAULT_PREFILL,
        options.decode_profile or options.profile or DEFAULT_DECODE,
    ):
        try:
            found.append(named(name))
        except ConfigError as error:
            problems += [p for p in error.problems if p not in problems]
    if problems:
        raise ConfigError(problems)
    return found[0], found[1]


def _nodes(given: int | None, default: int, profile: NodeProfile, region: str) -> int:
    gpus = default if given is None else given
    if given is None and gpus % profile.gpus:
        raise UsageError(f"--{region}-gpus is needed: profile {profile.name} has {profile.gpus} GPUs a node")
    if gpus % profile.gpus:
        raise UsageError(f"--{region}-gpus {gpus} are not whole nodes of {profile.gpus} GPUs (profile {profile.name})")
    return gpus // profile.gpus


def _whole(least: int, most: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from {least} to {most}")
        return int(text)

    return check


def _number(above: float | None = None) -> Callable[[str], float]:
    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= MAX_NUMBER or (above is not None and value <= above):
            least = "of at least 0" if above is None else f"above {above:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be a number {least} and at most {MAX_NUMBER:g}")
        return value

    return check
