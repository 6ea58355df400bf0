"""What the jobs of one emulated engine share: settings, device, memory, threads and slots."""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from prfaas.common.config import EngineConfig
from prfaas.common.errors import RequestError
from prfaas.services.engine.api import EngineInfo
from prfaas.services.engine.emulated.batch import Batch
from prfaas.services.engine.emulated.content import KvContent
from prfaas.services.engine.emulated.device import Device
from prfaas.services.engine.emulated.profile import Emulation
from prfaas.services.engine.emulated.slots import Slots
from prfaas.services.engine.prefix_store import PrefixStore
from prfaas.services.engine.token_ids import check_token_ids
from prfaas.transport.arena import Arena, Region
from prfaas.transport.waiting import finish_despite_cancel

_INLINE_BYTES = 256 << 10
"""KV up to this size is written or checked on the event loop (under a millisecond); more goes to the thread."""
_BYTES_PER_ID = 32  # what hashing one token's prefix moves

T = TypeVar("T")


class Machine:
    def __init__(
        self, config: EngineConfig, info: EngineInfo, emulates: Emulation, arena: Arena, prefixes: PrefixStore | None
    ) -> None:
        self.config = config
        self.info = info
        self.emulates = emulates
        self.prefixes = prefixes
        self.device = Device(config.time_scale)
        self.batch = Batch(self.device, emulates.step_s, emulates.max_batch)
        self.memory = Memory(arena)
        self.prefill_slots = Slots(config.max_prefills)
        # One request more than computes may be open, so that its OPEN's round trip passes while others compute.
        self.open_slots = Slots(config.max_prefills + 1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="emulated-kv")

    async def close(self) -> None:
        await self.batch.close()
        if self.prefixes is not None:
            await self.prefixes.aclose()
        self._thread.shutdown()

    async def compute(self, start: int, end: int, layer_computed: Callable[[int, int, int], Awaitable[None]]) -> None:
        """Prefill tokens [start, end) in steps, taking turns with other prefills and with decode. All of them take the
        time of their number and one more, the last prompt token, which is what a profile's lengths count.

        `layer_computed(layer, step_start, step_end)` is awaited within the layer's time. Cancellation is between or in
        layers and leaves the device to others.
        """
        layers = len(self.info.layout.layers)
        token_s = self.emulates.prefill_s(end - start + 1) / max(1, end - start)
        while start < end:
            async with self.device.turn("prefill"):
                busy = self.batch.running > 0
                most = self.config.local_prefill_step_tokens if busy else self.config.prefill_step_tokens
                stop = min(end, start + most)
                layer_s = (stop - start) * token_s / layers
                for layer in range(layers):
                    await self.device.work(layer_s)
                    await layer_computed(layer, start, stop)
            start = stop

    async def run(self, function: Callable[[], T], size_bytes: int) -> T:
        """Call it here, or in the thread when it moves many bytes. When this returns or raises, cancelled or not, the
        function no longer touches its memory."""
        if size_bytes <= _INLINE_BYTES:
            return function()
        return await finish_despite_cancel(asyncio.get_running_loop().run_in_executor(self._thread, function))

    async def content(self, token_ids: list[int]) -> KvContent:
        return await self.run(lambda: KvContent(self.info.layout, token_ids), len(token_ids) * _BYTES_PER_ID)

    def check(self, token_ids: Sequence[int], context_tokens: int) -> None:
        """Raises RequestError for ids outside the vocabulary or a context that is too long."""
        if not token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        if context_tokens > self.info.max_model_tokens:
            raise RequestError(
                f"prompt and output have {context_tokens} tokens, the model takes {self.info.max_model_tokens}",
                param="prompt",
                code="context_length_exceeded",
            )
        check_token_ids(token_ids, self.info.vocabulary)


class Memory:
    """The arena, and who waits for room in it: the least rank first, and nobody past it."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._waiting: list[tuple[float, int]] = []
        self._arrivals = itertools.count()
        self._changed = asyncio.Event()

    @property
    def total_bytes(self) -> int:
        return self._arena.total_bytes

    @property
    def free_bytes(self) -> int:
        return self._arena.free_bytes

    def allocate_now(self, size_bytes: int) -> Region | None:
        return self._arena.allocate(size_bytes)

    async def allocate(self, size_bytes: int, rank: float) -> Region:
        """Wait for room. The size must be one that fits an empty arena."""
        mine = (rank, next(self._arrivals))
        bisect.insort(self._waiting, mine)
        try:
            while self._waiting[0] != mine or (region := self._arena.allocate(size_bytes)) is None:
                self._changed.clear()
                await self._changed.wait()
            return region
        finally:
            self._waiting.remove(mine)
            self._changed.set()

    def free(self, region: Region) -> None:
        region.free()
        self._changed.set()
