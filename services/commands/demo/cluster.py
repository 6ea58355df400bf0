"""The demo's processes: a router and a decode node at home, a prefill node elsewhere, the WAN between them.

    home region                      WAN                      prefill region
    router  <------------------- heartbeats ------------------- prefill node
            -------------------- /prefill calls -------------->
    decode node <==================== KV lanes ================

Whatever crosses the regions is dialled at a port of the WAN process: that is what `advertise` is for. Every child gets
a log file, dies with this process (PR_SET_PDEATHSIG), and is in a process group of its own, so that Ctrl-C reaches
this process only and it can stop them in order.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from prfaas.common.errors import SetupError
from prfaas.services.child_process import die_with_parent

HOST = "127.0.0.1"
READY_TIMEOUT_S = 180.0
POLL_S = 0.05
STOP_S = 5.0
LOG_LINES_SHOWN = 15


@dataclass(frozen=True, slots=True)
class Plan:
    """What the processes are started with."""

    engine: str
    model_path: str
    """A directory, or `bytes` for the emulated engine."""
    dtype: str
    rate_mbit: float
    delay_ms: float
    secret: str
    folder: Path
    """For logs."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """PRFAAS_* variables that all processes get, unless the user's environment has them."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the processes listen, and where the WAN stands in for them in the other region."""

    router: int
    decode: int
    decode_kv: int
    prefill: int
    router_over_wan: int
    decode_kv_over_wan: int
    prefill_over_wan: int

    @staticmethod
    def free() -> Ports:
        """Seven ports that nobody listens on now. Held until all are chosen, so that they differ."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(7)]
            for sock in sockets:
                sock.bind((HOST, 0))
            return Ports(*(sock.getsockname()[1] for sock in sockets))


class Child:
    """One process and its log file."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, env: Mapping[str, str]) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own commands
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid(), signal.SIGKILL),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Raises SetupError with the end of its log if the process has died."""
        status = self._process.poll()
        if status is not None:
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            raise SetupError(f"{self.name} ended with {how}; its log, {self.log}, ends with:\n{self.last_lines()}")

    def last_lines(self) -> str:
        with self.log.open(errors="replace") as file:
            lines = deque(file, LOG_LINES_SHOWN)
        return "".join(f"  | {line}" for line in lines).rstrip("\n") or "  | (nothing)"

    def stop(self) -> None:
        """Ask it to end now; `reap` waits for it."""
        self._signal(signal.SIGINT)

    def reap(self, until_s: float) -> None:
        """Wait until `until_s`, then kill its whole group."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, until_s - time.monotonic()))
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _inherited() -> dict[str, str]:
    """The user's environment. Of its settings only those of logs and engines fit a cluster that is not theirs."""
    ours = ("PRFAAS_LOG_", "PRFAAS_ENGINE_")
    return {key: value for key, value in os.environ.items() if not key.startswith("PRFAAS_") or key.startswith(ours)}


class Cluster:
    """Starts and stops the processes; nodes can be replaced by others with different settings."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ports = Ports.free()
        self._children: dict[str, Child] = {}
        # One prompt is asked again and again in different modes: none may begin with what another left in a cache.
        own = {"PRFAAS_ENGINE_PREFIX_BYTES": "0", **plan.settings}
        self._env = {**own, **_inherited(), "PRFAAS_CLUSTER_SECRET": plan.secret, "OMP_NUM_THREADS": "1"}

    @property
    def router_url(self) -> str:
        return f"http://{HOST}:{self.ports.router}"

    def start(self) -> None:
        """All of them; returns when each answers /readyz. Raises SetupError."""
        ports, plan = self.ports, self.plan
        self._spawn(
            "wan",
            ["prfaas.services.wan.proxy"],
            ("--rate-mbit", f"{plan.rate_mbit:g}"),
            ("--delay-ms", f"{plan.delay_ms:g}"),
            # Side A is the prefill region, side B is home.
            ("--forward", f"{HOST}:{ports.router_over_wan}={HOST}:{ports.router}"),
            ("--forward", f"{HOST}:{ports.decode_kv_over_wan}={HOST}:{ports.decode_kv}"),
            ("--backward", f"{HOST}:{ports.prefill_over_wan}={HOST}:{ports.prefill}"),
        )
        self._spawn(
            "router",
            ["prfaas.services", "router"],
            ("--bind", f"{HOST}:{ports.router}"),
            ("--model", plan.model_path),
        )
        self.start_decode()
        self.start_prefill()
        self.wait_ready()

    def start_prefill(self, send: str = "layerwise") -> None:
        ports = self.ports
        self._spawn(
            "prefill",
            ["prfaas.services", "prefill"],
            ("--name", f"prefill-{send}"),
            ("--region", "prefill"),
            ("--bind", f"{HOST}:{ports.prefill}"),
            ("--advertise", f"http://{HOST}:{ports.prefill_over_wan}"),
            ("--routers", f"http://{HOST}:{ports.router_over_wan}"),
            ("--engine-send", send),
            *self._engine_flags(),
        )

    def start_decode(self, join: str = "layerwise") -> None:
        ports = self.ports
        self._spawn(
            "decode",
            ["prfaas.services", "decode"],
            ("--name", f"decode-{join}"),
            ("--region", "home"),
            ("--bind", f"{HOST}:{ports.decode}"),
            ("--routers", self.router_url),
            ("--kv-bind", f"{HOST}:{ports.decode_kv}"),
            ("--kv-advertise", f"{HOST}:{ports.decode_kv_over_wan}"),
            ("--engine-join", join),
            *self._engine_flags(),
        )

    def stop(self, *names: str) -> None:
        """The named children, or all."""
        stopped = [self._children.pop(name) for name in names or tuple(self._children)]
        for child in stopped:
            child.stop()
        until_s = time.monotonic() + STOP_S
        for child in stopped:
            child.reap(until_s)

    def wait_ready(self) -> None:
        """Until router and nodes answer /readyz with 200. Raises SetupError when a child dies or the time is over."""
        for name in ("decode", "prefill", "router"):
            port: int = getattr(self.ports, name)
            self.wait_for(lambda port=port: is_ready(port), f"{name} did not get ready")  # type: ignore[misc]

    def wait_for(self, condition: Callable[[], bool], failure: str) -> None:
        """Poll `condition` while all children live. Raises SetupError."""
        until_s = time.monotonic() + READY_TIMEOUT_S
        while not condition():
            self.check()
            if time.monotonic() > until_s:
                raise SetupError(f"{failure} within {READY_TIMEOUT_S:g} s; logs are in {self.plan.folder}")
            time.sleep(POLL_S)

    def check(self) -> None:
        for child in self._children.values():
            child.check()

    def last_lines(self) -> str:
        return "\n".join(f"{child.name}:\n{child.last_lines()}" for child in self._children.values())

    def _engine_flags(self) -> list[tuple[str, str]]:
        plan = self.plan
        if plan.engine == "emulated":
            return [("--engine", "emulated")]
        return [("--engine", plan.engine), ("--model", plan.model_path), ("--dtype", plan.dtype)]

    def _spawn(self, name: str, module: list[str], *flags: tuple[str, str]) -> None:
        command = [sys.executable, "-m", *module, *(word for flag in flags for word in flag)]
        self._children[name] = Child(name, command, self.plan.folder, self._env)


@contextlib.contextmanager
def running(plan: Plan) -> Iterator[Cluster]:
    """A cluster that is started, and stopped however the block ends."""
    cluster = Cluster(plan)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2.0)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def get_json(port: int, path: str) -> object:
    """GET, status 200, JSON; None otherwise."""
    connection = http.client.HTTPConnection(HOST, port, timeout=10.0)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        return json.loads(body) if response.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
