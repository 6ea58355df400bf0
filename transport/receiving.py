"""The shell of a receiving transfer: what `KvEndpoint.receiver` returns.

offered --OPEN--> no room (the sender asks again) --OPEN--> open --all layers and FINISH--> complete
   '---------------------- failed (cancel, damage, lanes lost, expiry) <----'
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING

from prfaas.common.errors import (
    ChecksumError,
    EngineError,
    ProtocolError,
    TransferCancelledError,
    TransferError,
)
from prfaas.common.kv_layout import KvLayout, TensorKind
from prfaas.common.log import get_logger
from prfaas.transport.api import KvDestination, Reserve, TransferReport, TransferSpec
from prfaas.transport.codecs.api import ChunkForm, Codec, CodecError, form_of
from prfaas.transport.codecs.choice import CodecSpeeds
from prfaas.transport.codecs.registry import CODECS
from prfaas.transport.connection import ChunkArrived
from prfaas.transport.frames import (
    FROM_RECEIVER,
    HEADER_BYTES,
    MAX_REASON_CHARS,
    MAX_TRACEPARENT_CHARS,
    RAW,
    Ack,
    Cancel,
    Credit,
    FrameHeader,
    Open,
    Opened,
    checksum,
)
from prfaas.transport.transfer import TIME_RAN_OUT, Place, Placement, ReceivingTransfer, Standing, place_of
from prfaas.transport.waiting import finish_despite_cancel

if TYPE_CHECKING:
    from prfaas.transport.channel import Channel
    from prfaas.transport.session import Session

log = get_logger("transport")

MAX_REMAINING_S = 30 * 86400.0
"""A peer that names a longer time (or no number at all) has no deadline."""
RETRY_AFTER_S = 0.05
"""What "no room" tells the sender; memory comes free when a stream ends."""


class TransferReceiver:
    """A `KvReceiver`."""

    def __init__(
        self,
        spec: TransferSpec,
        layout: KvLayout,
        window_bytes: int,
        executor: Executor,
        speeds: CodecSpeeds,
        lossy: frozenset[tuple[TensorKind, str]],
        on_ended: Callable[[TransferReceiver, str], None],
    ) -> None:
        self.spec = spec
        self.layout = layout
        self.report = TransferReport()
        self.damaged_chunks = 0
        self.expiry: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._window_bytes = window_bytes
        self._executor = executor
        self._speeds = speeds
        self._lossy = lossy
        self._on_ended = on_ended
        self._reserve: Reserve | None = None
        self._on_layer: Callable[[int], None] = lambda _layer: None
        self._on_failed: Callable[[Exception], None] = lambda _error: None
        self._session: Session | None = None
        self._number = 0
        self._state: ReceivingTransfer | None = None
        self._destination: KvDestination | None = None
        self._rows: dict[tuple[int, int, int], memoryview] = {}
        self._finish_channel: Channel | None = None
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._ended = False
        self._decoding = 0
        self._acknowledge_on: dict[Place, Channel] = {}
        """Chunks that are being checked, and of which another lane has brought a copy meanwhile: the lane they came on
        is gone, and an acknowledgement on it would be lost."""
        self._decoded: asyncio.Future[None] | None = None

    # -- KvReceiver

    def bind(self, reserve: Reserve, on_layer: Callable[[int], None], on_failed: Callable[[Exception], None]) -> None:
        self._reserve, self._on_layer, self._on_failed = reserve, on_layer, on_failed

    async def finished(self) -> TransferReport:
        await asyncio.shield(self._finished)
        return self.report

    async def aclose(self, reason: str = "closed") -> None:
        error = TransferCancelledError(f"cancelled by the decode side: {reason}")
        self._end(error, notify=False, cancel=Cancel(error.reason, reason[:MAX_REASON_CHARS]))
        if self._decoding:
            self._decoded = self._decoded or self._loop.create_future()
            await finish_despite_cancel(self._decoded)
        self._rows.clear()
        self._destination = None

    # -- for the session

    def admit(self, session: Session, number: int, body: Open) -> Opened:
        """OPEN came with a good ticket: reserve memory and answer."""
        attempt = body.attempt
        if self._reserve is None:
            return Opened(attempt, refused="the decode side is not ready for this transfer", kind="engine")
        if self.open or self._number not in (0, number):
            # A second number would outlive `_end`, and its chunks would find the destination.
            return Opened(attempt, refused="the transfer is open already", kind="mismatch")
        self._session, self._number = session, number
        if len(body.traceparent) <= MAX_TRACEPARENT_CHARS:
            self.report.traceparent = body.traceparent
        session.add_receiver(number, self)
        self._expire_in(body.remaining_s)
        try:
            destination = self._reserve(self.spec)
        except Exception as error:
            refusal = self._engine_error("reserve", error)
            self._end(refusal, notify=True)
            return Opened(attempt, refused=str(refusal)[:MAX_REASON_CHARS], kind="engine")
        if destination is None:
            return Opened(attempt, no_room=True, retry_after_s=RETRY_AFTER_S)
        self._destination = destination
        self._state = ReceivingTransfer(self.layout, self.spec, self._window_bytes)
        for layer in self._state.empty_layers():
            self._loop.call_soon(self._layer_complete, layer)
        return Opened(attempt, credit_bytes=self._window_bytes)

    @property
    def open(self) -> bool:
        return self._state is not None

    def place(self, channel: Channel, chunk: FrameHeader) -> memoryview | None:
        """Where a CHUNK's bytes go; None: it is here already. Raises ProtocolError."""
        state = self._state
        if state is None or self._session is None:
            raise ProtocolError("CHUNK of a transfer that got no credit")
        if chunk.codec != RAW and chunk.codec not in CODECS:
            raise ProtocolError(f"CHUNK with unknown codec {chunk.codec}")
        placement = state.place(chunk, channel)
        if chunk.codec != RAW and not CODECS[chunk.codec].lossless:
            self._check_lossy(chunk)
        if placement is Placement.DUPLICATE:
            self.report.duplicate_chunks += 1
            return None
        if placement is Placement.TAKEN_OVER:
            self._session.stop_writing(chunk, but=channel)
        try:
            target = self._target(chunk)
        except Exception as error:
            self.fail(self._engine_error("row", error))
            return None
        if chunk.codec == RAW:
            return target
        return self._session.scratch.take(chunk.body_bytes)

    def _check_lossy(self, chunk: FrameHeader) -> None:
        name = CODECS[chunk.codec].name
        kind = self.layout.layers[chunk.layer].tensors[chunk.tensor].kind
        if (kind, name) not in self._lossy:
            raise ProtocolError(f"CHUNK in lossy codec {name}, which this side does not allow for {kind} tensors")

    def arrived(self, channel: Channel, event: ChunkArrived) -> None:
        """A CHUNK is here: in its place (raw), in a scratch buffer (encoded), or nowhere (a duplicate)."""
        chunk, data, hashed = event
        assert self._state is not None
        assert self._session is not None
        self.report.wire_bytes += HEADER_BYTES + chunk.body_bytes
        if data is None:
            self._drained(channel, chunk)
            return
        if chunk.codec == RAW and hashed == chunk.checksum:
            self._good(channel, chunk, layer_complete=self._state.received_good(chunk))
            return
        self._state.received(chunk)
        if chunk.codec == RAW:
            self._damaged(channel, chunk)
        else:
            self._decode(channel, chunk, data)

    def _drained(self, channel: Channel, chunk: FrameHeader) -> None:
        """A copy of a chunk went to the sink. It is acknowledged when the other copy is known to be good."""
        assert self._state is not None
        assert self._session is not None
        standing = self._state.standing(chunk)
        if standing is Standing.CHECKING:
            self._acknowledge_on[place_of(chunk)] = channel
        elif standing is not Standing.RECEIVING:
            self._session.acknowledge(channel, self._number, chunk.sequence, damaged=standing is Standing.FREE)

    def finish_arrived(self, channel: Channel, timings: dict[str, float | list[float]]) -> None:
        if self._state is None:
            raise ProtocolError("FINISH of a transfer that got no credit")
        self.report.peer_timings = timings
        self._finish_channel = channel
        self._state.finish()
        self._complete_if_all_here()

    def lane_lost(self, channel: Channel) -> None:
        if self._state is not None:
            self._state.lane_lost(channel)

    def repeat_credit(self, channel: Channel) -> None:
        """A lane died, perhaps with a CREDIT in it."""
        if self._state is not None:
            channel.send(Credit(self._state.granted_bytes), self._number, FROM_RECEIVER)

    def fail(self, error: Exception, *, tell_peer: bool = True) -> None:
        """Idempotent, and a no-op after completion."""
        word = error.reason if isinstance(error, TransferError) else TransferError.reason
        self._end(error, notify=True, cancel=Cancel(word, str(error)[:MAX_REASON_CHARS]) if tell_peer else None)

    # -- inside

    def _target(self, chunk: FrameHeader) -> memoryview:
        key = (chunk.layer, chunk.tensor, chunk.row)
        row = self._rows.get(key)
        if row is None:
            assert self._destination is not None
            row = memoryview(self._destination.row(*key)).cast("B")
            wanted = self.layout.extent(chunk.layer, chunk.tensor, self.spec.tokens, self.spec.shard).row_bytes
            if row.readonly or len(row) != wanted:
                raise EngineError(f"row {key} of the destination is not {wanted} writable bytes (it has {len(row)})")
            self._rows[key] = row
        return row[chunk.offset_bytes : chunk.offset_bytes + chunk.raw_bytes]

    def _decode(self, channel: Channel, chunk: FrameHeader, wire: memoryview) -> None:
        form = form_of(self.layout.layers[chunk.layer].tensors[chunk.tensor])
        self._decoding += 1
        job = self._loop.run_in_executor(
            self._executor, decode_chunk, CODECS[chunk.codec], wire, self._target(chunk), form, chunk
        )
        job.add_done_callback(partial(self._decode_done, channel, chunk, wire, form.kind))

    def _decode_done(
        self,
        channel: Channel,
        chunk: FrameHeader,
        wire: memoryview,
        kind: TensorKind,
        job: asyncio.Future[tuple[bool, float]],
    ) -> None:
        self._decoding -= 1
        if self._session is not None:
            self._session.scratch.give_back(wire)
        channel = self._acknowledge_on.pop(place_of(chunk), channel)
        if not self._ended:
            # A job that could not run at all (the executor is gone) counts as damage: nothing arrived.
            good, decode_s = (False, 0.0) if job.cancelled() or job.exception() is not None else job.result()
            if good:
                assert self._state is not None
                self._speeds.decoded(CODECS[chunk.codec].name, kind, chunk.raw_bytes, decode_s)
                self._good(channel, chunk, layer_complete=self._state.arrived(chunk))
            else:
                self._damaged(channel, chunk)
        if self._decoding == 0 and self._decoded is not None and not self._decoded.done():
            self._decoded.set_result(None)

    def _good(self, channel: Channel, chunk: FrameHeader, *, layer_complete: bool) -> None:
        assert self._session is not None
        self.report.raw_bytes += chunk.raw_bytes
        self._session.acknowledge(channel, self._number, chunk.sequence)
        self._credit(channel)
        if layer_complete:
            self._layer_complete(chunk.layer)
            self._complete_if_all_here()

    def _damaged(self, channel: Channel, chunk: FrameHeader) -> None:
        assert self._state is not None
        assert self._session is not None
        self.damaged_chunks += 1
        log.warning("kv chunk arrived damaged", request_id=self.spec.request_id, lane=channel.index)
        self._session.counters.checksum_failures.inc()
        try:
            self._state.damaged(chunk)
        except ChecksumError as error:
            self.fail(error)
            return
        self._session.acknowledge(channel, self._number, chunk.sequence, damaged=True)
        self._credit(channel)

    def _credit(self, channel: Channel) -> None:
        assert self._state is not None
        assert self._session is not None
        granted = self._state.credit_due()
        if granted is not None:
            self._session.send(Credit(granted), self._number, FROM_RECEIVER, prefer=channel)

    def _layer_complete(self, layer: int) -> None:
        if self._ended:
            return
        self.report.layer_at_s[layer] = time.monotonic()
        try:
            self._on_layer(layer)
        except Exception as error:
            self.fail(self._engine_error("on_layer", error))

    def _complete_if_all_here(self) -> None:
        if self._ended or self._state is None or not self._state.complete:
            return
        assert self._session is not None
        self._ended = True
        self._stop_clock()
        self.report.clock = self._session.link_clock()
        self._session.flush_acknowledgements()
        self._session.send(Ack(finished=True), self._number, FROM_RECEIVER, prefer=self._finish_channel)
        self._session.remove_receiver(self._number, completed=True)
        self._on_ended(self, "completed")
        if not self._finished.done():
            self._finished.set_result(None)

    def _end(self, error: Exception, *, notify: bool, cancel: Cancel | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        self._stop_clock()
        if self._session is not None:
            # From here on nothing on the wire finds the destination any more.
            self._session.remove_receiver(self._number)
            if cancel is not None:
                self._session.broadcast(cancel, self._number, FROM_RECEIVER)
        self._on_ended(self, error.reason if isinstance(error, TransferError) else "failed")
        if not self._finished.done():
            self._finished.set_exception(error)
            self._finished.exception()  # nobody has to await finished()
        if notify:
            try:
                self._on_failed(error)
            except Exception:
                log.exception("the engine's on_failed raised", request_id=self.spec.request_id)

    def _engine_error(self, callback: str, error: Exception) -> EngineError:
        """What the engine raised on purpose, or an EngineError for what it did not mean to raise."""
        if isinstance(error, EngineError):
            return error
        log.error("the engine's callback raised", callback=callback, request_id=self.spec.request_id, exc_info=error)
        return EngineError(f"the decode engine's {callback} raised {type(error).__name__}; its log says more")

    def _expire_in(self, remaining_s: float | None) -> None:
        """OPEN says how long the request has left; each OPEN says it anew."""
        self._stop_clock()
        if remaining_s is not None and remaining_s < MAX_REMAINING_S:
            self._deadline = self._loop.call_later(max(0.0, remaining_s), self._time_ran_out)

    def _time_ran_out(self) -> None:
        self.fail(TransferCancelledError(TIME_RAN_OUT))

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()


def decode_chunk(
    codec: Codec, wire: memoryview, out: memoryview, form: ChunkForm, chunk: FrameHeader
) -> tuple[bool, float]:
    """In a thread: (good, seconds of decoding). Not good: the bytes are not what the sender hashed."""
    started_s = time.perf_counter()
    try:
        codec.decode(wire, out, form)
    except CodecError:
        return False, 0.0
    decode_s = time.perf_counter() - started_s
    hashed = out if codec.lossless else wire
    return checksum(hashed, chunk.transfer, chunk.sequence) == chunk.checksum, decode_s
