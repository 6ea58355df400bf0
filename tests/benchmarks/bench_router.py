"""What the router costs: CPU a request and a relayed token, and what it adds to the time to first token.

    python -m tests.benchmarks.bench_router [--requests 1600] [--tokens 64]

Everything is a real process on loopback: the router, a stub that plays a prefill and a decode node, and a bare aiohttp
proxy in front of the same stub as the yardstick. Prompts are 512 token ids; the tokenizer's cost is printed beside.
Prints one JSON object. A benchmark is not a test: read it against the proxy's figures of the same run; the ratios are
paired, round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Coroutine, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from prfaas.common import log
from prfaas.common.config import ClusterConfig, Config, RouterConfig
from prfaas.common.metrics import Metrics
from prfaas.services import web as services_web
from prfaas.services.engine.tokenizer import load_tokenizer
from prfaas.services.messages import (
    DecodeCall,
    FormatMessage,
    Heartbeat,
    KvAddressMessage,
    LoadMessage,
    PrefillCall,
    PrefillResult,
    SamplingMessage,
    TicketEvent,
)
from prfaas.services.router.app import collect_seldom, make_app
from prfaas.services.web import Signer, signed_post
from yarl import URL

SECRET = b"bench"
CLUSTER = ClusterConfig(secret=SECRET.decode())
PROMPT_TOKENS = 512
STREAMS = 8
ROUNDS = 10
TOKEN_GAP_S = 0.003
REQUEST_US, TOKEN_US, ADDED_TTFT_MS = 400, 35, 1.5
PROXY_REQUEST_US, PROXY_TOKEN_US = 128, 23
"""The targets, and what the proxy costs on the machine for which they were set."""
Request = Callable[[int], Coroutine[Any, Any, Any]]
"""Makes one request for so many tokens."""
Side = tuple[multiprocessing.Process, Request]
encode = msgspec.json.encode


# -- processes --------------------------------------------------------------------------------------------------------


def in_process(target: Callable[..., Any], *args: Any) -> tuple[multiprocessing.Process, str]:
    """Start `target(pipe, *args)` in a process of its own; it sends the URL where it listens."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(there, *args), daemon=True)
    process.start()
    if not here.poll(60):
        raise TimeoutError(f"{target.__name__} did not start")
    return process, here.recv()  # type: ignore[return-value]


async def _serve(app: web.Application, pipe: Connection) -> None:
    async with services_web.listening(app, "127.0.0.1:0", secret=SECRET) as (host, port):
        pipe.send(f"http://{host}:{port}")
        await services_web.stop_signal()


def router_process(pipe: Connection) -> None:
    # The log line of each request is part of its cost; where it is written to is not.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    log.configure("info")
    collect_seldom()
    config = Config(router=RouterConfig(model_path="bytes"), cluster=CLUSTER)
    services_web.run(_serve(make_app(config), pipe))


def stub_process(pipe: Connection) -> None:
    """Both roles. A decode call's first token comes when its prefill call has come; then one token a TOKEN_GAP_S."""
    app = services_web.make_app(Metrics(), not_ready=lambda: None, max_body_bytes=64 << 20)
    prefilled: dict[str, asyncio.Event] = {}

    async def decode(request: web.Request) -> web.StreamResponse:
        call = msgspec.json.decode(await request.read(), type=DecodeCall)
        event = prefilled[call.request_id] = asyncio.Event()
        response = web.StreamResponse()
        await response.prepare(request)
        ticket = TicketEvent("ticket", [KvAddressMessage("127.0.0.1", 1)], 0, PROMPT_TOKENS - 1)
        await response.write(b"event: ticket\ndata: %b\n\n" % encode(ticket))
        await event.wait()
        del prefilled[call.request_id]
        delta = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
        chunk = {
            "id": call.format.id,
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "m",
            "choices": [delta],
        }
        line = b": ids 12345\ndata: %b\n\n" % encode(chunk)
        for i in range(call.max_output_tokens):
            if i:
                await asyncio.sleep(TOKEN_GAP_S)
            await response.write(line)
        if call.format.stream:
            await response.write(b"data: [DONE]\n\n")
        return response

    async def prefill(request: web.Request) -> web.StreamResponse:
        call = msgspec.json.decode(await request.read(), type=PrefillCall)
        prefilled[call.request_id].set()
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"event: done\ndata: %b\n\n" % encode(PrefillResult(0, 0, 0, 0, 0)))
        return response

    app.router.add_post("/decode", decode)
    app.router.add_post("/prefill", prefill)
    services_web.run(_serve(app, pipe))


def proxy_process(pipe: Connection, target: str) -> None:
    """The yardstick: one call passed on to the stub's /decode with its prefill call beside it, bytes relayed."""
    app = services_web.make_app(Metrics(), not_ready=lambda: None, max_body_bytes=64 << 20)
    app.middlewares.clear()

    async def relay(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        async with app["session"].post(target + "/decode", data=body) as upstream:
            response = web.StreamResponse()
            await response.prepare(request)
            while data := await upstream.content.readany():
                await response.write(data)
            return response

    async def session(app: web.Application) -> Any:
        app["session"] = services_web.client_session()
        yield
        await app["session"].close()

    app.cleanup_ctx.append(session)
    app.router.add_post("/v1/completions", relay)
    services_web.run(_serve(app, pipe))


def cpu_s(process: multiprocessing.Process) -> float:
    """CPU seconds of all its threads, to the nanosecond."""
    tasks = Path(f"/proc/{process.pid}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


# -- measuring --------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, session: aiohttp.ClientSession, stub: str, router: str, proxy: str) -> None:
        self.session, self.stub, self.router, self.proxy = session, stub, router, proxy
        self.signer = Signer.of(SECRET, CLUSTER)
        self.ids = list(range(PROMPT_TOKENS // 2)) * 2
        self.count = 0

    async def beat(self, stub: str = "", name: str = "", *, draining: bool = False) -> None:
        for role in ("prefill", "decode"):
            message = Heartbeat(
                role + name,
                "1",
                "r",
                role,
                stub or self.stub,
                [KvAddressMessage("127.0.0.1", 1)],
                "m",
                "f",
                "l",
                262_144,
                LoadMessage(),
                draining,
            )
            url = URL(self.router) / "nodes" / "heartbeat"
            async with await signed_post(self.session, url, encode(message), self.signer) as response:
                assert response.status == 200, await response.read()

    def decode_call(self, tokens: int) -> DecodeCall:
        self.count += 1
        format = FormatMessage("completion", "cmpl-1", 1, "m", True)
        return DecodeCall(f"by-hand-{self.count}", "bench", self.ids, tokens, SamplingMessage(), format)

    async def by_router(self, tokens: int) -> float:
        """One request; its time to first token."""
        body = encode({"model": "m", "prompt": self.ids, "max_tokens": tokens, "stream": True})
        started_s = time.perf_counter()
        async with self.session.post(self.router + "/v1/completions", data=body) as response:
            assert response.status == 200, await response.read()
            await response.content.readany()
            ttft_s = time.perf_counter() - started_s
            while await response.content.readany():
                pass
        return ttft_s

    async def by_hand(self, tokens: int, through: str | None = None) -> float:
        """The two calls that the router makes, without it; `through` the proxy or to the stub itself."""
        call = self.decode_call(tokens)
        url = f"{through}/v1/completions" if through else f"{self.stub}/decode"
        started_s = time.perf_counter()
        async with self.session.post(url, data=encode(call)) as response:
            data = await response.content.readany()
            ticket = msgspec.json.decode(data.split(b"data: ")[1], type=TicketEvent)
            prefill = PrefillCall(call.request_id, "bench", self.ids, "decode", ticket.ticket, ticket.kv_addresses)
            async with self.session.post(f"{self.stub}/prefill", data=encode(prefill)) as prefilled:
                await response.content.readany()
                ttft_s = time.perf_counter() - started_s
                await prefilled.read()
            while await response.content.readany():
                pass
        return ttft_s

    async def cost(
        self, sides: Mapping[str, Side], requests: int, tokens: int
    ) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """CPU µs of each side a request with one token, and a token more; then the ratios of the first side to the
        second. The sides take turns within each round, and a ratio is of one round: a busy neighbour slows both."""
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        await self.beat()
        for _, one in sides.values():
            await self._turns(one, 4, 2)
        for _ in range(ROUNDS):
            await self.beat()
            for name, (process, one) in sides.items():
                request_us = await self._cpu_us(process, one, requests // ROUNDS, 1)
                stream_us = await self._cpu_us(process, one, requests // ROUNDS // 4, tokens)
                measured[name].append((request_us, (stream_us - request_us) / (tokens - 1)))
        router, proxy = measured.values()
        costs = {
            name: {
                "cpu_us_a_request": round(statistics.median(request for request, _ in rounds), 1),
                "cpu_us_a_token": round(statistics.median(token for _, token in rounds), 2),
            }
            for name, rounds in measured.items()
        }
        ratios = {
            name: round(statistics.median(a[i] / b[i] for a, b in zip(router, proxy, strict=True)), 2)
            for i, name in enumerate(("request_ratio", "token_ratio"))
        }
        return costs, ratios

    async def _cpu_us(self, process: multiprocessing.Process, one: Request, requests: int, tokens: int) -> float:
        """Of one request."""
        turns = max(1, requests // STREAMS)
        before_s = cpu_s(process)
        await self._turns(one, turns, tokens)
        return (cpu_s(process) - before_s) / (turns * STREAMS) * 1e6

    async def _turns(self, one: Request, turns: int, tokens: int) -> None:
        for _ in range(turns):
            await asyncio.gather(*(one(tokens) for _ in range(STREAMS)))

    async def added_ttft(self, requests: int) -> dict[str, float]:
        """Turn by turn, so that a busy neighbour slows both alike."""
        routed, direct, proxied = [], [], []
        for i in range(requests):
            if i % 100 == 0:
                await self.beat()
            routed.append(await self.by_router(1))
            direct.append(await self.by_hand(1))
            proxied.append(await self.by_hand(1, self.proxy))
        routed_s, direct_s, proxied_s = map(statistics.median, (routed, direct, proxied))
        return {
            "ttft_by_hand_p50_ms": round(direct_s * 1e3, 3),
            "ttft_by_router_p50_ms": round(routed_s * 1e3, 3),
            "added_by_router_p50_ms": round((routed_s - direct_s) * 1e3, 3),
            "added_by_proxy_p50_ms": round((proxied_s - direct_s) * 1e3, 3),
        }

    async def long_prompt(self, other_stub: str) -> dict[str, Any]:
        """How long running streams stand still while a prompt of 128K tokens goes through the router to another node,
        against the longest gap in the same time without it."""
        await self.beat()
        gaps: list[float] = []

        async def stream() -> None:
            body = encode({"model": "m", "prompt": self.ids, "max_tokens": 1500, "stream": True})
            async with self.session.post(self.router + "/v1/completions", data=body) as response:
                last_s = time.perf_counter()
                while await response.content.readany():
                    now_s = time.perf_counter()
                    gaps.append(now_s - last_s)
                    last_s = now_s

        prompts = {"ids": [i % 250 for i in range(131_072)], "text": "many words " * 11_915}
        bodies = {name: encode({"model": "m", "prompt": prompt, "max_tokens": 1}) for name, prompt in prompts.items()}
        streams = [asyncio.create_task(stream()) for _ in range(4)]
        await asyncio.sleep(0.5)
        await self.beat(draining=True)
        await self.beat(other_stub, "-other")
        result: dict[str, Any] = {"text_tokens": len(prompts["text"])}
        for name, body in [("nothing", b""), *bodies.items()]:
            worst = []
            for _ in range(5):
                gaps.clear()
                await asyncio.sleep(0.02)
                if body:
                    async with self.session.post(self.router + "/v1/completions", data=body) as response:
                        assert response.status == 200, await response.read()
                        await response.read()
                else:
                    await asyncio.sleep(0.1)
                await asyncio.sleep(0.02)
                worst.append(max(gaps))
            result[f"longest_gap_with_{name}_p50_ms"] = round(statistics.median(worst) * 1e3, 2)
        for task in streams:
            task.cancel()
        await asyncio.wait(streams)
        return result


def tokenizer_cost(model: str) -> dict[str, Any] | None:
    """Milliseconds for a text of about 512 tokens, if a model directory is given."""
    if not model:
        return None
    tokenizer = load_tokenizer(model)
    text = "The quick brown fox jumps over the lazy dog. " * 51
    times = []
    for _ in range(20):
        started_s = time.perf_counter()
        ids = tokenizer.encode(text)
        times.append(time.perf_counter() - started_s)
    return {"tokens": len(ids), "p50_ms": round(statistics.median(times) * 1e3, 3)}


def met(router: Mapping[str, float], ratios: Mapping[str, float], ttft: Mapping[str, float]) -> dict[str, bool]:
    """The project's targets: in µs as on its reference machine, or in the proxy's time, on one that is slower."""
    return {
        "request": router["cpu_us_a_request"] <= REQUEST_US or ratios["request_ratio"] <= REQUEST_US / PROXY_REQUEST_US,
        "token": router["cpu_us_a_token"] <= TOKEN_US or ratios["token_ratio"] <= TOKEN_US / PROXY_TOKEN_US,
        "added_ttft": ttft["added_by_router_p50_ms"] <= ADDED_TTFT_MS,
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    stub, stub_url = in_process(stub_process)
    router, router_url = in_process(router_process)
    proxy, proxy_url = in_process(proxy_process, stub_url)
    other, other_url = in_process(stub_process)
    try:
        async with services_web.client_session() as session:
            bench = Bench(session, stub_url, router_url, proxy_url)
            sides = {
                "router": (router, bench.by_router),
                "aiohttp_proxy": (proxy, lambda tokens: bench.by_hand(tokens, proxy_url)),
            }
            costs, ratios = await bench.cost(sides, options.requests, options.tokens)
            ttft = await bench.added_ttft(options.requests // 4)
            return {
                **costs,
                **ratios,
                "ttft": ttft,
                "met": met(costs["router"], ratios, ttft),
                "prompt_of_128k": await bench.long_prompt(other_url),
                "tokenizer": tokenizer_cost(options.model),
                "prompt_tokens": PROMPT_TOKENS,
                "cores": os.cpu_count(),
            }
    finally:
        for process in (router, proxy, stub, other):
            process.terminate()
            process.join(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1600)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--model", default=os.environ.get("TEST_MODEL_DIR", ""), help="for the tokenizer's cost")
    print(json.dumps(services_web.run(measure(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
