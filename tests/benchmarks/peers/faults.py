"""What peers do, and what we do, when a receiver stops and when the link is slow."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.kinds import Kind, PeerError
from tests.benchmarks.peers.running import Process, connected, listening_on

MIB = 1 << 20
CHUNK_BYTES = MIB
STOPPED_BYTES = 8192 * MIB
"""Enough to be in the middle of it when the receiver stops."""
RESUME_S = 15.0
SLOW_BYTES_PER_S = 2 * MIB
SLOW_BYTES = 256 * MIB
SLOW_S = 60.0


def main(
    chosen: list[Kind], absent: dict[str, str], given: argparse.Namespace, common: dict[str, Any], network: str | None
) -> int:
    rows = [fault_row(kind, absent.get(kind.name), given, common, network) for kind in chosen]
    if given.json:
        print(json.dumps({"rows": rows}, indent=1))
    else:
        for row in rows:
            print(row.pop("peer"))
            for what, found in row.items():
                print(f"    {what.replace('_', ' '):18} {found}")
    return 0


def fault_row(
    kind: Kind, why: str | None, given: argparse.Namespace, common: dict[str, Any], network: str | None
) -> dict[str, Any]:
    if why is not None:
        return {"peer": kind.name, "why": why}
    options = {**common, "lanes": 1, "chunk_bytes": CHUNK_BYTES}
    row: dict[str, Any] = {"peer": kind.name}
    try:
        row["stopped_receiver"] = stopped(kind, given, options, row)
        row["slow_link"] = network or slow(kind, given, options)
    except (PeerError, TimeoutError) as error:
        row["why"] = str(error)
    return row


def stopped(kind: Kind, given: argparse.Namespace, options: dict[str, Any], row: dict[str, Any]) -> str:
    with connected(kind, given.peers_folder, {**options, "bytes": STOPPED_BYTES}) as (receiver, sender):
        row["listens_on"] = ", ".join(sorted({a.rpartition(":")[0] for a in listening_on(receiver.pid)})) or "-"
        sender.say(go=True)
        time.sleep(0.5)  # into the middle of the transfer
        os.kill(receiver.pid, signal.SIGSTOP)
        try:
            found = outcome(sender, given.fault_s)
        finally:
            os.kill(receiver.pid, signal.SIGCONT)
        if not found.startswith("nothing"):
            return found
        return f"{found}; running again: {outcome(sender, RESUME_S)}"


def slow(kind: Kind, given: argparse.Namespace, options: dict[str, Any]) -> str:
    """Bytes move all the time, at a rate that takes longer than a minute for all of them."""
    with connected(kind, given.peers_folder, {**options, "bytes": SLOW_BYTES}) as (_receiver, sender):
        rate = f"{SLOW_BYTES_PER_S * 8}bit"
        shape = ["tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", rate, "burst", "256k", "latency", "200ms"]
        subprocess.run(shape, check=True)
        try:
            sender.say(go=True)
            before, started_s = received_bytes(), time.monotonic()
            found = outcome(sender, SLOW_S)
            moved = (received_bytes() - before) / (time.monotonic() - started_s)
        finally:
            subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=True)
        return f"{found}; {moved / MIB:.1f} MiB/s moved meanwhile"


def received_bytes() -> int:
    """Over loopback, both directions."""
    line = next(text for text in Path("/proc/self/net/dev").read_text().splitlines() if text.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[0])


def outcome(sender: Process, timeout_s: float) -> str:
    started_s = time.monotonic()
    try:
        sender.hear(timeout_s)
    except TimeoutError:
        return f"nothing said in {timeout_s:g} s"
    except PeerError as error:
        return f"error after {time.monotonic() - started_s:.1f} s: {error}"
    return f"done after {time.monotonic() - started_s:.1f} s"
