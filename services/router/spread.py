"""So that routers which share nothing don't all send to the node that looks idle to all of them. Pure.

Between two heartbeats of a node all R routers see the same load of it, and each its own dispatches alone. They are
alike, so each takes it that the others have done what it has done itself, and chooses the least of

    load + R · (own dispatches since the node's heartbeat + u)         u in [0, 1): drawn a node, router and heartbeat

A router that fills nodes up to a level ℓ in that order sends to a node of load b with probability (ℓ − b) / R, so that
R of them together send ℓ − b: up to one level, as one router would that saw everything (Dahlin's "load interpretation"
of stale loads, IEEE TPDS 11, 2000). With one router nothing is added, and ties go to the lower row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from prfaas.common.scheduling.types import ROLE_PREFILL, ClusterSnapshot

WEIGHT = 0.05
"""Of one prefill's seconds in their moving average."""


class Spread:
    """What is added to each node's load where nodes are compared. rng: None: there is no other router, whatever nodes
    say."""

    def __init__(self, rng: np.random.Generator | None) -> None:
        self._rng = rng
        self._routers = 1
        self._prefill_s = 0.0
        """Of one request, on the average."""
        self._jitter_s: NDArray[np.float64] = np.zeros(0)
        self._jitter_requests: NDArray[np.float64] = np.zeros(0)

    def grow(self, nodes: int) -> None:
        self._jitter_s = np.pad(self._jitter_s, (0, nodes - self._jitter_s.size))
        self._jitter_requests = np.pad(self._jitter_requests, (0, nodes - self._jitter_requests.size))

    def draw(self, row: int, routers: int) -> None:
        """At a heartbeat, which says how many routers the node hears of."""
        if self._rng is None:
            return
        self._routers = routers
        drawn = routers * self._rng.random()
        self._jitter_requests[row] = drawn
        self._jitter_s[row] = drawn * self._prefill_s

    def dispatched(self, row: int, role: int, prefill_s: float) -> None:
        """One request of this router's, since the node's last heartbeat."""
        others = self._routers - 1
        self._jitter_requests[row] += others
        self._jitter_s[row] += others * prefill_s
        if role == ROLE_PREFILL:
            self._prefill_s += (WEIGHT if self._prefill_s else 1.0) * (prefill_s - self._prefill_s)

    def write(self, snapshot: ClusterSnapshot) -> None:
        if self._routers < 2:
            snapshot.prefill_jitter_s = snapshot.decode_jitter = None
        else:
            snapshot.prefill_jitter_s, snapshot.decode_jitter = self._jitter_s, self._jitter_requests
