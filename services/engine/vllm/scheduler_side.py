"""The connector's half in vLLM's scheduler: what of a request comes from elsewhere, what of it leaves. Knows nothing of
tensors or sockets.

A load is always synchronous in vLLM's terms: our node gives vLLM the request when its KV is close (services/vllm), the
step that computes the last prompt token installs the layers one by one, and waits for one that is late. So no request
is ever parked in vLLM, which would make it spin, and no block is written outside of a step, so that an abort at any
time frees them at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prfaas.services.engine.vllm.control import PARAMS_KEY
from prfaas.services.engine.vllm.steps import Blocks, LoadStep, SaveStep, Step


@dataclass(slots=True)
class _Saving:
    transfer_id: str
    end: int
    blocks: Blocks


@dataclass(frozen=True, slots=True)
class _Load:
    transfer_id: str
    start: int
    end: int


class SchedulerSide:
    """Methods are called by vLLM's scheduler, in its thread."""

    def __init__(self) -> None:
        self._saving: dict[str, _Saving] = {}
        self._asked: set[str] = set()
        """Requests whose load has been decided; preempted ones are computed by vLLM itself."""
        self._why_not: dict[str, str] = {}
        """Why the last answer about a request was 0; "": it wasn't."""
        self._next = Step()

    def external_tokens(self, request: Any, computed_tokens: int) -> int:
        """Tokens after the first `computed_tokens` that the connector has. May be asked several times."""
        load = _load_of(request)
        if load is None or request.request_id in self._asked:
            return 0
        why_not = self._why_not[request.request_id] = _why_not(load, request, computed_tokens)
        return 0 if why_not else load.end - computed_tokens

    def allocated(self, request: Any, blocks: Blocks, external_tokens: int) -> None:
        """The request begins in this step, in these blocks."""
        params = _params(request)
        if params is not None and params.get("kind") == "save":
            self._saving[request.request_id] = _Saving(params["transfer_id"], params["end"], _copy(blocks))
            return
        load = _load_of(request)
        if load is None or request.request_id in self._asked:
            return
        self._asked.add(request.request_id)
        why_not = self._why_not.pop(request.request_id, "")
        if external_tokens:
            start = load.end - external_tokens
            self._next.loads.append(LoadStep(request.request_id, load.transfer_id, _copy(blocks), start, load.end))
        else:
            self._next.skipped.append((load.transfer_id, why_not or "not_asked"))

    def step(
        self,
        scheduled_tokens: Mapping[str, int],
        new: Iterable[tuple[str, Blocks, int]],
        running: Iterable[tuple[str, Blocks | None, int, bool]],
    ) -> Step:
        """The step that vLLM has just made up. new: request id, all its blocks, tokens computed before. running: id,
        blocks that have come to it, tokens computed before, whether the blocks are all of them (it was preempted)."""
        step, self._next = self._next, Step()
        for request_id, blocks, computed in new:
            if (saving := self._saving.get(request_id)) is not None:
                saving.blocks = _copy(blocks)
                self._save(step, request_id, saving, computed + scheduled_tokens[request_id])
        for request_id, more, computed, all_new in running:
            if (saving := self._saving.get(request_id)) is None:
                continue
            if all_new and more is not None:
                saving.blocks = _copy(more)
            elif more is not None:
                for own, added in zip(saving.blocks, more, strict=True):
                    own.extend(added)
            self._save(step, request_id, saving, computed + scheduled_tokens[request_id])
        return step

    def _save(self, step: Step, request_id: str, saving: _Saving, computed_tokens: int) -> None:
        step.saves.append(SaveStep(saving.transfer_id, _copy(saving.blocks), min(computed_tokens, saving.end)))
        if computed_tokens >= saving.end:
            del self._saving[request_id]

    def finished(self, request_id: str) -> None:
        """Ended or aborted."""
        self._saving.pop(request_id, None)
        self._asked.discard(request_id)
        self._why_not.pop(request_id, None)


def _copy(blocks: Blocks) -> Blocks:
    return tuple(list(group) for group in blocks)


def _params(request: Any) -> dict[str, Any] | None:
    params = (request.kv_transfer_params or {}).get(PARAMS_KEY)
    return params if isinstance(params, dict) else None


def _load_of(request: Any) -> _Load | None:
    params = _params(request)
    if params is None or params.get("kind") != "load":
        return None
    return _Load(params["transfer_id"], params["start"], params["end"])


def _why_not(load: _Load, request: Any, computed_tokens: int) -> str:
    """ "": the load goes with the request as vLLM has it now."""
    if load.end != len(request.prompt_token_ids or ()) - 1:
        return "other_prompt"
    if computed_tokens < load.start:
        return "prefix_gone"
    return "held" if computed_tokens >= load.end else ""
