"""From a request body to token ids, without making any stream wait: what takes long is done in threads.

`tokenizers` releases the GIL. msgspec doesn't, but parses 128K token ids in a few milliseconds; in a thread that
costs the loop a late wake-up, not the sum of all such calls.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from prfaas.common.errors import RequestError
from prfaas.common.prefixcache.hashes import BlockHasher, BlockKey
from prfaas.services.engine.tokenizer import Tokenizer
from prfaas.services.router.openai import GenerationRequest, Kind, parse_request
from prfaas.services.web import LARGE_BODY_BYTES, in_thread_if, parse_json

INLINE_TEXT_CHARS = 2048
"""Shorter texts are tokenized on the loop: under a millisecond, where a thread costs a tenth of that and a queue."""
LONG_TEXT_CHARS = 64 * 1024
"""Longer ones have threads of their own, so that they don't hold up the ordinary."""
MANY_IDS = 16 * 1024


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]
    json: msgspec.Raw
    """The ids as JSON, written once for both nodes."""

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


class Prompts:
    """Parses and tokenizes. `close` when done."""

    def __init__(self, tokenizer: Tokenizer, threads: int) -> None:
        self._tokenizer = tokenizer
        self._short = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
        self._long = ThreadPoolExecutor(threads, thread_name_prefix="tokenize-long")

    def close(self) -> None:
        self._short.shutdown(wait=False, cancel_futures=True)
        self._long.shutdown(wait=False, cancel_futures=True)

    async def parse(
        self, kind: Kind, body: bytes, forwards: bool = False, adapters: Set[str] = frozenset()
    ) -> GenerationRequest:
        """As `parse_request`. Raises RequestError."""
        data = await parse_json(body, object, self._long)
        return await in_thread_if(
            len(body) > LARGE_BODY_BYTES, self._long, parse_request, kind, data, forwards, adapters
        )

    async def keys(self, hasher: BlockHasher, prompt: Prompt) -> Sequence[BlockKey]:
        """The keys of the prompt's prefix blocks; 16K tokens take a third of a millisecond."""
        return await in_thread_if(prompt.tokens > MANY_IDS, self._long, keys_of, hasher, prompt)

    async def tokenize(self, request: GenerationRequest) -> Prompt:
        """Raises RequestError naming the prompt's field."""
        if request.messages is not None:
            size = sum(len(message.get("content") or "") for message in request.messages)
        else:
            size = len(request.prompt or "")
        if isinstance(request.prompt, list):
            return await in_thread_if(size > MANY_IDS, self._long, tokenize, request, self._tokenizer)
        executor = self._long if size > LONG_TEXT_CHARS else self._short
        return await in_thread_if(size > INLINE_TEXT_CHARS, executor, tokenize, request, self._tokenizer)


def keys_of(hasher: BlockHasher, prompt: Prompt) -> list[bytes]:
    """Pure. Of the blocks of the first n−1 tokens."""
    ids = array("I", prompt.token_ids)
    ids.pop()
    return hasher.keys(np.frombuffer(ids, np.uint32))


def tokenize(request: GenerationRequest, tokenizer: Tokenizer) -> Prompt:
    """Pure. Token ids are checked against the vocabulary, text is encoded, a chat rendered and encoded."""
    try:
        if request.messages is not None:
            ids = tokenizer.encode(_render(request.messages, request.forward, tokenizer), special_tokens=False)
        elif isinstance(request.prompt, str):
            ids = tokenizer.encode(request.prompt)
        else:
            ids = request.prompt or []
    except RequestError as error:
        if error.param is not None:
            raise
        raise RequestError(str(error), param=request.prompt_field) from error
    if not ids:
        raise RequestError(f"{request.prompt_field} has no tokens", param=request.prompt_field)
    if any(i >= tokenizer.vocabulary for i in request.sampling.stop_token_ids):
        raise RequestError(
            f"stop_token_ids must be below the vocabulary of {tokenizer.vocabulary}", param="stop_token_ids"
        )
    json = msgspec.json.encode(ids)
    if isinstance(request.prompt, list):
        _check_range(ids, json, tokenizer.vocabulary)
    return Prompt(ids, msgspec.Raw(json))


def _render(messages: Sequence[Mapping[str, Any]], forward: Mapping[str, Any] | None, tokenizer: Tokenizer) -> str:
    """Of a forwarded chat the engine has the last word on the prompt: here it is for the route and the cache."""
    if forward is None:
        return tokenizer.render_chat(messages)
    given = forward.get("chat_template_kwargs")
    variables = {str(name): value for name, value in given.items()} if isinstance(given, dict) else {}
    for name in ("tools", "documents", "add_generation_prompt", "continue_final_message"):
        if forward.get(name) is not None:
            variables[name] = forward[name]
    try:
        return tokenizer.render_chat(messages, **variables)
    except (RequestError, TypeError):
        return msgspec.json.encode(messages).decode()  # about as long


def _check_range(ids: list[int], json: bytes, vocabulary: int) -> None:
    """`json`: the ids; a minus sign is found there at once, where min() would look at every id."""
    if b"-" in json or max(ids) >= vocabulary:
        wrong = min(ids) if b"-" in json else max(ids)
        raise RequestError(f"token ids must be from 0 to {vocabulary - 1}; one is {wrong}", param="prompt")
