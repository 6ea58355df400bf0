"""The table that single-cluster tools don't have: what left home, where the time to the first token went, what crossed
the link. Only requests that were answered count, and of those the ones whose figures are known: a server that is no
PrfaaS tells none of it.

- share offloaded: of requests, and of prompt tokens.
- TTFT's parts: router (to prefill's queue), queue, prefill, exposed transfer (end of prefill to the last layer's
  arrival), first step (from there to the first token at the router), and the rest of the client's own TTFT, which is
  the way between client and router, and waiting in the client.
- KV bytes before and after the codec.
- transfer: from prefill's start, since the first pieces leave with its first layer, to the last layer's arrival.
- overlap: 1 − exposed transfer / transfer, the share of that time which prefill hid.
- Gbit/s of a transfer: its bytes on the wire / that time. Where prefill is the slower part it is the rate at which KV
  is made (the paper's Φ_kv), not what the link could carry.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray
from prfaas.loadgen.records import BYTES_COLUMNS, FALLBACK_SEPARATOR, Records

PARTS = ("router_s", "queue_s", "prefill_s", "exposed_s", "first_step_s")


class Parts(msgspec.Struct, frozen=True):
    """Means over `count` requests, in seconds; `rest_s` makes their sum the mean TTFT of these requests."""

    count: int
    router_s: float | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    exposed_s: float | None = None
    first_step_s: float | None = None
    rest_s: float | None = None
    ttft_s: float | None = None


class OffloadSummary(msgspec.Struct, frozen=True):
    """None: not known. `known`: requests that it is known of whether they were offloaded. Bytes are sums."""

    known: int
    offloaded: int
    share_of_requests: float | None
    share_of_prompt_tokens: float | None
    parts_offloaded: Parts
    parts_local: Parts
    kv_raw_bytes: int | None
    kv_wire_bytes: int | None
    wire_ratio: float | None
    fetched_wire_bytes: int | None
    """Of prefixes that were fetched from another region's cache."""
    egress_gbps: float | None
    """All bytes on the wire over the whole run's duration."""
    transfers: int
    """With a known duration; the next four are over them."""
    transfer_mean_s: float | None
    transfer_gbps_mean: float | None
    transfer_gbps_p50: float | None
    overlap: float | None
    """Of all transfer time together."""
    cached_share_of_prompt_tokens: float | None
    reasons: dict[str, int]
    fallbacks: dict[str, int]
    prefill_regions: dict[str, int]
    prefill_nodes: dict[str, int]

    def rows(self) -> list[tuple[str, str, float | int | None]]:
        """(name, unit, value) of each figure."""
        made: list[tuple[str, str, float | int | None]] = [
            ("offloaded", "", self.offloaded),
            ("share_offloaded", "", self.share_of_requests),
            ("share_offloaded_of_prompt_tokens", "", self.share_of_prompt_tokens),
            ("kv_raw_bytes", "bytes", self.kv_raw_bytes),
            ("kv_wire_bytes", "bytes", self.kv_wire_bytes),
            ("fetched_wire_bytes", "bytes", self.fetched_wire_bytes),
            ("egress_gbps", "Gbit/s", self.egress_gbps),
            ("transfer_gbps", "Gbit/s", self.transfer_gbps_mean),
            ("overlap", "", self.overlap),
            ("cached_share_of_prompt_tokens", "", self.cached_share_of_prompt_tokens),
        ]
        for where, parts in (("offloaded", self.parts_offloaded), ("local", self.parts_local)):
            made += [(f"{where}_{name}", "s", getattr(parts, name)) for name in (*PARTS, "rest_s", "ttft_s")]
        return made + [(f"fallback_{reason}", "", count) for reason, count in self.fallbacks.items()]


def summarise_offload(records: Records, duration_s: float) -> OffloadSummary:
    """`duration_s`: of the whole run."""
    ok = records.ok
    known, away = ok & (records.offloaded >= 0), ok & (records.offloaded == 1)
    prompts = records.prompt_tokens
    raw, wire, fetched = (_sum(getattr(records, name), ok) for name in BYTES_COLUMNS)
    cached = ok & (records.cached_tokens >= 0)
    moved = ok & np.isfinite(records.transfer_s) & (records.transfer_s > 0) & (records.kv_wire_bytes > 0)
    took_s = records.transfer_s[moved]
    gbps = records.kv_wire_bytes[moved] * 8e-9 / took_s
    exposed_s = np.clip(records.exposed_s[moved], 0.0, took_s)
    judged = np.isfinite(exposed_s)
    return OffloadSummary(
        known=int(np.count_nonzero(known)),
        offloaded=int(np.count_nonzero(away)),
        share_of_requests=_share(int(np.count_nonzero(away)), int(np.count_nonzero(known))),
        share_of_prompt_tokens=_share(prompts[away].sum(), prompts[known].sum()),
        parts_offloaded=mean_parts(records, away),
        parts_local=mean_parts(records, known & ~away),
        kv_raw_bytes=raw,
        kv_wire_bytes=wire,
        wire_ratio=None if wire is None or raw is None else _share(wire, raw),
        fetched_wire_bytes=fetched,
        egress_gbps=None if wire is None else _share((wire + (fetched or 0)) * 8e-9, duration_s),
        transfers=int(took_s.size),
        transfer_mean_s=_mean(took_s),
        transfer_gbps_mean=_mean(gbps),
        transfer_gbps_p50=float(np.median(gbps)) if gbps.size else None,
        overlap=_overlap(exposed_s[judged], took_s[judged]),
        cached_share_of_prompt_tokens=_share(records.cached_tokens[cached].sum(), prompts[cached].sum()),
        reasons=records.reason.counts(),
        fallbacks=count_fallbacks(records),
        prefill_regions=records.region.counts(ok),
        prefill_nodes=records.prefill_node.counts(ok),
    )


def mean_parts(records: Records, among: NDArray[np.bool_]) -> Parts:
    """Over those of `among` (mask, shape [n]) whose parts are all known."""
    columns = {name: getattr(records, name) for name in PARTS}
    ttft_s = records.first_token_s - records.scheduled_s
    whole = among & np.isfinite(ttft_s)
    for column in columns.values():
        whole = whole & np.isfinite(column)
    count = int(np.count_nonzero(whole))
    if not count:
        return Parts(0)
    means = {name: float(column[whole].mean()) for name, column in columns.items()}
    mean_s = float(ttft_s[whole].mean())
    return Parts(count, **means, rest_s=mean_s - sum(means.values()), ttft_s=mean_s)


def count_fallbacks(records: Records) -> dict[str, int]:
    """How often each reason came up; a request may have had several."""
    counted: dict[str, int] = {}
    for joined, count in records.fallbacks.counts().items():
        for reason in joined.split(FALLBACK_SEPARATOR):
            counted[reason] = counted.get(reason, 0) + count
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def _sum(column: NDArray[np.int64], among: NDArray[np.bool_]) -> int | None:
    known = column[among & (column >= 0)]
    return int(known.sum()) if known.size else None


def _share(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole > 0 else None


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if values.size else None


def _overlap(exposed_s: NDArray[np.float64], took_s: NDArray[np.float64]) -> float | None:
    return 1.0 - float(exposed_s.sum() / took_s.sum()) if took_s.size else None
