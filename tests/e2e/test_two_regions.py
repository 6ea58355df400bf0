"""Real processes in two regions, emulated engines: the life of a request, and what happens when something dies."""

from __future__ import annotations

import asyncio
import signal

import aiohttp
import pytest

FAST = [
    "--engine",
    "emulated",
    "--engine-decode-step-s",
    "0.005",
    "--engine-prefill-tokens-per-s",
    "20000",
    "--engine-arena-bytes",
    "256M",
]
# 4,000 tokens take 4 s of prefill: long enough to act while it goes on.
SLOW_PREFILL = [
    "--engine",
    "emulated",
    "--engine-decode-step-s",
    "0.005",
    "--engine-prefill-tokens-per-s",
    "1000",
    "--engine-arena-bytes",
    "256M",
]
SLOW_DECODE = ["--engine", "emulated", "--engine-decode-step-s", "0.05", "--engine-arena-bytes", "256M"]
ROUTER = ["--model", "bytes"]
PROMPT = list(range(32, 127)) * 20


async def text_of(chunks) -> str:
    return "".join([c["choices"][0]["text"] async for c in chunks if c.get("choices")])


def counted(metrics, name, label):
    return metrics.get(name, {}).get(label, 0)


def inflight_prefill(metrics):
    return metrics["prfaas_node_running_requests"][""] + metrics["prfaas_node_queued_tokens"][""]


async def test_prompt_is_prefilled_far_away_and_answered_here(cluster):
    """An offloaded prompt gives the same text as a local one, streamed or whole, and the KV that crossed the WAN was
    checked byte by byte; the headers say where it went and why."""
    await cluster.start(FAST, ROUTER)
    remote = await cluster.complete(PROMPT, 24)
    assert remote["headers"]["x-prfaas-reason"] == "offloaded"
    assert remote["headers"]["x-prfaas-prefill"] == "prefill-1"
    assert remote["usage"] == {"prompt_tokens": len(PROMPT), "completion_tokens": 24, "total_tokens": len(PROMPT) + 24}
    assert await text_of(cluster.stream(PROMPT, 24)) == remote["choices"][0]["text"]
    texts = await asyncio.gather(*(cluster.complete(PROMPT[: 100 * i], 12) for i in range(1, 9)))
    assert len({t["choices"][0]["text"] for t in texts}) == 8

    cluster.processes["prefill"].stop()
    await cluster.wait_for(lambda m: not counted(m, "prfaas_router_nodes", 'role="prefill",state="usable"'))
    local = await cluster.complete(PROMPT, 24)
    assert local["headers"]["x-prfaas-reason"] == "no_prefill_node"
    assert local["choices"][0]["text"] == remote["choices"][0]["text"]


async def test_timeline_adds_up(cluster):
    """A request's timeline has every layer's computed <= sent <= arrived (within the clocks' error) and used after
    arrival, and its parts sum to the time to the first token."""
    await cluster.start(FAST, ROUTER)
    done = await cluster.complete(PROMPT, 4)
    request_id = done["headers"]["x-request-id"]
    async with cluster.session.get(f"{cluster.router_url}/requests/{request_id}/timeline") as response:
        assert response.status == 200
        timeline = await response.json()
    parts = timeline["ttft_parts"]
    assert set(parts) == {"router_s", "queue_s", "prefill_s", "exposed_s", "first_step_s"}
    assert sum(parts.values()) == pytest.approx(timeline["ttft_s"], abs=0.005)
    slack_s = timeline["clock_error_s"] + 0.001
    assert len(timeline["layers"]) == 8
    for layer in timeline["layers"]:
        assert layer["computed_s"] <= layer["sent_s"] + 1e-6
        assert layer["sent_s"] <= layer["arrived_s"] + slack_s
        assert layer["arrived_s"] <= layer["used_s"] + 1e-3


async def test_killed_prefill_node_means_local_prefill(cluster):
    """SIGKILL while the KV is on its way: the stream that waits for it is prefilled locally with the same text, it is
    counted, and the node is used again when it is back."""
    await cluster.start(SLOW_PREFILL, ROUTER, decode=["--engine-prefill-tokens-per-s", "50000"])
    answer = asyncio.create_task(cluster.complete(PROMPT, 8))
    await cluster.wait_for(lambda m: inflight_prefill(m) > 0, "prefill")
    cluster.processes["prefill"].kill()
    text = (await asyncio.wait_for(answer, 30))["choices"][0]["text"]
    metrics = await cluster.metrics()
    assert sum(metrics["prfaas_router_fallbacks_total"].values()) == 1
    assert text == (await cluster.complete(PROMPT, 8))["choices"][0]["text"]

    cluster.processes["prefill"].start()
    await cluster.wait_for(lambda m: counted(m, "prfaas_router_nodes", 'role="prefill",state="usable"') == 1)
    assert (await cluster.complete(PROMPT[:100], 4))["headers"]["x-prfaas-reason"] == "offloaded"


async def test_stopped_prefill_node_means_local_prefill(cluster):
    """A prefill node that hangs (SIGSTOP: its kernel still acknowledges) is given up within the silence limit."""
    await cluster.start(SLOW_PREFILL, ROUTER, decode=["--engine-prefill-tokens-per-s", "50000"])
    answer = asyncio.create_task(cluster.complete(PROMPT, 8))
    await cluster.wait_for(lambda m: inflight_prefill(m) > 0, "prefill")
    cluster.processes["prefill"].signal(signal.SIGSTOP)
    done = await asyncio.wait_for(answer, 40)
    assert len(done["choices"][0]["text"]) == 8


async def test_killed_decode_node_ends_the_stream_with_an_error(cluster):
    """SIGKILL mid-stream: the client gets an error event, not a hang or a silent end; then 503 with Retry-After until
    the node is back, then service."""
    await cluster.start(SLOW_DECODE, ROUTER)
    chunks = []
    async for chunk in cluster.stream(PROMPT, 2000):
        chunks.append(chunk)
        if len(chunks) == 3:
            cluster.processes["decode"].kill()
    assert "error" in chunks[-1]
    async with cluster.session.post(
        cluster.router_url + "/v1/completions", json={"model": "x", "prompt": [50, 51], "max_tokens": 4}
    ) as response:
        assert response.status in (404, 503)
        if response.status == 503:
            assert int(response.headers["Retry-After"]) >= 1
    cluster.processes["decode"].start()
    await cluster.wait_for(lambda m: counted(m, "prfaas_router_nodes", 'role="decode",state="usable"') == 1)
    assert len((await cluster.complete(PROMPT, 4))["choices"][0]["text"]) == 4


async def test_disconnect_frees_everything_and_costs_no_lane(cluster):
    """A client that leaves during prefill, and one that leaves mid-stream: both nodes are empty again, all memory is
    free, and no lane was lost."""
    await cluster.start(SLOW_PREFILL, ROUTER)
    before = await cluster.metrics("decode")
    answer = asyncio.create_task(cluster.complete(PROMPT, 8))
    await cluster.wait_for(lambda m: inflight_prefill(m) > 0, "prefill")
    answer.cancel()
    await cluster.wait_for(lambda m: inflight_prefill(m) == 0, "prefill", timeout_s=1.5)
    stream = cluster.stream(PROMPT[:500], 5000)
    await anext(stream)
    await stream.aclose()
    free = before["prfaas_node_free_kv_bytes"][""]
    await cluster.wait_for(lambda m: m["prfaas_node_free_kv_bytes"][""] == free, "decode", timeout_s=5)
    after = await cluster.metrics("decode")
    assert sum(after.get("prfaas_transport_lane_losses_total", {}).values()) == 0
    assert after["prfaas_transport_lanes"] == before["prfaas_transport_lanes"]


async def test_restarted_router_finds_its_nodes_again(cluster):
    """A router that is killed and comes back learns of all nodes from their heartbeats."""
    await cluster.start(FAST, ROUTER)
    await cluster.complete(PROMPT, 4)
    cluster.processes["router"].kill()
    cluster.processes["router"].start()
    await cluster.wait_for(
        lambda m: (
            counted(m, "prfaas_router_nodes", 'role="decode",state="usable"') == 1
            and counted(m, "prfaas_router_nodes", 'role="prefill",state="usable"') == 1
        )
    )
    assert (await cluster.complete(PROMPT, 4))["headers"]["x-prfaas-reason"] == "offloaded"


async def test_sigterm_ends_every_service_cleanly(cluster):
    """SIGTERM ends router and nodes with status 0; a stream that runs on a draining node is finished first."""
    await cluster.start(SLOW_DECODE, ROUTER)
    stream = cluster.stream(PROMPT[:100], 30)
    first = await anext(stream)
    cluster.processes["decode"].signal(signal.SIGTERM)
    rest = [c async for c in stream]
    assert "error" not in rest[-1]
    text = "".join(c["choices"][0]["text"] for c in [first, *rest] if c["choices"])
    assert len(text) == 30
    processes = cluster.processes
    status = [
        await asyncio.to_thread(processes["decode"].wait),
        await asyncio.to_thread(processes["prefill"].stop),
        await asyncio.to_thread(processes["router"].stop),
    ]
    assert status == [0, 0, 0], cluster.logs()


async def test_wrong_cluster_secret_is_refused(cluster):
    """Unsigned calls to the nodes and to the router's registration are 401 and change nothing."""
    await cluster.start(FAST, ROUTER)
    for url in (
        cluster.processes["decode"].url + "/decode",
        cluster.processes["prefill"].url + "/prefill",
        cluster.router_url + "/nodes/heartbeat",
    ):
        async with aiohttp.ClientSession() as session, session.post(url, json={}) as response:
            assert response.status == 401
