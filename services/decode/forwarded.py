"""A /decode call that carries the client's own body: the engine's server renders the prompt and writes the response,
which goes to the router as it comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec
from prfaas.common import log
from prfaas.services.decode.run import DecodeRun
from prfaas.services.engine.api import DecodeTimeline, EventStream, ForwardedChunk, ForwardedEvent, ForwardRequest

DONE = b"data: [DONE]\n\n"

_log = log.get_logger("decode")


@dataclass(slots=True)
class ForwardedRun(DecodeRun):
    forwarded: EventStream[ForwardedEvent] | None = None

    async def begin(self) -> None:
        """Raises RequestError for what the engine's server finds wrong with the prompt, before the response begins."""
        call, forwarding = self.call, self.service.engine.forwarding
        assert forwarding is not None
        body = call.forward or {}
        kind: Literal["chat", "completion"] = "chat" if call.format.kind == "chat" else "completion"
        token_ids = await forwarding.prompt(kind, body)
        guessed = call.prompt_token_ids
        self.call = call = msgspec.structs.replace(call, prompt_token_ids=token_ids)
        ticket, self.receiver = self._transfer()
        if token_ids != guessed:
            ticket = msgspec.structs.replace(ticket, prompt_token_ids=token_ids)
        self.ticket = ticket
        request = ForwardRequest(
            call.request_id,
            kind,
            body,
            token_ids,
            call.max_output_tokens,
            call.timeout_s,
            call.tenant,
            call.priority,
        )
        self.forwarded = forwarding.forward(request, [] if self.receiver is None else [self.receiver])

    async def run(self) -> str:
        """As DecodeRun's."""
        assert self.forwarded is not None
        try:
            self.out.send_event("ticket", self.ticket)
            async for event in self.forwarded:
                if isinstance(event, DecodeTimeline):
                    self._joined(event)
                else:
                    await self._relay(event)
            if self.call.format.stream:
                self.out.send(DONE)
        except Exception as error:  # the response has begun: whatever it is, the router hears of it in the stream
            code = self.out.send_error(error, self.call.request_id)
            _log.warning("decode failed", code=code, error=str(error))
            return code
        finally:
            await self.aclose()
        return "done"

    async def _relay(self, chunk: ForwardedChunk) -> None:
        for _ in chunk.token_ids:
            self._counted(chunk.at_s)
        if chunk.last:
            await self._send_timeline(self.receiver)
        ids = b": ids %b\n" % ",".join(map(str, chunk.token_ids)).encode() if chunk.token_ids else b""
        self.out.send(b"%bdata: %b\n\n" % (ids, chunk.data))

    def _stream(self) -> EventStream[ForwardedEvent] | None:
        return self.forwarded
