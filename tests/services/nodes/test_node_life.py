"""A node's life: heartbeats, routers that restart or stop, draining, SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from prfaas.services.engine.emulated.engine import EmulatedEngine
from prfaas.services.node.app import running_node

LONG = bytes(65 + i % 26 for i in range(1500))
SLOW = {"time_scale": 1.0, "decode_step_s": 0.02}

# A router in a process of its own, so that it can be stopped: it answers heartbeats, opens one /decode call at the
# first node that it hears of, and says so.
ROUTER = """
import aiohttp, asyncio, sys, time, msgspec
from aiohttp import web
from yarl import URL
from prfaas.common.config import ClusterConfig
from prfaas.services.messages import Heartbeat, HeartbeatAnswer, to_json
from prfaas.services.web import Signer, client_session, signed_post

async def main(port, secret, call):
    signer = Signer.of(secret.encode(), ClusterConfig())
    nodes = asyncio.Queue()
    async def heartbeat(request):
        now = time.monotonic()
        nodes.put_nowait(msgspec.json.decode(await request.read(), type=Heartbeat))
        return web.Response(body=to_json(HeartbeatAnswer("stoppable", now, time.monotonic(), [])))
    app = web.Application()
    app.router.add_post("/nodes/heartbeat", heartbeat)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print("listening", flush=True)
    node = await nodes.get()
    async with client_session() as session:
        response = await signed_post(session, URL(node.url) / "decode", call.encode(), signer)
        await response.content.readuntil(b"choices")
        print("streaming", flush=True)
        try:
            while await response.content.readany():
                pass
        except aiohttp.ClientError:
            print("cut off", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
"""


class MortalEngine(EmulatedEngine):
    """One that says of itself that it has failed."""

    def on_failure(self, callback: Callable[[], None]) -> None:
        self._on_failure = callback

    def fail(self, why: str) -> None:
        self.failure = why
        self._on_failure()


@contextlib.asynccontextmanager
async def process(*arguments: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    running = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | environment,
    )
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.kill()
        await running.communicate()


async def said(running: asyncio.subprocess.Process, line: str) -> None:
    assert running.stdout is not None
    async with asyncio.timeout(10):
        while (found := await running.stdout.readline()).decode().strip() != line:
            assert found, (await running.stderr.read()).decode() if running.stderr else ""


async def test_leases_of_a_stopped_router_are_freed(cluster: Any, make_call: Any, until: Any, free_port: int) -> None:
    """SIGSTOP: its kernel still takes our bytes and our connections, but heartbeats go unanswered. Its request is
    cancelled and its memory free; another router's request goes on; when it wakes, the node is registered again."""
    router_url = f"http://127.0.0.1:{free_port}"
    call = make_call(b"endless", router="stoppable", max_output_tokens=5000, local_prefill=True)
    arguments = [str(free_port), cluster.signer.secret.decode(), msgspec.json.encode(call).decode()]
    async with process("-c", ROUTER, *arguments) as router:
        await said(router, "listening")
        node = await cluster.node(
            "decode",
            node={"routers": (router_url, cluster.router.url), "router_dead_s": 0.6},
            arena_bytes=32 << 20,
            **SLOW,
        )
        await said(router, "streaming")
        mine, _ = await cluster.decode(node, make_call(b"mine", max_output_tokens=2000, local_prefill=True))
        assert len(node.leases) == 2
        router.send_signal(signal.SIGSTOP)
        try:
            await until(lambda: len(node.leases) == 1)
            await until(lambda: node.engine.load().running_requests == 1)
        finally:
            router.send_signal(signal.SIGCONT)
        assert (await mine.next()).json["object"] == "text_completion"
        await said(router, "cut off")
        await until(lambda: node.router_clock("stoppable") is not None)
        mine.response.close()
        await until(lambda: len(node.leases) == 0)
        metrics = node.metrics.render().decode()
        assert 'prfaas_node_leases_freed_total{reason="router_dead"} 1.0' in metrics


async def test_a_restarted_router_hears_of_the_node_again(cluster: Any, router: Any) -> None:
    """Heartbeats are the registration: after a restart on the same port the next one registers."""
    port = int(router.url.rsplit(":", 1)[1])
    again = type(router)()
    node = await cluster.node("decode")
    await router.stop()
    async with again.listening(port):
        beat = await again.saw(lambda b: True)
        assert (beat.node, beat.epoch, beat.url) == (node.name, node.epoch, node.url)


async def test_a_router_is_not_dead_because_the_node_left(cluster: Any, router: Any) -> None:
    """The last heartbeat is answered as well, and nobody waits for the next one."""
    config = cluster.config("decode", node={"router_dead_s": 1.0})
    async with running_node(config, "decode", EmulatedEngine(config.engine)) as node:
        await router.saw(lambda b: True)
    assert router.seen[-1].leaving
    later = asyncio.Event()
    asyncio.get_running_loop().call_later(1.1, later.set)  # after the timer would have fired
    await later.wait()
    assert "prfaas_node_leases_freed_total{" not in node.metrics.render().decode()


async def test_heartbeats_tell_load_role_and_clocks(cluster: Any, router: Any, make_call: Any) -> None:
    """The role is the command's; the load is the engine's; both clocks are one machine's, so their offset is about 0
    and within the bound that is told."""
    node = await cluster.node("decode", **SLOW)
    stream, _ = await cluster.decode(node, make_call(b"load", max_output_tokens=2000, local_prefill=True))
    beat = await router.saw(lambda b: b.load.running_requests == 1 and b.load.context_tokens > 0)
    assert beat.role == "decode"
    assert beat.region == "decode-region"
    assert beat.load.free_kv_bytes < node.engine.info.arena_bytes
    assert beat.layout_hash == node.engine.info.layout.layout_hash
    beat = await router.saw(lambda b: b.clock_error_s < 1)
    assert abs(beat.clock_offset_s) <= beat.clock_error_s + 1e-4
    assert node.router_clock("router") is not None
    assert node.router_clock("nobody") is None
    stream.response.close()


async def test_sessions_live_as_long_as_a_router_lists_the_peer(cluster: Any, router: Any, until: Any) -> None:
    """Lanes are open before any request and stay open without one, beyond `transport.idle_s`; when no answer names the
    peer any more they close by themselves on both sides, and come back when one does."""
    decode = await cluster.node("decode")
    prefill = await cluster.node("prefill", transport={"idle_s": 1.0})

    def lanes(number: float) -> bool:
        return all(f"prfaas_transport_lanes {number}" in node.metrics.render().decode() for node in (prefill, decode))

    await until(lambda: lanes(2.0))
    heard = len(router.seen)
    await until(lambda: len(router.seen) >= heard + 2 * 15)  # of two nodes, every 0.1 s
    assert "prfaas_transport_lane_losses_total{" not in prefill.metrics.render().decode()
    router.unlisted.add("decode")
    await until(lambda: lanes(0.0))
    router.unlisted.clear()
    await until(lambda: lanes(2.0))


async def test_a_draining_node_takes_nothing_new(cluster: Any, router: Any, make_call: Any) -> None:
    """It tells the routers at once, refuses with Retry-After, is not ready; what runs ends as if nothing were."""
    node = await cluster.node("decode", node={"heartbeat_s": 30.0}, **SLOW)
    stream, _ = await cluster.decode(node, make_call(b"last", max_output_tokens=20, local_prefill=True))
    draining = asyncio.create_task(node.drain(10))
    await router.saw(lambda b: b.draining)
    refused = await cluster.post(node.url, "decode", make_call(b"new", local_prefill=True))
    assert refused.status == 503
    assert refused.response.headers["retry-after"]
    async with cluster.session.get(f"{node.url}/readyz") as response:
        assert response.status == 503
    assert (await stream.rest())[-1].data == "[DONE]"
    await asyncio.wait_for(draining, 10)


async def test_a_node_whose_engine_has_failed_takes_nothing_new(cluster: Any, router: Any, make_call: Any) -> None:
    """A heartbeat tells the routers at once to choose others; until they know, calls of either role are refused with
    Retry-After before their stream begins; /readyz says why."""
    settings = {"make_engine": MortalEngine, "node": {"heartbeat_s": 30.0}}
    decode, prefill = await cluster.node("decode", **settings), await cluster.node("prefill", **settings)
    call = make_call(b"a prompt")
    _, ticket = await cluster.decode(decode, call)
    for node in (decode, prefill):
        node.engine.fail("the engine has stopped computing (a bug); restart this node")
        await router.saw(lambda b, name=node.name: b.node == name and b.draining)
        async with cluster.session.get(f"{node.url}/readyz") as response:
            assert response.status == 503
            assert (await response.json())["reason"] == node.engine.failure
    refused = [
        await cluster.post(decode.url, "decode", make_call(b"new", local_prefill=True)),
        await cluster.prefill(prefill, decode, call, ticket),
    ]
    for answer in refused:
        assert answer.status == 503
        assert answer.response.headers["retry-after"]


async def test_what_outlives_the_drain_is_cancelled(cluster: Any, make_call: Any) -> None:
    node = await cluster.node("decode", **SLOW)
    await cluster.decode(node, make_call(b"endless", max_output_tokens=5000, local_prefill=True))
    await asyncio.wait_for(node.drain(0.05), 10)
    assert len(node.leases) == 0
    assert node.engine.load().running_requests == 0


async def test_sigterm_lets_a_running_request_end(cluster: Any, router: Any, make_call: Any) -> None:
    """A real process: SIGTERM in the middle of a stream; the stream ends with [DONE], the last heartbeat says that it
    leaves, the process ends with 0."""
    settings = {
        "PRFAAS_ENGINE_KIND": "emulated",
        "PRFAAS_ENGINE_ARENA_BYTES": "16M",
        "PRFAAS_NODE_NAME": "process",
        "PRFAAS_NODE_ROUTERS": router.url,
        "PRFAAS_NODE_HEARTBEAT_S": "0.1",
        "PRFAAS_CLUSTER_SECRET": cluster.signer.secret.decode(),
    }
    async with process("-m", "prfaas.services", "decode", **settings) as node:
        beat = await router.saw(lambda b: b.node == "process")
        assert beat.role == "decode"
        stream = await cluster.post(beat.url, "decode", make_call(b"bye", max_output_tokens=30, local_prefill=True))
        await stream.next()
        await stream.next()
        node.send_signal(signal.SIGTERM)
        await router.saw(lambda b: b.draining)
        assert (await stream.rest())[-1].data == "[DONE]"
        await router.saw(lambda b: b.leaving)
        assert await asyncio.wait_for(node.wait(), 10) == 0
