"""A transfer within one process, and engines on top of it.

`Loopback` is not the transport: it copies pieces at once and lets a test decide when layers are announced. `Regions`
is: two KV endpoints over TCP, and a ticket for each request.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from prfaas.common.config import EngineConfig, TransportConfig
from prfaas.common.errors import NoRoomError, TransferCancelledError
from prfaas.common.kv_layout import WHOLE, KvLayout, Shard, TokenRange
from prfaas.services.engine.api import DecodeRequest, PrefillDone, PrefillRequest, SamplingParams, TokenEvent
from prfaas.services.engine.prefix_store import Hold
from prfaas.services.engine.transformers.engine import TransformersEngine
from prfaas.transport.api import KvDestination, KvPiece, KvReceiver, Reserve, TransferReport, TransferSpec
from prfaas.transport.endpoint import KvEndpoint
from prfaas.transport.lanes.memory import MemoryNetwork

from tests.tiny_models import make_tiny_model

torch.set_num_threads(1)


class Loopback:
    """Both halves of one transfer. `announce` False: layers wait for `announce_layer`."""

    def __init__(self, layout: KvLayout, spec: TransferSpec, *, announce: bool = True, rooms: int = 0) -> None:
        self.layout = layout
        self.spec = spec
        self.announce = announce
        self.no_room_answers = rooms
        self.report = TransferReport()
        self.rtt_s = 0.0
        self.failed: Exception | None = None
        self.finished_timings: dict[str, Any] | None = None
        self.opens = 0
        self.left_s: dict[int, float] = {}
        """When the first piece of each layer came."""
        self.opened = asyncio.Event()
        self.answer = asyncio.Event()
        self.answer.set()
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._destination: KvDestination | None = None
        self._missing = [layout.layer_bytes(layer, spec.tokens, spec.shard) for layer in range(len(layout.layers))]
        self.complete = asyncio.Event()
        self._all_here = asyncio.Event()
        self._failed_callbacks: list[Callable[[Exception], None]] = []

    # -- sender -------------------------------------------------------------------------------------------------------

    async def open(self, remaining_s: float | None = None) -> None:
        await self.answer.wait()
        self.opens += 1
        if self.no_room_answers > 0:
            self.no_room_answers -= 1
            raise NoRoomError("no room", retry_after_s=0.01)
        destination = self._reserve(self.spec)
        if destination is None:
            raise NoRoomError("no room", retry_after_s=0.01)
        self._destination = destination
        self.opened.set()
        for layer, missing in enumerate(self._missing):
            if not missing and self.announce:
                self._on_layer(layer)

    def put(self, pieces: Sequence[KvPiece]) -> None:
        with self._lock:
            if self.failed is not None:
                return
            assert self._destination is not None, "put before OPEN was answered"
            for piece in pieces:
                row = self._destination.row(piece.layer, piece.tensor, piece.row)
                row[piece.offset_bytes : piece.offset_bytes + piece.data.nbytes] = piece.data
                self.report.raw_bytes += piece.data.nbytes
                self._missing[piece.layer] -= piece.data.nbytes
                self.left_s.setdefault(piece.layer, time.monotonic())
                if self._missing[piece.layer] == 0 and self.announce:
                    self._loop.call_soon_threadsafe(self._on_layer, piece.layer)

    def finish(self, timings: dict[str, Any]) -> None:
        self.finished_timings = timings
        assert not any(self._missing), "finished with bytes missing"
        self._loop.call_soon_threadsafe(self.complete.set)

    def on_failed(self, callback: Callable[[Exception], None]) -> None:
        self._failed_callbacks.append(callback)

    async def done(self) -> TransferReport:
        await self.complete.wait()
        return self.report

    # -- receiver -----------------------------------------------------------------------------------------------------

    def bind(self, reserve: Reserve, on_layer: Callable[[int], None], on_failed: Callable[[Exception], None]) -> None:
        self._reserve, self._on_layer = reserve, on_layer
        self._failed_callbacks.append(on_failed)

    def announce_layer(self, layer: int) -> None:
        assert self._missing[layer] == 0
        self._on_layer(layer)

    async def finished(self) -> TransferReport:
        await self.complete.wait()
        return self.report

    # -- both ---------------------------------------------------------------------------------------------------------

    def fail(self, error: Exception) -> None:
        with self._lock:
            self.failed = error
        for callback in self._failed_callbacks:
            callback(error)

    async def aclose(self, reason: str = "closed") -> None:
        with self._lock:
            if self.failed is None:
                self.failed = TransferCancelledError(reason)


def transfer_spec(engine: TransformersEngine, n: int, max_output_tokens: int, **changes: Any) -> TransferSpec:
    fields: dict[str, Any] = {
        "transfer_id": "0" * 32,
        "request_id": "r",
        "tokens": TokenRange(0, n - 1),
        "prompt_tokens": n,
        "max_output_tokens": max_output_tokens,
        "model_fingerprint": engine.info.model_fingerprint,
        "layout_hash": engine.info.layout.layout_hash,
    }
    return TransferSpec(**(fields | changes))


@dataclass
class Answer:
    """What came out of a decode."""

    token_ids: list[int] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)


GREEDY = SamplingParams(temperature=0, ignore_eos=True)


async def collect(events: AsyncIterator[Any]) -> Answer:
    answer = Answer()
    try:
        async for event in events:
            answer.events.append(event)
            if isinstance(event, TokenEvent):
                answer.token_ids.append(event.token_id)
    finally:
        await events.aclose()  # type: ignore[attr-defined]
    return answer


class Pair:
    """A prefill engine and a decode engine, joined by loopbacks."""

    def __init__(self, prefill: TransformersEngine, decode: TransformersEngine) -> None:
        self.prefill = prefill
        self.decode = decode

    def loopback(self, tokens: int, max_output_tokens: int, *, shard: Shard = WHOLE, **options: Any) -> Loopback:
        spec = transfer_spec(self.decode, tokens, max_output_tokens, shard=shard)
        return Loopback(self.decode.info.layout, spec, **options)

    async def generate(
        self, prompt: Sequence[int], max_output_tokens: int, sampling: SamplingParams = GREEDY
    ) -> Answer:
        """Through both engines; a prompt of one token needs no prefill."""
        request = DecodeRequest("r", prompt, max_output_tokens, sampling)
        if len(prompt) == 1:
            return await collect(self.decode.decode(request, []))
        transfer = self.loopback(len(prompt), max_output_tokens)
        decoding = self.decode.decode(request, [transfer])
        prefilling = asyncio.ensure_future(collect(self.prefill.prefill(PrefillRequest("r", prompt), [transfer])))
        answer = await collect(decoding)
        await prefilling
        return answer


@dataclass
class Journey:
    """One request through both regions: what decode said, what prefill said last, the transfer's receiving half, and
    how many tokens each side held of it. done, receiver: None where decode held everything."""

    answer: Answer
    done: PrefillDone | None
    receiver: KvReceiver | None
    prefill_held: int
    decode_held: int

    @property
    def sent_bytes(self) -> int:
        """Of KV, as the prefill side counts them."""
        return 0 if self.done is None else self.done.reports[0].raw_bytes

    @property
    def received_bytes(self) -> int:
        return 0 if self.receiver is None else self.receiver.report.raw_bytes


class Regions:
    """A prefill engine and a decode engine, each with its KV endpoint. Requests may run at the same time."""

    def __init__(self, prefill: TransformersEngine, decode: TransformersEngine, ends: Sequence[KvEndpoint]) -> None:
        self.prefill = prefill
        self.decode = decode
        self._sending, self._receiving = ends
        self._requests = 0

    async def generate(self, prompt: Sequence[int], max_output_tokens: int, *, reuse: bool = False) -> Journey:
        """Greedy. The prompt has two tokens at least: one needs no prefill. reuse: of what both sides hold, as the
        nodes do it; a prompt that decode holds whole needs neither prefill nor transfer."""
        self._requests += 1
        held, holding = (self._hold(engine, prompt, reuse) for engine in (self.prefill, self.decode))
        start = 0 if holding is None else holding.tokens
        spec = transfer_spec(
            self.decode,
            len(prompt),
            max_output_tokens,
            transfer_id=f"{self._requests:032x}",
            request_id=f"r{self._requests}",
            tokens=TokenRange(start, len(prompt) - 1),
        )
        request = DecodeRequest(spec.request_id, prompt, max_output_tokens, GREEDY, hold=holding)
        if not spec.tokens.tokens:
            if held is not None:
                held.release()
            return Journey(await collect(self.decode.decode(request, [])), None, None, start, start)
        ticket, receiver = self._receiving.receiver(spec)
        decoding = self.decode.decode(request, [receiver])
        sender = self._sending.sender(ticket, "decode", self._receiving.addresses)
        job = PrefillRequest(spec.request_id, prompt, hold=held)
        prefilling = asyncio.ensure_future(collect(self.prefill.prefill(job, [sender])))
        answer = await collect(decoding)
        done = (await prefilling).events[-1]
        assert isinstance(done, PrefillDone)
        assert done.reports[0].raw_bytes == self.decode.info.layout.total_bytes(spec.tokens)
        return Journey(answer, done, receiver, 0 if held is None else held.tokens, start)

    @staticmethod
    def _hold(engine: TransformersEngine, prompt: Sequence[int], reuse: bool) -> Hold | None:
        return engine.prefixes.hold(prompt[:-1]) if reuse and engine.prefixes is not None else None


@asynccontextmanager
async def regions(
    transport: TransportConfig, backend: MemoryNetwork | None = None, **settings: Any
) -> AsyncIterator[Regions]:
    """Two engines with the same settings, joined over TCP on loopback, or over a backend's lanes. Afterwards all memory
    of both must have come back."""
    prefill, decode = await started(**settings), await started(**settings)
    ends = [
        KvEndpoint(
            transport,
            node=node,
            layout=engine.info.layout,
            model_fingerprint=engine.info.model_fingerprint,
            secret=b"s" * 32,
            backend=backend,
        )
        for node, engine in (("prefill", prefill), ("decode", decode))
    ]
    for end in ends:
        await end.start()
    ends[0].connect("decode", ends[1].addresses)
    try:
        yield Regions(prefill, decode, ends)
        for engine in (prefill, decode):
            assert engine.load().free_kv_bytes == engine.info.arena_bytes
            assert engine.prefixes is None or engine.prefixes.pool.pinned_bytes == 0
    finally:
        for end in ends:
            await end.aclose()
        await prefill.close()
        await decode.close()


MIB = 1 << 20


DEFAULTS: dict[str, Any] = {"dtype": "float32", "arena_bytes": 64 * MIB, "prefix_bytes": 4 * MIB}


async def started(**settings: Any) -> TransformersEngine:
    engine = TransformersEngine(EngineConfig(**(DEFAULTS | settings)))
    await engine.start()
    return engine


@pytest.fixture(scope="session")
def start_engine() -> Callable[..., Any]:
    return started


@pytest.fixture(scope="session")
def toolbox() -> Any:
    """The names above, for test modules (they can't import a conftest under --import-mode=importlib)."""
    import types

    return types.SimpleNamespace(
        Loopback=Loopback,
        Pair=Pair,
        collect=collect,
        transfer_spec=transfer_spec,
        started=started,
        regions=regions,
        GREEDY=GREEDY,
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """model type -> directory of a tiny random model of it, in float32."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type) / f"tiny-{model_type}"
            make_tiny_model(model_type, made[model_type])
        return made[model_type]

    return make
