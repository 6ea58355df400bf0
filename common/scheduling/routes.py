"""Where one request could be prefilled, and when each place would give the first token.

Three resources are looked at, and the slowest decides:

    prefill    the node is free at some instant; then T(uncached length)
    link       all bytes that are ahead on the link must pass as well as the request's own; they pass while prefill
               computes (layer-wise), so only what takes longer is exposed
    decode     a place in the batch is free at some instant

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
Floats = NDArray[np.float64]


class Route(NamedTuple):
    """One place to prefill. Instants are predicted, from the snapshot's now."""

    region: int
    profile: int
    """Index of the node's profile."""
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
    link_margin: float = 2.0
    """Bytes that are ahead on a link and the request's own count so often: under fair sharing it waits for smaller ones
    that come later, too. Measured with a link that falls to a twelfth: at 1 a tenth of those admitted came too late, at
    2 one in a hundred."""
    layers: int = 64
    """Steps in which KV leaves during prefill: the last one's bytes are always exposed."""


class Start(NamedTuple):
    """A prefill node, and from which token on it would compute."""

    row: int
    wait_s: float
    """Until what it was given is done."""
    prefill_start: int
    fetch_region: int | None
    fetch_s: float


class Place(NamedTuple):
    """A decode node, and how long a request that is assigned to it now must wait for a place in the batch."""

    row: int
    region: int
    wait_s: float
    step_s: float
    profile: NodeProfile


def decode_place(request: RequestSnapshot, cluster: ClusterSnapshot) -> tuple[Place | None, str]:
    """The least loaded decode node with room, by requests for a place in its batch; or None and why."""
    best: tuple[int, Pool] | None = None
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
        room = inflight < cluster.max_inflight_requests[rows]
        room &= usable
        room &= cluster.free_kv_bytes[rows] >= profile.kv_bytes.at(tokens)
        at = int(np.where(room, inflight, MANY).argmin())
        if not room[at]:
            any_usable = any_usable or bool(usable.any())
            continue
        load = inflight.item(at) / profile.max_batch
        if load < best_load:
            best_load, best = load, (_row(pool, at), pool)
    if best is None:
        return None, "full" if any_usable else "no_decode_node"
    return _place(best[0], best[1].region, request, cluster, cluster.profiles[best[1].profile]), ""


def place_at(row: int, request: RequestSnapshot, cluster: ClusterSnapshot) -> Place | None:
    """A certain decode node, if it has room for the request and may be its home."""
    region, profile = cluster.region.item(row), cluster.profiles[cluster.profile.item(row)]
    need = profile.kv_bytes.at(request.prompt_tokens + request.max_output_tokens)
    if request.home_region not in (None, region) or cluster.free_kv_bytes.item(row) < need:
        return None
    return _place(row, region, request, cluster, profile)


def _place(row: int, region: int, request: RequestSnapshot, cluster: ClusterSnapshot, profile: NodeProfile) -> Place:
    batch = min(cluster.inflight_requests.item(row) + 1, profile.max_batch)
    step_s = profile.step_s(batch, request.prompt_tokens + request.max_output_tokens)
    wait_s = max(0.0, cluster.decode_free_at_s.item(row) - cluster.now_s)
    return Place(row, region, wait_s, step_s, profile)


def routes(request: RequestSnapshot, cluster: ClusterSnapshot, place: Place, settings: RouteSettings) -> list[Route]:
    """The best node of each pool that could prefill, home region's first: the least loaded by predicted finish, or
    one that holds a prefix and is done sooner. Nodes that are not usable or full are never among them."""
    home: list[Route] = []
    away: list[Route] = []
    for pool in cluster.pools(ROLE_PREFILL):
        if not reachable(cluster, pool.region, place.region):
            continue
        free_at = _free_at(cluster, pool)
        at = int(free_at.argmin())
        free_at_s = free_at.item(at)
        if free_at_s == np.inf:
            continue
        wait_s = max(0.0, free_at_s - cluster.now_s)
        start = Start(_row(pool, at), wait_s, 0, None, 0.0)
        if request.prefixes is not None:
            start = _with_prefix(request, cluster, pool, start, place.region, settings)
            start = _affine(request, request.prefixes, cluster, pool, free_at, start)
        route = _route(request, cluster, place, settings, pool, start)
        (away if route.offloaded else home).append(route)
    return home + away


def route_to(
    row: int, request: RequestSnapshot, cluster: ClusterSnapshot, place: Place, settings: RouteSettings
) -> Route:
    """The route over a certain prefill node, whether or not it is usable."""
    pool = Pool(cluster.region.item(row), cluster.profile.item(row), slice(row, row + 1), row)
    start = Start(row, max(0.0, cluster.prefill_free_at_s.item(row) - cluster.now_s), 0, None, 0.0)
    if request.prefixes is not None:
        start = start._replace(prefill_start=_held(request, pool.region))
    return _route(request, cluster, place, settings, pool, start)


def reachable(cluster: ClusterSnapshot, region: int, home: int) -> bool:
    """Whether KV can go from a region to the home region."""
    return region == home or cluster.links.bandwidth_bytes_per_s.item(region, home) > 0


def _free_at(cluster: ClusterSnapshot, pool: Pool) -> Floats:
    """When each node of the pool will be free; inf where it may not be used."""
    rows = pool.rows
    good = cluster.inflight_requests[rows] < cluster.max_inflight_requests[rows]
    good &= cluster.usable[rows]
    return np.where(good, cluster.prefill_free_at_s[rows], np.inf)


def local_route(request: RequestSnapshot, cluster: ClusterSnapshot, place: Place) -> Route:
    """The decode node prefills itself, at the speed of its profile, when nobody else can."""
    start = _held(request, place.region)
    wait_s = max(0.0, cluster.prefill_free_at_s.item(place.row) - cluster.now_s)
    prefill_s = place.profile.prefill_s.at(request.prompt_tokens - start)
    ttft_s = max(wait_s + prefill_s, place.wait_s) + place.step_s
    return Route(place.region, -1, None, False, wait_s, prefill_s, ttft_s, 0.0, start, None)


def _row(pool: Pool, at: int) -> int:
    return pool.first + at if isinstance(pool.rows, slice) else int(pool.rows[at])


def _held(request: RequestSnapshot, region: int) -> int:
    """Usable prefix in a region's pool; the last prompt token is always computed (the n−1 rule)."""
    if request.prefixes is None:
        return 0
    return min(request.prefixes.in_region(region), request.prompt_tokens - 1)


def scarce(cluster: ClusterSnapshot, source: int, target: int, settings: RouteSettings) -> bool:
    """The paper's test of bandwidth, with our settings."""
    links, pair = cluster.links, (source, target)
    within = settings.scarce_backlog_s * links.bandwidth_bytes_per_s.item(pair)
    return links.utilisation.item(pair) > settings.scarce_utilisation or links.queued_bytes.item(pair) > within


def _with_prefix(
    request: RequestSnapshot, cluster: ClusterSnapshot, pool: Pool, start: Start, home: int, settings: RouteSettings
) -> Start:
    """From the pool's own cache, or from a longer one elsewhere, when the link to here is abundant and the fetch takes
    less than computing it would."""
    assert request.prefixes is not None
    own = _held(request, pool.region)
    best, fetch, fetch_s = own, None, 0.0
    profile = cluster.profiles[pool.profile]
    prefill_s, kv_bytes = profile.prefill_s, profile.kv_bytes
    for other, held in zip(request.prefixes.regions.tolist(), request.prefixes.region_tokens.tolist(), strict=True):
        tokens = min(held, request.prompt_tokens - 1)
        if other == pool.region or tokens <= best or not reachable(cluster, other, pool.region):
            continue
        if scarce(cluster, other, pool.region, settings):
            continue
        moved = (kv_bytes.at(tokens) - (kv_bytes.at(own) if own else 0.0)) * settings.wire_ratio
        seconds = fetch_seconds(cluster, other, pool.region, moved)
        if seconds < prefill_s.at(request.prompt_tokens - best) - prefill_s.at(request.prompt_tokens - tokens):
            best, fetch, fetch_s = tokens, other, seconds
    return start._replace(prefill_start=best, fetch_region=fetch, fetch_s=fetch_s)


def fetch_seconds(cluster: ClusterSnapshot, source: int, target: int, moved_bytes: float) -> float:
    """How long a prefix takes from one region to the other, behind what is on the link already."""
    links, pair = cluster.links, (source, target)
    passing_s = (links.queued_bytes.item(pair) + moved_bytes) / links.bandwidth_bytes_per_s.item(pair)
    return passing_s + links.rtt_s.item(pair)


def _affine(
    request: RequestSnapshot,
    prefixes: PrefixMatches,
    cluster: ClusterSnapshot,
    pool: Pool,
    free_at: Floats,
    least: Start,
) -> Start:
    """The least loaded node, or one of those that hold a longer prefix themselves if it would be done sooner."""
    prefill_s = cluster.profiles[pool.profile].prefill_s
    best = least
    done_s = max(best.wait_s, best.fetch_s) + prefill_s.at(request.prompt_tokens - best.prefill_start)
    rows = np.arange(pool.rows.start, pool.rows.stop) if isinstance(pool.rows, slice) else pool.rows
    for node, tokens in zip(prefixes.nodes.tolist(), prefixes.node_tokens.tolist(), strict=True):
        at = int(np.searchsorted(rows, node))
        held = min(tokens, request.prompt_tokens - 1)
        if at >= rows.size or rows[at] != node or not np.isfinite(free_at[at]) or held < best.prefill_start:
            continue
        wait_s = max(0.0, free_at.item(at) - cluster.now_s)
        node_done_s = wait_s + prefill_s.at(request.prompt_tokens - held)
        if node_done_s < done_s or (node_done_s == done_s and held > best.prefill_start):
            best, done_s = Start(node, wait_s, held, None, 0.0), node_done_s
    return best


def _route(
    request: RequestSnapshot,
    cluster: ClusterSnapshot,
    place: Place,
    settings: RouteSettings,
    pool: Pool,
    start: Start,
) -> Route:
    """With the slowest of the three resources as its time to the first token."""
    profile = cluster.profiles[pool.profile]
    prefill_s = profile.prefill_s.at(request.prompt_tokens - start.prefill_start)
    wait_s = max(start.wait_s, start.fetch_s)
    ready_s = wait_s + prefill_s
    wire = 0.0
    offloaded = pool.region != place.region
    if offloaded:
        links, pair = cluster.links, (pool.region, place.region)
        held = 0 if request.prefixes is None else _held(request, place.region)
        wire = profile.kv_bytes.at(request.prompt_tokens - held) * settings.wire_ratio
        bandwidth = links.bandwidth_bytes_per_s.item(pair)
        tail_s = wire / settings.layers / bandwidth
        passed_s = settings.link_margin * (links.queued_bytes.item(pair) + wire) / bandwidth
        ready_s = max(ready_s + tail_s, passed_s) + links.rtt_s.item(pair) / 2
    ttft_s = max(ready_s, place.wait_s) + place.step_s
    return Route(
        pool.region,
        pool.profile,
        start.row,
        offloaded,
        wait_s,
        prefill_s,
        ttft_s,
        wire,
        start.prefill_start,
        start.fetch_region,
    )
