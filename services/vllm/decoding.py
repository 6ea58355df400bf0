"""A decode by vLLM: KV arrives in the shared memory → vLLM is given the request → its tokens.

Until enough of the KV is there (`release.py`) vLLM does not know of the request: one that waited inside it would make
its engine spin. Without a transfer vLLM is given the request at once, and computes the prompt itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from prfaas.common.errors import EngineError, OutOfMemoryError, RequestError, TransferError
from prfaas.services.engine.api import (
    DecodeDone,
    DecodeRequest,
    DecodeTimeline,
    FinishReason,
    TokenEvent,
)
from prfaas.services.engine.deadline import Deadline
from prfaas.services.engine.event_stream import RequestEvents
from prfaas.services.engine.token_ids import check_token_ids
from prfaas.services.engine.vllm.control import Loaded
from prfaas.services.vllm.client import Chunk
from prfaas.services.vllm.desk import Desk
from prfaas.services.vllm.release import may_release
from prfaas.services.vllm.workers import SharedTransfer
from prfaas.transport.api import KvDestination, KvReceiver, TransferSpec
from prfaas.transport.waiting import cancelled

E = TypeVar("E")

LOADED_WAIT_S = 10.0
"""After vLLM's first token, for the workers' word that all KV was there: it left them before the token."""


class VllmLife(ABC, Generic[E]):
    """What all decodes have in common, whatever comes out of them. A subclass says what vLLM is asked, and makes events
    of what it answers. Raises RequestError when it is made."""

    def __init__(
        self, desk: Desk, context: list[int], timeout_s: float | None, receivers: Sequence[KvReceiver]
    ) -> None:
        """context: the token ids that vLLM will make the next token from."""
        if not context:
            raise RequestError("the prompt is empty", param="prompt")
        check_token_ids(context, desk.info.vocabulary)
        self._desk = desk
        self._context = context
        self._receiver = receivers[0] if receivers else None
        layout = desk.info.layout
        self._arrived_s: list[float | None] = [None] * len(layout.layers)
        self._layer_bytes = [0] * len(layout.layers)
        self._states = frozenset(
            index for index, layer in enumerate(layout.layers) if any(t.kind.is_state for t in layer.tensors)
        )
        self._transfer: SharedTransfer | None = None
        self._running: asyncio.Task[None] | None = None
        self._freeing: asyncio.Task[None] | None = None
        self._queued_s = time.monotonic()
        self._released_s = 0.0
        self._last_s = 0.0
        self._tokens_came = False
        self.stream: RequestEvents[E | DecodeTimeline] = RequestEvents(self._close)
        self._deadline = Deadline(timeout_s, self._fail)
        problem = self._problem(receivers)
        for receiver in receivers:
            receiver.bind(self._reserve, self._layer_arrived, self._transfer_failed)
        if problem is not None:
            self._fail(problem)

    def begin(self) -> None:
        """Once, when the subclass is complete."""
        if self._receiver is None and not self.stream.sealed:
            self._release()

    @property
    @abstractmethod
    def context_tokens(self) -> int:
        """With the output so far."""

    @abstractmethod
    async def _run(self) -> None:
        """Ask vLLM; events go into the stream. `_first` before the first one leaves."""

    def _problem(self, receivers: Sequence[KvReceiver]) -> EngineError | None:
        if self._desk.workers.failure is not None:
            return EngineError(self._desk.workers.failure)
        if len(receivers) > 1:
            return EngineError("a decode by vLLM has one transfer")
        if self._receiver is None:
            return None
        tokens = self._receiver.spec.tokens
        if tokens.end != len(self._context) - 1:
            return EngineError(f"tokens up to {tokens.end} were announced, this decode needs {len(self._context) - 1}")
        if not self._desk.workers.fits(tokens):
            return OutOfMemoryError(
                f"the KV of {tokens.tokens} tokens doesn't fit into engine.arena_bytes of this node"
            )
        return None

    @property
    def is_running(self) -> bool:
        """vLLM has it, and it has not ended."""
        return self._running is not None and not self.stream.sealed

    # -- KV -----------------------------------------------------------------------------------------------------------

    def _reserve(self, spec: TransferSpec) -> KvDestination | None:
        transfer = self._transfer = self._desk.workers.begin(spec.transfer_id, "load", spec.tokens)
        if transfer is not None:
            layout = self._desk.info.layout
            self._layer_bytes = [layout.layer_bytes(i, spec.tokens, spec.shard) for i in range(len(layout.layers))]
        return transfer

    def _layer_arrived(self, layer: int) -> None:
        if self._transfer is None or self.stream.sealed:
            return
        self._arrived_s[layer] = time.monotonic()
        self._transfer.arrived([layer])
        if self._running is None and self._may_release():
            self._release()

    def _may_release(self) -> bool:
        if self._desk.config.join == "when_complete":
            return None not in self._arrived_s
        stall_s, step_s = self._desk.vllm.stall_s, self._desk.step.seconds
        return may_release(self._layer_bytes, self._arrived_s, self._states, time.monotonic(), step_s, stall_s)

    def _transfer_failed(self, error: Exception) -> None:
        if self._transfer is not None:
            if self._transfer.loaded.done():
                return  # vLLM has its copy, or goes on without
            self._transfer.abort(str(error))  # nobody in vLLM is to wait for what won't come
        self._fail(error)

    # -- vLLM ---------------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        self._released_s = time.monotonic()
        self._running = asyncio.ensure_future(self._ask())

    async def _ask(self) -> None:
        if self._transfer is not None:
            await asyncio.shield(self._transfer.begun)
            self._freeing = asyncio.ensure_future(self._free())
        await self._run()

    def _params(self) -> dict[str, Any]:
        """For the connector; without a transfer there is nothing to tell it."""
        return {} if self._transfer is None else {"kv_transfer_params": self._transfer.params}

    async def _first(self) -> None:
        """No token leaves before every worker has said that the KV it came from was there. Idempotent."""
        if self._last_s:
            return
        used_s: list[float] = []
        unused = ""
        if self._transfer is not None:
            try:
                async with asyncio.timeout(LOADED_WAIT_S):
                    loaded = await asyncio.shield(self._transfer.loaded)
            except TimeoutError:
                raise EngineError("vLLM answered without its connector's word on the KV") from None
            used_s = self._check(loaded)
            unused = next((each.skipped for each in loaded if each.skipped), "")
        self._last_s = time.monotonic()
        layers = len(self._arrived_s)
        if self._receiver is not None:
            used_s = used_s or [self._last_s] * layers
            self.stream.push(DecodeTimeline(list(self._arrived_s), used_s, kv_unused=unused))
            return
        used_s = [self._last_s] * layers
        self.stream.push(DecodeTimeline([None] * layers, used_s, self._queued_s, self._released_s, self._last_s))

    def _came(self, tokens: int) -> float:
        """So many tokens have come now."""
        now_s = time.monotonic()
        if tokens == 1 and self._tokens_came:
            self._desk.step.add(now_s - self._last_s)
        if tokens:
            self._last_s = now_s
            self._tokens_came = True
        return now_s

    def _check(self, loaded: Sequence[Loaded]) -> list[float]:
        """used_s of each layer, as the last rank has it."""
        problem = next((each.problem for each in loaded if each.problem), "")
        if problem:
            raise TransferError(f"vLLM could not be given the KV: {problem}")
        used = [each.used_s for each in loaded if len(each.used_s) == len(self._arrived_s)]
        return [max(times) for times in zip(*used, strict=True)]

    async def _free(self) -> None:
        """vLLM has its copy: the memory goes to the next request, while this one decodes."""
        assert self._receiver is not None
        assert self._transfer is not None
        await asyncio.shield(self._transfer.loaded)
        with contextlib.suppress(TransferError):
            await self._receiver.finished()
        await self._receiver.aclose()
        await self._transfer.close()

    # -- the end ------------------------------------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        self.stream.fail(error)

    async def _close(self) -> None:
        self._deadline.cancel()
        try:
            # A step that waits for a layer of this request would hold up the others.
            if self._transfer is not None:
                self._transfer.abort("the request was cancelled")
            await cancelled(self._running, self._freeing)
        finally:
            if self._receiver is not None:
                await self._receiver.aclose()
            if self._transfer is not None:
                await self._transfer.close()
            self._desk.line.advance()


class DecodeLife(VllmLife[TokenEvent | DecodeDone]):
    """A decode from token ids."""

    def __init__(self, desk: Desk, request: DecodeRequest, receivers: Sequence[KvReceiver]) -> None:
        if request.max_output_tokens < 1:
            raise RequestError("max_tokens must be at least 1", param="max_tokens")
        desk.check_length(len(request.prompt_token_ids) + request.max_output_tokens)
        self._request = request
        self._output_tokens = len(request.output_token_ids)
        context = [*request.prompt_token_ids, *request.output_token_ids]
        super().__init__(desk, context, request.timeout_s, receivers)
        if self._output_tokens >= request.max_output_tokens:
            self.stream.push(DecodeDone(FinishReason.LENGTH, self._output_tokens))
            self.stream.end()

    @property
    def context_tokens(self) -> int:
        return len(self._request.prompt_token_ids) + self._output_tokens

    def _body(self) -> dict[str, Any]:
        request, sampling = self._request, self._request.sampling
        return {
            "model": self._desk.served_model,
            "prompt": self._context,
            "max_tokens": request.max_output_tokens - len(request.output_token_ids),
            "min_tokens": max(0, sampling.min_tokens - len(request.output_token_ids)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": sampling.seed,
            "ignore_eos": sampling.ignore_eos,
            "stop_token_ids": list(sampling.stop_token_ids),
            "return_token_ids": True,
            "cache_salt": self._desk.salt(request.tenant),
            **self._params(),
        }

    async def _run(self) -> None:
        try:
            async with contextlib.aclosing(self._desk.client.complete(self._body())) as chunks:
                async for chunk in chunks:
                    await self._first()
                    if self._take(chunk):
                        return
            raise EngineError("vLLM ended the stream without a reason")
        except Exception as error:  # vLLM's and the transport's errors go to the caller as they are
            self._fail(error)

    def _take(self, chunk: Chunk) -> bool:
        """True: it was the last."""
        for choice in chunk.choices:
            ids = choice.token_ids or []
            stop_id = _stop_id(choice.finish_reason, choice.stop_reason, ids, self._desk.info.eos_token_ids)
            if stop_id is not None and ids and ids[-1] == stop_id:
                ids = ids[:-1]
            at_s = self._came(len(ids))
            for token_id in ids:
                self.stream.push(TokenEvent(token_id, self._output_tokens, at_s))
                self._output_tokens += 1
            if choice.finish_reason is not None:
                self._end(choice.finish_reason, stop_id)
                return True
        return False

    def _end(self, finish_reason: str, stop_id: int | None) -> None:
        if finish_reason not in ("stop", "length"):
            self._fail(EngineError(f"vLLM ended the request: {finish_reason}"))
            return
        reason = FinishReason.STOP if finish_reason == "stop" else FinishReason.LENGTH
        self.stream.push(DecodeDone(reason, self._output_tokens, stop_id))
        self.stream.end()


def _stop_id(
    finish_reason: str | None, stop_reason: int | str | None, ids: Sequence[int], eos: Sequence[int]
) -> int | None:
    """The token that ended the output, which is not part of it."""
    if finish_reason != "stop":
        return None
    if isinstance(stop_reason, int):
        return stop_reason
    return ids[-1] if ids and ids[-1] in eos else None
