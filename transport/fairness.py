"""Whose turn it is: byte-deficit round robin between transfers. Pure.

Each round a transfer may send `quantum` bytes more than it has used up, so that transfers with small chunks get as many
bytes as those with large ones, and a transfer of a megabyte that starts beside one of a gigabyte waits for one quantum
of it, not for all. One whose slack has run out gets `BOOST` quanta a round: it is preferred, and starves nobody.
[M. Shreedhar, G. Varghese: Efficient Fair Queuing using Deficit Round Robin, 1995]
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

QUANTUM_BYTES = 64 << 10
"""Less than a chunk: a turn that let a whole chunk of each pass would be as unfair as chunks are unequal."""
BOOST = 4


class Flow(Protocol):
    @property
    def next_bytes(self) -> int:
        """Of the chunk that it would send next; 0: it has none now."""
        ...

    @property
    def urgent(self) -> bool:
        """Its slack has run out."""
        ...


F = TypeVar("F", bound=Flow)


class DeficitRoundRobin(Generic[F]):
    """Holds the flows that may have something to send. One that has nothing leaves at its turn; `activate` brings it
    back, so the cost of a turn does not grow with the number of idle flows."""

    def __init__(self, quantum_bytes: int = QUANTUM_BYTES) -> None:
        self._quantum = quantum_bytes
        self._turns: deque[F] = deque()
        self._deficit: dict[F, int] = {}

    def activate(self, flow: F) -> None:
        """It may have something to send. Idempotent."""
        if flow not in self._deficit:
            # Its first turn comes with a quantum, as each later one, or it would wait for two rounds.
            self._deficit[flow] = self._share(flow)
            self._turns.append(flow)

    def remove(self, flow: F) -> None:
        """Idempotent."""
        if self._deficit.pop(flow, None) is not None:
            self._turns.remove(flow)

    def next(self) -> F | None:
        """Whose chunk (of `next_bytes`) leaves now; it is accounted for. None: nobody has one."""
        turns, deficit = self._turns, self._deficit
        while turns:
            flow = turns[0]
            size = flow.next_bytes
            if size == 0:
                turns.popleft()
                del deficit[flow]
            elif deficit[flow] >= size or len(turns) == 1:
                deficit[flow] = max(0, deficit[flow] - size)
                return flow
            else:
                deficit[flow] += self._share(flow)
                turns.rotate(-1)
        return None

    def _share(self, flow: F) -> int:
        return self._quantum * (BOOST if flow.urgent else 1)
