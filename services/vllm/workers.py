"""The workers of one vLLM, as our node sees them: memory that all share, and transfers in it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
from prfaas.common import log
from prfaas.common.errors import ConfigError, EngineError, PrfaasError, ProtocolError
from prfaas.common.kv_layout import KvLayout, TokenRange
from prfaas.services.engine.vllm.control import (
    PARAMS_KEY,
    VERSION,
    Abort,
    Arrived,
    Attach,
    Begin,
    Begun,
    Close,
    Closed,
    Frames,
    Loaded,
    Ready,
    Saved,
    SaveEnded,
    ToNode,
    ToWorker,
    frame,
    to_node_decoder,
)
from prfaas.services.engine.vllm.staging import StagingPlan
from prfaas.transport.arena import Arena, Region
from prfaas.transport.waiting import finish_despite_cancel

READ_BYTES = 1 << 16
ANSWER_S = 10.0
"""Within which a worker must answer Attach."""

_log = log.get_logger("vllm")


@dataclass(slots=True)
class SharedTransfer:
    """A transfer's memory, and what the workers say of it. `close` it, always."""

    transfer_id: str
    kind: Literal["save", "load"]
    plan: StagingPlan
    region: Region
    _workers: Workers
    on_saved: Callable[[int, Saved], None] = lambda rank, saved: None
    """Called with the rank, on the loop, for each Saved."""
    begun: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """All workers know of it: only then may vLLM be given the request."""
    save_ended: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    loaded: asyncio.Future[list[Loaded]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    _begun: int = 0
    _ended: int = 0
    _loaded: list[Loaded] = field(default_factory=list)
    _closed: int = 0
    _closing: asyncio.Future[None] | None = None

    @property
    def params(self) -> dict[str, Any]:
        """`kv_transfer_params` of the request whose KV this is, for the connector."""
        tokens = self.plan.tokens
        about = {"transfer_id": self.transfer_id, "kind": self.kind, "start": tokens.start, "end": tokens.end}
        return {PARAMS_KEY: about}

    def row(self, layer: int, tensor: int, row: int) -> memoryview:
        """transport.api.KvDestination."""
        begin = self.plan.offset(layer, tensor, row)
        return self.region.view[begin : begin + self.plan.extents[layer][tensor].row_bytes]

    def arrived(self, layers: list[int]) -> None:
        self._workers.tell(Arrived(self.transfer_id, layers))

    def abort(self, reason: str) -> None:
        """The layers that have not arrived won't come."""
        self._workers.tell(Abort(self.transfer_id, reason[:500]))

    def take(self, rank: int, message: ToNode) -> None:
        if isinstance(message, Saved):
            self.on_saved(rank, message)
        elif isinstance(message, Begun):
            self._begun += 1
            if self._begun == self._workers.ranks and not self.begun.done():
                self.begun.set_result(None)
        elif isinstance(message, SaveEnded):
            self._ended += 1
            if self.save_ended.done():
                return
            if message.problem:
                self.save_ended.set_exception(EngineError(f"vLLM's KV could not be copied out: {message.problem}"))
            elif self._ended == self._workers.ranks:
                self.save_ended.set_result(None)
        elif isinstance(message, Loaded):
            self._loaded.append(message)
            if len(self._loaded) == self._workers.ranks and not self.loaded.done():
                self.loaded.set_result(self._loaded)
        elif isinstance(message, Closed):
            self._closed += 1
            if self._closed == self._workers.ranks:
                self._free()

    async def close(self) -> None:
        """The memory is free when this returns; no worker touches it. Idempotent."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_future()
            for future in (self.begun, self.save_ended, self.loaded):
                if not future.cancel() and not future.cancelled():
                    future.exception()  # whoever closes has no use for it
            if self._workers.failure is None:
                self._workers.tell(Close(self.transfer_id))
            else:
                self._free()
        await finish_despite_cancel(self._closing)

    def lost(self) -> None:
        """The workers are gone, and their mappings with them."""
        if self._closing is not None:
            self._free()

    def _free(self) -> None:
        if self._closing is not None and not self._closing.done():
            self.region.free()
            self._workers.forget(self)
            self._closing.set_result(None)


class Workers:
    """All ranks of a vLLM. `failure` says when they can't be used any more; `on_failure` is then called, once."""

    def __init__(self, folder: str, memory_bytes: int, layer_wait_s: float, on_failure: Callable[[], None]) -> None:
        self._folder = Path(folder)
        self._memory_bytes = memory_bytes
        self._layer_wait_s = layer_wait_s
        self._on_failure = on_failure
        self._connections: list[_Connection] = []
        self._transfers: dict[str, SharedTransfer] = {}
        self.failure: str | None = None
        self._closed = False

    async def connect(self) -> Ready:
        """Raises ConfigError, EngineError: nothing listens, or it isn't what this node needs."""
        descriptor = os.memfd_create("prfaas-kv", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, self._memory_bytes)
            self.arena = await asyncio.to_thread(Arena, self._memory_bytes, descriptor)
            first = await self._attach(0, descriptor)
            self.layout = KvLayout.from_dict(first.layout)
            for rank in range(1, first.ranks):
                other = await self._attach(rank, descriptor)
                if other.layout != first.layout:
                    raise EngineError(f"vLLM's rank {rank} has another KV layout than rank 0")
        finally:
            os.close(descriptor)
        return first

    @property
    def ranks(self) -> int:
        return len(self._connections)

    async def _attach(self, rank: int, descriptor: int) -> Ready:
        path = self._folder / f"rank-{rank}.sock"
        connection = _Connection(rank, self._take, self._lost)
        attach = Attach(VERSION, self._memory_bytes, self._layer_wait_s)
        try:
            ready = await asyncio.wait_for(connection.open(path, attach, descriptor), ANSWER_S)
        except (OSError, TimeoutError) as error:
            await connection.close()
            reason = getattr(error, "strerror", None) or f"no answer within {ANSWER_S:g} s (is another node attached?)"
            raise ConfigError(
                [f"vllm.control = {self._folder}: no vLLM with PrfaasConnector at {path.name} ({reason})"]
            ) from error
        self._connections.append(connection)
        if ready.version != VERSION or ready.rank != rank:
            raise EngineError(
                f"{path} speaks for rank {ready.rank} in version {ready.version}, not {rank} in {VERSION}"
            )
        return ready

    def begin(self, transfer_id: str, kind: Literal["save", "load"], tokens: TokenRange) -> SharedTransfer | None:
        """None: no room in the shared memory now. Raises EngineError when the workers are gone."""
        if self.failure is not None:
            raise EngineError(self.failure)
        plan = StagingPlan(self.layout, tokens)
        region = self.arena.allocate(plan.total_bytes)
        if region is None:
            return None
        transfer = self._transfers[transfer_id] = SharedTransfer(transfer_id, kind, plan, region, self)
        self.tell(Begin(transfer_id, kind, tokens.start, tokens.end, region.offset))
        return transfer

    def fits(self, tokens: TokenRange) -> bool:
        """Into the empty memory."""
        return StagingPlan(self.layout, tokens).total_bytes <= self.arena.total_bytes

    def tell(self, message: ToWorker) -> None:
        for connection in self._connections:
            connection.send(message)

    def forget(self, transfer: SharedTransfer) -> None:
        self._transfers.pop(transfer.transfer_id, None)

    async def close(self) -> None:
        self._closed = True
        for connection in self._connections:
            await connection.close()
        self._let_go("the node is closing")

    def _take(self, rank: int, message: ToNode) -> None:
        transfer = self._transfers.get(getattr(message, "transfer_id", ""))
        if transfer is not None:
            transfer.take(rank, message)

    def _lost(self, rank: int, reason: str) -> None:
        if self.failure is None and not self._closed:
            self._let_go(f"the connection to vLLM's worker {rank} is lost ({reason}); restart vLLM and this node")
            self._on_failure()

    def _let_go(self, failure: str) -> None:
        self.failure = self.failure or failure
        for transfer in list(self._transfers.values()):
            transfer.lost()


class _Connection:
    """To one rank's control socket."""

    def __init__(
        self, rank: int, on_message: Callable[[int, ToNode], None], on_lost: Callable[[int, str], None]
    ) -> None:
        self._rank = rank
        self._on_message = on_message
        self._on_lost = on_lost
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def open(self, path: Path, attach: Attach, descriptor: int) -> Ready:
        loop = asyncio.get_running_loop()
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.setblocking(False)
            await loop.sock_connect(connected, str(path))
            socket.send_fds(connected, [frame(attach)], [descriptor])
        except BaseException:
            connected.close()
            raise
        reader, self._writer = await asyncio.open_connection(sock=connected)
        frames = Frames()
        while True:
            data = await reader.read(READ_BYTES)
            if not data:
                raise ConnectionResetError(0, "it closed the connection; its log says why")
            bodies = list(frames.feed(data))
            if bodies:
                break
        ready = to_node_decoder.decode(bodies[0])
        if not isinstance(ready, Ready):
            raise EngineError(f"{path} answered with {type(ready).__name__}")
        self._reading = asyncio.create_task(self._read(reader, frames))
        return ready

    def send(self, message: ToWorker) -> None:
        if self._writer is not None:
            self._writer.write(frame(message))

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        if self._writer is not None:
            self._writer.close()

    async def _read(self, reader: asyncio.StreamReader, frames: Frames) -> None:
        reason = "it has ended"
        try:
            while data := await reader.read(READ_BYTES):
                for body in frames.feed(data):
                    self._on_message(self._rank, to_node_decoder.decode(body))
        except (OSError, msgspec.DecodeError, ProtocolError, PrfaasError) as error:
            reason = str(error)
        self._on_lost(self._rank, reason)
