"""A model with recurrent states beside attention: the state after n − 1 tokens goes along."""

from __future__ import annotations

import random

import pytest

from tests.vllm.conftest import VllmCluster, near_tie, report

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

NEAR_TIE = 1e-4
"""In logprob, in fp32."""


@pytest.mark.parametrize("vllm_cluster", ["falcon_h1"], indirect=True)
async def test_outputs_are_vllms_own(vllm_cluster: VllmCluster) -> None:
    await vllm_cluster.start_vllm(["--enforce-eager", "--dtype", "float32", "--no-enable-prefix-caching"])
    for length in (1, 2, 5, 33, 100, 129, 700, 2100):
        prompt = [random.Random(length).randint(5, 999) for _ in range(length)]
        answer = await vllm_cluster.offloaded(prompt, 16)
        alone = await vllm_cluster.servers["decode"].complete(vllm_cluster.session, prompt, 16)
        margin = near_tie(alone, answer["text"])
        report({"tokens": length, "same": margin is None, "margin": margin})
        assert margin is None or margin <= NEAR_TIE, f"{answer['text']!r}\n{alone['text']!r}\n{vllm_cluster.logs()}"
