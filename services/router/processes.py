"""Several router processes behind one port: a parent that starts them, and the addresses that each has of its own.

    clients ──▶ bind (SO_REUSEPORT: the kernel gives each connection to one process)
                  ├─ process 1 ── node_port      ◀── heartbeats of every node
                  ├─ process 2 ── node_port + 1  ◀── heartbeats of every node
                  …
    a node's first heartbeat comes to `bind`; the answer names the processes' own addresses

Processes share nothing, like routers on several machines: each has its own registry, index and policy. The parent only
starts them, starts again those that die, and passes signals on.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial

from prfaas.common import log
from prfaas.common.config import Config, RouterConfig, env_name, parse_address
from prfaas.common.errors import ConfigError
from prfaas.services import web as services_web
from prfaas.services.child_process import die_with_parent
from prfaas.services.tls import PROCESS_MARK

FIRST_BACK_OFF_S = 1.0
MAX_BACK_OFF_S = 30.0
"""Between two starts of a process that dies again and again."""
STABLE_S = 60.0
"""A process that lived so long is started again at once."""
EXIT_USAGE = 2

logger = log.get_logger("router")


def name_of(config: RouterConfig) -> str:
    """Of this process, in heartbeats and calls: the router's, with the process' number if there are several."""
    return f"{config.name}{PROCESS_MARK}{config.process}" if config.process else config.name


def own_bind(config: RouterConfig) -> str:
    """Where this process alone listens; "" when it is the only one."""
    return _address(config, config.process) if config.process else ""


def urls(config: RouterConfig, scheme: str) -> list[str]:
    """Where nodes reach each of the processes."""
    host = config.advertise or parse_address(config.bind)[0]
    host = f"[{host}]" if ":" in host else host
    return [f"{scheme}://{host}:{_port(config, number)}" for number in range(1, config.processes + 1)]


def check(config: RouterConfig) -> None:
    """Raises ConfigError for settings that several processes can't have."""
    host, port = parse_address(config.bind)
    problems = []
    if port == 0:
        problems.append("router.bind has port 0: with router.processes > 1 it must be a certain one")
    if _is_wildcard(host) and not config.advertise:
        problems.append(f"router.bind is {host}: with router.processes > 1 set router.advertise to a host's name")
    last = _port(config, config.processes)
    if last > 65535 or _port(config, 1) <= port <= last:
        problems.append(
            f"router.node_port: {config.processes} ports from {_port(config, 1)} on must be below 65536 and not "
            f"router.bind's {port}"
        )
    if problems:
        raise ConfigError(problems)


def _port(config: RouterConfig, number: int) -> int:
    return (config.node_port or parse_address(config.bind)[1] + 1) + number - 1


def _address(config: RouterConfig, number: int) -> str:
    host = parse_address(config.bind)[0]
    return f"{f'[{host}]' if ':' in host else host}:{_port(config, number)}"


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


# -- the parent -------------------------------------------------------------------------------------------------------


def serve(config: Config, argv: Sequence[str]) -> int:
    """Run `prfaas router` with `argv` so many times; the exit status. Raises ConfigError."""
    check(config.router)
    return services_web.run(_supervise(config.router, argv))


async def _supervise(config: RouterConfig, argv: Sequence[str]) -> int:
    stopping = asyncio.create_task(services_web.stop_signal())
    children = [asyncio.create_task(_keep_running(number, argv)) for number in range(1, config.processes + 1)]
    logger.info("router_processes", name=config.name, processes=config.processes, node_ports=urls(config, "tcp"))
    try:
        await asyncio.wait([stopping, *children], return_when=asyncio.FIRST_COMPLETED)
        ended = [child.result() for child in children if child.done()]
        return ended[0] if ended and not stopping.done() else 0
    finally:
        stopping.cancel()
        for child in children:
            child.cancel()
        await asyncio.gather(*children, return_exceptions=True)


async def _keep_running(number: int, argv: Sequence[str]) -> int:
    """Until cancelled, which ends the process in order; or until it says that its settings are wrong: its status."""
    back_off_s = FIRST_BACK_OFF_S
    loop = asyncio.get_running_loop()
    while True:
        started_s = loop.time()
        status = await _run_once(number, argv)
        if status == EXIT_USAGE:
            return status
        lived_s = loop.time() - started_s
        back_off_s = FIRST_BACK_OFF_S if lived_s > STABLE_S else min(MAX_BACK_OFF_S, back_off_s * 2)
        logger.error("router_process_ended", process=number, status=status, lived_s=round(lived_s, 1))
        await asyncio.sleep(0.0 if lived_s > STABLE_S else back_off_s)


async def _run_once(number: int, argv: Sequence[str]) -> int:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "prfaas.services",
        "router",
        *argv,
        env={**os.environ, env_name("router.process"): str(number)},
        # Ctrl-C comes to this process, which passes it on in order.
        start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid(), signal.SIGTERM),
    )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            await _reap(process)


async def _reap(process: asyncio.subprocess.Process) -> None:
    """It has been told to end: its streams get SHUTDOWN_S, and it a little more."""
    try:
        await asyncio.wait_for(process.wait(), 2 * services_web.SHUTDOWN_S + 1.0)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
