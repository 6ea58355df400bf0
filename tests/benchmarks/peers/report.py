"""From repetitions to rows, ratios and holds; and the table."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from tests.benchmarks.peers.kinds import OURS

KIB = 1024
Key = tuple[str, int, int]
"""(peer, lanes, chunk_bytes)"""

LEAST_OF_HASHING = 0.9
LEAST_OF_BARE = 0.75
LEAST_OF_PEERS = {"nixl": 1.5, "mooncake": 1.8}
PEER_LANES = 4
MOST_IDLE_PERCENT = 2.0
"""~0 %: our receiver answers a PING a second and does nothing else."""


def row(key: Key, runs: dict[Key, list[dict[str, Any]]], why: str | None, note: str) -> dict[str, Any]:
    name, lanes, chunk_bytes = key
    made: dict[str, Any] = {"peer": name, "lanes": lanes, "chunk_bytes": chunk_bytes, "note": note}
    done = runs.get(key, [])
    if why is not None or not done:
        return {**made, "why": why or "not measured"}
    for figure in ("gb_per_s", "sender_cpu_s_per_gb", "receiver_cpu_s_per_gb"):
        made[figure] = round(median(run[figure] for run in done), 3)
    idle = [run["idle_receiver_percent"] for run in done if "idle_receiver_percent" in run]
    made["idle_receiver_percent"] = round(median(idle), 1) if idle else None
    made["ours_ratio"] = ratio(runs, (OURS, lanes, chunk_bytes), key)
    return made


def ratio(runs: dict[Key, list[dict[str, Any]]], ours: Key, peer: Key) -> float | None:
    """Repetition by repetition, since the machine's speed drifts from one to the next."""
    pairs = list(zip(runs.get(ours, ()), runs.get(peer, ()), strict=False))
    return round(median(mine["gb_per_s"] / other["gb_per_s"] for mine, other in pairs), 3) if pairs else None


def holds(rows: list[dict[str, Any]], runs: dict[Key, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What must hold and whether it does; what could not be measured is not among them."""
    return [*_bare_holds(rows), *_peer_holds(rows, runs), *_idle_holds(rows)]


def _hold(what: str, value: float, bound: float, *, least: bool = True) -> dict[str, Any]:
    word = "at least" if least else "at most"
    return {
        "what": what,
        "value": value,
        "bound": f"{word} {bound:g}",
        "holds": value >= bound if least else value <= bound,
    }


def _bare_holds(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for peer, least in (("sockets + xxh3", LEAST_OF_HASHING), ("sockets", LEAST_OF_BARE)):
        for found in rows:
            if found["peer"] == peer and found.get("ours_ratio") is not None:
                where = f"{found['lanes']} lane(s), {found['chunk_bytes'] // KIB} KiB"
                yield _hold(f"GB/s, ours to {peer}, {where}", found["ours_ratio"], least)


def _peer_holds(rows: list[dict[str, Any]], runs: dict[Key, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Each in its best mode: with the chunks, and the threads, with which it is fastest."""
    ours = _best(rows, OURS)
    for peer, least in LEAST_OF_PEERS.items():
        theirs = _best(rows, peer)
        if ours is None or theirs is None:
            continue
        value = ratio(runs, _key(ours), _key(theirs))
        if value is not None:
            yield _hold(f"GB/s, ours to {peer}, {PEER_LANES} lanes, each in its best mode", value, least)
        spent, theirs_spent = _cpu(ours), _cpu(theirs)
        yield _hold(f"CPU s/GB of both sides, ours to {peer}", round(spent / theirs_spent, 3), 1.0, least=False)


def _idle_holds(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    idle = [
        r["idle_receiver_percent"] for r in rows if r["peer"] == OURS and r.get("idle_receiver_percent") is not None
    ]
    if idle:
        yield _hold("idle receiver, % of a core", max(idle), MOST_IDLE_PERCENT, least=False)


def _best(rows: list[dict[str, Any]], peer: str) -> dict[str, Any] | None:
    mine = [r for r in rows if r["peer"].startswith(peer) and r["lanes"] == PEER_LANES and "gb_per_s" in r]
    return max(mine, key=lambda r: float(r["gb_per_s"])) if mine else None


def _key(found: dict[str, Any]) -> Key:
    return found["peer"], found["lanes"], found["chunk_bytes"]


def _cpu(found: dict[str, Any]) -> float:
    return float(found["sender_cpu_s_per_gb"] + found["receiver_cpu_s_per_gb"])


def as_text(report: dict[str, Any]) -> str:
    lines = [
        f"{report['bytes'] >> 20} MiB over loopback, {report['congestion_control']}, {report['cores']} cores, "
        f"load before {report['load_before']:g}; medians of {report['repetitions']} repetitions"
    ]
    if report["network"]:
        lines.append(report["network"])
    heading = f"{'':16} {'GB/s':>7} {'ours':>6} {'CPU s/GB sender':>16} {'receiver':>9} {'idle receiver':>14}"
    place: tuple[int, int] | None = None
    for found in report["rows"]:
        if place != (place := (found["lanes"], found["chunk_bytes"])):
            lines += ["", f"{place[0]} lane(s), chunks of {place[1] // KIB} KiB", heading]
        lines.append(f"{found['peer']:16} {_figures(found)}")
    lines.append("")
    lines += [
        f"{'holds' if hold['holds'] else 'FAILS'}  {hold['what']}: {hold['value']:g} ({hold['bound']})"
        for hold in report["holds"]
    ]
    return "\n".join(lines)


def _figures(found: dict[str, Any]) -> str:
    if "why" in found:
        return found["why"]
    idle = found["idle_receiver_percent"]
    ours = found["ours_ratio"]
    return (
        f"{found['gb_per_s']:7.2f} {'' if ours is None else f'{ours:.2f}x':>6} {found['sender_cpu_s_per_gb']:16.3f} "
        f"{found['receiver_cpu_s_per_gb']:9.3f} {'' if idle is None else f'{idle:.1f} %':>14}  {found['note']}"
    )
