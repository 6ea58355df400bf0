"""Keeping a session's lanes open from the side that dials: dial, HELLO, wait until the lane dies, back off, again."""

from __future__ import annotations

import asyncio
import random
import weakref
from collections.abc import Callable, Sequence

from prfaas.common.config import TransportConfig
from prfaas.common.errors import PeerRefusedError, ProtocolError
from prfaas.common.identity import PeerIdentity
from prfaas.common.log import get_logger
from prfaas.transport.api import KvAddress
from prfaas.transport.channel import Channel, Outgoing
from prfaas.transport.connection import Control, Event
from prfaas.transport.frames import Error, FrameHeader, Hello, SignedHello
from prfaas.transport.routes import SessionRoutes
from prfaas.transport.sending import TransferSender
from prfaas.transport.session import Session

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0
STEADY_S = 2.0
"""A lane that lived so long was a good one: its redial begins with the shortest pause again. A peer that greets and
drops us meets longer and longer ones."""

FIRST_LANES = 4
"""Until more is known of the link."""
MIN_LANES = 2
"""With one lane its loss would stop the transfers."""
LANES_S = 3.0
"""As long as the window in which the link says what holds its lanes back: a change is judged by what it did."""

log = get_logger("transport")

MakeHello = Callable[[Session, int, bool], tuple[SignedHello, str]]
"""And the nonce in it, which the answer must sign."""
CheckAnswer = Callable[[SignedHello, str, Session, PeerIdentity | None], Hello]
"""Of the answer, our nonce, the peer that we meant, and whom its certificate names; raises PeerRefusedError."""


class Greeting:
    """The owner of a channel that we dialled, until the answer to HELLO is here."""

    def __init__(self, accept: Callable[[Channel, SignedHello], None]) -> None:
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._accept = accept

    def lane_event(self, channel: Channel, event: Event) -> None:
        if not isinstance(event, Control) or self.accepted.done():
            return
        if isinstance(event.body, SignedHello):
            # At once, not when the task wakes: the peer's next frame may be in the same read.
            try:
                self._accept(channel, event.body)
            except PeerRefusedError as error:
                self.accepted.set_exception(error)
                channel.close(str(error), "hello_refused")  # the dialling task logs it, once and not at each attempt
                return
            self.accepted.set_result(None)
        elif isinstance(event.body, Error):
            self.accepted.set_exception(RefusedByPeerError(event.body.code, event.body.detail))

    def destination(self, channel: Channel, chunk: FrameHeader) -> memoryview | None:
        return None

    def next_outgoing(self, channel: Channel) -> Sequence[Outgoing]:
        return ()

    def chunks_sent(self, chunks: Sequence[Outgoing]) -> None:
        pass

    def lane_lost(self, channel: Channel, reason: str) -> None:
        if not self.accepted.done():
            self.accepted.set_exception(ConnectionError(reason))
            self.accepted.exception()  # the dialling task may have been cancelled


class RefusedByPeerError(PeerRefusedError):
    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail or code)
        self.code = code


class Dialler:
    """One task a lane, all to one address: what answers elsewhere is another process, which needs its own session."""

    def __init__(
        self,
        session: Session,
        address: KvAddress,
        routes: SessionRoutes,
        config: TransportConfig,
        hello: MakeHello,
        check: CheckAnswer,
        new_session_id: Callable[[], str],
        on_idle: Callable[[Dialler], None],
        now: Callable[[], float],
    ) -> None:
        self.session = session
        self.address = address
        self.senders: weakref.WeakSet[TransferSender] = weakref.WeakSet()
        """All that were made for this session; the session itself knows only those that have sent OPEN."""
        self._routes = routes
        self._timeout_s = config.open_timeout_s
        self._idle_s = config.idle_s
        self._hello = hello
        self._check = check
        self._new_session_id = new_session_id
        self._on_idle = on_idle
        self._now = now
        self._random = random.Random()  # noqa: S311 - jitter
        self._tasks: list[asyncio.Task[None]] = []
        self._low = config.lanes or min(MIN_LANES, config.max_lanes)
        self._high = config.lanes or config.max_lanes
        self._set_lanes(config.lanes or min(FIRST_LANES, config.max_lanes))
        self._loop = asyncio.get_running_loop()
        self._wanted_s = now()
        self._was_in_use = False
        self._idle_timer = self._loop.call_later(self._idle_s, self._look_if_idle)
        self._lanes_timer = self._loop.call_later(LANES_S, self._look_at_lanes)

    def _set_lanes(self, lanes: int) -> None:
        """More are dialled at once; those too many are closed once the peer has what is on them."""
        while len(self._tasks) < lanes:
            self._tasks.append(asyncio.create_task(self._keep(len(self._tasks))))
        while len(self._tasks) > lanes:
            self._tasks.pop().cancel()
            self.session.retire_lane(len(self._tasks))

    def _look_at_lanes(self) -> None:
        self._lanes_timer = self._loop.call_later(LANES_S, self._look_at_lanes)
        if self._low == self._high or self.session.idle:
            return
        wanted = self.session.wanted_lanes(len(self._tasks), self._low, self._high)
        if wanted != len(self._tasks):
            log.info("kv lanes follow the link", peer=self.session.peer, lanes=wanted, before=len(self._tasks))
            self._set_lanes(wanted)

    @property
    def in_use(self) -> bool:
        """By a transfer, or by a sender that was made and has not opened its transfer yet."""
        return not self.session.idle or any(sender.waits_to_open for sender in self.senders)

    def wanted(self) -> None:
        """A router lists the peer, or a ticket names it: the session is kept for `idle_s` from now."""
        self._wanted_s = self._now()

    def _look_if_idle(self) -> None:
        """`on_idle` is called once, between one and two `idle_s` after the last use."""
        now = self._now()
        in_use = self.in_use
        if in_use or self._was_in_use:  # until some time since the last look, if it isn't any more
            self._wanted_s = now
        self._was_in_use = in_use
        left_s = max(self._wanted_s, self.session.used_s) + self._idle_s - now
        if left_s > 0:
            self._idle_timer = self._loop.call_later(left_s, self._look_if_idle)
        else:
            self._on_idle(self)

    async def aclose(self) -> None:
        self._idle_timer.cancel()
        self._lanes_timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def session_ended(self) -> None:
        """What the peer still holds of the session is void, so the next lanes begin a new one."""
        self.session.id = self._new_session_id()
        self._routes.forget()

    # -- Link

    @property
    def peer(self) -> str:
        return self.session.peer

    async def usable(self) -> Session:
        await self.session.wait_usable()
        return self.session

    async def _keep(self, index: int) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            problem: Exception | None = None
            await self._routes.ready(index)
            try:
                async with asyncio.timeout(self._timeout_s):
                    channel = await self._dial(index)
                opened_s = self._now()
                await asyncio.shield(channel.closed)
                if self._now() - opened_s >= STEADY_S:
                    backoff_s = FIRST_BACKOFF_S
            except PeerRefusedError as error:
                problem = error
                of_hello = not isinstance(error, RefusedByPeerError) or error.code == "hello_refused"
                if of_hello and not self.session.usable:  # beside lanes that are up it says nothing of the session
                    self.session.refused(error)
            except Exception as error:  # also what a malformed host or port makes the resolver raise
                problem = error
            if problem is not None and backoff_s == FIRST_BACKOFF_S:
                address = self.address
                log.warning(
                    "kv lane could not be opened; trying again",
                    peer=self.session.peer,
                    address=str(address),
                    lane=index,
                    reason=str(problem) or type(problem).__name__,
                )
            await asyncio.sleep(backoff_s * self._random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _dial(self, index: int) -> Channel:
        session, session_id = self.session, self.session.id

        def accept(channel: Channel, signed_answer: SignedHello) -> None:
            if session_id != session.id:  # what it says is of the old session
                raise ProtocolError("the session ended while this lane was opened")
            answer = self._check(signed_answer, nonce, session, channel.peer_identity)
            session.add_channel(channel, index)
            self._routes.answered(index, answer.features)

        greeting = Greeting(accept)
        channel = Channel(greeting, self._now, session.peer)
        channel.index = index
        address = self.address
        hello, nonce = self._hello(session, index, session.established)
        try:
            await self._routes.dial(index, address, channel)
            channel.send(hello)
            await greeting.accepted
        except BaseException as error:
            channel.abort("HELLO failed")
            if session.usable:
                self._routes.failed(index, error)
            if isinstance(error, RefusedByPeerError) and error.code == "unknown_session" and session.id == session_id:
                session.close("the peer has restarted")  # unless that has been noticed, and a new session begun
            raise
        return channel
