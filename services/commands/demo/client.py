"""The demo's client: one chat completion, streamed, timed from the moment of its sending."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prfaas.common.errors import SetupError
from prfaas.services.commands.demo.cluster import HOST

ANSWER_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Answer:
    """`sent_s` is an instant of the monotonic clock; the other times count from it."""

    request_id: str
    text: str
    sent_s: float
    ttft_s: float
    time_to_second_token_s: float | None
    prompt_tokens: int
    output_tokens: int


def ask(port: int, model: str, prompt: str, max_tokens: int, on_text: Callable[[str], None]) -> Answer:
    """Ask the router at `port`, greedily. `on_text` gets each piece of the answer as it comes.

    Raises SetupError with the router's own words when it fails.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    data = json.dumps(body).encode()
    connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER_TIMEOUT_S)
    try:
        connection.connect()
        sent_s = time.monotonic()
        connection.request("POST", "/v1/chat/completions", data, {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SetupError(f"the router answered {response.status}: {_error_text(response.read())}")
        return _read_stream(response, sent_s, on_text)
    except (OSError, http.client.HTTPException) as error:
        raise SetupError(f"the connection to the router failed: {error or type(error).__name__}") from error
    finally:
        connection.close()


def _read_stream(response: http.client.HTTPResponse, sent_s: float, on_text: Callable[[str], None]) -> Answer:
    pieces: list[str] = []
    times_s: list[float] = []
    usage: dict[str, int] = {}
    complete = False
    for line in response:
        now_s = time.monotonic() - sent_s
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            complete = True
            continue
        event: dict[str, Any] = json.loads(line[6:])
        if "error" in event:
            raise SetupError(f"the router ended the stream: {_error_text(line[6:])}")
        usage = event.get("usage") or usage
        text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if text:
            pieces.append(text)
            times_s.append(now_s)
            on_text(text)
    if not complete or not times_s:
        raise SetupError("the answer has no text" if complete else "the stream ended before the answer was complete")
    return Answer(
        request_id=response.headers.get("x-request-id", ""),
        text="".join(pieces),
        sent_s=sent_s,
        ttft_s=times_s[0],
        time_to_second_token_s=times_s[1] if len(times_s) > 1 else None,
        prompt_tokens=usage.get("prompt_tokens", 0),
        output_tokens=usage.get("completion_tokens", 0),
    )


def _error_text(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:300].decode("utf-8", "replace")
