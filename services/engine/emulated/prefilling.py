"""One prefill: waits for its turn, computes step by step, hands each layer's KV to the senders."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from prfaas.common.errors import NoRoomError, OutOfMemoryError
from prfaas.services.engine.api import PrefillDone, PrefillEvent, PrefillProgress, PrefillRequest, rank_s
from prfaas.services.engine.emulated.content import KvContent
from prfaas.services.engine.emulated.keeping import keep
from prfaas.services.engine.emulated.machine import Machine
from prfaas.services.engine.emulated.rows import Rows
from prfaas.services.engine.emulated.stream import TaskStream
from prfaas.services.engine.prefix_store import Hold
from prfaas.transport.api import KvPiece, KvSender
from prfaas.transport.arena import Region


class PrefillJob:
    def __init__(self, machine: Machine, request: PrefillRequest, senders: Sequence[KvSender]) -> None:
        """Raises RequestError."""
        machine.check(request.prompt_token_ids, len(request.prompt_token_ids))
        self._machine = machine
        self._request = request
        self._senders = senders
        self._rank_s = rank_s(time.monotonic(), request.priority, machine.config.priority_s)
        self._tokens = senders[0].spec.tokens
        self._hold = request.hold
        self._held = 0 if request.hold is None else request.hold.tokens
        self._regions: list[Region] = []
        self._rows: list[Rows] = []
        self._holds_slot = False
        self._unsent: list[list[KvPiece]] = [[] for _ in senders]
        self._computed_s = [0.0] * len(machine.info.layout.layers)
        self.remaining_tokens = self._to_compute
        self.stream: TaskStream[PrefillEvent] = TaskStream(self._run, self._clean_up)
        for sender in senders:
            sender.on_failed(self.stream.fail)

    @property
    def _to_compute(self) -> int:
        return self._tokens.end - self._held if self._tokens.tokens else 0

    async def _run(self, emit: Callable[[PrefillEvent], None]) -> None:
        queued_s = time.monotonic()
        ids = list(self._request.prompt_token_ids)
        async with asyncio.timeout(self._request.timeout_s) as self._deadline:
            if not self._tokens.tokens:
                emit(PrefillDone(queued_s, queued_s, queued_s, [queued_s] * len(self._computed_s)))
                return
            content = await self._machine.content(ids[: self._tokens.end])
            await self._admission()
            async with self._machine.prefill_slots.held(self._rank_s):
                started_s = time.monotonic()
                await self._compute(content, emit)
            self._leave()
            await keep(self._machine, ids[: self._tokens.end], self._request.tenant)
            timings: dict[str, float | list[float]] = {
                "queued_s": queued_s,
                "started_s": started_s,
                "ended_s": self._computed_s[-1],
                "computed_s": self._computed_s,
            }
            for sender in self._senders:
                sender.finish(timings)
            reports = [await sender.done() for sender in self._senders]
        emit(PrefillDone(queued_s, started_s, self._computed_s[-1], self._computed_s, reports))

    def _remaining_s(self) -> float | None:
        ends_s = self._deadline.when()
        return None if ends_s is None else max(0.0, ends_s - asyncio.get_running_loop().time())

    async def _admission(self) -> None:
        """Until every transfer is open and there is memory to compute into. While the other side has no room, nothing
        is held, so that two nodes that prefill for each other can't wait for each other for ever."""
        machine = self._machine
        sizes = [machine.info.layout.total_bytes(self._tokens, sender.spec.shard) for sender in self._senders]
        if sum(sizes) > machine.memory.total_bytes:
            raise OutOfMemoryError(
                f"the KV of {self._tokens.tokens} tokens is {sum(sizes)} bytes, the arena has "
                f"{machine.memory.total_bytes}; raise engine.arena_bytes"
            )
        unopened = list(self._senders)
        while True:
            await machine.open_slots.acquire(self._rank_s)
            self._holds_slot = True
            for size in sizes:
                self._regions.append(await machine.memory.allocate(size, self._rank_s))
            try:
                while unopened:
                    await unopened[0].open(self._remaining_s())
                    del unopened[0]
            except NoRoomError as error:
                self._leave()
                self._free()
                await asyncio.sleep(error.retry_after_s)
            else:
                break
        layout = machine.info.layout
        self._rows = [
            Rows(region.view, layout, sender.spec.tokens, sender.spec.shard)
            for region, sender in zip(self._regions, self._senders, strict=True)
        ]

    async def _compute(self, content: KvContent, emit: Callable[[PrefillEvent], None]) -> None:
        machine = self._machine
        token_bytes = machine.info.layout.bytes_per_token // len(machine.info.layout.layers)
        state_bytes = machine.info.layout.fixed_bytes // len(machine.info.layout.layers)

        async def layer_computed(layer: int, start: int, end: int) -> None:
            size = (end - start) * token_bytes + (state_bytes if end == self._tokens.end else 0)
            made = await machine.run(lambda: [rows.write(content, layer, start, end) for rows in self._rows], size)
            self._made(layer, made)
            if layer == len(self._computed_s) - 1:
                self.remaining_tokens = self._tokens.end - end
                emit(PrefillProgress(max(0, end - self._tokens.start)))

        hold = self._hold
        if hold is not None and self._held:
            for layer in range(len(self._computed_s)):
                size = self._held * token_bytes + state_bytes
                self._made(layer, await machine.run(partial(_copied, self._rows, hold, layer), size))
        await machine.compute(self._held, self._tokens.end, layer_computed)
        self._send()

    def _made(self, layer: int, made: list[list[KvPiece]]) -> None:
        self._computed_s[layer] = time.monotonic()
        for unsent, pieces in zip(self._unsent, made, strict=True):
            unsent += pieces
        if self._machine.config.send == "layerwise":
            self._send()

    def _send(self) -> None:
        for sender, pieces in zip(self._senders, self._unsent, strict=True):
            sender.put(list(pieces))
            pieces.clear()

    def _leave(self) -> None:
        if self._holds_slot:
            self._holds_slot = False
            self._machine.open_slots.release()

    def _free(self) -> None:
        self._rows.clear()
        while self._regions:
            self._machine.memory.free(self._regions.pop())

    async def _clean_up(self) -> None:
        self.remaining_tokens = 0
        self._leave()
        for sender in self._senders:
            await sender.aclose()
        self._unsent.clear()
        self._free()
        if self._hold is not None:
            self._hold.release()


def _copied(rows: list[Rows], hold: Hold, layer: int) -> list[list[KvPiece]]:
    return [each.copy(hold, layer) for each in rows]
