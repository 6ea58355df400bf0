"""One host of transport_wan.py: a KvEndpoint that is told over stdin what to do and says on stdout when it is done, in
JSON lines. Instants are of the machine's monotonic clock, which both hosts share.

{"do": "expect", "transfers": 2, "tokens": 256}  ->  {"tickets": [...]}, then {"finished_s": …, "cpu_s": …}
{"do": "send", "tickets": [...], "port": 1}      ->  {"began_s": …, "done_s": …, "raw_bytes": …, "wire_bytes": …, …}
"""

from __future__ import annotations

import asyncio
import json
import resource
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import uvloop
from prfaas.common import log
from prfaas.common.config import TransportConfig
from prfaas.common.kv_layout import KvLayout, LayerLayout, TensorKind, TensorLayout, TokenRange
from prfaas.services import kv_file
from prfaas.services.commands.bench_peers import kv_like
from prfaas.transport.api import KvAddress, KvPiece, KvReceiver, KvSender, TransferSpec
from prfaas.transport.arena import Arena
from prfaas.transport.endpoint import KvEndpoint

LAYERS, HEADS, HEAD_DIM = 8, 8, 128
TOKEN_BYTES = LAYERS * 2 * HEADS * HEAD_DIM * 2
MEMORY_BYTES = 64 << 20
"""Rows of all transfers lie in it, one after the other and again from the start: more than any cache."""
FINGERPRINT = "0" * 32
SECRET = b"the secret of a benchmark"
LAYOUT = KvLayout(
    (
        LayerLayout(
            tuple(TensorLayout(kind, "bfloat16", HEADS, (HEAD_DIM,)) for kind in (TensorKind.KEY, TensorKind.VALUE))
        ),
    )
    * LAYERS
)


class Memory:
    """Rows out of an arena, in turn."""

    def __init__(self, content: bytes | None) -> None:
        region = Arena(MEMORY_BYTES).allocate(MEMORY_BYTES)
        assert region is not None
        self._view = region.view
        self._next = 0
        if content is not None:
            for start in range(0, MEMORY_BYTES, len(content)):
                part = self._view[start : start + len(content)]
                part[:] = content[: len(part)]

    def take(self, nbytes: int) -> memoryview:
        if self._next + nbytes > MEMORY_BYTES:
            self._next = 0
        start, self._next = self._next, self._next + nbytes
        return self._view[start : start + nbytes]


class Rows:
    """The `KvDestination` of a transfer."""

    def __init__(self, memory: Memory, spec: TransferSpec) -> None:
        self._memory = memory
        self._extents = LAYOUT.extents(spec.tokens, spec.shard)

    def row(self, layer: int, tensor: int, _row: int) -> memoryview:
        return self._memory.take(self._extents[layer][tensor].row_bytes)


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def expect(kv: KvEndpoint, memory: Memory, tokens: int) -> tuple[str, KvReceiver]:
    spec = TransferSpec(
        secrets.token_hex(16), "bench", TokenRange(0, tokens), tokens + 1, 1, FINGERPRINT, LAYOUT.layout_hash
    )
    ticket, receiver = kv.receiver(spec)
    receiver.bind(lambda opened: Rows(memory, opened), lambda _layer: None, lambda _error: None)
    return ticket, receiver


async def receive(kv: KvEndpoint, memory: Memory, order: dict[str, Any]) -> None:
    expected = [expect(kv, memory, order["tokens"]) for _ in range(order["transfers"])]
    say(tickets=[ticket for ticket, _ in expected], port=kv.addresses[0].port)
    before_s = cpu_s()
    reports = [await receiver.finished() for _, receiver in expected]
    say(
        finished_s=time.monotonic(),
        cpu_s=cpu_s() - before_s,
        duplicate_chunks=sum(report.duplicate_chunks for report in reports),
    )
    for _, receiver in expected:
        await receiver.aclose()


async def send(kv: KvEndpoint, memory: Memory, order: dict[str, Any]) -> None:
    address = KvAddress(order["host"], order["port"])
    senders = [kv.sender(ticket, "receiver", [address]) for ticket in order["tickets"]]
    # Round trips early, as the services do.
    await asyncio.gather(*(sender.open() for sender in senders))
    before_s, began_s = cpu_s(), time.monotonic()
    for sender in senders:
        put_all(sender, memory)
    reports = [await sender.done() for sender in senders]
    say(
        began_s=began_s,
        done_s=time.monotonic(),
        cpu_s=cpu_s() - before_s,
        raw_bytes=sum(report.raw_bytes for report in reports),
        wire_bytes=sum(report.wire_bytes for report in reports),
        resent_chunks=sum(report.resent_chunks for report in reports),
    )
    for sender in senders:
        await sender.aclose()


def put_all(sender: KvSender, memory: Memory) -> None:
    for layer, tensors in enumerate(LAYOUT.extents(sender.spec.tokens, sender.spec.shard)):
        sender.put(
            [
                KvPiece(layer, tensor, row, 0, memory.take(extent.row_bytes))
                for tensor, extent in enumerate(tensors)
                for row in range(extent.rows)
            ]
        )
    sender.finish({})


async def main() -> None:
    options = json.loads(sys.argv[1])
    config = TransportConfig(**options["transport"])
    kv = KvEndpoint(config, node=options["role"], layout=LAYOUT, model_fingerprint=FINGERPRINT, secret=SECRET)
    await kv.start()
    sending = options["role"] == "sender"
    memory = Memory(kv_like(MEMORY_BYTES) if sending else None)
    if sending and options.get("kv_file"):
        memory = Memory(kv_file.read(Path(options["kv_file"])).data[:MEMORY_BYTES])
    say(ready=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        await (send if order["do"] == "send" else receive)(kv, memory, order)
    await kv.aclose()


if __name__ == "__main__":
    log.configure("error", "console")
    uvloop.run(main())
