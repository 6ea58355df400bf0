"""What a session counts for Prometheus."""

from __future__ import annotations

from prfaas.common.metrics import TransportMetrics
from prfaas.transport.api import TransferReport


class Counters:
    """Bytes are summed up here and handed to Prometheus by `flush`: its counters lock, and a fast lane has thousands of
    chunks a second."""

    def __init__(self, metrics: TransportMetrics) -> None:
        forms = ("raw", "wire")
        self._totals = [
            counter.labels(form) for counter in (metrics.sent_bytes, metrics.received_bytes) for form in forms
        ]
        self._pending = [0, 0, 0, 0]
        self.checksum_failures = metrics.checksum_failures
        self.lanes = metrics.lanes
        self.lane_losses = metrics.lane_losses
        self.refusals = metrics.refusals
        self.transfers = metrics.transfers
        self._moved_chunks = metrics.moved_chunks
        self._resent_chunks = metrics.resent_chunks
        self._transfer_seconds = metrics.transfer_seconds
        self._codec_ratio = metrics.codec_ratio

    def sent(self, raw_bytes: int, wire_bytes: int) -> None:
        pending = self._pending
        pending[0] += raw_bytes
        pending[1] += wire_bytes

    def received(self, raw_bytes: int, wire_bytes: int) -> None:
        pending = self._pending
        pending[2] += raw_bytes
        pending[3] += wire_bytes

    def ended(self, report: TransferReport, seconds: float | None) -> None:
        """A transfer that was sent. seconds: how long a completed one took; None: it failed."""
        self._moved_chunks.inc(report.moved_chunks)
        self._resent_chunks.inc(report.resent_chunks)
        self.transfers.labels("sent", "failed" if seconds is None else "completed").inc()
        if seconds is not None:
            self._transfer_seconds.observe(seconds)
            if report.raw_bytes:
                self._codec_ratio.observe(report.wire_bytes / report.raw_bytes)

    def flush(self) -> None:
        """Once a tick, and when a transfer ends."""
        for index, counter in enumerate(self._totals):
            if self._pending[index]:
                counter.inc(self._pending[index])
                self._pending[index] = 0
