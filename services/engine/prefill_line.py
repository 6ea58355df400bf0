"""Who waits for a prefill slot and for memory, on the loop's thread."""

from __future__ import annotations

import bisect
from typing import Protocol

from prfaas.services.engine.prefill_queue import turn_in_s

# How fast prefill runs is learnt from its steps; each counts this much.
_SPEED_WEIGHT = 0.3


class Waiting(Protocol):
    """A request in the line."""

    @property
    def rank_s(self) -> float:
        """Who has less is before (services/engine/api.py)."""
        ...

    @property
    def remaining_tokens(self) -> int: ...

    @property
    def aside(self) -> bool:
        """It can't start now, and others go first."""
        ...

    @property
    def lead_s(self) -> float:
        """How long before its turn `turn_is_near` should be called."""
        ...

    def turn_is_near(self) -> None: ...

    def start(self) -> bool:
        """Take memory and begin to compute. False: no memory now."""
        ...


class PrefillLine:
    """By rank, and of one rank first come, first served, into at most `slots` that compute at the same time."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._waiting: list[Waiting] = []
        self._active: list[Waiting] = []
        self._tokens_per_s = 0.0

    @property
    def queued_tokens(self) -> int:
        return sum(item.remaining_tokens for item in [*self._waiting, *self._active])

    @property
    def queued_requests(self) -> int:
        return len(self._waiting) + len(self._active)

    def join(self, item: Waiting) -> None:
        bisect.insort_right(self._waiting, item, key=_rank_s)
        self.advance()

    def rejoin(self, item: Waiting) -> None:
        """It had started and had to give up; it keeps its place before those that came later."""
        self._active.remove(item)
        bisect.insort_left(self._waiting, item, key=_rank_s)
        self.advance()

    def leave(self, item: Waiting) -> None:
        """It has computed everything, or was cancelled. Idempotent."""
        for items in (self._waiting, self._active):
            if item in items:
                items.remove(item)
        self.advance()

    def stepped(self, tokens: int, duration_s: float) -> None:
        """tokens: 0 where a held prefix was copied, which says nothing of the speed."""
        if tokens:
            speed = tokens / max(duration_s, 1e-6)
            self._tokens_per_s += (speed - self._tokens_per_s) * (_SPEED_WEIGHT if self._tokens_per_s else 1.0)
        self._announce()

    def advance(self) -> None:
        """Start whoever can. Called whenever a slot or memory has become free."""
        while len(self._active) < self._slots:
            item = next((item for item in self._waiting if not item.aside), None)
            if item is None or not item.start():
                break
            self._waiting.remove(item)
            self._active.append(item)
        self._announce()

    def _announce(self) -> None:
        remaining = [item.remaining_tokens for item in self._active]
        for place, item in enumerate([item for item in self._waiting if not item.aside]):
            if turn_in_s(remaining, place, self._tokens_per_s) <= item.lead_s:
                item.turn_is_near()


def _rank_s(item: Waiting) -> float:
    return item.rank_s
