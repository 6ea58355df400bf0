"""What the ways between regions carry, from what sessions between nodes have measured. Pure.

Every session reports the bandwidth of its own way (`LinkMessage`), but they share one WAN. Adding all up would count a
link once for each session that had it alone some time ago; the largest would see a share of it when many are busy. So
for each pair of regions

    carried = Σ utilisation · bandwidth        what passes now, of all sessions
    while a session is busy (half its bandwidth or more is used):
        estimate = max(carried, that session's bandwidth)              up and down, as the link does
    else
        estimate = max(estimate, carried, the session's bandwidth)     an idle link can only turn out to be wider

A bandwidth that a session says again is no news: it may have been measured long ago, and counts as the estimate at
most. So a session that begins to use a link which others have found narrow doesn't widen it by what it remembers.

Utilisation = carried / estimate. A pair that nobody has measured has the assumed bandwidth: unknown doesn't mean
that there is no link. The same inside a region (the diagonal), for fetches between its nodes.

Bandwidths are on the wire and policies reckon with bytes of KV: `compressed` says how much smaller the codec makes it.

Bytes that are to be sent: what sessions report is ready (of all routers), and what this router has dispatched is
counted from its decision to the end of its transfer. The larger of the two holds, since they are of the same requests.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from prfaas.common.scheduling.types import LinkColumns
from prfaas.services.messages import LinkMessage

BUSY = 0.5
WEIGHT = 0.2
"""Of one heartbeat's round trip, or one transfer's compression, in their moving averages."""

Heard = dict[int, tuple[float, float]]
"""By target region: carried bytes/s and queued bytes that one node has reported."""


class Links:
    """Pairs are [from, to] of region indices. `columns` has the same arrays until `grow`."""

    def __init__(self, assumed_bytes_per_s: float) -> None:
        self.assumed_bytes_per_s = assumed_bytes_per_s
        self.columns = LinkColumns.none(0)
        self._heard: dict[int, Heard] = {}
        self._said: dict[int, dict[str, float]] = {}
        """By row: the bandwidth that each of its sessions has reported last, by peer."""
        self._carried = np.zeros((0, 0))
        self._reported = np.zeros((0, 0))
        self._own = np.zeros((0, 0))
        self._measured = np.zeros((0, 0))
        """On the wire, bytes/s; 0 = not yet."""
        self._wire_ratio = 1.0

    def grow(self, regions: int) -> LinkColumns:
        """Columns for so many regions; what is known of the old ones stays."""
        more = regions - self._own.shape[0]

        def grown(old: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.pad(old, ((0, more), (0, more)))

        self._carried, self._reported = grown(self._carried), grown(self._reported)
        self._own, self._measured = grown(self._own), grown(self._measured)
        old = self.columns
        self.columns = LinkColumns(
            grown(old.bandwidth_bytes_per_s), grown(old.utilisation), grown(old.queued_bytes), grown(old.rtt_s)
        )
        for source in range(regions):
            for target in range(regions):
                self._write((source, target))
        return self.columns

    def forget_region(self, region: int) -> None:
        """Its index is another region's now."""
        for array in (self._carried, self._reported, self._own, self._measured, self.columns.rtt_s):
            array[region, :] = array[:, region] = 0.0
        for heard in self._heard.values():
            heard.pop(region, None)
        for other in range(self._own.shape[0]):
            self._write((region, other))
            self._write((other, region))

    def heard(self, row: int, source: int, links: Iterable[tuple[int, LinkMessage]]) -> None:
        """One node's heartbeat: its sessions, each with the region of the peer."""
        before = self._said.pop(row, {})
        self.forget_node(row, source)
        said = self._said[row] = {}
        now: Heard = {}
        estimates: dict[int, tuple[float, float]] = {}
        for target, link in links:
            carried, queued = now.get(target, (0.0, 0.0))
            using, bandwidth = min(1.0, link.utilisation), link.bandwidth_bytes_per_s
            said[link.peer] = bandwidth
            known = float(self._measured[source, target])
            if known and before.get(link.peer) == bandwidth:
                bandwidth = min(bandwidth, known)
            now[target] = carried + using * bandwidth, queued + link.queued_bytes
            busiest, widest = estimates.get(target, (0.0, 0.0))
            estimates[target] = max(busiest, bandwidth if using >= BUSY else 0.0), max(widest, bandwidth)
            if link.rtt_s > 0:
                self._saw_rtt((source, target), link.rtt_s)
        self._heard[row] = now
        for target, (carried, queued) in now.items():
            pair = source, target
            self._carried[pair] += carried
            self._reported[pair] += queued
            busiest, widest = estimates[target]
            if busiest:
                self._measured[pair] = max(self._carried[pair], busiest)
            else:
                self._measured[pair] = max(self._measured[pair], self._carried[pair], widest)
            self._write(pair)

    def forget_node(self, row: int, source: int) -> None:
        """It is gone, or reports anew. What was measured of the links stays."""
        self._said.pop(row, None)
        for target, (carried, queued) in self._heard.pop(row, {}).items():
            pair = source, target
            self._carried[pair] = max(0.0, self._carried[pair] - carried)
            self._reported[pair] = max(0.0, self._reported[pair] - queued)
            self._write(pair)

    def dispatched(self, pair: tuple[int, int], kv_bytes: float) -> None:
        """This router has sent a request whose KV goes this way; negative: its transfer has ended."""
        if max(pair) < self._own.shape[0]:
            self._own[pair] = max(0.0, self._own[pair] + kv_bytes)
            self._write(pair)

    def compressed(self, raw_bytes: int, wire_bytes: int) -> None:
        """Of one transfer that has ended."""
        if raw_bytes > 0 and wire_bytes > 0:
            self._wire_ratio += WEIGHT * (min(1.5, wire_bytes / raw_bytes) - self._wire_ratio)

    def _saw_rtt(self, pair: tuple[int, int], rtt_s: float) -> None:
        before = self.columns.rtt_s[pair]
        self.columns.rtt_s[pair] = rtt_s if before == 0 else before + WEIGHT * (rtt_s - before)

    def _write(self, pair: tuple[int, int]) -> None:
        measured, columns = self._measured[pair], self.columns
        columns.bandwidth_bytes_per_s[pair] = (measured or self.assumed_bytes_per_s) / self._wire_ratio
        columns.utilisation[pair] = min(1.0, self._carried[pair] / measured) if measured else 0.0
        columns.queued_bytes[pair] = max(self._own[pair], self._reported[pair])
