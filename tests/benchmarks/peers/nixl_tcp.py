"""NIXL, UCX over TCP: one-sided writes, all of them outstanding."""

from __future__ import annotations

import base64
import os
import time
from typing import Any

from child import InMemory, Memory, Options, main, offsets


class Nixl(InMemory):
    def __init__(self, options: Options, memory: Memory) -> None:
        super().__init__(options, memory)
        os.environ.setdefault("UCX_TLS", "tcp")
        os.environ.setdefault("UCX_NET_DEVICES", "lo")
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        from nixl_cu12._api import nixl_agent, nixl_agent_config

        self._agent = nixl_agent(options["role"], nixl_agent_config(backends=[]))
        # NIXL's own kind of lane: a thread has a UCX worker, and a worker its own connection.
        threads = {"num_threads": str(options["lanes"])} if options.get("threads") else {}
        self._agent.create_backend("UCX", threads)
        self._registered = self._agent.register_memory([(memory.address, memory.nbytes, 0, "")], "DRAM")

    def listen(self) -> dict[str, Any]:
        metadata = base64.b64encode(self._agent.get_agent_metadata()).decode()
        return {"metadata": metadata, "address": self.memory.address}

    def connect(self, receiver: dict[str, Any]) -> None:
        name = self._agent.add_remote_agent(base64.b64decode(receiver["metadata"]))
        remote = name.decode() if isinstance(name, bytes) else name
        size, passes = self.options["chunk_bytes"], []
        descriptors: list[int] = []
        for offset in offsets(self.options):
            if offset == 0 and descriptors:
                passes.append(descriptors)
                descriptors = []
            descriptors.append(offset)
        passes.append(descriptors)

        def described(base: int, chosen: list[int]) -> Any:
            return self._agent.get_xfer_descs([(base + offset, size, 0) for offset in chosen], "DRAM")

        self._transfers = [
            self._agent.initialize_xfer(
                "WRITE", described(self.memory.address, chosen), described(receiver["address"], chosen), remote
            )
            for chosen in passes
        ]

    def send(self) -> None:
        for transfer in self._transfers:
            self._checked(self._agent.transfer(transfer))
        for transfer in self._transfers:
            while self._checked(self._agent.check_xfer_state(transfer)) != "DONE":
                time.sleep(0.0002)

    def _checked(self, state: str) -> str:
        if state == "ERR":
            raise RuntimeError("NIXL reports a transfer in state ERR")
        return state


if __name__ == "__main__":
    main(Nixl)
