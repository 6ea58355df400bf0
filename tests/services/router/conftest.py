"""A router and stub nodes on real sockets. A stub speaks the protocol of services/messages.py and follows a script."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from prfaas.common.config import ClusterConfig, Config, PlannerConfig, RouterConfig
from prfaas.common.metrics import Metrics
from prfaas.services import web as services_web
from prfaas.services.messages import (
    DecodeCall,
    DecodeNodeTimeline,
    Heartbeat,
    HeartbeatAnswer,
    KvAddressMessage,
    LoadMessage,
    PrefillCall,
    PrefillResult,
    RoleAnswer,
    RoleCall,
    TicketEvent,
)
from prfaas.services.router.app import ROUTER, make_app
from prfaas.services.web import Signer, signed_post
from yarl import URL

SECRET = "test-secret"
MODEL = "stub-model"
WAIT_S = 5.0
encode = msgspec.json.encode


class Out:
    """What a script writes to."""

    def __init__(self, response: web.StreamResponse) -> None:
        self._response = response

    async def raw(self, data: bytes) -> None:
        await self._response.write(data)

    async def event(self, name: str, body: Any) -> None:
        await self.raw(b"event: %b\ndata: %b\n\n" % (name.encode(), encode(body)))

    async def error(self, message: str, kind: str = "server_error", code: str | None = None) -> None:
        await self.event("error", {"error": {"message": message, "type": kind, "param": None, "code": code}})

    async def chunk(self, ids: list[int], data: Any) -> None:
        await self.raw(b": ids %b\ndata: %b\n\n" % (",".join(map(str, ids)).encode(), encode(data)))


Script = Callable[["StubNode", Any, Out], Awaitable[None]]


@dataclass(eq=False)
class StubNode:
    """One node. `decode` and `prefill` are its scripts; `calls` what it was asked; `cancelled` that a call was cut."""

    name: str
    role: str
    decode: Script
    prefill: Script
    calls: list[Any] = field(default_factory=list)
    called: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    """For scripts that wait to be told."""
    prefilled: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""
    epoch: str = "1"
    model: str = MODEL
    fingerprint: str = "f" * 32
    layout_hash: str = "a" * 32
    max_model_tokens: int = 4096
    load: LoadMessage = field(default_factory=LoadMessage)
    refuse: tuple[int, Any] | None = None

    role_answer: tuple[int, Any] = (200, RoleAnswer("draining", "prefill", 1))
    role_calls: list[RoleCall] = field(default_factory=list)

    async def handle_role(self, request: web.Request) -> web.Response:
        self.role_calls.append(msgspec.json.decode(await request.read(), type=RoleCall))
        self.called.set()
        status, answer = self.role_answer
        return services_web.json_response(answer, status=status)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        decoding = request.path == "/decode"
        call = msgspec.json.decode(body, type=DecodeCall if decoding else PrefillCall)
        self.calls.append(call)
        self.called.set()
        if self.refuse is not None:
            status, answer = self.refuse
            return services_web.json_response(answer, status=status)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        try:
            await (self.decode if decoding else self.prefill)(self, call, Out(response))
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return response

    def heartbeat(self, **changes: Any) -> Heartbeat:
        message = Heartbeat(
            node=self.name,
            epoch=self.epoch,
            region="home" if self.role == "decode" else "away",
            role=self.role,
            url=self.url,
            kv_addresses=[KvAddressMessage("127.0.0.1", 9)],
            model=self.model,
            model_fingerprint=self.fingerprint,
            layout_hash=self.layout_hash,
            max_model_tokens=self.max_model_tokens,
            load=self.load,
        )
        return msgspec.structs.replace(message, **changes)


# -- scripts ----------------------------------------------------------------------------------------------------------

WORDS = ("Hello", " there", ", friend", ".")


async def answer(node: StubNode, call: DecodeCall, out: Out) -> None:
    """A decode node that works: ticket, one token a word, timeline, end. It needs no prefill to have happened."""
    received_s = time.monotonic()
    await ticket(call, out)
    await words(call, out, received_s)


async def ticket(call: DecodeCall, out: Out) -> None:
    text = "" if call.local_prefill else f"ticket-for-{call.request_id}"
    await out.event("ticket", TicketEvent(text, [KvAddressMessage("127.0.0.1", 9)], 0, len(call.prompt_token_ids) - 1))


def head(call: DecodeCall, kind: str) -> dict[str, Any]:
    return {"id": call.format.id, "object": kind, "created": call.format.created, "model": call.format.model}


def chunk(call: DecodeCall, text: str, finish: str | None = None) -> dict[str, Any]:
    chat = call.format.kind == "chat"
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    choice |= {"delta": {"role": "assistant", "content": text}} if chat else {"text": text}
    return head(call, "chat.completion.chunk" if chat else "text_completion") | {"choices": [choice]}


def usage(call: DecodeCall) -> dict[str, int]:
    prompt = len(call.prompt_token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": len(WORDS), "total_tokens": prompt + len(WORDS)}


async def words(call: DecodeCall, out: Out, received_s: float) -> None:
    now_s = time.monotonic()
    if call.format.stream:
        for i, word in enumerate(WORDS):
            await out.chunk([i + 1], chunk(call, word, "stop" if i == len(WORDS) - 1 else None))
        if call.format.include_usage:
            await out.raw(
                b"data: %b\n\n" % encode(head(call, "chat.completion.chunk") | {"choices": [], "usage": usage(call)})
            )
    timeline = DecodeNodeTimeline(received_s, now_s, now_s, now_s, local_prefill=True, router_clock_error_s=1e-6)
    await out.raw(b": timeline %b\n\n" % encode(timeline))
    if call.format.stream:
        await out.raw(b"data: [DONE]\n\n")
        return
    chat = call.format.kind == "chat"
    text = "".join(WORDS)
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    body = head(call, "chat.completion" if chat else "text_completion") | {"choices": [choice], "usage": usage(call)}
    await out.chunk(list(range(1, len(WORDS) + 1)), body)


async def prefill_done(node: StubNode, call: PrefillCall, out: Out) -> None:
    now_s = time.monotonic()
    await out.event("done", PrefillResult(now_s, now_s, now_s, 100, 50))
    node.prefilled.set()


async def hang(node: StubNode, call: Any, out: Out) -> None:
    """Pings for ever."""
    while True:
        await out.raw(b": ping\n\n")
        await asyncio.sleep(0.05)


async def ticket_then_hang(node: StubNode, call: DecodeCall, out: Out) -> None:
    await ticket(call, out)
    await hang(node, call, out)


async def one_word_then_hang(node: StubNode, call: DecodeCall, out: Out) -> None:
    await ticket(call, out)
    await out.chunk([1], chunk(call, WORDS[0]))
    await hang(node, call, out)


# -- the cluster ------------------------------------------------------------------------------------------------------


class Cluster:
    """A router at `url` and the stubs that were added, registered by one heartbeat each."""

    def __init__(self, url: str, app: web.Application, session: aiohttp.ClientSession, stack: Any) -> None:
        self.url = url
        self.app = app
        self.session = session
        self._stack = stack
        self.signer = Signer.of(SECRET.encode(), ClusterConfig(secret=SECRET))

    @property
    def metrics(self) -> Metrics:
        return self.app[ROUTER].metrics

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    async def add(
        self,
        name: str,
        role: str = "decode",
        *,
        decode: Script = answer,
        prefill: Script = prefill_done,
        **changes: Any,
    ) -> StubNode:
        node = StubNode(name, role, decode, prefill, **changes)
        app = services_web.make_app(Metrics(), not_ready=lambda: None, max_body_bytes=64 << 20)
        app.router.add_post("/decode", node.handle)
        app.router.add_post("/prefill", node.handle)
        app.router.add_post("/role", node.handle_role)
        listening = services_web.listening(app, "127.0.0.1:0", secret=b"", shutdown_s=0.05)
        host, port = await self._stack.enter_async_context(listening)
        node.url = f"http://{host}:{port}"
        await self.beat(node)
        return node

    async def beat(self, node: StubNode, **changes: Any) -> HeartbeatAnswer:
        status, body = await self.post_heartbeat(node.heartbeat(**changes))
        assert status == 200, body
        return msgspec.json.decode(body, type=HeartbeatAnswer)

    async def post_heartbeat(self, message: Heartbeat, signer: Signer | None = None) -> tuple[int, bytes]:
        url = URL(self.url) / "nodes" / "heartbeat"
        async with await signed_post(self.session, url, encode(message), signer or self.signer) as response:
            return response.status, await response.read()

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
        """Status, parsed JSON, headers. `body`: JSON-able, or bytes as they are."""
        data = body if isinstance(body, bytes) else encode(body)
        async with self.session.post(self.url + path, data=io.BytesIO(data), headers=headers) as response:
            return response.status, msgspec.json.decode(await response.read()), response.headers

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path, headers=headers) as response:
            return response.status, msgspec.json.decode(await response.read() or b"null")


MakeCluster = Callable[..., Awaitable[Cluster]]


@pytest.fixture
async def make_cluster() -> AsyncIterator[MakeCluster]:
    """`await make_cluster(api_keys=("k",), ...)`: settings of the router."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(planner: PlannerConfig | None = None, **settings: Any) -> Cluster:
            router = dataclasses.replace(RouterConfig(model_path="bytes", max_body_bytes=200_000), **settings)
            app = make_app(
                Config(router=router, planner=planner or PlannerConfig(), cluster=ClusterConfig(secret=SECRET))
            )
            listening = services_web.listening(app, "127.0.0.1:0", secret=SECRET.encode(), shutdown_s=0.05)
            host, port = await stack.enter_async_context(listening)
            session = await stack.enter_async_context(services_web.client_session())
            return Cluster(f"http://{host}:{port}", app, session, stack)

        yield make


@pytest.fixture
async def cluster(make_cluster: MakeCluster) -> Cluster:
    return await make_cluster()


async def within(event: asyncio.Event) -> None:
    """Wait for a state, not for a time."""
    async with asyncio.timeout(WAIT_S):
        await event.wait()


class Scripts:
    """The scripts above, for tests (test modules can't import one another)."""

    answer = staticmethod(answer)
    prefill_done = staticmethod(prefill_done)
    hang = staticmethod(hang)
    ticket_then_hang = staticmethod(ticket_then_hang)
    one_word_then_hang = staticmethod(one_word_then_hang)
    ticket = staticmethod(ticket)
    words = staticmethod(words)
    chunk = staticmethod(chunk)
    within = staticmethod(within)
    text = "".join(WORDS)
    model = MODEL


@pytest.fixture
def scripts() -> type[Scripts]:
    return Scripts
