"""Every length alone and eight at once, eager and compiled, with and without vLLM's prefix cache. Takes minutes: by
hand, `make test-vllm ARGS="-m matrix -s"`; docs/vllm.md has what it printed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import NEAR_TIE, VllmCluster, cluster_of, near_tie, report

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.matrix,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(1800),
]

TOKENS = 24
AT_ONCE = (1, 33, 128, 129, 257, 700, 1024, 2049)


@pytest.mark.parametrize("caching", ["--enable-prefix-caching", "--no-enable-prefix-caching"])
@pytest.mark.parametrize("mode", [["--enforce-eager"], []], ids=["eager", "compiled"])
async def test_outputs(smollm2_dir: Path, tmp_path: Path, prompts: Any, mode: list[str], caching: str) -> None:
    async with cluster_of(smollm2_dir, tmp_path) as cluster:
        await cluster.start_own(["--max-model-len", "4096", caching, *mode])
        margins = [await margin(cluster, prompt) for prompt in prompts.values()]
        margins += await asyncio.gather(*(margin(cluster, prompts[length]) for length in AT_ONCE))
        # Once more: where there is a cache it now holds them, here and there.
        margins += [await margin(cluster, prompt) for prompt in prompts.values()]
        parted = [each for each in margins if each is not None]
        report({"mode": mode, "caching": caching, "asked": len(margins), "parted": len(parted), "margins": parted})
        assert all(each <= NEAR_TIE for each in parted)


async def margin(cluster: VllmCluster, prompt: list[int]) -> float | None:
    answer = await cluster.offloaded(prompt, TOKENS)
    return near_tie(await cluster.alone(prompt, TOKENS), answer["text"])
