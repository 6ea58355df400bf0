"""POST /prefill: computes what the ticket asks for and sends it to the decode node; the open call is the lease.

    hold what the pool has ──▶ FETCH what another node has more ──▶ the engine's queue, prefill, transfer

What is held or fetched isn't computed. A FETCH that fails costs only the reuse.
"""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass

from aiohttp import web
from prfaas.common import log
from prfaas.common.config import NodeConfig
from prfaas.common.errors import EngineError, RequestError
from prfaas.common.metrics import NodeMetrics
from prfaas.common.prefixcache.hashes import BlockHasher
from prfaas.services.engine.api import Engine, EventStream, PrefillDone, PrefillEvent, PrefillRequest
from prfaas.services.engine.prefix_store import Hold
from prfaas.services.leases import Leases
from prfaas.services.messages import PrefillCall, PrefillResult
from prfaas.services.prefill import spans
from prfaas.services.prefill.fetch import NOTHING_FETCHED, Fetched, fetch_prefix
from prfaas.services.sse import SseResponse
from prfaas.services.telemetry.tracing import Trace, Tracing
from prfaas.services.tls import check_caller
from prfaas.services.web import Signer, parse_json, read_signed
from prfaas.transport.api import KvAddress, KvSender
from prfaas.transport.endpoint import KvEndpoint

_log = log.get_logger("prefill")


@dataclass(frozen=True, slots=True)
class PrefillService:
    engine: Engine
    endpoint: KvEndpoint
    leases: Leases
    metrics: NodeMetrics
    config: NodeConfig
    signer: Signer
    prefix_block_tokens: int
    tracing: Tracing | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        received_s = time.monotonic()
        call = await parse_json(await read_signed(request, self.signer), PrefillCall)
        check_caller(request, call.router, ("router",))
        log.bind_request(call.request_id)
        response = SseResponse(request, self.config.ping_s)
        trace = None if self.tracing is None else self.tracing.begin(spans.NAME, call.traceparent, received_s)
        prefill = _Prefill(self, call, received_s, response, trace)
        outcome = "refused"
        try:
            async with self.leases.hold(call.router, request, "prefill") as lease, aclosing(prefill):
                await prefill.begin()
                async with response:
                    outcome = "cancelled"
                    try:
                        outcome = await prefill.run()
                    finally:
                        self.metrics.requests.labels("prefill", "lease_freed" if lease.freed else outcome).inc()
        finally:
            prefill.trace_ended(outcome)
        return response.response


@dataclass(slots=True)
class _Prefill:
    """One call on its way."""

    service: PrefillService
    call: PrefillCall
    received_s: float
    out: SseResponse
    trace: Trace | None = None
    sender: KvSender | None = None
    hold: Hold | None = None
    fetched: Fetched = NOTHING_FETCHED
    events: EventStream[PrefillEvent] | None = None
    done: PrefillDone | None = None

    async def begin(self) -> None:
        """Raises RequestError or TicketError for what the router could have known, before any work and before the
        response begins."""
        call, service = self.call, self.service
        tokens = len(call.prompt_token_ids)
        if call.adapter and service.engine.forwarding is None:
            raise RequestError("this node's engine has no adapters", code="adapter")
        addresses = [KvAddress(a.host, a.port, a.rank) for a in call.kv_addresses]
        traceparent = "" if self.trace is None else self.trace.traceparent
        self.sender = service.endpoint.sender(call.ticket, call.decode_node, addresses, traceparent)
        end = self.sender.spec.tokens.end
        if end != tokens - 1:
            raise RequestError(f"the ticket is for {end + 1} tokens, the prompt has {tokens}", param="ticket")
        store = service.engine.prefixes
        if store is not None:
            self.hold = store.hold(call.prompt_token_ids[:-1], call.tenant)
            service.metrics.prefix_asked_tokens.labels("prefill").inc(end)
            service.metrics.prefix_held_tokens.labels("prefill").inc(self.hold.tokens)
        if not self._wants_fetch():
            self._start()

    def _wants_fetch(self) -> bool:
        fetch = self.call.fetch
        return fetch is not None and self.hold is not None and fetch.tokens > self.hold.tokens

    def _start(self) -> None:
        """The request enters the engine's queue; sender and hold are the engine's from now on."""
        call, sender = self.call, self.sender
        assert sender is not None
        timeout_s = call.timeout_s
        if timeout_s is not None:
            timeout_s = max(0.0, timeout_s - (time.monotonic() - self.received_s))
        request = PrefillRequest(
            call.request_id, call.prompt_token_ids, timeout_s, call.tenant, self.hold, call.priority, call.adapter
        )
        self.events = self.service.engine.prefill(request, [sender])

    async def run(self) -> str:
        """The outcome as a word for the metrics. The transfer is closed when this returns or raises, before the
        response ends."""
        metrics = self.service.metrics
        try:
            if self.events is None:
                await self._fetch()
                self._start()
            done = self.done = await self._last_event()
            metrics.queue_seconds.observe(done.started_s - done.queued_s)
            metrics.prefill_seconds.observe(done.ended_s - done.started_s)
            self.out.send_event("done", self._result(done))
        except Exception as error:  # the response has begun: whatever it is, the router hears of it in the stream
            code = self.out.send_error(error, self.call.request_id)
            _log.warning("prefill failed", code=code, error=str(error))
            return code
        finally:
            await self.aclose()
        return "done"

    async def _last_event(self) -> PrefillDone:
        assert self.events is not None
        done: PrefillDone | None = None
        async for event in self.events:
            if isinstance(event, PrefillDone):
                done = event
        if done is None:
            raise EngineError("the engine ended a prefill without a result")
        return done

    async def _fetch(self) -> None:
        store, call, metrics = self.service.engine.prefixes, self.call, self.service.metrics
        assert store is not None
        assert self.hold is not None
        fingerprint = self.service.engine.info.model_fingerprint
        hasher = BlockHasher(fingerprint, call.tenant, self.service.prefix_block_tokens)
        self.fetched = await fetch_prefix(self.service.endpoint, store, self.hold, call, hasher, fingerprint)
        if self.fetched.failed:
            metrics.fetch_failures.labels(self.fetched.failed).inc()
        else:
            metrics.fetched_tokens.inc(self.fetched.tokens)
            metrics.fetched_bytes.inc(self.fetched.wire_bytes)

    def _result(self, done: PrefillDone) -> PrefillResult:
        return PrefillResult(
            done.queued_s,
            done.started_s,
            done.ended_s,
            raw_bytes=sum(r.raw_bytes for r in done.reports),
            wire_bytes=sum(r.wire_bytes for r in done.reports),
            held_tokens=self.hold.tokens if self.hold is not None else 0,
            fetched_tokens=self.fetched.tokens,
            fetched_wire_bytes=self.fetched.wire_bytes,
            fetch_failed=self.fetched.failed,
        )

    def trace_ended(self, outcome: str) -> None:
        if self.trace is None or not self.trace.recorded:
            return
        ended_s, done = time.monotonic(), self.done
        instants = spans.PrefillInstants(self.received_s, ended_s)
        if done is not None:
            sent_s = {layer: at_s for report in done.reports for layer, at_s in report.layer_at_s.items()}
            instants = spans.PrefillInstants(
                self.received_s,
                ended_s,
                done.queued_s,
                done.started_s,
                done.ended_s,
                done.computed_s,
                sent_s,
                sum(report.raw_bytes for report in done.reports),
                sum(report.wire_bytes for report in done.reports),
            )
        held_tokens = self.hold.tokens if self.hold is not None else 0
        call = self.call
        self.trace.end(spans.prefill_span(call.request_id, instants, outcome, len(call.prompt_token_ids), held_tokens))

    async def aclose(self) -> None:
        """Engine and transfer have let go of everything when this returns. Idempotent."""
        try:
            if self.events is not None:
                await self.events.aclose()
            elif self.sender is not None:
                await self.sender.aclose()
        finally:
            if self.hold is not None:
                self.hold.release()
