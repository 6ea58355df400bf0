"""The tables of a report as text in cells, for the console and for the page alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prfaas.loadgen.report.offload import OffloadSummary, Parts
from prfaas.loadgen.report.summary import Spread, Summary

NONE = "-"
LATENCIES = (
    ("TTFT", "ttft_s"),
    ("time to second token", "second_token_s"),
    ("TPOT", "tpot_s"),
    ("ITL", "itl_s"),
    ("E2E", "e2e_s"),
)
MAX_REASONS = 12
"""Rows for words; the others are summed up."""


@dataclass(frozen=True, slots=True)
class Table:
    """The first column is left-aligned, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables(summaries: Sequence[Summary]) -> list[Table]:
    """Of one run, or of several beside one another."""
    made = [overview(summaries), latencies(summaries)]
    if any(summary.offload.known for summary in summaries):
        made.append(offload(summaries))
    if any(summary.errors for summary in summaries):
        made.append(_words("errors", summaries, lambda summary: summary.errors))
    return made


def overview(summaries: Sequence[Summary]) -> Table:
    rows: list[tuple[str, Callable[[Summary], str]]] = [
        ("requests", lambda s: f"{s.requests:,}"),
        ("  ok", lambda s: f"{s.ok:,}"),
        ("  failed / refused / interrupted", lambda s: f"{s.failed:,} / {s.refused:,} / {s.interrupted:,}"),
        ("duration, s", lambda s: f"{s.duration_s:,.2f}"),
        ("requests/s", lambda s: f"{s.requests_per_s:,.3f}"),
        ("output tokens/s", lambda s: f"{s.output_tokens_per_s:,.1f}"),
        ("prompt and output tokens/s", lambda s: f"{s.total_tokens_per_s:,.1f}"),
        ("mean prompt / output tokens", lambda s: f"{_n(s.prompt_tokens_each.mean)} / {_n(s.output_tokens_each.mean)}"),
        ("most requests in flight", lambda s: f"{s.max_in_flight:,}"),
    ]
    if any(s.goodput_per_s is not None for s in summaries):
        rows += [
            ("goodput, requests/s", lambda s: _n(s.goodput_per_s, 3)),
            ("  share of requests within the objective", lambda s: _percent(s.share_good)),
        ]
    note = f"objective: {summaries[0].objective}" if summaries[0].share_good is not None else ""
    return _beside("the run" if len(summaries) == 1 else "the runs", summaries, rows, note)


def latencies(summaries: Sequence[Summary]) -> Table:
    rows = []
    for name, field in LATENCIES:
        for summary in summaries:
            spread: Spread = getattr(summary, field)
            values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.min, spread.max)
            cells = [NONE if value is None else f"{value * 1e3:,.2f}" for value in values]
            rows.append((name if len(summaries) == 1 else f"{name}: {summary.name}", *cells))
    return Table(
        "latency, ms",
        ("", "mean", "p50", "p90", "p99", "min", "max"),
        tuple(rows),
        "from the scheduled send; TPOT of a request, ITL a gap between two pieces of text",
    )


def offload(summaries: Sequence[Summary]) -> Table:
    """The table that single-cluster tools don't have; `offload.py` defines its figures."""
    figures: list[tuple[str, Callable[[OffloadSummary], str]]] = [
        ("requests offloaded", lambda o: f"{o.offloaded:,} of {o.known:,}" if o.known else NONE),
        ("share offloaded: requests", lambda o: _percent(o.share_of_requests)),
        ("share offloaded: prompt tokens", lambda o: _percent(o.share_of_prompt_tokens)),
        ("prompt tokens found in a cache", lambda o: _percent(o.cached_share_of_prompt_tokens)),
    ]
    if any(summary.offload.parts_offloaded.count for summary in summaries):
        figures += _part_rows("offloaded", lambda o: o.parts_offloaded)
    if any(summary.offload.parts_local.count for summary in summaries):
        figures += _part_rows("prefilled at home", lambda o: o.parts_local)
    figures += [
        ("KV raw", lambda o: _bytes(o.kv_raw_bytes)),
        ("KV on the wire", lambda o: _bytes(o.kv_wire_bytes)),
        ("  of raw", lambda o: _percent(o.wire_ratio)),
        ("prefixes fetched, on the wire", lambda o: _bytes(o.fetched_wire_bytes)),
        ("mean egress, Gbit/s", lambda o: _n(o.egress_gbps, 3)),
        ("transfers measured", lambda o: f"{o.transfers:,}"),
        ("  mean, ms", lambda o: _ms(o.transfer_mean_s)),
        ("  effective Gbit/s, mean / p50", lambda o: f"{_n(o.transfer_gbps_mean, 3)} / {_n(o.transfer_gbps_p50, 3)}"),
        ("  hidden behind prefill (overlap)", lambda o: _percent(o.overlap)),
    ]
    rows = [(name, *(say(summary.offload) for summary in summaries)) for name, say in figures]
    rows += _count_rows("fallback: ", [summary.offload.fallbacks for summary in summaries])
    rows += _count_rows("routed: ", [summary.offload.reasons for summary in summaries])
    rows += _count_rows("prefilled in ", [summary.offload.prefill_regions for summary in summaries])
    if not any(summary.offload.fallbacks for summary in summaries):
        rows.append(("fallbacks", *["0"] * len(summaries)))
    heads = tuple(summary.name for summary in summaries) if len(summaries) > 1 else ("",)
    return Table("what left home", ("", *heads), tuple(rows), "means over requests whose figures the router told")


def _part_rows(
    where: str, parts_of: Callable[[OffloadSummary], Parts]
) -> list[tuple[str, Callable[[OffloadSummary], str]]]:
    names = (
        ("  router", "router_s"),
        ("  queue", "queue_s"),
        ("  prefill", "prefill_s"),
        ("  exposed transfer", "exposed_s"),
        ("  first step", "first_step_s"),
        ("  client, way to the router", "rest_s"),
    )
    made = [(f"TTFT {where}, ms", _part(parts_of, "ttft_s"))]
    return made + [(name, _part(parts_of, field)) for name, field in names]


def _part(parts_of: Callable[[OffloadSummary], Parts], field: str) -> Callable[[OffloadSummary], str]:
    return lambda summary: _ms(getattr(parts_of(summary), field))


def _words(title: str, summaries: Sequence[Summary], counts: Callable[[Summary], dict[str, int]]) -> Table:
    heads = tuple(summary.name for summary in summaries) if len(summaries) > 1 else ("requests",)
    return Table(title, ("", *heads), tuple(_count_rows("", [counts(summary) for summary in summaries])))


def _count_rows(prefix: str, counts: Sequence[dict[str, int]]) -> list[tuple[str, ...]]:
    total: dict[str, int] = {}
    for counted in counts:
        for word, count in counted.items():
            total[word] = total.get(word, 0) + count
    words = sorted(total, key=lambda word: (-total[word], word))
    rows = [(prefix + word, *(f"{c.get(word, 0):,}" for c in counts)) for word in words[:MAX_REASONS]]
    if rest := words[MAX_REASONS:]:
        rows.append((prefix + "others", *(f"{sum(c.get(word, 0) for word in rest):,}" for c in counts)))
    return rows


def _beside(
    title: str, summaries: Sequence[Summary], rows: Sequence[tuple[str, Callable[[Summary], str]]], note: str
) -> Table:
    heads = tuple(summary.name for summary in summaries) if len(summaries) > 1 else ("",)
    return Table(title, ("", *heads), tuple((name, *(say(s) for s in summaries)) for name, say in rows), note)


def _n(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def _ms(value_s: float | None) -> str:
    return NONE if value_s is None else f"{value_s * 1e3:,.1f}"


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.1%}"


def _bytes(count: int | None) -> str:
    if count is None:
        return NONE
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"
