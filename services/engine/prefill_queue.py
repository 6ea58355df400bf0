"""In which order prefills get their steps: pure.

Turns alternate between the prefill that has the least left and the next one in rotation. A prompt of one step waits
for one other step at most, however long the others are; a long prompt gets at least its share of every other turn,
however many short ones come.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class TurnOrder(Generic[T]):
    """Whose step is next, among the prefills that are active."""

    def __init__(self, remaining_tokens: Callable[[T], int]) -> None:
        self._remaining_tokens = remaining_tokens
        self._rotation: list[T] = []
        self._shortest_next = True

    def __len__(self) -> int:
        return len(self._rotation)

    def __iter__(self) -> Iterator[T]:
        return iter(self._rotation)

    def add(self, item: T) -> None:
        self._rotation.append(item)

    def discard(self, item: T) -> None:
        if item in self._rotation:
            self._rotation.remove(item)

    def next(self) -> T | None:
        """The item whose turn it is; it stays until `discard`."""
        if not self._rotation:
            return None
        if self._shortest_next:
            item = min(self._rotation, key=self._remaining_tokens)
        else:
            item = self._rotation[0]
            self._rotation.append(self._rotation.pop(0))
        self._shortest_next = not self._shortest_next
        return item


def turn_in_s(active_remaining_tokens: Sequence[int], place: int, tokens_per_s: float) -> float:
    """When the waiting prefill at `place` (0 = first) can start at the earliest: when place + 1 of the active ones have
    ended, all of them going on at `tokens_per_s` together. Infinite while that can't be told."""
    if place >= len(active_remaining_tokens) or tokens_per_s <= 0:
        return float("inf")
    return sum(sorted(active_remaining_tokens)[: place + 1]) / tokens_per_s
