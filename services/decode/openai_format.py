"""OpenAI's response objects and chunks as bytes of an SSE stream. Pure.

Everything in a chunk but the text is the same for a whole request, so it is encoded once.
"""

from __future__ import annotations

from typing import Any

import msgspec
from prfaas.services.decode.output import Piece
from prfaas.services.messages import FormatMessage

_json = msgspec.json.encode
_TEXT = "\0text"


def ids_comment(token_ids: list[int]) -> bytes:
    """The line before a `data:` line; nothing for no ids."""
    return b": ids " + ",".join(map(str, token_ids)).encode() + b"\n" if token_ids else b""


class ChunkFormat:
    """`stream: true`. Each method returns one whole SSE event, or several."""

    def __init__(self, format: FormatMessage, prompt_tokens: int, *, resumed: bool) -> None:
        self._format = format
        self._prompt_tokens = prompt_tokens
        self._begun = resumed
        chat = format.kind == "chat"
        choice: dict[str, Any] = {"index": 0}
        choice |= {"delta": {"content": _TEXT}} if chat else {"text": _TEXT}
        choice |= {"logprobs": None, "finish_reason": None}
        chunk = _head(format, "chat.completion.chunk" if chat else "text_completion") | {"choices": [choice]}
        if format.include_usage and not format.continuous_usage:
            chunk["usage"] = None  # as OpenAI does: only the last chunk has figures
        self._before, self._after = _around(chunk, _TEXT)
        self._first_before = self._before
        if chat:
            choice["delta"] = {"role": "assistant", "content": _TEXT}
            self._first_before = _around(chunk, _TEXT)[0]

    def piece(self, piece: Piece, completion_tokens: int) -> bytes:
        """A chunk with text; b"" for none."""
        if not piece.text:
            return b""
        before = self._before if self._begun else self._first_before
        self._begun = True
        return b"%b%b%b%b\n\n" % (
            ids_comment(piece.token_ids),
            before,
            _json(piece.text),
            self._with_usage(self._after, completion_tokens),
        )

    def finish(self, piece: Piece, reason: str, completion_tokens: int) -> bytes:
        """The chunk with the finish reason and the last text, and the usage chunk if it was asked for."""
        before = self._before if self._begun else self._first_before
        after = self._after.replace(b'"finish_reason":null', b'"finish_reason":' + _json(reason))
        last = b"%b%b%b%b\n\n" % (
            ids_comment(piece.token_ids),
            before,
            _json(piece.text),
            self._with_usage(after, completion_tokens),
        )
        return last + (self._usage_chunk(completion_tokens) if self._format.include_usage else b"")

    def end(self) -> bytes:
        return b"data: [DONE]\n\n"

    def _with_usage(self, after: bytes, completion_tokens: int) -> bytes:
        if not self._format.continuous_usage:
            return after
        return after[:-1] + b',"usage":' + _json(_usage(self._prompt_tokens, completion_tokens)) + b"}"

    def _usage_chunk(self, completion_tokens: int) -> bytes:
        kind = "chat.completion.chunk" if self._format.kind == "chat" else "text_completion"
        usage = _usage(self._prompt_tokens, completion_tokens)
        return b"data: " + _json(_head(self._format, kind) | {"choices": [], "usage": usage}) + b"\n\n"


class WholeFormat:
    """`stream: false`: the pieces are kept, the end is one object."""

    def __init__(self, format: FormatMessage, prompt_tokens: int) -> None:
        self._format = format
        self._prompt_tokens = prompt_tokens
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._last = b""

    def piece(self, piece: Piece, completion_tokens: int) -> bytes:
        self._texts.append(piece.text)
        self._ids += piece.token_ids
        return b""

    def finish(self, piece: Piece, reason: str, completion_tokens: int) -> bytes:
        self.piece(piece, completion_tokens)
        text = "".join(self._texts)
        choice: dict[str, Any] = {"index": 0}
        if self._format.kind == "chat":
            kind = "chat.completion"
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            kind = "text_completion"
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": reason}
        body = _head(self._format, kind) | {
            "choices": [choice],
            "usage": _usage(self._prompt_tokens, completion_tokens),
        }
        self._last = ids_comment(self._ids) + b"data: " + _json(body) + b"\n\n"
        return b""

    def end(self) -> bytes:
        return self._last


def _head(format: FormatMessage, kind: str) -> dict[str, Any]:
    return {"id": format.id, "object": kind, "created": format.created, "model": format.model}


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _around(chunk: dict[str, Any], placeholder: str) -> tuple[bytes, bytes]:
    """The `data:` line before and after the JSON of `placeholder`, which occurs once."""
    before, after = _json(chunk).rsplit(_json(placeholder), 1)
    return b"data: " + before, after
