"""The KV transport over an emulated WAN. By hand, as root, from the repository's root:

    python -m tests.benchmarks.transport_wan --json
    python -m tests.benchmarks.transport_wan --only loss codecs --congestion-control cubic

distance   1 Gbit/s, 80 ms: one transfer of 512 MiB and 64 of 8 MiB, on a new session (cold) and on one that has carried
           KV before and was idle for a second (warm); one bare TCP flow beside them
loss       200 Mbit/s, 60 ms, 0.05 % of the packets lost
resets     as distance, with 8 lanes of which a random one is reset (RST) every second
codecs     200 Mbit/s, 60 ms: each codec fixed, and the choice by measurement

A rate is payload from the first `put` until the last byte has been received and checked, the link's delay included.
Attainable is the link's rate less the headers of IP, TCP and chunks. `relay_late_ms`: how late the emulator itself was
at worst; well above the link's own queueing times, the machine was too busy for the figures to count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from prfaas.common.config import TransportConfig
from prfaas.common.errors import UsageError
from prfaas.services.commands.bench_codec import read_capture
from prfaas.services.commands.flags import new_parser, whole
from prfaas.transport.frames import HEADER_BYTES

from tests.benchmarks.transport_wan_node import TOKEN_BYTES
from tests.wan_link import TCP_PAYLOAD_SHARE, WanLink, missing, wan_link

MIB = 1 << 20
KV_PORT, BARE_PORT = 8200, 5000
IDLE_S = 1.0
RESET_EVERY_S = 1.0
RESET_LANES = 8
CODECS = ("raw", "lz4", "zstd", "auto")
TARGETS = {
    "distance.one_warm": 0.95,
    "distance.many_warm": 0.95,
    "loss.one_warm": 0.85,
    "resets.share_of_undisturbed": 0.80,
    "codecs.auto_share_of_best": 0.97,
}
Figures = dict[str, Any]


@contextlib.contextmanager
def wan(options: argparse.Namespace, **conditions: float) -> Iterator[WanLink]:
    with wan_link(**conditions) as link:
        for host in (link.near, link.far):
            setting = f"net.ipv4.tcp_slow_start_after_idle={options.slow_start_after_idle}"
            subprocess.run(host.command("sysctl", "-qw", setting), check=True)
        yield link


class Node:
    """A process with a KvEndpoint on one host of the link."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def tell(self, **order: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)

    def hear(self) -> Figures:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a node of the benchmark ended with status {self._process.wait()}")
        heard: Figures = json.loads(line)
        return heard


class Pair:
    """Sender on the far host, receiver on the near one."""

    def __init__(self, link: WanLink, sender: Node, receiver: Node) -> None:
        self._link = link
        self._sender = sender
        self._receiver = receiver

    def transfer(self, transfers: int, mib_each: int, disturb: Callable[[], None] | None = None) -> Figures:
        """`disturb` is called again and again while bytes move."""
        tokens = mib_each * MIB // TOKEN_BYTES
        self._receiver.tell(do="expect", transfers=transfers, tokens=tokens)
        expected = self._receiver.hear()
        self._sender.tell(do="send", host=self._link.near.address, port=expected["port"], tickets=expected["tickets"])
        with _repeating(disturb):
            received, sent = self._receiver.hear(), self._sender.hear()
        seconds = received["finished_s"] - sent["began_s"]
        gigabytes = sent["raw_bytes"] / 1e9
        return {
            "mbit_per_s": round(sent["raw_bytes"] * 8 / 1e6 / seconds, 1),
            "seconds": round(seconds, 3),
            "sender_cpu_s_per_gb": round(sent["cpu_s"] / gigabytes, 3),
            "receiver_cpu_s_per_gb": round(received["cpu_s"] / gigabytes, 3),
            "wire_ratio": round(sent["raw_bytes"] / sent["wire_bytes"], 3),
            "resent_chunks": sent["resent_chunks"],
            "duplicate_chunks": received["duplicate_chunks"],
        }


@contextlib.contextmanager
def _repeating(disturb: Callable[[], None] | None) -> Iterator[None]:
    over = threading.Event()

    def run() -> None:
        while disturb is not None and not over.wait(RESET_EVERY_S):
            disturb()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    over.set()
    thread.join()


@contextlib.contextmanager
def pair(link: WanLink, options: argparse.Namespace, **settings: Any) -> Iterator[Pair]:
    transport = {
        "lanes": options.lanes,
        "codec": options.codec,
        "congestion_control": options.congestion_control,
        "socket_buffer_bytes": options.socket_buffer_bytes,
        **settings,
    }
    with contextlib.ExitStack() as running:
        nodes = []
        for role, host in (("receiver", link.near), ("sender", link.far)):
            own = {**transport, "bind": f"{host.address}:{KV_PORT}"}
            process = host.start(
                sys.executable,
                "-m",
                "tests.benchmarks.transport_wan_node",
                json.dumps({"role": role, "transport": own, "kv_file": options.kv}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            running.enter_context(process)
            running.callback(process.kill)
            nodes.append(Node(process))
        for node in nodes:
            node.hear()
        receiver, sender = nodes
        yield Pair(link, sender, receiver)


def bare_flow(link: WanLink, mib: int, congestion_control: str) -> Figures:
    """One TCP connection of plain blocking sockets, from its first byte on."""
    chunk, left = bytes(MIB), mib * MIB
    with link.near.socket() as server, link.far.socket() as sending:
        for sock in (server, sending):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion_control.encode())
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((link.near.address, BARE_PORT))
        server.listen()
        sending.connect(server.getsockname())
        receiving, _ = server.accept()
        with receiving:
            thread = threading.Thread(target=lambda: [sending.sendall(chunk) for _ in range(mib)])
            began_s = time.monotonic()
            thread.start()
            target = bytearray(MIB)
            while left:
                left -= receiving.recv_into(target)
            seconds = time.monotonic() - began_s
            thread.join()
    return {"mbit_per_s": round(mib * MIB * 8 / 1e6 / seconds, 1), "seconds": round(seconds, 3)}


def attainable_mbit_per_s(link: WanLink, chunk_bytes: int = TransportConfig().chunk_bytes) -> float:
    framing = chunk_bytes / (chunk_bytes + HEADER_BYTES)
    return round(link.conditions.rate_bits_per_s * TCP_PAYLOAD_SHARE * framing / 1e6, 1)


# -- what is measured -------------------------------------------------------------------------------------------------


def distance(options: argparse.Namespace) -> Figures:
    figures: Figures = {}
    with wan(options, rate_bits_per_s=1e9, rtt_s=0.08) as link:
        figures["attainable_mbit_per_s"] = attainable_mbit_per_s(link)
        with pair(link, options) as both:
            figures["one_cold"] = both.transfer(1, options.mib)
            figures["one_warm"] = _warm(both, options, 1, options.mib)
            figures["many_warm"] = _warm(both, options, 64, max(1, options.mib // 64))
        with pair(link, options) as both:
            figures["many_cold"] = both.transfer(64, max(1, options.mib // 64))
        for congestion_control in ("cubic", "bbr"):
            figures[f"bare_flow_{congestion_control}"] = bare_flow(link, options.mib // 2, congestion_control)
        figures["relay_late_ms"] = _late_ms(link)
    return figures


def loss(options: argparse.Namespace) -> Figures:
    figures: Figures = {}
    mib = max(1, options.mib // 4)
    with wan(options, rate_bits_per_s=2e8, rtt_s=0.06, loss=0.0005) as link:
        figures["attainable_mbit_per_s"] = attainable_mbit_per_s(link)
        with pair(link, options) as both:
            figures["one_cold"] = both.transfer(1, mib)
            figures["one_warm"] = _warm(both, options, 1, mib)
        figures["bare_flow_bbr"] = bare_flow(link, mib // 2, "bbr")
        figures["bare_flow_cubic"] = bare_flow(link, mib // 8, "cubic")
        figures["relay_late_ms"] = _late_ms(link)
    return figures


def resets(options: argparse.Namespace) -> Figures:
    figures: Figures = {}
    rng = random.Random(options.seed)
    with wan(options, rate_bits_per_s=1e9, rtt_s=0.08) as link:
        figures["attainable_mbit_per_s"] = attainable_mbit_per_s(link)
        with pair(link, options, lanes=RESET_LANES) as both:
            both.transfer(1, options.mib // 2)
            undisturbed = _warm(both, options, 1, 2 * options.mib)
            killed: list[int] = []
            disturbed = both.transfer(1, 2 * options.mib, lambda: killed.append(reset_a_lane(link, rng)))
        figures |= {"undisturbed": undisturbed, "disturbed": disturbed, "resets": sum(killed)}
        figures["share_of_undisturbed"] = round(disturbed["mbit_per_s"] / undisturbed["mbit_per_s"], 3)
        figures["relay_late_ms"] = _late_ms(link)
    return figures


def codecs(options: argparse.Namespace) -> Figures:
    figures: Figures = {}
    mib = max(1, options.mib // 4)
    with wan(options, rate_bits_per_s=2e8, rtt_s=0.06) as link:
        figures["attainable_wire_mbit_per_s"] = attainable_mbit_per_s(link)
        for name in CODECS:
            with pair(link, options, codec=name) as both:
                both.transfer(1, max(1, mib // 2))
                figures[name] = _warm(both, options, 1, mib)
        figures["relay_late_ms"] = _late_ms(link)
    best = max(figures[name]["mbit_per_s"] for name in CODECS if name != "auto")
    figures["auto_share_of_best"] = round(figures["auto"]["mbit_per_s"] / best, 3)
    return figures


def _warm(both: Pair, options: argparse.Namespace, transfers: int, mib_each: int) -> Figures:
    """The median of some, each after an idle second."""
    runs = []
    for _ in range(options.repetitions):
        time.sleep(IDLE_S)
        runs.append(both.transfer(transfers, mib_each))
    middle = median(run["mbit_per_s"] for run in runs)
    nearest = min(runs, key=lambda run: abs(run["mbit_per_s"] - middle))
    return {**nearest, "all_mbit_per_s": [run["mbit_per_s"] for run in runs]}


def _late_ms(link: WanLink) -> float:
    return round(1e3 * max(counters.latest_s for counters in link.counters()), 1)


def reset_a_lane(link: WanLink, rng: random.Random) -> int:
    """RST to both ends of one connection of the session. Returns 1, or 0 when there is none."""
    to_port = ("dst", f"{link.near.address}:{KV_PORT}")
    listed = subprocess.run(link.far.command("ss", "-Htn", *to_port), capture_output=True, text=True, check=True)
    ports = re.findall(rf"{re.escape(link.far.address)}:(\d+) ", listed.stdout)
    if not ports:
        return 0
    own = ("sport", "=", f":{rng.choice(ports)}")
    subprocess.run(link.far.command("ss", "-Ktn", *to_port, *own), capture_output=True, check=True)
    return 1


# -- the command ------------------------------------------------------------------------------------------------------

SCENARIOS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "distance": distance,
    "loss": loss,
    "resets": resets,
    "codecs": codecs,
}


def judge(report: dict[str, Figures]) -> dict[str, Figures]:
    """Each target that was measured: share, target, reached."""
    verdicts = {}
    for path, target in TARGETS.items():
        scenario, name = path.split(".")
        value = report.get(scenario, {}).get(name)
        if value is None:
            continue
        share = value["mbit_per_s"] / report[scenario]["attainable_mbit_per_s"] if isinstance(value, dict) else value
        verdicts[path] = {"share": round(share, 3), "target": target, "reached": share >= target}
    return verdicts


def kernel() -> dict[str, str]:
    return {name: Path("/proc/sys/net/ipv4", name).read_text().strip() for name in ("tcp_wmem", "tcp_rmem")}


def main() -> int:
    flags = new_parser("python -m tests.benchmarks.transport_wan", __doc__ or "")
    flags.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), help="(all)")
    flags.add_argument(
        "--mib", type=whole(32, 1 << 16), default=512, help="of the one big transfer; the others follow it (512)"
    )
    flags.add_argument(
        "--repetitions", type=whole(1, 1000), default=3, help="of the warm transfers; the median counts (3)"
    )
    flags.add_argument("--lanes", type=whole(0, 64), default=0, help="0 = as many as the measured bandwidth needs (0)")
    flags.add_argument("--codec", choices=CODECS, default="raw", help="of all scenarios but codecs (raw)")
    flags.add_argument("--congestion-control", choices=("auto", "cubic", "bbr"), default="auto", help="of lanes (auto)")
    flags.add_argument(
        "--socket-buffer-bytes", type=whole(0, 1 << 30), default=0, help="of lanes; 0 = as the kernel does it (0)"
    )
    flags.add_argument("--slow-start-after-idle", type=int, choices=(0, 1), default=1, help="the kernel's setting (1)")
    flags.add_argument(
        "--kv", metavar="FILE", help="KV of prfaas capture-kv to send (noise that compresses about like it)"
    )
    flags.add_argument("--seed", type=whole(0, 1 << 31), default=0, help="of the choice of lanes to reset (0)")
    flags.add_argument("--json", action="store_true", help="print one line of JSON")
    options = flags.parse_args()
    if reason := missing():
        flags.error(f"no emulated WAN here: it {reason}")
    try:
        if options.kv:
            read_capture(options.kv)
    except UsageError as error:
        flags.error(str(error))
    report: dict[str, Any] = {}
    for name in options.only:
        print(f"{name} …", file=sys.stderr)
        report[name] = SCENARIOS[name](options)
    verdicts = judge(report)
    settings = {key: value for key, value in vars(options).items() if key not in ("json", "only")}
    report |= {"verdicts": verdicts, "settings": settings, "kernel": kernel()}
    print(json.dumps(report, indent=None if options.json else 2))
    return 0 if all(verdict["reached"] for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
