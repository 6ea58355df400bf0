"""Bodies of requests, made ahead where prompts are long, so that making one delays nobody."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from prfaas.loadgen.client.endpoint import Endpoint
from prfaas.loadgen.workloads.workload import Request, Workload

SHORT_PROMPT_TOKENS = 2048
"""Made in some 0.2 ms, which is less than asking a thread for it."""
AHEAD_REQUESTS = 32
AHEAD_TOKENS = 4_000_000
"""Some 30 MB of text or token ids."""
MAX_HISTORIES = 100_000


class Bodies:
    """`get` a request's body; those of long prompts that come next are made ahead in a thread.

    Of chats it keeps what was said, from `said` to `forget`; a chat's later turns are made when they are asked for.
    """

    def __init__(self, workload: Workload, endpoint: Endpoint) -> None:
        self._workload = workload
        self._endpoint = endpoint
        self._thread = ThreadPoolExecutor(1, "prompts")
        self._coming = deque(np.flatnonzero(workload.turn == 0).tolist()) if _has_long(workload) else deque()
        self._made: OrderedDict[int, asyncio.Future[bytes]] = OrderedDict()
        self._made_tokens = 0
        self._histories: dict[int, list[tuple[str, str]]] = {}

    async def warm_up(self) -> None:
        """The first ones, before the clock runs."""
        self._make_ahead()
        await asyncio.gather(*self._made.values())

    async def get(self, request: Request) -> bytes:
        self._make_ahead()
        made = self._made.pop(request.index, None)
        if made is not None:
            self._made_tokens -= request.prompt_tokens
            return await made
        history = tuple(self._histories.get(request.conversation, ()))
        if request.prompt_tokens <= SHORT_PROMPT_TOKENS:
            return self._endpoint.body(self._workload, request, history)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._endpoint.body, self._workload, request, history)

    @property
    def keeps_text(self) -> bool:
        """The answers' texts are needed, for `said`."""
        return self._endpoint.kind == "chat" and self._workload.conversations < len(self._workload)

    def said(self, request: Request, answer: str) -> None:
        """A turn of a chat was answered. Beyond MAX_HISTORIES conversations at a time, later turns stand alone."""
        if len(self._histories) < MAX_HISTORIES or request.conversation in self._histories:
            turn = (self._endpoint.turn_text(self._workload, request.index), answer)
            self._histories.setdefault(request.conversation, []).append(turn)

    def forget(self, conversation: int) -> None:
        self._histories.pop(conversation, None)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make_ahead(self) -> None:
        loop = asyncio.get_running_loop()
        while self._coming and len(self._made) < AHEAD_REQUESTS and self._made_tokens < AHEAD_TOKENS:
            index = self._coming.popleft()
            request = self._workload[index]
            if request.prompt_tokens > SHORT_PROMPT_TOKENS:
                self._made[index] = loop.run_in_executor(self._thread, self._endpoint.body, self._workload, request, ())
                self._made_tokens += request.prompt_tokens


def _has_long(workload: Workload) -> bool:
    return bool(workload.prompt_tokens.max() > SHORT_PROMPT_TOKENS)
