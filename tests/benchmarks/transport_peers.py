"""Our transport beside its peers, in one run: the same bytes, from host memory to host memory, over loopback.

    python -m tests.benchmarks.transport_peers --install              # brings the peers in first, about 600 MB
    python -m tests.benchmarks.transport_peers --only prfaas,sockets,nixl --chunks 1024 --lanes 4 --json
    python -m tests.benchmarks.transport_peers --faults

Peers are installed on request only, each in an environment of its own outside the repository, versions pinned. In every
repetition all of them take their turn, and ratios are taken repetition by repetition. Each repetition is two new
processes with memory that was touched before, and the receiver's memory is checked (SHA-256) after the clock has
stopped. Others at work on the machine change the order as well as the figures (peers with more threads get more of it),
so the load before is reported.

As root, all run in a network of their own whose default congestion control is the one asked for, since NIXL, Mooncake
and ucxx can't be told; otherwise the bare sockets, iperf3 and we set it socket by socket.

Exits 1 when something that must hold does not (report.py says what), 0 otherwise; a peer that could not be installed or
run has its reason in its row and judges nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prfaas.common.command_line import Parser
from prfaas.services.commands.bench_peers import kv_like
from prfaas.services.commands.flags import new_parser, number, whole

from tests.benchmarks.peers import faults, kinds, report, running

MIB = 1 << 20
MEMORY_BYTES = 256 * MIB
"""Of each side, passed over as often as needed: more than caches hold."""


def parser() -> Parser:
    made = new_parser("python -m tests.benchmarks.transport_peers", __doc__ or "")
    names = ", ".join(kind.name for kind in kinds.KINDS)
    made.add_argument("--install", action="store_true", help="install what is missing first")
    made.add_argument("--peers-folder", type=Path, default=kinds.DEFAULT_FOLDER, help="where (%(default)s)")
    made.add_argument("--only", type=_names, default=None, help=f"comma-separated: {names}")
    made.add_argument("--chunks", type=_sizes(4, 16384), default=(64, 1024, 16384), help="KiB (64,1024,16384)")
    made.add_argument("--lanes", type=_sizes(1, 64), default=(1, 4), help="connections (1,4)")
    made.add_argument(
        "--bytes-mib", type=whole(256, 1 << 20), default=2048, help="of each repetition; a multiple of 256 (2048)"
    )
    made.add_argument("--repetitions", type=whole(1, 1000), default=3, help="medians count (3)")
    made.add_argument("--idle-s", type=number(0, 3600), default=2.0, help="how long the idle receiver is watched (2)")
    made.add_argument("--congestion-control", choices=("cubic", "bbr", "reno"), default="cubic", help="(cubic)")
    made.add_argument("--faults", action="store_true", help="what a stopped receiver and a slow link do, instead")
    made.add_argument("--fault-s", type=number(1, 3600), default=45.0, help="how long --faults waits for an error (45)")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    return made


def _names(text: str) -> list[str]:
    known = [kind.name for kind in kinds.KINDS]
    chosen = [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in known:
            raise argparse.ArgumentTypeError(f"no peer {name!r}; there are {', '.join(known)}")
    return chosen


def _sizes(least: int, most: int) -> Any:
    def check(text: str) -> tuple[int, ...]:
        numbers = text.split(",")
        if not all(number.isdecimal() and least <= int(number) <= most for number in numbers):
            raise argparse.ArgumentTypeError(
                f"{text!r} must be whole numbers from {least} to {most}, with commas between"
            )
        return tuple(int(number) for number in numbers)

    return check


def main() -> int:
    given = parser().parse_args()
    if (given.bytes_mib * MIB) % MEMORY_BYTES:
        parser().error(f"--bytes-mib: {given.bytes_mib} is no multiple of {MEMORY_BYTES // MIB}")
    if any(MEMORY_BYTES % (kib * 1024) for kib in given.chunks):
        parser().error(f"--chunks: each must divide {MEMORY_BYTES // MIB} MiB")
    chosen = [kind for kind in kinds.KINDS if given.only is None or kind.name in given.only]
    absent = dict(_absent(chosen, given))
    load = round(os.getloadavg()[0], 2)
    network = running.private_network(given.congestion_control)
    with tempfile.NamedTemporaryFile(prefix="prfaas-peers-") as source:
        source.write(kv_like(MEMORY_BYTES))
        source.flush()
        common = {"memory_bytes": MEMORY_BYTES, "congestion_control": given.congestion_control, "file": source.name}
        if given.faults:
            return faults.main(chosen, absent, given, common, network)
        found = measure(chosen, absent, given, common)
    found = {"cores": os.cpu_count(), "load_before": load, "network": network, **found}
    print(json.dumps(found, indent=1) if given.json else report.as_text(found))
    return 0 if all(hold["holds"] for hold in found["holds"]) else 1


def _absent(chosen: list[kinds.Kind], given: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(peer, why) of those that can't be run."""
    for kind in chosen:
        if given.install:
            try:
                kinds.install(kind, given.peers_folder)
            except kinds.PeerError as error:
                yield kind.name, str(error)
                continue
        why = kinds.missing(kind, given.peers_folder)
        if why is not None:
            yield kind.name, why


def measure(
    chosen: list[kinds.Kind], absent: dict[str, str], given: argparse.Namespace, common: dict[str, Any]
) -> dict[str, Any]:
    expected = _sha256(common["file"])
    runs: dict[report.Key, list[dict[str, Any]]] = {}
    why: dict[report.Key, str] = {}
    keys = [(kind, lanes, kib * 1024) for lanes in given.lanes for kib in given.chunks for kind in chosen]
    for lanes in given.lanes:
        for repetition in range(given.repetitions):
            for kind, key_lanes, chunk_bytes in keys:
                key = (kind.name, lanes, chunk_bytes)
                if key_lanes != lanes or kind.name in absent or key in why:
                    continue
                options = {**common, "bytes": given.bytes_mib * MIB, "lanes": lanes, "chunk_bytes": chunk_bytes}
                idle_s = given.idle_s if repetition == 0 else 0.0
                print(f"{lanes} lane(s), {chunk_bytes // 1024} KiB, {repetition + 1}: {kind.name}", file=sys.stderr)
                try:
                    done = running.run_once(kind, given.peers_folder, options, expected, idle_s)
                    runs.setdefault(key, []).append(done)
                except kinds.PeerError as error:
                    why[key] = str(error)
    rows = [
        report.row((k.name, lanes, size), runs, absent.get(k.name) or why.get((k.name, lanes, size)), k.note)
        for k, lanes, size in keys
    ]
    return {
        "bytes": given.bytes_mib * MIB,
        "repetitions": given.repetitions,
        "congestion_control": given.congestion_control,
        "rows": rows,
        "holds": report.holds(rows, runs),
    }


def _sha256(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
