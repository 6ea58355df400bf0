"""The two processes of `prfaas bench link`: one sends, one receives. They speak JSON lines over stdin and stdout.

prfaas        two KvEndpoints and one transfer, as the services use them
hash, bare    the peers: a BufferedProtocol pair that writes a 16-byte header and the same chunks, from and into the
              same amount of memory, on as many lanes, with and without xxh3 over every chunk on both sides
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import resource
import secrets
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import uvloop
from prfaas.common import log
from prfaas.common.config import TransportConfig
from prfaas.common.kv_layout import KvLayout, LayerLayout, TensorKind, TensorLayout, TokenRange
from prfaas.services.commands.bare_pair import Receiving, Sending
from prfaas.transport.api import KvAddress, KvPiece, TransferSpec
from prfaas.transport.arena import Arena
from prfaas.transport.endpoint import KvEndpoint

WORKING_SET_BYTES = 64 << 20
"""Memory that rows are taken from in turn, on both sides and for the peers alike: more than any cache."""
HEADS = 8
HEAD_DIM = 128
ROW_TOKENS = 16384
"""Rows of 4 MiB."""
ROW_BYTES = ROW_TOKENS * HEAD_DIM * 2
FINGERPRINT = "0" * 32
SECRET = b"bench"


def layout_for(total_bytes: int) -> KvLayout:
    """As many layers of 8 heads as make about `total_bytes` (a layer has 64 MiB)."""
    kinds = (TensorKind.KEY, TensorKind.VALUE)
    layer = LayerLayout(tuple(TensorLayout(kind, "bfloat16", HEADS, (HEAD_DIM,)) for kind in kinds))
    return KvLayout((layer,) * max(1, round(total_bytes / (2 * HEADS * ROW_BYTES))))


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


async def hear() -> dict[str, Any]:
    line = await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    if not line:
        raise SystemExit(0)
    return cast(dict[str, Any], json.loads(line))


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Rows:
    """Rows out of an arena, in turn."""

    def __init__(self, fill: bool) -> None:
        region = Arena(WORKING_SET_BYTES).allocate(WORKING_SET_BYTES)
        assert region is not None
        self._view = region.view
        self._next = 0
        if fill:
            self._view[:] = kv_like(WORKING_SET_BYTES)

    def take(self) -> memoryview:
        start = self._next
        self._next = (start + ROW_BYTES) % WORKING_SET_BYTES
        return self._view[start : start + ROW_BYTES]

    def row(self, _layer: int, _tensor: int, _row: int) -> memoryview:
        return self.take()


def kv_like(nbytes: int) -> bytes:
    """bfloat16 noise around zero: it compresses about as real KV does."""
    import numpy as np

    values = np.random.default_rng(0).standard_normal(nbytes // 2, dtype=np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


# -- our transport ----------------------------------------------------------------------------------------------------


def endpoint(role: str, options: dict[str, Any], layout: KvLayout) -> KvEndpoint:
    config = TransportConfig(lanes=options["lanes"], chunk_bytes=options["chunk_bytes"], codec=options["codec"])
    return KvEndpoint(config, node=role, layout=layout, model_fingerprint=FINGERPRINT, secret=SECRET)


async def prfaas_receiver(options: dict[str, Any]) -> None:
    layout = layout_for(options["bytes"])
    kv = endpoint("receiver", options, layout)
    await kv.start()
    rows = Rows(fill=False)
    spec = TransferSpec(
        secrets.token_hex(16), "bench", TokenRange(0, ROW_TOKENS), ROW_TOKENS + 1, 1, FINGERPRINT, layout.layout_hash
    )
    ticket, receiver = kv.receiver(spec)
    receiver.bind(lambda _spec: rows, lambda _layer: None, lambda _error: None)
    say(port=kv.addresses[0].port, ticket=ticket)
    await hear()
    before = cpu_s()
    say(ready=True)
    await receiver.finished()
    say(cpu_s=cpu_s() - before)
    await receiver.aclose()
    await kv.aclose()


async def prfaas_sender(options: dict[str, Any]) -> None:
    layout = layout_for(options["bytes"])
    kv = endpoint("sender", options, layout)
    await kv.start()
    rows = Rows(fill=True)
    peer = await hear()
    sender = kv.sender(peer["ticket"], "receiver", [KvAddress("127.0.0.1", peer["port"])])
    await sender.open()
    say(opened=True)
    await hear()
    before, started_s = cpu_s(), time.perf_counter()
    for layer in range(len(layout.layers)):
        sender.put([KvPiece(layer, tensor, row, 0, rows.take()) for tensor in range(2) for row in range(HEADS)])
    sender.finish({})
    report = await sender.done()
    seconds = time.perf_counter() - started_s
    say(seconds=seconds, cpu_s=cpu_s() - before, raw_bytes=report.raw_bytes, wire_bytes=report.wire_bytes)
    await sender.aclose()
    await kv.aclose()


# -- the peers --------------------------------------------------------------------------------------------------------


def tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")


class Places:
    """For chunks, as they come: one after the other in rows taken in turn."""

    def __init__(self) -> None:
        self._rows = Rows(fill=False)
        self._row = self._rows.take()
        self._offset = 0

    def next(self, _offset: int, nbytes: int) -> memoryview:
        if self._offset + nbytes > len(self._row):
            self._row, self._offset = self._rows.take(), 0
        start = self._offset
        self._offset += nbytes
        return self._row[start : self._offset]


def row_chunks(rows: Rows, nbytes: int, chunk_bytes: int) -> Iterator[tuple[int, memoryview]]:
    """Of whole rows, `nbytes` at most."""
    for _ in range(nbytes // ROW_BYTES):
        row = rows.take()
        for start in range(0, ROW_BYTES, chunk_bytes):
            yield start, row[start : start + chunk_bytes]


async def bare_receiver(options: dict[str, Any], tls: ssl.SSLContext | None = None) -> None:
    done: asyncio.Queue[None] = asyncio.Queue()
    hashed = options["mode"] == "hash"

    def lane() -> Receiving:
        return Receiving(Places().next, tune, lambda: done.put_nowait(None), hashed=hashed)

    server = await asyncio.get_running_loop().create_server(lane, "127.0.0.1", 0, ssl=tls)
    say(port=server.sockets[0].getsockname()[1])
    await hear()
    before = cpu_s()
    say(ready=True)
    for _ in range(options["lanes"]):
        await done.get()
    say(cpu_s=cpu_s() - before)
    server.close()


async def bare_sender(options: dict[str, Any], tls: ssl.SSLContext | None = None) -> None:
    loop = asyncio.get_running_loop()
    total = len(layout_for(options["bytes"]).layers) * 2 * HEADS * ROW_BYTES
    rows = Rows(fill=True)
    peer = await hear()
    hashed = options["mode"] == "hash"

    def lane() -> Sending:
        return Sending(tune, hashed=hashed, unbuffered=tls is None)

    lanes = [
        (await loop.create_connection(lane, "127.0.0.1", peer["port"], ssl=tls))[1] for _ in range(options["lanes"])
    ]
    say(opened=True)
    await hear()
    before, started_s = cpu_s(), time.perf_counter()
    lane_bytes = total // len(lanes)
    await asyncio.gather(*(lane.send(row_chunks(rows, lane_bytes, options["chunk_bytes"])) for lane in lanes))
    seconds = time.perf_counter() - started_s
    say(seconds=seconds, cpu_s=cpu_s() - before, raw_bytes=lane_bytes // ROW_BYTES * ROW_BYTES * len(lanes))


# -- the process ------------------------------------------------------------------------------------------------------


def start_load(name: str) -> threading.Event:
    """Run `module:function` in a thread; returns when it is at work."""
    module, _, function = name.partition(":")
    load = getattr(importlib.import_module(module), function)
    stop, ready = threading.Event(), threading.Event()
    threading.Thread(target=load, args=(stop, ready), daemon=True).start()
    if not ready.wait(120):
        raise SystemExit(f"the load {name} did not start within 120 s")
    return stop


def main() -> None:
    options = json.loads(sys.argv[1])
    # To stderr: stdout is the wire to the command.
    log.configure("warning", "console")
    stop = start_load(options["load"]) if options.get("load") else None
    role = options["role"]
    if role == "load":
        say(ready=True)
        sys.stdin.readline()
    else:
        jobs = {
            ("prfaas", "sender"): prfaas_sender,
            ("prfaas", "receiver"): prfaas_receiver,
            ("bare", "sender"): bare_sender,
            ("bare", "receiver"): bare_receiver,
        }
        uvloop.run(jobs["prfaas" if options["mode"] == "prfaas" else "bare", role](options))
    if stop is not None:
        stop.set()
    sys.stdout.flush()
    os._exit(0)  # the load may be in the middle of a long step


if __name__ == "__main__":
    main()
