"""The life of one request on the loop's thread: checks, memory, transfers, events, cleanup. The stepper computes."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from prfaas.common import log
from prfaas.common.config import EngineConfig
from prfaas.common.errors import EngineError, NoRoomError, OutOfMemoryError, RequestError
from prfaas.common.kv_layout import TokenRange
from prfaas.services.engine.api import (
    DecodeDone,
    DecodeEvent,
    DecodeRequest,
    EngineInfo,
    FinishReason,
    PrefillDone,
    PrefillEvent,
    PrefillProgress,
    PrefillRequest,
    TokenEvent,
    rank_s,
)
from prfaas.services.engine.deadline import Deadline
from prfaas.services.engine.event_stream import RequestEvents
from prfaas.services.engine.measured_profile import MeasuredProfile
from prfaas.services.engine.prefill_line import PrefillLine
from prfaas.services.engine.prefix_store import Hold, PrefixStore, Writing
from prfaas.services.engine.token_ids import check_token_ids
from prfaas.services.engine.transformers import kv_memory
from prfaas.services.engine.transformers.decode import DecodeRow
from prfaas.services.engine.transformers.kv_memory import RequestKv, TransferDestination
from prfaas.services.engine.transformers.prefill import Outbox, PrefillJob
from prfaas.services.engine.transformers.prefix_copies import HeldKv, StateStash, keep_all
from prfaas.services.engine.transformers.stepper import Stepper
from prfaas.transport.api import KvDestination, KvReceiver, KvSender, TransferSpec
from prfaas.transport.arena import Arena
from prfaas.transport.waiting import cancelled, finish_despite_cancel

_log = log.get_logger("engine")

# Besides the round trip: OPEN is looked at when a step ends, so be early by about one.
_OPEN_MARGIN_S = 0.3


@dataclass(frozen=True, slots=True)
class Desk:
    """What all requests of an engine share."""

    config: EngineConfig
    info: EngineInfo
    arena: Arena
    stepper: Stepper
    line: PrefillLine
    prefixes: PrefixStore | None
    measured: MeasuredProfile

    def reserve(self, token_ids: Sequence[int], tenant: str) -> Writing | None:
        """Room in the prefix store for these tokens; None: there is none, or nothing new to keep."""
        return None if self.prefixes is None else self.prefixes.reserve(token_ids, tenant)


def _settle(writing: Writing | None, job: PrefillJob | None) -> None:
    """The thread is done with both: others may use what was computed. Idempotent."""
    if writing is None:
        return
    try:
        if job is not None and not job.failed and job.computed_tokens > writing.start and writing.open:
            writing.commit(job.computed_tokens)
    except Exception as error:  # it costs later prompts the reuse, this one nothing
        _log.error("a prefix could not be kept", exc_info=error)
    finally:
        writing.abandon()


class PrefillLife:
    """A prefill for other nodes: in the line → computing (OPEN on its way or answered) → draining → done.

    "No room" sends it back into the line, aside, with nothing held, until the receiver has taken its OPEN.
    """

    def __init__(self, desk: Desk, request: PrefillRequest, senders: Sequence[KvSender]) -> None:
        """Raises RequestError."""
        if not request.prompt_token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        if len(request.prompt_token_ids) > desk.info.max_model_tokens:
            raise _too_long(len(request.prompt_token_ids), desk.info)
        check_token_ids(request.prompt_token_ids, desk.info.vocabulary)
        self._desk = desk
        self._tokens = request.prompt_token_ids
        self._tenant = request.tenant
        self._hold = request.hold
        self._held_tokens = 0 if request.hold is None else request.hold.tokens
        self._writing: Writing | None = None
        self._senders = list(senders)
        self._end = max((sender.spec.tokens.end for sender in senders), default=0)
        self._start = min((sender.spec.tokens.start for sender in senders), default=0)
        self._queued_s = time.monotonic()
        self.rank_s = rank_s(self._queued_s, request.priority, desk.config.priority_s)
        self._kv: RequestKv | None = None
        self._job: PrefillJob | None = None
        self._opening: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._opened = False
        self.aside = False
        self.stream: RequestEvents[PrefillEvent] = RequestEvents(self._close)
        self._deadline = Deadline(request.timeout_s, self._fail)
        self._begin()

    def _begin(self) -> None:
        problem = self._problem()
        if problem is not None:
            self._fail(problem)
            return
        if self._start >= self._end:
            now = time.monotonic()
            self.stream.push(PrefillDone(self._queued_s, now, now, []))
            self.stream.end()
            return
        for sender in self._senders:
            sender.on_failed(self._fail)
        if not self.stream.sealed:
            self._desk.line.join(self)

    def _problem(self) -> EngineError | None:
        desk, n = self._desk, len(self._tokens)
        if self._senders and self._end != n - 1:
            return EngineError(f"the ticket is for tokens up to {self._end}, a prompt of {n} tokens needs {n - 1}")
        if not kv_memory.fits(desk.arena, desk.info.layout, self._end, self._held_tokens):
            return OutOfMemoryError(f"the KV of {n} prompt tokens doesn't fit into this node's arena")
        return None

    # -- in the line --------------------------------------------------------------------------------------------------

    @property
    def remaining_tokens(self) -> int:
        return self._end - self._held_tokens if self._job is None else self._job.remaining_tokens

    @property
    def lead_s(self) -> float:
        return max(sender.rtt_s for sender in self._senders) + _OPEN_MARGIN_S

    def turn_is_near(self) -> None:
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._open())

    def start(self) -> bool:
        desk = self._desk
        self._kv = kv_memory.carve(desk.arena, desk.info.layout, self._end, self._held_tokens)
        if self._kv is None:
            return False
        self.turn_is_near()
        self._writing = desk.reserve(self._tokens[: self._end], self._tenant)
        outbox = Outbox(
            self._kv,
            desk.info.layout,
            self._senders,
            hold=desk.config.send == "after_prefill",
            opened=self._opened,
        )
        self._job = PrefillJob(
            self._tokens,
            self._end,
            self._kv,
            outbox,
            self._stepped,
            self._computed,
            self._queued_s,
            _held(self._hold, self._kv),
            self._writing,
        )
        desk.stepper.add_prefill(self._job)
        return True

    # -- OPEN ---------------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        unopened = list(self._senders)
        try:
            while unopened:
                try:
                    await unopened[0].open(self._deadline.remaining_s)
                    unopened.pop(0)
                except NoRoomError as error:
                    await self._step_aside()
                    await asyncio.sleep(error.retry_after_s)
        except Exception as error:  # the transport's errors, each with its own text, go to the caller as they are
            self._fail(error)
            return
        self._opened = True
        if self._job is not None and self._job.outbox is not None:
            self._job.outbox.opened()
        if self.aside:
            self.aside = False
            self._desk.line.advance()

    async def _step_aside(self) -> None:
        """Let others have the slot and the memory. Nothing has left yet: OPEN comes before the first piece.

        A short prompt may have been computed while OPEN was on its way: it holds no slot any more, and keeps its KV.
        """
        if self._draining is not None:
            return
        self.aside = True
        if self._job is not None:
            job, self._job = self._job, None
            # A close that comes meanwhile cancels this task and frees the memory: the thread must be done with it.
            await finish_despite_cancel(asyncio.ensure_future(self._desk.stepper.remove(job, None)))
            _settle(self._writing, job)
            self._free()
            self._desk.line.rejoin(self)
        else:
            self._desk.line.advance()

    # -- computing ----------------------------------------------------------------------------------------------------

    def _stepped(self, computed_tokens: int, tokens: int, duration_s: float) -> None:
        # The job's own count belongs to the thread, which may be a step further by now.
        self._desk.line.stepped(tokens, duration_s)
        if self._job is not None:
            self.stream.push(PrefillProgress(max(0, computed_tokens - self._start)))

    def _computed(self, error: Exception | None) -> None:
        if self._job is None:  # it has stepped aside meanwhile
            return
        self._desk.line.leave(self)
        _settle(self._writing, self._job)
        if error is not None:
            self._fail(error)
        else:
            self._desk.measured.prefilled(self._end - self._held_tokens, self._job.busy_s)
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        assert self._job is not None
        job = self._job
        try:
            reports = [await sender.done() for sender in self._senders]
        except Exception as error:  # as in _open
            self._fail(error)
            return
        self.stream.push(PrefillDone(job.queued_s, job.started_s, job.ended_s, job.computed_s, reports))
        self.stream.end()

    # -- the end ------------------------------------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        self.stream.fail(error)
        if self._job is not None:
            self._job.abandoned = True
        self._desk.line.leave(self)

    async def _close(self) -> None:
        self._deadline.cancel()
        self._desk.line.leave(self)  # first: while we wait below, the line would give us memory and a slot
        try:
            await cancelled(self._opening, self._draining)
            if self._job is not None:
                await self._desk.stepper.remove(self._job, None)
            _settle(self._writing, self._job)
            for sender in self._senders:
                await sender.aclose()
        finally:
            if self._hold is not None:
                self._hold.release()
        self._free()
        self._desk.line.advance()

    def _free(self) -> None:
        if self._kv is not None:
            self._kv.free()
            self._kv = None


class DecodeLife:
    """A decode: KV from receivers, or a local prefill through the line → joining → running → done."""

    def __init__(self, desk: Desk, request: DecodeRequest, receivers: Sequence[KvReceiver]) -> None:
        """Raises RequestError."""
        self._desk = desk
        self._context = [*request.prompt_token_ids, *request.output_token_ids]
        self._check(request)
        self._request = request
        self._receivers = list(receivers)
        self._hold = request.hold
        self._held_tokens = 0 if request.hold is None else request.hold.tokens
        self._writing: Writing | None = None
        self._said: list[int] = []
        self._kv: RequestKv | None = None
        self._job: PrefillJob | None = None
        self._row: DecodeRow | None = None
        self._shards_missing: list[int] = []
        self._queued_s = time.monotonic()
        self.rank_s = rank_s(self._queued_s, request.priority, desk.config.priority_s)
        self.aside = False
        self.stream: RequestEvents[DecodeEvent] = RequestEvents(self._close)
        self._deadline = Deadline(request.timeout_s, self._fail)
        self._refusal = self._problem()
        self._begin()

    def _begin(self) -> None:
        request = self._request
        if self._refusal is None:
            self._row = self._make_row()
        for receiver in self._receivers:
            receiver.bind(self._reserve, self._layer_arrived, self._transfer_failed)
        if self._refusal is not None:
            self._fail(self._refusal)
        elif len(request.output_token_ids) >= request.max_output_tokens:
            self.stream.push(DecodeDone(FinishReason.LENGTH, len(request.output_token_ids)))
            self.stream.end()
        elif not self._receives:
            self._desk.line.join(self)

    def _check(self, request: DecodeRequest) -> None:
        """Raises RequestError."""
        info = self._desk.info
        if not request.prompt_token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        if request.max_output_tokens < 1:
            raise RequestError("max_tokens must be at least 1", param="max_tokens")
        if len(request.prompt_token_ids) + request.max_output_tokens > info.max_model_tokens:
            raise _too_long(len(request.prompt_token_ids) + request.max_output_tokens, info)
        check_token_ids(self._context, info.vocabulary)

    def _problem(self) -> EngineError | None:
        """What the sender is told as well, at its OPEN."""
        desk, n = self._desk, len(self._context)
        for receiver in self._receivers:
            if receiver.spec.tokens != TokenRange(self._held_tokens, n - 1):
                return EngineError(
                    f"tokens [{receiver.spec.tokens.start}, {receiver.spec.tokens.end}) were announced, this decode "
                    f"holds {self._held_tokens} and needs [{self._held_tokens}, {n - 1})"
                )
        if not kv_memory.fits(desk.arena, desk.info.layout, self._capacity_tokens, self._given_end):
            return OutOfMemoryError(f"the KV of {self._capacity_tokens} tokens doesn't fit into this node's arena")
        return None

    @property
    def _capacity_tokens(self) -> int:
        return len(self._request.prompt_token_ids) + self._request.max_output_tokens

    @property
    def _receives(self) -> bool:
        return bool(self._receivers) and self._held_tokens < len(self._context) - 1

    @property
    def _given_end(self) -> int:
        """The tokens before it come from the hold, or from it and the receivers."""
        return len(self._context) - 1 if self._receives else self._held_tokens

    @property
    def is_decoding(self) -> bool:
        """It holds memory, and its KV is complete or on its way."""
        return self._row is not None and self._row.kv is not None

    @property
    def has_all(self) -> bool:
        """All of its KV is here."""
        return self._row is not None and bool(self._row.present) and self._row.missing_layers == 0

    @property
    def context_tokens(self) -> int:
        return 0 if self._row is None else self._row.position

    def _make_row(self) -> DecodeRow:
        request, desk = self._request, self._desk
        seed = request.sampling.seed
        return DecodeRow(
            token=self._context[-1],
            position=len(self._context) - 1,
            output_tokens=len(request.output_token_ids),
            max_output_tokens=request.max_output_tokens,
            params=request.sampling,
            seed=secrets.randbits(64) if seed is None else seed,
            eos_token_ids=desk.info.eos_token_ids,
            layer_count=len(desk.info.layout.layers),
            emit=self._emit,
            stash=_stash(desk.prefixes),
            waits_for_all=desk.config.join == "when_complete",
            rank_s=self.rank_s,
        )

    # -- KV from other nodes ------------------------------------------------------------------------------------------

    def _reserve(self, spec: TransferSpec) -> KvDestination | None:
        """At OPEN: prompt and max_tokens, once for all shards."""
        if self._refusal is not None or self._row is None:
            raise EngineError(str(self._refusal))
        if self.stream.sealed or not self._receives:
            raise EngineError("the request has ended, or has nothing to receive")
        layout = self._desk.info.layout
        if self._kv is None:
            self._kv = kv_memory.carve(self._desk.arena, layout, self._capacity_tokens, self._given_end)
            if self._kv is None:
                return None
            self._row.held = _held(self._hold, self._kv, with_states=False)
            self._shards_missing = [len(self._receivers)] * len(layout.layers)
            self._row.kv = self._kv
            self._row.expect_all()
            self._desk.stepper.add_row(self._row)
        return TransferDestination(self._kv, layout, spec)

    def _layer_arrived(self, layer: int) -> None:
        self._shards_missing[layer] -= 1
        if self._shards_missing[layer] == 0 and self._row is not None:
            self._row.arrived(layer, time.monotonic())
            self._desk.stepper.wake()

    def _transfer_failed(self, error: Exception) -> None:
        if not self._shards_missing or any(self._shards_missing):  # else all KV is here: only FINISH is lost
            self._fail(error)

    # -- local prefill: in the line -----------------------------------------------------------------------------------

    @property
    def remaining_tokens(self) -> int:
        return len(self._context) - 1 - self._held_tokens if self._job is None else self._job.remaining_tokens

    lead_s = 0.0

    def turn_is_near(self) -> None:
        pass

    def start(self) -> bool:
        desk = self._desk
        self._kv = kv_memory.carve(desk.arena, desk.info.layout, self._capacity_tokens, self._given_end)
        if self._kv is None:
            return False
        end = len(self._context) - 1
        if end == 0:
            self._kv.clear_states()
            self._join_locally()
            asyncio.get_running_loop().call_soon(desk.line.leave, self)
            return True
        self._writing = desk.reserve(self._context[:end], self._request.tenant)
        self._job = PrefillJob(
            self._context,
            end,
            self._kv,
            None,
            lambda _, tokens, duration_s: desk.line.stepped(tokens, duration_s),
            self._computed,
            self._queued_s,
            _held(self._hold, self._kv),
            self._writing,
        )
        desk.stepper.add_prefill(self._job)
        return True

    def _computed(self, error: Exception | None) -> None:
        self._desk.line.leave(self)
        _settle(self._writing, self._job)
        if error is not None:
            self._fail(error)
        elif not self.stream.sealed:
            assert self._job is not None
            self._desk.measured.prefilled(self._job.end - self._held_tokens, self._job.busy_s)
            self._join_locally()

    def _join_locally(self) -> None:
        assert self._row is not None
        self._row.kv = self._kv
        self._row.have_all()
        if self._job is not None:
            self._row.prefill_s = (self._job.queued_s, self._job.started_s, self._job.ended_s)
        self._desk.stepper.add_row(self._row)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _emit(self, event: DecodeEvent | Exception) -> None:
        if isinstance(event, Exception):
            self._fail(event)
            return
        if isinstance(event, TokenEvent):
            self._said.append(event.token_id)
        self.stream.push(event)
        if isinstance(event, DecodeDone):
            self.stream.end()

    def _fail(self, error: Exception) -> None:
        self.stream.fail(error)
        if self._job is not None:
            self._job.abandoned = True
        self._desk.line.leave(self)

    async def _close(self) -> None:
        self._deadline.cancel()
        self._desk.line.leave(self)  # first, as above
        try:
            if self._job is not None or self._row is not None:
                await self._desk.stepper.remove(self._job, self._row)
            _settle(self._writing, self._job)
            for receiver in self._receivers:
                await receiver.aclose()
            if not self.stream.failed:
                await self._keep()
        finally:
            if self._hold is not None:
                self._hold.release()
        if self._kv is not None:
            self._kv.free()
            self._kv = None
        self._desk.line.advance()

    async def _keep(self) -> None:
        """Prompt and output for later prompts, what there is of them. Nobody else touches the KV any more: it is copied
        beside the engine's thread, which would hold up the batch."""
        if self._kv is None or self._row is None or not self._row.kv_tokens:
            return
        stash = self._row.stash
        end = self._row.kv_tokens if stash is None else stash.tokens
        writing = self._desk.reserve([*self._context, *self._said][:end], self._request.tenant)
        if writing is None:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(None, keep_all, writing, self._kv, stash)
            writing.commit()
        except Exception as error:  # it costs later prompts the reuse, this one nothing
            _log.error("a prefix could not be kept", exc_info=error)
        finally:
            writing.abandon()


def _held(hold: Hold | None, kv: RequestKv, *, with_states: bool = True) -> HeldKv | None:
    return HeldKv(hold, kv, with_states) if hold is not None and hold.tokens else None


def _stash(prefixes: PrefixStore | None) -> StateStash | None:
    """For a model whose prefixes need a snapshot."""
    if prefixes is None or not prefixes.sizes.needs_snapshot:
        return None
    return StateStash(prefixes.layout, prefixes.block_tokens)


def _too_long(tokens: int, info: EngineInfo) -> RequestError:
    return RequestError(
        f"{tokens} tokens (prompt and max_tokens) are more than the model's {info.max_model_tokens}",
        param="prompt",
        code="context_length_exceeded",
    )
