"""The vLLM that a node starts for itself: `vllm serve`, on loopback, with our connector."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from functools import partial

from prfaas.common import log
from prfaas.common.config import EngineConfig, VllmConfig
from prfaas.common.errors import ConfigError, EngineError
from prfaas.services.child_process import die_with_parent
from prfaas.services.vllm.client import VllmClient

HOST = "127.0.0.1"
LINES_KEPT = 15
PROBE_EACH_S = 0.25
END_S = 15.0
"""After SIGTERM; then it is killed."""
GONE_S, LOOK_EACH_S = 5.0, 0.05
"""For killed processes to be gone: the kernel gives their memory back first."""

_log = log.get_logger("vllm")


def transfer_config(control: str) -> str:
    """For --kv-transfer-config. kv_both: a node's role may change while it runs."""
    return json.dumps(
        {
            "kv_connector": "PrfaasConnector",
            "kv_connector_module_path": "prfaas.services.engine.vllm.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"control": control},
        }
    )


def events_config(endpoint: str) -> str:
    """For --kv-events-config."""
    return json.dumps({"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint})


def serve_command(
    engine: EngineConfig, vllm: VllmConfig, served_model: str, port: int, control: str, events: str
) -> list[str]:
    """`vllm.arguments` come last, so that they win. Raises ConfigError."""
    try:
        further = shlex.split(vllm.arguments)
    except ValueError as error:
        raise ConfigError([f"vllm.arguments = {vllm.arguments!r}: {error}"]) from error
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", engine.model]
    command += ["--host", HOST, "--port", str(port), "--served-model-name", served_model]
    command += ["--dtype", engine.dtype, "--max-num-seqs", str(engine.max_batch)]
    if engine.max_model_tokens:
        command += ["--max-model-len", str(engine.max_model_tokens)]
    command += ["--kv-transfer-config", transfer_config(control), "--kv-events-config", events_config(events)]
    return [*command, *further]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class VllmProcess:
    """`on_end(reason)` is called, once, when it ends without having been told to."""

    def __init__(self, command: list[str], on_end: Callable[[str], None]) -> None:
        self._command = command
        self._on_end = on_end
        self._process: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._ending = False

    async def start(self, client: VllmClient, start_s: float) -> None:
        """Returns when it serves. Raises ConfigError, EngineError with the end of its log."""
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                ["engine.kind = vllm: vLLM is not installed in this Python's environment; `make vllm-env` makes one "
                 "(.venv-vllm/bin/prfaas), or name a vLLM that runs already (vllm.url)"]
            )  # fmt: skip
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"VLLM_NO_USAGE_STATS": "1", **os.environ},
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid(), signal.SIGTERM),
        )
        self._watching = asyncio.create_task(self._watch(self._process))
        try:
            async with asyncio.timeout(start_s):
                while not await client.healthy():
                    if self._watching.done():
                        raise EngineError(f"vLLM did not start; its log ends with:\n{self.last_lines()}")
                    await asyncio.wait([self._watching], timeout=PROBE_EACH_S)
        except TimeoutError:
            await self.stop()
            raise EngineError(
                f"vLLM did not serve within vllm.start_s = {start_s:g} s; its log ends with:\n{self.last_lines()}"
            ) from None
        except BaseException:
            await self.stop()
            raise

    def last_lines(self) -> str:
        return "\n".join(f"  | {line}" for line in self._lines) or "  | (nothing)"

    async def stop(self) -> None:
        """Idempotent. Its whole process group is gone when this returns."""
        self._ending = True
        process = self._process
        if process is None or self._watching is None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        await asyncio.wait([self._watching], timeout=END_S)
        _signal_group(process.pid, signal.SIGKILL)
        await asyncio.wait([self._watching])
        # Its children are nobody's to wait for: they can only be looked for.
        with contextlib.suppress(ProcessLookupError):
            for _ in range(int(GONE_S / LOOK_EACH_S)):
                os.killpg(process.pid, 0)
                await asyncio.sleep(LOOK_EACH_S)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await _line(process.stdout):
            self._lines.append(line)
            _log.info("vllm says", line=line)
        status = await process.wait()
        # Its engine's own process may outlive it.
        _signal_group(process.pid, signal.SIGKILL)
        if not self._ending:
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            self._on_end(f"vLLM ended with {how}; its log ends with:\n{self.last_lines()}")


async def _line(stream: asyncio.StreamReader) -> str:
    """Without its end; "": there is none any more. A line that is too long is cut."""
    while True:
        try:
            data = await stream.readline()
        except ValueError:  # over the stream's limit: the rest of it comes as a line of its own
            return "(a line that is too long)"
        if not data:
            return ""
        if text := data.decode("utf-8", "replace").strip():
            return text


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
