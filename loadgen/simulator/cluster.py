"""What is simulated: regions, groups of nodes, links, and what happens to them at which time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from prfaas.common.errors import ConfigError
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.perfmodel.profiles import NodeProfile
from prfaas.common.scheduling.types import ROLE_DECODE, ROLE_PREFILL, ClusterSnapshot, LinkColumns

MAX_NODES = 100_000
MAX_REGIONS = 256
UNLIMITED = 1 << 60
ROLES = {"prefill": ROLE_PREFILL, "decode": ROLE_DECODE}


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that are alike."""

    region: str
    role: Literal["prefill", "decode"]
    profile: NodeProfile
    nodes: int


@dataclass(frozen=True)
class Cluster:
    """links: by (from, to). max_inflight: most requests that one node takes, waiting ones included; 0 = no bound.

    Raises ConfigError, with every problem, for what can't be simulated.
    """

    groups: Sequence[Group]
    links: dict[tuple[str, str], LinkProfile] = field(default_factory=dict)
    max_inflight: int = 0
    role_switch_s: float = 60.0
    """What changing a drained node's role costs (s), as in `ConversionSettings.switch_s`: it starts again and warms up;
    the paper doesn't say."""
    link_estimate_s: float = 1.0
    """What a policy sees of a link's bandwidth is so old (s): a few round trips and a window of measurement."""

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= sum(group.nodes for group in self.groups) <= MAX_NODES:
            problems.append(f"a cluster has 1 to {MAX_NODES} nodes")
        for group in self.groups:
            if group.nodes < 0:
                problems.append(f"{group.nodes} nodes in region {group.region}: it can't be below 0")
            if group.role == "decode" and group.profile.decode_step_s is None:
                problems.append(f"region {group.region}: profile {group.profile.name} has no decode_step_s")
        if not any(group.role == "decode" and group.nodes for group in self.groups):
            problems.append("no group decodes")
        names = set(self.region_names)
        for source, target in self.links:
            problems += [f"the link {source} → {target} names no region" for r in (source, target) if r not in names]
        if len(names) > MAX_REGIONS:
            problems.append(f"more than {MAX_REGIONS} regions")
        if problems:
            raise ConfigError(problems)

    @property
    def region_names(self) -> list[str]:
        return list(dict.fromkeys(group.region for group in self.groups))

    def snapshot(self) -> ClusterSnapshot:
        """All nodes usable and idle."""
        names, region_of, role, profile_of, profiles = [], [], [], [], []
        region_names = self.region_names
        for group in self.groups:
            if group.profile not in profiles:
                profiles.append(group.profile)
            for i in range(group.nodes):
                names.append(f"{group.region}-{group.role}-{i}")
                region_of.append(region_names.index(group.region))
                role.append(ROLES[group.role])
                profile_of.append(profiles.index(group.profile))
        count = len(names)
        links = LinkColumns.none(len(region_names))
        for (source, target), link in self.links.items():
            at = region_names.index(source), region_names.index(target)
            links.bandwidth_bytes_per_s[at] = link.goodput_bytes_per_s
            links.rtt_s[at] = link.rtt_s
        return ClusterSnapshot(
            names=names,
            regions=[region_names[r] for r in region_of],
            region=np.array(region_of, np.int32),
            region_names=region_names,
            role=np.array(role, np.int8),
            usable=np.ones(count, np.bool_),
            inflight_requests=np.zeros(count, np.int64),
            inflight_tokens=np.zeros(count, np.int64),
            free_kv_bytes=np.array([profiles[p].kv_capacity_bytes or UNLIMITED for p in profile_of], np.int64),
            profile=np.array(profile_of, np.int32),
            profiles=profiles,
            prefill_free_at_s=np.zeros(count),
            decode_free_at_s=np.zeros(count),
            max_inflight_requests=np.full(count, self.max_inflight or UNLIMITED, np.int64),
            decoding_requests=np.zeros(count, np.int64),
            waiting_requests=np.zeros(count, np.int64),
            links=links,
        )


@dataclass(frozen=True, slots=True)
class LinkChange:
    """From `at_s` on the link carries this."""

    at_s: float
    source: str
    target: str
    link: LinkProfile


@dataclass(frozen=True, slots=True)
class NodesLost:
    """At `at_s` this share of a region's nodes of a role (None: of each) dies, the last ones first. What was on them is
    routed again."""

    at_s: float
    region: str
    share: float
    role: Literal["prefill", "decode"] | None = None


@dataclass(frozen=True, slots=True)
class NodesBack:
    """At `at_s` all dead nodes of the region are back, empty."""

    at_s: float
    region: str


@dataclass(frozen=True, slots=True)
class RoleChange:
    """From `at_s` on so many usable nodes of a region drain and then change their role."""

    at_s: float
    region: str
    to_role: Literal["prefill", "decode"]
    nodes: int


Change = LinkChange | NodesLost | NodesBack | RoleChange


def check_changes(cluster: Cluster, changes: Sequence[Change]) -> None:
    """Raises ConfigError, with every problem."""
    problems = []
    names = set(cluster.region_names)
    for change in changes:
        if not (math.isfinite(change.at_s) and change.at_s >= 0):
            problems.append(f"{type(change).__name__} at {change.at_s} s: it must be at least 0")
        regions = (change.source, change.target) if isinstance(change, LinkChange) else (change.region,)
        problems += [f"{type(change).__name__}: no region {r!r}" for r in regions if r not in names]
        if isinstance(change, NodesLost) and not 0 <= change.share <= 1:
            problems.append(f"NodesLost: share {change.share} must be from 0 to 1")
    if problems:
        raise ConfigError(problems)
