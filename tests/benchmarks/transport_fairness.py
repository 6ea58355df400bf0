"""How transfers share one session: a thousand at once, a small one beside a large one, and a receiver that stalls.

    python -m tests.benchmarks.transport_fairness
    python -m tests.benchmarks.transport_fairness --transfers 200 --lanes 1 --json

Two processes over loopback; the sender is this one. Exits 1 when something that must hold does not:

thousand   --transfers of 1 MiB begin together, every other one in pieces of 16 KiB, the rest in rows of 256 KiB. All
           finish; the last takes at most twice as long as the first; and when half of all bytes have been sent, none
           has had more than twice the bytes of another, and one chunk.
beside     A transfer of 1 MiB that begins while one of 1 GiB is on its way takes at most a tenth of the time that the
           large one takes.
stalled    The receiver's process stops (SIGSTOP) for --stall-s with all transfers ready to be sent: the sender's memory
           grows by no more than chunks that its lanes and encoders hold (and 16 MiB for what a process does anyway);
           afterwards all finish. Raw and with a codec.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from prfaas.common import log
from prfaas.common.config import MIB, TransportConfig
from prfaas.common.kv_layout import KvLayout, LayerLayout, TensorKind, TensorLayout, TokenRange
from prfaas.services.commands.bench_link import hear, say
from prfaas.services.commands.bench_peers import hear as hear_parent
from prfaas.services.commands.bench_peers import kv_like
from prfaas.services.commands.bench_peers import say as say_parent
from prfaas.services.commands.flags import new_parser, number, whole
from prfaas.transport.api import KvAddress, KvPiece, KvSender, TransferSpec
from prfaas.transport.arena import Arena
from prfaas.transport.endpoint import KvEndpoint

HOST = "127.0.0.1"
FINGERPRINT = "0" * 32
LAYERS, HEAD_DIM = 2, 128
TOKEN_BYTES = 2 * HEAD_DIM
"""Of one row; a layer has a row of keys and one of values."""
SMALL_TOKENS = MIB // (LAYERS * 2 * TOKEN_BYTES)
ROW_BYTES = SMALL_TOKENS * TOKEN_BYTES
"""Of a small transfer; also its largest chunk."""
LARGE_TOKENS = 1024 * SMALL_TOKENS
PIECE_TOKENS = 64
MEMORY_BYTES = LARGE_TOKENS * TOKEN_BYTES
"""One row of the largest transfer: all rows lie in the same memory, since nobody looks at what arrives."""
MOST_RATIO = 2.0
MOST_OF_LARGE = 0.1
OWN_BYTES = 16 * MIB
SAMPLE_S = 0.001

LAYOUT = KvLayout(
    (LayerLayout(tuple(TensorLayout(kind, "bfloat16", 1, (HEAD_DIM,)) for kind in (TensorKind.KEY, TensorKind.VALUE))),)
    * LAYERS
)


class Rows:
    """A `KvDestination` over one region."""

    def __init__(self, tokens: int, view: memoryview) -> None:
        self._row = view[: tokens * TOKEN_BYTES]

    def row(self, _layer: int, _tensor: int, _row: int) -> memoryview:
        return self._row


def touched(nbytes: int) -> memoryview:
    region = Arena(nbytes).allocate(nbytes)
    assert region is not None
    return region.view


def endpoint(role: str, options: dict[str, Any]) -> KvEndpoint:
    # A stalled receiver is the subject here, a dead one is not.
    config = TransportConfig(
        lanes=options["lanes"], codec=options["codec"], dead_s=300, open_timeout_s=300, max_transfers=1 << 16
    )
    return KvEndpoint(config, node=role, layout=LAYOUT, model_fingerprint=FINGERPRINT, secret=b"benchmark")


# -- the receiver's process -------------------------------------------------------------------------------------------


async def receive(options: dict[str, Any]) -> None:
    kv = endpoint("receiver", options)
    await kv.start()
    view = touched(MEMORY_BYTES)
    say_parent(port=kv.addresses[0].port)
    while True:
        asked = await hear_parent()
        say_parent(tickets=[ticket(kv, tokens, view) for tokens in asked["tokens"]])


def ticket(kv: KvEndpoint, tokens: int, view: memoryview) -> str:
    span = TokenRange(0, tokens)
    spec = TransferSpec(secrets.token_hex(16), "benchmark", span, tokens + 1, 1, FINGERPRINT, LAYOUT.layout_hash)
    text, receiver = kv.receiver(spec)
    receiver.bind(lambda _spec: Rows(tokens, view), lambda _layer: None, lambda _error: None)
    return text


# -- the sender -------------------------------------------------------------------------------------------------------


class Sending:
    def __init__(self, options: dict[str, Any], kv: KvEndpoint, process: subprocess.Popen[str], port: int) -> None:
        self.options = options
        self.process = process
        self._kv = kv
        self._addresses = [KvAddress(HOST, port)]
        self._view = touched(MEMORY_BYTES)
        self._view[:] = kv_like(MEMORY_BYTES)

    async def opened(self, tokens: list[int]) -> list[KvSender]:
        say(self.process, {"tokens": tokens})
        tickets = hear(self.process)["tickets"]
        senders = [self._kv.sender(text, "receiver", self._addresses) for text in tickets]
        await asyncio.gather(*(sender.open() for sender in senders))
        return senders

    def put(self, sender: KvSender, piece_tokens: int) -> None:
        """All of it is ready at once."""
        tokens = sender.spec.tokens.end
        for layer in range(LAYERS):
            sender.put(
                [
                    KvPiece(
                        layer, tensor, 0, start * TOKEN_BYTES, self._bytes(start, min(tokens, start + piece_tokens))
                    )
                    for tensor in range(2)
                    for start in range(0, tokens, piece_tokens)
                ]
            )
        sender.finish({})

    def _bytes(self, start: int, end: int) -> memoryview:
        return self._view[start * TOKEN_BYTES : end * TOKEN_BYTES]

    def put_all(self, senders: list[KvSender]) -> None:
        """Every other one in small pieces: shares are counted in bytes, not in chunks."""
        for index, sender in enumerate(senders):
            self.put(sender, PIECE_TOKENS if index % 2 else SMALL_TOKENS)


async def thousand(sending: Sending, transfers: int) -> dict[str, Any]:
    senders = await sending.opened([SMALL_TOKENS] * transfers)
    started_s = time.perf_counter()

    async def took_s(sender: KvSender) -> float:
        await sender.done()
        return time.perf_counter() - started_s

    tasks = [asyncio.create_task(took_s(sender)) for sender in senders]
    sending.put_all(senders)
    shares = await half_way(senders, transfers * MIB)
    times_s = await asyncio.gather(*tasks)
    return {
        "transfers": transfers,
        "gb_per_s": round(transfers * MIB / 1e9 / max(times_s), 3),
        "first_s": round(min(times_s), 3),
        "median_s": round(median(times_s), 3),
        "last_s": round(max(times_s), 3),
        "last_to_first": round(max(times_s) / min(times_s), 2),
        # A chunk of slack: bytes count when the whole of it has been sent.
        "most_to_least_bytes_half_way": round((max(shares) - ROW_BYTES) / max(1, min(shares)), 2),
    }


async def half_way(senders: list[KvSender], total_bytes: int) -> list[int]:
    """What each has sent when all together have sent half."""
    while True:
        shares = [sender.report.raw_bytes for sender in senders]
        if sum(shares) * 2 >= total_bytes:
            return shares
        await asyncio.sleep(SAMPLE_S)


async def beside(sending: Sending, repetitions: int) -> dict[str, Any]:
    await one(sending, SMALL_TOKENS)  # lanes and caches are warm
    alone_s = [await one(sending, SMALL_TOKENS) for _ in range(repetitions)]
    large_alone_s = await one(sending, LARGE_TOKENS)
    beside_s, of_large = [], []
    for _ in range(repetitions):
        large, small = await sending.opened([LARGE_TOKENS, SMALL_TOKENS])
        started_s = time.perf_counter()
        sending.put(large, LARGE_TOKENS)
        while large.report.raw_bytes < 64 * MIB:
            await asyncio.sleep(SAMPLE_S)
        small_started_s = time.perf_counter()
        sending.put(small, SMALL_TOKENS)
        await small.done()
        beside_s.append(time.perf_counter() - small_started_s)
        await large.done()
        of_large.append(beside_s[-1] / (time.perf_counter() - started_s))
    return {
        "alone_ms": round(median(alone_s) * 1e3, 2),
        "beside_ms": round(median(beside_s) * 1e3, 2),
        "large_alone_ms": round(large_alone_s * 1e3, 1),
        "beside_to_alone": round(median(beside_s) / median(alone_s), 1),
        "share_of_large": round(median(of_large), 3),
    }


async def one(sending: Sending, tokens: int) -> float:
    (sender,) = await sending.opened([tokens])
    started_s = time.perf_counter()
    sending.put(sender, tokens)
    await sender.done()
    return time.perf_counter() - started_s


async def stalled(sending: Sending, transfers: int, stall_s: float) -> dict[str, Any]:
    senders = await sending.opened([SMALL_TOKENS] * transfers)
    tasks = [asyncio.create_task(sender.done()) for sender in senders]
    os.kill(sending.process.pid, signal.SIGSTOP)
    try:
        before_bytes = most_bytes = resident_bytes()
        sending.put_all(senders)
        until_s = time.perf_counter() + stall_s
        while time.perf_counter() < until_s:
            await asyncio.sleep(0.05)
            most_bytes = max(most_bytes, resident_bytes())
    finally:
        os.kill(sending.process.pid, signal.SIGCONT)
    await asyncio.gather(*tasks)
    config = TransportConfig()
    held = (sending.options["lanes"] + config.codec_threads) * config.chunk_bytes
    return {
        "codec": sending.options["codec"],
        "stall_s": stall_s,
        "ready_mib": transfers,
        "grew_mib": round((most_bytes - before_bytes) / MIB, 1),
        "bound_mib": round((held + OWN_BYTES) / MIB, 1),
    }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def receiver_process(options: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.transport_fairness", "--receive", json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.asynccontextmanager
async def session(options: dict[str, Any]) -> AsyncIterator[Sending]:
    with receiver_process(options) as process:
        kv = endpoint("sender", options)
        await kv.start()
        yield Sending(options, kv, process, hear(process)["port"])
        await kv.aclose()


async def measure(given: argparse.Namespace) -> dict[str, Any]:
    options = {"lanes": given.lanes, "codec": "raw"}
    found: dict[str, Any] = {"lanes": given.lanes, "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    async with session(options) as sending:
        found["thousand"] = await thousand(sending, given.transfers)
        found["beside"] = await beside(sending, given.repetitions)
    found["stalled"] = []
    for codec in ("raw", given.codec):
        async with session({**options, "codec": codec}) as sending:
            found["stalled"].append(await stalled(sending, given.transfers, given.stall_s))
    found["holds"] = list(holds(found))
    return found


def holds(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for figure in ("last_to_first", "most_to_least_bytes_half_way"):
        yield _hold(f"thousand: {figure}", found["thousand"][figure], MOST_RATIO)
    yield _hold("beside: share_of_large", found["beside"]["share_of_large"], MOST_OF_LARGE)
    for stall in found["stalled"]:
        yield _hold(f"stalled, {stall['codec']}: grew_mib", stall["grew_mib"], stall["bound_mib"])


def _hold(what: str, value: float, most: float) -> dict[str, Any]:
    return {"what": what, "value": value, "most": most, "holds": value <= most}


def as_text(found: dict[str, Any]) -> str:
    thousand, beside = found["thousand"], found["beside"]
    lines = [
        f"{found['cores']} cores, load before {found['load_before']:.1f}, {found['lanes']} lane(s)",
        f"{thousand['transfers']} transfers of 1 MiB: {thousand['gb_per_s']:.2f} GB/s; first, median, last done after "
        f"{thousand['first_s']:.3f}, {thousand['median_s']:.3f}, {thousand['last_s']:.3f} s",
        f"1 MiB alone {beside['alone_ms']:.2f} ms, beside 1 GiB {beside['beside_ms']:.2f} ms "
        f"({beside['beside_to_alone']:g}x; the 1 GiB alone {beside['large_alone_ms']:.0f} ms)",
    ]
    lines += [
        f"receiver stopped for {stall['stall_s']:g} s, {stall['ready_mib']} MiB ready, {stall['codec']}: the sender's "
        f"memory grew by {stall['grew_mib']:g} MiB"
        for stall in found["stalled"]
    ]
    lines += [
        f"{'holds' if hold['holds'] else 'FAILS'}  {hold['what']}: {hold['value']:g} (at most {hold['most']:g})"
        for hold in found["holds"]
    ]
    return "\n".join(lines)


def main() -> int:
    flags = new_parser("python -m tests.benchmarks.transport_fairness", __doc__ or "")
    flags.add_argument("--transfers", type=whole(2, 100_000), default=1000, help="that begin together (1000)")
    flags.add_argument("--lanes", type=whole(1, 64), default=4, help="connections (4)")
    flags.add_argument("--repetitions", type=whole(1, 1000), default=5, help="of the small transfer (5)")
    flags.add_argument("--stall-s", type=number(0, 3600), default=5.0, help="how long the receiver stands still (5)")
    flags.add_argument("--codec", choices=("lz4", "zstd"), default="lz4", help="of the second stall (lz4)")
    flags.add_argument("--json", action="store_true", help="print one JSON object")
    flags.add_argument("--receive", help=argparse.SUPPRESS)
    given = flags.parse_args()
    log.configure("error", "console")
    if given.receive:
        uvloop.run(receive(json.loads(given.receive)))
        return 0
    found = uvloop.run(measure(given))
    print(json.dumps(found, indent=1) if given.json else as_text(found))
    return 0 if all(hold["holds"] for hold in found["holds"]) else 1


if __name__ == "__main__":
    sys.exit(main())
