"""FETCH: a node asks another for the KV of a token range of a prefix that the other holds.

    asking node    receiver(spec) → ticket       FETCH(ticket, prefix hash, range)  -->   holding node
                                                 <--  FETCHED: nothing, or why not
                                                 <--  OPEN(ticket), CHUNK …, FINISH       as for any transfer

The ticket is the asking node's own permission to send to it, so lanes, limits, credit and errors are those of every
transfer; FETCH only says that it is wanted.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from prfaas.common.errors import PeerRefusedError
from prfaas.transport.api import KvSender, TransferSpec
from prfaas.transport.channel import Channel
from prfaas.transport.frames import FROM_RECEIVER, ControlBody, Fetch, Fetched

MAX_PREFIX_HASH_BYTES = 64
KEPT_ANSWERS = 1024


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """What the asking node wants: `spec.tokens` of the prefix whose tokens up to `spec.tokens.end` have this hash."""

    spec: TransferSpec
    prefix_hash: bytes
    node: str
    remaining_s: float | None


ServeFetch = Callable[[FetchRequest, KvSender], str | None]
"""Called on the event loop. None: the holder has taken the sender, and will open, put, finish and close it. A reason:
it doesn't hold that KV (or will not send it), and the sender is dropped."""


class Asked(NamedTuple):
    body: Fetch
    answer: asyncio.Future[Fetched]


class Fetching:
    """One session's questions, ours and the peer's. `send(body, number, flags)`: on any lane that is up."""

    def __init__(
        self,
        peer: str,
        max_open: int,
        serve: Callable[[Fetch], Fetched],
        send: Callable[[ControlBody, int, int], None],
    ) -> None:
        self._peer = peer
        self._max_open = max_open
        self._serve = serve
        self._send = send
        self._last_number = 0
        self._asked: dict[int, Asked] = {}
        self._answers: OrderedDict[int, Fetched] = OrderedDict()

    @property
    def waiting(self) -> bool:
        return bool(self._asked)

    async def ask(self, body: Fetch) -> None:
        """Returns when the peer has agreed: OPEN follows. Raises PeerRefusedError with its reason, LaneLostError."""
        if len(self._asked) >= self._max_open:
            raise PeerRefusedError(f"{len(self._asked)} fetches from {self._peer} are open; transport.max_transfers")
        self._last_number += 1
        number = self._last_number
        asked = Asked(body, asyncio.get_running_loop().create_future())
        self._asked[number] = asked
        try:
            self._send(body, number, 0)
            answer = await asked.answer
        finally:
            del self._asked[number]
        if answer.refused:
            raise PeerRefusedError(f"{self._peer} does not send this prefix: {answer.refused}")

    def repeat(self) -> None:
        """A lane was lost, and perhaps a question or its answer with it: ask again. The peer knows the number."""
        for number, asked in self._asked.items():
            self._send(asked.body, number, 0)

    def fail(self, error: Exception) -> None:
        """The session has ended, and with it what the peer knows."""
        for asked in self._asked.values():
            if not asked.answer.done():
                asked.answer.set_exception(error)
        self._answers.clear()

    def asked_by_peer(self, channel: Channel, number: int, body: Fetch) -> None:
        answer = self._answers.get(number)
        if answer is None:
            answer = self._answers[number] = self._serve(body)
            if len(self._answers) > KEPT_ANSWERS:
                self._answers.popitem(last=False)
        channel.send(answer, number, FROM_RECEIVER)

    def answered(self, number: int, body: Fetched) -> None:
        asked = self._asked.get(number)
        if asked is not None and not asked.answer.done():
            asked.answer.set_result(body)
