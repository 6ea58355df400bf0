"""An engine without a model: it takes the time and makes KV of the size that its settings say.

The KV's content is a function of the prompt, and decode checks every byte of it, so that whatever stands between two
engines can be tested to the byte. One device computes prefill steps and decode steps by turns; a request that joins
advances beside the batch. Output tokens follow from prompt, seed and position. Known simplification: the KV of a local
prefill and of output tokens takes its memory but is not written, since nobody else would read it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from hashlib import blake2b

from prfaas.common.config import EngineConfig
from prfaas.common.kv_layout import model_fingerprint
from prfaas.common.perfmodel.profiles import NodeProfile
from prfaas.services.engine.api import (
    DecodeEvent,
    DecodeRequest,
    EngineInfo,
    EngineLoad,
    EventStream,
    PrefillEvent,
    PrefillRequest,
)
from prfaas.services.engine.emulated.decoding import DecodeJob
from prfaas.services.engine.emulated.machine import Machine
from prfaas.services.engine.emulated.prefilling import PrefillJob
from prfaas.services.engine.emulated.profile import emulation, reported
from prfaas.services.engine.prefix_store import PrefixStore
from prfaas.services.engine.tokenizer import BYTES_EOS, BYTES_MAX_TOKENS, BYTES_VOCABULARY
from prfaas.transport.api import KvReceiver, KvSender
from prfaas.transport.arena import Arena


class EmulatedEngine:
    """services.engine.api.Engine. Finished jobs leave the load by themselves, closed or not."""

    forwarding = None
    mirror = None
    failure: str | None = None
    """Its work is tasks of the event loop: there is no thread that could die alone."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._emulates = emulation(config)
        layout = self._emulates.layout
        self.info = EngineInfo(
            model=config.served_model or config.model or "emulated",
            model_fingerprint=model_fingerprint([("layout", blake2b(layout.layout_hash.encode()).digest())]),
            layout=layout,
            max_model_tokens=config.max_model_tokens or BYTES_MAX_TOKENS,
            vocabulary=BYTES_VOCABULARY,
            eos_token_ids=(BYTES_EOS,),
            arena_bytes=config.arena_bytes,
        )
        self.profile: NodeProfile = reported(config, self._emulates, self.info.model)
        """In real seconds and bytes, scales included."""
        self._prefills: set[PrefillJob] = set()
        self._decodes: set[DecodeJob] = set()

    def on_failure(self, callback: Callable[[], None]) -> None:
        """It never fails."""

    async def start(self) -> None:
        # Touching a large arena takes seconds.
        config = self._config
        arena = await asyncio.to_thread(Arena, config.arena_bytes)
        prefixes = None
        if config.prefix_bytes:
            model, size = self.info.model_fingerprint, config.prefix_bytes
            prefixes = await asyncio.to_thread(PrefixStore, self.info.layout, model, size, config.prefix_block_tokens)
        self._machine = Machine(config, self.info, self._emulates, arena, prefixes)

    @property
    def prefixes(self) -> PrefixStore | None:
        return self._machine.prefixes

    async def close(self) -> None:
        jobs: list[PrefillJob | DecodeJob] = [*self._prefills, *self._decodes]
        await asyncio.gather(*(job.stream.aclose() for job in jobs))
        await self._machine.close()

    def prefill(self, request: PrefillRequest, transfers: Sequence[KvSender]) -> EventStream[PrefillEvent]:
        job = PrefillJob(self._machine, request, transfers)
        self._prefills.add(job)
        job.stream.on_end(lambda: self._prefills.discard(job))
        return job.stream

    def decode(self, request: DecodeRequest, transfers: Sequence[KvReceiver]) -> EventStream[DecodeEvent]:
        job = DecodeJob(self._machine, request, transfers)
        self._decodes.add(job)
        job.stream.on_end(lambda: self._decodes.discard(job))
        return job.stream

    def load(self) -> EngineLoad:
        local = [job.prefill_remaining for job in self._decodes if job.prefill_remaining]
        return EngineLoad(
            queued_requests=len(self._prefills) + len(local),
            queued_tokens=sum(job.remaining_tokens for job in self._prefills) + sum(local),
            running_requests=len(self._decodes),
            context_tokens=sum(job.context_tokens for job in self._decodes),
            free_kv_bytes=self._machine.memory.free_bytes,
            decoding_requests=self._machine.batch.running,
            waiting_requests=sum(job.waits_for_place for job in self._decodes),
        )
