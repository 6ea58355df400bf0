"""Prompts that begin like earlier ones: what is held is neither computed nor sent, and the tokens are the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from prfaas.common.config import TransportConfig
from prfaas.common.errors import EngineError, TransferCancelledError
from prfaas.common.kv_layout import TokenRange
from prfaas.common.prefixcache.events import BlocksEvicted
from prfaas.services.engine.api import DecodeRequest, PrefillRequest, SamplingParams
from prfaas.services.engine.transformers import decode
from prfaas.services.engine.transformers.families import VERIFIED
from prfaas.transport.lanes.memory import MemoryNetwork

BLOCK = 16
OUTPUT = 40
WAIT_S = 30
KIB = 1 << 10


def prompt_of(seed: int, n: int) -> list[int]:
    tokens: list[int] = torch.randint(5, 1000, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


def whole_blocks(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


@asynccontextmanager
async def two_regions(model: Path, toolbox: Any, **settings: Any) -> AsyncIterator[Any]:
    """Steps of 40 tokens: they end at other places than the blocks."""
    transport = TransportConfig(bind="127.0.0.1:0")
    own = {"model": str(model), "prefill_step_tokens": 40, "prefix_block_tokens": BLOCK}
    async with toolbox.regions(transport, MemoryNetwork(), **(own | settings)) as regions:
        yield regions


async def alone(engine: Any, toolbox: Any, prompt: list[int], output_tokens: int, *, reuse: bool = False) -> list[int]:
    hold = engine.prefixes.hold(prompt[:-1]) if reuse else None
    request = DecodeRequest("alone", prompt, output_tokens, toolbox.GREEDY, hold=hold)
    return list((await asyncio.wait_for(toolbox.collect(engine.decode(request, [])), WAIT_S)).token_ids)


def held(engine: Any, tokens: list[int]) -> int:
    """Tokens of a prefix that could be reused now."""
    hold = engine.prefixes.hold(tokens)
    hold.release()
    return int(hold.tokens)


@pytest.fixture
async def no_cache(tiny_model: Callable[[str], Path], toolbox: Any) -> AsyncIterator[Callable[..., Any]]:
    """(model type, prompt, output tokens) -> what an engine that keeps nothing says."""
    engines: dict[str, Any] = {}

    async def expected(model_type: str, prompt: list[int], output_tokens: int) -> list[int]:
        if model_type not in engines:
            engines[model_type] = await toolbox.started(
                model=str(tiny_model(model_type)), prefill_step_tokens=40, prefix_bytes=0
            )
        return await alone(engines[model_type], toolbox, prompt, output_tokens)

    yield expected
    for engine in engines.values():
        await engine.close()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[int]]:
    """engine -> a list that each call of its first layer appends its tokens to."""

    def watch(engine: Any) -> list[int]:
        model = engine._desk.stepper._model
        run_layer, seen = model.run_layer, []

        def layer(index: int, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
            if index == 0:
                seen.append(hidden.shape[1])
            output: torch.Tensor = run_layer(index, hidden, *rest)
            return output

        monkeypatch.setattr(model, "run_layer", layer)
        return seen

    return watch


# -- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", list(VERIFIED))
async def test_a_conversation_sends_its_increments(
    model_type: str, tiny_model: Callable[[str], Path], toolbox: Any, no_cache: Any, computed: Any
) -> None:
    """Three turns: each prefill starts behind the prompt before, only what decode doesn't have crosses (counted on both
    sides), and the output is that of an engine without a cache. States and windows among it."""
    async with two_regions(tiny_model(model_type), toolbox) as regions:
        prompt, before, said_before = prompt_of(1, 300), 0, 0
        tokens = computed(regions.prefill)
        for turn in range(3):
            tokens.clear()
            journey = await asyncio.wait_for(regions.generate(prompt, OUTPUT, reuse=True), WAIT_S)
            assert journey.answer.token_ids == await no_cache(model_type, prompt, OUTPUT), f"turn {turn}"
            assert (journey.prefill_held, journey.decode_held) == (before, said_before)
            assert sum(tokens) == len(prompt) - 1 - before
            increment = regions.decode.info.layout.total_bytes(TokenRange(said_before, len(prompt) - 1))
            assert journey.sent_bytes == journey.received_bytes == increment
            before = whole_blocks(len(prompt) - 1)
            said_before = whole_blocks(len(prompt) + OUTPUT - 1)
            prompt = [*prompt, *journey.answer.token_ids, *prompt_of(10 + turn, 70)]


@pytest.mark.parametrize("model_type", list(VERIFIED))
@pytest.mark.parametrize("holder", ["prefill", "decode"])
async def test_one_side_alone_holds_it(
    holder: str, model_type: str, tiny_model: Callable[[str], Path], toolbox: Any, no_cache: Any
) -> None:
    """Prefill sends what it holds and decode doesn't; what decode holds and prefill doesn't is computed, not sent."""
    first = prompt_of(2, 210)
    second = [*first, *prompt_of(3, 90)]
    async with two_regions(tiny_model(model_type), toolbox) as regions:
        await alone(getattr(regions, holder), toolbox, first, 2)
        journey = await asyncio.wait_for(regions.generate(second, 20, reuse=True), WAIT_S)
        layout = regions.decode.info.layout
    kept = whole_blocks(len(first) - 1)
    assert (journey.prefill_held, journey.decode_held) == ((kept, 0) if holder == "prefill" else (0, kept))
    assert journey.received_bytes == layout.total_bytes(TokenRange(journey.decode_held, len(second) - 1))
    assert journey.answer.token_ids == await no_cache(model_type, second, 20)


@pytest.mark.parametrize("model_type", list(VERIFIED))
async def test_a_prompt_that_is_held_whole(
    model_type: str, tiny_model: Callable[[str], Path], toolbox: Any, no_cache: Any, computed: Any
) -> None:
    """n − 1 tokens are whole blocks: decode that holds them prefills nothing and receives nothing; prefill that holds
    them sends them without computing."""
    prompt = prompt_of(4, 10 * BLOCK + 1)
    expected = await no_cache(model_type, prompt, 20)
    async with two_regions(tiny_model(model_type), toolbox) as regions:
        assert await alone(regions.prefill, toolbox, prompt, 20) == expected
        tokens = computed(regions.prefill)
        journey = await asyncio.wait_for(regions.generate(prompt, 20, reuse=True), WAIT_S)
        assert (journey.prefill_held, tokens) == (160, [])
        assert journey.answer.token_ids == expected
        assert await alone(regions.decode, toolbox, prompt, 20) == expected
        journey = await asyncio.wait_for(regions.generate(prompt, 20, reuse=True), WAIT_S)
        assert (journey.decode_held, journey.sent_bytes, tokens) == (160, 0, [])
        assert journey.answer.token_ids == expected


@pytest.mark.parametrize("model_type", list(VERIFIED))
async def test_local_prefill_computes_the_rest(
    model_type: str, tiny_model: Callable[[str], Path], toolbox: Any, no_cache: Any, computed: Any
) -> None:
    """A node that prefills for itself starts from what it holds as well, of a prompt and of an output."""
    async with two_regions(tiny_model(model_type), toolbox) as regions:
        engine, prompt = regions.decode, prompt_of(5, 150)
        said = await alone(engine, toolbox, prompt, OUTPUT)
        longer = [*prompt, *said, *prompt_of(6, 61)]
        tokens = computed(engine)
        assert await alone(engine, toolbox, longer, 20, reuse=True) == await no_cache(model_type, longer, 20)
    assert sum(tokens[:-20]) == len(longer) - 1 - whole_blocks(len(prompt) + OUTPUT - 1)


async def test_a_joiner_waits_for_what_is_copied(
    tiny_model: Callable[[str], Path], toolbox: Any, no_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything has arrived while the thread was in a pass of another stream, and one layer a turn is copied: each
    layer is used when it is there, the tokens are right, and the other stream's too."""
    monkeypatch.setattr(decode, "COPY_BYTES_A_TURN", 1)
    prompt, other = prompt_of(33, 150), prompt_of(34, 30)
    async with two_regions(tiny_model("llama"), toolbox) as regions:
        engine = regions.decode
        await alone(engine, toolbox, prompt[:140], 2)
        model = engine._desk.stepper._model
        run_layer, may_go_on = model.run_layer, threading.Event()
        may_go_on.set()

        def layer(*args: Any) -> torch.Tensor:
            assert may_go_on.wait(WAIT_S)
            output: torch.Tensor = run_layer(*args)
            return output

        monkeypatch.setattr(model, "run_layer", layer)
        running = asyncio.ensure_future(alone(engine, toolbox, other, 200))
        while not any(life.is_decoding for life in engine._lives):
            await asyncio.sleep(0)
        may_go_on.clear()
        hold = engine.prefixes.hold(prompt[:-1])
        assert hold.tokens == 128
        spec = toolbox.transfer_spec(engine, len(prompt), 20, tokens=TokenRange(128, len(prompt) - 1))
        transfer = toolbox.Loopback(engine.info.layout, spec)
        decoding = engine.decode(DecodeRequest("r", prompt, 20, toolbox.GREEDY, hold=hold), [transfer])
        try:
            await toolbox.collect(regions.prefill.prefill(PrefillRequest("r", prompt), [transfer]))
            row = next(life for life in engine._lives if life.stream is decoding)._row
            async with asyncio.timeout(WAIT_S):
                while row.missing_layers:
                    await asyncio.sleep(0)
            assert row.held.copied_layers == 0
        finally:
            may_go_on.set()
        answer = await asyncio.wait_for(toolbox.collect(decoding), WAIT_S)
        assert answer.token_ids == await no_cache("llama", prompt, 20)
        assert await running == await no_cache("llama", other, 200)


# -- where a prefix ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", list(VERIFIED))
async def test_prompts_that_diverge(
    model_type: str, tiny_model: Callable[[str], Path], toolbox: Any, no_cache: Any
) -> None:
    """In the middle of a block: full attention reuses the whole blocks before it. States and windows are used at a
    snapshot and never elsewhere: the second prompt finds none before the place and takes one there, the third starts
    from that."""
    common = prompt_of(7, 6 * BLOCK + 5)
    prompts = [[*common, *prompt_of(seed, 107)] for seed in (8, 9, 10)]
    exact = model_type not in ("llama", "qwen3")
    found = []
    async with two_regions(tiny_model(model_type), toolbox) as regions:
        for prompt in prompts:
            journey = await asyncio.wait_for(regions.generate(prompt, 20, reuse=True), WAIT_S)
            found.append(journey.prefill_held)
            assert journey.answer.token_ids == await no_cache(model_type, prompt, 20)
    assert found == ([0, 0, 96] if exact else [0, 96, 96])


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_next", "falcon_h1"])
async def test_a_snapshot_is_the_state_at_its_end(
    model_type: str, tiny_model: Callable[[str], Path], toolbox: Any
) -> None:
    """What decode kept at the end of its last block is, but for rounding, what prefill computes of the same tokens:
    tokens alone might not tell it from the state a token earlier or later."""
    async with two_regions(tiny_model(model_type), toolbox) as regions:
        prompt = prompt_of(32, 150)
        context = [*prompt, *await alone(regions.decode, toolbox, prompt, OUTPUT)]
        kept = whole_blocks(len(context) - 1)
        await alone(regions.prefill, toolbox, context[: kept + 1], 1)
        found = [snapshot_of(engine, context[:kept]) for engine in (regions.decode, regions.prefill)]
    assert found[0].keys() == found[1].keys()
    for place, values in found[0].items():
        assert torch.allclose(values, found[1][place], rtol=1e-4, atol=1e-4), place


def snapshot_of(engine: Any, tokens: list[int]) -> dict[tuple[int, int, int], torch.Tensor]:
    """States and windows that are kept of exactly these tokens, float32, by (layer, tensor, head)."""
    hold = engine.prefixes.hold(tokens)
    assert hold.tokens == len(tokens)
    found = {}
    for layer, spec in enumerate(engine.info.layout.layers):
        for tensor, each in enumerate(spec.tensors):
            if not each.kind.is_state and each.window_tokens is None:
                continue
            start = max(0, len(tokens) - (each.window_tokens or 0))
            for head in range(each.heads):
                data = bytearray(each.fixed_bytes or (len(tokens) - start) * each.row_bytes_per_token)
                hold.read(layer, tensor, head, start, memoryview(data))
                found[layer, tensor, head] = torch.frombuffer(data, dtype=torch.float32)
    hold.release()
    return found


async def test_tenants_share_nothing(tiny_model: Callable[[str], Path], toolbox: Any) -> None:
    """What is kept for one tenant isn't found by another."""
    async with two_regions(tiny_model("llama"), toolbox) as regions:
        prompt = prompt_of(11, 100)
        request = DecodeRequest("r", prompt, 4, toolbox.GREEDY, tenant="a")
        await toolbox.collect(regions.decode.decode(request, []))
        holds = [regions.decode.prefixes.hold(prompt[:-1], tenant) for tenant in ("a", "b", "")]
        for hold in holds:
            hold.release()
    assert [hold.tokens for hold in holds] == [96, 0, 0]


# -- little room ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "falcon_h1"])
async def test_eviction_while_requests_run(
    model_type: str, tiny_model: Callable[[str], Path], toolbox: Any, no_cache: Any
) -> None:
    """A pool of about three prompts, and six conversations at once over it: blocks go while others are read, the
    outputs are right, what is held all the time stays, and in the end nothing is pinned (`regions` looks)."""
    first = prompt_of(30, 150)
    longer = [*first, *prompt_of(31, 50)]
    async with two_regions(tiny_model(model_type), toolbox, prefix_bytes=1200 * KIB) as regions:
        await alone(regions.decode, toolbox, first, 2)
        hold = regions.decode.prefixes.hold(longer[:-1])
        assert hold.tokens == 144

        async def conversation(seed: int) -> None:
            prompt = prompt_of(seed, 100 + 20 * (seed % 5))
            for turn in range(3):
                journey = await regions.generate(prompt, 20, reuse=True)
                assert journey.answer.token_ids == await no_cache(model_type, prompt, 20), f"{seed}, turn {turn}"
                prompt = [*prompt, *journey.answer.token_ids, *prompt_of(100 * seed + turn, 20)]

        await asyncio.wait_for(asyncio.gather(*(conversation(seed) for seed in range(20, 26))), WAIT_S)
        for engine in (regions.prefill, regions.decode):
            assert any(isinstance(event, BlocksEvicted) for event in engine.prefixes.drain_events())
            assert engine.prefixes.used_bytes <= engine.prefixes.capacity_bytes <= 1200 * KIB
        request = DecodeRequest("last", longer, 20, toolbox.GREEDY, hold=hold)
        answer = await asyncio.wait_for(toolbox.collect(regions.decode.decode(request, [])), WAIT_S)
        assert answer.token_ids == await no_cache(model_type, longer, 20)


async def test_no_room_at_all_costs_only_the_reuse(tiny_model: Callable[[str], Path], toolbox: Any) -> None:
    """Everything is pinned: nothing is kept of a request that ends, and its output is as ever."""
    async with two_regions(tiny_model("llama"), toolbox, prefix_bytes=8 * 32 * KIB) as regions:
        engine = regions.decode
        first, second = prompt_of(12, 8 * BLOCK + 1), prompt_of(13, 100)
        expected = await alone(engine, toolbox, second, 10)
        await alone(engine, toolbox, first, 2)
        pin = engine.prefixes.hold(first[:-1])
        assert pin.tokens == 8 * BLOCK
        assert await alone(engine, toolbox, second, 10) == expected
        assert held(engine, second) == 0
        pin.release()


# -- ends that are no ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "qwen3_next"])
async def test_a_cancelled_decode_keeps_what_there_is(
    model_type: str, tiny_model: Callable[[str], Path], toolbox: Any, no_cache: Any
) -> None:
    """The client has gone in the middle of the output, and of a pass: later prompts find its blocks, and they are
    good."""
    prompt = prompt_of(14, 150)
    async with two_regions(tiny_model(model_type), toolbox) as regions:
        events = regions.decode.decode(DecodeRequest("r", prompt, 3000, toolbox.GREEDY), [])
        said: list[int] = []
        while len(said) < 50:
            event = await asyncio.wait_for(anext(events), WAIT_S)
            said += [event.token_id] if hasattr(event, "token_id") else []
        await events.aclose()
        assert held(regions.decode, [*prompt, *said]) >= whole_blocks(len(prompt) + 49)
        longer = [*prompt, *said]
        expected = await no_cache(model_type, longer, 20)
        assert await alone(regions.decode, toolbox, longer, 20, reuse=True) == expected


async def test_a_prefill_that_loses_its_transfer_keeps_what_there_is(
    tiny_model: Callable[[str], Path], toolbox: Any, no_cache: Any
) -> None:
    """The next one of the same prompt starts from the steps that were computed."""
    prompt = prompt_of(15, 2500)
    async with two_regions(tiny_model("llama"), toolbox, prefix_bytes=6000 * KIB) as regions:
        pair = toolbox.Pair(regions.prefill, regions.decode)
        transfer = pair.loopback(len(prompt), 8)
        decoding = regions.decode.decode(DecodeRequest("r", prompt, 8, toolbox.GREEDY), [transfer])
        prefilling = regions.prefill.prefill(PrefillRequest("r", prompt), [transfer])
        progress = await asyncio.wait_for(anext(prefilling), WAIT_S)
        transfer.fail(TransferCancelledError("the other side has gone"))
        for events in (prefilling, decoding):
            with pytest.raises(TransferCancelledError):
                await asyncio.wait_for(toolbox.collect(events), WAIT_S)
        kept = held(regions.prefill, prompt[:-1])
        assert whole_blocks(progress.computed_tokens) <= kept < whole_blocks(len(prompt) - 1)
        journey = await asyncio.wait_for(regions.generate(prompt, 8, reuse=True), WAIT_S)
        assert journey.prefill_held == kept
        assert journey.answer.token_ids == await no_cache("llama", prompt, 8)


async def test_a_decode_that_failed_keeps_nothing(tiny_model: Callable[[str], Path], toolbox: Any) -> None:
    """Its KV may be the fault: only the prompt, which was kept before, is found."""
    async with two_regions(tiny_model("llama"), toolbox) as regions:
        engine, prompt = regions.decode, prompt_of(16, 100)
        sampling = SamplingParams(temperature=0, ignore_eos=True)
        events = engine.decode(DecodeRequest("r", prompt, 3000, sampling), [])
        said: list[int] = []
        while len(said) < 40:
            event = await asyncio.wait_for(anext(events), WAIT_S)
            said += [event.token_id] if hasattr(event, "token_id") else []
        life = next(life for life in engine._lives if life.stream is events)
        life._kv.layers[1].keys.fill_(torch.nan)
        with pytest.raises(EngineError, match="no token could be sampled"):
            await asyncio.wait_for(toolbox.collect(events), WAIT_S)
        assert held(engine, [*prompt, *said]) == whole_blocks(len(prompt) - 1)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_dead_engine_lets_go(
    role: str, tiny_model: Callable[[str], Path], toolbox: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holds and room for what was to be kept come back when the thread has died by a bug of ours."""
    engine = await toolbox.started(model=str(tiny_model("llama")), prefix_block_tokens=BLOCK, prefill_step_tokens=40)
    prompt = prompt_of(17, 3000)
    await alone(engine, toolbox, prompt[:200], 2)
    hold = engine.prefixes.hold(prompt[:-1])
    assert hold.tokens
    if role == "decode":
        events = engine.decode(DecodeRequest("r", prompt, 8, toolbox.GREEDY, hold=hold), [])
    else:
        transfer = toolbox.Loopback(engine.info.layout, toolbox.transfer_spec(engine, len(prompt), 8))
        transfer.bind(lambda spec: None, lambda layer: None, lambda error: None)
        transfer.answer.clear()
        events = engine.prefill(PrefillRequest("r", prompt, hold=hold), [transfer])

    def bug() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine._desk.stepper._prefills, "next", bug)
    with pytest.raises(EngineError, match="a bug"):
        await asyncio.wait_for(toolbox.collect(events), WAIT_S)
    assert engine.prefixes.pool.pinned_bytes == 0
    await engine.close()


async def test_a_hold_that_cannot_be_read_fails_its_request_alone(
    tiny_model: Callable[[str], Path], toolbox: Any, no_cache: Any
) -> None:
    """A joiner whose prefix can't be copied fails with the reason; a stream that runs goes on."""
    async with two_regions(tiny_model("llama"), toolbox) as regions:
        prompt, other = prompt_of(18, 150), prompt_of(19, 30)
        await alone(regions.decode, toolbox, prompt, 2)
        running = asyncio.ensure_future(alone(regions.decode, toolbox, other, 200))
        hold = regions.decode.prefixes.hold(prompt[:-1])
        hold.release()  # too early: a mistake of the caller
        tokens = TokenRange(hold.tokens, len(prompt) - 1)
        spec = toolbox.transfer_spec(regions.decode, len(prompt), 8, tokens=tokens)
        transfer = toolbox.Loopback(regions.decode.info.layout, spec)
        decoding = regions.decode.decode(DecodeRequest("r", prompt, 8, toolbox.GREEDY, hold=hold), [transfer])
        prefilling = asyncio.ensure_future(
            toolbox.collect(regions.prefill.prefill(PrefillRequest("r", prompt), [transfer]))
        )
        with pytest.raises(EngineError, match="a held prefix could not be copied"):
            await asyncio.wait_for(toolbox.collect(decoding), WAIT_S)
        assert await running == await no_cache("llama", other, 200)
        transfer.fail(TransferCancelledError("decode has failed"))
        await asyncio.gather(prefilling, return_exceptions=True)
