"""A session: the lanes between two nodes, and the transfers on them in both directions.

It puts chunks into lanes (the lane that is free first takes the next), collects acknowledgements and watches that the
lanes are alive. A lane that dies costs nothing but what was on it, which leaves again on the others; when all are gone
the transfers wait for a new one:

    new --first lane--> up --last lane lost--> suspended --a lane within resume_s--> up
                        |                         '--none, or the peer is a new process--> ended: transfers failed
                        '--closed by a node that leaves--> ended

Dialling is in dialling.py, the choice of the next chunk in outbound.py.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import fields
from functools import partial
from typing import NamedTuple

from prfaas.common.config import TransportConfig
from prfaas.common.errors import (
    LaneLostError,
    PeerRefusedError,
    ProtocolError,
    TransferCancelledError,
    TransferError,
)
from prfaas.common.log import get_logger
from prfaas.common.metrics import TransportMetrics
from prfaas.transport.api import LinkClock, LinkEstimate
from prfaas.transport.channel import Channel, Outgoing
from prfaas.transport.clock import ClockEstimator
from prfaas.transport.codec_choice import CodecChoice
from prfaas.transport.codecs.choice import CodecSpeeds
from prfaas.transport.connection import ChunkArrived, Control, Event
from prfaas.transport.counters import Counters
from prfaas.transport.egress import EgressCap
from prfaas.transport.fetching import Fetching
from prfaas.transport.frames import (
    FROM_RECEIVER,
    HEADER_BYTES,
    RAW,
    Ack,
    Cancel,
    ControlBody,
    Credit,
    Error,
    Fetch,
    Fetched,
    Finish,
    FrameHeader,
    Open,
    Opened,
    Ping,
    Pong,
    Resume,
)
from prfaas.transport.lanes.api import LaneSample
from prfaas.transport.link import LinkEstimator
from prfaas.transport.outbound import Outbound
from prfaas.transport.receiving import TransferReceiver
from prfaas.transport.scratch import ScratchPool
from prfaas.transport.sending import TransferSender, cancel_error

ACK_DELAY_S = 0.005
"""Acknowledgements wait so long for company: a frame a chunk would cost a tenth of a fast lane."""
ACK_CHUNKS = 64
MEASURE_S = 0.1
"""Ten looks at TCP_INFO a second and lane: often enough for a link that changes, and nothing beside the chunks."""
WRITE_BYTES = 256 << 10
"""Small chunks go into one write up to so many bytes, where the peer is near: a call to the kernel for each costs as
much as its copy. Far away each lane takes one, so that few chunks are spread over all of them."""
NEAR_RTT_S = 0.002
LINK_FIGURES = tuple(figure.name for figure in fields(LinkEstimate))
KEPT_TRANSFERS = 4096
"""Ended transfers that are remembered, to answer what is repeated because a lane took the answer with it."""

log = get_logger("transport")

Admit = Callable[["Session", int, Open], Opened]


class Answered(NamedTuple):
    attempt: int
    repeat: int
    answer: Opened


class Session:
    """`peer` is the other node's name. Owns its channels; a channel's events come in here."""

    def __init__(
        self,
        session_id: str,
        peer: str,
        config: TransportConfig,
        executor: Executor,
        egress: EgressCap,
        speeds: CodecSpeeds,
        admit: Admit,
        serve_fetch: Callable[[Session, Fetch], Fetched],
        metrics: TransportMetrics,
        on_ended: Callable[[Session], None],
    ) -> None:
        self.id = session_id
        self.peer = peer
        self.counters = Counters(metrics)
        self.scratch = ScratchPool()
        self.refusal: PeerRefusedError | None = None
        """Why the peer refused the last HELLO; None once a lane is up."""
        self.established = False
        """It has had a lane: the peer knows it, unless it is a new process."""
        self.peer_epoch = ""
        """Which process of the peer's name it leads to."""
        self._near = False
        self.used_s = 0.0
        """Monotonic; when the last transfer ended."""
        self._config = config
        self._egress = egress
        self._admit = admit
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()
        self._channels: dict[int, Channel] = {}
        self._changed = asyncio.Event()
        self._clock = ClockEstimator()
        self._last_number = 0
        self._senders: dict[int, TransferSender] = {}
        self._receivers: dict[int, TransferReceiver] = {}
        self._highest_received = 0
        self._answered: OrderedDict[int, Answered] = OrderedDict()
        self._completed: OrderedDict[int, None] = OrderedDict()
        self.codecs = CodecChoice(config, peer, speeds, metrics)
        self._outbound = Outbound(config.codec_threads, executor, self.codecs.of, speeds, self.wake)
        self.fetching = Fetching(peer, config.max_transfers, partial(serve_fetch, self), self.send)
        self._link = LinkEstimator()
        self._link_gauge = metrics.link
        self._link_shown = False
        self._measure_timer: asyncio.TimerHandle | None = None
        self._ack_timer: asyncio.TimerHandle | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._suspended: asyncio.TimerHandle | None = None
        self._peer_left = ""

    # -- lanes

    @property
    def usable(self) -> bool:
        """A lane is up; one that is closing counts as down."""
        return self.any_channel() is not None

    @property
    def idle(self) -> bool:
        return not self._senders and not self._receivers and not self.fetching.waiting

    async def wait_usable(self) -> None:
        """Until a lane is up. Raises PeerRefusedError when the peer refuses our HELLO."""
        while not self.usable:
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
        self.established = True
        self._peer_left = ""
        self._changed.set()
        self.counters.lanes.inc()
        if self._suspended is not None:
            self._resume(channel)
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
        for outgoing in channel.writing:
            outgoing.sender.end_read()
        for receiver in list(self._receivers.values()):
            receiver.lane_lost(channel)
        for sender in list(self._senders.values()):
            sender.lane_lost(channel)
        other = self.any_channel()
        if other is not None:
            # A CANCEL may have been lost with it, and with each of the others in turn.
            self._tell_what_is_sent(other)
            for receiver in self._receivers.values():
                receiver.repeat_credit(other)
            self.fetching.repeat()
        elif not self._channels:
            self._all_lanes_lost(reason)

    def _all_lanes_lost(self, reason: str) -> None:
        self._stop_timers()
        if self._peer_left or not self._config.resume_s:
            self.end(self._peer_left or reason)
        elif self._suspended is None:
            # Without transfers too: what the peer has sent may have been lost on its way.
            if not self.idle:
                log.warning("all kv lanes lost; waiting for new ones", peer=self.peer, resume_s=self._config.resume_s)
            detail = f"{reason}; no new one within {self._config.resume_s:g} s"
            self._suspended = self._loop.call_later(self._config.resume_s, self.end, detail)

    def _resume(self, channel: Channel) -> None:
        """The first lane after all were lost. Either side may have ended transfers meanwhile."""
        assert self._suspended is not None
        self._suspended.cancel()
        self._suspended = None
        if self._senders:
            self._measure()
        log.info("kv session goes on", peer=self.peer, senders=len(self._senders), receivers=len(self._receivers))
        self._tell_what_is_sent(channel)
        for receiver in self._receivers.values():
            receiver.repeat_credit(channel)
        for sender in list(self._senders.values()):
            sender.lane_is_back()
        self.fetching.repeat()

    def _tell_what_is_sent(self, channel: Channel, *, answer: bool = False) -> None:
        channel.send(Resume(list(self._senders), self._last_number, answer))

    def end(self, reason: str) -> None:
        """No lane is up and none is waited for: all transfers fail. What comes next is a new session; it may lead to a
        new process behind the same name, which counts from 1, and by another clock."""
        if self._suspended is not None:
            self._suspended.cancel()
            self._suspended = None
        error = LaneLostError(f"all lanes to {self.peer} were lost: {reason}")
        for sender in list(self._senders.values()):
            sender.fail(error, tell_peer=False)
        for receiver in list(self._receivers.values()):
            receiver.fail(error, tell_peer=False)
        self.fetching.fail(error)
        self._egress.leave(self)
        self.codecs.forget()
        self._stop_timers()
        self._answered.clear()
        self._completed.clear()
        self._highest_received = 0
        self._clock = ClockEstimator()
        self._link = LinkEstimator()
        self.established = False
        self.peer_epoch = ""
        if self._link_shown:
            self._link_shown = False
            for what in LINK_FIGURES:
                self._link_gauge.let_go(self.peer, what)
        self._on_ended(self)

    def close(self, reason: str) -> None:
        """Close all lanes for good; `lane_lost` does the rest."""
        self._peer_left = reason
        for channel in list(self._channels.values()):
            channel.close(reason)
        if not self._channels and (self._suspended is not None or self.established):
            self.end(reason)

    def retire_lane(self, index: int) -> None:
        """It takes no more chunks, and is closed when the peer has those that it took."""
        channel = self._channels.get(index)
        if channel is not None:
            channel.retiring = True
            self._close_retired()

    def _close_retired(self) -> None:
        for channel in list(self._channels.values()):
            if channel.retiring and not any(sender.is_on(channel) for sender in self._senders.values()):
                channel.close("fewer lanes are enough", "lane")

    def channels(self) -> list[Channel]:
        return list(self._channels.values())

    def any_channel(self) -> Channel | None:
        return next((c for c in self._channels.values() if c.usable), None)

    def link_clock(self) -> LinkClock | None:
        return self._clock.estimate(time.monotonic())

    def link_estimate(self) -> LinkEstimate:
        return self._link.estimate(time.monotonic())

    def wanted_lanes(self, current: int, low: int, high: int) -> int:
        """How many lanes the measured way needs; asked every few seconds."""
        return self._link.wanted_lanes(current, low, high, time.monotonic())

    def send(self, body: ControlBody, transfer: int, flags: int = 0, *, prefer: Channel | None = None) -> None:
        """On `prefer` if it is up, else on any lane; nowhere when all are down: RESUME settles it."""
        channel = prefer if prefer is not None and prefer.usable else self.any_channel()
        if channel is not None:
            channel.send(body, transfer, flags)

    def broadcast(self, body: ControlBody, transfer: int, flags: int = 0) -> None:
        """On every lane: what must not be overtaken by chunks, nor lost with one lane."""
        for channel in self._channels.values():
            channel.send(body, transfer, flags)

    def wake(self) -> None:
        self._outbound.encode_ahead(len(self._channels))
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
        for timer in (self._tick_timer, self._ack_timer, self._measure_timer):
            if timer is not None:
                timer.cancel()
        self._tick_timer = self._ack_timer = self._measure_timer = None

    # -- transfers

    def add_sender(self, sender: TransferSender) -> None:
        if len(self._senders) >= self._config.max_transfers:
            raise PeerRefusedError(f"{len(self._senders)} transfers to {self.peer} are open; transport.max_transfers")
        self._last_number += 1
        sender.number = self._last_number
        self._senders[sender.number] = sender
        if self._measure_timer is None:
            self._measure_timer = self._loop.call_later(MEASURE_S, self._measure)

    def sender_ready(self, sender: TransferSender) -> None:
        """It may have a chunk to send: opened, given pieces or credit, or a lane has lost some of it."""
        if sender.next_bytes:
            self._outbound.activate(sender)
            self.wake()

    def remove_sender(self, sender: TransferSender) -> None:
        """No chunk of it leaves any more, except one that a lane has begun. Idempotent."""
        if self._senders.pop(sender.number, None) is None:
            return
        self.used_s = time.monotonic()
        self.counters.flush()
        self._outbound.remove(sender)
        opened_s = sender.opened_s if sender.failed is None else None
        self.counters.ended(sender.report, None if opened_s is None else self.used_s - opened_s)

    def unwritten(self, sender: TransferSender) -> dict[Channel, int]:
        """The lanes that are in the middle of a chunk of `sender`, and how many bytes each has still to hand over."""
        return {
            channel: channel.unwritten_bytes
            for channel in self._channels.values()
            if any(outgoing.sender is sender for outgoing in channel.writing)
        }

    def acknowledged(self, wire_bytes: int, sent_s: float) -> None:
        """Chunks that left at `sent_s` (the first of them) are in their place now."""
        self._link.acknowledged(wire_bytes, sent_s, time.monotonic())

    def _measure(self) -> None:
        """Every MEASURE_S while there is anything to send, and once after: what the lanes and the queue say, and what
        follows from it."""
        self._measure_timer = self._loop.call_later(MEASURE_S, self._measure) if self._senders else None
        now = time.monotonic()
        samples: dict[Hashable, LaneSample] = {
            channel: sample for channel in self._channels.values() if (sample := channel.sample()) is not None
        }
        if samples:
            self._link.lanes(samples, now)
        ready = any(sender.ready_bytes for sender in self._senders.values())
        queued_bytes = sum(sender.unacknowledged_bytes for sender in self._senders.values())
        self._link.queue(queued_bytes, sum(sender.on_the_way_bytes for sender in self._senders.values()), now)
        estimate = self._link.estimate(now)
        limited = ready and self._outbound.encoding_limits
        self.codecs.choose(estimate.bandwidth_bytes_per_s, codec_limited=limited, now_s=now)
        self._near = 0 < estimate.min_rtt_s < NEAR_RTT_S
        for sender in self._senders.values():
            sender.look_at_slack(estimate.bandwidth_bytes_per_s)
        self._close_retired()
        self._show(estimate)

    def _show(self, estimate: LinkEstimate) -> None:
        for what in LINK_FIGURES:
            if not self._link_shown:
                self._link_gauge.hold(self.peer, what)
            self._link_gauge.set(getattr(estimate, what), self.peer, what)
        self._link_shown = True

    def add_receiver(self, number: int, receiver: TransferReceiver) -> None:
        self._receivers[number] = receiver

    def remove_receiver(self, number: int, *, completed: bool = False) -> None:
        """What still comes for it goes to the sink, the rest of a chunk in progress included. Idempotent."""
        if self._receivers.pop(number, None) is not None and completed:
            self._completed[number] = None
            if len(self._completed) > KEPT_TRANSFERS:
                self._completed.popitem(last=False)
        self.used_s = time.monotonic()
        self.counters.flush()
        for channel in self._channels.values():
            channel.connection.redirect(number)
            channel.acks.pop(number, None)

    def stop_writing(self, chunk: FrameHeader, *, but: Channel) -> None:
        """The lane that was receiving this chunk writes no more of it; `but` will."""
        for channel in self._channels.values():
            if channel is not but and channel.connection.redirect_chunk(chunk):
                return

    # -- ChannelOwner: sending

    def next_outgoing(self, channel: Channel) -> Sequence[Outgoing]:
        if channel.retiring:
            return ()
        now = time.monotonic()
        chunks: list[Outgoing] = []
        room = WRITE_BYTES if self._near else 1
        while room > 0 and self._egress.may_send(self):
            outgoing = self._outbound.next(len(self._channels))
            if outgoing is None:
                break
            wire_bytes = HEADER_BYTES + len(outgoing.payload)
            room -= wire_bytes
            self._egress.sent(wire_bytes)
            outgoing.sender.chunk_begun(channel, outgoing, now)
            chunks.append(outgoing)
        if chunks:
            self._link.supplied(sum(HEADER_BYTES + len(outgoing.payload) for outgoing in chunks), now)
        else:
            self._link.starved(now)
        return chunks

    def chunks_sent(self, chunks: Sequence[Outgoing]) -> None:
        now = time.monotonic()
        for outgoing in chunks:
            outgoing.sender.chunk_sent(outgoing, now)
            self.counters.sent(len(outgoing.cut.data), HEADER_BYTES + len(outgoing.payload))

    # -- ChannelOwner: receiving

    def destination(self, channel: Channel, chunk: FrameHeader) -> memoryview | None:
        receiver = self._receivers.get(chunk.transfer)
        if receiver is not None:
            try:
                return receiver.place(channel, chunk)
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
        if isinstance(body, Open):
            self._open(channel, number, body)
        elif isinstance(body, Ping | Pong | Error | Resume | Fetch | Fetched):
            self._of_session(channel, number, body)
        elif event.from_receiver:
            sender = self._senders.get(number)
            if sender is not None:
                self._to_sender(sender, body)
        else:
            receiver = self._receivers.get(number)
            if receiver is not None:
                self._to_receiver(channel, receiver, body)
            elif isinstance(body, Finish):
                self._tell_ended(channel, number)

    def _of_session(self, channel: Channel, number: int, body: ControlBody) -> None:
        """Frames that are no transfer's."""
        if isinstance(body, Ping):
            channel.send(Pong(body.sent_s, time.monotonic()))
        elif isinstance(body, Pong):
            now = time.monotonic()
            self._clock.add(body.ping_sent_s, body.answered_s, now)
            self._link.ping(now - body.ping_sent_s, now)
        elif isinstance(body, Error):
            if body.code == "closing":
                self._peer_left = body.detail or "closed by the peer"
            channel.abort(f"{self.peer} closed the lane: {body.detail or body.code}")
        elif isinstance(body, Resume):
            self._resumed_by_peer(channel, body)
        elif isinstance(body, Fetch):
            self.fetching.asked_by_peer(channel, number, body)
        elif isinstance(body, Fetched):
            self.fetching.answered(number, body)

    def _to_sender(self, sender: TransferSender, body: ControlBody) -> None:
        if isinstance(body, Ack):
            sender.acknowledged(body)
            if body.damaged:
                self.sender_ready(sender)
        elif isinstance(body, Credit):
            sender.credited(body.granted_bytes)
            self.sender_ready(sender)
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
        known = self._answered.get(number)
        if known is not None and (known.attempt, known.repeat) >= (body.attempt, body.repeat):
            return  # the same OPEN, on another lane
        if known is not None and known.attempt == body.attempt:
            self._answer_again(channel, number, known._replace(repeat=body.repeat))
            return
        self._highest_received = max(self._highest_received, number)
        if len(self._receivers) >= self._config.max_transfers and number not in self._receivers:
            answer = Opened(body.attempt, refused="too many transfers are open; transport.max_transfers", kind="engine")
        else:
            answer = self._admit(self, number, body)
        if answer.refused:
            self.counters.refusals.labels("open").inc()
            log.warning("kv transfer refused", peer=self.peer, reason=answer.refused)
        self._answered[number] = Answered(body.attempt, body.repeat, answer)
        if len(self._answered) > KEPT_TRANSFERS:
            self._answered.popitem(last=False)
        channel.send(answer, number, FROM_RECEIVER)

    def _answer_again(self, channel: Channel, number: int, known: Answered) -> None:
        self._answered[number] = known
        channel.send(known.answer, number, FROM_RECEIVER)
        if known.answer.credit_bytes and number not in self._receivers:
            self._tell_ended(channel, number)

    def _tell_ended(self, channel: Channel, number: int) -> None:
        """The sender goes on with a transfer that has ended here: a lane took the word with it, or it is on its way."""
        if number in self._completed:
            channel.send(Ack(finished=True), number, FROM_RECEIVER)
        else:
            body = Cancel(TransferCancelledError.reason, "the transfer has ended there")
            channel.send(body, number, FROM_RECEIVER)

    def _resumed_by_peer(self, channel: Channel, body: Resume) -> None:
        if not body.answer:
            self._tell_what_is_sent(channel, answer=True)
        sending = set(body.sending)
        for number, receiver in list(self._receivers.items()):
            if number <= body.last and number not in sending:
                detail = f"{self.peer} ended the transfer; its word was lost with a lane"
                receiver.fail(TransferCancelledError(detail), tell_peer=False)
        for number in body.sending:
            known = self._answered.get(number)
            if number not in self._receivers and known is not None and known.answer.credit_bytes:
                self._tell_ended(channel, number)

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
