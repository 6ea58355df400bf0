"""A policy that predicts nothing: a fixed threshold, then the least-loaded node of each role."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prfaas.common.scheduling.types import (
    ROLE_DECODE,
    ROLE_PREFILL,
    ClusterSnapshot,
    Decision,
    Refused,
    RequestSnapshot,
)

RETRY_AFTER_S = 2.0
"""A node's next heartbeat is at most so far away."""


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Offload a request whose uncached length is above `offload_threshold_tokens` (0: all that have anything to
    prefill), to whatever prefill node. Load is what is in flight, tokens first, then requests; ties go to the lower
    index. Deadlines, links, prefixes and profiles are not looked at."""

    offload_threshold_tokens: int = 0

    def __call__(self, request: RequestSnapshot, cluster: ClusterSnapshot) -> Decision | Refused:
        homes = cluster.usable & (cluster.role == ROLE_DECODE)
        if request.home_region is not None:
            homes &= cluster.region == request.home_region
        decode = _least_loaded(cluster, homes)
        if decode is None:
            return Refused("no_decode_node", RETRY_AFTER_S)
        # Decode recomputes the last prompt token itself (the n−1 rule), so a one-token prompt has nothing to offload.
        to_prefill = request.uncached_tokens - 1
        if to_prefill < 1:
            return Decision(None, decode, 0, "nothing_to_prefill")
        if request.pinned_route is not None:
            return _pinned(request, cluster, decode)
        if request.uncached_tokens <= self.offload_threshold_tokens:
            return Decision(None, decode, 0, "below_threshold")
        prefill = _least_loaded(cluster, cluster.usable & (cluster.role == ROLE_PREFILL))
        if prefill is None:
            return Decision(None, decode, 0, "no_prefill_node")
        return Decision(prefill, decode, 0, "offloaded")


def _pinned(request: RequestSnapshot, cluster: ClusterSnapshot, decode: int) -> Decision | Refused:
    if request.pinned_route == "local":
        return Decision(None, decode, 0, "pinned")
    at_home = cluster.region == cluster.region[decode]
    wanted = ~at_home if request.pinned_route == "offload" else at_home
    prefill = _least_loaded(cluster, wanted & cluster.usable & (cluster.role == ROLE_PREFILL))
    return Refused("pinned", RETRY_AFTER_S) if prefill is None else Decision(prefill, decode, 0, "pinned")


def _least_loaded(cluster: ClusterSnapshot, allowed: NDArray[np.bool_]) -> int | None:
    candidates = np.flatnonzero(allowed)
    if candidates.size == 0:
        return None
    order = np.lexsort((cluster.inflight_requests[candidates], cluster.inflight_tokens[candidates]))
    return int(candidates[order[0]])
