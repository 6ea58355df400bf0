"""What a server says, as bytes come: server-sent events, OpenAI's chunks in them, its error bodies. Pure."""

from __future__ import annotations

import re
from typing import Any

import msgspec

MAX_LINE_BYTES = 8 << 20
"""Of one event; a chunk is some hundred bytes."""
MAX_ERROR_CHARS = 300
MAX_PIECES = 1_000_000
"""Of one answer; of what comes after them only the last one's instant is kept."""
_NO_WORD = re.compile(r"[^a-z0-9]+")


class BadStreamError(Exception):
    """`word`: what stands in the record; `text`: for people."""

    def __init__(self, word: str, text: str) -> None:
        self.word = word
        self.text = text
        super().__init__(text)


class SseParser:
    """`feed` bytes as they come; get the data of each event that is complete. Comments and other fields are dropped.

    Lines end in LF or CRLF. An event's data is that of its lines joined with newlines, as the standard has it.
    Raises BadStreamError for a line above MAX_LINE_BYTES.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        lines = (self._rest + piece).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_LINE_BYTES:
            raise BadStreamError("not_sse", f"a line of the stream is longer than {MAX_LINE_BYTES >> 20} MiB")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    """Fields that nobody reads here are left out; msgspec skips them."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None
    object: str = ""


_CHUNKS = msgspec.json.Decoder(Chunk)


class Answer:
    """One streamed answer: `take` each event's data with the instant of its coming."""

    def __init__(self, *, keep_text: bool = False) -> None:
        self.times_s: list[float] = []
        """When each piece of text came; pieces are tokens unless the server sends several at once."""
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.finished = False
        """A finish reason or [DONE] was seen: the answer is complete."""
        self._keep_text = keep_text
        self._text: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._text)

    def take(self, data: bytes, now_s: float) -> None:
        """Raises BadStreamError for what is no chunk, and for an error that the server reports in its stream."""
        if data.strip() == b"[DONE]":
            self.finished = True
            return
        try:
            chunk = _CHUNKS.decode(data)
        except msgspec.DecodeError as error:
            shown = data[:80].decode("utf-8", "replace")
            raise BadStreamError("not_json", f"an event is no chunk of OpenAI's: {error}: {shown!r}") from None
        if chunk.error is not None:
            raise BadStreamError(_error_word(chunk.error), error_text(data))
        if chunk.usage is not None:
            self._use(chunk.usage)
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        text = choice.text or ""
        if choice.delta is not None:
            text = choice.delta.content or choice.delta.reasoning_content or choice.delta.reasoning or text
        if text or (choice.finish_reason is not None and not self.times_s):
            # An answer whose tokens have no text still has a first token: that with the finish reason.
            if len(self.times_s) < MAX_PIECES:
                self.times_s.append(now_s)
            else:
                self.times_s[-1] = now_s
        if text and self._keep_text and len(self._text) < MAX_PIECES:
            self._text.append(text)
        if choice.finish_reason is not None:
            self.finished = True

    def _use(self, usage: Usage) -> None:
        if usage.prompt_tokens is not None:
            self.prompt_tokens = usage.prompt_tokens
        if usage.completion_tokens is not None:
            self.output_tokens = usage.completion_tokens
        if usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens is not None:
            self.cached_tokens = usage.prompt_tokens_details.cached_tokens


def _error_word(error: object) -> str:
    """The code of an error object in a stream, else its type, as a word."""
    given = ""
    if isinstance(error, dict):
        given = next((str(error[key]) for key in ("code", "type") if error.get(key)), "")
    return _NO_WORD.sub("_", given.lower()).strip("_")[:40] or "error_in_stream"


def error_text(body: bytes) -> str:
    """What an error body says, at most MAX_ERROR_CHARS on one line."""
    try:
        parsed = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        parsed = None
    said: object = None
    if isinstance(parsed, dict):
        error = parsed.get("error", parsed)
        said = error.get("message") if isinstance(error, dict) else error
        said = said or parsed.get("detail")
    text = said if isinstance(said, str) else body[: 4 * MAX_ERROR_CHARS].decode("utf-8", "replace")
    return " ".join(text.split())[:MAX_ERROR_CHARS]
