"""Sends a workload when it is due and collects the records."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from prfaas.loadgen.client.bodies import Bodies
from prfaas.loadgen.client.exchange import Exchange
from prfaas.loadgen.client.timelines import Timelines
from prfaas.loadgen.records import INTERRUPTED, OK, RecordsBuilder, RequestRecord
from prfaas.loadgen.workloads.schedule import Due, Schedule
from prfaas.loadgen.workloads.workload import Request, Workload

LAST_TIMELINES_S = 3.0
"""After the last answer."""


class Clock:
    """Seconds since `start`. Not the loop's clock: uvloop's goes in whole milliseconds."""

    def start(self) -> None:
        self._began_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._began_s


class Runner:
    """One run. Set `on_end` to hear of each request when its answer has ended; its record may still learn more."""

    def __init__(
        self,
        workload: Workload,
        clock: Clock,
        exchange: Exchange,
        bodies: Bodies,
        timelines: Timelines | None = None,
    ) -> None:
        self._workload = workload
        self._clock = clock
        self._exchange = exchange
        self._bodies = bodies
        self._timelines = timelines
        self.on_end: Callable[[RequestRecord], None] = lambda record: None
        self._schedule = Schedule(workload)
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking: set[asyncio.Task[None]] = set()
        self._last_end_s = 0.0
        self.stopped = False
        self._failure: BaseException | None = None
        self.builder = RecordsBuilder()
        self.given_up = 0
        """Later turns whose conversation had failed, or whose time was up."""

    @property
    def in_flight(self) -> int:
        return self._schedule.in_flight

    @property
    def unsent(self) -> int:
        """Never sent: those given up, and when the run was stopped, all that was left."""
        return self._schedule.unsent

    def stop(self) -> None:
        """Send nothing more and break off what is in flight; `run` then returns soon."""
        self.stopped = True
        self._news.set()

    async def run(self) -> None:
        """Until every request has its record, or `stop`. The clock starts here."""
        loop = asyncio.get_running_loop()
        await self._bodies.warm_up()
        self._clock.start()
        try:
            while not self.stopped and not self._schedule.finished:
                for due in self._schedule.due(self._clock.now_s()):
                    self._send(due)
                next_s = self._schedule.next_s()
                wait_s = max(next_s - self._clock.now_s(), 0.0)
                timer = None if next_s == math.inf else loop.call_later(wait_s, self._news.set)
                await self._news.wait()
                self._news.clear()
                if timer is not None:
                    timer.cancel()
        finally:
            await _end(self._tasks)
            if self._asking and not self.stopped:
                await asyncio.wait(self._asking, timeout=LAST_TIMELINES_S)
            await _end(self._asking)
            self._bodies.close()
        if self._failure is not None:
            raise self._failure

    def _send(self, due: Due) -> None:
        request = self._workload[due.index]
        record = RequestRecord(due.index, due.scheduled_s, INTERRUPTED, request.prompt_tokens, 0, turn=request.turn)
        cap = self._workload.max_concurrency
        waited = cap is not None and self._schedule.in_flight >= cap
        possible_s = max(due.scheduled_s, self._last_end_s) if waited else due.scheduled_s
        task = asyncio.create_task(self._one(request, record, possible_s))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # An exchange raises nothing; a fault of our own must not look like a request that never ends.
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error
            self.stop()

    async def _one(self, request: Request, record: RequestRecord, possible_s: float) -> None:
        record.status = OK
        try:
            body = await self._bodies.get(request)
            record.client_late_s = max(self._clock.now_s() - possible_s, 0.0)
            text = await self._exchange.ask(body, record, keep_text=self._bodies.keeps_text)
        except asyncio.CancelledError:
            record.status, record.error = INTERRUPTED, ""
            raise
        finally:
            self._ended(request, record)
        if record.status == OK and self._bodies.keeps_text and self._more_turns(request):
            self._bodies.said(request, text)
        self._schedule_next(request, record)

    def _ended(self, request: Request, record: RequestRecord) -> None:
        if record.end_s is None:
            record.end_s = self._clock.now_s()
        self.on_end(record)
        if self._timelines is not None and record.reason and record.request_id and not self.stopped:
            task = asyncio.create_task(self._learn(record, self._timelines))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        else:
            self.builder.add(record)

    async def _learn(self, record: RequestRecord, timelines: Timelines) -> None:
        try:
            await timelines.ask(record)
        finally:
            self.builder.add(record)

    def _schedule_next(self, request: Request, record: RequestRecord) -> None:
        self._last_end_s = self._clock.now_s()
        go_on = record.status == OK
        self.given_up += self._schedule.ended(request.index, self._last_end_s, go_on=go_on)
        if not go_on or not self._more_turns(request):
            self._bodies.forget(request.conversation)
        self._news.set()

    def _more_turns(self, request: Request) -> bool:
        following = request.index + 1
        return following < len(self._workload) and bool(self._workload.turn[following] > 0)


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    """Cancel them and wait."""
    left = list(tasks)
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left)
