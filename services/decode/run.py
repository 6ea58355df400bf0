"""One /decode call on its way: the ticket, the engine's output as OpenAI's chunks, the timeline."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prfaas.common import log
from prfaas.common.errors import TransferError
from prfaas.common.kv_layout import TokenRange
from prfaas.services.decode import spans
from prfaas.services.decode.openai_format import ChunkFormat, WholeFormat
from prfaas.services.decode.output import OutputText, Piece
from prfaas.services.decode.stop import StopStrings
from prfaas.services.decode.timeline import TokenTimes, node_timeline
from prfaas.services.engine.api import (
    DecodeDone,
    DecodeEvent,
    DecodeRequest,
    DecodeTimeline,
    EventStream,
    SamplingParams,
    TokenEvent,
)
from prfaas.services.engine.prefix_store import Hold
from prfaas.services.engine.token_ids import check_token_ids
from prfaas.services.engine.tokenizer import TextStream
from prfaas.services.messages import (
    DecodeCall,
    DecodeNodeTimeline,
    KvAddressMessage,
    SamplingMessage,
    TicketEvent,
    to_json,
)
from prfaas.services.sse import SseResponse
from prfaas.services.telemetry.tracing import Trace
from prfaas.transport.api import KvReceiver, TransferSpec

if TYPE_CHECKING:
    from prfaas.services.decode.handler import DecodeService

CONTEXT_TOKENS = 6
"""Of the prompt's end, that the first output token's text may depend on (a leading space)."""
FINISH_WAIT_S = 1.0
"""At the end of an output, for prefill's timings, if they are not here yet."""

_log = log.get_logger("decode")


@dataclass(slots=True)
class DecodeRun:
    """One call on its way."""

    service: DecodeService
    call: DecodeCall
    received_s: float
    out: SseResponse
    trace: Trace | None = None
    times: TokenTimes = field(default_factory=TokenTimes)
    engine_timeline: DecodeTimeline | None = None
    ticket: TicketEvent = field(default_factory=lambda: TicketEvent("", [], 0, 0))
    receiver: KvReceiver | None = None
    hold: Hold | None = None
    """What this node's own pool has of the context."""
    events: EventStream[DecodeEvent] | None = None
    """None: all tokens of the output have been delivered before."""

    async def begin(self) -> None:
        """Raises RequestError for what only the engine looks at, before the response begins."""
        call, engine = self.call, self.service.engine
        if len(call.output_token_ids) >= call.max_output_tokens:
            check_token_ids([*call.prompt_token_ids, *call.output_token_ids], engine.info.vocabulary)
            return
        self.ticket, self.receiver = self._transfer()
        self.events = engine.decode(self._request(), [] if self.receiver is None else [self.receiver])

    def _stream(self) -> EventStream[Any] | None:
        """The engine's; None: it has nothing of the request."""
        return self.events

    async def aclose(self) -> None:
        """The engine has let go of everything when this returns. Idempotent."""
        try:
            if (stream := self._stream()) is not None:
                await stream.aclose()
            elif self.receiver is not None:
                await self.receiver.aclose()
        finally:
            if self.hold is not None:
                self.hold.release()

    async def run(self) -> str:
        """The outcome's word for the metrics. The engine has let go of everything when this returns or raises, before
        the response ends."""
        call, service = self.call, self.service
        try:
            output, format = self._output(), self._format()
            unseen = output.replay(call.output_token_ids, call.text_offset, call.text_ahead)
            if call.format.echo and not call.output_token_ids:
                unseen = await asyncio.to_thread(service.tokenizer.decode, call.prompt_token_ids)
            if output.stopped:
                await self.aclose()
            if output.stopped or self.events is None:
                self.out.send_event("ticket", TicketEvent("", [], 0, 0))
                self._finish(format, output, unseen, "stop" if output.stopped else "length")
                self.out.send(format.end())
                return "done"
            self.out.send_event("ticket", self.ticket)
            reason = "length"
            async for event in self.events:
                if isinstance(event, TokenEvent):
                    self._counted(event.at_s)
                    piece = output.push(event.token_id)
                    self.out.send(format.piece(Piece(unseen + piece.text, piece.token_ids), output.tokens))
                    unseen = ""
                    if output.stopped:
                        break
                elif isinstance(event, DecodeTimeline):
                    self._joined(event)
                elif isinstance(event, DecodeDone):
                    reason = str(event.reason)
            self._finish(format, output, unseen, reason)
            await self._send_timeline(self.receiver)
            self.out.send(format.end())
        except Exception as error:  # the response has begun: whatever it is, the router hears of it in the stream
            code = self.out.send_error(error, call.request_id)
            _log.warning("decode failed", code=code, error=str(error))
            return code
        finally:
            await self.aclose()
        return "done"

    def _transfer(self) -> tuple[TicketEvent, KvReceiver | None]:
        """Permission for the KV of the context's tokens but the last, from the first that isn't held; none when there
        is nothing to send."""
        call, service = self.call, self.service
        info = service.engine.info
        end = len(call.prompt_token_ids) + len(call.output_token_ids) - 1
        start = self._held(end)
        if call.local_prefill or start == end:
            if start < end:
                service.metrics.local_prefills.inc()
            return TicketEvent("", [], start, end), None
        spec = TransferSpec(
            transfer_id=uuid.uuid4().hex,
            request_id=call.request_id,
            tokens=TokenRange(start, end),
            prompt_tokens=end + 1,
            max_output_tokens=call.max_output_tokens - len(call.output_token_ids),
            model_fingerprint=info.model_fingerprint,
            layout_hash=info.layout.layout_hash,
        )
        ticket, receiver = service.endpoint.receiver(spec, call.prefill_node)
        addresses = [KvAddressMessage(a.host, a.port, a.rank) for a in service.endpoint.addresses]
        return TicketEvent(ticket, addresses, start, end), receiver

    def _held(self, end: int) -> int:
        """Tokens of the context that this node's pool has; they are pinned from now on."""
        call, service = self.call, self.service
        store, mirror = service.engine.prefixes, service.engine.mirror
        if not end or (store is None and mirror is None):
            return 0
        context = [*call.prompt_token_ids, *call.output_token_ids][:end]
        if store is not None:
            self.hold = store.hold(context, call.tenant)
            held_tokens = self.hold.tokens
        elif mirror is not None:
            held_tokens = mirror.held_tokens(context, call.tenant)
        service.metrics.prefix_asked_tokens.labels("decode").inc(end)
        service.metrics.prefix_held_tokens.labels("decode").inc(held_tokens)
        return held_tokens

    def _request(self) -> DecodeRequest:
        call = self.call
        return DecodeRequest(
            call.request_id,
            call.prompt_token_ids,
            call.max_output_tokens,
            _sampling(call.sampling),
            call.output_token_ids,
            call.timeout_s,
            call.tenant,
            self.hold,
            call.priority,
        )

    def _output(self) -> OutputText:
        call = self.call
        return OutputText(
            TextStream(self.service.tokenizer, call.prompt_token_ids[-CONTEXT_TOKENS:]),
            StopStrings(call.sampling.stop, call.sampling.include_stop_str_in_output),
            call.sampling.min_tokens,
        )

    def _format(self) -> ChunkFormat | WholeFormat:
        call = self.call
        if call.format.stream:
            return ChunkFormat(call.format, len(call.prompt_token_ids), resumed=bool(call.output_token_ids))
        return WholeFormat(call.format, len(call.prompt_token_ids))

    def _joined(self, timeline: DecodeTimeline) -> None:
        self.engine_timeline = timeline
        if timeline.kv_unused:
            self.service.metrics.kv_unused.labels(timeline.kv_unused).inc()
            _log.warning("KV was not used", reason=timeline.kv_unused)

    def _counted(self, at_s: float) -> None:
        """A token of output."""
        gap_s = self.times.add(at_s)
        self.service.metrics.output_tokens.inc()
        if gap_s is not None:
            self.service.metrics.itl_seconds.observe(gap_s)

    def _finish(self, format: ChunkFormat | WholeFormat, output: OutputText, unseen: str, reason: str) -> None:
        last = output.finish()
        reason = "stop" if output.stopped else reason
        self.out.send(format.finish(Piece(unseen + last.text, last.token_ids), reason, output.tokens))

    async def _send_timeline(self, receiver: KvReceiver | None) -> None:
        if receiver is not None:
            with suppress(TransferError, TimeoutError):
                await asyncio.wait_for(receiver.finished(), FINISH_WAIT_S)
        timeline = self._timeline()
        arrived = [s for s in timeline.arrived_s if s is not None]
        if arrived and timeline.ended_s is not None:
            self.service.metrics.exposed_seconds.observe(max(0.0, max(arrived) - timeline.ended_s))
        self.out.send(b": timeline %b\n\n" % to_json(timeline))

    def _timeline(self) -> DecodeNodeTimeline:
        """Of what has happened so far."""
        receiver = self.receiver
        return node_timeline(
            self.received_s,
            self.times,
            self.engine_timeline,
            receiver.report if receiver is not None else None,
            self.service.router_clock(self.call.router),
            held_tokens=self.ticket.token_start,
            local_prefill=receiver is None and self.ticket.token_start < self.ticket.token_end,
        )

    def trace_ended(self, outcome: str) -> None:
        if self.trace is None or not self.trace.recorded:
            return
        timeline = self._timeline()
        received = spans.receive_span(timeline)
        if received is not None and self.receiver is not None:
            self.trace.add_under(self.receiver.report.traceparent, received)
        tokens = self.times.count
        self.trace.end(spans.decode_span(self.call.request_id, timeline, time.monotonic(), outcome, tokens))


def _sampling(message: SamplingMessage) -> SamplingParams:
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        seed=message.seed,
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        stop_token_ids=message.stop_token_ids,
    )
