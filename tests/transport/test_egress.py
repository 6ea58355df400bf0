"""The cap on egress, between the sessions that share it."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from prfaas.transport.egress import EgressCap

CHUNK_BYTES = 32 << 10


class Greedy:
    """Has always a chunk for each of its lanes, as a session does: a lane asks again as soon as it has sent one."""

    def __init__(self, cap: EgressCap, lanes: int, sent: Counter[Greedy], until: asyncio.Event, total: int) -> None:
        self._cap, self._lanes, self._sent, self._until, self._total = cap, lanes, sent, until, total

    def wake(self) -> None:
        for _ in range(self._lanes):
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        while sum(self._sent.values()) < self._total and self._cap.may_send(self):
            self._cap.sent(CHUNK_BYTES)
            self._sent[self] += 1
        if sum(self._sent.values()) >= self._total:
            self._until.set()


@pytest.mark.parametrize("lanes", [(8, 1), (1, 1), (8, 1, 1), (1, 2, 4, 8)])
async def test_sessions_share_the_cap_whatever_their_lanes(lanes: tuple[int, ...]) -> None:
    """Each waits its turn: one with eight lanes has no more of it than one with one."""
    cap, sent, until = EgressCap(4e6), Counter[Greedy](), asyncio.Event()
    sessions = [Greedy(cap, n, sent, until, 40) for n in lanes]
    for session in sessions:
        session.wake()
    async with asyncio.timeout(10):
        await until.wait()
    burst = 80_000 // CHUNK_BYTES + 1  # what the full bucket gives to whoever asks first
    assert all(abs(sent[session] - 40 / len(lanes)) <= burst + 1 for session in sessions), sent


async def test_one_that_has_left_is_not_waited_for() -> None:
    """A session that ends, or has nothing to send at its turn, holds up nobody."""
    cap, sent, until = EgressCap(4e6), Counter[Greedy](), asyncio.Event()
    silent = Greedy(cap, 0, sent, until, 0)
    gone, greedy = Greedy(cap, 1, sent, until, 0), Greedy(cap, 1, sent, until, 12)
    cap.sent(1 << 20)
    assert not cap.may_send(silent)
    assert not cap.may_send(gone)
    cap.leave(gone)
    greedy.wake()
    async with asyncio.timeout(10):
        await until.wait()
    assert sent == {greedy: 12}
