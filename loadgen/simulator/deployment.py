"""The flags that describe a deployment, and the simulation of a workload on it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from prfaas.common.errors import ConfigError
from prfaas.common.perfmodel.lengths import sample_of
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.perfmodel.profiles import NodeProfile, named
from prfaas.common.scheduling.conversion import ConversionSettings
from prfaas.common.scheduling.planner import LIVE, Demand, HomePool, OffloadPool, plan
from prfaas.common.scheduling.policies import (
    ADMIT_ALL,
    AdaptiveThreshold,
    Admission,
    HomogeneousPd,
    OffloadAll,
    RoundRobin,
    StaticThreshold,
)
from prfaas.common.scheduling.slow_planner import SlowPlanner, SlowSettings
from prfaas.common.scheduling.types import AdmittingPolicy
from prfaas.loadgen.simulator.caches import CacheBlind, RegionCaches
from prfaas.loadgen.simulator.case_paper import AWAY, HOME
from prfaas.loadgen.simulator.cluster import Change, Cluster, Group, LinkChange, NodesBack, NodesLost
from prfaas.loadgen.simulator.columns import Load, Outcome
from prfaas.loadgen.simulator.simulation import Simulation
from prfaas.loadgen.simulator.trace_scenario import cache_sizes
from prfaas.loadgen.workloads.schedule import Schedule
from prfaas.loadgen.workloads.workload import Workload

POLICIES = ("adaptive", "static", "homogeneous", "offload-all", "round-robin")


@dataclass(frozen=True, slots=True)
class Deployment:
    """policy: makes a new one. cache_bytes: of each region's pool, 0 = no caches."""

    cluster: Cluster
    policy_name: str
    policy: Callable[[], AdmittingPolicy]
    threshold_tokens: float | None
    cache_bytes: int
    cache_blind: bool
    changes: tuple[Change, ...] = ()
    replan_every_s: float = 0.0
    """The slow planner's period; 0: roles and planned thresholds stay."""

    @property
    def nodes(self) -> dict[str, int]:
        return {f"{group.region} {group.role} ({group.profile.name})": group.nodes for group in self.cluster.groups}

    def as_text(self) -> str:
        """One line."""
        nodes = ", ".join(f"{count} × {name}" for name, count in self.nodes.items())
        threshold = "" if self.threshold_tokens is None else f", threshold {self.threshold_tokens:,.0f} tokens"
        return f"{nodes}; {self.policy_name}{threshold}"

    def run(self, workload: Workload) -> tuple[Outcome, list[str]]:
        """One run, and a line for each conversion that the slow planner made in it; an adaptive policy is given a tick
        a second."""
        policy = self.policy()
        adapt = getattr(policy, "adapt", None)
        caches = self._caches(workload)
        simulation = Simulation(
            self.cluster,
            _load(workload),
            CacheBlind(policy) if self.cache_blind else policy,
            self.changes,
            source=Schedule(workload),
            hold=True,
            caches=caches,
            on_tick=adapt,
            slow=self._slow_planner(),
        )
        outcome = simulation.run()
        names = simulation.snapshot.region_names
        return outcome, [
            f"{at_s:,.0f} s, {names[made.home_region]}: {made.sentence()}"
            for at_s, made in simulation.slow_decisions
            if made.to_prefill
        ]

    def _slow_planner(self) -> SlowPlanner | None:
        if not self.replan_every_s:
            return None
        return SlowPlanner(SlowSettings(ConversionSettings(period_s=self.replan_every_s)))

    def _caches(self, workload: Workload) -> RegionCaches | None:
        if not self.cache_bytes:
            return None
        sizes = cache_sizes(self.cluster.groups[0].profile, workload.prefixes.block_tokens)
        regions = range(len(self.cluster.region_names))
        return RegionCaches(workload.prefixes, workload.prompt_tokens, sizes, dict.fromkeys(regions, self.cache_bytes))


def add_deployment_arguments(parser: argparse.ArgumentParser) -> None:
    """Regions, nodes, the link between them, and the policy."""
    add = parser.add_argument_group("where it runs").add_argument
    add("--prefill-profile", metavar="P", default="paper-h200", help="nodes of the prefill region [paper-h200]")
    add("--decode-profile", metavar="P", default="paper-h20", help="home nodes, of both roles [paper-h20]")
    add("--prfaas-nodes", metavar="N", default="4", help="nodes of the prefill region [4]")
    add("--home-nodes", metavar="N", default="8", help="nodes of the home region [8]")
    add("--home-prefill-nodes", metavar="N", help="of these, so many prefill [as planned]")
    add("--link-gbps", metavar="G", default="100", help="between the regions [100]")
    add("--link-rtt-ms", metavar="MS", default="20", help="its round trip [20]")
    add("--link-loss", metavar="X", default="0", help="share of bytes that are sent again [0]")
    add("--link-change", metavar="S:GBPS", action="append", default=[], help="from second S on; may be repeated")
    add("--lose-nodes", metavar="S:REGION:SHARE", action="append", default=[], help="of pd or prfaas, 0 to 1")
    add("--nodes-back", metavar="S:REGION", action="append", default=[], help="all that were lost")
    add("--policy", choices=POLICIES, default="adaptive", help="how requests are routed [adaptive]")
    add("--threshold", metavar="TOKENS", help="longer uncached lengths are offloaded [as planned]")
    add("--replan-every", metavar="S", default="0", help="plan roles and threshold anew, as measured [0: never]")
    add("--cache-gib", metavar="GIB", default="0", help="prefix pool of each region [0: no caches]")
    add("--cache-blind", action="store_true", help="the policy isn't told what caches hold")
    add("--admit-all", action="store_true", help="refuse nothing, however late it will be")


def deployment_from(args: argparse.Namespace, workload: Workload) -> Deployment:
    """Raises ConfigError with one line a mistake, InfeasibleError when nothing could be served."""
    numbers = _Numbers()
    prfaas = numbers.whole("--prfaas-nodes", args.prfaas_nodes, 0)
    home = numbers.whole("--home-nodes", args.home_nodes, 1)
    split = (
        None if args.home_prefill_nodes is None else numbers.whole("--home-prefill-nodes", args.home_prefill_nodes, 0)
    )
    gbps = numbers.number("--link-gbps", args.link_gbps)
    rtt_ms, loss = numbers.number("--link-rtt-ms", args.link_rtt_ms), numbers.number("--link-loss", args.link_loss)
    threshold = None if args.threshold is None else numbers.number("--threshold", args.threshold)
    changes = _changes(args, numbers, rtt_ms, loss)
    cache_gib = numbers.number("--cache-gib", args.cache_gib)
    replan_every_s = numbers.number("--replan-every", args.replan_every)
    if loss >= 1:
        numbers.problems.append(f"--link-loss {args.link_loss} must be below 1")
    if numbers.problems:
        raise ConfigError(numbers.problems)
    away_profile, home_profile = named(args.prefill_profile), named(args.decode_profile)
    link = LinkProfile.of_gbps(gbps, rtt_ms * 1e-3, loss)
    threshold, split = _planned(workload, away_profile, home_profile, prfaas, home, link, threshold, split)
    groups = [Group(HOME, "prefill", home_profile, split), Group(HOME, "decode", home_profile, home - split)]
    if prfaas:
        groups.append(Group(AWAY, "prefill", away_profile, prfaas))
    links = {(AWAY, HOME): link, (HOME, AWAY): link} if prfaas else {}
    admission = ADMIT_ALL if args.admit_all else Admission()
    made = {
        "adaptive": lambda: AdaptiveThreshold(admission, planned_tokens=threshold),
        "static": lambda: StaticThreshold(admission, threshold_tokens=threshold),
        "homogeneous": lambda: HomogeneousPd(admission),
        "offload-all": lambda: OffloadAll(admission),
        "round-robin": lambda: RoundRobin(admission),
    }
    has_threshold = args.policy in ("adaptive", "static") and math.isfinite(threshold)
    return Deployment(
        Cluster(groups, links),
        args.policy,
        made[args.policy],
        threshold if has_threshold else None,
        round(cache_gib * 2**30),
        args.cache_blind,
        changes,
        replan_every_s,
    )


def _changes(args: argparse.Namespace, numbers: _Numbers, rtt_ms: float, loss: float) -> tuple[Change, ...]:
    """What the flags say will happen, and when."""
    made: list[Change] = []
    for given in args.link_change:
        parts = numbers.parts("--link-change", given, ("S", "GBPS"))
        if parts and loss < 1:
            at_s, gbps = (numbers.number(f"--link-change {given}:", part) for part in parts)
            link = LinkProfile.of_gbps(gbps, rtt_ms * 1e-3, loss)
            made += [LinkChange(at_s, AWAY, HOME, link), LinkChange(at_s, HOME, AWAY, link)]
    for given in args.lose_nodes:
        if parts := numbers.parts("--lose-nodes", given, ("S", "REGION", "SHARE")):
            at_s, share = (numbers.number(f"--lose-nodes {given}:", part) for part in (parts[0], parts[2]))
            made.append(NodesLost(at_s, numbers.region("--lose-nodes", parts[1]), share))
            if share > 1:
                numbers.problems.append(f"--lose-nodes {given}: the share must be at most 1")
    for given in args.nodes_back:
        if parts := numbers.parts("--nodes-back", given, ("S", "REGION")):
            at_s = numbers.number(f"--nodes-back {given}:", parts[0])
            made.append(NodesBack(at_s, numbers.region("--nodes-back", parts[1])))
    if made and not numbers.whole("--prfaas-nodes", args.prfaas_nodes, 0):
        numbers.problems.append("without --prfaas-nodes there is no link to change and no region but home")
    return tuple(made)


def _planned(
    workload: Workload,
    away: NodeProfile,
    home: NodeProfile,
    prfaas_nodes: int,
    home_nodes: int,
    link: LinkProfile,
    threshold: float | None,
    split: int | None,
) -> tuple[float, int]:
    """The slow planner's threshold and split, where the flags don't say."""
    if threshold is not None and split is not None:
        return threshold, split
    demand = Demand(sample_of(workload.prompt_tokens), float(workload.output_tokens.mean()))
    offload = (OffloadPool(away, prfaas_nodes, link),) if prfaas_nodes else ()
    settings = replace(LIVE, tpot_limit_s=max(LIVE.tpot_limit_s, home.step_s(1, demand.decode_context_tokens)))
    best = plan(demand, HomePool(home, home_nodes), offload, settings, threshold_tokens=threshold, n_prefill=split)
    return best.threshold_tokens, best.n_prefill


def _load(workload: Workload) -> Load:
    """The columns; the times are the schedule's."""
    return Load(np.zeros(len(workload)), workload.prompt_tokens, workload.output_tokens)


class _Numbers:
    """Reads numbers and remembers what was wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def whole(self, flag: str, given: str, least: int) -> int:
        if given.isascii() and given.isdigit() and least <= int(given) <= 100_000:
            return int(given)
        self.problems.append(f"{flag} {given} must be a whole number from {least} to 100,000")
        return least

    def parts(self, flag: str, given: str, names: tuple[str, ...]) -> list[str]:
        """Between the colons; none when there are too few or too many."""
        found = given.split(":")
        if len(found) == len(names):
            return found
        self.problems.append(f"{flag} {given} must be like {':'.join(names)}")
        return []

    def region(self, flag: str, given: str) -> str:
        if given not in (HOME, AWAY):
            self.problems.append(f"{flag}: no region {given!r}; there are {HOME} and {AWAY}")
        return given

    def number(self, flag: str, given: str) -> float:
        try:
            value = float(given)
        except ValueError:
            value = math.nan
        if 0 <= value < 1e12:
            return value
        self.problems.append(f"{flag} {given} must be a number from 0 on")
        return 0.0
