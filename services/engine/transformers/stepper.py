"""The one thread that computes. It takes turns: a pass of the decode batch, a step of one prefill, and again.

The loop talks to it by commands, carried out between two layers, and by `wake` (something has arrived); it talks to the
loop by `call_soon_threadsafe`. With nothing to do it sleeps.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
from prfaas.common import log
from prfaas.common.config import EngineConfig
from prfaas.common.errors import EngineError
from prfaas.services.engine.prefill_queue import TurnOrder
from prfaas.services.engine.transformers.decode import DecodeRow, SlipstreamBatch, Told
from prfaas.services.engine.transformers.families import LayerwiseModel
from prfaas.services.engine.transformers.prefill import PrefillJob, run_step

_log = log.get_logger("engine")


class Stepper:
    """Methods are called on the loop's thread."""

    def __init__(
        self,
        model: LayerwiseModel,
        config: EngineConfig,
        loop: asyncio.AbstractEventLoop,
        on_death: Callable[[Exception], None],
        on_pass: Callable[[int, float, float], None] = lambda rows, context_tokens, seconds: None,
    ) -> None:
        """on_death: called on the loop's thread when the thread has ended by a mistake of ours. on_pass: after each
        pass, there as well, with its rows, their mean context and its seconds."""
        self._model = model
        self._on_death = on_death
        self._on_pass = on_pass
        self._config = config
        self._loop = loop
        self._batch = SlipstreamBatch(model, config.max_batch)
        self._prefills: TurnOrder[PrefillJob] = TurnOrder(lambda job: job.remaining_tokens)
        self._inbox: deque[Callable[[], None]] = deque()
        self._awake = threading.Condition()
        self._stopping = False
        self._dead = False
        """The thread's last words have been heard; it may still be on its way out."""
        self._woken = False
        self._thread = threading.Thread(target=self._run, name="prfaas-engine", daemon=True)
        self._thread.start()

    # -- the loop's side ----------------------------------------------------------------------------------------------

    def add_prefill(self, job: PrefillJob) -> None:
        self._submit(lambda: self._prefills.add(job))

    def add_row(self, row: DecodeRow) -> None:
        self._submit(lambda: self._batch.join(row))

    async def remove(self, job: PrefillJob | None, row: DecodeRow | None) -> None:
        """When it returns the thread doesn't know them any more, their KV is nobody's but the caller's, and none of
        their callbacks is on its way. That takes a layer's time, whatever the thread computes; a pass or a step of
        others goes on. If the caller is cancelled meanwhile, they are removed all the same, a layer's time later."""
        gone = self._loop.create_future()

        def drop() -> None:
            if job is not None:
                self._prefills.discard(job)
            if row is not None:
                self._batch.discard(row)
            self._post(settle)

        def settle() -> None:
            if not gone.done():
                gone.set_result(None)

        if job is not None:
            job.abandoned = True
        if self._dead or not self._thread.is_alive():
            return
        self._submit(drop)
        await gone

    def wake(self) -> None:
        """A layer has arrived."""
        with self._awake:
            self._woken = True
            self._awake.notify()

    def _submit(self, command: Callable[[], None]) -> None:
        with self._awake:
            self._inbox.append(command)
            self._awake.notify()

    async def stop(self) -> None:
        """All requests have been removed."""
        with self._awake:
            self._stopping = True
            self._awake.notify()
        await self._loop.run_in_executor(None, self._thread.join)

    # -- the thread's side --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._config.threads)
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    if self._batch.can_run:
                        self._decode_pass()
                    if self._batch.has_to_copy:
                        self._tell_each(self._batch.copy_held())
                    if (job := self._prefills.next()) is not None:
                        self._prefill_step(job)
        except Exception as error:  # a bug between two steps: nobody may wait for this thread any more
            _log.error("the engine's thread has died", exc_info=error)
            death = error
            self._post(lambda: self._died(death))

    def _died(self, error: Exception) -> None:
        """On the loop's thread. Whoever waits for a command to be carried out gets it carried out here."""
        self._dead = True
        while self._inbox:
            self._inbox.popleft()()
        self._on_death(error)

    def _wait_for_work(self) -> bool:
        """Carry out what the loop has submitted; sleep until there is something to compute. False: stop."""
        while True:
            with self._awake:
                while not (self._inbox or self._stopping or self._woken or self._has_work):
                    self._awake.wait()
                if self._stopping:
                    return False
                self._woken = False
            self._carry_out()
            if self._has_work:
                return True

    def _carry_out(self) -> None:
        """What the loop has submitted. Between two layers nearly always nothing: that look takes no lock, and a deque
        needs none for its one reader. An exception here is a bug of ours, and the thread's death."""
        while self._inbox:
            self._inbox.popleft()()

    @property
    def _has_work(self) -> bool:
        return len(self._prefills) > 0 or self._batch.can_run or self._batch.has_to_copy

    def _post(self, callback: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(callback)

    def _decode_pass(self) -> None:
        started_s = time.monotonic()
        running = list(self._batch.running)  # all the way through, if nobody leaves
        context_tokens = sum(row.position for row in running) / max(1, len(running))
        self._tell_each(self._batch.run_pass())
        if running:
            self._post(partial(self._on_pass, len(running), context_tokens, time.monotonic() - started_s))

    def _tell_each(self, steps: Iterator[Told]) -> None:
        for told in steps:
            if told:
                self._post(partial(_emit, told))
            self._carry_out()

    def _prefill_step(self, job: PrefillJob) -> None:
        busy = self._batch.is_busy
        step_tokens = self._config.local_prefill_step_tokens if busy else self._config.prefill_step_tokens
        failure: EngineError | None = None
        before, started_s = job.computed_tokens, time.monotonic()
        for ended_by in _failing(run_step(self._model, job, min(step_tokens, self._config.prefill_step_tokens))):
            failure = ended_by
            self._carry_out()
        if job.should_stop:
            self._prefills.discard(job)
            return
        duration_s = time.monotonic() - started_s
        job.busy_s += duration_s
        job.failed = failure is not None
        if failure is None and (after := job.computed_tokens) > before:
            copied = job.held is not None and before < job.held.tokens
            self._post(lambda: job.on_step(after, 0 if copied else after - before, duration_s))
        if failure is not None or job.is_done:
            self._prefills.discard(job)
            self._post(lambda: job.on_end(failure))


def _failing(layers: Iterator[None]) -> Iterator[EngineError | None]:
    """`layers`, and behind them the failure that ended them, if one did. Unlike a `try` around the loop, this leaves
    alone what the loop's body raises."""
    try:
        yield from layers
    except Exception as error:  # whatever torch raises: this request has failed, the engine goes on
        yield EngineError(f"a prefill step failed: {error}")


def _emit(told: Told) -> None:
    for row, event in told:
        row.emit(event)
