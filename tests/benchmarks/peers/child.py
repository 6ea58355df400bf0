"""What the processes of all peers share. Standard library only: they run in environments of their own.

A peer is two processes that speak JSON lines over stdin and stdout with transport_peers.py:

    receiver   says {"listening": ...}, which goes to the sender; told {"idle_s": s}, what it used while nothing came;
               told {"count": true}, it counts from now on; told {"done": true}, {"cpu_s", "sha256"} of its memory
    sender     hears what the receiver said, connects, says {"connected": true}; told {"go": true}, it moves `bytes`
               from its memory into the receiver's, chunk by chunk, and says {"seconds", "cpu_s"}

Either may say {"error": ...} instead.

Both have `memory_bytes` of memory that was touched before; chunk i lies at i * chunk_bytes modulo memory_bytes on both
sides, and the sender's is filled from a file that all peers read.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

HOST = "127.0.0.1"
Options = dict[str, Any]
T = TypeVar("T")


class Memory:
    """`nbytes` of anonymous memory, all touched, in huge pages where the kernel gives them."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, nbytes, mmap.PAGESIZE):
            self._map[offset] = 0
        self.nbytes = nbytes
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def fill(self, file: str) -> None:
        with Path(file).open("rb", buffering=0) as source:
            done = 0
            while done < self.nbytes:
                done += source.readinto(self.view[done:]) or sys.exit(f"{file} is shorter than the memory")

    def sha256(self) -> str:
        return hashlib.sha256(self.view).hexdigest()


def offsets(options: Options) -> Iterator[int]:
    """Where each chunk lies, on both sides, in the order of sending."""
    for start in range(0, options["bytes"], options["chunk_bytes"]):
        yield start % options["memory_bytes"]


class Peer(Protocol):
    def __init__(self, options: Options, memory: Memory) -> None: ...

    def listen(self) -> dict[str, Any]:
        """Receiver: what the sender must know, for JSON."""
        ...

    def connect(self, receiver: dict[str, Any]) -> None:
        """Sender."""
        ...

    def send(self) -> None:
        """Sender, once: returns when all bytes are in the receiver's memory. Raises when they can't get there."""
        ...

    def end(self) -> None:
        """Receiver: the sender is done."""
        ...

    def sha256(self) -> str | None:
        """Receiver, at the end: of its memory; None for a peer that keeps nothing."""
        ...


class InMemory:
    """What most peers have in common."""

    def __init__(self, options: Options, memory: Memory) -> None:
        self.options = options
        self.memory = memory

    def end(self) -> None:
        pass

    def sha256(self) -> str | None:
        return self.memory.sha256()


class Loop:
    """For peers with an event loop: it runs in a thread of its own, under uvloop."""

    def __init__(self) -> None:
        import uvloop

        self.loop = uvloop.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()


def tune(sock: socket.socket, options: Options) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, options["congestion_control"].encode())


def cpu_s() -> float:
    """Of this process and of children that have ended."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def main(peer_class: type[Peer]) -> None:
    options = json.loads(sys.argv[1])
    wire = os.dup(1)  # libraries that print must not print into the JSON lines
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        os.write(wire, json.dumps(message).encode() + b"\n")

    def hear() -> dict[str, Any]:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        heard: dict[str, Any] = json.loads(line)
        return heard

    memory = Memory(options["memory_bytes"])
    if options["role"] == "sender":
        memory.fill(options["file"])
    peer = peer_class(options, memory)
    try:
        if options["role"] == "sender":
            send(peer, say, hear)
        else:
            receive(peer, say, hear)
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}"[:500])
    sys.stdin.readline()
    os._exit(0)  # peers' threads don't all end on their own


def send(peer: Peer, say: Any, hear: Any) -> None:
    peer.connect(hear())
    say(connected=True)
    hear()
    before_s, started_s = cpu_s(), time.perf_counter()
    peer.send()
    say(seconds=time.perf_counter() - started_s, cpu_s=cpu_s() - before_s)


def receive(peer: Peer, say: Any, hear: Any) -> None:
    say(listening=peer.listen())
    before_s = 0.0
    while True:
        told = hear()
        if "idle_s" in told:
            before_s = cpu_s()
            time.sleep(told["idle_s"])
            say(cpu_s=cpu_s() - before_s)
        elif "count" in told:
            before_s = cpu_s()
            say(ready=True)
        else:
            peer.end()
            spent_s = cpu_s() - before_s
            say(cpu_s=spent_s, sha256=peer.sha256())
