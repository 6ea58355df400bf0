"""Whatever dies: no engine spins, no block stays taken, the client hears what happened, the next request works."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import NEAR_TIE, VllmCluster, descendants, near_tie

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

TOKENS = 8
IDLE_SHARE = 0.5
"""Of a core, at most, by all processes of a vLLM that has nothing to do: one that spins takes a whole one."""


async def works(cluster: VllmCluster, prompt: list[int]) -> None:
    answer = await cluster.offloaded(prompt, TOKENS)
    assert answer["headers"]["x-prfaas-prefill"] == "prefill-1"
    await cluster.idle()


async def chunks(cluster: VllmCluster, prompt: list[int], tokens: int) -> AsyncIterator[dict[str, Any]]:
    async for chunk in cluster.stream(prompt, tokens, ignore_eos=True):
        yield chunk


async def under_way(cluster: VllmCluster) -> None:
    """Until KV of a transfer has reached the decode node."""
    seen = (await cluster.metrics("decode")).get("prfaas_transport_received_bytes_total", {})
    await cluster.wait_for(lambda m: m.get("prfaas_transport_received_bytes_total", {}) != seen, "decode")


def processor_s(process: Any) -> float:
    """CPU seconds so far of a process and its descendants."""
    ticks = 0
    for pid in (process.pid, *descendants(process.pid)):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def does_not_spin(cluster: VllmCluster, role: str) -> None:
    process = cluster.servers[role].process
    before_s = processor_s(process)
    await asyncio.sleep(2.0)  # what is measured is a rate
    assert (processor_s(process) - before_s) / 2.0 < IDLE_SHARE


async def test_a_client_that_leaves_in_the_middle_of_its_stream(vllm_cluster, prompts):
    async with contextlib.aclosing(chunks(vllm_cluster, prompts[100], 2000)) as stream:
        async for _ in stream:
            break
    await vllm_cluster.idle()
    await works(vllm_cluster, prompts[129])


async def test_a_client_that_leaves_while_kv_is_on_its_way(vllm_cluster, prompts):
    with vllm_cluster.servers["prefill"].slowly():
        request = asyncio.create_task(vllm_cluster.offloaded(prompts[700], TOKENS))
        await under_way(vllm_cluster)
        request.cancel()
        await asyncio.wait([request])
        await vllm_cluster.idle()
    await works(vllm_cluster, prompts[129])


async def test_the_link_dies_in_the_middle_of_a_transfer(vllm_cluster, prompts):
    """The answer comes all the same: the decode side computes the prompt itself."""
    alone = await vllm_cluster.servers["decode"].complete(vllm_cluster.session, prompts[700], TOKENS)
    with vllm_cluster.servers["prefill"].slowly():
        request = asyncio.create_task(vllm_cluster.offloaded(prompts[700], TOKENS, pin=False))
        await under_way(vllm_cluster)
        vllm_cluster.processes["wan"].kill()
        answer = await request
    assert near_tie(alone, answer["text"]) in (None, pytest.approx(0, abs=NEAR_TIE))
    await vllm_cluster.idle()
    await does_not_spin(vllm_cluster, "decode")
    vllm_cluster.processes["wan"].start()
    await vllm_cluster.wait_for(lambda m: m.get("prfaas_router_nodes", {}).get('role="prefill",state="usable"', 0) == 1)
    await works(vllm_cluster, prompts[129])


async def test_the_prefill_vllm_is_killed_in_the_middle_of_a_transfer(vllm_cluster, prompts):
    alone = await vllm_cluster.servers["decode"].complete(vllm_cluster.session, prompts[700], TOKENS)
    with vllm_cluster.servers["prefill"].slowly():
        request = asyncio.create_task(vllm_cluster.offloaded(prompts[700], TOKENS, pin=False))
        await under_way(vllm_cluster)
        vllm_cluster.servers["prefill"].kill()
        answer = await request
    assert near_tie(alone, answer["text"]) in (None, pytest.approx(0, abs=NEAR_TIE))
    await vllm_cluster.idle()
    await does_not_spin(vllm_cluster, "decode")
    await vllm_cluster.mend()
    await works(vllm_cluster, prompts[129])


async def test_a_layer_that_is_too_late_costs_its_own_request_alone(vllm_cluster, prompts):
    """vLLM is told of the blocks that did not come; the request is computed again, the other stream goes on."""
    vllm_cluster.stop_nodes()
    await vllm_cluster.start_nodes(decode=["--vllm-stall-s", "60", "--vllm-layer-wait-s", "0.2"])
    alone = await vllm_cluster.servers["decode"].complete(vllm_cluster.session, prompts[257], TOKENS)
    other = asyncio.create_task(vllm_cluster.complete(prompts[33], 150, ignore_eos=True))
    with vllm_cluster.servers["prefill"].slowly():
        answer = await vllm_cluster.offloaded(prompts[257], TOKENS, pin=False)
    assert "x-prfaas-prefill" not in answer["headers"]
    assert near_tie(alone, answer["text"]) in (None, pytest.approx(0, abs=NEAR_TIE))
    assert (await other)["usage"]["completion_tokens"] == 150
    await vllm_cluster.idle()
    # What did not come is not in vLLM's cache either: the same prompt again, in time.
    vllm_cluster.stop_nodes()
    await vllm_cluster.start_nodes()
    await works(vllm_cluster, prompts[257])


async def test_the_router_is_killed_in_the_middle_of_a_stream(vllm_cluster, prompts):
    with contextlib.suppress(Exception):
        async for _ in chunks(vllm_cluster, prompts[100], 2000):
            vllm_cluster.processes["router"].kill()
    await vllm_cluster.idle()
    await vllm_cluster.mend()
    await works(vllm_cluster, prompts[129])


async def test_a_node_is_killed_while_its_vllm_waits_for_kv(vllm_cluster, prompts):
    """vLLM goes on: a new node finds it as it was."""
    with vllm_cluster.servers["prefill"].slowly():
        request = asyncio.create_task(vllm_cluster.offloaded(prompts[700], TOKENS))
        await under_way(vllm_cluster)
        vllm_cluster.processes["decode"].signal(signal.SIGKILL)
        with contextlib.suppress(AssertionError):
            await request
    assert vllm_cluster.servers["decode"].process.alive
    await vllm_cluster.idle()
    await does_not_spin(vllm_cluster, "decode")
    await vllm_cluster.mend()
    await works(vllm_cluster, prompts[129])


async def test_the_decode_vllm_is_killed_in_the_middle_of_a_stream(vllm_cluster, prompts):
    """There is no other decode node: the client's stream ends with an error that says so."""
    last: dict[str, Any] = {}
    async for chunk in chunks(vllm_cluster, prompts[100], 2000):
        if not last:
            vllm_cluster.servers["decode"].kill()
        last = chunk
    assert "error" in last
    await vllm_cluster.servers["prefill"].idle(vllm_cluster.session)
    await vllm_cluster.mend()
    await works(vllm_cluster, prompts[129])
