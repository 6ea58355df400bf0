"""A prefill by vLLM: in the line → vLLM computes, layers leave → draining → done.

vLLM is given the prompt without its last token (the n−1 rule: a recurrent state is then the one after n−1 tokens) and
samples one token, which nobody reads. At most `engine.max_prefills` are with vLLM at a time; who waits, waits here,
where a cancel costs nothing and priorities hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

from prfaas.common.errors import EngineError, NoRoomError, OutOfMemoryError, RequestError
from prfaas.common.kv_layout import TokenRange
from prfaas.services.engine.api import PrefillDone, PrefillEvent, PrefillProgress, PrefillRequest, rank_s
from prfaas.services.engine.deadline import Deadline
from prfaas.services.engine.event_stream import RequestEvents
from prfaas.services.engine.token_ids import check_token_ids
from prfaas.services.engine.vllm.control import Saved
from prfaas.services.vllm.desk import Desk
from prfaas.services.vllm.workers import SharedTransfer
from prfaas.transport.api import KvPiece, KvSender
from prfaas.transport.waiting import cancelled

OPEN_MARGIN_S = 0.05
"""Besides the round trip: how early OPEN leaves before a request's turn."""
STATES_WAIT_S = 10.0
"""After vLLM has answered, for the workers' last word: it is on its way already."""


class PrefillLife:
    """`prefill_line.Waiting`. Raises RequestError when it is made."""

    aside = False

    def __init__(self, desk: Desk, request: PrefillRequest, senders: Sequence[KvSender]) -> None:
        if not request.prompt_token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        desk.check_length(len(request.prompt_token_ids))
        check_token_ids(request.prompt_token_ids, desk.info.vocabulary)
        self._desk = desk
        self._request = request
        self._senders = list(senders)
        self._tokens = senders[0].spec.tokens if senders else TokenRange(0, 0)
        self._computed_tokens = 0
        self._queued_s = time.monotonic()
        self._started_s = 0.0
        self.rank_s = rank_s(self._queued_s, request.priority, desk.config.priority_s)
        self._computed_s: dict[int, float] = {}
        self._transfer: SharedTransfer | None = None
        self._opening: asyncio.Task[None] | None = None
        self._computing: asyncio.Task[None] | None = None
        self.stream: RequestEvents[PrefillEvent] = RequestEvents(self._close)
        self._deadline = Deadline(request.timeout_s, self._fail)
        self._begin()

    def _begin(self) -> None:
        problem = self._problem()
        if problem is not None:
            self._fail(problem)
        elif self._tokens.tokens == 0:
            self.stream.push(PrefillDone(self._queued_s, self._queued_s, time.monotonic(), []))
            self.stream.end()
        else:
            for sender in self._senders:
                sender.on_failed(self._fail)
            if not self.stream.sealed:
                self._desk.line.join(self)

    def _problem(self) -> EngineError | None:
        n = len(self._request.prompt_token_ids)
        adapter = self._request.adapter
        if adapter and adapter not in self._desk.adapters:
            return EngineError(f"the vLLM of this node does not serve the adapter {adapter[:200]!r}")
        if len(self._senders) > 1:
            return EngineError("a prefill by vLLM has one transfer")
        if self._tokens.tokens and self._tokens.end != n - 1:
            return EngineError(f"the ticket is for tokens up to {self._tokens.end}, a prompt of {n} needs {n - 1}")
        if not self._desk.workers.fits(self._tokens):
            return OutOfMemoryError(f"the KV of {n} prompt tokens doesn't fit into engine.arena_bytes of this node")
        return None

    # -- in the line --------------------------------------------------------------------------------------------------

    @property
    def remaining_tokens(self) -> int:
        return self._tokens.end - self._computed_tokens

    @property
    def lead_s(self) -> float:
        return max((sender.rtt_s for sender in self._senders), default=0.0) + OPEN_MARGIN_S

    def turn_is_near(self) -> None:
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._open())

    def start(self) -> bool:
        desk, spec = self._desk, self._senders[0].spec
        try:
            self._transfer = desk.workers.begin(spec.transfer_id, "save", self._tokens)
        except EngineError as error:
            self._fail(error)
            return False
        if self._transfer is None:
            return False
        self._transfer.on_saved = self._saved
        self.turn_is_near()
        self._started_s = time.monotonic()
        self._computing = asyncio.ensure_future(self._compute(self._transfer))
        return True

    async def _open(self) -> None:
        """While vLLM computes: what is computed before the receiver has answered waits in the shared memory."""
        try:
            while True:
                try:
                    await self._senders[0].open(self._deadline.remaining_s)
                    return
                except NoRoomError as error:
                    await asyncio.sleep(error.retry_after_s)
        except Exception as error:  # the transport's errors, each with its own text, go to the caller as they are
            self._fail(error)

    # -- computing ----------------------------------------------------------------------------------------------------

    async def _compute(self, transfer: SharedTransfer) -> None:
        desk, request = self._desk, self._request
        alone = desk.line.queued_requests == 1
        body = {
            "model": request.adapter or desk.served_model,
            "prompt": list(request.prompt_token_ids[:-1]),
            "max_tokens": 1,
            "temperature": 0,
            "cache_salt": desk.salt(request.tenant),
            "kv_transfer_params": transfer.params,
        }
        try:
            await asyncio.shield(transfer.begun)
            async with contextlib.aclosing(desk.client.complete(body)) as chunks:
                async for _ in chunks:
                    pass
            async with asyncio.timeout(STATES_WAIT_S):
                await asyncio.shield(transfer.save_ended)
            ended_s = max(self._computed_s.values(), default=time.monotonic())
            desk.line.leave(self)
            if alone and desk.line.queued_requests == 0:
                desk.measured.prefilled(self._tokens.end, ended_s - self._started_s)
            await self._drain(ended_s)
        except TimeoutError:
            self._fail(EngineError("vLLM ended the prefill without its KV; is its kv_role kv_both?"))
        except Exception as error:  # the transport's and vLLM's errors go to the caller as they are
            self._fail(error)

    async def _drain(self, ended_s: float) -> None:
        layers = range(len(self._desk.info.layout.layers))
        computed_s = [self._computed_s.get(layer, ended_s) for layer in layers]
        sender = self._senders[0]
        sender.finish(
            {
                "queued_s": self._queued_s,
                "started_s": self._started_s,
                "ended_s": ended_s,
                "computed_s": computed_s,
            }
        )
        report = await sender.done()
        self.stream.push(PrefillDone(self._queued_s, self._started_s, ended_s, computed_s, [report]))
        self.stream.end()

    def _saved(self, rank: int, saved: Saved) -> None:
        """A worker has copied out a part of a layer."""
        assert self._transfer is not None
        self._computed_s[saved.layer] = max(saved.at_s, self._computed_s.get(saved.layer, 0.0))
        self._senders[0].put(pieces_of(self._transfer, rank, self._desk.workers.ranks, saved))
        if saved.layer == 0 and saved.end > self._computed_tokens:
            self._desk.line.stepped(0, 0.0)
            self._computed_tokens = saved.end
            self.stream.push(PrefillProgress(max(0, saved.end - self._tokens.start)))

    # -- the end ------------------------------------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        self.stream.fail(error)
        self._desk.line.leave(self)

    async def _close(self) -> None:
        self._deadline.cancel()
        self._desk.line.leave(self)
        try:
            await cancelled(self._opening, self._computing)
        finally:
            for sender in self._senders:
                await sender.aclose()
            if self._transfer is not None:
                await self._transfer.close()
            self._desk.line.advance()


def pieces_of(transfer: SharedTransfer, rank: int, ranks: int, saved: Saved) -> list[KvPiece]:
    """What the transport is given of it: of each head one piece, of a state each rank's shard."""
    pieces = []
    plan = transfer.plan
    for tensor in saved.tensors:
        spec, extent = plan.layout.layers[saved.layer].tensors[tensor], plan.extents[saved.layer][tensor]
        if spec.kind.is_state:
            if not extent.rows or (rank and not _is_sharded(spec.dims, ranks)):
                continue
            row = transfer.row(saved.layer, tensor, 0)
            size = len(row) // ranks if _is_sharded(spec.dims, ranks) else len(row)
            pieces.append(KvPiece(saved.layer, tensor, 0, rank * size, row[rank * size : (rank + 1) * size]))
            continue
        low, high = max(saved.start, extent.token_start), min(saved.end, extent.token_start + extent.tokens)
        if low >= high:
            continue
        begin = (low - extent.token_start) * spec.row_bytes_per_token
        end = (high - extent.token_start) * spec.row_bytes_per_token
        for head in range(saved.head_start, saved.head_end):
            row = transfer.row(saved.layer, tensor, head)
            pieces.append(KvPiece(saved.layer, tensor, head, begin, row[begin:end]))
    return pieces


def _is_sharded(dims: tuple[int, ...], ranks: int) -> bool:
    """As model_layout has it: a state that is sharded over ranks has them as its first dimension."""
    return ranks > 1 and dims[0] == ranks
