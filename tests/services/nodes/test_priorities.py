"""A request's `priority` from the client to the queues of the nodes: a real router, and nodes with emulated engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import aiohttp
import msgspec
import pytest
from prfaas.common.config import MIB, ClusterConfig, Config, EngineConfig, NodeConfig, RouterConfig, TransportConfig
from prfaas.services.engine.emulated.engine import EmulatedEngine
from prfaas.services.messages import DecodeNodeTimeline
from prfaas.services.node.app import Node, running_node
from prfaas.services.router.app import ROUTER, TIMELINES, listening, make_app
from prfaas.services.web import client_session

CLUSTER = ClusterConfig(secret="a secret of the tests")
Until = Callable[[Callable[[], bool]], Awaitable[None]]


class Served:
    """A router, and nodes that compute one prefill at a time, slowly."""

    def __init__(self, stack: AsyncExitStack, session: aiohttp.ClientSession, until: Until) -> None:
        self.stack, self.session, self.until = stack, session, until

    async def start(self) -> None:
        self.app = make_app(Config(router=RouterConfig(model_path="bytes"), cluster=CLUSTER))
        _, port = await self.stack.enter_async_context(listening(self.app, "127.0.0.1:0"))
        self.url = f"http://127.0.0.1:{port}"

    async def node(self, role: str) -> Node:
        """When this returns, the router uses it."""
        config = Config(
            cluster=CLUSTER,
            node=NodeConfig(name=role, region=role, routers=(self.url,), heartbeat_s=0.1),
            transport=TransportConfig(lanes=2),
            engine=EngineConfig(
                kind="emulated",
                arena_bytes=16 * MIB,
                prefix_bytes=0,
                layers=4,
                decode_step_s=0.005,
                prefill_tokens_per_s=2000,
                prefill_step_tokens=50,
                max_prefills=1,
            ),
        )
        node = await self.stack.enter_async_context(running_node(config, role, EmulatedEngine(config.engine)))
        registry = self.app[ROUTER].registry
        await self.until(lambda: registry.count(role, "usable", time.monotonic()) == 1)
        return node

    async def ask(self, name: str, prompt: str, priority: int, route: str) -> DecodeNodeTimeline:
        """All in one process: of one clock."""
        body = {"model": "emulated", "prompt": prompt, "max_tokens": 2, "priority": priority}
        headers = {"x-request-id": name, "x-prfaas-pin-route": route}
        async with self.session.post(self.url + "/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
            await response.read()
        record = self.app[TIMELINES].get(name)
        assert record is not None
        assert record.node is not None
        return msgspec.json.decode(record.node, type=DecodeNodeTimeline)


@pytest.fixture
async def served(until: Until) -> AsyncIterator[Served]:
    async with client_session() as session, AsyncExitStack() as stack:
        made = Served(stack, session, until)
        await made.start()
        yield made


@pytest.mark.parametrize("route", ["local", "offload"])
async def test_the_queue_of_a_node_follows_priorities(served: Served, until: Until, route: str) -> None:
    """While one prefill computes, others come: the lowest priority starts next, equal ones as they came, and the one
    that computes is not held up by any of them."""
    queue = (await served.node("decode")).engine
    # The emulated engine opens one transfer ahead of its turn; that one has begun.
    ahead = [("opened", 60, -20)] if route == "offload" else []
    if route == "offload":
        queue = (await served.node("prefill")).engine
    asked: dict[str, asyncio.Task[DecodeNodeTimeline]] = {}
    for name, tokens, priority in (
        ("running", 1500, 100), *ahead, ("usual", 60, 0), ("late", 60, 0), ("batch", 60, 9), ("urgent", 60, -9),
    ):  # fmt: skip
        asked[name] = asyncio.create_task(served.ask(name, name[0] * tokens, priority, route))
        await until(lambda: queue.load().queued_requests == len(asked))
    async with asyncio.timeout(20):
        await asyncio.gather(*asked.values())
    started_s = {name: task.result().started_s or 0.0 for name, task in asked.items()}
    expected = ["running", *(name for name, _, _ in ahead), "urgent", "usual", "late", "batch"]
    assert sorted(asked, key=started_s.__getitem__) == expected
    assert (asked["running"].result().ended_s or 0.0) <= started_s[expected[1]]
