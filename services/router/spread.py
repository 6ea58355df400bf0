"""So that routers which share nothing don't all send to the node that looks idle to all of them. Pure.

Between two heartbeats of a node every router sees its own dispatches and none of the others'. How many those are is
known on the average: as many as its own, from each. So each router draws a number in [0, 1) for each node at each of
its heartbeats, and adds it, times what the others may have sent, to the node's load where nodes are compared: nodes
that differ by less than that are taken in an order of the router's own.

    λ = (routers − 1) · own dispatches/s · heartbeat interval / nodes          requests of others on a node, on average
    what they may have sent = λ + 2·√λ                                         requests, or times their mean seconds

With one router nothing is added, and ties go to the lower row.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from prfaas.common.scheduling.types import ROLE_DECODE, ROLE_PREFILL, ClusterSnapshot

HEARTBEAT_S = 2.0
MEMORY_S = 4.0
"""Of the own rate: what was dispatched so long ago counts 1/e."""
LEAST = 1e-6
"""Of what is added (s, requests) before a rate is known: exact ties are broken at random."""
SECONDS_WEIGHT = 0.05


class _Rate:
    """Dispatches a second, and their mean prefill seconds."""

    __slots__ = ("_at_s", "_count", "mean_s")

    def __init__(self) -> None:
        self._count = 0.0
        self._at_s = 0.0
        self.mean_s = 0.0

    def add(self, seconds: float, now_s: float) -> None:
        self._count = self._faded(now_s) + 1.0
        self._at_s = now_s
        self.mean_s += (SECONDS_WEIGHT if self.mean_s else 1.0) * (seconds - self.mean_s)

    def per_s(self, now_s: float) -> float:
        return self._faded(now_s) / MEMORY_S

    def _faded(self, now_s: float) -> float:
        return self._count * math.exp(-max(0.0, now_s - self._at_s) / MEMORY_S)


class Spread:
    """rng: None: there is no other router, whatever nodes say."""

    def __init__(self, rng: np.random.Generator | None) -> None:
        self._rng = rng
        self._drawn = np.zeros(0)
        self._routers = 1
        self._rates = {ROLE_PREFILL: _Rate(), ROLE_DECODE: _Rate()}

    def grow(self, nodes: int) -> None:
        self._drawn = np.pad(self._drawn, (0, nodes - self._drawn.size))

    def draw(self, row: int, routers: int) -> None:
        """At a heartbeat, which says how many routers the node hears of."""
        if self._rng is not None:
            self._routers = routers
            self._drawn[row] = self._rng.random()

    def dispatched(self, role: int, prefill_s: float, now_s: float) -> None:
        if self._rng is not None:
            self._rates[role].add(prefill_s, now_s)

    def write(self, snapshot: ClusterSnapshot) -> None:
        """The jitter columns, as of the snapshot's now."""
        if self._routers < 2:
            snapshot.prefill_jitter_s = snapshot.decode_jitter = None
            return
        if snapshot.prefill_jitter_s is None or snapshot.prefill_jitter_s.size != self._drawn.size:
            snapshot.prefill_jitter_s = np.zeros(self._drawn.size)
            snapshot.decode_jitter = np.zeros(self._drawn.size)
        assert snapshot.decode_jitter is not None
        seconds = self._others(snapshot, ROLE_PREFILL) * self._rates[ROLE_PREFILL].mean_s
        np.multiply(self._drawn, max(LEAST, seconds), out=snapshot.prefill_jitter_s)
        np.multiply(self._drawn, max(LEAST, self._others(snapshot, ROLE_DECODE)), out=snapshot.decode_jitter)

    def _others(self, snapshot: ClusterSnapshot, role: int) -> float:
        """Requests that other routers may have sent to one node since its heartbeat."""
        nodes = sum(_size(pool.rows) for pool in snapshot.pools(role))
        if not nodes:
            return 0.0
        each = (self._routers - 1) * self._rates[role].per_s(snapshot.now_s) * HEARTBEAT_S / nodes
        return each + 2 * math.sqrt(each)


def _size(rows: slice | NDArray[np.int64]) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else rows.size
