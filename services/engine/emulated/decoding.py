"""One decode: takes KV layer by layer (or computes it here), checks every byte, joins the batch, says tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from prfaas.common.errors import EngineError, OutOfMemoryError, TransferError
from prfaas.common.kv_layout import TokenRange
from prfaas.services.engine.api import (
    DecodeDone,
    DecodeEvent,
    DecodeRequest,
    DecodeTimeline,
    FinishReason,
    TokenEvent,
    rank_s,
)
from prfaas.services.engine.emulated.content import KvContent
from prfaas.services.engine.emulated.keeping import keep
from prfaas.services.engine.emulated.machine import Machine
from prfaas.services.engine.emulated.output import OutputTokens
from prfaas.services.engine.emulated.rows import Rows, first_wrong_byte_held
from prfaas.services.engine.emulated.stream import TaskStream
from prfaas.transport.api import KvDestination, KvReceiver, TransferSpec
from prfaas.transport.arena import Region


class DecodeJob:
    def __init__(self, machine: Machine, request: DecodeRequest, receivers: Sequence[KvReceiver]) -> None:
        """Raises RequestError."""
        self._machine = machine
        self._request = request
        self._receivers = receivers
        self._context = [*request.prompt_token_ids, *request.output_token_ids]
        machine.check(self._context, self._most_tokens)
        self._rank_s = rank_s(time.monotonic(), request.priority, machine.config.priority_s)
        self._position = len(request.output_token_ids)
        self._hold = request.hold
        self._held = 0 if request.hold is None else request.hold.tokens
        self.waits_for_place = False
        self._regions: list[Region] = []
        self._rows: list[Rows | None] = [None] * len(receivers)
        layers = len(machine.info.layout.layers)
        self._missing = [len(receivers)] * layers
        self._arrived_s: list[float | None] = [None] * layers
        self._arrival = asyncio.Event()
        self._local: list[float] = []
        self.prefill_remaining = 0
        self.stream: TaskStream[DecodeEvent] = TaskStream(self._run, self._clean_up)
        for index, receiver in enumerate(receivers):
            receiver.bind(partial(self._reserve, index), self._on_layer, self._on_failed)

    @property
    def context_tokens(self) -> int:
        """Held: the prompt and the output so far; 0 while nothing is reserved."""
        produced = self._position - len(self._request.output_token_ids)
        return len(self._context) + produced if self._regions else 0

    @property
    def _most_tokens(self) -> int:
        return len(self._request.prompt_token_ids) + self._request.max_output_tokens

    # -- what the transport calls ------------------------------------------------------------------------------------

    def _reserve(self, index: int, spec: TransferSpec) -> KvDestination | None:
        layout = self._machine.info.layout
        size = layout.total_bytes(TokenRange(0, self._most_tokens), spec.shard)
        self._check_size(size)
        region = self._machine.memory.allocate_now(size)
        if region is None:
            return None
        self._regions.append(region)
        self._rows[index] = rows = Rows(region.view, layout, spec.tokens, spec.shard)
        return rows

    def _on_layer(self, layer: int) -> None:
        self._missing[layer] -= 1
        if self._missing[layer] == 0:
            self._arrived_s[layer] = time.monotonic()
            self._arrival.set()

    def _on_failed(self, error: Exception) -> None:
        if any(self._missing):  # else all KV is here: only the news of the end is lost
            self.stream.fail(error)

    # -- the life of the request -------------------------------------------------------------------------------------

    async def _run(self, emit: Callable[[DecodeEvent], None]) -> None:
        request = self._request
        async with asyncio.timeout(request.timeout_s):
            if not self._receivers:
                await self._prefill_here()
            elif self._machine.config.join == "when_complete":
                for receiver in self._receivers:
                    await receiver.finished()
            else:
                await self._layer_arrived(0)
            output = OutputTokens(request.prompt_token_ids, request.sampling.seed)
            self.waits_for_place = True
            try:
                async with self._machine.batch.slots.held(self._rank_s):
                    self.waits_for_place = False
                    emit(await self._first_step())
                    if not self._say(output, emit):
                        context = (len(self._context) + self._most_tokens) // 2
                        await self._machine.batch.run(lambda: self._say(output, emit), context)
            finally:
                await self._keep(output)
        # What is still on its way is FINISH with prefill's timings; closing before it would cancel the transfer.
        for receiver in self._receivers:
            with suppress(TransferError):
                await receiver.finished()

    async def _keep(self, output: OutputTokens) -> None:
        """All but the last token's KV is here, of an output that was cut short as well; nothing before it began."""
        if self._position == len(self._request.output_token_ids):
            return
        said = [output.token(i) for i in range(len(self._request.output_token_ids), self._position)]
        await keep(self._machine, [*self._context, *said][:-1], self._request.tenant)

    async def _prefill_here(self) -> None:
        machine = self._machine
        queued_s = time.monotonic()
        size = machine.info.layout.total_bytes(TokenRange(0, self._most_tokens))
        self._check_size(size)
        end = len(self._context) - 1
        self.prefill_remaining = end - self._held

        async def layer_computed(layer: int, start: int, stop: int) -> None:
            self.prefill_remaining = end - stop

        self._regions.append(await machine.memory.allocate(size, self._rank_s))
        async with machine.prefill_slots.held(self._rank_s):
            started_s = time.monotonic()
            await machine.compute(self._held, end, layer_computed)
        self._local = [queued_s, started_s, time.monotonic()]

    async def _first_step(self) -> DecodeTimeline:
        """Beside the batch: the step of the last prompt token, layer by layer, each as soon as it is here."""
        config = self._machine.config
        known = self._receivers[0].spec.tokens.end if self._receivers else self._held
        content = await self._machine.content(self._context[:known])
        step_s = self._machine.emulates.step_s(self._machine.batch.running + 1, len(self._context)) * config.time_scale
        used_s = []
        ready_s = 0.0
        for layer in range(len(self._missing)):
            await self._layer_arrived(layer)
            used_s.append(time.monotonic())
            ready_s = max(ready_s, used_s[-1]) + step_s / len(self._missing)
            await self._check_layer(content, layer)
            await asyncio.sleep(max(0.0, ready_s - time.monotonic()))
        queued_s, started_s, ended_s = self._local or (None, None, None)
        return DecodeTimeline(self._arrived_s, used_s, queued_s, started_s, ended_s)

    async def _layer_arrived(self, layer: int) -> None:
        while self._missing[layer]:
            self._arrival.clear()
            await self._arrival.wait()

    async def _check_layer(self, content: KvContent, layer: int) -> None:
        machine, hold = self._machine, self._hold
        if hold is not None and hold.tokens:
            size = machine.info.layout.layer_bytes(layer, TokenRange(0, hold.tokens))
            wrong = await machine.run(partial(first_wrong_byte_held, hold, machine.info.layout, content, layer), size)
            if wrong:
                raise EngineError(f"the KV that was held is not what prefill computed: {wrong}")
        for receiver, rows in zip(self._receivers, self._rows, strict=True):
            if rows is None:
                continue
            size = self._machine.info.layout.layer_bytes(layer, receiver.spec.tokens, receiver.spec.shard)
            wrong = await self._machine.run(partial(rows.first_wrong_byte, content, layer), size)
            if wrong:
                raise EngineError(f"the KV that arrived is not what prefill computed: {wrong}")

    def _say(self, output: OutputTokens, emit: Callable[[DecodeEvent], None]) -> bool:
        """One token; True = the output has ended."""
        request = self._request
        if self._position < request.max_output_tokens:
            token_id = output.token(self._position)
            if token_id in request.sampling.stop_token_ids and self._position >= request.sampling.min_tokens:
                emit(DecodeDone(FinishReason.STOP, self._position, token_id))
                return True
            emit(TokenEvent(token_id, self._position, time.monotonic()))
            self._position += 1
        if self._position >= request.max_output_tokens:
            emit(DecodeDone(FinishReason.LENGTH, self._position))
            return True
        return False

    def _check_size(self, size_bytes: int) -> None:
        total = self._machine.memory.total_bytes
        if size_bytes > total:
            raise OutOfMemoryError(
                f"prompt and output of {self._most_tokens} tokens need {size_bytes} bytes of KV, the arena has "
                f"{total}; raise engine.arena_bytes or lower max_tokens"
            )

    async def _clean_up(self) -> None:
        for receiver in self._receivers:
            await receiver.aclose()
        self._rows = [None] * len(self._receivers)
        while self._regions:
            self._machine.memory.free(self._regions.pop())
        if self._hold is not None:
            self._hold.release()
