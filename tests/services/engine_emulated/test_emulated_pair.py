"""Two emulated engines joined by real KV endpoints: layers stream, every byte is checked, both sides let go."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from prfaas.common.config import MIB, EngineConfig, TransportConfig
from prfaas.common.errors import EngineError, TransferCancelledError
from prfaas.common.kv_layout import TokenRange
from prfaas.services.engine.api import (
    DecodeDone,
    DecodeRequest,
    DecodeTimeline,
    PrefillDone,
    PrefillProgress,
    PrefillRequest,
    SamplingParams,
    TokenEvent,
)
from prfaas.services.engine.emulated.engine import EmulatedEngine
from prfaas.services.engine.emulated.output import OutputTokens
from prfaas.transport.api import KvReceiver, KvSender, TransferSpec
from prfaas.transport.endpoint import KvEndpoint

ENGINE = EngineConfig(
    kind="emulated", arena_bytes=16 * MIB, prefix_bytes=4 * MIB, layers=4, time_scale=0.05, state_bytes=1000
)
PROMPT = [(i * 7) % 256 for i in range(1500)]
WAIT_S = 20


@dataclass
class Pair:
    """`prefill` and `decode`: engines; `transfer` makes both halves of one transfer between them."""

    prefill: EmulatedEngine
    decode: EmulatedEngine
    sender_end: KvEndpoint
    receiver_end: KvEndpoint

    def transfer(self, tokens: TokenRange, max_tokens: int = 8) -> tuple[KvSender, KvReceiver]:
        info = self.decode.info
        spec = TransferSpec(
            f"{next(_ids):032x}",
            "r",
            tokens,
            tokens.end + 1,
            max_tokens,
            info.model_fingerprint,
            info.layout.layout_hash,
        )
        ticket, receiver = self.receiver_end.receiver(spec)
        return self.sender_end.sender(ticket, "decode", self.receiver_end.addresses), receiver

    async def run(
        self, prompt: Sequence[int] = PROMPT, *, prefilled: Sequence[int] | None = None, token_start: int = 0
    ) -> tuple[list[int], DecodeTimeline, PrefillDone]:
        """One request through both: its tokens and what both sides say. `prefilled`: a prompt that differs."""
        sender, receiver = self.transfer(TokenRange(token_start, len(prompt) - 1))
        outputs = self.decode.decode(DecodeRequest("r", prompt, 8, SamplingParams()), [receiver])
        steps = self.prefill.prefill(PrefillRequest("r", prefilled or prompt), [sender])
        async with aclosing(outputs), aclosing(steps), asyncio.timeout(WAIT_S):
            found, done = await asyncio.gather(collect(outputs), collect(steps))
        [timeline] = [e for e in found if isinstance(e, DecodeTimeline)]
        assert isinstance(found[-1], DecodeDone)
        assert isinstance(done[-1], PrefillDone)
        return [e.token_id for e in found if isinstance(e, TokenEvent)], timeline, done[-1]


_ids = itertools.count(1)


async def collect(events: Any) -> list[Any]:
    return [event async for event in events]


def expected(prompt: Sequence[int], tokens: int = 8) -> list[int]:
    output = OutputTokens(prompt, None)
    return [output.token(i) for i in range(tokens)]


@asynccontextmanager
async def joined(**settings: Any) -> AsyncIterator[Pair]:
    config = replace(ENGINE, **settings)
    async with AsyncExitStack() as stack:
        engines, ends = [], []
        for name in ("prefill", "decode"):
            engine = EmulatedEngine(config)
            await engine.start()
            stack.push_async_callback(engine.close)
            end = KvEndpoint(
                TransportConfig(lanes=2),
                node=name,
                layout=engine.info.layout,
                model_fingerprint=engine.info.model_fingerprint,
                secret=b"secret",
            )
            await end.start()
            stack.push_async_callback(end.aclose)
            engines.append(engine)
            ends.append(end)
        yield Pair(engines[0], engines[1], ends[0], ends[1])
        for engine in engines:
            assert engine.load().free_kv_bytes == config.arena_bytes


async def test_layers_stream_and_every_byte_is_right() -> None:
    """Several steps, key, value and state: the output is the prompt's, each layer was used after it had arrived, and
    both arenas are empty afterwards. Bytes were checked, else the next test would be green."""
    async with joined() as pair:
        tokens, timeline, done = await pair.run()
    assert tokens == expected(PROMPT)
    assert all(a is not None and a <= u for a, u in zip(timeline.arrived_s, timeline.used_s, strict=True))
    assert done.computed_s == sorted(done.computed_s)
    assert done.reports[0].raw_bytes == pair.decode.info.layout.total_bytes(TokenRange(0, len(PROMPT) - 1))


async def test_a_request_of_lower_priority_number_overtakes_those_that_wait() -> None:
    """Behind one that computes: the last to come is served first of those that wait, which keep their order."""
    ended: list[int] = []

    async def one(pair: Pair, index: int, priority: int) -> None:
        prompt = [index] * 400
        sender, receiver = pair.transfer(TokenRange(0, 399))
        outputs = pair.decode.decode(DecodeRequest("r", prompt, 8, SamplingParams()), [receiver])
        steps = pair.prefill.prefill(PrefillRequest("r", prompt, priority=priority), [sender])
        async with aclosing(outputs), aclosing(steps):
            await collect(steps)
            ended.append(index)
            await collect(outputs)

    async with joined(max_prefills=1, time_scale=1.0, prefill_tokens_per_s=5000.0) as pair, asyncio.timeout(WAIT_S):
        # Two are let in at once: one computes, and the next one's OPEN is on its way.
        requests = list(enumerate([0, 0, 1, 0, -1]))
        await asyncio.gather(*(one(pair, index, priority) for index, priority in requests))
    assert ended == [0, 1, 4, 3, 2]


async def test_a_range_that_starts_later_is_sent_alone() -> None:
    async with joined() as pair:
        tokens, _, done = await pair.run(token_start=1000)
        assert tokens == expected(PROMPT)
        assert done.reports[0].raw_bytes == pair.decode.info.layout.total_bytes(TokenRange(1000, len(PROMPT) - 1))


async def test_an_empty_range_ends_at_once() -> None:
    async with joined() as pair:
        sender, receiver = pair.transfer(TokenRange(0, 0))
        async with aclosing(pair.prefill.prefill(PrefillRequest("r", [1]), [sender])) as steps:
            [done] = await collect(steps)
        assert isinstance(done, PrefillDone)
        await receiver.aclose()


async def test_a_flipped_byte_fails_the_request() -> None:
    """Behind the transport's own checksum: one bit of the arena changes after its layer has arrived."""
    async with joined(join="when_complete") as pair:
        sender, receiver = pair.transfer(TokenRange(0, len(PROMPT) - 1))
        outputs = pair.decode.decode(DecodeRequest("r", PROMPT, 8, SamplingParams()), [Flipping(receiver, 2, 1, 1, 77)])
        steps = pair.prefill.prefill(PrefillRequest("r", PROMPT), [sender])
        async with aclosing(outputs), aclosing(steps), asyncio.timeout(WAIT_S):
            with pytest.raises(EngineError, match=r"layer 2, tensor 1 \(value\), row 1 \(head 1\), byte 77"):
                await asyncio.gather(collect(outputs), collect(steps))


async def test_kv_of_another_prompt_fails_the_request() -> None:
    """One token differs, the last one that was prefilled: only its rows and the state are wrong, and that is found."""
    async with joined() as pair:
        other = [*PROMPT[:-2], 1 + PROMPT[-2], PROMPT[-1]]
        with pytest.raises(EngineError, match="layer 0, tensor 0"):
            await pair.run(prefilled=other)


async def test_layerwise_sending_and_joining_overlap_prefill() -> None:
    """The first layer is used before the last one was computed; with the baselines it is not."""
    slow = {"prefill_tokens_per_s": 20_000.0, "time_scale": 1.0, "prefill_step_tokens": 2000, "decode_step_s": 0.004}
    async with joined(**slow) as pair:
        _, timeline, done = await pair.run()
        assert timeline.used_s[0] < done.computed_s[-1]
    async with joined(**slow, send="after_prefill") as pair:
        _, timeline, done = await pair.run()
        assert timeline.arrived_s[0] is not None
        assert timeline.arrived_s[0] >= done.computed_s[-1]
    async with joined(**slow, join="when_complete") as pair:
        _, timeline, done = await pair.run()
        assert timeline.used_s[0] >= max(s for s in timeline.arrived_s if s is not None)


async def test_a_short_prompt_is_not_stuck_behind_a_long_one() -> None:
    """Steps interleave: of two prefills the later, shorter one is done first."""
    async with joined(prefill_step_tokens=50, time_scale=0.5) as pair:
        order: list[str] = []

        async def one(name: str, prompt: list[int]) -> None:
            await pair.run(prompt)
            order.append(name)

        long = asyncio.create_task(one("long", PROMPT))
        while not pair.prefill.load().queued_tokens:
            await asyncio.sleep(0)
        await one("short", PROMPT[:100])
        await long
    assert order == ["short", "long"]


async def test_closing_decode_stops_the_prefill() -> None:
    """The cancel reaches the other engine between layers: its iterator ends with it, its memory is free."""
    async with joined(time_scale=1.0, prefill_tokens_per_s=500.0, prefill_step_tokens=50) as pair:
        sender, receiver = pair.transfer(TokenRange(0, len(PROMPT) - 1))
        outputs = pair.decode.decode(DecodeRequest("r", PROMPT, 8, SamplingParams()), [receiver])
        async with aclosing(pair.prefill.prefill(PrefillRequest("r", PROMPT), [sender])) as steps:
            computed: list[int] = []

            async def follow() -> None:
                async for step in steps:
                    assert isinstance(step, PrefillProgress)
                    computed.append(step.computed_tokens)
                    if len(computed) == 2:
                        await outputs.aclose()

            with pytest.raises(TransferCancelledError):
                await asyncio.wait_for(follow(), WAIT_S)
        assert computed[-1] < len(PROMPT) / 2
        assert pair.prefill.load().queued_tokens == 0


class Flipping:
    """A receiver that spoils one byte of one row when its layer arrives."""

    def __init__(self, receiver: KvReceiver, layer: int, tensor: int, row: int, offset: int) -> None:
        self._receiver = receiver
        self._where = (layer, tensor, row)
        self._offset = offset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._receiver, name)

    def bind(self, reserve: Any, on_layer: Callable[[int], None], on_failed: Any) -> None:
        destination: Any = None

        def reserved(spec: TransferSpec) -> Any:
            nonlocal destination
            destination = reserve(spec)
            return destination

        def arrived(layer: int) -> None:
            if layer == self._where[0]:
                destination.row(*self._where)[self._offset] ^= 1
            on_layer(layer)

        self._receiver.bind(reserved, arrived, on_failed)
