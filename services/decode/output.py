"""From output tokens to the pieces of text that a client gets, each with the ids of its tokens. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prfaas.services.decode.stop import StopStrings
from prfaas.services.engine.tokenizer import TextStream


@dataclass(frozen=True, slots=True)
class Piece:
    """`token_ids`: of all tokens whose text is out with this piece and was not before."""

    text: str
    token_ids: list[int]


class OutputText:
    """Takes tokens, gives pieces. Text waits while it may be half a character or the beginning of a stop string, and
    ids wait for the last of their text, so that ids and text that were sent always belong together.

    Stop strings count that are complete behind the first `min_tokens` tokens, wherever they begin (as in vLLM).
    """

    def __init__(self, text: TextStream, stop: StopStrings, min_tokens: int = 0) -> None:
        self._text = text
        self._stop = stop
        self._min_tokens = min_tokens
        self._ids: list[int] = []
        self._skip_chars = 0
        self.tokens = 0
        """Pushed so far, replayed ones included."""

    @property
    def stopped(self) -> bool:
        return self._stop.stopped

    @property
    def _may_stop(self) -> bool:
        return self.tokens > self._min_tokens

    def replay(self, token_ids: Sequence[int], text_offset: int | None, text_ahead: int = 0) -> str:
        """Tokens that were delivered already, of whose text the client has `text_offset` characters; None: all of it,
        and the first `text_ahead` characters of what follows. Returns text of theirs that the client lacks; when it has
        more than theirs, the rest is taken off what comes next."""
        self._skip_chars = text_offset or 0
        text = "".join(self.push(token_id).text for token_id in token_ids)
        self._ids.clear()
        if text_offset is not None:
            return text
        self._skip_chars = text_ahead
        return ""

    def push(self, token_id: int) -> Piece:
        """One token. Without text there are no ids either."""
        self.tokens += 1
        self._ids.append(token_id)
        text = self._text.push(token_id)
        text = self._stop.push(text, counts=self._may_stop)
        text = self._unseen(text)
        if not text or self._stop.holds or self._text.held_tokens:
            return Piece(text, [])
        return Piece(text, self._take_ids())

    def finish(self) -> Piece:
        """The output has ended: what was held back. A stop string may be complete only now (`stopped`)."""
        if self._stop.stopped:
            return Piece("", self._take_ids())
        text = self._stop.push(self._text.flush(), counts=self._may_stop)
        if not self._stop.stopped:
            text += self._stop.flush()
        return Piece(self._unseen(text), self._take_ids())

    def _take_ids(self) -> list[int]:
        ids, self._ids = self._ids, []
        return ids

    def _unseen(self, text: str) -> str:
        if self._skip_chars:
            skipped = min(self._skip_chars, len(text))
            self._skip_chars -= skipped
            return text[skipped:]
        return text
