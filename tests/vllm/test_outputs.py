"""A prompt that another vLLM has prefilled is answered as vLLM answers it alone."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from tests.vllm.conftest import NEAR_TIE, VllmCluster, near_tie, report

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

TOKENS = 24


async def same(cluster: VllmCluster, prompt: list[int]) -> None:
    answer = await cluster.offloaded(prompt, TOKENS)
    if len(prompt) > 1:
        assert answer["headers"]["x-prfaas-prefill"] == "prefill-1"
    alone = await cluster.servers["decode"].complete(cluster.session, prompt, TOKENS)
    margin = near_tie(alone, answer["text"])
    report({"tokens": len(prompt), "same": margin is None, "margin": margin})
    assert margin is None or margin <= NEAR_TIE, f"{answer['text']!r}\n{alone['text']!r}\n{cluster.logs()}"


async def test_each_alone(vllm_cluster, prompts):
    for length in (1, 2, 33, 128, 129, 700, 3000):  # all of LENGTHS: test_matrix
        await same(vllm_cluster, prompts[length])


async def test_eight_at_once(vllm_cluster, prompts):
    await asyncio.gather(*(same(vllm_cluster, prompts[length]) for length in (1, 33, 128, 129, 257, 700, 1024, 2049)))


async def test_decode_begins_before_prefill_has_ended(vllm_cluster, prompts):
    """Layer 0 is used before the last layer has been computed; no layer before it is there."""
    with vllm_cluster.servers["prefill"].slowly():
        answer = await vllm_cluster.offloaded(prompts[257], 4)
    timeline = await vllm_cluster.timeline(answer["headers"]["x-request-id"])
    layers = timeline["layers"]
    computed, arrived, used = ([layer[f"{what}_s"] for layer in layers] for what in ("computed", "arrived", "used"))
    error_s = timeline["clock_error_s"]
    assert used[0] + error_s < computed[-1]
    assert all(at_s < use_s for at_s, use_s in zip(arrived, used, strict=True))
    assert all(earlier <= later for earlier, later in itertools.pairwise(used))


async def test_sampling_and_ends_are_vllms(vllm_cluster, prompts):
    """Seeds, stop tokens and lengths mean what they mean to vLLM."""
    prompt = prompts[100]
    fields = {"temperature": 0.8, "seed": 7, "top_p": 0.9}
    answer = await vllm_cluster.offloaded(prompt, TOKENS, **fields)
    alone = await vllm_cluster.servers["decode"].complete(vllm_cluster.session, prompt, TOKENS, **fields)
    assert near_tie(alone, answer["text"]) in (None, pytest.approx(0, abs=NEAR_TIE))
    stop = alone["token_ids"][5]
    answer = await vllm_cluster.offloaded(prompt, TOKENS, stop_token_ids=[stop], **fields)
    assert answer["finish_reason"] == "stop"
    assert alone["text"].startswith(answer["text"])
    assert len(answer["text"]) < len(alone["text"])
