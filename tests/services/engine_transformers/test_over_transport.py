"""Two engines joined by the real transport, in one process: over memory lanes and over TCP on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prfaas.common.config import TransportConfig
from prfaas.services.engine.api import DecodeRequest, DecodeTimeline
from prfaas.services.engine.transformers.families import VERIFIED
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
    transport = TransportConfig(bind="127.0.0.1:0", lanes=2, chunk_bytes=4096, codec="zstd")
    network = MemoryNetwork() if backend == "memory" else None
    prompts = [[(5 + 7 * i * k) % 990 + 5 for i in range(n)] for k, n in enumerate([2, 30, 49, 130, 200, 301], 1)]
    settings = {"model": str(tiny_model(model_type)), "prefill_step_tokens": 40}
    async with toolbox.regions(transport, network, **settings) as regions:
        expected = []
        for prompt in prompts:
            request = DecodeRequest("local", prompt, 8, toolbox.GREEDY)
            expected.append((await toolbox.collect(regions.decode.decode(request, []))).token_ids)
        journeys = await asyncio.wait_for(asyncio.gather(*(regions.generate(prompt, 8) for prompt in prompts)), WAIT_S)
    assert [journey.answer.token_ids for journey in journeys] == expected
    for journey in journeys:
        timeline = journey.answer.events[0]
        assert isinstance(timeline, DecodeTimeline)
        assert None not in timeline.arrived_s
        assert journey.receiver.report.peer_timings["computed_s"] == journey.done.computed_s
