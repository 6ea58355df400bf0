"""`prfaas bench link`: how fast KV moves over loopback, beside what the machine can do at best in the same run."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

from prfaas.common.command_line import Parser
from prfaas.common.config import MIB
from prfaas.common.errors import UsageError
from prfaas.services.commands.bench_load import MODEL_VARIABLE
from prfaas.services.commands.flags import new_parser, whole
from prfaas.services.commands.progress import progress_bar
from prfaas.services.model_store import ensure_model

LOAD = "prfaas.services.commands.bench_load:prefill_load"
TARGET_HASHED = 0.9
TARGET_BARE = 0.7
TARGET_BUSY = 0.8


def main(argv: Sequence[str]) -> int:
    """Exit status 0 when every judged ratio reaches its target, else 1."""
    options = parser().parse_args(argv)
    common = {
        "bytes": options.bytes_mib * MIB,
        "lanes": options.lanes,
        "chunk_bytes": options.chunk_kib * 1024,
        "codec": options.codec,
    }
    report = measure(common, options.repetitions)
    if options.engine_busy:
        with progress_bar() as progress:
            os.environ[MODEL_VARIABLE] = str(ensure_model(options.model, progress))
        report["engine_busy"] = measure_busy(common, options.repetitions, options.busy_load)
    print(json.dumps(report) if options.json else as_text(report))
    return 0 if all(passed(report)) else 1


def parser() -> Parser:
    made = new_parser(
        "prfaas bench link",
        "Move KV between two processes over loopback, next to a bare BufferedProtocol pair.",
        "prfaas bench link --json --lanes 1 --bytes-mib 1024",
    )
    made.add_argument("--bytes-mib", type=whole(64, 1 << 20), default=1024, help="KV of each repetition, MiB (1024)")
    made.add_argument("--lanes", type=whole(1, 64), default=1, help="connections (1)")
    made.add_argument("--chunk-kib", type=whole(4, 4096), default=1024, help="chunk size, KiB (1024)")
    made.add_argument("--codec", choices=("auto", "raw", "lz4", "zstd"), default="raw", help="codec of our side (raw)")
    made.add_argument("--repetitions", type=whole(1, 1000), default=5, help="in turn with the peers; medians count (5)")
    made.add_argument("--engine-busy", action="store_true", help="also with a real prefill in the same process")
    made.add_argument("--model", default="smollm2", help="of --engine-busy: smollm2, a directory or Hugging Face id")
    made.add_argument("--busy-load", default=LOAD, help=argparse.SUPPRESS)
    made.add_argument("--json", action="store_true", help="print one JSON object")
    return made


def measure(common: dict[str, Any], repetitions: int) -> dict[str, Any]:
    """Ours, the hashing pair and the bare pair in turn, so that a slow moment of the machine hits all three."""
    runs: dict[str, list[dict[str, float]]] = {"prfaas": [], "hash": [], "bare": []}
    for _ in range(repetitions):
        for mode, done in runs.items():
            done.append(run_pair({**common, "mode": mode}))
    speed = {mode: statistics.median(r["gb_per_s"] for r in done) for mode, done in runs.items()}
    ours = runs["prfaas"]

    def ratio_to(peer: str) -> float:
        """Pair by pair, since the machine's speed drifts from one repetition to the next."""
        pairs = zip(ours, runs[peer], strict=True)
        return round(statistics.median(mine["gb_per_s"] / other["gb_per_s"] for mine, other in pairs), 3)

    return {
        **common,
        "repetitions": repetitions,
        "gb_per_s": round(speed["prfaas"], 3),
        "peer_hashing_gb_per_s": round(speed["hash"], 3),
        "peer_bare_gb_per_s": round(speed["bare"], 3),
        "ratio_to_hashing": ratio_to("hash"),
        "ratio_to_bare": ratio_to("bare"),
        "sender_cpu_s_per_gb": round(statistics.median(r["sender_cpu_s_per_gb"] for r in ours), 3),
        "receiver_cpu_s_per_gb": round(statistics.median(r["receiver_cpu_s_per_gb"] for r in ours), 3),
        "wire_ratio": round(ours[0]["raw_bytes"] / ours[0]["wire_bytes"], 3),
    }


def measure_busy(common: dict[str, Any], repetitions: int, load: str) -> dict[str, Any]:
    """The engine's load in the sender's process, then in the receiver's; each against the same load in a process of
    its own, repetition by repetition."""
    report: dict[str, Any] = {}
    for side in ("sender", "receiver"):
        inside, beside = [], []
        for _ in range(repetitions):
            inside.append(run_pair({**common, "mode": "prfaas"}, load={side: load})["gb_per_s"])
            with child({"role": "load", "load": load}) as process:
                hear(process)
                beside.append(run_pair({**common, "mode": "prfaas"})["gb_per_s"])
        report[f"{side}_gb_per_s"] = round(statistics.median(inside), 3)
        report[f"{side}_beside_gb_per_s"] = round(statistics.median(beside), 3)
        report[f"{side}_ratio"] = round(
            statistics.median(mine / other for mine, other in zip(inside, beside, strict=True)), 3
        )
    return report


def run_pair(options: dict[str, Any], load: dict[str, str] | None = None) -> dict[str, float]:
    loads = load or {}
    with (
        child({**options, "role": "receiver", "load": loads.get("receiver")}) as receiver,
        child({**options, "role": "sender", "load": loads.get("sender")}) as sender,
    ):
        say(sender, hear(receiver))
        hear(sender)
        say(receiver, {})
        hear(receiver)
        say(sender, {})
        sent = hear(sender)
        received = hear(receiver)
    gigabytes = sent["raw_bytes"] / 1e9
    return {
        "gb_per_s": gigabytes / sent["seconds"],
        "sender_cpu_s_per_gb": sent["cpu_s"] / gigabytes,
        "receiver_cpu_s_per_gb": received["cpu_s"] / gigabytes,
        "raw_bytes": sent["raw_bytes"],
        "wire_bytes": sent.get("wire_bytes", sent["raw_bytes"]),
    }


@contextlib.contextmanager
def child(options: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "prfaas.services.commands.bench_peers", json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(  # noqa: S603 - our own module
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield process
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=5 if process.poll() is None else 0)
        if process.poll() is None:
            process.kill()
            process.communicate()


def hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise UsageError("a process of the benchmark ended early; its error is above")
    return cast(dict[str, Any], json.loads(line))


def say(process: subprocess.Popen[str], message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()


def passed(report: dict[str, Any]) -> Iterator[bool]:
    if report["codec"] == "raw":
        yield report["ratio_to_hashing"] >= TARGET_HASHED
        yield report["ratio_to_bare"] >= TARGET_BARE
    busy = report.get("engine_busy", {})
    for side in ("sender", "receiver") if busy else ():
        yield busy[f"{side}_ratio"] >= TARGET_BUSY


def as_text(report: dict[str, Any]) -> str:
    lines = [
        f"KV over loopback     {report['gb_per_s']:.2f} GB/s  ({report['lanes']} lane(s), {report['codec']}, "
        f"{report['bytes'] // MIB} MiB, chunks of {report['chunk_bytes'] // 1024} KiB)",
        f"bare pair, hashing   {report['peer_hashing_gb_per_s']:.2f} GB/s  ours is {report['ratio_to_hashing']:.2f} "
        f"of it (target {TARGET_HASHED})",
        f"bare pair            {report['peer_bare_gb_per_s']:.2f} GB/s  ours is {report['ratio_to_bare']:.2f} of it "
        f"(target {TARGET_BARE})",
        f"CPU seconds a GB     sender {report['sender_cpu_s_per_gb']:.2f}, "
        f"receiver {report['receiver_cpu_s_per_gb']:.2f}",
        f"raw / wire bytes     {report['wire_ratio']:.2f}",
    ]
    busy = report.get("engine_busy")
    if busy:
        lines += [
            f"engine in the {side:8} {busy[f'{side}_gb_per_s']:.2f} GB/s  {busy[f'{side}_ratio']:.2f} of the same load "
            f"in its own process (target {TARGET_BUSY})"
            for side in ("sender", "receiver")
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
