"""Where one request could be prefilled, and when each place would give the first token.

Three resources are looked at, and the slowest decides:

    prefill    the node is free at some instant; then T(uncached length)
    link       all bytes that are ahead on the link must pass as well as the request's own; they pass while prefill
               computes (layer-wise), so only what takes longer is exposed
    decode     a place in the batch is free at some instant

A link is shared fairly, not first come first served; for the request that came last both end alike.

Prefixes lie in pools, one a region or one a node (`types.PrefixMatches`). With pools of nodes it counts what the very
node holds: the prefill node computes the rest, the decode node is sent the rest, and a prefill node may fetch from the
node of each region that holds most, also from one of its own region.
"""

from __future__ import annotations

from collections.abc import Sequence
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
HOLDERS_A_POOL = 4
"""Of the nodes of a pool that hold a prefix themselves, so many, longest first, are weighed against the idlest."""
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
    fetch_node: int | None = None


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
    local_prefill: bool = False
    """True: in a home region without a usable prefill node its decode nodes prefill what is below the threshold."""
    queue_for_memory: bool = False
    """True: where no decode node has memory for a request now, it may wait at the least loaded one, which takes it when
    it can; a node's most requests still hold. False: then all are full."""


class Start(NamedTuple):
    """A prefill node, and from which token on it would compute."""

    row: int
    wait_s: float
    """Until what it was given is done."""
    prefill_start: int
    fetch_region: int | None
    fetch_node: int | None
    fetch_s: float


class Place(NamedTuple):
    """A decode node, and how long a request that is assigned to it now must wait for a place in the batch."""

    row: int
    region: int
    wait_s: float
    step_s: float
    profile: NodeProfile
    held: int
    """Prefix that it can use, and that nobody need send."""


def decode_place(
    request: RequestSnapshot, cluster: ClusterSnapshot, closed: NDArray[np.bool_], must_fit: bool = True
) -> tuple[Place | None, str]:
    """The least loaded decode node with room, by requests for a place in its batch; or None and why. closed: as of
    `closed_nodes`. must_fit: room is memory, too."""
    jitter = cluster.decode_jitter
    order = cluster.inflight_requests.copy() if jitter is None else cluster.inflight_requests + jitter
    np.putmask(order, closed, MANY)
    best: tuple[int, Pool] | None = None
    best_load = np.inf
    tokens = request.prompt_tokens + request.max_output_tokens
    pools = cluster.pools(ROLE_DECODE)
    if request.home_region is not None:
        pools = [pool for pool in pools if pool.region == request.home_region]
    for pool in pools:
        profile = cluster.profiles[pool.profile]
        row = _row(pool, int(order[pool.rows].argmin()))
        if must_fit and cluster.free_kv_bytes.item(row) < (need := profile.kv_bytes.at(tokens)):
            fitting = np.where(cluster.free_kv_bytes[pool.rows] >= need, order[pool.rows], MANY)
            at = int(fitting.argmin())
            if fitting[at] == MANY:
                continue
            row = _row(pool, at)
        if closed.item(row):
            continue
        load = cluster.inflight_requests.item(row) / profile.max_batch
        if load < best_load:
            best_load, best = load, (row, pool)
    if best is None:
        usable = any(bool(cluster.usable[pool.rows].any()) for pool in pools)
        return None, "full" if usable else "no_decode_node"
    return _place(best[0], best[1].region, request, cluster, cluster.profiles[best[1].profile]), ""


def place_of_holder(
    request: RequestSnapshot, cluster: ClusterSnapshot, place: Place, must_fit: bool = True
) -> Place | None:
    """The decode node with room that holds most of the prompt, if that is more than `place` does. Of a node's own pool:
    to it the rest alone is sent."""
    prefixes = request.prefixes
    if prefixes is None or prefixes.region_nodes is None or not prefixes.nodes.size:
        return None
    most = request.prompt_tokens - 1
    for row, tokens in zip(prefixes.nodes.tolist(), prefixes.node_tokens.tolist(), strict=True):
        if min(tokens, most) <= place.held:
            return None
        if cluster.role.item(row) != ROLE_DECODE or not cluster.usable.item(row):
            continue
        if cluster.inflight_requests.item(row) < cluster.max_inflight_requests.item(row):
            found = place_at(row, request, cluster, must_fit)
            if found is not None:
                return found
    return None


def place_at(row: int, request: RequestSnapshot, cluster: ClusterSnapshot, must_fit: bool = True) -> Place | None:
    """A certain decode node, if it has room for the request and may be its home."""
    region, profile = cluster.region.item(row), cluster.profiles[cluster.profile.item(row)]
    if request.home_region not in (None, region):
        return None
    need = profile.kv_bytes.at(request.prompt_tokens + request.max_output_tokens)
    if must_fit and cluster.free_kv_bytes.item(row) < need:
        return None
    return _place(row, region, request, cluster, profile)


def _place(row: int, region: int, request: RequestSnapshot, cluster: ClusterSnapshot, profile: NodeProfile) -> Place:
    batch = min(cluster.inflight_requests.item(row) + 1, profile.max_batch)
    step_s = profile.step_s(batch, request.prompt_tokens + request.max_output_tokens)
    wait_s = max(0.0, cluster.decode_free_at_s.item(row) - cluster.now_s)
    return Place(row, region, wait_s, step_s, profile, held_on(request, row, region))


def starts(
    request: RequestSnapshot, cluster: ClusterSnapshot, settings: RouteSettings, closed: NDArray[np.bool_]
) -> list[tuple[Pool, Start]]:
    """The best node of each pool that could prefill: the least loaded by predicted finish, or one that holds a prefix
    and is done sooner. Nodes that are not usable or full (`closed`) are never among them."""
    free_at = _free_at(cluster, closed)
    holders = {} if request.prefixes is None else _holders(request, request.prefixes, cluster)
    found = []
    for pool in cluster.pools(ROLE_PREFILL):
        row = _row(pool, int(free_at[pool.rows].argmin()))
        if free_at.item(row) == np.inf:
            continue
        start = Start(row, _wait_s(cluster, row), 0, None, None, 0.0)
        if request.prefixes is not None:
            start = _with_prefix(request, request.prefixes, cluster, pool, start, settings)
            start = _affine(request, holders.get((pool.region, pool.profile), ()), cluster, pool, free_at, start)
        found.append((pool, start))
    return found


def routes(
    request: RequestSnapshot,
    cluster: ClusterSnapshot,
    place: Place,
    settings: RouteSettings,
    begun: Sequence[tuple[Pool, Start]],
) -> list[Route]:
    """From each of `starts` that can reach the place; home region's first."""
    home: list[Route] = []
    away: list[Route] = []
    for pool, start in begun:
        if reachable(cluster, pool.region, place.region):
            route = _route(request, cluster, place, settings, pool, start)
            (away if route.offloaded else home).append(route)
    return home + away


def route_to(
    row: int, request: RequestSnapshot, cluster: ClusterSnapshot, place: Place, settings: RouteSettings
) -> Route:
    """The route over a certain prefill node, whether or not it is usable."""
    pool = Pool(cluster.region.item(row), cluster.profile.item(row), slice(row, row + 1), row)
    start = Start(row, _wait_s(cluster, row), held_on(request, row, pool.region), None, None, 0.0)
    return _route(request, cluster, place, settings, pool, start)


def reachable(cluster: ClusterSnapshot, region: int, home: int) -> bool:
    """Whether KV can go from a region to the home region."""
    return region == home or cluster.links.bandwidth_bytes_per_s.item(region, home) > 0


def _free_at(cluster: ClusterSnapshot, closed: NDArray[np.bool_]) -> Floats:
    """When each node will be free, jitter included [nodes]; inf where it may not be used."""
    if cluster.prefill_jitter_s is None:
        free_at = cluster.prefill_free_at_s.copy()
    else:
        # Nodes that are free already are all alike: from now on, or jitter would be lost on what is long past.
        free_at = np.maximum(cluster.prefill_free_at_s, cluster.now_s)
        free_at += cluster.prefill_jitter_s
    np.putmask(free_at, closed, np.inf)
    return free_at


def _wait_s(cluster: ClusterSnapshot, row: int) -> float:
    return max(0.0, cluster.prefill_free_at_s.item(row) - cluster.now_s)


def local_route(request: RequestSnapshot, cluster: ClusterSnapshot, place: Place) -> Route:
    """The decode node prefills itself, at the speed of its profile, when nobody else can."""
    start = place.held
    wait_s = _wait_s(cluster, place.row)
    prefill_s = place.profile.prefill_s.at(request.prompt_tokens - start)
    ttft_s = max(wait_s + prefill_s, place.wait_s) + place.step_s
    profile = cluster.profile.item(place.row)
    return Route(place.region, profile, None, False, wait_s, prefill_s, ttft_s, 0.0, start, None)


def _row(pool: Pool, at: int) -> int:
    return pool.first + at if isinstance(pool.rows, slice) else int(pool.rows[at])


def held_on(request: RequestSnapshot, row: int, region: int) -> int:
    """Prefix that a node of a region can use; the last prompt token is always computed (the n−1 rule)."""
    if request.prefixes is None:
        return 0
    return min(request.prefixes.usable_on(row, region), request.prompt_tokens - 1)


def sent_s(request: RequestSnapshot, cluster: ClusterSnapshot, place: Place, route: Route) -> float:
    """How long the KV that is sent would occupy the whole way to the decode node, also inside a region; 0 where
    nothing is known of it."""
    bandwidth = cluster.links.bandwidth_bytes_per_s.item(route.region, place.region) if route.row is not None else 0.0
    if bandwidth <= 0:
        return 0.0
    return cluster.profiles[route.profile].kv_bytes.at(request.prompt_tokens - place.held) / bandwidth


def scarce(cluster: ClusterSnapshot, source: int, target: int, settings: RouteSettings) -> bool:
    """The paper's test of bandwidth, with our settings."""
    links, pair = cluster.links, (source, target)
    within = settings.scarce_backlog_s * links.bandwidth_bytes_per_s.item(pair)
    return links.utilisation.item(pair) > settings.scarce_utilisation or links.queued_bytes.item(pair) > within


def _with_prefix(
    request: RequestSnapshot,
    prefixes: PrefixMatches,
    cluster: ClusterSnapshot,
    pool: Pool,
    start: Start,
    settings: RouteSettings,
) -> Start:
    """From its own cache, or from a longer one elsewhere, when the link to here is abundant and the fetch takes less
    than computing it would."""
    own = held_on(request, start.row, pool.region)
    best, fetch, holder, fetch_s = own, None, None, 0.0
    profile = cluster.profiles[pool.profile]
    prefill_s, kv_bytes = profile.prefill_s, profile.kv_bytes
    nodes = [None] * prefixes.regions.size if prefixes.region_nodes is None else prefixes.region_nodes.tolist()
    for other, held, node in zip(prefixes.regions.tolist(), prefixes.region_tokens.tolist(), nodes, strict=True):
        tokens = min(held, request.prompt_tokens - 1)
        own_pool = other == pool.region if node is None else node == start.row
        if own_pool or tokens <= best or not reachable(cluster, other, pool.region):
            continue
        if scarce(cluster, other, pool.region, settings):
            continue
        moved = (kv_bytes.at(tokens) - (kv_bytes.at(own) if own else 0.0)) * settings.wire_ratio
        seconds = fetch_seconds(cluster, other, pool.region, moved)
        if seconds < prefill_s.at(request.prompt_tokens - best) - prefill_s.at(request.prompt_tokens - tokens):
            best, fetch, holder, fetch_s = tokens, other, node, seconds
    return start._replace(prefill_start=best, fetch_region=fetch, fetch_node=holder, fetch_s=fetch_s)


def fetch_seconds(cluster: ClusterSnapshot, source: int, target: int, moved_bytes: float) -> float:
    """How long a prefix takes from one region to the other, behind what is on the link already."""
    links, pair = cluster.links, (source, target)
    bandwidth = links.bandwidth_bytes_per_s.item(pair)
    if bandwidth <= 0:  # inside a region of which nothing is known
        return links.rtt_s.item(pair)
    return (links.queued_bytes.item(pair) + moved_bytes) / bandwidth + links.rtt_s.item(pair)


Holders = dict[tuple[int, int], list[tuple[int, int]]]
"""By region and profile: rows of prefill nodes, and what each holds."""


def _holders(request: RequestSnapshot, prefixes: PrefixMatches, cluster: ClusterSnapshot) -> Holders:
    most = request.prompt_tokens - 1
    found: Holders = {}
    role_of, region_of, profile_of = cluster.role.item, cluster.region.item, cluster.profile.item
    for row, tokens in zip(prefixes.nodes.tolist(), prefixes.node_tokens.tolist(), strict=True):
        if role_of(row) == ROLE_PREFILL:
            key = region_of(row), profile_of(row)
            pool = found.get(key)
            if pool is None:
                found[key] = [(row, tokens if tokens < most else most)]
            elif len(pool) < HOLDERS_A_POOL:
                pool.append((row, tokens if tokens < most else most))
    return found


def _affine(
    request: RequestSnapshot,
    holders: Sequence[tuple[int, int]],
    cluster: ClusterSnapshot,
    pool: Pool,
    free_at: Floats,
    least: Start,
) -> Start:
    """The least loaded node, or one of those that hold a longer prefix themselves if it would be done sooner."""
    if not holders:
        return least
    prefill_s, prompt, now_s = cluster.profiles[pool.profile].prefill_s, request.prompt_tokens, cluster.now_s
    best = least
    # Who holds no more than the least loaded node starts from can't be done sooner, unless that has to fetch it.
    fewer = best.prefill_start - (1 if best.fetch_s else 0)
    if holders[0][1] <= fewer:
        return least
    done_s = max(free_at.item(least.row) - now_s, best.fetch_s, 0.0) + prefill_s.at(prompt - best.prefill_start)
    for row, held in holders:
        if held <= fewer:
            break
        if held < best.prefill_start or free_at.item(row) == np.inf:
            continue
        node_done_s = max(0.0, free_at.item(row) - now_s) + prefill_s.at(prompt - held)
        if node_done_s < done_s or (node_done_s == done_s and held > best.prefill_start):
            best, done_s = Start(row, _wait_s(cluster, row), held, None, None, 0.0), node_done_s
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
        wire = profile.kv_bytes.at(request.prompt_tokens - place.held) * settings.wire_ratio
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
        start.fetch_node,
    )
