"""The emulated engine without transfers: local prefill, batching, memory, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from prfaas.common.config import MIB, EngineConfig
from prfaas.common.errors import OutOfMemoryError, RequestError
from prfaas.services.engine.api import (
    DecodeDone,
    DecodeRequest,
    DecodeTimeline,
    FinishReason,
    PrefillRequest,
    SamplingParams,
    TokenEvent,
)
from prfaas.services.engine.emulated.device import Device
from prfaas.services.engine.emulated.engine import EmulatedEngine

FAST = EngineConfig(kind="emulated", arena_bytes=4 * MIB, layers=4, time_scale=0.01)
GREEDY = SamplingParams(temperature=0)


@pytest.fixture
async def engine() -> AsyncIterator[EmulatedEngine]:
    made = EmulatedEngine(FAST)
    await made.start()
    yield made
    await made.close()
    assert made.load().free_kv_bytes == FAST.arena_bytes


def request(prompt: bytes = b"hello", max_tokens: int = 8, **more: object) -> DecodeRequest:
    return DecodeRequest("r", list(prompt), max_tokens, more.pop("sampling", GREEDY), **more)


async def run(engine: EmulatedEngine, what: DecodeRequest) -> tuple[list[int], DecodeDone, DecodeTimeline]:
    async with aclosing(engine.decode(what, [])) as events:
        found = [event async for event in events]
    tokens = [e for e in found if isinstance(e, TokenEvent)]
    assert [e.position for e in tokens] == list(
        range(len(what.output_token_ids), len(what.output_token_ids) + len(tokens))
    )
    done, timeline = found[-1], found[0]
    assert isinstance(done, DecodeDone)
    assert isinstance(timeline, DecodeTimeline)
    return [e.token_id for e in tokens], done, timeline


async def test_a_local_prefill_gives_max_tokens_and_a_timeline(engine: EmulatedEngine) -> None:
    tokens, done, timeline = await run(engine, request())
    assert len(tokens) == 8
    assert done == DecodeDone(FinishReason.LENGTH, 8)
    assert timeline.arrived_s == [None] * 4
    instants = [timeline.queued_s, timeline.started_s, timeline.ended_s, *timeline.used_s]
    assert None not in instants
    assert instants == sorted(instants)


async def test_a_resumed_request_goes_on_with_the_same_tokens(engine: EmulatedEngine) -> None:
    whole, _, _ = await run(engine, request(max_tokens=12))
    rest, done, _ = await run(engine, request(max_tokens=12, output_token_ids=whole[:5]))
    assert rest == whole[5:]
    assert done.output_tokens == 12


async def test_a_stop_token_ends_the_output_and_is_not_emitted(engine: EmulatedEngine) -> None:
    whole, _, _ = await run(engine, request(max_tokens=30))
    stop = whole[10]
    first = whole.index(stop)
    tokens, done, _ = await run(
        engine, request(max_tokens=30, sampling=SamplingParams(temperature=0, stop_token_ids=(stop,)))
    )
    assert tokens == whole[:first]
    assert done == DecodeDone(FinishReason.STOP, first, stop)


async def test_eight_at_once_share_their_steps(engine: EmulatedEngine) -> None:
    """Each gets the tokens that it gets alone."""
    prompts = [bytes([65 + i]) * 20 for i in range(8)]
    alone = [(await run(engine, request(p)))[0] for p in prompts]
    together = await asyncio.gather(*(run(engine, request(p)) for p in prompts))
    assert [tokens for tokens, _, _ in together] == alone


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (DecodeRequest("r", [1] * 100, 200_000, GREEDY), OutOfMemoryError),
        (DecodeRequest("r", [1] * 100, 40, GREEDY, timeout_s=0.0), TimeoutError),
    ],
)
async def test_what_cannot_be_done_ends_the_iterator(
    engine: EmulatedEngine, bad: DecodeRequest, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await run(engine, bad)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([], 4, "empty"),
        ([1, 300], 4, "token ids must be from 0 to 256; 300 at position 1 is not"),
        ([1, -1], 4, "-1 at position 1"),
        ([1 << 40], 4, "1099511627776 at position 0"),
        ([1, "x"], 4, "must be token ids"),
        ([1], 300_000, "300001 tokens"),
    ],
)
async def test_what_is_wrong_is_told_at_once(
    engine: EmulatedEngine, prompt: list[int], max_tokens: int, words: str
) -> None:
    """RequestError of the call itself, of either role's; nothing runs."""
    with pytest.raises(RequestError, match=words):
        engine.decode(DecodeRequest("r", prompt, max_tokens, GREEDY), [])
    if max_tokens == 4:
        with pytest.raises(RequestError, match=words):
            engine.prefill(PrefillRequest("r", prompt), [])
    assert engine.load().running_requests == engine.load().queued_requests == 0


async def test_a_request_waits_for_memory_and_then_runs(engine: EmulatedEngine) -> None:
    """Two that don't fit together: the second starts when the first has gone."""
    tokens = 3 * MIB // engine.info.layout.bytes_per_token
    big = request(b"x" * 64, tokens - 64)
    first = engine.decode(big, [])
    await anext(first)
    second = asyncio.create_task(run(engine, request(b"y" * 64, tokens - 64)))
    while engine.load().running_requests < 2:
        await asyncio.sleep(0)
    assert not second.done()
    await first.aclose()
    await asyncio.wait_for(second, 10)


async def test_closing_frees_everything_at_any_moment(engine: EmulatedEngine) -> None:
    """Before its first step, in prefill, in the batch: the memory is free when `aclose` returns, even if cancelled."""
    for events in range(4):
        stream = engine.decode(request(b"x" * 1500, 50), [])
        for _ in range(events):
            await anext(stream)
        closing = asyncio.create_task(stream.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        load = engine.load()
        assert (load.free_kv_bytes, load.running_requests, load.queued_tokens) == (FAST.arena_bytes, 0, 0)


async def test_the_device_alternates_between_prefill_and_decode() -> None:
    """However many prefills wait, a decode step comes after each; and a caller that gave up is passed over."""
    device = Device(0.0)
    order: list[str] = []

    async def work(kind: str, name: str) -> None:
        async with device.turn(kind):
            order.append(name)
            await device.work(1.0)

    async with device.turn("prefill"):
        tasks = [asyncio.create_task(work("prefill", f"p{i}")) for i in range(3)]
        tasks += [asyncio.create_task(work("decode", f"d{i}")) for i in range(2)]
        await asyncio.sleep(0)
        tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == ["d0", "p0", "d1", "p2"]
