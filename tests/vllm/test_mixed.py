"""Clusters of both engines: the embedded one feeds vLLM, and vLLM feeds it."""

from __future__ import annotations

import pytest

from tests.vllm.conftest import near_tie, report

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

NEAR_TIE = 0.2
"""In logprob: two implementations, which round at different places (bf16)."""


@pytest.mark.parametrize("engines", [("transformers", "vllm"), ("vllm", "transformers")], ids="-".join)
async def test_one_engine_goes_on_with_the_others_kv(vllm_cluster, prompts, engines):
    vllm_cluster.stop_nodes()
    await vllm_cluster.start_nodes(engines=engines)
    try:
        for length in (2, 129, 700):
            answer = await vllm_cluster.offloaded(prompts[length], 16)
            assert answer["headers"]["x-prfaas-prefill"] == "prefill-1"
            timeline = await vllm_cluster.timeline(answer["headers"]["x-request-id"])
            assert timeline["kv_raw_bytes"] > 0
            alone = await vllm_cluster.servers["decode"].complete(vllm_cluster.session, prompts[length], 16)
            margin = near_tie(alone, answer["text"])
            report({"engines": engines, "tokens": length, "same": margin is None, "margin": margin})
            assert margin is None or margin <= NEAR_TIE, f"{answer['text']!r}\n{alone['text']!r}"
    finally:
        vllm_cluster.stop_nodes()
        await vllm_cluster.start_nodes()
