"""Was it the client? A load generator that is busy itself measures itself. Pure."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray
from prfaas.loadgen.records import Records

LATE_S = 0.010
"""Of sending, and of the event loop: less is not told from a server's own noise."""
LATE_SHARE = 0.05
"""Of the median TTFT: more makes what is reported another figure."""
BUSY_CORES = 0.9


class ClientHealth(msgspec.Struct, frozen=True):
    """late: sent so much later than possible. loop_lag: the event loop woke so much later than asked, and noticed
    tokens as late. cpu_cores: processor time of the client over the run's time."""

    late_p50_s: float
    late_p99_s: float
    late_max_s: float
    loop_lag_p99_s: float
    loop_lag_max_s: float
    cpu_cores: float
    timelines_missed: int
    warnings: list[str]
    """Empty: the client was not the bottleneck."""


def judge(
    records: Records | None, loop_lag_s: NDArray[np.float64], cpu_cores: float, timelines_missed: int = 0
) -> ClientHealth:
    """`loop_lag_s`: samples, shape [any]. `records`: None when nothing was sent."""
    if records is None:
        records = Records.of(np.empty(0))
    late_p50_s, late_p99_s, late_max_s = _percentiles(records.client_late_s, 50, 99, 100)
    lag_p99_s, lag_max_s = _percentiles(loop_lag_s, 99, 100)
    (ttft_s,) = _percentiles(records.first_token_s - records.scheduled_s, 50)
    warnings = []
    if late_p99_s > LATE_S and late_p99_s > LATE_SHARE * ttft_s:
        warnings.append(
            f"requests left up to {late_p99_s * 1e3:.0f} ms late (p99) because this client, or its machine, was busy; "
            "that is in every latency here; use a faster machine, several clients, or a lower rate"
        )
    if lag_p99_s > LATE_S:
        warnings.append(
            f"this client's event loop ran {lag_p99_s * 1e3:.0f} ms late (p99): first tokens and gaps between tokens "
            "are as uncertain as that"
        )
    if cpu_cores > BUSY_CORES:
        warnings.append(f"this client used {cpu_cores:.0%} of a core: it may have been the bottleneck")
    if records.error.equal("no_file_descriptors").any():
        warnings.append("this client ran out of file descriptors; raise the limit: ulimit -n 65536")
    if records.error.equal("no_local_ports").any():
        warnings.append("this client ran out of local ports; use a lower rate, or several client addresses")
    return ClientHealth(late_p50_s, late_p99_s, late_max_s, lag_p99_s, lag_max_s, cpu_cores, timelines_missed, warnings)


def _percentiles(values: NDArray[np.float64], *which: float) -> list[float]:
    """Of what is known; zeros when nothing is."""
    known = values[np.isfinite(values)]
    return [0.0] * len(which) if not known.size else [float(np.percentile(known, p)) for p in which]
