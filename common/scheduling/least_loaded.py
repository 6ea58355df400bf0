"""The static policy: a fixed threshold, then the least-loaded node of each role."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from prfaas.common.scheduling.types import ROLE_DECODE, ROLE_PREFILL, ClusterSnapshot, Decision, RequestSnapshot


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Offload a request whose uncached length is above `offload_threshold_tokens` (0: all that have anything to
    prefill). Load is what is in flight, tokens first, then requests; ties go to the lower index."""

    offload_threshold_tokens: int = 0

    def __call__(self, request: RequestSnapshot, cluster: ClusterSnapshot) -> Decision | None:
        decode = _least_loaded(cluster, ROLE_DECODE)
        if decode is None:
            return None
        # Decode recomputes the last prompt token itself (the n−1 rule), so a one-token prompt has nothing to offload.
        to_prefill = request.uncached_tokens - 1
        if to_prefill < 1:
            return Decision(None, decode, 0, "nothing_to_prefill")
        if request.uncached_tokens <= self.offload_threshold_tokens:
            return Decision(None, decode, 0, "below_threshold")
        prefill = _least_loaded(cluster, ROLE_PREFILL)
        if prefill is None:
            return Decision(None, decode, 0, "no_prefill_node")
        return Decision(prefill, decode, 0, "offloaded")


def _least_loaded(cluster: ClusterSnapshot, role: int) -> int | None:
    candidates = np.flatnonzero((cluster.role == role) & cluster.usable)
    if candidates.size == 0:
        return None
    order = np.lexsort((cluster.inflight_requests[candidates], cluster.inflight_tokens[candidates]))
    return int(candidates[order[0]])
