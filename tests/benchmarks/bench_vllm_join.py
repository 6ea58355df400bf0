"""What a joining request costs the streams that run, and itself: early release against vLLM's two standard modes.

    .venv-vllm/bin/python -m tests.benchmarks.bench_vllm_join [--rounds 5]

Two real vLLMs (CPU), SmolLM2, 300 prompt tokens; prefill takes 30 ms a layer more, so that its KV arrives over some
0.9 s after the first layer. Modes, of the decode node alone:

    synchronous   vLLM has the request from the first layer on, and its step waits for all the others (vllm.stall_s 60)
    complete      vLLM has it when all KV is there (engine.join when_complete)
    early         when the rest will be there in time (the default)
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp
from prfaas.services.engine.tokenizer import load_tokenizer
from prfaas.services.model_store import ensure_model

from tests.vllm.conftest import PASSAGE, SLOW, VllmCluster

MODES = {
    "synchronous": ["--vllm-stall-s", "60", "--vllm-layer-wait-s", "60"],
    "complete": ["--engine-join", "when_complete"],
    "early": [],
}
PROMPT_TOKENS = 300
SETTLED_TOKENS = 15


async def background(cluster: VllmCluster, settled: asyncio.Event, gaps: list[tuple[float, float]]) -> None:
    """A stream that runs all the while: (when, gap) of each of its tokens."""
    last_s = 0.0
    n = 0
    async for _ in cluster.stream([5, 6, 7], 200, ignore_eos=True):
        now_s = time.monotonic()
        if last_s:
            gaps.append((now_s, now_s - last_s))
        last_s = now_s
        n += 1
        if n == SETTLED_TOKENS:
            settled.set()


async def joined(cluster: VllmCluster, prompt: list[int]) -> tuple[float, float]:
    """TTFT of the new request, and the longest gap that the other stream had meanwhile."""
    settled, gaps = asyncio.Event(), []
    other = asyncio.create_task(background(cluster, settled, gaps))
    await settled.wait()
    began_s = time.monotonic()
    first_s = 0.0
    body = {"model": await cluster.models(), "prompt": prompt, "max_tokens": 5, "temperature": 0, "stream": True}
    headers = {"x-prfaas-pin-route": "offload"}
    async with cluster.session.post(cluster.router_url + "/v1/completions", json=body, headers=headers) as response:
        async for line in response.content:
            if line.startswith(b"data:") and not first_s:
                first_s = time.monotonic()
    await other
    return first_s - began_s, max(gap for at_s, gap in gaps if began_s < at_s < first_s + 0.5)


async def main(rounds: int) -> None:
    model = str(ensure_model("smollm2"))
    ids = load_tokenizer(model).encode(PASSAGE * 60)
    with tempfile.TemporaryDirectory() as folder:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
            cluster = VllmCluster(Path(folder), session, model)
            try:
                await cluster.start_vllm(["--enforce-eager", "--no-enable-prefix-caching"], SLOW)
                print(f"{'mode':12} {'TTFT s':>8} {'longest gap ms':>15}   of {rounds}, medians; (min to max)")
                for mode, flags in MODES.items():
                    cluster.stop_nodes()
                    await cluster.start_nodes(decode=flags)
                    with cluster.servers["prefill"].slowly():
                        await joined(cluster, ids[:PROMPT_TOKENS])
                        results = [await joined(cluster, ids[i : i + PROMPT_TOKENS]) for i in range(1, rounds + 1)]
                    ttft_s, gap_s = zip(*results, strict=True)
                    print(
                        f"{mode:12} {statistics.median(ttft_s):8.2f} {1e3 * statistics.median(gap_s):15.0f}   "
                        f"({min(ttft_s):.2f} to {max(ttft_s):.2f} s, "
                        f"{1e3 * min(gap_s):.0f} to {1e3 * max(gap_s):.0f} ms)"
                    )
            finally:
                cluster.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(main(parser.parse_args().rounds))
