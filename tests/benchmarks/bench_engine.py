"""Figures of the transformers engine; run by hand:  python -m tests.benchmarks.bench_engine --model DIR

Prints one JSON object: decode tokens/s at batch 1 and 8 for contexts of 128 and 2,048 tokens; the longest gap of
running streams while a request joins over a transfer and while a local prefill runs, against their median step.

Both engines and the transport (memory lanes) are in this process, so prefill and decode share its cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from prfaas.common.config import EngineConfig, TransportConfig
from prfaas.common.kv_layout import TokenRange
from prfaas.services.engine.api import DecodeRequest, PrefillRequest, SamplingParams, TokenEvent
from prfaas.services.engine.transformers import kv_memory
from prfaas.services.engine.transformers.decode import DecodeRow, SlipstreamBatch
from prfaas.services.engine.transformers.engine import TransformersEngine
from prfaas.services.engine.transformers.loader import LoadedModel, load
from prfaas.transport.api import TransferSpec
from prfaas.transport.arena import Arena
from prfaas.transport.endpoint import KvEndpoint
from prfaas.transport.lanes.memory import MemoryNetwork

GREEDY = SamplingParams(temperature=0, ignore_eos=True)


class Bench:
    """A prefill engine and a decode engine on memory lanes."""

    async def start(self, model: str, dtype: Any, arena_bytes: int) -> None:
        config = EngineConfig(model=model, dtype=dtype, arena_bytes=arena_bytes)
        self.prefill, self.decode = TransformersEngine(config), TransformersEngine(config)
        await self.prefill.start()
        await self.decode.start()
        network = MemoryNetwork()
        self.endpoints = [
            KvEndpoint(
                TransportConfig(),
                node=node,
                layout=self.decode.info.layout,
                model_fingerprint=self.decode.info.model_fingerprint,
                secret=b"benchmark-secret-benchmark-secret",
                backend=network,
            )
            for node in ("prefill", "decode")
        ]
        for endpoint in self.endpoints:
            await endpoint.start()
        self.endpoints[0].connect("decode", self.endpoints[1].addresses)

    async def close(self) -> None:
        for endpoint in self.endpoints:
            await endpoint.aclose()
        await self.prefill.close()
        await self.decode.close()

    async def stream(self, prompt_tokens: int, output_tokens: int, *, local: bool = False) -> list[float]:
        """Instants of a request's tokens."""
        prompt = [5 + (7 * i + prompt_tokens) % 900 for i in range(prompt_tokens)]
        request = DecodeRequest(secrets.token_hex(4), prompt, output_tokens, GREEDY)
        prefilling = None
        if local:
            events = self.decode.decode(request, [])
        else:
            info = self.decode.info
            spec = TransferSpec(
                secrets.token_hex(16),
                request.request_id,
                TokenRange(0, prompt_tokens - 1),
                prompt_tokens,
                output_tokens,
                info.model_fingerprint,
                info.layout.layout_hash,
            )
            ticket, receiver = self.endpoints[1].receiver(spec)
            events = self.decode.decode(request, [receiver])
            sender = self.endpoints[0].sender(ticket, "decode", self.endpoints[1].addresses)
            prefilling = asyncio.ensure_future(self._prefill(PrefillRequest(request.request_id, prompt), sender))
        instants = [event.at_s async for event in events if isinstance(event, TokenEvent)]
        await events.aclose()
        if prefilling is not None:
            await prefilling
        return instants

    async def _prefill(self, request: PrefillRequest, sender: Any) -> None:
        events = self.prefill.prefill(request, [sender])
        async for _ in events:
            pass
        await events.aclose()


def throughput(loaded: LoadedModel, arena: Arena, context_tokens: int, batch: int, passes: int = 12) -> float:
    """Tokens/s of the decode batch alone: what KV holds does not matter to its speed, so nothing is prefilled."""
    rows = []
    decode = SlipstreamBatch(loaded.model, batch)
    for _ in range(batch):
        row = DecodeRow(7, context_tokens, 0, 1000, GREEDY, 0, (), loaded.model.layer_count, lambda event: None)
        row.kv = kv_memory.carve(arena, loaded.layout, context_tokens + passes + 2)
        row.have_all()
        decode.join(row)
        rows.append(row)
    instants = []
    with torch.inference_mode():
        for _ in range(passes):
            for _ in decode.run_pass():
                pass
            instants.append(time.monotonic())
    for row in rows:
        assert row.kv is not None
        row.kv.free()
    return batch / statistics.median(b - a for a, b in pairwise(instants))


async def gaps(bench: Bench, *, local: bool) -> dict[str, float]:
    """Four streams run; another request of 600 tokens joins."""
    running = [asyncio.ensure_future(bench.stream(128, 120)) for _ in range(4)]
    while bench.decode.load().running_requests < 4 or bench.prefill.load().queued_requests:
        await asyncio.sleep(0.1)
    await asyncio.sleep(2)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    joined = await bench.stream(600, 8, local=local)
    end = loop.time()
    steps = [(a, b - a) for stream in await asyncio.gather(*running) for a, b in pairwise(stream)]
    quiet = statistics.median(step for a, step in steps if not begin - 0.5 <= a <= end)
    longest = max(step for a, step in steps if begin - 0.5 <= a <= end)
    # Prefill and transfer run in this process too: this is what they alone do to the steps.
    median = statistics.median(step for a, step in steps if begin <= a <= end)
    return {
        "median_step_s": quiet,
        "median_step_while_joining_s": median,
        "longest_gap_s": longest,
        "first_token_after_s": joined[0] - begin,
    }


async def main(model: str, dtype: str, arena_bytes: int) -> None:
    result: dict[str, Any] = {"decode_tokens_per_s": {}}
    torch.set_num_threads(1)
    loaded, arena = load(EngineConfig(model=model, dtype=dtype)), Arena(arena_bytes)  # type: ignore[arg-type]
    for context_tokens in (128, 2048):
        single, eight = [throughput(loaded, arena, context_tokens, batch) for batch in (1, 8)]
        result["decode_tokens_per_s"][context_tokens] = {"1": single, "8": eight, "ratio": eight / single}
    bench = Bench()
    await bench.start(model, dtype, arena_bytes)
    result["join_over_transfer"] = await gaps(bench, local=False)
    result["join_by_local_prefill"] = await gaps(bench, local=True)
    await bench.close()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or Hugging Face id")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--arena-bytes", type=int, default=2 << 30)
    options = parser.parse_args()
    asyncio.run(main(options.model, options.dtype, options.arena_bytes))
