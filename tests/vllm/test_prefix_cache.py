"""vLLM's prefix cache: nodes start their vLLM themselves here. What the decode side holds is not sent, what
the prefill side holds is sent without being computed, and the answers are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import NEAR_TIE, cluster_of, descendants, near_tie, report

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900)]

TOKENS = 16


async def asked(cluster: Any, prompt: list[int], **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer, and its timeline; the answer is the one that vLLM gives alone."""
    answer = await cluster.offloaded(prompt, TOKENS, **fields)
    alone = await cluster.alone(prompt, TOKENS)
    margin = near_tie(alone, answer["text"])
    timeline = await cluster.timeline(answer["headers"]["x-request-id"])
    report({"tokens": len(prompt), "same": margin is None, "margin": margin, "bytes": timeline["kv_raw_bytes"]})
    assert margin is None or margin <= NEAR_TIE
    return answer, timeline


async def test_a_prefix_that_decode_holds_is_not_sent(smollm2_dir: Path, tmp_path: Path, prompts: Any) -> None:
    async with cluster_of(smollm2_dir, tmp_path) as cluster:
        await cluster.start_own(["--max-model-len", "4096", "--enable-prefix-caching", "--enforce-eager"])
        bytes_per_token = 30 * 2 * 3 * 64 * 2
        first, longer = prompts[700], [*prompts[700], *prompts[257]]
        _, timeline = await asked(cluster, first)
        assert timeline["kv_raw_bytes"] == 699 * bytes_per_token
        # Its KV was installed from elsewhere, and is in vLLM's cache all the same.
        answer, timeline = await asked(cluster, longer)
        assert answer["headers"]["x-prfaas-held-tokens"] == "640"
        assert timeline["kv_raw_bytes"] == (len(longer) - 1 - 640) * bytes_per_token
        # Another tenant's prompt shares nothing.
        _, timeline = await asked(cluster, longer, cache_salt="another")
        assert timeline["kv_raw_bytes"] == (len(longer) - 1) * bytes_per_token
        vllms = [pid for name in ("prefill", "decode") for pid in descendants(cluster.processes[name].pid)]
        assert vllms
        for name in ("prefill", "decode"):
            assert cluster.processes[name].stop() == 0
        assert not [pid for pid in vllms if Path(f"/proc/{pid}").exists()]
