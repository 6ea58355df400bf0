"""Where one request could be prefilled, and when each place would give the first token.

Three resources are looked at, and the slowest decides:

    prefill    the node is free at some instant; then T(uncached length)
    link       all bytes that are ahead on the link must pass as well as the request's own; they pass while prefill
               computes (layer-wise), so only what takes longer is exposed
    decode     a place in the batch; a node with more requests than places makes the last ones wait

A link is shared fairly, not first come first served; for the request that came last both end alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from prfaas.common.perfmodel.profiles import NodeProfile
from prfaas.common.scheduling.types import (
    ROLE_DECODE,
    ROLE_PREFILL,
    ClusterSnapshot,
    Pool,
    PrefixMatches,
    RequestSnapshot,
)

MANY = 1 << 60


class Route(NamedTuple):
    """One place to prefill. Instants are predicted, from the snapshot's now."""

    region: int
    row: int | None
    """None: the decode node prefills itself."""
    offloaded: bool
    wait_s: float
    prefill_s: float
    ttft_s: float
    """From now to the first token."""
    wire_bytes: float
    """KV that crosses the WAN for it."""
    prefill_start: int
    fetch_region: int | None


@dataclass(frozen=True, slots=True)
class RouteSettings:
    """The paper's open points of prediction and of caches, with units."""

    scarce_utilisation: float = 0.8
    """A link that is used more than this share is scarce: regions are judged by their own caches, and no prefix is
    fetched over it. Above what the planner's mean load gives, below what bursts of a second reach."""
    scarce_backlog_s: float = 1.0
    """So is one with more bytes to send than it carries in this time (s): a fetch would come late."""
    wire_ratio: float = 1.0
    """Bytes on the wire for a byte of KV; a codec brings it below 1."""
    layers: int = 64
    """Steps in which KV leaves during prefill: the last one's bytes are always exposed."""


class Place(NamedTuple):
    """A decode node, and how long a request that is assigned to it now must wait for a place in the batch."""

    row: int
    region: int
    wait_s: float
    step_s: float
    profile: NodeProfile


def decode_place(request: RequestSnapshot, cluster: ClusterSnapshot) -> tuple[Place | None, str]:
    """The least loaded decode node with room, by requests for a place in its batch; or None and why."""
    best: Place | None = None
    best_load = np.inf
    any_usable = False
    tokens = request.prompt_tokens + request.max_output_tokens
    for pool in cluster.pools(ROLE_DECODE):
        if request.home_region is not None and pool.region != request.home_region:
            continue
        profile = cluster.profiles[pool.profile]
        rows = pool.rows
        inflight = cluster.inflight_requests[rows]
        usable = cluster.usable[rows]
        room = usable & (inflight < cluster.max_inflight_requests[rows])
        room &= cluster.free_kv_bytes[rows] >= profile.kv_bytes.at(tokens)
        at = int(np.where(room, inflight, MANY).argmin())
        if not room[at]:
            any_usable = any_usable or bool(usable.any())
            continue
        requests = int(inflight[at])
        load = requests / profile.max_batch
        if load < best_load:
            best_load = load
            step_s = profile.step_s(min(requests + 1, profile.max_batch), tokens)
            # One place comes free every (output · step / batch) seconds.
            excess = max(0, requests + 1 - profile.max_batch)
            wait_s = excess * request.max_output_tokens * step_s / profile.max_batch
            best = Place(_row(pool, at), pool.region, wait_s, step_s, profile)
    if best is not None:
        return best, ""
    return None, "full" if any_usable else "no_decode_node"


def routes(
    request: RequestSnapshot, cluster: ClusterSnapshot, place: Place, settings: RouteSettings
) -> list[Route]:
    """The best node of each pool that could prefill, home region's first: the least loaded by predicted finish, or
    one that holds a prefix and is done sooner. Nodes that are not usable or full are never among them."""
    home = place.region
    found: list[Route] = []
    held_home = _held(request, home)
    for pool in cluster.pools(ROLE_PREFILL):
        offloaded = pool.region != home
        if offloaded and cluster.links.bandwidth_bytes_per_s[pool.region, home] <= 0:
            continue
        rows = pool.rows
        usable = cluster.usable[rows]
        free_at = np.where(usable, cluster.prefill_free_at_s[rows], np.inf)
        at = int(free_at.argmin())
        if not usable[at]:
            continue
        if cluster.inflight_requests[rows][at] >= cluster.max_inflight_requests[rows][at]:
            full = cluster.inflight_requests[rows] >= cluster.max_inflight_requests[rows]
            free_at[full] = np.inf
            at = int(free_at.argmin())
            if free_at[at] == np.inf:
                continue
        profile = cluster.profiles[pool.profile]
        wait_s = max(0.0, float(free_at[at]) - cluster.now_s)
        row = _row(pool, at)
        start, fetch, fetch_s = 0, None, 0.0
        if request.prefixes is not None:
            start, fetch, fetch_s = _prefix(request, cluster, pool.region, home, settings)
            row, wait_s, start, fetch, fetch_s = _affine(
                request.prefixes, cluster, pool, free_at, (row, wait_s, start, fetch, fetch_s), request.prompt_tokens
            )
        prefill_s = profile.prefill_s.at(request.prompt_tokens - start)
        found.append(
            _route(request, cluster, place, settings, pool, offloaded, row, max(wait_s, fetch_s), prefill_s, start, fetch, held_home)
        )
    found.sort(key=_home_first)
    return found


def local_route(request: RequestSnapshot, place: Place) -> Route:
    """The decode node prefills itself, at the speed of its profile, when nobody else can."""
    start = _held(request, place.region)
    prefill_s = place.profile.prefill_s.at(request.prompt_tokens - start)
    ttft_s = max(prefill_s, place.wait_s) + place.step_s
    return Route(place.region, None, False, 0.0, prefill_s, ttft_s, 0.0, start, None)


def _home_first(route: Route) -> bool:
    return route.offloaded


def _row(pool: Pool, at: int) -> int:
    return pool.first + at if isinstance(pool.rows, slice) else int(pool.rows[at])


def _held(request: RequestSnapshot, region: int) -> int:
    """Usable prefix in a region's pool; the last prompt token is always computed (the n−1 rule)."""
    if request.prefixes is None:
        return 0
    return min(request.prefixes.in_region(region), request.prompt_tokens - 1)


def scarce(cluster: ClusterSnapshot, source: int, target: int, settings: RouteSettings) -> bool:
    """The paper's test of bandwidth, with our settings."""
    bandwidth = cluster.links.bandwidth_bytes_per_s[source, target]
    return bool(
        cluster.links.utilisation[source, target] > settings.scarce_utilisation
        or cluster.links.queued_bytes[source, target] > settings.scarce_backlog_s * bandwidth
    )


def _prefix(
    request: RequestSnapshot, cluster: ClusterSnapshot, region: int, home: int, settings: RouteSettings
) -> tuple[int, int | None, float]:
    """(tokens that a prefill in `region` can start from, where they must be fetched from, seconds that it takes).

    Between the region's own cache and a longer one elsewhere: the longer, when the link to here is abundant and the
    fetch takes less than computing it would."""
    assert request.prefixes is not None
    own = _held(request, region)
    best, fetch, fetch_s = own, None, 0.0
    for other, tokens in zip(request.prefixes.regions.tolist(), request.prefixes.region_tokens.tolist(), strict=True):
        tokens = min(tokens, request.prompt_tokens - 1)
        if other == region or tokens <= best or scarce(cluster, other, region, settings):
            continue
        bandwidth = float(cluster.links.bandwidth_bytes_per_s[other, region])
        if bandwidth <= 0:
            continue
        profile = cluster.profiles[0]
        moved = (profile.kv_bytes.at(tokens) - profile.kv_bytes.at(own)) * settings.wire_ratio
        queued = float(cluster.links.queued_bytes[other, region])
        seconds = (queued + moved) / bandwidth + float(cluster.links.rtt_s[other, region])
        prefill_s = profile.prefill_s
        if seconds < prefill_s.at(request.prompt_tokens - best) - prefill_s.at(request.prompt_tokens - tokens):
            best, fetch, fetch_s = tokens, other, seconds
    return best, fetch, fetch_s


def _affine(
    prefixes: PrefixMatches,
    cluster: ClusterSnapshot,
    pool: Pool,
    free_at: NDArray[np.float64],
    least: tuple[int, float, int, int | None, float],
    prompt_tokens: int,
) -> tuple[int, float, int, int | None, float]:
    """The least loaded node, or one of those that hold a longer prefix themselves if it would be done sooner."""
    prefill_s = cluster.profiles[pool.profile].prefill_s
    row, wait_s, start, fetch, fetch_s = least
    done_s = max(wait_s, fetch_s) + prefill_s.at(prompt_tokens - start)
    rows = np.arange(pool.rows.start, pool.rows.stop) if isinstance(pool.rows, slice) else pool.rows
    for node, held in zip(prefixes.nodes.tolist(), prefixes.node_tokens.tolist(), strict=True):
        at = int(np.searchsorted(rows, node))
        if at >= rows.size or rows[at] != node or not np.isfinite(free_at[at]) or held < start:
            continue
        held = min(held, prompt_tokens - 1)
        node_wait_s = max(0.0, float(free_at[at]) - cluster.now_s)
        node_done_s = node_wait_s + prefill_s.at(prompt_tokens - held)
        if node_done_s < done_s or (node_done_s == done_s and held > start):
            row, wait_s, start, fetch, fetch_s, done_s = node, node_wait_s, held, None, 0.0, node_done_s
    return row, wait_s, start, fetch, fetch_s


def _route(
    request: RequestSnapshot,
    cluster: ClusterSnapshot,
    place: Place,
    settings: RouteSettings,
    pool: Pool,
    offloaded: bool,
    row: int,
    wait_s: float,
    prefill_s: float,
    start: int,
    fetch: int | None,
    held_home: int,
) -> Route:
    """With the slowest of the three resources as its time to the first token."""
    ready_s = wait_s + prefill_s
    wire = 0.0
    if offloaded:
        links, pair = cluster.links, (pool.region, place.region)
        kv_bytes = cluster.profiles[pool.profile].kv_bytes.at(request.prompt_tokens - held_home)
        wire = kv_bytes * settings.wire_ratio
        bandwidth = float(links.bandwidth_bytes_per_s[pair])
        tail_s = wire / settings.layers / bandwidth
        passed_s = (float(links.queued_bytes[pair]) + wire) / bandwidth
        ready_s = max(ready_s + tail_s, passed_s) + float(links.rtt_s[pair]) / 2
    ttft_s = max(ready_s, place.wait_s) + place.step_s
    return Route(pool.region, row, offloaded, wait_s, prefill_s, ttft_s, wire, start, fetch)
