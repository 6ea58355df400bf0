"""Heartbeats to one router: registration, load, the offset of the clocks; and the router's death when it is silent."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import suppress

import aiohttp
import msgspec
from prfaas.common import log
from prfaas.common.metrics import NodeMetrics
from prfaas.common.prefixcache.events import EventStream
from prfaas.services.messages import Heartbeat, HeartbeatAnswer, to_json
from prfaas.services.web import Signer, signed_post, why_not_connected
from prfaas.transport.api import LinkClock
from prfaas.transport.clock import ClockEstimator
from prfaas.transport.tls import Tls
from yarl import URL

PATH = "nodes/heartbeat"
# 10,000 peers with names and addresses; a router that sends more is broken.
MAX_ANSWER_BYTES = 4 << 20
LEAVING_TIMEOUT_S = 1.0
"""A router that doesn't hear the last heartbeat finds out by itself."""

_log = log.get_logger("node")


class RouterLink:
    """`make_heartbeat(link)` → the next one; `on_answer(link, answer)` gets each answer; `on_dead(router)` is called
    once when the router that answered last has been silent for `dead_s`, and again only after it has answered again.
    `on_moved(url, urls)`: nobody is registered at `url`, which several routers share; each of these is one of them."""

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        signer: Signer,
        metrics: NodeMetrics,
        heartbeat_s: float,
        dead_s: float,
        make_heartbeat: Callable[[RouterLink], Heartbeat],
        on_answer: Callable[[RouterLink, HeartbeatAnswer], None],
        on_dead: Callable[[str], None],
        on_moved: Callable[[str, list[str]], None],
        tls: Tls | None = None,
    ) -> None:
        self.url = URL(url)
        self._session = session
        self._signer = signer
        self._metrics = metrics
        self._heartbeat_s = heartbeat_s
        self._dead_s = dead_s
        self._make_heartbeat = make_heartbeat
        self._on_answer = on_answer
        self._on_dead = on_dead
        self._on_moved = on_moved
        self._tls = tls
        self._estimator = ClockEstimator()
        self._death: asyncio.TimerHandle | None = None
        self._now = asyncio.Event()
        self._trouble = ""
        self.router: str | None = None
        """Its name, from its last answer."""
        self.answering = False
        """It has answered, and not been dead since."""
        self.prefix_events = EventStream(secrets.randbits(48))
        """What the node's prefix pool became, on its way to this router."""
        self.wants_profile = False

    @property
    def clock(self) -> LinkClock | None:
        """router_monotonic − ours; None before the first answer."""
        return self._estimator.estimate(time.monotonic())

    def beat_now(self) -> None:
        self._now.set()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await self._beat(timeout_s=self._dead_s / 2)
                # Not wait_for: until Python 3.12 it loses a cancel that comes together with what it waits for.
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._heartbeat_s):
                        await self._now.wait()
                self._now.clear()
        finally:
            self._stop_clock()

    async def leave(self) -> None:
        """The last heartbeat; the router learns at once that this node is gone, if it can be reached."""
        await self._beat(timeout_s=LEAVING_TIMEOUT_S)
        self._stop_clock()

    def _stop_clock(self) -> None:
        if self._death is not None:
            self._death.cancel()

    async def _beat(self, timeout_s: float) -> None:
        try:
            # A connection that was kept from before the router's restart fails at once; a new one may not.
            try:
                answer = await self._exchange(timeout_s)
            except aiohttp.ServerDisconnectedError:
                answer = await self._exchange(timeout_s)
        except TimeoutError:
            self._failed(f"no answer within {timeout_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            self._failed(why_not_connected(error))
        except (msgspec.DecodeError, ValueError) as error:
            self._failed(f"its answer is not understood: {error}")
        else:
            self._answered(answer)

    async def _exchange(self, timeout_s: float) -> HeartbeatAnswer:
        sent_s = time.monotonic()
        body = to_json(self._make_heartbeat(self))
        async with asyncio.timeout(timeout_s):
            tls = self._tls.client(roles=("router",)) if self._tls is not None else None
            async with await signed_post(self._session, self.url / PATH, body, self._signer, tls=tls) as response:
                data = await _read_bounded(response)
        received_s = time.monotonic()
        if response.status != 200:
            raise ValueError(f"status {response.status} {data[:300].decode('utf-8', 'replace')}")
        answer = msgspec.json.decode(data, type=HeartbeatAnswer)
        # NTP's four instants; the time that the router took is not part of the round trip.
        worked_s = max(0.0, min(answer.answered_s - answer.received_s, received_s - sent_s))
        middle_s = (answer.received_s + answer.answered_s) / 2
        self._estimator.add(sent_s + worked_s / 2, middle_s, received_s - worked_s / 2)
        return answer

    def _answered(self, answer: HeartbeatAnswer) -> None:
        self._metrics.heartbeats.labels("answered").inc()
        if answer.routers:
            self._trouble = ""
            self._on_moved(str(self.url), answer.routers)
            return
        if self.router != answer.router or self._trouble:
            _log.info("registered at router", router=answer.router, url=str(self.url))
        self._trouble = ""
        self.router = answer.router
        self._stop_clock()
        self.answering = True
        self._death = asyncio.get_running_loop().call_later(self._dead_s, self._died, answer.router)
        self._on_answer(self, answer)

    def _died(self, router: str) -> None:
        self.answering = False
        self._on_dead(router)

    def _failed(self, trouble: str) -> None:
        self._metrics.heartbeats.labels("failed").inc()
        if trouble != self._trouble:  # once, not every two seconds
            _log.warning("router does not take heartbeats", url=str(self.url), trouble=trouble)
        self._trouble = trouble


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for part in response.content.iter_any():
        data += part
        if len(data) > MAX_ANSWER_BYTES:
            raise ValueError(f"more than {MAX_ANSWER_BYTES} bytes")
    return bytes(data)
