"""POST /decode: the ticket, then the output as OpenAI's chunks; the open call is the lease."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

from aiohttp import web
from prfaas.common import log
from prfaas.common.config import NodeConfig
from prfaas.common.errors import RequestError
from prfaas.common.kv_layout import TokenRange
from prfaas.common.metrics import NodeMetrics
from prfaas.services.decode import spans
from prfaas.services.decode.forwarded import ForwardedRun
from prfaas.services.decode.run import DecodeRun
from prfaas.services.engine.api import Engine
from prfaas.services.engine.tokenizer import Tokenizer
from prfaas.services.leases import Lease, Leases
from prfaas.services.messages import DecodeCall
from prfaas.services.sse import SseResponse
from prfaas.services.telemetry.tracing import Tracing
from prfaas.services.tls import check_caller
from prfaas.services.web import Signer, parse_json, read_signed
from prfaas.transport.api import LinkClock
from prfaas.transport.endpoint import KvEndpoint

_log = log.get_logger("decode")


@dataclass(frozen=True, slots=True)
class DecodeService:
    engine: Engine
    endpoint: KvEndpoint
    tokenizer: Tokenizer
    leases: Leases
    metrics: NodeMetrics
    config: NodeConfig
    signer: Signer
    router_clock: Callable[[str], LinkClock | None]
    """By router name: router_monotonic − ours."""
    tracing: Tracing | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        received_s = time.monotonic()
        call = await parse_json(await read_signed(request, self.signer), DecodeCall)
        check_caller(request, call.router, ("router",))
        log.bind_request(call.request_id)
        self._check(call)
        response = SseResponse(request, self.config.ping_s)
        trace = None if self.tracing is None else self.tracing.begin(spans.NAME, call.traceparent, received_s)
        decode = self._run_of(call)(self, call, received_s, response, trace)
        outcome = "refused"
        try:
            async with self.leases.hold(call.router, request, "decode") as lease, aclosing(decode):
                await decode.begin()
                async with response:
                    outcome = "cancelled"
                    try:
                        outcome = await decode.run()
                    finally:
                        self.metrics.requests.labels("decode", _outcome(lease, outcome)).inc()
        finally:
            decode.trace_ended(outcome)
        return response.response

    def _run_of(self, call: DecodeCall) -> type[DecodeRun]:
        """Raises RequestError."""
        if call.forward is None:
            return DecodeRun
        if self.engine.forwarding is None:
            raise RequestError("this node's engine takes no clients' bodies", code="not_forwarded")
        return ForwardedRun

    def _check(self, call: DecodeCall) -> None:
        """What the client can be told before any work begins; of the ids the engine tells. Raises RequestError."""
        info = self.engine.info
        tokens = len(call.prompt_token_ids) + call.max_output_tokens
        if not call.prompt_token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        if call.max_output_tokens < 1 or call.max_output_tokens > self.config.max_output_tokens:
            raise RequestError(
                f"max_tokens must be from 1 to {self.config.max_output_tokens}, not {call.max_output_tokens}",
                param="max_tokens",
            )
        if tokens > info.max_model_tokens:
            raise RequestError(
                f"prompt and output have {tokens} tokens ({len(call.prompt_token_ids)} + {call.max_output_tokens}), "
                f"this model takes {info.max_model_tokens}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if info.layout.total_bytes(TokenRange(0, tokens)) > info.arena_bytes:
            raise RequestError(
                f"the KVCache of {tokens} tokens does not fit this node's memory; "
                f"shorten the prompt of {len(call.prompt_token_ids)} or lower max_tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )


def _outcome(lease: Lease, outcome: str) -> str:
    return "lease_freed" if lease.freed else outcome
