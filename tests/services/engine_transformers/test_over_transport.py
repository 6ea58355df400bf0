"""Two engines joined by the real transport, in one process: over memory lanes and over TCP on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prfaas.common.config import TransportConfig
from prfaas.common.kv_layout import TokenRange
from prfaas.services.engine.api import DecodeRequest, DecodeTimeline, PrefillDone, PrefillRequest
from prfaas.services.engine.transformers.families import VERIFIED
from prfaas.transport.api import TransferSpec
from prfaas.transport.endpoint import KvEndpoint
from prfaas.transport.lanes.memory import MemoryNetwork

WAIT_S = 30


@pytest.mark.parametrize(
    ("model_type", "backend"), [*((name, "memory") for name in VERIFIED), ("falcon_h1", "tcp"), ("gemma3_text", "tcp")]
)
async def test_disaggregated_equals_local(
    model_type: str, backend: str, tiny_model: Callable[[str], Path], toolbox: Any
) -> None:
    """Six requests at once, chunks of 4 KiB, planes and zstd: the tokens of the decode engine alone; timelines, reports
    and timings come through."""
    settings = {"model": str(tiny_model(model_type)), "prefill_step_tokens": 40}
    prefill, decode = await toolbox.started(**settings), await toolbox.started(**settings)
    network = MemoryNetwork() if backend == "memory" else None
    transport = TransportConfig(bind="127.0.0.1:0", lanes=2, chunk_bytes=4096, codec="zstd")
    endpoints = [
        KvEndpoint(
            transport,
            node=node,
            layout=engine.info.layout,
            model_fingerprint=engine.info.model_fingerprint,
            secret=b"s" * 32,
            backend=network,
        )
        for node, engine in (("prefill", prefill), ("decode", decode))
    ]
    for endpoint in endpoints:
        await endpoint.start()
    endpoints[0].connect("decode", endpoints[1].addresses)

    async def over_the_wire(number: int, prompt: list[int], n: int) -> list[int]:
        spec = TransferSpec(
            f"{number:032x}",
            f"r{number}",
            TokenRange(0, len(prompt) - 1),
            len(prompt),
            n,
            decode.info.model_fingerprint,
            decode.info.layout.layout_hash,
        )
        ticket, receiver = endpoints[1].receiver(spec)
        decoding = decode.decode(DecodeRequest(spec.request_id, prompt, n, toolbox.GREEDY), [receiver])
        sender = endpoints[0].sender(ticket, "decode", endpoints[1].addresses)
        prefilling = asyncio.ensure_future(
            toolbox.collect(prefill.prefill(PrefillRequest(spec.request_id, prompt), [sender]))
        )
        answer = await toolbox.collect(decoding)
        done = (await prefilling).events[-1]
        assert isinstance(done, PrefillDone)
        assert done.reports[0].raw_bytes == decode.info.layout.total_bytes(spec.tokens)
        timeline = answer.events[0]
        assert isinstance(timeline, DecodeTimeline)
        assert None not in timeline.arrived_s
        assert receiver.report.peer_timings["computed_s"] == done.computed_s
        return list(answer.token_ids)

    prompts = [[(5 + 7 * i * k) % 990 + 5 for i in range(n)] for k, n in enumerate([2, 30, 49, 130, 200, 301], 1)]
    expected = []
    for prompt in prompts:
        request = DecodeRequest("local", prompt, 8, toolbox.GREEDY)
        expected.append((await toolbox.collect(decode.decode(request, []))).token_ids)
    got = await asyncio.wait_for(
        asyncio.gather(*(over_the_wire(i, prompt, 8) for i, prompt in enumerate(prompts))), WAIT_S
    )
    assert got == expected
    for engine in (prefill, decode):
        assert engine.load().free_kv_bytes == engine.info.arena_bytes
    for endpoint in endpoints:
        await endpoint.aclose()
    await prefill.close()
    await decode.close()
