"""A scripted OpenAI server on a real socket, and runs against it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from prfaas.loadgen.client.bodies import Bodies
from prfaas.loadgen.client.endpoint import Endpoint, Kind
from prfaas.loadgen.client.exchange import Exchange, open_session
from prfaas.loadgen.client.runner import Clock, Runner
from prfaas.loadgen.client.timelines import Timelines
from prfaas.loadgen.records import Records
from prfaas.loadgen.workloads.prefixes import StreamPrefixes
from prfaas.loadgen.workloads.prompts import TextPrompts, TokenPrompts
from prfaas.loadgen.workloads.workload import Workload

WAIT_S = 20.0


def workload_of(
    arrivals_s: list[float],
    *,
    prompt: int = 4,
    output: int = 3,
    cap: int | None = None,
    turns: list[int] | None = None,
    closed: bool = False,
) -> Workload:
    """One request an arrival (NaN for later turns); prompts of `prompt` new tokens a turn."""
    n = len(arrivals_s)
    turn = np.array(turns or [0] * n, np.int32)
    own = np.cumsum(turn == 0) - 1
    tokens = prompt * (turn.astype(np.int64) + 1)
    whole = np.full(n, prompt, np.int64)
    prefixes = StreamPrefixes(
        512, np.empty(0, np.int64), np.full(n, -1, np.int32), own, tokens, whole, np.full(n, output, np.int64)
    )
    return Workload(
        "test",
        np.full(n, np.nan) if closed else np.array(arrivals_s),
        tokens,
        np.full(n, output, np.int64),
        own,
        turn,
        np.zeros(n),
        prefixes,
        7,
        cap,
    )


@dataclass
class Call:
    """One request as the server saw it, and its answer being written."""

    body: dict[str, Any]
    http: web.Request
    response: web.StreamResponse = field(init=False)

    async def begin(self, **headers: str) -> None:
        self.response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8", **headers})
        await self.response.prepare(self.http)

    async def send(self, data: str | bytes) -> None:
        await self.response.write(data if isinstance(data, bytes) else data.encode())

    async def word(self, text: str, finish: str | None = None) -> None:
        chat = "chat" in self.http.path
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        choice |= {"delta": {"content": text}} if chat else {"text": text}
        await self.send(f"data: {json.dumps({'choices': [choice]})}\n\n")

    async def end(self, **usage: Any) -> None:
        if usage:
            await self.send(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n")
        await self.send("data: [DONE]\n\n")
        await self.response.write_eof()


Script = Callable[[Call], Awaitable[web.StreamResponse | None]]


async def three_words(call: Call) -> None:
    await call.begin()
    for text in ("one ", "two ", "three"):
        await call.word(text, "length" if text == "three" else None)
    await call.end(prompt_tokens=9, completion_tokens=3, prompt_tokens_details={"cached_tokens": 5})


class Server:
    """`script` answers every call; `calls` are those that came, `count` an event a call can be waited for by."""

    def __init__(self) -> None:
        self.script: Script = three_words
        self.calls: list[Call] = []
        self.timelines: dict[str, Any] = {}
        self.url = ""
        self._came = asyncio.Condition()

    async def handle(self, http: web.Request) -> web.StreamResponse:
        call = Call(await http.json(), http)
        self.calls.append(call)
        async with self._came:
            self._came.notify_all()
        answer = await self.script(call)
        return call.response if answer is None else answer

    async def received(self, count: int) -> None:
        async with asyncio.timeout(WAIT_S), self._came:
            await self._came.wait_for(lambda: len(self.calls) >= count)

    async def timeline(self, http: web.Request) -> web.Response:
        found = self.timelines.get(http.match_info["id"])
        return web.Response(status=404) if found is None else web.json_response(found)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    app = web.Application()
    app.router.add_post("/v1/completions", made.handle)
    app.router.add_post("/v1/chat/completions", made.handle)
    app.router.add_get("/requests/{id}/timeline", made.timeline)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert runner.addresses
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


@dataclass
class Client:
    """Runs workloads against one URL; `runner` and `exchange` are the last run's."""

    url: str
    runner: Runner = field(init=False)
    exchange: Exchange = field(init=False)

    async def run(
        self,
        workload: Workload,
        *,
        kind: Kind = "completions",
        token_ids: bool = False,
        timeout_s: float = WAIT_S,
        timelines: bool = False,
        started: Callable[[Runner], None] = lambda runner: None,
        **fields: Any,
    ) -> Records:
        prompts = TokenPrompts(7, 100) if token_ids else TextPrompts(7)
        endpoint = Endpoint(self.url, kind, "m", prompts, **fields)
        clock = Clock()
        async with open_session() as session:
            self.exchange = Exchange(session, endpoint, clock.now_s, timeout_s)
            asked = Timelines(session, endpoint) if timelines else None
            self.runner = Runner(workload, clock, self.exchange, Bodies(workload, endpoint), asked)
            started(self.runner)
            async with asyncio.timeout(WAIT_S):
                await self.runner.run()
        return self.runner.builder.records().in_order()


@pytest.fixture
def client(server: Server) -> Client:
    return Client(server.url)


@pytest.fixture
def make_workload() -> Callable[..., Workload]:
    return workload_of


@pytest.fixture
async def deaf_url() -> str:
    """Where nobody listens."""
    with contextlib.closing(await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)) as listener:
        port = listener.sockets[0].getsockname()[1]
    await listener.wait_closed()
    return f"http://127.0.0.1:{port}"
