"""What happens to the others: a request is cancelled while the thread computes, a row fails, a pass fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prfaas.common.errors import EngineError
from prfaas.services.engine.api import DecodeRequest, PrefillRequest, SamplingParams

PROMPT = list(range(5, 155))
STEP_TOKENS = 40
ENDLESS = 3000
WAIT_S = 20


@pytest.fixture
async def engine(tiny_model: Callable[[str], Path], toolbox: Any) -> AsyncIterator[Any]:
    engine = await toolbox.started(
        model=str(tiny_model("llama")),
        prefill_step_tokens=STEP_TOKENS,
        local_prefill_step_tokens=STEP_TOKENS,
        arena_bytes=32 << 20,
    )
    free = engine.load().free_kv_bytes
    yield engine
    assert engine.load().free_kv_bytes == free, "all memory has come back"
    await engine.close()


class OneLayerAtATime:
    """Once `hold` was called, the computing thread stands still before each layer until `step`. What it computes is
    real; it only takes as long as the test wants."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        model = engine._desk.stepper._model
        self._run_layer = model.run_layer
        self._loop = asyncio.get_running_loop()
        self._held = False
        self._permits = threading.Semaphore(0)
        self._standing: asyncio.Queue[tuple[int, int, int]] = asyncio.Queue()
        monkeypatch.setattr(model, "run_layer", self._layer)

    def hold(self) -> None:
        self._held = True

    def step(self) -> None:
        self._permits.release()

    def go_on(self) -> None:
        self._held = False
        self._permits.release()

    async def stands_before(self) -> tuple[int, int, int]:
        """(layer, rows, tokens a row) of what the thread computes next."""
        return await asyncio.wait_for(self._standing.get(), WAIT_S)

    async def go_to(self, layer: int, rows: int, tokens: int) -> None:
        while await self.stands_before() != (layer, rows, tokens):
            self.step()

    def _layer(self, index: int, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        if self._held:
            self._loop.call_soon_threadsafe(self._standing.put_nowait, (index, *hidden.shape[:2]))
            assert self._permits.acquire(timeout=WAIT_S)
        output: torch.Tensor = self._run_layer(index, hidden, *rest)
        return output


@pytest.fixture
async def thread(engine: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OneLayerAtATime]:
    thread = OneLayerAtATime(engine, monkeypatch)
    yield thread
    thread.go_on()  # a test that failed leaves nobody waiting


def request(n: int, sampling: SamplingParams | None = None, prompt: list[int] = PROMPT) -> DecodeRequest:
    return DecodeRequest("r", prompt, n, sampling or SamplingParams(temperature=0, ignore_eos=True))


def life_of(engine: Any, events: Any) -> Any:
    return next(life for life in engine._lives if life.stream is events)


async def close_at_the_next_layer(thread: OneLayerAtATime, events: Any) -> tuple[int, int, int]:
    """Close a request while the thread stands in the middle of something, and let it run one layer more. Returns where
    it stands when the close is done."""
    closing = asyncio.ensure_future(events.aclose())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not closing.done(), "the thread may be using its memory"
    thread.step()
    standing = await thread.stands_before()
    await asyncio.wait_for(closing, WAIT_S)
    return standing


# -- cancellation -----------------------------------------------------------------------------------------------------


async def test_a_decode_leaves_a_pass_between_two_layers(engine: Any, thread: OneLayerAtATime, toolbox: Any) -> None:
    """Its memory is free while the pass still runs; the other stream goes on in that pass and says what it says
    alone."""
    expected = (await toolbox.collect(engine.decode(request(20), []))).token_ids
    leaving, staying = engine.decode(request(ENDLESS), []), engine.decode(request(20), [])
    await asyncio.wait_for(anext(leaving), WAIT_S)
    thread.hold()
    await thread.go_to(layer=1, rows=2, tokens=1)
    held = engine.load().free_kv_bytes
    assert await close_at_the_next_layer(thread, leaving) == (2, 1, 1)
    assert engine.load().free_kv_bytes > held
    thread.go_on()
    assert (await toolbox.collect(staying)).token_ids == expected


async def test_the_last_row_leaves_a_pass_between_two_layers(
    engine: Any, thread: OneLayerAtATime, toolbox: Any
) -> None:
    """Nobody is left in the pass: it ends without sampling, and the thread goes on with what comes next."""
    leaving = engine.decode(request(ENDLESS), [])
    await asyncio.wait_for(anext(leaving), WAIT_S)
    thread.hold()
    await thread.go_to(layer=1, rows=1, tokens=1)
    following = engine.decode(request(2, prompt=PROMPT[:11]), [])
    assert await close_at_the_next_layer(thread, leaving) == (0, 1, 10)
    thread.go_on()
    assert len((await toolbox.collect(following)).token_ids) == 2


@pytest.mark.parametrize("leaves", ["decode", "prefill"])
async def test_a_request_leaves_while_anothers_step_is_computed(
    leaves: str, engine: Any, thread: OneLayerAtATime, toolbox: Any
) -> None:
    """A decode, or a prefill between its own steps, needn't wait for the end of a prefill step of somebody else."""
    if leaves == "decode":
        leaving = engine.decode(request(ENDLESS), [])
    else:
        transfer = toolbox.Loopback(engine.info.layout, toolbox.transfer_spec(engine, 3000, 8), announce=False)
        transfer.bind(lambda spec: Sink(), lambda layer: None, lambda error: None)
        leaving = engine.prefill(PrefillRequest("long", [5] * 3000), [transfer])
    await asyncio.wait_for(anext(leaving), WAIT_S)
    expected_tokens = 30
    thread.hold()
    other = engine.decode(request(2, prompt=PROMPT[: expected_tokens + 1]), [])
    await thread.go_to(layer=1, rows=1, tokens=expected_tokens)
    held = engine.load().free_kv_bytes
    assert await close_at_the_next_layer(thread, leaving) == (2, 1, expected_tokens)
    assert engine.load().free_kv_bytes > held
    thread.go_on()
    assert len((await toolbox.collect(other)).token_ids) == 2


async def test_a_prefill_is_left_between_two_layers(engine: Any, thread: OneLayerAtATime, toolbox: Any) -> None:
    """Its own step: no further layer of it is computed, and its memory is free at once."""
    transfer = toolbox.Loopback(engine.info.layout, toolbox.transfer_spec(engine, 3000, 8), announce=False)
    transfer.bind(lambda spec: Sink(), lambda layer: None, lambda error: None)
    leaving = engine.prefill(PrefillRequest("long", [5] * 3000), [transfer])
    await asyncio.wait_for(anext(leaving), WAIT_S)
    thread.hold()
    await thread.go_to(layer=1, rows=1, tokens=STEP_TOKENS)
    following = engine.decode(request(2, prompt=PROMPT[:11]), [])
    held = engine.load().free_kv_bytes
    assert await close_at_the_next_layer(thread, leaving) == (0, 1, 10)
    assert engine.load().free_kv_bytes > held
    thread.go_on()
    assert len((await toolbox.collect(following)).token_ids) == 2


class Sink:
    """A destination that keeps nothing."""

    def __init__(self) -> None:
        self._bytes = memoryview(bytearray(1 << 20))

    def row(self, layer: int, tensor: int, row: int) -> memoryview:
        return self._bytes


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_a_row_that_cannot_be_sampled_fails_alone(temperature: float, engine: Any, toolbox: Any) -> None:
    """KV that holds a NaN makes that row's logits NaN: that request fails, the other one says what it says alone."""
    expected = (await toolbox.collect(engine.decode(request(100), []))).token_ids
    sampling = SamplingParams(temperature=temperature, seed=1, ignore_eos=True)
    poisoned, sound = engine.decode(request(ENDLESS, sampling), []), engine.decode(request(100), [])
    await asyncio.wait_for(anext(poisoned), WAIT_S)
    life_of(engine, poisoned)._kv.layers[1].keys.fill_(torch.nan)
    with pytest.raises(EngineError, match="no token could be sampled"):
        await asyncio.wait_for(toolbox.collect(poisoned), WAIT_S)
    assert (await asyncio.wait_for(toolbox.collect(sound), WAIT_S)).token_ids == expected


async def test_an_error_in_a_pass_spares_the_joiner_outside(
    engine: Any, toolbox: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 2 fails while a joiner waits for its layer 2 to arrive: the stream that was in the pass fails, the joiner
    goes on with what it had and says what it says alone."""
    expected = (await toolbox.collect(engine.decode(request(6), []))).token_ids
    running = engine.decode(request(ENDLESS, prompt=[9, 8, 7]), [])
    await asyncio.wait_for(anext(running), WAIT_S)
    pair = toolbox.Pair(engine, engine)
    transfer = pair.loopback(len(PROMPT), 6, announce=False)
    joining = engine.decode(request(6), [transfer])
    await toolbox.collect(engine.prefill(PrefillRequest("r", PROMPT), [transfer]))
    for layer in (0, 1):
        transfer.announce_layer(layer)
    row = life_of(engine, joining)._row
    async with asyncio.timeout(WAIT_S):
        while len(row.used_s) < 2:
            await asyncio.sleep(0)

    model = engine._desk.stepper._model
    whole = model.run_layer

    def broken(index: int, *rest: Any) -> torch.Tensor:
        if index == 2:
            raise RuntimeError("a fault")
        output: torch.Tensor = whole(index, *rest)
        return output

    monkeypatch.setattr(model, "run_layer", broken)
    with pytest.raises(EngineError, match="a decode step failed: a fault"):
        await asyncio.wait_for(toolbox.collect(running), WAIT_S)
    monkeypatch.setattr(model, "run_layer", whole)
    for layer in (2, 3):
        transfer.announce_layer(layer)
    assert (await asyncio.wait_for(toolbox.collect(joining), WAIT_S)).token_ids == expected
