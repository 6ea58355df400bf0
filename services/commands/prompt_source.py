"""Which tokens are captured: of the built-in text, a file or the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from prfaas.common.errors import UsageError
from prfaas.services.commands.sample_text import TEXT
from prfaas.services.engine.tokenizer import Tokenizer

FOLLOWING_TOKENS = 1024
"""How much of the text after the prompt goes into a capture, at most."""
MAX_TEXT_BYTES = 64 << 20
DEFAULT_TOKENS = 2048


class PromptTokens(NamedTuple):
    prompt: Sequence[int]
    following: Sequence[int]
    """How the text goes on after the prompt; may be empty."""


def read_text(file_name: str) -> str:
    """Raises UsageError for a file that isn't there, is too large, or isn't UTF-8."""
    path = Path(file_name)
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise UsageError(f"--text {path}: larger than {MAX_TEXT_BYTES >> 20} MiB; give a shorter text")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--text {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--text {path}: not UTF-8; convert it first") from None


def prompt_tokens(tokenizer: Tokenizer, text: str | None, tokens: int | None, most_tokens: int) -> PromptTokens:
    """The first `tokens` tokens of the text; text None: the built-in one, which is repeated when it is too short.

    `tokens` None: DEFAULT_TOKENS of the built-in text, all of a given one. The prompt and what follows are at most
    `most_tokens` together. Raises UsageError for a text with fewer tokens than asked for.
    """
    ids = tokenizer.encode(TEXT if text is None else text)
    if text is None:
        wanted = DEFAULT_TOKENS if tokens is None else tokens
        ids = (ids * -(-(wanted + FOLLOWING_TOKENS) // len(ids))) if wanted > len(ids) else ids
    else:
        wanted = len(ids) if tokens is None else tokens
    if wanted > len(ids):
        raise UsageError(f"the text has {len(ids)} tokens, --tokens asks for {wanted}; lower it, or give a longer text")
    if wanted < 2:
        raise UsageError(f"the text has {wanted} token(s); a capture needs at least 2")
    if wanted > most_tokens:
        raise UsageError(f"{wanted} tokens don't fit the model, which has {most_tokens} positions; lower --tokens")
    return PromptTokens(ids[:wanted], ids[wanted : min(wanted + FOLLOWING_TOKENS, most_tokens)])
