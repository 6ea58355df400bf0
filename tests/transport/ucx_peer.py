"""One end of a UCX lane, in a process of its own: `python -m tests.transport.ucx_peer listen|dial HOST PORT TRAFFIC`.

TRAFFIC: which ends write without pause: none, listener, dialler. Lines on standard output: `port N` (listen), `open`,
`flowing` (once the first megabytes have come or gone, or at once without traffic), `pong` for each line of standard
input, `lost TYPE: TEXT`; then the process ends by itself.
"""

from __future__ import annotations

import asyncio
import sys
import threading

from prfaas.common.config import TransportConfig
from prfaas.transport.lanes.api import Lane
from prfaas.transport.lanes.ucx import make_ucx_backend

DEAD_S = 2.0
SECRET = b"a secret of two processes"
FLOWING_BYTES = 4 << 20


class Peer:
    """A `LaneHandler` that writes for ever, if it writes, and drops what it reads."""

    def __init__(self, writes: bool, flows: bool) -> None:
        self.lost_event = asyncio.Event()
        self.opened = asyncio.Event()
        self._writes = writes
        self._flows = flows
        self._moved_bytes = 0
        self._buffer = memoryview(bytearray(1 << 20))
        self._content = bytes(1 << 20)

    def connected(self, lane: Lane) -> None:
        self.lane = lane
        print("open", flush=True)
        if not self._flows:
            print("flowing", flush=True)
        if self._writes:
            self.writable()

    def next_buffer(self) -> memoryview:
        return self._buffer

    def advance(self, received_bytes: int) -> None:
        self._moved(received_bytes)

    def writable(self) -> None:
        while self.lane.unsent_bytes == 0 and not self.lost_event.is_set():
            self.lane.write([self._content])
            self._moved(len(self._content))

    def lost(self, error: Exception | None) -> None:
        print(f"lost {type(error).__name__}: {error}", flush=True)
        self.lost_event.set()

    def _moved(self, moved_bytes: int) -> None:
        before, self._moved_bytes = self._moved_bytes, self._moved_bytes + moved_bytes
        if before < FLOWING_BYTES <= self._moved_bytes:
            print("flowing", flush=True)


def answer_pings(loop: asyncio.AbstractEventLoop) -> None:
    for _line in sys.stdin:
        loop.call_soon_threadsafe(print, "pong")
        loop.call_soon_threadsafe(sys.stdout.flush)


async def main(role: str, host: str, port: int, traffic: str) -> None:
    backend = make_ucx_backend(TransportConfig(dead_s=DEAD_S), SECRET)
    threading.Thread(target=answer_pings, args=(asyncio.get_running_loop(),), daemon=True).start()
    peer = Peer(writes=traffic == {"listen": "listener", "dial": "dialler"}[role], flows=traffic != "none")
    if role == "listen":
        listener = await backend.listen(host, port, lambda: peer)
        print(f"port {listener.address[1]}", flush=True)
        await peer.lost_event.wait()
        await listener.aclose()
    else:
        await backend.dial(host, port, peer)
        await peer.lost_event.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
