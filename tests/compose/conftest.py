"""The compose demo, as it is shipped, brought up once by a real engine: two regions with emulated engines."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import free_ports

ROOT = Path(__file__).parents[2]
UP_TIMEOUT_S = 240
REGISTERED_S = 30.0
HOME_NET, PREFILL_NET = "10.86.1", "10.86.2"
"""Other ones than the demo's own, which may be up beside the test."""
DELAY_MS = 20


def no_engine() -> str | None:
    """Why the demo can't be brought up here, or None."""
    if not shutil.which("docker"):
        return "no docker here: the compose demo was NOT tested (make test-compose)"
    asked = subprocess.run(["docker", "info"], capture_output=True)
    return None if asked.returncode == 0 else "no Docker engine answers: the compose demo was NOT tested"


class Compose:
    """One project of the shipped files, on ports and networks of its own."""

    def __init__(self, project: str) -> None:
        router, prometheus, grafana = free_ports(3)
        self.project = project
        self.url = f"http://127.0.0.1:{router}"
        self._env = {
            **os.environ,
            "ENGINE": "emulated",
            "HOME_NET": HOME_NET,
            "PREFILL_NET": PREFILL_NET,
            "WAN_DELAY_MS": str(DELAY_MS),
            "ROUTER_PORT": str(router),
            "PROMETHEUS_PORT": str(prometheus),
            "GRAFANA_PORT": str(grafana),
        }
        self._files = ["-f", "compose.yaml"]
        if "PYTHON_IMAGE" in os.environ:  # tests/compose/engine.sh: no registry, no route out
            self._files = ["-f", "docker/compose.yaml", "-f", "docker/compose.ci.yaml"]

    def run(self, *arguments: str, timeout_s: float = 60.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["docker", "compose", *self._files, "-p", self.project, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=self._env, timeout=timeout_s)
        assert not check or done.returncode == 0, f"{' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done

    def wan(self, *arguments: str) -> str:
        return self.run("exec", "-T", "wan", "prfaas", "wan", *arguments).stdout

    def python(self, service: str, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("exec", "-T", service, "python3", "-c", program, *arguments, check=False)

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine says of the service's container."""
        container = self.run("ps", "--all", "--quiet", service).stdout.strip()
        found: list[dict[str, Any]] = json.loads(docker("inspect", container))
        return found[0]

    def metrics(self) -> Mapping[str, float]:
        """Of the router: a value for each series, by its name with labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line and not line.startswith("#")]
        return {series: float(value) for series, _, value in (line.rpartition(" ") for line in lines)}

    def wait_for_nodes(self) -> None:
        """Healthy are nodes that could serve; the router hears of one with its next heartbeat, over a WAN."""
        deadline = time.monotonic() + REGISTERED_S
        wanted = {"prefill": 3.0, "decode": 2.0}
        found: dict[str, float] = {}
        while found != wanted:
            assert time.monotonic() < deadline, f"the router knows {found} of {wanted} usable nodes"
            series = self.metrics()
            found = {role: series.get(f'prfaas_router_nodes{{role="{role}",state="usable"}}', 0.0) for role in wanted}
            # A poll, since it can only be asked.
            time.sleep(0.1)


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def compose() -> Iterator[Compose]:
    """Up, healthy, all nodes registered; taken down at the end."""
    demo = Compose(f"prfaas-test-{os.getpid()}")
    try:
        demo.run("up", "--build", "--wait", timeout_s=UP_TIMEOUT_S)
        demo.wait_for_nodes()
        yield demo
    except BaseException:
        with contextlib.suppress(subprocess.TimeoutExpired):
            print(demo.run("ps", "--all", check=False).stdout, demo.run("logs", "--tail=20", check=False).stdout)
        raise
    finally:
        demo.run("--profile", "*", "down", "--volumes", "--remove-orphans", timeout_s=120, check=False)
