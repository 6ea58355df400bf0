"""A model with recurrent states beside attention: the state after n − 1 tokens goes along."""

from __future__ import annotations

import random

import pytest

from tests.tiny_models import add_tokenizer, make_tiny_model
from tests.vllm.conftest import cluster_of, near_tie, report

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

NEAR_TIE = 1e-4
"""In logprob, in fp32."""


async def test_outputs_are_vllms_own(tmp_path):
    model = tmp_path / "tiny-falcon_h1"
    make_tiny_model("falcon_h1", model)
    add_tokenizer(model)
    async with cluster_of(model, tmp_path) as cluster:
        await cluster.start_vllm(["--enforce-eager", "--dtype", "float32", "--no-enable-prefix-caching"])
        for length in (1, 2, 5, 33, 100, 129, 700, 2100):
            prompt = [random.Random(length).randint(5, 999) for _ in range(length)]
            answer = await cluster.offloaded(prompt, 16)
            alone = await cluster.servers["decode"].complete(cluster.session, prompt, 16)
            margin = near_tie(alone, answer["text"])
            report({"tokens": length, "same": margin is None, "margin": margin})
            assert margin is None or margin <= NEAR_TIE, f"{answer['text']!r}\n{alone['text']!r}\n{cluster.logs()}"
