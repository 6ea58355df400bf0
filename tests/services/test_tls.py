"""A cluster over TLS, with real sockets: a request goes through it, and callers are whom their certificates name."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import structlog
from aiohttp import web
from prfaas.common.config import (
    MIB,
    ClusterConfig,
    Config,
    EngineConfig,
    NodeConfig,
    PlannerConfig,
    RouterConfig,
    TlsConfig,
    TransportConfig,
)
from prfaas.common.errors import ConfigError
from prfaas.services import tls as services_tls
from prfaas.services.engine.emulated.engine import EmulatedEngine
from prfaas.services.messages import Heartbeat, KvAddressMessage, LoadMessage, RoleCall, to_json
from prfaas.services.node.app import Node, running_node
from prfaas.services.router.app import ROUTER, listening, make_app
from prfaas.services.web import Signer, client_session, signed_post
from prfaas.transport.tls import Tls
from yarl import URL

from tests.certificates import files_of, make_certificates

SECRET = "a secret of the tests"
CLUSTER = ClusterConfig(secret=SECRET)
WAIT_S = 10.0


class Cluster:
    """A router with TLS; nodes are started and calls made with any certificate."""

    def __init__(self, directory: Path, stack: contextlib.AsyncExitStack, session: aiohttp.ClientSession) -> None:
        self.directory = directory
        self.stack = stack
        self.session = session
        self.app: web.Application
        self.url = ""

    def files(self, name: str) -> TlsConfig:
        return files_of(self.directory, name)

    async def start(self) -> None:
        router = RouterConfig(name="r1", model_path="bytes")
        planner = PlannerConfig(lease_s=1.0)
        self.app = make_app(Config(router=router, planner=planner, cluster=CLUSTER, tls=self.files("r1")))
        _, port = await self.stack.enter_async_context(listening(self.app, "127.0.0.1:0"))
        self.url = f"https://127.0.0.1:{port}"

    def config(self, name: str, certificate: str = "", **node: Any) -> Config:
        return Config(
            cluster=CLUSTER,
            node=NodeConfig(**{"name": name, "routers": (self.url,), "heartbeat_s": 0.1, **node}),
            transport=TransportConfig(lanes=2),
            tls=self.files(certificate or name),
            engine=EngineConfig(kind="emulated", arena_bytes=16 * MIB, prefix_bytes=4 * MIB, layers=4, time_scale=0.05),
        )

    async def node(self, role: str, name: str) -> Node:
        config = self.config(name)
        return await self.stack.enter_async_context(running_node(config, role, EmulatedEngine(config.engine)))

    async def call(
        self, url: str, path: str, body: object, caller: str | None, roles: tuple[str, ...] = ("router", "decode")
    ) -> tuple[int, str]:
        """Status and error message. `caller`: whose certificate; None: none at all."""
        if caller is None:
            context = ssl.create_default_context(cafile=self.files("r1").ca_file)
            context.check_hostname = False
        else:
            context = Tls(self.files(caller)).client(roles=roles)
        signer = Signer.of(SECRET.encode(), CLUSTER)
        async with await signed_post(self.session, URL(url) / path, to_json(body), signer, tls=context) as answer:
            text = await answer.text()
            return answer.status, json.loads(text)["error"]["message"] if answer.status != 200 else text

    def registered(self, name: str) -> bool:
        return name in [node.name for node in self.app[ROUTER].registry._by_name.values()]


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    make_certificates(tmp_path, "r1:router:127.0.0.1", "r2:router", "p1:prefill", "d1:decode", "d2:decode",
                      "b1:prefill+decode")  # fmt: skip
    async with contextlib.AsyncExitStack() as stack, client_session() as session:
        made = Cluster(tmp_path, stack, session)
        await made.start()
        try:
            yield made
        finally:
            await stack.aclose()


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], Any]:
    async def wait(state: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not state():
                await asyncio.sleep(0.002)

    return wait


def beat(node: str, role: str, url: str = "https://127.0.0.1:9") -> Heartbeat:
    return Heartbeat(
        node=node,
        epoch="1",
        region="home",
        role=role,
        url=url,
        kv_addresses=[KvAddressMessage("127.0.0.1", 9)],
        model="m",
        model_fingerprint="f",
        layout_hash="l",
        max_model_tokens=1000,
        load=LoadMessage(),
        sent_s=time.monotonic(),
    )


async def test_a_request_goes_through_a_cluster_that_is_encrypted(cluster: Cluster, until: Any) -> None:
    """A client without certificate, checking the router's host name, gets its answer; KV came over TLS lanes."""
    decode, prefill = await cluster.node("decode", "d1"), await cluster.node("prefill", "p1")
    assert decode.url.startswith("https://")
    await until(lambda: cluster.registered("d1") and cluster.registered("p1"))
    await until(lambda: prefill.endpoint.clock("d1") is not None)
    client = ssl.create_default_context(cafile=cluster.files("r1").ca_file)
    body = {"model": "emulated", "prompt": "hello, prefill as a service", "max_tokens": 5}
    async with cluster.session.post(cluster.url + "/v1/completions", json=body, ssl=client) as answer:
        told = await answer.json()
        assert answer.status == 200, told
    assert told["usage"]["completion_tokens"] == 5
    async with cluster.session.get(
        f"{cluster.url}/requests/{answer.headers['x-request-id']}/timeline", ssl=client
    ) as answer:
        assert (await answer.json())["prefill_node"] == "p1"


async def _loadgen(*flags: str) -> tuple[int | None, str, str]:
    """Exit status, stdout and stderr of `prfaas-loadgen run`."""
    words = ["run", "--num-prompts", "4", "--isl", "40", "--osl", "3", "--no-progress", "--json", *flags]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "prfaas.loadgen", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"},
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_the_load_generator_trusts_the_cas_file_and_no_other(
    cluster: Cluster, until: Any, tmp_path: Path
) -> None:
    """With --cacert a run goes through, timelines included. Without it, with another CA's, or by a name that the
    certificate lacks, the run ends before it began with one line, or each request with the word tls."""
    await cluster.node("decode", "d1")
    prefill = await cluster.node("prefill", "p1")
    await until(lambda: cluster.registered("d1") and cluster.registered("p1"))
    await until(lambda: prefill.endpoint.clock("d1") is not None)
    ca = ["--cacert", cluster.files("r1").ca_file]
    status, out, err = await _loadgen("--url", cluster.url, *ca)
    assert status == 0, err
    told = json.loads(out)
    (run,) = told["runs"]
    assert (run["ok"], run["offload"]["known"], told["client"]["timelines_missed"]) == (4, 4, 0)
    make_certificates(tmp_path / "other", "r1:router")
    other = ["--cacert", str(tmp_path / "other" / "ca.pem")]
    by_name = cluster.url.replace("127.0.0.1", "localhost")
    for url, flags in ((cluster.url, []), (cluster.url, other), (by_name, ca)):
        status, _, err = await _loadgen("--url", url, *flags)
        assert (status, len(err.splitlines())) == (1, 1)
        assert "certificate is refused: " in err
        assert "--cacert" in err
    status, out, _ = await _loadgen("--url", cluster.url, "--model", "emulated")
    told = json.loads(out)
    assert status == 1
    assert list(told["errors"]) == ["tls"]
    assert "certificate is refused: " in told["errors"]["tls"]


@pytest.mark.parametrize(
    ("caller", "message", "status", "text"),
    [
        ("d1", beat("d1", "decode"), 200, "r1"),
        ("d2", beat("d1", "decode"), 401, "says that it is d1, but its certificate is d2's"),
        ("d1", beat("d1", "prefill"), 401, "allows d1 the role decode, not prefill"),
        ("r2", beat("r2", "decode"), 401, "allows r2 the role router, not decode"),
        (None, beat("d1", "decode"), 401, "it needs a certificate"),
        ("d1", beat("d1", "decode", "http://127.0.0.1:9"), 400, "url must be https"),
    ],
)
async def test_a_heartbeat_must_come_from_the_node_that_it_names(
    cluster: Cluster, caller: str | None, message: Heartbeat, status: int, text: str
) -> None:
    """Though signed with the cluster's secret: name and role are those of the certificate. The router logs it."""
    with structlog.testing.capture_logs() as logs:
        told, answer = await cluster.call(cluster.url, "nodes/heartbeat", message, caller)
    assert told == status
    assert text in answer
    assert cluster.registered(message.node) == (status == 200)
    if status != 200:
        assert any(text in str(entry.get("error")) for entry in logs if entry["event"] == "node_refused")


@pytest.mark.parametrize("path", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("caller", "text"), [("d2", "allows d2 the role decode, not router"), ("r2", "its certificate is r2's, not d2's")]
)
async def test_only_routers_call_nodes(cluster: Cluster, path: str, caller: str, text: str) -> None:
    """/prefill and /decode refuse a node's certificate, and a router that says that it is another."""
    node = await cluster.node("decode", "d1")
    body = {
        "request_id": "1",
        "router": "d2",
        "prompt_token_ids": [1, 2, 3],
        "max_output_tokens": 1,
        "sampling": {},
        "format": {"kind": "completion", "id": "1", "created": 1, "model": "emulated"},
        "decode_node": "d1",
        "ticket": "",
        "kv_addresses": [],
    }
    status, answer = await cluster.call(node.url, path, body, caller)
    assert status == 401
    assert text in answer


async def test_a_node_port_takes_nobody_without_certificate(cluster: Cluster) -> None:
    node = await cluster.node("decode", "d1")
    with structlog.testing.capture_logs() as logs, pytest.raises((aiohttp.ClientError, ConnectionError)):
        await cluster.call(node.url, "decode", {}, None)
    assert any("showed no certificate" in str(entry.get("reason")) for entry in logs)


async def test_a_router_sends_no_prompt_to_a_node_with_another_s_certificate(cluster: Cluster, until: Any) -> None:
    """d2 listens where d1 said it does: the router's TLS handshake ends it, before anything is sent."""
    node = await cluster.node("decode", "d2")
    await until(lambda: cluster.registered("d2"))
    [link] = node._links.values()
    message = msgspec.structs.replace(node._heartbeat(link), node="d1", url=node.url, leaving=False)
    assert (await cluster.call(cluster.url, "nodes/heartbeat", message, "d1"))[0] == 200
    from prfaas.services.router.upstream import Nodes, NodeUnreachableError

    router = cluster.app[ROUTER]
    [d1] = [known for known in router.registry._by_name.values() if known.name == "d1"]
    with pytest.raises(NodeUnreachableError, match="its certificate is d2's, not d1's"):
        await Nodes(cluster.session, router.signer, router.tls).call(d1, "/decode", b"{}", "1")


async def test_a_node_of_another_ca_says_so_once(cluster: Cluster, tmp_path: Path, until: Any) -> None:
    """In its own log and in the router's, and doesn't register."""
    make_certificates(tmp_path / "other", "d1:decode")
    config = dataclasses.replace(cluster.config("d1"), tls=files_of(tmp_path / "other", "d1"))
    with structlog.testing.capture_logs() as logs:

        def told(event: str) -> list[Any]:
            return [entry for entry in logs if entry["event"] == event]

        async with running_node(config, "decode", EmulatedEngine(config.engine)):
            await until(lambda: bool(told("router does not take heartbeats")) and bool(told("connection refused")))
        assert "not signed by this cluster's CA" in told("router does not take heartbeats")[0]["trouble"]
    assert not cluster.registered("d1")


async def test_new_certificates_without_a_restart(cluster: Cluster) -> None:
    """The router's files change: its next connection shows the new certificate."""

    async def serial() -> str:
        context = Tls(cluster.files("d1")).client(roles=("router",))
        _, writer = await asyncio.open_connection("127.0.0.1", URL(cluster.url).port, ssl=context)
        number = writer.get_extra_info("peercert")["serialNumber"]
        writer.close()
        await writer.wait_closed()
        return str(number)

    before = await serial()
    make_certificates(cluster.directory, "r1:router:127.0.0.1", force=True)
    assert await serial() != before


# -- at the start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "name", "certificate", "more", "problem"),
    [
        ("decode", "d1", "d2", {}, "its certificate is d2's, not d1's"),
        ("prefill", "d1", "d1", {}, "allows d1 the role decode, not prefill"),
        ("decode", "d1", "d1", {"routers": ("http://127.0.0.1:1",)}, r"node.routers = .* must be https"),
        ("decode", "d1", "d1", {"advertise": "http://10.0.0.1:1"}, r"node.advertise = .* must be https"),
    ],
)
async def test_a_node_whose_certificate_or_urls_do_not_fit_does_not_start(
    cluster: Cluster, role: str, name: str, certificate: str, more: dict[str, Any], problem: str
) -> None:
    config = cluster.config(name, certificate, **more)
    with pytest.raises(ConfigError, match=problem):
        async with running_node(config, role, EmulatedEngine(config.engine)):
            pass


async def test_https_without_certificates_is_a_mistake(cluster: Cluster) -> None:
    """A plain node with an https router."""
    config = dataclasses.replace(cluster.config("d1"), tls=TlsConfig())
    with pytest.raises(ConfigError, match=r"without \[tls\] it must be http://"):
        async with running_node(config, "decode", EmulatedEngine(config.engine)):
            pass


async def test_without_a_name_a_node_is_whom_its_certificate_names(cluster: Cluster) -> None:
    config = cluster.config("", "d1")
    async with running_node(config, "decode", EmulatedEngine(config.engine)) as node:
        assert node.name == "d1"


def test_an_open_address_without_tls_is_one_warning(tmp_path: Path) -> None:
    """It names all of them; loopback and TLS have none."""
    tls = Tls(make_certificates(tmp_path, "d1:decode")["d1"])
    binds = {"node.bind": "0.0.0.0:1", "transport.bind": "10.0.0.1:2", "other": "127.0.0.1:3"}
    with structlog.testing.capture_logs() as logs:
        services_tls.warn_if_open(binds, None)
        services_tls.warn_if_open(binds, tls)
        services_tls.warn_if_open({"router.bind": "[::1]:1"}, None)
    assert [entry["open_to_others"] for entry in logs] == ["node.bind = 0.0.0.0:1, transport.bind = 10.0.0.1:2"]


async def test_files_that_are_gone_do_not_stop_a_running_router(cluster: Cluster) -> None:
    shutil.rmtree(cluster.directory)
    client = ssl.create_default_context()
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    async with cluster.session.get(cluster.url + "/healthz", ssl=client) as answer:
        assert answer.status == 200


async def test_a_node_takes_the_roles_of_its_certificate_alone(cluster: Cluster, until: Any) -> None:
    """Told by the router that holds its lease, with the router's certificate: the node whose certificate names both
    roles comes back in the other one, and the other node says what would mend it."""
    both, one = await cluster.node("decode", "b1"), await cluster.node("decode", "d1")
    planning = cluster.app[ROUTER].planning
    await until(lambda: all(node.roles.grant.to(time.monotonic()) == planning.holder for node in (both, one)))
    call = RoleCall("r1", planning.holder, "prefill")
    for caller in ("r2", "d2"):
        status, message = await cluster.call(both.url, "role", call, caller)
        assert status == 401, message
    status, message = await cluster.call(one.url, "role", call, "r1")
    assert status == 409
    assert "prfaas certs init --nodes d1:prefill+decode" in message
    status, _ = await cluster.call(both.url, "role", call, "r1", ("decode", "prefill"))
    assert status == 200
    registry = cluster.app[ROUTER].registry
    await until(lambda: registry._by_name["b1"].role == "prefill" and not registry._by_name["b1"].draining)
    assert (both.role, one.role) == ("prefill", "decode")
