"""services.engine.api.Engine by a vLLM beside this node: its own, or one that the user runs."""

from __future__ import annotations

import asyncio
import platform
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePath

import aiohttp
from prfaas.common import log
from prfaas.common.config import EngineConfig, VllmConfig
from prfaas.common.errors import ConfigError, EngineError
from prfaas.common.perfmodel.profiles import NodeProfile, named
from prfaas.services.engine import model_files
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
from prfaas.services.engine.tokenizer import read_eos_token_ids
from prfaas.services.engine.vllm.version import check_version
from prfaas.services.vllm.client import VllmClient
from prfaas.services.vllm.decoding import DecodeLife, VllmLife
from prfaas.services.vllm.desk import Desk
from prfaas.services.vllm.forwarding import ForwardLife, VllmForwarding
from prfaas.services.vllm.kv_events import KvEvents
from prfaas.services.vllm.prefilling import PrefillLife
from prfaas.services.vllm.prefix_mirror import PrefixMirror
from prfaas.services.vllm.process import HOST, VllmProcess, free_port, serve_command
from prfaas.services.vllm.workers import Workers
from prfaas.transport.api import KvReceiver, KvSender

_log = log.get_logger("vllm")


class VllmEngine:
    """`prefixes` is None: vLLM has a prefix cache of its own, and `mirror` is what is known of it."""

    prefixes = None

    def __init__(self, config: EngineConfig, vllm: VllmConfig) -> None:
        self._config = config
        self._name = config.served_model or PurePath(config.model).name
        self._vllm = vllm
        self._desk: Desk | None = None
        self._process: VllmProcess | None = None
        self._workers: Workers | None = None
        self._session: aiohttp.ClientSession | None = None
        self._events: KvEvents | None = None
        self.mirror: PrefixMirror | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._profile: NodeProfile | None = None
        self._failure: str | None = None
        self._on_failure: Callable[[], None] = lambda: None
        self._lives: set[PrefillLife | DecodeLife | ForwardLife] = set()

    @property
    def info(self) -> EngineInfo:
        return self._ready().info

    @property
    def profile(self) -> NodeProfile | None:
        """`engine.profile`, else what has been measured while serving."""
        return self._profile or self._ready().measured.profile

    @property
    def forwarding(self) -> VllmForwarding:
        return VllmForwarding(self._ready(), self._keep)

    @property
    def failure(self) -> str | None:
        return self._failure

    def on_failure(self, callback: Callable[[], None]) -> None:
        self._on_failure = callback

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises ConfigError, EngineError."""
        config = self._config
        if self._vllm.url and not self._vllm.control:
            raise ConfigError(
                ["vllm.url is set: name the folder of that vLLM's control sockets as well (vllm.control)"]
            )
        self._profile = named(config.profile) if config.profile else None
        directory = Path(config.model)
        fingerprint = asyncio.create_task(asyncio.to_thread(model_files.fingerprint, directory))
        try:
            # Streams of hours; a limit of connections would be one of requests.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0)
            self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
            client, control, events = await self._serving(self._session)
            served_model, max_model_tokens, adapters = await client.models()
            workers = Workers(control, config.arena_bytes, self._vllm.layer_wait_s, self._workers_failed)
            self._workers = workers
            ready = await workers.connect()
            check_version(ready.vllm)
            info = EngineInfo(
                model=self._name,
                model_fingerprint=await fingerprint,
                layout=workers.layout,
                max_model_tokens=min(max_model_tokens, config.max_model_tokens or max_model_tokens),
                vocabulary=model_files.vocabulary(directory),
                eos_token_ids=read_eos_token_ids(directory),
                # What runs lies in vLLM's cache; the shared memory is only passed through.
                arena_bytes=max(1, workers.layout.bytes_per_token * ready.kv_tokens),
            )
            if events:
                mirror = PrefixMirror(info.model_fingerprint, config.prefix_block_tokens)
                self._events = KvEvents(events, mirror)
                self.mirror = mirror
        except BaseException:
            fingerprint.cancel()
            await self.close()
            raise
        hardware = f"{platform.machine()}, vLLM {ready.vllm}, {ready.ranks} ranks"
        measured = MeasuredProfile(info.model, hardware, info.layout, config.max_batch, info.arena_bytes)
        line = PrefillLine(config.max_prefills)
        self._desk = Desk(
            config, self._vllm, info, served_model, client, workers, line, measured, self.mirror, adapters
        )
        _log.info("vLLM is attached", vllm=ready.vllm, ranks=ready.ranks, kv_tokens=ready.kv_tokens)

    async def _serving(self, session: aiohttp.ClientSession) -> tuple[VllmClient, str, str]:
        """A vLLM that serves, its control folder, and where its KV events are."""
        vllm = self._vllm
        if vllm.url:
            client = VllmClient(session, vllm.url)
            if not await client.healthy():
                raise ConfigError([f"vllm.url = {vllm.url}: no vLLM answers there"])
            return client, vllm.control, vllm.events
        self._folder = tempfile.TemporaryDirectory(prefix="prfaas-vllm-")
        control = vllm.control or self._folder.name
        port = free_port()
        client = VllmClient(session, f"http://{HOST}:{port}")
        events = vllm.events or f"ipc://{self._folder.name}/events"
        command = serve_command(self._config, vllm, self._name, port, control, events)
        self._process = VllmProcess(command, self._failed)
        await self._process.start(client, vllm.start_s)
        return client, control, events

    async def close(self) -> None:
        for life in list(self._lives):
            life.stream.fail(EngineError("the engine is closing"))
        await asyncio.gather(*(life.stream.aclose() for life in list(self._lives)))
        self._desk = None
        if self._events is not None:
            await self._events.close()
        if self._workers is not None:
            await self._workers.close()
        if self._session is not None:
            await self._session.close()
        if self._process is not None:
            await self._process.stop()
        if self._folder is not None:
            with suppress(OSError):
                self._folder.cleanup()

    def _workers_failed(self) -> None:
        assert self._workers is not None
        self._failed(self._workers.failure or "vLLM's workers are gone")

    def _failed(self, reason: str) -> None:
        if self._failure is not None:
            return
        self._failure = reason
        _log.error("vLLM has failed", reason=reason)
        for life in list(self._lives):
            life.stream.fail(EngineError(reason))
        self._on_failure()

    # -- requests -----------------------------------------------------------------------------------------------------

    def prefill(self, request: PrefillRequest, transfers: Sequence[KvSender]) -> EventStream[PrefillEvent]:
        life = PrefillLife(self._alive(), request, transfers)
        self._keep(life)
        return life.stream

    def decode(self, request: DecodeRequest, transfers: Sequence[KvReceiver]) -> EventStream[DecodeEvent]:
        life = DecodeLife(self._alive(), request, transfers)
        self._keep(life)
        life.begin()
        return life.stream

    def load(self) -> EngineLoad:
        desk = self._ready()
        decodes = [life for life in self._lives if isinstance(life, VllmLife)]
        running = [life for life in decodes if life.is_running]
        held_bytes = desk.info.layout.bytes_per_token * sum(life.context_tokens for life in running)
        return EngineLoad(
            queued_requests=desk.line.queued_requests,
            queued_tokens=desk.line.queued_tokens,
            running_requests=len(decodes),
            context_tokens=sum(life.context_tokens for life in decodes),
            free_kv_bytes=max(0, desk.info.arena_bytes - held_bytes),
            decoding_requests=min(len(running), self._config.max_batch),
            waiting_requests=max(0, len(running) - self._config.max_batch),
        )

    def _ready(self) -> Desk:
        if self._desk is None:
            raise EngineError("the engine has not been started, or is closed")
        return self._desk

    def _alive(self) -> Desk:
        if self._failure is not None:
            raise EngineError(self._failure)
        return self._ready()

    def _keep(self, life: PrefillLife | DecodeLife | ForwardLife) -> None:
        self._lives.add(life)
        life.stream.on_closed(lambda: self._lives.discard(life))
