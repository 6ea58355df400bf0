"""A small cluster for tests: real nodes with emulated engines and real KV endpoints over TCP, called by hand."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from prfaas.common.config import MIB, ClusterConfig, Config, EngineConfig, NodeConfig, TransportConfig
from prfaas.services.engine.emulated.engine import EmulatedEngine
from prfaas.services.messages import (
    DecodeCall,
    FormatMessage,
    Heartbeat,
    HeartbeatAnswer,
    Peer,
    PrefillCall,
    SamplingMessage,
    TicketEvent,
    to_json,
)
from prfaas.services.node.app import Node, running_node
from prfaas.services.web import Signer, client_session, signed_post
from yarl import URL

SECRET = "a secret of the tests"
WAIT_S = 10


@dataclass
class Event:
    """One SSE event: its name ("" = plain data), its data, the comments before it."""

    name: str
    data: str
    comments: list[str]

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def ids(self) -> list[int]:
        found = [c.removeprefix(" ids ") for c in self.comments if c.startswith(" ids ")]
        assert len(found) <= 1
        return [int(i) for i in found[0].split(",")] if found else []


@dataclass
class Stream:
    """An open call: its status, and its events as they come."""

    response: aiohttp.ClientResponse
    comments: list[str] = field(default_factory=list)
    """All of them, pings too."""

    @property
    def status(self) -> int:
        return self.response.status

    async def events(self) -> AsyncIterator[Event]:
        name, data, comments = "", None, []
        async for raw in self.response.content:
            line = raw.decode().rstrip("\n")
            if line.startswith(":"):
                comments.append(line[1:])
                self.comments.append(line[1:])
            elif line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                data = line[6:]
            elif not line and data is not None:
                yield Event(name, data, comments)
                name, data, comments = "", None, []

    async def next(self) -> Event:
        async with asyncio.timeout(WAIT_S):
            return await anext(self._iterator)

    async def rest(self) -> list[Event]:
        async with asyncio.timeout(WAIT_S):
            return [event async for event in self._iterator]

    def __post_init__(self) -> None:
        self._iterator = self.events()

    @property
    def timeline(self) -> Any:
        [found] = [c for c in self.comments if c.startswith(" timeline ")]
        return json.loads(found.removeprefix(" timeline "))


def decode_call(prompt: bytes = b"hello, prefill as a service", **more: Any) -> DecodeCall:
    call = DecodeCall(
        request_id=more.pop("request_id", "request-1"),
        router="router",
        prompt_token_ids=list(prompt),
        max_output_tokens=8,
        sampling=SamplingMessage(temperature=0.0),
        format=FormatMessage("completion", "cmpl-1", 1700000000, "emulated", stream=True),
    )
    return msgspec.structs.replace(call, **more)


@dataclass
class FakeRouter:
    """Takes heartbeats as the router does, and remembers them."""

    url: str = ""
    name: str = "router"
    seen: list[Heartbeat] = field(default_factory=list)
    answering: bool = True
    wants_profile: bool = False
    """Of nodes that have one and don't send it."""
    unlisted: set[str] = field(default_factory=set)
    """Nodes that answers don't name, as if their lease here had run out."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    planner_bid: str = ""
    """Under which it asks for the planner's lease."""
    planner_lease_s: float = 1.0
    nodes: int = 0

    async def heartbeat(self, request: web.Request) -> web.Response:
        received_s = time.monotonic()
        beat = msgspec.json.decode(await request.read(), type=Heartbeat)
        self.seen.append(beat)
        self.news.set()
        latest = {b.node: b for b in self.seen}
        peers = [
            Peer(b.node, b.region, b.role, b.kv_addresses)
            for b in latest.values()
            if b.role != beat.role and b.node not in self.unlisted
        ]
        wants_profile = self.wants_profile and bool(beat.profile_id) and not beat.profile
        answer = HeartbeatAnswer(
            self.name,
            received_s,
            time.monotonic(),
            peers,
            wants_profile=wants_profile,
            nodes=self.nodes,
            planner_bid=self.planner_bid,
            planner_lease_s=self.planner_lease_s,
        )
        return web.Response(body=to_json(answer))

    async def saw(self, what: Callable[[Heartbeat], bool]) -> Heartbeat:
        """The first heartbeat, from now or before, that `what` is true of."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for beat in self.seen:
                    if what(beat):
                        return beat
                self.news.clear()
                await self.news.wait()

    @asynccontextmanager
    async def listening(self, port: int = 0) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_post("/nodes/heartbeat", self.heartbeat)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            self._runner = runner
            yield
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Idempotent."""
        await self._runner.cleanup()


class Cluster:
    """Starts nodes and calls them, signed with the cluster's secret."""

    def __init__(self, stack: AsyncExitStack, session: aiohttp.ClientSession, router: FakeRouter) -> None:
        self._stack = stack
        self.session = session
        self.router = router
        self.signer = Signer.of(SECRET.encode(), ClusterConfig())

    def config(
        self,
        role: str,
        name: str = "",
        *,
        node: dict[str, Any] | None = None,
        transport: dict[str, Any] | None = None,
        **engine: Any,
    ) -> Config:
        settings = {
            "kind": "emulated",
            "arena_bytes": 16 * MIB,
            "prefix_bytes": 4 * MIB,
            "layers": 4,
            "time_scale": 0.05,
        } | engine
        return Config(
            cluster=ClusterConfig(secret=SECRET),
            node=NodeConfig(
                name=name or role,
                region=f"{role}-region",
                **({"routers": (self.router.url,), "heartbeat_s": 0.1, "ping_s": 0.1} | (node or {})),
            ),
            transport=TransportConfig(**{"lanes": 2} | (transport or {})),
            engine=EngineConfig(**settings),
        )

    async def node(
        self, role: str, name: str = "", *, make_engine: type[EmulatedEngine] = EmulatedEngine, **more: Any
    ) -> Node:
        config = self.config(role, name, **more)
        node = await self._stack.enter_async_context(running_node(config, role, make_engine(config.engine)))
        await self.router.saw(lambda beat: beat.node == node.name)
        return node

    async def post(self, node_url: str, path: str, body: Any) -> Stream:
        async with asyncio.timeout(WAIT_S):
            response = await signed_post(self.session, URL(node_url) / path, to_json(body), self.signer)
        self._stack.callback(response.close)  # before the nodes go: a test may leave its stream unread
        return Stream(response)

    async def decode(self, node: Node, call: DecodeCall) -> tuple[Stream, TicketEvent]:
        stream = await self.post(node.url, "decode", call)
        assert stream.status == 200, await stream.response.text()
        event = await stream.next()
        assert event.name == "ticket"
        return stream, msgspec.json.decode(event.data, type=TicketEvent)

    async def prefill(self, node: Node, decode_node: Node, call: DecodeCall, ticket: TicketEvent) -> Stream:
        prompt = [*call.prompt_token_ids, *call.output_token_ids]
        body = PrefillCall(call.request_id, call.router, prompt, decode_node.name, ticket.ticket, ticket.kv_addresses)
        return await self.post(node.url, "prefill", body)


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    fake = FakeRouter()
    async with fake.listening():
        yield fake


@pytest.fixture
async def cluster(router: FakeRouter) -> AsyncIterator[Cluster]:
    async with client_session() as session, AsyncExitStack() as stack:
        yield Cluster(stack, session, router)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
def make_call() -> Callable[..., DecodeCall]:
    return decode_call


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """Wait for a state of this process that has no event of its own, with a timeout."""

    async def wait(state: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not state():
                await asyncio.sleep(0.002)

    return wait
