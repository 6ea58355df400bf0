"""Mooncake Transfer Engine over TCP: batches of one-sided writes, several of them outstanding."""

from __future__ import annotations

import os
from collections import deque
from typing import Any

from child import HOST, InMemory, Memory, Options, main, offsets

BATCH_WRITES = 256
OUTSTANDING_BATCHES = 3
"""It refuses what is more than 1,024 writes to a peer."""


class Mooncake(InMemory):
    def __init__(self, options: Options, memory: Memory) -> None:
        super().__init__(options, memory)
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        os.environ.setdefault("MC_TCP_ENABLE_CONNECTION_POOL", "1")
        os.environ.setdefault("MC_TCP_LANES_PER_PEER", str(options["lanes"]))
        from mooncake.engine import TransferEngine

        self._engine = TransferEngine()
        if self._engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("TransferEngine.initialize failed")
        if self._engine.register_memory(memory.address, memory.nbytes) != 0:
            raise RuntimeError("TransferEngine.register_memory failed")

    def listen(self) -> dict[str, Any]:
        return {"host": f"{HOST}:{self._engine.get_rpc_port()}", "address": self.memory.address}

    def connect(self, receiver: dict[str, Any]) -> None:
        self._host = receiver["host"]
        self._remote = receiver["address"]
        if self._engine.transfer_sync_write(self._host, self.memory.address, self._remote, 4096) != 0:
            raise RuntimeError("the first write failed")

    def send(self) -> None:
        chosen = list(offsets(self.options))
        begun: deque[int] = deque()
        for start in range(0, len(chosen), BATCH_WRITES):
            if len(begun) == OUTSTANDING_BATCHES:
                self._wait(begun.popleft())
            begun.append(self._begin(chosen[start : start + BATCH_WRITES]))
        for batch in begun:
            self._wait(batch)

    def _begin(self, chosen: list[int]) -> int:
        batch = self._engine.batch_transfer_async_write(
            self._host,
            [self.memory.address + offset for offset in chosen],
            [self._remote + offset for offset in chosen],
            [self.options["chunk_bytes"]] * len(chosen),
        )
        if batch == 0:
            raise RuntimeError("batch_transfer_async_write failed")
        return int(batch)

    def _wait(self, batch: int) -> None:
        status = self._engine.get_batch_transfer_status([batch])
        if status != 0:
            raise RuntimeError(f"get_batch_transfer_status returned {status}")


if __name__ == "__main__":
    main(Mooncake)
