"""Continuous batching: every running request gets one token a step, whatever the batch's size."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prfaas.services.engine.emulated.device import Device
from prfaas.services.engine.emulated.slots import Slots


class Batch:
    """`slots` bounds how many may run or join. `step_s(batch, mean context tokens)` is what a step takes."""

    def __init__(self, device: Device, step_s: Callable[[int, float], float], max_batch: int) -> None:
        self._device = device
        self._step_s = step_s
        self._members: dict[asyncio.Future[None], tuple[Callable[[], bool], int]] = {}
        self._loop: asyncio.Task[None] | None = None
        self.slots = Slots(max_batch)

    @property
    def running(self) -> int:
        return len(self._members)

    async def run(self, step: Callable[[], bool], context_tokens: int) -> None:
        """Join from the next step on. `step()` is called after each; True = this was the last. Cancelling leaves the
        batch. context_tokens: that the request holds meanwhile, on the average."""
        ended = asyncio.get_running_loop().create_future()
        self._members[ended] = step, context_tokens
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._steps())
        try:
            await ended
        finally:
            self._members.pop(ended, None)

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait([self._loop])

    async def _steps(self) -> None:
        while self._members:
            async with self._device.turn("decode"):
                in_step = list(self._members.items())
                mean = sum(context for _, (_, context) in in_step) / len(in_step)
                await self._device.work(self._step_s(len(in_step), mean))
            for ended, (step, _) in in_step:
                if ended in self._members and step():
                    del self._members[ended]
                    if not ended.done():
                        ended.set_result(None)
