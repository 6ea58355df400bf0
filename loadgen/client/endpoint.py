"""Where requests go and what they say: the URL, the body of each. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.prompts import TextPrompts, TokenPrompts
from prfaas.loadgen.workloads.workload import Request, Workload

Kind = Literal["completions", "chat"]
PATHS: Mapping[Kind, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
MAX_URL_CHARS = 2000


def base_url(text: str) -> str:
    """The server's URL without what every client appends itself; http:// may be left out. Raises ConfigError."""
    given = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(given)
        port = parts.port
    except ValueError as error:
        raise ConfigError([f"--url {text[:100]}: {error}"]) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or len(text) > MAX_URL_CHARS:
        raise ConfigError([f"--url {text[:100]}: it is like http://127.0.0.1:8000"])
    if parts.username is not None or parts.password is not None:
        raise ConfigError(["--url: leave the user and password out; keys come by OPENAI_API_KEY or --api-key-file"])
    if parts.query or parts.fragment:
        raise ConfigError([f"--url {text[:100]}: leave out what comes after ? or #"])
    path = parts.path.rstrip("/")
    for end in (*PATHS.values(), "/v1"):
        path = path.removesuffix(end)
    return f"{parts.scheme}://{parts.netloc}{path}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`extra`: fields that every body has besides; they win. `headers` go with every request."""

    url: str
    kind: Kind
    model: str
    prompts: TextPrompts | TokenPrompts
    temperature: float | None = 0.0
    ignore_eos: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return self.url + PATHS[self.kind]

    def body(self, workload: Workload, request: Request, history: Sequence[tuple[str, str]] = ()) -> bytes:
        """The JSON of a request.

        Completions say the whole prompt, in which made-up words stand for earlier answers. Chats say `history`, what
        was really asked and answered in earlier turns, and the new turn.
        """
        fields: dict[str, Any] = {"model": self.model}
        if self.kind == "completions":
            fields["prompt"] = self._prompt(workload, request.index)
        else:
            said = [(("user", "assistant")[i % 2], text) for i, text in enumerate(sum(history, ()))]
            messages = [*said, ("user", self.turn_text(workload, request.index))]
            fields["messages"] = [{"role": role, "content": text} for role, text in messages]
        limit = "max_tokens" if self.kind == "completions" else "max_completion_tokens"
        fields |= {limit: request.output_tokens, "stream": True, "stream_options": {"include_usage": True}}
        if self.temperature is not None:
            fields["temperature"] = self.temperature
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode(fields | dict(self.extra))

    def turn_text(self, workload: Workload, index: int) -> str:
        """What a turn adds to a chat."""
        assert isinstance(self.prompts, TextPrompts)
        return self.prompts.text(workload.prefixes.new_segments(index))

    def _prompt(self, workload: Workload, index: int) -> str | list[int]:
        segments = workload.prefixes.segments(index)
        if isinstance(self.prompts, TextPrompts):
            return self.prompts.text(segments)
        ids: list[int] = self.prompts.token_ids(segments).tolist()
        return ids
