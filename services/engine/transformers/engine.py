"""`TransformersEngine`: an asyncio front, one thread that computes, KV memory in one arena."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable, Sequence
from pathlib import PurePath

from prfaas.common.config import EngineConfig
from prfaas.common.errors import EngineError
from prfaas.common.perfmodel.profiles import NodeProfile, named
from prfaas.services.engine.api import (
    DecodeEvent,
    DecodeRequest,
    EngineInfo,
    EngineLoad,
    EventStream,
    PrefillEvent,
    PrefillRequest,
)
from prfaas.services.engine.measured_profile import MeasuredProfile
from prfaas.services.engine.prefill_line import PrefillLine
from prfaas.services.engine.prefix_store import PrefixStore
from prfaas.services.engine.transformers import loader
from prfaas.services.engine.transformers.requests import DecodeLife, Desk, PrefillLife
from prfaas.services.engine.transformers.stepper import Stepper
from prfaas.transport.api import KvReceiver, KvSender
from prfaas.transport.arena import Arena


class TransformersEngine:
    """`services.engine.api.Engine` on transformers' own modules."""

    forwarding = None
    mirror = None

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._desk: Desk | None = None
        self._profile: NodeProfile | None = None
        self._failure: str | None = None
        self._on_failure: Callable[[], None] = lambda: None
        self._lives: set[PrefillLife | DecodeLife] = set()

    @property
    def info(self) -> EngineInfo:
        return self._ready().info

    @property
    def prefixes(self) -> PrefixStore | None:
        return self._ready().prefixes

    @property
    def profile(self) -> NodeProfile | None:
        """`engine.profile`, else what has been measured while serving."""
        return self._profile or self._ready().measured.profile

    @property
    def failure(self) -> str | None:
        return self._failure

    def on_failure(self, callback: Callable[[], None]) -> None:
        self._on_failure = callback

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._profile = named(self._config.profile) if self._config.profile else None
        loaded = await loop.run_in_executor(None, loader.load, self._config)
        arena = await loop.run_in_executor(None, Arena, self._config.arena_bytes)
        info = EngineInfo(
            model=self._config.served_model or PurePath(self._config.model).name,
            model_fingerprint=loaded.fingerprint,
            layout=loaded.layout,
            max_model_tokens=loaded.max_model_tokens,
            vocabulary=loaded.vocabulary,
            eos_token_ids=loaded.eos_token_ids,
            arena_bytes=arena.total_bytes,
        )
        prefixes = await loop.run_in_executor(None, self._make_prefixes, info)
        measured = MeasuredProfile(
            info.model,
            f"{platform.machine()}, {self._config.device}, {self._config.threads} threads",
            info.layout,
            self._config.max_batch,
            info.arena_bytes,
        )
        stepper = Stepper(loaded.model, self._config, loop, self._died, measured.stepped)
        line = PrefillLine(self._config.max_prefills)
        self._desk = Desk(self._config, info, arena, stepper, line, prefixes, measured)

    def _make_prefixes(self, info: EngineInfo) -> PrefixStore | None:
        """Touches its memory. Raises ConfigError."""
        config = self._config
        if not config.prefix_bytes:
            return None
        return PrefixStore(info.layout, info.model_fingerprint, config.prefix_bytes, config.prefix_block_tokens)

    async def close(self) -> None:
        desk, self._desk = self._desk, None
        if desk is None:
            return
        for life in list(self._lives):
            life.stream.fail(EngineError("the engine is closing"))
        try:
            await asyncio.gather(*(life.stream.aclose() for life in list(self._lives)))
        finally:
            if desk.prefixes is not None:
                await desk.prefixes.aclose()
            await desk.stepper.stop()

    def _died(self, error: Exception) -> None:
        self._failure = f"the engine has stopped computing ({error or type(error).__name__}); restart this node"
        for life in list(self._lives):
            life.stream.fail(EngineError(self._failure))
        self._on_failure()

    def prefill(self, request: PrefillRequest, transfers: Sequence[KvSender]) -> EventStream[PrefillEvent]:
        life = PrefillLife(self._alive(), request, transfers)
        self._keep(life)
        return life.stream

    def decode(self, request: DecodeRequest, transfers: Sequence[KvReceiver]) -> EventStream[DecodeEvent]:
        life = DecodeLife(self._alive(), request, transfers)
        self._keep(life)
        return life.stream

    def load(self) -> EngineLoad:
        desk = self._ready()
        decodes = [life for life in self._lives if isinstance(life, DecodeLife) and life.is_decoding]
        ready = sum(life.has_all for life in decodes)
        return EngineLoad(
            queued_requests=desk.line.queued_requests,
            queued_tokens=desk.line.queued_tokens,
            running_requests=len(decodes),
            context_tokens=sum(life.context_tokens for life in decodes),
            free_kv_bytes=desk.arena.free_bytes,
            decoding_requests=min(ready, self._config.max_batch),
            waiting_requests=max(0, ready - self._config.max_batch),
        )

    def _ready(self) -> Desk:
        if self._desk is None:
            raise EngineError("the engine has not been started, or is closed")
        return self._desk

    def _alive(self) -> Desk:
        if self._failure is not None:
            raise EngineError(self._failure)
        return self._ready()

    def _keep(self, life: PrefillLife | DecodeLife) -> None:
        self._lives.add(life)
        life.stream.on_closed(lambda: self._lives.discard(life))
