"""POST /prefill: computes what the ticket asks for and sends it to the decode node; the open call is the lease."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web
from prfaas.common import log
from prfaas.common.config import NodeConfig
from prfaas.common.errors import EngineError, RequestError
from prfaas.common.metrics import NodeMetrics
from prfaas.services.engine.api import Engine, PrefillDone, PrefillRequest
from prfaas.services.leases import Leases
from prfaas.services.messages import PrefillCall, PrefillResult
from prfaas.services.sse import SseResponse
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

    async def handle(self, request: web.Request) -> web.StreamResponse:
        call = await parse_json(await read_signed(request, self.signer), PrefillCall)
        check_caller(request, call.router, ("router",))
        log.bind_request(call.request_id)
        lease = self.leases.hold(call.router, request)
        sender = self._sender(call)
        async with lease, SseResponse(request, self.config.ping_s) as out:
            outcome = "cancelled"
            try:
                outcome = await self._run(call, sender, out)
            finally:
                self.metrics.requests.labels("prefill", "lease_freed" if lease.freed else outcome).inc()
        return out.response

    def _sender(self, call: PrefillCall) -> KvSender:
        """Raises RequestError or TicketError for what the router could have known, before any work."""
        info = self.engine.info
        ids = call.prompt_token_ids
        if not ids or min(ids) < 0 or max(ids) >= info.vocabulary:
            raise RequestError(f"the prompt must have token ids from 0 to {info.vocabulary - 1}", param="prompt")
        addresses = [KvAddress(a.host, a.port, a.rank) for a in call.kv_addresses]
        sender = self.endpoint.sender(call.ticket, call.decode_node, addresses)
        if sender.spec.tokens.end != len(ids) - 1:
            raise RequestError(
                f"the ticket is for {sender.spec.tokens.end + 1} tokens, the prompt has {len(ids)}", param="ticket"
            )
        return sender

    async def _run(self, call: PrefillCall, sender: KvSender, out: SseResponse) -> str:
        """The outcome as a word for the metrics. Cancelled: the transfer is closed when this raises."""
        events = self.engine.prefill(PrefillRequest(call.request_id, call.prompt_token_ids, call.timeout_s), [sender])
        try:
            done: PrefillDone | None = None
            async for event in events:
                if isinstance(event, PrefillDone):
                    done = event
            if done is None:
                raise EngineError("the engine ended a prefill without a result")
            self.metrics.queue_seconds.observe(done.started_s - done.queued_s)
            self.metrics.prefill_seconds.observe(done.ended_s - done.started_s)
            out.send_event("done", _result(done))
        except Exception as error:  # the response has begun: whatever it is, the router hears of it in the stream
            code = out.send_error(error, call.request_id)
            _log.warning("prefill failed", code=code, error=str(error))
            return code
        finally:
            await events.aclose()
        return "done"


def _result(done: PrefillDone) -> PrefillResult:
    return PrefillResult(
        done.queued_s,
        done.started_s,
        done.ended_s,
        raw_bytes=sum(r.raw_bytes for r in done.reports),
        wire_bytes=sum(r.wire_bytes for r in done.reports),
    )
