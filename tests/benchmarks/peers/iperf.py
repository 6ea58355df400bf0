"""iperf3: what a C program does with the same sockets. It sends one buffer again and again and keeps nothing."""

from __future__ import annotations

import json
import socket
import subprocess
from typing import Any

from child import HOST, InMemory, main

MAX_CHUNK_BYTES = 1 << 20
"""iperf3 takes no larger one."""


class Iperf(InMemory):
    def listen(self) -> dict[str, Any]:
        with socket.create_server((HOST, 0)) as free:
            port = free.getsockname()[1]
        self._server = subprocess.Popen(
            ["iperf3", "--server", "--one-off", "--bind", HOST, "--port", str(port), "--forceflush"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout is not None
        while "listening" not in (line := self._server.stdout.readline()):
            if not line:
                raise RuntimeError("iperf3 --server ended at once")
        return {"port": port}

    def connect(self, receiver: dict[str, Any]) -> None:
        self._port = receiver["port"]

    def send(self) -> None:
        options = self.options
        command = ["iperf3", "--client", HOST, "--port", str(self._port), "--json"]
        command += ["--bytes", str(options["bytes"]), "--parallel", str(options["lanes"])]
        command += ["--length", str(min(options["chunk_bytes"], MAX_CHUNK_BYTES))]
        command += ["--congestion", options["congestion_control"]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        report = json.loads(done.stdout)
        if "error" in report:
            raise RuntimeError(report["error"])

    def end(self) -> None:
        self._server.wait(10)

    def sha256(self) -> str | None:
        return None


if __name__ == "__main__":
    main(Iperf)
