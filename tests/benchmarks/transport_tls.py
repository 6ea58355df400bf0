"""KV over TLS lanes, beside a bare uvloop TLS pair in the same run: same bytes, lanes, certificates and ciphers.

    python -m tests.benchmarks.transport_tls --json

The bare pair is an asyncio.BufferedProtocol over `create_connection(ssl=...)`, without checksums or protocol, that
writes 1 MiB chunks. The two take turns; the ratio is the median over the pairs of turns. Exit status 0 when ours is
at least 0.85 of the bare pair and 1.2 GB/s. `--plain` adds our lanes without TLS.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvloop
from prfaas.common import log
from prfaas.common.config import MIB, TransportConfig
from prfaas.common.kv_layout import TokenRange
from prfaas.services.commands import bench_peers as peers
from prfaas.services.commands.bench_link import hear, say
from prfaas.services.commands.flags import new_parser, whole
from prfaas.transport.api import KvAddress, KvPiece, TransferSpec
from prfaas.transport.endpoint import KvEndpoint
from prfaas.transport.lanes import tls_lane
from prfaas.transport.lanes.tcp import TcpBackend
from prfaas.transport.tls import Tls

from tests.certificates import files_of, make_certificates

TARGET_RATIO = 0.85
TARGET_GB_PER_S = 1.2


# -- the processes ----------------------------------------------------------------------------------------------------


def tls_of(options: dict[str, Any], name: str) -> Tls:
    return Tls(files_of(Path(options["certificates"]), name))


def endpoint(role: str, options: dict[str, Any]) -> KvEndpoint:
    config = TransportConfig(lanes=options["lanes"], chunk_bytes=options["chunk_bytes"])
    tls = tls_of(options, role) if options["mode"] == "tls" else None
    return KvEndpoint(
        config,
        node=role,
        layout=peers.layout_for(options["bytes"]),
        model_fingerprint=peers.FINGERPRINT,
        secret=peers.SECRET,
        backend=TcpBackend(config, tls),
    )


async def our_receiver(options: dict[str, Any]) -> None:
    kv = endpoint("receiver", options)
    await kv.start()
    rows = peers.Rows(fill=False)
    tokens = TokenRange(0, peers.ROW_TOKENS)
    layout_hash = kv.layout.layout_hash
    spec = TransferSpec(secrets.token_hex(16), "bench", tokens, peers.ROW_TOKENS + 1, 1, peers.FINGERPRINT, layout_hash)
    ticket, receiver = kv.receiver(spec)
    receiver.bind(lambda _spec: rows, lambda _layer: None, lambda _error: None)
    peers.say(port=kv.addresses[0].port, ticket=ticket)
    await peers.hear()
    before = peers.cpu_s()
    peers.say(ready=True)
    await receiver.finished()
    peers.say(cpu_s=peers.cpu_s() - before)
    await receiver.aclose()
    await kv.aclose()


async def our_sender(options: dict[str, Any]) -> None:
    kv = endpoint("sender", options)
    await kv.start()
    rows = peers.Rows(fill=True)
    peer = await peers.hear()
    sender = kv.sender(peer["ticket"], "receiver", [KvAddress("127.0.0.1", peer["port"])])
    await sender.open()
    peers.say(opened=True)
    await peers.hear()
    before, started_s = peers.cpu_s(), time.perf_counter()
    for layer in range(len(kv.layout.layers)):
        pieces = [KvPiece(layer, tensor, row, 0, rows.take()) for tensor in range(2) for row in range(peers.HEADS)]
        sender.put(pieces)
    sender.finish({})
    report = await sender.done()
    seconds = time.perf_counter() - started_s
    peers.say(seconds=seconds, cpu_s=peers.cpu_s() - before, raw_bytes=report.raw_bytes)
    await sender.aclose()
    await kv.aclose()


def child_main(options: dict[str, Any]) -> None:
    log.configure("warning", "console")
    tls_lane.WRITE_BYTES = options["write_bytes"]
    uvloop.run(job(options))


def job(options: dict[str, Any]) -> Coroutine[Any, Any, None]:
    if options["mode"] != "bare":
        return our_receiver(options) if options["role"] == "receiver" else our_sender(options)
    tls = tls_of(options, options["role"])
    if options["role"] == "receiver":
        return peers.bare_receiver(options, tls.server())
    return peers.bare_sender(options, tls.client())


# -- the command ------------------------------------------------------------------------------------------------------


def run_pair(options: dict[str, Any]) -> dict[str, float]:

    @contextlib.contextmanager
    def child(role: str):  # type: ignore[no-untyped-def]
        command = [sys.executable, "-m", "tests.benchmarks.transport_tls", "--child"]
        process = subprocess.Popen(
            [*command, json.dumps({**options, "role": role})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
            process.communicate(timeout=10)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()

    with child("receiver") as receiver, child("sender") as sender:
        say(sender, hear(receiver))
        hear(sender)
        say(receiver, {})
        hear(receiver)
        say(sender, {})
        sent, received = hear(sender), hear(receiver)
    gigabytes = sent["raw_bytes"] / 1e9
    return {
        "gb_per_s": gigabytes / sent["seconds"],
        "sender_cpu_s_per_gb": sent["cpu_s"] / gigabytes,
        "receiver_cpu_s_per_gb": received["cpu_s"] / gigabytes,
    }


def measure(options: dict[str, Any], modes: list[str], repetitions: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
    for _ in range(repetitions):
        for mode in modes:
            runs[mode].append(run_pair({**options, "mode": mode}))
    report: dict[str, Any] = {
        mode: {key: round(statistics.median(run[key] for run in done), 3) for key in done[0]}
        for mode, done in runs.items()
    }
    pairs = zip(runs["tls"], runs["bare"], strict=True)
    report["ratio_to_bare"] = round(statistics.median(ours["gb_per_s"] / bare["gb_per_s"] for ours, bare in pairs), 3)
    return report


def main() -> int:
    if len(sys.argv) == 3 and sys.argv[1] == "--child":
        child_main(json.loads(sys.argv[2]))
        return 0
    made = new_parser("python -m tests.benchmarks.transport_tls", __doc__ or "")
    made.add_argument("--bytes-mib", type=whole(64, 1 << 20), default=1024, help="of each repetition (1024)")
    made.add_argument("--lanes", type=whole(1, 64), default=4, help="connections (4)")
    made.add_argument("--chunk-kib", type=whole(4, 4096), default=1024, help="largest chunk, KiB (1024)")
    made.add_argument(
        "--write-kib",
        type=whole(1, 16384),
        default=tls_lane.WRITE_BYTES >> 10,
        help="encrypted at once, ours (%(default)s)",
    )
    made.add_argument("--repetitions", type=whole(1, 1000), default=5, help="in turns; medians count (5)")
    made.add_argument("--plain", action="store_true", help="our lanes without TLS as well")
    made.add_argument("--json", action="store_true", help="print one line of JSON")
    given = made.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        make_certificates(Path(directory), "sender:prefill", "receiver:decode")
        options = {
            "bytes": given.bytes_mib * MIB,
            "lanes": given.lanes,
            "chunk_bytes": given.chunk_kib << 10,
            "write_bytes": given.write_kib << 10,
            "certificates": directory,
        }
        report = measure(options, ["tls", "bare", *(["plain"] if given.plain else [])], given.repetitions)
    del options["certificates"]
    report = {**options, "repetitions": given.repetitions, **report}
    if given.json:
        print(json.dumps(report))
    else:
        print(f"KV over TLS      {report['tls']['gb_per_s']:.2f} GB/s, {given.lanes} lanes")
        print(f"bare TLS pair    {report['bare']['gb_per_s']:.2f} GB/s")
        print(f"ours / bare      {report['ratio_to_bare']:.2f} (target {TARGET_RATIO})")
        if given.plain:
            print(f"KV without TLS   {report['plain']['gb_per_s']:.2f} GB/s")
    good = report["ratio_to_bare"] >= TARGET_RATIO and report["tls"]["gb_per_s"] >= TARGET_GB_PER_S
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
