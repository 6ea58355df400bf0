"""A prompt that another vLLM has prefilled is answered as vLLM answers it alone."""

from __future__ import annotations

import asyncio

import pytest

from tests.vllm.conftest import VllmCluster, near_tie, report

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

PASSAGE = (
    "The history of computing began long before electronic machines. Charles Babbage designed the Analytical Engine, "
    "and Ada Lovelace wrote what many consider the first program. The lighthouse keeper wrote the weather down every "
    "morning, and every evening he read it back to the sea. Nobody answered, but the sea was calm on most days. "
)
LENGTHS = (1, 2, 31, 32, 33, 100, 127, 128, 129, 130, 257, 700, 1024, 2049, 3000)
TOKENS = 24
NEAR_TIE = 0.1
"""In logprob: bf16 has 8 bits, and the order of sums differs with the batch."""


@pytest.fixture(scope="module")
def prompts(smollm2_dir):
    from prfaas.services.engine.tokenizer import load_tokenizer

    ids = load_tokenizer(str(smollm2_dir)).encode(PASSAGE * 60)
    return {length: ids[length % 7 : length % 7 + length] for length in LENGTHS}


async def same(cluster: VllmCluster, prompt: list[int]) -> None:
    answer = await cluster.offloaded(prompt, TOKENS)
    alone = await cluster.servers["decode"].complete(cluster.session, prompt, TOKENS)
    margin = near_tie(alone, answer["text"])
    report({"tokens": len(prompt), "same": margin is None, "margin": margin})
    assert margin is None or margin <= NEAR_TIE, f"{answer['text']!r}\n{alone['text']!r}\n{cluster.logs()}"


async def test_each_alone(vllm_cluster, prompts):
    await vllm_cluster.start_vllm(["--enforce-eager", "--no-enable-prefix-caching"])
    for prompt in prompts.values():
        await same(vllm_cluster, prompt)


async def test_eight_at_once(vllm_cluster, prompts):
    await asyncio.gather(*(same(vllm_cluster, prompts[length]) for length in (1, 33, 128, 129, 257, 700, 1024, 2049)))
