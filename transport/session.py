"""A session: the lanes between two nodes, and the transfers on them in both directions.

It decides which chunk goes into which lane (the lane that is free first takes the next; transfers take turns), collects
acknowledgements, watches that the lanes are alive, and tells transfers when a lane dies. Dialling is in dialling.py.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial

from prfaas.common.config import TransportConfig
from prfaas.common.errors import LaneLostError, PeerRefusedError, ProtocolError, TransferError
from prfaas.common.log import get_logger
from prfaas.common.metrics import TransportMetrics
from prfaas.transport.api import LinkClock
from prfaas.transport.channel import Channel, Outgoing
from prfaas.transport.clock import ClockEstimator
from prfaas.transport.codecs.api import ChunkForm, Codec, form_of
from prfaas.transport.codecs.registry import codec_by_name
from prfaas.transport.connection import ChunkArrived, Control, Event
from prfaas.transport.frames import (
    FROM_RECEIVER,
    HEADER_BYTES,
    RAW,
    Ack,
    Cancel,
    ControlBody,
    Credit,
    Error,
    Finish,
    FrameHeader,
    Open,
    Opened,
    Ping,
    Pong,
    chunk_checksum,
    encode_chunk_header,
)
from prfaas.transport.receiving import TransferReceiver
from prfaas.transport.scratch import ScratchPool
from prfaas.transport.sending import TransferSender, cancel_error
from prfaas.transport.transfer import Cut

ACK_DELAY_S = 0.005
"""Acknowledgements wait so long for company: a frame a chunk would cost a tenth of a fast lane."""
ACK_CHUNKS = 64
KEPT_ATTEMPTS = 4096
"""OPENs that were answered; beyond it a repeated OPEN is answered once more, which does no harm."""

log = get_logger("transport")

Admit = Callable[["Session", int, Open], Opened]


class Counters:
    """The metrics that a session counts. Bytes are summed up here and handed to Prometheus by `flush`: its counters
    lock, and a fast lane has thousands of chunks a second."""

    def __init__(self, metrics: TransportMetrics) -> None:
        forms = ("raw", "wire")
        self._totals = [
            counter.labels(form) for counter in (metrics.sent_bytes, metrics.received_bytes) for form in forms
        ]
        self._pending = [0, 0, 0, 0]
        self.checksum_failures = metrics.checksum_failures
        self.lanes = metrics.lanes
        self.lane_losses = metrics.lane_losses
        self.refusals = metrics.refusals
        self.transfers = metrics.transfers

    def sent(self, raw_bytes: int, wire_bytes: int) -> None:
        pending = self._pending
        pending[0] += raw_bytes
        pending[1] += wire_bytes

    def received(self, raw_bytes: int, wire_bytes: int) -> None:
        pending = self._pending
        pending[2] += raw_bytes
        pending[3] += wire_bytes

    def flush(self) -> None:
        """Once a tick, and when a transfer ends."""
        for index, counter in enumerate(self._totals):
            if self._pending[index]:
                counter.inc(self._pending[index])
                self._pending[index] = 0


class Session:
    """`peer` is the other node's name. Owns its channels; a channel's events come in here."""

    def __init__(
        self,
        session_id: str,
        peer: str,
        config: TransportConfig,
        executor: Executor,
        admit: Admit,
        metrics: TransportMetrics,
        on_empty: Callable[[Session], None],
    ) -> None:
        self.id = session_id
        self.peer = peer
        self.counters = Counters(metrics)
        self.scratch = ScratchPool()
        self.refusal: PeerRefusedError | None = None
        """Why the peer refused the last HELLO; None once a lane is up."""
        self._config = config
        self._executor = executor
        self._admit = admit
        self._on_empty = on_empty
        self._loop = asyncio.get_running_loop()
        self._channels: dict[int, Channel] = {}
        self._changed = asyncio.Event()
        self._clock = ClockEstimator()
        self._last_number = 0
        self._senders: dict[int, TransferSender] = {}
        self._turns: deque[TransferSender] = deque()
        self._receivers: dict[int, TransferReceiver] = {}
        self._highest_received = 0
        self._answered: OrderedDict[int, int] = OrderedDict()
        self._codec: Codec | None = codec_by_name(config.codec)
        self._encoding = 0
        self._encoded: deque[Outgoing] = deque()
        self._ack_timer: asyncio.TimerHandle | None = None
        self._tick_timer: asyncio.TimerHandle | None = None

    # -- lanes

    @property
    def usable(self) -> bool:
        return bool(self._channels)

    @property
    def idle(self) -> bool:
        return not self._senders and not self._receivers

    async def wait_usable(self) -> None:
        """Until a lane is up; one that is closing counts as down. Raises PeerRefusedError when the peer refuses our
        HELLO."""
        while self.any_channel() is None:
            if self.refusal is not None:
                raise self.refusal
            self._changed.clear()
            await self._changed.wait()

    def refused(self, error: PeerRefusedError) -> None:
        self.refusal = error
        self._changed.set()

    def add_channel(self, channel: Channel, index: int) -> None:
        """The lane's HELLO was good. It takes the place of an older lane of the same index, which is dead then."""
        channel.index = index
        channel.owner = self
        channel.connection.accept()
        old = self._channels.get(index)
        self._channels[index] = channel
        if old is not None:
            old.abort("replaced by a new lane")
            old.lost(None)
        self.refusal = None
        self._changed.set()
        self.counters.lanes.inc()
        self._ping(channel)
        if self._tick_timer is None:
            self._tick_timer = self._loop.call_later(self._tick_s(), self._tick)
        channel.wake()

    def lane_lost(self, channel: Channel, reason: str) -> None:
        if self._channels.get(channel.index) is channel:
            del self._channels[channel.index]
        log.info("kv lane lost", peer=self.peer, lane=channel.index, reason=reason)
        self.counters.lanes.dec()
        self.counters.lane_losses.labels("idle" if self.idle else "with_transfers").inc()
        writing = channel.writing
        if writing is not None:
            writing.sender.end_read()
        for sender in list(self._senders.values()):
            sender.lane_lost(channel, reason)
        other = self.any_channel()
        if other is not None:
            for receiver in self._receivers.values():
                receiver.repeat_credit(other)
            return
        self.fail_all(LaneLostError(f"all lanes to {self.peer} were lost: {reason}"))
        self._stop_timers()
        # The next lanes may lead to a new process behind the same name: it counts from 1, and by another clock.
        self._answered.clear()
        self._highest_received = 0
        self._clock = ClockEstimator()
        self._on_empty(self)

    def fail_all(self, error: LaneLostError) -> None:
        for sender in list(self._senders.values()):
            sender.fail(error, tell_peer=False)
        for receiver in list(self._receivers.values()):
            receiver.fail(error, tell_peer=False)

    def close(self, reason: str) -> None:
        """Close all lanes; `lane_lost` does the rest."""
        for channel in list(self._channels.values()):
            channel.close(reason)

    def channels(self) -> list[Channel]:
        return list(self._channels.values())

    def any_channel(self) -> Channel | None:
        return next((c for c in self._channels.values() if c.usable), None)

    def link_clock(self) -> LinkClock | None:
        return self._clock.estimate(time.monotonic())

    def send(self, body: ControlBody, transfer: int, flags: int = 0, *, prefer: Channel | None = None) -> None:
        """On `prefer` if it is up, else on any lane; nowhere when all are down (their transfers fail anyway)."""
        channel = prefer if prefer is not None and prefer.usable else self.any_channel()
        if channel is not None:
            channel.send(body, transfer, flags)

    def broadcast(self, body: ControlBody, transfer: int, flags: int = 0) -> None:
        """On every lane: what must not be overtaken by chunks, nor lost with one lane."""
        for channel in self._channels.values():
            channel.send(body, transfer, flags)

    def wake(self) -> None:
        if self._codec is not None:
            self._encode_ahead()
        for channel in self._channels.values():
            channel.wake()

    # -- liveness

    def _tick_s(self) -> float:
        return min(self._config.ping_s, self._config.dead_s / 3)

    def _tick(self) -> None:
        self._tick_timer = self._loop.call_later(self._tick_s(), self._tick)
        self.counters.flush()
        now = time.monotonic()
        for channel in list(self._channels.values()):
            if now - channel.last_received_s > self._config.dead_s:
                log.warning("kv lane is silent", peer=self.peer, lane=channel.index, dead_s=self._config.dead_s)
                channel.abort(f"silent for {self._config.dead_s:g} s")
            else:
                self._ping(channel)

    def _ping(self, channel: Channel) -> None:
        channel.send(Ping(sent_s=time.monotonic()))

    def _stop_timers(self) -> None:
        for timer in (self._tick_timer, self._ack_timer):
            if timer is not None:
                timer.cancel()
        self._tick_timer = self._ack_timer = None

    # -- transfers

    def add_sender(self, sender: TransferSender) -> None:
        if len(self._senders) >= self._config.max_transfers:
            raise PeerRefusedError(f"{len(self._senders)} transfers to {self.peer} are open; transport.max_transfers")
        self._last_number += 1
        sender.number = self._last_number
        self._senders[sender.number] = sender
        self._turns.append(sender)

    def remove_sender(self, sender: TransferSender) -> None:
        """No chunk of it leaves any more, except one that a lane has begun. Idempotent."""
        if self._senders.pop(sender.number, None) is None:
            return
        self.counters.flush()
        self._turns.remove(sender)
        self._encoded = deque(outgoing for outgoing in self._encoded if outgoing.sender is not sender)
        self.counters.transfers.labels("sent", "failed" if sender.failed else "completed").inc()

    def unwritten(self, sender: TransferSender) -> dict[Channel, int]:
        """The lanes that are in the middle of a chunk of `sender`, and how many bytes each has still to hand over."""
        return {
            channel: channel.unwritten_bytes
            for channel in self._channels.values()
            if channel.writing is not None and channel.writing.sender is sender
        }

    def add_receiver(self, number: int, receiver: TransferReceiver) -> None:
        self._receivers[number] = receiver

    def remove_receiver(self, number: int) -> None:
        """What still comes for it goes to the sink, the rest of a chunk in progress included. Idempotent."""
        self._receivers.pop(number, None)
        self.counters.flush()
        for channel in self._channels.values():
            channel.connection.redirect(number)
            channel.acks.pop(number, None)

    # -- ChannelOwner: sending

    def next_outgoing(self, channel: Channel) -> Outgoing | None:
        if self._codec is not None:
            outgoing = self._encoded.popleft() if self._encoded else None
            self._encode_ahead()
        else:
            outgoing = self._next_raw()
        if outgoing is not None:
            outgoing.sender.begin_read()
            outgoing.sender.chunk_begun(channel, outgoing.cut)
        return outgoing

    def chunk_sent(self, channel: Channel, outgoing: Outgoing) -> None:
        outgoing.sender.end_read()
        outgoing.sender.chunk_sent(outgoing)
        self.counters.sent(len(outgoing.cut.data), len(outgoing.header) + len(outgoing.payload))

    def _next_cut(self) -> tuple[TransferSender, Cut] | None:
        """Transfers take turns, a chunk each."""
        turns = self._turns
        for _ in range(len(turns)):
            sender = turns[0]
            turns.rotate(-1)
            cut = sender.next_cut()
            if cut is not None:
                return sender, cut
        return None

    def _next_raw(self) -> Outgoing | None:
        found = self._next_cut()
        if found is None:
            return None
        sender, cut = found
        checksum = chunk_checksum(cut.data, *cut.place)
        size = len(cut.data)
        header = encode_chunk_header(sender.number, cut.sequence, cut.place, size, size, RAW, checksum)
        return Outgoing(sender, cut, header, cut.data)

    def _encode_ahead(self) -> None:
        """Keep the encoder threads busy, but not further ahead than the lanes can take: late chunks go first."""
        limit = self._config.codec_threads + len(self._channels)
        while self._channels and self._encoding + len(self._encoded) < limit:
            found = self._next_cut()
            if found is None:
                return
            sender, cut = found
            assert self._codec is not None
            form = form_of(sender.layout.layers[cut.layer].tensors[cut.tensor])
            self._encoding += 1
            sender.begin_read()
            job = self._loop.run_in_executor(self._executor, encode_chunk, self._codec, cut, form, sender.number)
            job.add_done_callback(partial(self._encode_done, sender, cut))

    def _encode_done(self, sender: TransferSender, cut: Cut, job: asyncio.Future[tuple[bytes, memoryview]]) -> None:
        self._encoding -= 1
        sender.end_read()
        if job.cancelled() or (error := job.exception()) is not None:
            if not job.cancelled():
                log.error("encoding failed", error=str(error))
            sender.fail(LaneLostError("the encoder stopped"))
        elif sender.active:
            header, payload = job.result()
            self._encoded.append(Outgoing(sender, cut, header, payload))
        self.wake()

    # -- ChannelOwner: receiving

    def destination(self, channel: Channel, chunk: FrameHeader) -> memoryview | None:
        receiver = self._receivers.get(chunk.transfer)
        if receiver is not None:
            try:
                return receiver.place(chunk)
            except ProtocolError as error:
                # The chunk is lost with its lane, so its transfer can't be completed; the others can.
                receiver.fail(TransferError(f"{self.peer} broke the protocol: {error}"))
                raise
        if not 1 <= chunk.transfer <= self._highest_received:
            raise ProtocolError(f"CHUNK of transfer {chunk.transfer}, which was never opened")
        return None

    def lane_event(self, channel: Channel, event: Event) -> None:
        if isinstance(event, ChunkArrived):
            header = event.header
            receiver = self._receivers.get(header.transfer)
            if receiver is not None:
                receiver.arrived(channel, event)
            elif event.data is not None and header.codec != RAW:
                self.scratch.give_back(event.data)
            self.counters.received(header.raw_bytes, HEADER_BYTES + header.body_bytes)
        else:
            self._control(channel, event)

    def _control(self, channel: Channel, event: Control) -> None:
        body, number = event.body, event.header.transfer
        if isinstance(body, Ping):
            channel.send(Pong(body.sent_s, time.monotonic()))
        elif isinstance(body, Pong):
            self._clock.add(body.ping_sent_s, body.answered_s, time.monotonic())
        elif isinstance(body, Open):
            self._open(channel, number, body)
        elif isinstance(body, Error):
            channel.abort(f"{self.peer} closed the lane: {body.detail or body.code}")
        elif event.from_receiver:
            sender = self._senders.get(number)
            if sender is not None:
                self._to_sender(sender, body)
        else:
            receiver = self._receivers.get(number)
            if receiver is not None:
                self._to_receiver(channel, receiver, body)

    def _to_sender(self, sender: TransferSender, body: ControlBody) -> None:
        if isinstance(body, Ack):
            sender.acknowledged(body)
            if body.damaged:
                self.wake()
        elif isinstance(body, Credit):
            sender.credited(body.granted_bytes)
            self.wake()
        elif isinstance(body, Opened):
            sender.opened(body)
        elif isinstance(body, Cancel):
            sender.fail(cancel_error(body, self.peer), tell_peer=False)

    def _to_receiver(self, channel: Channel, receiver: TransferReceiver, body: ControlBody) -> None:
        if isinstance(body, Finish):
            receiver.finish_arrived(channel, body.timings)
        elif isinstance(body, Cancel):
            receiver.fail(cancel_error(body, self.peer), tell_peer=False)

    def _open(self, channel: Channel, number: int, body: Open) -> None:
        holder = self._receivers.get(number)
        if number < 1 or (holder is not None and holder.spec.transfer_id != body.transfer_id):
            raise ProtocolError(f"OPEN with number {number}, which is no number or another transfer's")
        if self._answered.get(number, 0) >= body.attempt:
            return  # the same OPEN, on another lane
        self._answered[number] = body.attempt
        if len(self._answered) > KEPT_ATTEMPTS:
            self._answered.popitem(last=False)
        self._highest_received = max(self._highest_received, number)
        if len(self._receivers) >= self._config.max_transfers and number not in self._receivers:
            answer = Opened(body.attempt, refused="too many transfers are open; transport.max_transfers", kind="engine")
        else:
            answer = self._admit(self, number, body)
        if answer.refused:
            self.counters.refusals.labels("open").inc()
            log.warning("kv transfer refused", peer=self.peer, reason=answer.refused)
        channel.send(answer, number, FROM_RECEIVER)

    # -- acknowledgements

    def acknowledge(self, channel: Channel, number: int, sequence: int, *, damaged: bool = False) -> None:
        """Goes back on the lane that the chunk came on, so that a lane's death tells the sender what is uncertain."""
        good, bad = channel.acks.setdefault(number, ([], []))
        (bad if damaged else good).append(sequence)
        if damaged or len(good) >= ACK_CHUNKS:
            self._flush(channel)
        elif self._ack_timer is None:
            self._ack_timer = self._loop.call_later(ACK_DELAY_S, self.flush_acknowledgements)

    def flush_acknowledgements(self) -> None:
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        for channel in self._channels.values():
            self._flush(channel)

    def _flush(self, channel: Channel) -> None:
        acks, channel.acks = channel.acks, {}
        for number, (good, bad) in acks.items():
            channel.send(Ack(chunks=good, damaged=bad), number, FROM_RECEIVER)


def encode_chunk(codec: Codec, cut: Cut, form: ChunkForm, transfer: int) -> tuple[bytes, memoryview]:
    """In a thread: (header, payload). A chunk that doesn't shrink goes raw, from the engine's memory."""
    wire = codec.encode(cut.data, form)
    payload = cut.data if wire is None else memoryview(wire)
    number = RAW if wire is None else codec.number
    checksum = chunk_checksum(cut.data if codec.lossless else payload, *cut.place)
    header = encode_chunk_header(transfer, cut.sequence, cut.place, len(cut.data), len(payload), number, checksum)
    return header, payload
