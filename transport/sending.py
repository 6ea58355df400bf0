"""The shell of a sending transfer: what `KvEndpoint.sender` returns."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from prfaas.common.errors import (
    ChecksumError,
    EngineError,
    LaneLostError,
    NoRoomError,
    PeerRefusedError,
    TicketError,
    TransferCancelledError,
    TransferError,
)
from prfaas.common.kv_layout import KvLayout
from prfaas.common.log import get_logger
from prfaas.transport.api import KvPiece, TransferReport, TransferSpec
from prfaas.transport.frames import HEADER_BYTES, MAX_REASON_CHARS, Ack, Cancel, Finish, Open, Opened
from prfaas.transport.transfer import TIME_RAN_OUT, Cut, SendingTransfer
from prfaas.transport.waiting import finish_despite_cancel

if TYPE_CHECKING:
    from prfaas.transport.channel import Channel, Outgoing
    from prfaas.transport.session import Session

log = get_logger("transport")

STALLED_S = 1.0
"""After `aclose` a lane must go on taking the chunk that it has begun; one that takes nothing for so long is aborted.
Longer than the pauses of a lossy WAN, far shorter than `dead_s`, for which the engine's memory would be held."""

MAX_RETRY_AFTER_S = 5.0
"""The longest wait that a peer without room can ask for: a wrong number must not park a prefill for ever."""
MIN_CREDIT_BYTES = 4096
"""Less would cut the KV into chunks of a few bytes, or let none leave at all."""

SLACK = 2.0

CANCEL_ERRORS: dict[str, type[TransferError]] = {
    error.reason: error for error in (TransferCancelledError, ChecksumError, LaneLostError, TicketError)
}


def cancel_error(body: Cancel, peer: str) -> TransferError:
    """The error that a peer's CANCEL stands for."""
    kind = CANCEL_ERRORS.get(body.reason, TransferError)
    return kind(f"{peer} ended the transfer: {body.detail or body.reason}")


class Link(Protocol):
    """The way to the receiver's node: a session that we dial, or one that it has dialled."""

    @property
    def peer(self) -> str: ...

    @property
    def session(self) -> Session | None:
        """The present one; None: the peer has not dialled yet."""
        ...

    async def usable(self) -> Session:
        """Wait until a session has a lane. Raises PeerRefusedError."""
        ...


class TransferSender:
    """A `KvSender`. Everything but `put`, `finish` and `failed` is the event loop's."""

    def __init__(
        self,
        spec: TransferSpec,
        ticket: str,
        layout: KvLayout,
        link: Link,
        chunk_bytes: int,
        timeout_s: float,
        traceparent: str = "",
    ) -> None:
        self.spec = spec
        self.report = TransferReport()
        self.number = 0
        self.layout = layout
        self._ticket = ticket
        self._link = link
        self._session = link.session
        self._timeout_s = timeout_s
        self._traceparent = traceparent
        self._loop = asyncio.get_running_loop()
        self._state = SendingTransfer(layout, spec, chunk_bytes)
        self._attempt = 0
        self._repeat = 0
        self._deadline_s: float | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self.urgent = False
        """The time that is left is hardly enough to send the rest."""
        self._answer: asyncio.Future[Opened] | None = None
        self._open = False
        self.opened_s: float | None = None
        """When the receiver had room."""
        self._closed = False
        self._failed: Exception | None = None
        self._on_failed: list[Callable[[Exception], None]] = []
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._lane_of: dict[int, tuple[Channel, int, float]] = {}
        """On which lane an unacknowledged chunk was begun, with how many bytes, and when."""
        self._finish_channel: Channel | None = None
        self._readers = 0
        self._unread: asyncio.Future[None] | None = None
        self._lock = threading.Lock()
        self._inbox: list[Sequence[KvPiece]] = []
        self._timings: dict[str, float | list[float]] | None = None
        self._wake_scheduled = False

    # -- KvSender

    @property
    def rtt_s(self) -> float:
        clock = self._session.link_clock() if self._session is not None else None
        return clock.rtt_s if clock else 0.0

    @property
    def peer(self) -> str:
        return self._link.peer

    @property
    def failed(self) -> Exception | None:
        return self._failed

    def on_failed(self, callback: Callable[[Exception], None]) -> None:
        if self._failed is not None:
            self._tell(callback, self._failed)
        else:
            self._on_failed.append(callback)

    def _tell(self, callback: Callable[[Exception], None], error: Exception) -> None:
        try:
            callback(error)
        except Exception:
            log.exception("the engine's on_failed raised", request_id=self.spec.request_id)

    async def open(self, remaining_s: float | None = None) -> None:
        if self._failed is not None:
            raise self._failed
        if self._closed or self._open:
            raise TransferCancelledError("open() of a transfer that is open or closed already")
        late = remaining_s is not None and remaining_s < self._timeout_s
        self._expire_in(remaining_s)
        try:
            async with asyncio.timeout(remaining_s if late else self._timeout_s):
                opened = await self._ask(await self._usable_session())
        except TimeoutError:
            error: TransferError = LaneLostError(self._why_not_open())
            if late:
                error = TransferCancelledError(f"{TIME_RAN_OUT} before {self.peer} answered OPEN")
            self.fail(error)
            raise error from None
        except PeerRefusedError as error:
            self.fail(error)
            raise
        except asyncio.CancelledError:
            # The transfer stays unopened: an answer that comes late must not begin it.
            self.fail(TransferCancelledError("open() was cancelled"))
            raise
        finally:
            self._answer = None
        if opened.no_room:
            # Not a number, or a time that nobody means, is the longest wait.
            sane = 0 <= opened.retry_after_s <= MAX_RETRY_AFTER_S
            raise NoRoomError(
                f"{self.peer} has no room for {self.spec.request_id}",
                retry_after_s=opened.retry_after_s if sane else MAX_RETRY_AFTER_S,
            )
        if opened.refused:
            refusal = TicketError(opened.refused) if opened.kind == "ticket" else PeerRefusedError(opened.refused)
            self.fail(refusal, tell_peer=False)
            raise refusal
        if opened.credit_bytes < MIN_CREDIT_BYTES:
            stingy = PeerRefusedError(
                f"{self.peer} accepted the transfer with {opened.credit_bytes} bytes of credit; "
                f"at least {MIN_CREDIT_BYTES} are needed"
            )
            self.fail(stingy)
            raise stingy
        if self._failed is not None:  # a CANCEL came in the same read as the answer
            raise self._failed
        self._open = True
        self.opened_s = time.monotonic()
        self._state.opened(opened.credit_bytes)
        if self._session is not None:
            self._session.sender_ready(self)

    def _why_not_open(self) -> str:
        if self.number:
            return f"{self.peer} did not answer OPEN within {self._timeout_s:g} s"
        return (
            f"no lane to {self.peer} within {self._timeout_s:g} s; is it up, and can the side that dials "
            "(transport.dial) reach the other's transport.advertise?"
        )

    async def _usable_session(self) -> Session:
        if self.number == 0 or self._session is None:
            self._session = await self._link.usable()
        else:  # asked before: its number is that session's
            await self._session.wait_usable()
        return self._session

    async def _ask(self, session: Session) -> Opened:
        if self.number == 0:
            session.add_sender(self)
        self._attempt += 1
        self._repeat = 0
        self._answer = self._loop.create_future()
        self._send_open(session)
        return await self._answer

    def _send_open(self, session: Session) -> None:
        spec = self.spec
        session.broadcast(
            Open(
                ticket=self._ticket,
                attempt=self._attempt,
                transfer_id=spec.transfer_id,
                token_start=spec.tokens.start,
                token_end=spec.tokens.end,
                shard_index=spec.shard.index,
                shard_count=spec.shard.count,
                head_start=spec.shard.head_start,
                head_end=spec.shard.head_end,
                model_fingerprint=spec.model_fingerprint,
                layout_hash=spec.layout_hash,
                dtypes=self.layout.dtypes,
                remaining_s=None if self._deadline_s is None else max(0.0, self._deadline_s - self._loop.time()),
                repeat=self._repeat,
                traceparent=self._traceparent,
            ),
            self.number,
        )

    def _expire_in(self, remaining_s: float | None) -> None:
        """The receiver counts as well; here it ends what waits for a lane, and frees the engine's memory in time."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline_s = None if remaining_s is None else self._loop.time() + remaining_s
        self._deadline = None
        if self._deadline_s is not None:
            self._deadline = self._loop.call_at(self._deadline_s, self._time_ran_out)

    def _time_ran_out(self) -> None:
        if self._open:  # before, `open` tells
            self.fail(TransferCancelledError(TIME_RAN_OUT))

    def put(self, pieces: Sequence[KvPiece]) -> None:
        with self._lock:
            if self._failed is None and not self._closed:
                self._inbox.append(pieces)
                self._schedule_inbox()

    def finish(self, timings: dict[str, float | list[float]]) -> None:
        with self._lock:
            if self._failed is None and not self._closed:
                self._timings = dict(timings)
                self._schedule_inbox()

    async def done(self) -> TransferReport:
        await asyncio.shield(self._done)
        return self.report

    async def aclose(self, reason: str = "closed") -> None:
        if not self._closed:
            self._closed = True
            if not self._state.finished:
                self.fail(TransferCancelledError(f"cancelled by the prefill side: {reason}"), detail=reason)
            self._leave()
        if self._readers:
            if self._unread is None:
                self._unread = self._loop.create_future()
                self._watch_lanes({})
            await finish_despite_cancel(self._unread)
        self._inbox = []

    def _watch_lanes(self, before: dict[Channel, int]) -> None:
        """A lane that has taken nothing since the last look is given up: the engine wants its memory back."""
        if not self._readers or self._session is None:
            return
        now = self._session.unwritten(self)
        for channel, unwritten_bytes in now.items():
            if before.get(channel) == unwritten_bytes:
                channel.abort(f"{self.peer} took no byte of a cancelled transfer's chunk for {STALLED_S:g} s")
        self._loop.call_later(STALLED_S, self._watch_lanes, now)

    # -- for the session

    @property
    def active(self) -> bool:
        return self._open and self._failed is None and not self._closed

    @property
    def waits_to_open(self) -> bool:
        """It was made, and has neither sent OPEN nor failed: no session knows it yet."""
        return self.number == 0 and self._failed is None

    @property
    def next_bytes(self) -> int:
        return self._state.next_bytes if self.active else 0

    def next_cut(self) -> Cut | None:
        return self._state.next_chunk() if self.active else None

    @property
    def ready_bytes(self) -> int:
        return self._state.ready_bytes

    @property
    def unacknowledged_bytes(self) -> int:
        return self._state.unacknowledged_bytes

    def look_at_slack(self, bandwidth_bytes_per_s: float) -> None:
        """`urgent` when the time left is less than twice what the rest takes at the link's whole rate."""
        if self._deadline_s is not None and bandwidth_bytes_per_s > 0:
            left_s = self._deadline_s - self._loop.time()
            self.urgent = left_s < SLACK * self._state.missing_bytes / bandwidth_bytes_per_s

    def begin_read(self) -> None:
        """An encoder reads a piece's memory from now on."""
        self._readers += 1

    def end_read(self) -> None:
        self._readers -= 1
        if self._readers == 0 and self._unread is not None and not self._unread.done():
            self._unread.set_result(None)

    def is_on(self, channel: Channel) -> bool:
        """A chunk that was begun on this lane has not been acknowledged."""
        return any(lane is channel for lane, *_ in self._lane_of.values())

    @property
    def on_the_way_bytes(self) -> int:
        """Wire bytes of chunks that a lane has taken and that aren't acknowledged."""
        return sum(nbytes for _, nbytes, _ in self._lane_of.values())

    def chunk_begun(self, channel: Channel, outgoing: Outgoing, now_s: float) -> None:
        """Until `chunk_sent`, or the lane's loss and `end_read`, the lane reads its memory."""
        self._readers += 1
        self._lane_of[outgoing.cut.sequence] = (channel, HEADER_BYTES + len(outgoing.payload), now_s)

    def chunk_sent(self, outgoing: Outgoing, now_s: float) -> None:
        cut, report = outgoing.cut, self.report
        self.end_read()
        self._state.sent(cut.sequence)
        report.layer_at_s[cut.layer] = now_s
        report.raw_bytes += len(cut.data)
        report.wire_bytes += HEADER_BYTES + len(outgoing.payload)
        if self._timings is not None:
            self._finish_if_due()

    def opened(self, body: Opened) -> None:
        if self._answer is not None and not self._answer.done() and body.attempt == self._attempt:
            self._answer.set_result(body)

    def credited(self, granted_bytes: int) -> None:
        self._state.grant(granted_bytes)

    def acknowledged(self, body: Ack) -> None:
        self._state.acknowledged(body.chunks)
        if body.chunks and self._session is not None:
            begun = [at for sequence in body.chunks if (at := self._lane_of.pop(sequence, None)) is not None]
            if begun:
                wire_bytes = sum(nbytes for _, nbytes, _ in begun)
                self._session.acknowledged(wire_bytes, min(at_s for _, _, at_s in begun))
        if body.damaged:
            for sequence in body.damaged:
                self._lane_of.pop(sequence, None)
            try:
                self._state.damaged(body.damaged)
            except ChecksumError as error:
                self.fail(error)
                return
            self.report.resent_chunks = self._state.resent_chunks
        if body.finished:
            self._state.finished = True
            self.report.clock = self._session.link_clock() if self._session is not None else None
            self._leave()
            if not self._done.done():
                self._done.set_result(None)

    def lane_lost(self, channel: Channel) -> None:
        """What was on that lane and is not acknowledged leaves again on another: chunks, FINISH, and OPEN or its
        answer (`lane_is_back`, when this was the last lane)."""
        lost = [sequence for sequence, (lane, *_) in self._lane_of.items() if lane is channel]
        for sequence in lost:
            del self._lane_of[sequence]
        try:
            self._state.lost(lost)
        except LaneLostError as error:
            self.fail(error)
            return
        self.report.moved_chunks = self._state.moved_chunks
        if channel is self._finish_channel:
            self._finish_channel = None
            self._state.finish_lost()
        self.lane_is_back()

    def lane_is_back(self) -> None:
        session = self._session
        if session is None or not session.usable:
            return
        if self._answer is not None and not self._answer.done():
            self._repeat += 1
            self._send_open(session)
        self._finish_if_due()
        session.sender_ready(self)

    def _leave(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if self._session is not None:
            self._session.remove_sender(self)

    def fail(self, error: Exception, *, tell_peer: bool = True, detail: str = "") -> None:
        """The transfer can't succeed any more. Idempotent, and a no-op after success."""
        with self._lock:
            if self._failed is not None or self._state.finished:
                return
            self._failed = error
            self._inbox.clear()
        if self.number and tell_peer and self._session is not None:
            word = error.reason if isinstance(error, TransferError) else TransferError.reason
            self._session.broadcast(Cancel(word, (detail or str(error))[:MAX_REASON_CHARS]), self.number)
        self._leave()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        if not self._done.done():
            self._done.set_exception(error)
            self._done.exception()  # nobody has to await done()
        callbacks, self._on_failed = self._on_failed, []
        for callback in callbacks:
            self._tell(callback, error)

    # -- pieces from the engine's thread

    def _schedule_inbox(self) -> None:
        if not self._wake_scheduled:
            self._wake_scheduled = True
            self._loop.call_soon_threadsafe(self._take_inbox)

    def _take_inbox(self) -> None:
        with self._lock:
            inbox, self._inbox = self._inbox, []
            timings = self._timings
            self._wake_scheduled = False
        if self._failed is not None or self._closed:
            return
        try:
            for pieces in inbox:
                self._state.put(pieces)
            if timings is not None:
                self._state.finish()
        except (ValueError, TypeError) as error:
            self.fail(EngineError(f"transfer {self.spec.request_id}: {error}"))
            return
        self._finish_if_due()
        if self._session is not None:
            self._session.sender_ready(self)

    def _finish_if_due(self) -> None:
        if self._timings is None or not self.active or not self._state.finish_due:
            return
        sent_s = [self.report.layer_at_s.get(layer, 0.0) for layer in range(len(self.layout.layers))]
        channel = self._session.any_channel() if self._session is not None else None
        if channel is None:
            return  # when a lane is back
        try:
            channel.send(Finish({**self._timings, "sent_s": sent_s}), self.number)
        except ValueError as error:
            self.fail(EngineError(f"transfer {self.spec.request_id}: timings: {error}"))
            return
        self._finish_channel = channel
        self._state.finish_sent()
