"""What the compose demo promises, on containers of a real engine. In this order: the last test takes it down."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

from tests.compose.conftest import DELAY_MS, HOME_NET, PREFILL_NET, Compose, docker, no_engine

pytestmark = [pytest.mark.compose, pytest.mark.skipif(no_engine() is not None, reason=str(no_engine()))]

SERVICES = {"secret", "model", "wan", "router", "decode-1", "decode-2", "prefill-home", "prefill-1"}
SERVICES |= {"prefill-2", "ingress"}
CONNECT = """
import socket, sys, time
began_s = time.monotonic()
socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)
print(time.monotonic() - began_s)
"""
WAIT_S = 60


async def until(holds: Callable[[], bool], what: str) -> None:
    """Asked again and again; fails when it doesn't come true."""
    end_s = time.monotonic() + WAIT_S
    while not await asyncio.to_thread(holds):
        assert time.monotonic() < end_s, f"after {WAIT_S} s not yet: {what}"
        await asyncio.sleep(0.25)


def completion(prompt: str, max_tokens: int, **more: object) -> dict[str, object]:
    return {"model": "emulated", "prompt": prompt, "max_tokens": max_tokens, **more}


@pytest.fixture
async def client(compose: Compose) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(compose.url, timeout=aiohttp.ClientTimeout(100)) as session:
        yield session


async def test_it_chats_and_long_prompts_go_to_the_prefill_region(client: aiohttp.ClientSession) -> None:
    # The long one first: what a link's estimate makes of a first transfer of some KB may keep the next prompt at home.
    async with client.post("/v1/completions", json=completion("a" * 20_000, 8)) as answer:
        assert answer.status == 200
        assert answer.headers["x-prfaas-prefill-region"] == "prefill"
        assert answer.headers["x-prfaas-decode-region"] == "home"
        assert answer.headers["x-prfaas-reason"] == "offloaded"
    messages = [{"role": "user", "content": "What is a bell?"}]
    async with client.post(
        "/v1/chat/completions", json={"model": "emulated", "messages": messages, "max_tokens": 8}
    ) as answer:
        assert answer.status == 200
        assert (await answer.json())["usage"]["completion_tokens"] == 8


def test_the_other_region_is_a_wan_away_and_nothing_else_is_reached(compose: Compose) -> None:
    """Between the regions a handshake takes a round trip of the WAN, and its counters move. Without the WAN there is
    no way, not to the other region and not to the machine that all run on."""
    before = json.loads(compose.wan("show", "--json"))
    for service, target, port in (("prefill-1", "decode-1", "9001"), ("decode-1", "prefill-1", "8001")):
        done = compose.python(service, CONNECT, target, port)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) >= 2 * DELAY_MS / 1e3
    after = json.loads(compose.wan("show", "--json"))
    assert after["there"]["packets"] > before["there"]["packets"]
    assert after["back"]["packets"] > before["back"]["packets"]

    compose.wan("set", "--down")
    try:
        for service, target, port in (
            ("prefill-1", f"{HOME_NET}.21", "9001"),
            ("decode-1", f"{PREFILL_NET}.31", "8001"),
        ):
            assert "timed out" in compose.python(service, CONNECT, target, port).stderr
    finally:
        compose.wan("set", "--up")
    with socket.socket() as here:
        # This machine, under the address that the door's network knows it by.
        here.bind(
            (
                docker(
                    "network", "inspect", f"{compose.project}_edge", "-f", "{{(index .IPAM.Config 0).Gateway}}"
                ).strip(),
                0,
            )
        )
        here.listen()
        address, port = here.getsockname()
        assert compose.python("ingress", CONNECT, address, str(port)).returncode == 0
        for service in ("prefill-1", "decode-1"):
            assert compose.python(service, CONNECT, address, str(port)).returncode != 0


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_containers_can_do_no_more_than_they_need(compose: Compose, service: str) -> None:
    found = compose.inspect(service)
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert not host["Privileged"]
    if service == "wan":
        assert {name.removeprefix("CAP_") for name in host["CapAdd"]} == {"NET_ADMIN", "SETGID", "SETUID"}
    else:
        assert not host["CapAdd"]
        assert found["Config"]["User"] == "prfaas"
    if found["State"]["Running"]:
        status = Path(f"/proc/{child_of(found['State']['Pid'])}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert "0" not in fields["Uid"].split()
        assert int(fields["CapEff"], 16) == 0


def test_no_secret_and_no_torch_in_the_image(compose: Compose) -> None:
    """The secret is a file in a volume that each service can read, and in no environment."""
    find = (
        "import importlib.util, pathlib; print(importlib.util.find_spec('torch'), *pathlib.Path('/opt').rglob('*.key'))"
    )
    assert compose.python("router", find).stdout.strip() == "None"
    secret = compose.python("router", "print(open('/run/prfaas/secret').read())").stdout.strip()
    assert len(secret) == 64
    assert secret not in docker("image", "inspect", "prfaas:emulated")
    assert secret not in docker("history", "--no-trunc", "prfaas:emulated")
    for service in SERVICES:
        assert secret not in json.dumps(compose.inspect(service))
    logs = compose.run("logs").stdout
    assert "registered" in logs
    assert secret not in logs


async def test_a_narrower_wan_raises_the_threshold_and_a_wider_one_lowers_it(
    compose: Compose, client: aiohttp.ClientSession
) -> None:
    """While prompts keep coming whose KV fills the line."""

    def threshold() -> float:
        return compose.metrics()['prfaas_router_threshold_tokens{region="home"}']

    async def ask(number: int) -> None:
        async with client.post("/v1/completions", json=completion(f"{number} " + "b" * 30_000, 4)) as answer:
            assert answer.status in (200, 503), await answer.text()

    async def keep_asking(stop: asyncio.Event, worker: int) -> None:
        number = worker * 10_000
        while not stop.is_set():
            await ask(number)
            number += 1

    await ask(0)
    before = threshold()
    compose.wan("set", "--rate-mbit", "3")
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as clients:
        for worker in range(1, 7):
            clients.create_task(keep_asking(stop, worker))
        await until(lambda: threshold() > 1.3 * before, f"a threshold of more than {1.3 * before:g}")
        compose.wan("set", "--rate-mbit", "500")
        raised = threshold()
        stop.set()
    await until(lambda: threshold() < raised, f"a threshold below {raised:g}")


async def test_a_stream_outlives_its_decode_node_which_comes_back(
    compose: Compose, client: aiohttp.ClientSession
) -> None:
    """Its process is killed in the middle of an answer: the other node goes on with it, and the engine starts the lost
    one again, which registers and serves."""
    tokens = 200
    pieces, finished, node = 0, None, ""
    async with client.post("/v1/completions", json=completion("c" * 4000, tokens, stream=True)) as answer:
        assert answer.status == 200
        node = answer.headers["x-prfaas-decode"]
        lost = compose.inspect(node)
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            choices = json.loads(line[6:])["choices"]
            if choices:
                pieces += bool(choices[0]["text"])
                finished = choices[0]["finish_reason"] or finished
            if pieces == 5 and lost["State"]["Pid"]:
                os.kill(child_of(lost["State"]["Pid"]), signal.SIGKILL)
                lost["State"]["Pid"] = 0
    assert (pieces, finished) == (tokens, "length")
    await until(lambda: compose.inspect(node)["State"]["Pid"] not in (0, lost["State"]["Pid"]), f"{node} again")
    await until(lambda: compose.metrics()['prfaas_router_nodes{role="decode",state="usable"}'] == 2, "two decode nodes")
    assert compose.inspect(node)["RestartCount"] == 1


def child_of(pid: int) -> int:
    """The service, whose parent is the container's init."""
    return int((Path(f"/proc/{pid}/task/{pid}/children").read_text().split() or [pid])[0])


def test_the_load_generator_leaves_its_report(compose: Compose, tmp_path) -> None:
    flags = ["--num-prompts", "8", "--request-rate", "4", "--isl", "200", "--osl", "8"]
    done = compose.run("--profile", "load", "run", "--name", f"{compose.project}-load", "load", *flags, timeout_s=120)
    assert "8 of 8" in done.stdout or "requests offloaded" in done.stdout
    docker("cp", f"{compose.project}-load:/reports/load.html", str(tmp_path))
    docker("rm", f"{compose.project}-load")
    assert "<svg" in (tmp_path / "load.html").read_text()


def test_it_stops_in_order_and_leaves_nothing(compose: Compose) -> None:
    compose.run("stop", timeout_s=120)
    assert {service: compose.inspect(service)["State"]["ExitCode"] for service in SERVICES} == dict.fromkeys(
        SERVICES, 0
    )
    compose.run("--profile", "*", "down", "--volumes", "--remove-orphans", timeout_s=120)
    label = f"label=com.docker.compose.project={compose.project}"
    for what in (["ps", "--all"], ["network", "ls"], ["volume", "ls"]):
        assert docker(*what, "--quiet", "--filter", label) == ""
