"""Clients' bodies, answered by vLLM's own server: services.engine.api.Forwarding.

What vLLM is given beside the body is the connector's parameters, `return_token_ids` (for the router's count, and taken
out again where the client has not asked for it) and names of ours. What it answers goes to the client as it is, but for
the model's name.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec
from prfaas.common.errors import EngineError, RequestError
from prfaas.services.engine.api import DecodeTimeline, EventStream, ForwardedChunk, ForwardRequest
from prfaas.services.vllm.decoding import VllmLife
from prfaas.services.vllm.desk import Desk
from prfaas.transport.api import KvReceiver

PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
RENDERS = (
    "messages",
    "prompt",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
    "media_io_kwargs",
    "mm_processor_kwargs",
)
"""Fields of a body on which its prompt depends, as /tokenize takes them."""


class VllmForwarding:
    """keep(life): called with each request's."""

    def __init__(self, desk: Desk, keep: Callable[[ForwardLife], None]) -> None:
        self._desk = desk
        self._keep = keep

    @property
    def adapters(self) -> Sequence[str]:
        return self._desk.adapters

    async def prompt(self, kind: Literal["chat", "completion"], body: Mapping[str, Any]) -> list[int]:
        if kind == "completion" and isinstance(body.get("prompt"), list):
            return _ids(body["prompt"])
        asked = {name: body[name] for name in RENDERS if body.get(name) is not None}
        variables = dict(body.get("chat_template_kwargs") or {})
        if body.get("reasoning_effort") is not None:
            variables.setdefault("reasoning_effort", body["reasoning_effort"])
        if variables:
            asked["chat_template_kwargs"] = variables
        if body.get("tool_choice") == "none" or not body.get("tools"):
            asked.pop("tools", None)
        return await self._desk.client.tokenize({"model": _model(self._desk, body), **asked})

    def forward(
        self, request: ForwardRequest, transfers: Sequence[KvReceiver]
    ) -> EventStream[DecodeTimeline | ForwardedChunk]:
        life = ForwardLife(self._desk, request, transfers)
        self._keep(life)
        life.begin()
        return life.stream


class ForwardLife(VllmLife[ForwardedChunk]):
    def __init__(self, desk: Desk, request: ForwardRequest, receivers: Sequence[KvReceiver]) -> None:
        self._request = request
        self._output_tokens = 0
        super().__init__(desk, list(request.prompt_token_ids), request.timeout_s, receivers)

    @property
    def context_tokens(self) -> int:
        return len(self._context) + self._output_tokens

    def _body(self) -> dict[str, Any]:
        request = self._request
        body = dict(request.body) | {
            "model": _model(self._desk, request.body),
            "return_token_ids": True,
            # Clients may choose ours, and the same twice; vLLM's must differ.
            "request_id": f"{request.request_id}-{secrets.token_hex(4)}",
            "cache_salt": self._desk.salt(request.tenant),
            **self._params(),
        }
        body.pop("priority", None)  # it has had its effect, in our queues; vLLM refuses it unless told to heed it
        if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
            body["max_tokens"] = request.max_output_tokens
        return body

    async def _run(self) -> None:
        request = self._request
        try:
            answer = self._desk.client.answer(PATHS[request.kind], self._body())
            async with contextlib.aclosing(answer) as events:
                async for event in events:
                    await self._first()
                    self._push(event)
            self.stream.end()
        except msgspec.DecodeError as error:
            self._fail(EngineError(f"vLLM's answer is not understood: {error}"))
        except Exception as error:  # vLLM's and the transport's errors go to the caller as they are
            self._fail(error)

    def _push(self, event: bytes) -> None:
        chunk = msgspec.json.decode(event)
        chunk["model"] = self._request.body.get("model", chunk.get("model"))
        token_ids: list[int] = []
        finished = False
        keep_ids = self._request.body.get("return_token_ids") is True
        for choice in chunk.get("choices", []):
            token_ids += choice.get("token_ids") or []
            finished = finished or choice.get("finish_reason") is not None
            if not keep_ids:
                choice.pop("token_ids", None)
                choice.pop("prompt_token_ids", None)
        if not keep_ids:
            chunk.pop("prompt_token_ids", None)
        chunk.pop("kv_transfer_params", None)
        at_s = self._came(len(token_ids))
        self._output_tokens += len(token_ids)
        self.stream.push(ForwardedChunk(msgspec.json.encode(chunk), token_ids, at_s, finished))


def _model(desk: Desk, body: Mapping[str, Any]) -> str:
    """vLLM's name for what the client has asked for."""
    return str(body["model"]) if body.get("model") in desk.adapters else desk.served_model


def _ids(prompt: list[Any]) -> list[int]:
    """Raises RequestError."""
    if len(prompt) == 1 and isinstance(prompt[0], list):
        prompt = prompt[0]
    try:
        return msgspec.convert(prompt, list[int])
    except msgspec.ValidationError:
        raise RequestError("prompt must be a string or a list of token ids", param="prompt") from None
