"""What the engine promises besides the right tokens: memory, cancellation, order, joins that stall nobody."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prfaas.common.errors import EngineError, OutOfMemoryError, RequestError, TransferCancelledError
from prfaas.common.kv_layout import Shard, TokenRange
from prfaas.services.engine.api import (
    DecodeDone,
    DecodeRequest,
    DecodeTimeline,
    FinishReason,
    PrefillDone,
    PrefillProgress,
    PrefillRequest,
    SamplingParams,
    TokenEvent,
)

PROMPT = list(range(5, 155))
WAIT_S = 20


@pytest.fixture
async def engine(tiny_model: Callable[[str], Path], toolbox: Any) -> AsyncIterator[Any]:
    engine = await toolbox.started(model=str(tiny_model("llama")), prefill_step_tokens=40, arena_bytes=16 << 20)
    free = engine.load().free_kv_bytes
    yield engine
    assert engine.load().free_kv_bytes == free, "all memory has come back"
    assert engine.load().queued_requests == 0
    await engine.close()


@pytest.fixture
def pair(engine: Any, toolbox: Any) -> Any:
    """One engine in both roles."""
    return toolbox.Pair(engine, engine)


async def tokens_of(engine: Any, toolbox: Any, prompt: list[int], n: int, **sampling: Any) -> list[int]:
    params = SamplingParams(**({"temperature": 0, "ignore_eos": True} | sampling))
    return list((await toolbox.collect(engine.decode(DecodeRequest("r", prompt, n, params), []))).token_ids)


def request(n: int = 8, prompt: list[int] = PROMPT, **changes: Any) -> DecodeRequest:
    greedy = SamplingParams(temperature=0, ignore_eos=True)
    return replace(DecodeRequest("r", prompt, n, greedy), **changes)


# -- events -----------------------------------------------------------------------------------------------------------


async def test_timeline_and_reports(pair: Any) -> None:
    """Decode tells when layers arrived and were used, before the first token; prefill tells of its steps and what it
    sent; FINISH carries the same instants."""
    transfer = pair.loopback(len(PROMPT), 4)
    decoding = pair.decode.decode(request(4), [transfer])
    prefilling = pair.prefill.prefill(PrefillRequest("r", PROMPT), [transfer])
    sent = [event async for event in prefilling]
    made = [event async for event in decoding]
    await prefilling.aclose()
    await decoding.aclose()

    assert [e.computed_tokens for e in sent if isinstance(e, PrefillProgress)] == [40, 80, 120, 149]
    done = sent[-1]
    assert isinstance(done, PrefillDone)
    assert done.queued_s <= done.started_s <= min(done.computed_s) <= max(done.computed_s) <= done.ended_s
    assert done.reports[0].raw_bytes == pair.decode.info.layout.total_bytes(TokenRange(0, 149))
    assert transfer.finished_timings is not None
    assert transfer.finished_timings["computed_s"] == done.computed_s

    timeline = made[0]
    assert isinstance(timeline, DecodeTimeline)
    arrived = [at for at in timeline.arrived_s if at is not None]
    assert len(arrived) == len(timeline.used_s) == 4
    assert all(used >= at for at, used in zip(arrived, timeline.used_s, strict=True))
    assert timeline.queued_s is None
    assert [event.position for event in made[1:-1]] == [0, 1, 2, 3]
    assert made[-1] == DecodeDone(FinishReason.LENGTH, 4)


async def test_local_prefill_tells_its_times(engine: Any, toolbox: Any) -> None:
    """No transfer: nothing arrived; queued, started and ended are known."""
    answer = await toolbox.collect(engine.decode(request(2), []))
    timeline = answer.events[0]
    assert timeline.arrived_s == [None] * 4
    assert timeline.queued_s <= timeline.started_s <= timeline.ended_s <= timeline.used_s[0]


@pytest.mark.parametrize("send", ["layerwise", "after_prefill"])
async def test_layers_leave_while_prefill_goes_on(pair: Any, toolbox: Any, send: str) -> None:
    """Every layer of an early step has left before the last step; with send = after_prefill none has before its end."""
    pair.prefill._desk = replace(pair.prefill._desk, config=replace(pair.prefill._desk.config, send=send))
    transfer = pair.loopback(len(PROMPT), 4)
    decoding = pair.decode.decode(request(4), [transfer])
    with paused(pair.prefill):
        prefilling = pair.prefill.prefill(PrefillRequest("r", PROMPT), [transfer])
        await asyncio.wait_for(transfer.opened.wait(), WAIT_S)
    events = [event async for event in prefilling]
    done = events[-1]
    assert isinstance(done, PrefillDone)
    assert len(events) == 5  # four steps, and the end
    assert sorted(transfer.left_s) == [0, 1, 2, 3]
    if send == "layerwise":
        assert max(transfer.left_s.values()) < min(done.computed_s)
    else:
        assert min(transfer.left_s.values()) > max(done.computed_s)
    assert len((await toolbox.collect(decoding)).token_ids) == 4
    await prefilling.aclose()


async def test_stop(engine: Any, toolbox: Any) -> None:
    """A stop token ends the output and is not part of it; end-of-sequence too, unless ignored."""
    tokens = await tokens_of(engine, toolbox, PROMPT, 8)
    stop = tokens[3]
    at = tokens.index(stop)
    greedy = SamplingParams(temperature=0, ignore_eos=True, stop_token_ids=(stop,))
    answer = await toolbox.collect(engine.decode(request(8, sampling=greedy), []))
    assert answer.token_ids == tokens[:at]
    assert answer.events[-1] == DecodeDone(FinishReason.STOP, at, stop)


async def test_seeded_output_is_the_same_in_any_batch_and_when_continued(engine: Any, toolbox: Any) -> None:
    """Same seed, same tokens: alone, among others, and when another decode goes on behind the first tokens."""
    drawn = SamplingParams(temperature=0.8, top_p=0.95, seed=11, ignore_eos=True)
    alone = (await toolbox.collect(engine.decode(request(12, sampling=drawn), []))).token_ids
    others = [SamplingParams(temperature=1, seed=n, ignore_eos=True) for n in range(3)]
    batch = [engine.decode(request(12, sampling=params), []) for params in (drawn, *others)]
    assert (await asyncio.gather(*map(toolbox.collect, batch)))[0].token_ids == alone
    rest = await toolbox.collect(engine.decode(request(12, sampling=drawn, output_token_ids=alone[:5]), []))
    assert rest.token_ids == alone[5:]
    assert next(event for event in rest.events if isinstance(event, TokenEvent)).position == 5
    assert rest.events[-1] == DecodeDone(FinishReason.LENGTH, 12)


async def test_continuation_over_a_transfer(pair: Any, toolbox: Any) -> None:
    """The prefill node gets prompt + delivered tokens as its prompt; decode goes on behind them."""
    tokens = await tokens_of(pair.decode, toolbox, PROMPT, 8)
    context = PROMPT + tokens[:3]
    transfer = pair.loopback(len(context), 8)
    decoding = pair.decode.decode(request(8, output_token_ids=tokens[:3]), [transfer])
    prefilling = asyncio.ensure_future(toolbox.collect(pair.prefill.prefill(PrefillRequest("r", context), [transfer])))
    assert (await toolbox.collect(decoding)).token_ids == tokens[3:]
    await prefilling


async def test_nothing_to_prefill(engine: Any, toolbox: Any) -> None:
    """A prompt of one token has an empty range: decode starts directly, prefill ends at once and opens nothing."""
    assert len(await tokens_of(engine, toolbox, [7], 3)) == 3
    transfer = toolbox.Loopback(engine.info.layout, toolbox.transfer_spec(engine, 1, 3))
    events = (await toolbox.collect(engine.prefill(PrefillRequest("r", [7]), [transfer]))).events
    assert [type(event) for event in events] == [PrefillDone]
    assert transfer.opens == 0


# -- ranges and shards ------------------------------------------------------------------------------------------------


async def test_only_the_range_is_sent(engine: Any, toolbox: Any) -> None:
    """Tokens [100, 149) of 150: all is computed, the range is sent, with the bytes that a whole transfer has there."""
    whole, part = (
        toolbox.Loopback(
            engine.info.layout, toolbox.transfer_spec(engine, 150, 4, tokens=TokenRange(start, 149)), announce=False
        )
        for start in (0, 100)
    )
    for transfer in (whole, part):
        transfer.bind(lambda spec: Memory(engine.info.layout, spec), lambda layer: None, lambda error: None)
        await toolbox.collect(engine.prefill(PrefillRequest("r", PROMPT), [transfer]))
    row = slice(100 * 32 * 4, 149 * 32 * 4)
    assert bytes(part._destination.row(3, 0, 1)) == bytes(whole._destination.row(3, 0, 1)[row])
    assert part.report.raw_bytes == engine.info.layout.total_bytes(TokenRange(100, 149))


class Memory:
    """A destination of its own."""

    def __init__(self, layout: Any, spec: Any) -> None:
        self._rows = {
            (layer, tensor, row): memoryview(bytearray(layout.extent(layer, tensor, spec.tokens).row_bytes))
            for layer in range(4)
            for tensor in range(2)
            for row in range(2)
        }

    def row(self, layer: int, tensor: int, row: int) -> memoryview:
        return self._rows[layer, tensor, row]


async def test_two_shards(pair: Any, toolbox: Any) -> None:
    """KV in two transfers of one head each gives the tokens of one transfer."""
    expected = await tokens_of(pair.decode, toolbox, PROMPT, 8)
    shards = [Shard(0, 2, 0, 1), Shard(1, 2, 1, 2)]
    transfers = [pair.loopback(len(PROMPT), 8, shard=shard) for shard in shards]
    decoding = pair.decode.decode(request(8), transfers)
    prefilling = asyncio.ensure_future(toolbox.collect(pair.prefill.prefill(PrefillRequest("r", PROMPT), transfers)))
    assert (await toolbox.collect(decoding)).token_ids == expected
    await prefilling


async def test_a_prefix_that_decode_does_not_hold_is_refused(pair: Any, toolbox: Any) -> None:
    """A range that starts behind what this request holds would leave a hole."""
    spec = toolbox.transfer_spec(pair.decode, len(PROMPT), 8, tokens=TokenRange(64, 149))
    transfer = toolbox.Loopback(pair.decode.info.layout, spec)
    with pytest.raises(EngineError, match=r"holds 0 and needs \[0, 149\)"):
        await toolbox.collect(pair.decode.decode(request(8), [transfer]))
    with pytest.raises(EngineError, match=r"holds 0 and needs \[0, 149\)"):
        await transfer.open()


# -- joining ----------------------------------------------------------------------------------------------------------


async def test_a_joining_request_stalls_nobody(pair: Any, toolbox: Any) -> None:
    """While a request waits for its layers, halfway through the model, others go on; when the last layer is here its
    tokens are right, and it used each layer as it came."""
    expected = await tokens_of(pair.decode, toolbox, PROMPT, 6)
    running = pair.decode.decode(request(3000, prompt=[9, 8, 7]), [])
    await passes(running, 1)

    transfer = pair.loopback(len(PROMPT), 6, announce=False)
    joining = pair.decode.decode(request(6), [transfer])
    await toolbox.collect(pair.prefill.prefill(PrefillRequest("r", PROMPT), [transfer]))
    first = asyncio.ensure_future(anext(joining))
    for layer in range(4):
        await passes(running, 3)
        assert not first.done()
        transfer.announce_layer(layer)
    timeline = await asyncio.wait_for(first, WAIT_S)
    for arrived, used in zip(timeline.arrived_s[1:], timeline.used_s, strict=False):
        assert used < arrived, "a layer was used before the next one had arrived"
    assert (await toolbox.collect(joining)).token_ids == expected
    await running.aclose()


async def passes(running: AsyncIterator[Any], count: int) -> None:
    """Wait until the stream has had this many tokens from now on (some may lie in its queue already)."""
    now = time.monotonic()
    while count:
        event = await asyncio.wait_for(anext(running), WAIT_S)
        count -= isinstance(event, TokenEvent) and event.at_s > now


async def test_a_join_with_nobody_running(pair: Any, toolbox: Any) -> None:
    """The thread sleeps between arrivals and advances the joiner at each."""
    expected = await tokens_of(pair.decode, toolbox, PROMPT, 6)
    transfer = pair.loopback(len(PROMPT), 6, announce=False)
    joining = pair.decode.decode(request(6), [transfer])
    await toolbox.collect(pair.prefill.prefill(PrefillRequest("r", PROMPT), [transfer]))
    for layer in (0, 2, 1, 3):
        transfer.announce_layer(layer)
        await asyncio.sleep(0)
    assert (await toolbox.collect(joining)).token_ids == expected


async def test_join_when_complete_waits_for_all(tiny_model: Callable[[str], Path], toolbox: Any) -> None:
    """The baseline uses no layer before the last one has arrived, though passes go by meanwhile."""
    engine = await toolbox.started(model=str(tiny_model("llama")), join="when_complete")
    running = engine.decode(request(3000, prompt=[9, 8, 7]), [])
    transfer = toolbox.Pair(engine, engine).loopback(len(PROMPT), 4, announce=False)
    joining = engine.decode(request(4), [transfer])
    await toolbox.collect(engine.prefill(PrefillRequest("r", PROMPT), [transfer]))
    for layer in range(4):
        transfer.announce_layer(layer)
        await passes(running, 2)
    timeline = (await toolbox.collect(joining)).events[0]
    assert min(timeline.used_s) >= max(timeline.arrived_s)
    await running.aclose()
    await engine.close()


async def test_more_requests_than_the_batch_holds(tiny_model: Callable[[str], Path], toolbox: Any) -> None:
    """The others wait for a place and get the same tokens."""
    engine = await toolbox.started(model=str(tiny_model("llama")), max_batch=2)
    expected = await tokens_of(engine, toolbox, PROMPT, 6)
    answers = await asyncio.gather(*(tokens_of(engine, toolbox, PROMPT, 6) for _ in range(5)))
    assert answers == [expected] * 5
    await engine.close()


# -- order ------------------------------------------------------------------------------------------------------------


async def test_a_short_prompt_overtakes_a_long_one(engine: Any, toolbox: Any) -> None:
    """Steps interleave: a prompt of one step, sent after one of fifty, ends first by far."""
    long = toolbox.Loopback(engine.info.layout, toolbox.transfer_spec(engine, 2000, 1), announce=False)
    short = toolbox.Loopback(engine.info.layout, toolbox.transfer_spec(engine, 30, 1), announce=False)
    for transfer in (long, short):
        transfer.bind(lambda spec: Sink(), lambda layer: None, lambda error: None)
    slow = engine.prefill(PrefillRequest("long", [5] * 2000), [long])
    await asyncio.wait_for(anext(slow), WAIT_S)
    await asyncio.wait_for(toolbox.collect(engine.prefill(PrefillRequest("short", [5] * 30), [short])), WAIT_S)
    progress = [event.computed_tokens async for event in slow if isinstance(event, PrefillProgress)]
    assert long.finished_timings is not None
    assert short.finished_timings is not None
    assert short.finished_timings["ended_s"] < long.finished_timings["ended_s"]
    assert progress[-1] == 1999
    await slow.aclose()


class Sink:
    """A destination that keeps nothing."""

    def __init__(self) -> None:
        self._bytes = memoryview(bytearray(1 << 20))

    def row(self, layer: int, tensor: int, row: int) -> memoryview:
        return self._bytes


async def test_no_room_steps_aside(pair: Any, toolbox: Any) -> None:
    """A prefill whose receiver has no room asks again, while others go on, and then gives the right tokens."""
    expected = await tokens_of(pair.decode, toolbox, PROMPT, 4)
    refused = pair.loopback(len(PROMPT), 4, rooms=20)
    decoding = pair.decode.decode(request(4), [refused])
    prefilling = asyncio.ensure_future(toolbox.collect(pair.prefill.prefill(PrefillRequest("r", PROMPT), [refused])))
    assert (await pair.generate(PROMPT, 4)).token_ids == expected
    assert (await toolbox.collect(decoding)).token_ids == expected
    await prefilling
    assert refused.opens == 21


async def test_no_room_after_all_was_computed(pair: Any, toolbox: Any) -> None:
    """A short prompt is computed while OPEN is on its way; "no room" then costs neither the KV nor the tokens."""
    expected = await tokens_of(pair.decode, toolbox, PROMPT, 4)
    transfer = pair.loopback(len(PROMPT), 4, rooms=3)
    transfer.answer.clear()
    decoding = pair.decode.decode(request(4), [transfer])
    prefilling = pair.prefill.prefill(PrefillRequest("r", PROMPT), [transfer])
    while (await asyncio.wait_for(anext(prefilling), WAIT_S)).computed_tokens < 149:
        pass
    while pair.prefill.load().queued_requests:
        await asyncio.sleep(0.001)
    transfer.answer.set()
    rest = await asyncio.wait_for(toolbox.collect(prefilling), WAIT_S)
    assert [type(event) for event in rest.events] == [PrefillDone]
    assert (await toolbox.collect(decoding)).token_ids == expected


# -- memory -----------------------------------------------------------------------------------------------------------


async def test_reserve_when_the_arena_is_full(tiny_model: Callable[[str], Path], toolbox: Any) -> None:
    """Requests that don't fit at the same time wait for memory: over transfers they are told "no room", local ones
    queue. All get their tokens."""
    engine = await toolbox.started(model=str(tiny_model("llama")), arena_bytes=1 << 20)
    pair = toolbox.Pair(engine, engine)
    expected = (await pair.generate(PROMPT, 10)).token_ids
    local = [tokens_of(engine, toolbox, PROMPT, 10) for _ in range(4)]
    assert await asyncio.wait_for(asyncio.gather(*local), WAIT_S) == [expected] * 4
    prefill = await toolbox.started(model=str(tiny_model("llama")))
    answers = await asyncio.wait_for(
        asyncio.gather(*(toolbox.Pair(prefill, engine).generate(PROMPT, 10) for _ in range(4))), WAIT_S
    )
    assert [answer.token_ids for answer in answers] == [expected] * 4
    assert engine.load().free_kv_bytes == engine.info.arena_bytes
    await engine.close()
    await prefill.close()


async def test_what_can_never_fit_is_refused(tiny_model: Callable[[str], Path], toolbox: Any) -> None:
    """At once, and the sender's OPEN too, for good."""
    engine = await toolbox.started(model=str(tiny_model("llama")), arena_bytes=1 << 20)
    transfer = toolbox.Loopback(engine.info.layout, toolbox.transfer_spec(engine, 150, 3000))
    with pytest.raises(OutOfMemoryError, match="3150 tokens"):
        await toolbox.collect(engine.decode(request(3000), [transfer]))
    with pytest.raises(EngineError, match="doesn't fit"):
        await transfer.open()
    await engine.close()


# -- cancellation and failure -----------------------------------------------------------------------------------------


async def test_closing_a_decode_frees_its_memory(engine: Any, toolbox: Any) -> None:
    """Mid-stream, and before it has begun; the transfer is closed when aclose returns."""
    free = engine.load().free_kv_bytes
    running = engine.decode(request(400), [])
    await asyncio.wait_for(anext(running), WAIT_S)
    assert engine.load().free_kv_bytes < free
    assert engine.load().running_requests == 1
    await running.aclose()
    assert engine.load().free_kv_bytes == free
    transfer = toolbox.Loopback(engine.info.layout, toolbox.transfer_spec(engine, 150, 8))
    waiting = engine.decode(request(8), [transfer])
    await waiting.aclose()
    assert isinstance(transfer.failed, TransferCancelledError)


async def test_closing_a_prefill_stops_computing(engine: Any, toolbox: Any) -> None:
    """Closed in the middle of a long prompt, it computes no further, and its memory is back when aclose returns."""
    transfer = toolbox.Loopback(engine.info.layout, toolbox.transfer_spec(engine, 3000, 8), announce=False)
    transfer.bind(lambda spec: Sink(), lambda layer: None, lambda error: None)
    free = engine.load().free_kv_bytes
    prefilling = engine.prefill(PrefillRequest("r", [5] * 3000), [transfer])
    await asyncio.wait_for(anext(prefilling), WAIT_S)
    await prefilling.aclose()
    assert engine.load().free_kv_bytes == free
    assert engine.load().queued_tokens == 0
    assert transfer.finished_timings is None
    assert isinstance(transfer.failed, TransferCancelledError)


async def test_a_decode_that_is_closed_while_it_waits_takes_no_memory_any_more(
    tiny_model: Callable[[str], Path], toolbox: Any
) -> None:
    """The slot before it comes free while its close waits for the computing thread: it stays empty."""
    engine = await toolbox.started(model=str(tiny_model("llama")), max_prefills=1)
    try:
        with paused(engine):
            computing = engine.decode(request(), [])
            free = engine.load().free_kv_bytes
            waiting = engine.decode(request(), [])
            closing = asyncio.ensure_future(waiting.aclose())
            for _ in range(10):
                await asyncio.sleep(0)
            assert not closing.done()
            computing.fail(EngineError("its slot is free"))
            engine._desk.line.leave(next(life for life in engine._lives if life.stream is computing))
            assert engine.load().free_kv_bytes == free
            assert engine.load().queued_requests == 0
        await asyncio.wait_for(closing, WAIT_S)
        await computing.aclose()
    finally:
        await engine.close()


async def test_memory_of_a_prefill_that_steps_aside_is_kept_until_the_thread_is_done(pair: Any, toolbox: Any) -> None:
    """Closed in the middle of stepping aside, its memory comes back only after the computing thread has let go."""
    free = pair.prefill.load().free_kv_bytes
    transfer = pair.loopback(len(PROMPT), 4, rooms=1)
    decoding = pair.decode.decode(request(4), [transfer])
    with paused(pair.prefill):
        prefilling = pair.prefill.prefill(PrefillRequest("r", PROMPT), [transfer])
        await soon(lambda: transfer.opens == 1)
        closing = asyncio.ensure_future(prefilling.aclose())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not closing.done()
        assert pair.prefill.load().free_kv_bytes < free
    await asyncio.wait_for(closing, WAIT_S)
    assert pair.prefill.load().free_kv_bytes == free
    await decoding.aclose()


@contextmanager
def paused(engine: Any) -> Iterator[None]:
    """The computing thread stands still, as in the middle of a long step."""
    gate = threading.Event()
    engine._desk.stepper._submit(lambda: gate.wait(WAIT_S))
    try:
        yield
    finally:
        gate.set()


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0)


async def test_a_transfer_that_fails_behind_its_last_layer_changes_nothing(pair: Any, toolbox: Any) -> None:
    """All KV is here, only FINISH was lost: the stream goes on."""
    expected = await tokens_of(pair.decode, toolbox, PROMPT, 8)
    transfer = pair.loopback(len(PROMPT), 8)
    decoding = pair.decode.decode(request(), [transfer])
    await toolbox.collect(pair.prefill.prefill(PrefillRequest("r", PROMPT), [transfer]))
    assert isinstance(await anext(decoding), DecodeTimeline)
    transfer.fail(TransferCancelledError("the lane died"))
    assert (await toolbox.collect(decoding)).token_ids == expected


async def test_a_failed_transfer_ends_both_sides(pair: Any, toolbox: Any) -> None:
    """The transport's error ends the iterators as it is, and prefill stops computing."""
    transfer = pair.loopback(3000, 8)
    decoding = pair.decode.decode(request(8, prompt=[5] * 3000), [transfer])
    prefilling = pair.prefill.prefill(PrefillRequest("r", [5] * 3000), [transfer])
    await asyncio.wait_for(anext(prefilling), WAIT_S)
    transfer.fail(TransferCancelledError("the other side has gone"))
    for events in (prefilling, decoding):
        with pytest.raises(TransferCancelledError, match="has gone"):
            await asyncio.wait_for(toolbox.collect(events), WAIT_S)
    assert transfer.finished_timings is None


async def test_timeouts(engine: Any, toolbox: Any) -> None:
    """A request that takes longer than its timeout_s ends with TimeoutError, wherever it is."""
    with pytest.raises(TimeoutError, match=r"longer than 0\.05 s"):
        await toolbox.collect(engine.decode(request(3000, timeout_s=0.05), []))
    transfer = toolbox.Loopback(engine.info.layout, toolbox.transfer_spec(engine, 150, 8))
    with pytest.raises(TimeoutError):
        await toolbox.collect(engine.decode(request(8, timeout_s=0.05), [transfer]))


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"prompt_token_ids": [5, 1000, 7]}, "prompt", "token ids must be from 0 to 999; 1000 at position 1 is not"),
        ({"prompt_token_ids": [5, -1]}, "prompt", "-1 at position 1"),
        ({"prompt_token_ids": []}, "prompt", "empty"),
        ({"prompt_token_ids": [5] * 4000, "max_output_tokens": 97}, "prompt", "4097 tokens"),
        ({"max_output_tokens": 0}, "max_tokens", "at least 1"),
    ],
)
async def test_wrong_requests(changes: dict[str, Any], param: str, words: str, engine: Any, toolbox: Any) -> None:
    """RequestError names the field, when the engine is called, not later; the engine goes on."""
    with pytest.raises(RequestError, match=words) as caught:
        engine.decode(replace(request(8), **changes), [])
    assert caught.value.param == param
    assert len(await tokens_of(engine, toolbox, PROMPT, 2)) == 2


async def test_closing_the_engine_ends_its_requests(tiny_model: Callable[[str], Path], toolbox: Any) -> None:
    """Streams end with an error, nothing hangs, the thread is gone."""
    engine = await toolbox.started(model=str(tiny_model("llama")))
    running = engine.decode(request(400), [])
    await asyncio.wait_for(anext(running), WAIT_S)
    await asyncio.wait_for(engine.close(), WAIT_S)
    with pytest.raises(EngineError, match="not been started, or is closed"):
        engine.load()
    await running.aclose()


async def test_a_dead_thread_fails_everybody_at_once(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug between two steps ends the engine's thread: who waits hears of it, memory comes back, and the next request
    is refused with the mend instead of waiting for ever."""
    stepper = engine._desk.stepper
    told: list[str | None] = []
    engine.on_failure(lambda: told.append(engine.failure))

    def bug() -> None:
        raise RuntimeError("a bug")

    events = engine.decode(request(n=3000), [])
    async with asyncio.timeout(WAIT_S):
        await anext(events)
        assert engine.failure is None
        monkeypatch.setattr(stepper._prefills, "next", bug)
        with pytest.raises(EngineError, match="a bug"):
            async for _ in events:
                pass
        await events.aclose()
    assert "a bug" in engine.failure
    assert told == [engine.failure]
    with pytest.raises(EngineError, match="restart this node"):
        engine.decode(request(), [])
