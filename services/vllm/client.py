"""vLLM's own OpenAI server, as far as a node needs it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import aiohttp
import msgspec
from prfaas.common.errors import EngineError, RequestError

MAX_EVENT_BYTES = 4 << 20
DATA = b"data:"
DONE = b"[DONE]"
ERROR = b'{"error":'
PROBE_S = 5.0


class Choice(msgspec.Struct, frozen=True):
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str = ""
    param: str | None = None


class Chunk(msgspec.Struct, frozen=True):
    """Of a completion's stream, or all of it."""

    choices: list[Choice] = []
    error: ErrorDetail | None = None
    message: str = ""
    """Where older servers put an error's text."""


class Tokens(msgspec.Struct, frozen=True):
    tokens: list[int]


class VllmClient:
    """`session` is the caller's to close."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url.rstrip("/")

    async def healthy(self) -> bool:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with asyncio.timeout(PROBE_S), self._session.get(f"{self._url}/health") as response:
                return response.status == 200
        return False

    async def models(self) -> tuple[str, int, list[str]]:
        """The name that it serves its model under, the longest context, and its adapters' names. Raises EngineError."""
        try:
            async with asyncio.timeout(PROBE_S), self._session.get(f"{self._url}/v1/models") as response:
                served, *others = (await response.json())["data"]
                adapters = [str(each["id"]) for each in others if each.get("parent")]
                return str(served["id"]), int(served["max_model_len"]), adapters
        except (aiohttp.ClientError, TimeoutError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise EngineError(f"{self._url}/v1/models does not answer as vLLM does: {error}") from error

    async def complete(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        """POST /v1/completions, streamed. As `answer`."""
        async with contextlib.aclosing(self.answer("/v1/completions", {**body, "stream": True})) as events:
            async for event in events:
                yield msgspec.json.decode(event, type=Chunk)

    async def answer(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
        """The JSON of each event of a stream but its last, or of the one response where the body asks for no stream.
        Closing the iterator cancels the request in vLLM.

        Raises RequestError for what vLLM finds wrong with the request, EngineError for what is wrong with vLLM."""
        data = msgspec.json.encode(body)
        headers = {"content-type": "application/json"}
        try:
            async with self._session.post(self._url + path, data=data, headers=headers) as response:
                if response.status != 200:
                    raise _error(response.status, await response.content.read(MAX_EVENT_BYTES))
                if not body.get("stream"):
                    yield await response.read()
                    return
                async for event in _events(response.content):
                    if event == DONE:
                        return
                    if event.startswith(ERROR):
                        raise EngineError(f"vLLM ended the request: {_error(500, event)}")
                    yield event
        except (aiohttp.ClientError, OSError, msgspec.DecodeError) as error:
            raise EngineError(f"vLLM at {self._url} broke off: {error or type(error).__name__}") from error

    async def tokenize(self, body: Mapping[str, Any]) -> list[int]:
        """POST /tokenize. Raises RequestError, EngineError."""
        async with contextlib.aclosing(self.answer("/tokenize", body)) as events:
            async for event in events:
                return msgspec.json.decode(event, type=Tokens).tokens
        raise EngineError("vLLM gave no tokens")


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of each event."""
    rest = bytearray()
    async for part in content.iter_any():
        rest += part
        *lines, last = rest.split(b"\n")
        rest = bytearray(last)
        if len(rest) > MAX_EVENT_BYTES:
            raise EngineError(f"vLLM sent an event of more than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            if line.startswith(DATA):
                yield bytes(line[len(DATA) :].strip())


def _error(status: int, body: bytes) -> RequestError | EngineError:
    text = body[:500].decode("utf-8", "replace")
    param = None
    with contextlib.suppress(msgspec.DecodeError):
        chunk = msgspec.json.decode(body, type=Chunk)
        text = chunk.message or text
        if chunk.error is not None:
            text, param = chunk.error.message or text, chunk.error.param
    if 400 <= status < 500:
        return RequestError(f"vLLM refuses the request: {text}", param=param)
    return EngineError(f"vLLM answered with status {status}: {text}")
