"""One decode node: continuous batching up to a bound, without an event a token. Pure.

The node counts the steps that it has done. A request that joins when the count is s, with n output tokens, is done at
s + n; between two changes of the batch the count rises by one each `step_s`. A request joins beside the running batch
at once and its first token comes one step later (our engine's slipstream; an engine that joins at step boundaries only
adds half a step on the average).
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from prfaas.common.perfmodel.profiles import NodeProfile

_EPSILON_STEPS = 1e-6


@dataclass(slots=True)
class DecodeNode:
    profile: NodeProfile
    steps: float = 0.0
    _at_s: float = 0.0
    step_s: float = 0.0
    running: list[tuple[float, int]] = field(default_factory=list)
    """A heap of (count at which it is done, request)."""
    waiting: deque[tuple[int, int, int]] = field(default_factory=deque)
    """(request, output tokens, context tokens), in order of arrival."""
    context_tokens: int = 0
    """Of the running requests, with half of their outputs."""
    _contexts: dict[int, int] = field(default_factory=dict)

    def advance(self, now_s: float) -> None:
        if self.running:
            self.steps += (now_s - self._at_s) / self.step_s
        self._at_s = now_s

    def offer(self, request: int, output_tokens: int, context_tokens: int, now_s: float) -> bool:
        """True: it joined. False: it waits for a place."""
        if len(self.running) >= self.profile.max_batch:
            self.waiting.append((request, output_tokens, context_tokens))
            return False
        self.advance(now_s)
        self._join(request, output_tokens, context_tokens)
        return True

    def _join(self, request: int, output_tokens: int, context_tokens: int) -> None:
        heapq.heappush(self.running, (self.steps + output_tokens, request))
        context = context_tokens + output_tokens // 2
        self._contexts[request] = context
        self.context_tokens += context
        self._time_step()

    def _time_step(self) -> None:
        batch = len(self.running)
        if batch:
            self.step_s = self.profile.step_s(batch, self.context_tokens / batch)

    def next_done_s(self) -> float:
        """When the next request is done if nothing changes; inf when none runs."""
        if not self.running:
            return float("inf")
        return self._at_s + max(0.0, self.running[0][0] - self.steps) * self.step_s

    def done(self, now_s: float) -> tuple[list[int], list[int]]:
        """(requests that are done, requests that joined in their places)."""
        self.advance(now_s)
        ended: list[int] = []
        while self.running and self.running[0][0] <= self.steps + _EPSILON_STEPS:
            request = heapq.heappop(self.running)[1]
            self.context_tokens -= self._contexts.pop(request)
            ended.append(request)
        joined: list[int] = []
        while self.waiting and len(self.running) < self.profile.max_batch:
            request, output_tokens, context_tokens = self.waiting.popleft()
            self._join(request, output_tokens, context_tokens)
            joined.append(request)
        if ended and not joined:
            self._time_step()
        return ended, joined

    def lose(self, now_s: float) -> list[tuple[int, float]]:
        """The node is gone: (request, steps that it still needed); 0 joined yet means all of them, as −1."""
        self.advance(now_s)
        lost = [(request, end - self.steps) for end, request in sorted(self.running)]
        lost += [(request, -1.0) for request, _, _ in self.waiting]
        self.running.clear()
        self.waiting.clear()
        self._contexts.clear()
        self.context_tokens = 0
        return lost
