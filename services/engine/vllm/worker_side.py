"""The connector's half in a vLLM worker: copies KV out as layers are computed, and in as they are needed.

All methods are the model thread's. Nothing here waits but for a layer that a decode step needs and that has not
arrived; `layer_wait_s` bounds that, since a whole batch waits along.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from prfaas.common import log
from prfaas.common.kv_layout import Extent
from prfaas.services.engine.vllm.control import Loaded, Saved, SaveEnded, ToNode
from prfaas.services.engine.vllm.model_layout import ModelKv, Part
from prfaas.services.engine.vllm.paged_kv import PagedTensor, StateTensor
from prfaas.services.engine.vllm.shared_kv import TransferMemory
from prfaas.services.engine.vllm.steps import LoadStep, SaveStep, Step

MAX_PROBLEM = 500
UNKNOWN = "our node does not know this transfer (any more)"


_log = log.get_logger("vllm-connector")


class Transfers(Protocol):
    """What of `WorkerLink` the model thread uses."""

    @property
    def layer_wait_s(self) -> float: ...

    def find(self, transfer_id: str) -> TransferMemory | None: ...

    def send(self, message: ToNode) -> None: ...


@dataclass(slots=True)
class _Loading:
    step: LoadStep
    transfer: TransferMemory | None
    until_s: float
    problem: str = ""
    used_s: dict[int, float] = field(default_factory=dict)


class WorkerSide:
    """caches: of each part's tensors, in its order."""

    def __init__(
        self,
        model: ModelKv,
        caches: Mapping[str, Sequence[PagedTensor | StateTensor]],
        transfers: Transfers,
    ) -> None:
        self._model = model
        self._caches = caches
        self._transfers = transfers
        self._states = [part for part in model.parts.values() if part.is_state]
        self._loading: list[_Loading] = []
        self._saving: list[SaveStep] = []
        self._bad_blocks: set[int] = set()

    # -- a step -------------------------------------------------------------------------------------------------------

    def begin(self, step: Step) -> None:
        """The scheduler has made up the next step."""
        for transfer_id, reason in step.skipped:
            self._transfers.send(Loaded(transfer_id, [], skipped=reason))
        self._saving = step.saves
        until_s = time.monotonic() + self._transfers.layer_wait_s
        self._loading = [_Loading(each, self._transfers.find(each.transfer_id), until_s) for each in step.loads]
        for loading in self._loading:
            if loading.transfer is None:
                self._fail(loading, UNKNOWN)

    def before_forward(self) -> None:
        """Recurrent states are read by the forward pass without asking anybody. vLLM has cleared new blocks by now."""
        for loading in self._loading:
            for part in self._states:
                self._load(loading, part)

    def before_layer(self, name: str) -> None:
        """The layer's attention is about to read the cache."""
        part = self._model.parts.get(name)
        if part is not None:
            for loading in self._loading:
                self._load(loading, part)

    def after_layer(self, name: str) -> None:
        """The layer's keys and values of this step are in the cache."""
        part = self._model.parts.get(name)
        if part is not None and not part.is_state:
            for saving in self._saving:
                self._save(saving, part)

    def end(self) -> None:
        """After the forward pass."""
        for saving in self._saving:
            for part in self._states:
                self._save(saving, part)
            transfer = self._transfers.find(saving.transfer_id)
            if transfer is not None and not transfer.failed and saving.computed_tokens >= transfer.plan.tokens.end:
                self._transfers.send(SaveEnded(saving.transfer_id))
        self._saving = []
        for loading in self._loading:
            used_s = [at_s for _, at_s in sorted(loading.used_s.items())]
            self._transfers.send(Loaded(loading.step.transfer_id, used_s, loading.problem))
        self._loading = []

    @property
    def saves(self) -> bool:
        """This step computes KV that leaves."""
        return bool(self._saving)

    def take_bad_blocks(self) -> set[int]:
        """Of loads that have failed since the last call, where a model has one block table."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    # -- one layer of one transfer ------------------------------------------------------------------------------------

    def _load(self, loading: _Loading, part: Part) -> None:
        transfer, step = loading.transfer, loading.step
        if transfer is None or loading.problem:
            return
        with transfer.lock:
            problem = transfer.wait(part.layer, loading.until_s)
            try:
                if not problem:
                    for number, cache in zip(part.tensors, self._caches[part.name], strict=True):
                        self._install(transfer, step, part, number, cache)
            except Exception as error:  # raised into vLLM it would end the engine, and every other request with it
                _log.exception("KV could not be copied in", layer=part.name, transfer_id=transfer.transfer_id)
                problem = f"{part.name}: {error}"
        if problem:
            self._fail(loading, problem)
        loading.used_s.setdefault(part.layer, time.monotonic())

    def _install(
        self, transfer: TransferMemory, step: LoadStep, part: Part, number: int, cache: PagedTensor | StateTensor
    ) -> None:
        extent = transfer.plan.extents[part.layer][number]
        data = transfer.tensor(part.layer, number)
        blocks = step.blocks[part.group]
        if isinstance(cache, StateTensor):
            cache.write(blocks[-1], data[self._shard(data, cache)])
            return
        start, end = max(step.start, extent.token_start), extent.token_start + extent.tokens
        if start < end:
            heads = self._heads(extent)
            cache.write(blocks, start, end, data[heads, start - extent.token_start :])

    def _save(self, saving: SaveStep, part: Part) -> None:
        transfer = self._transfers.find(saving.transfer_id)
        if transfer is None or transfer.kind != "save":
            return
        last = saving.computed_tokens >= transfer.plan.tokens.end
        if part.is_state and not last:
            return
        with transfer.lock:
            if transfer.closed or transfer.failed:
                return
            try:
                saved = [
                    self._copy_out(transfer, saving, part, number, cache)
                    for number, cache in zip(part.tensors, self._caches[part.name], strict=True)
                ]
            except Exception as error:  # as in _load
                _log.exception("KV could not be copied out", layer=part.name, transfer_id=transfer.transfer_id)
                transfer.failed = f"{part.name}: {error}"
                self._transfers.send(SaveEnded(transfer.transfer_id, transfer.failed[:MAX_PROBLEM]))
                return
        self._tell(transfer, part, saved)

    def _copy_out(
        self, transfer: TransferMemory, saving: SaveStep, part: Part, number: int, cache: PagedTensor | StateTensor
    ) -> tuple[int, int]:
        """The tokens that are out now and were not before."""
        extent = transfer.plan.extents[part.layer][number]
        out = transfer.tensor(part.layer, number)
        blocks = saving.blocks[part.group]
        if isinstance(cache, StateTensor):
            cache.read(blocks[-1], out[self._shard(out, cache)])
            return extent.token_start, extent.token_start
        key = (part.layer, number)
        start = transfer.saved.get(key, extent.token_start)
        end = min(saving.computed_tokens, extent.token_start + extent.tokens)
        if start < end:
            first = extent.token_start
            cache.read(blocks, start, end, out[self._heads(extent), start - first : end - first])
            transfer.saved[key] = end
        return start, max(start, end)

    def _tell(self, transfer: TransferMemory, part: Part, saved: list[tuple[int, int]]) -> None:
        extent = transfer.plan.extents[part.layer][part.tensors[0]]
        heads = self._heads(extent)
        start, end = saved[0]
        if part.is_state or (self._model.heads.sends and start < end):
            at_s = time.monotonic()
            self._transfers.send(
                Saved(transfer.transfer_id, part.layer, list(part.tensors), start, end, heads.start, heads.stop, at_s)
            )

    def _heads(self, extent: Extent) -> slice:
        """The rows that this rank has; a latent has one, which every rank has."""
        return slice(0, 1) if extent.rows == 1 else slice(self._model.heads.start, self._model.heads.end)

    def _shard(self, data: torch.Tensor, cache: StateTensor) -> int | slice:
        """This rank's part of a state."""
        return self._model.rank if data.dim() > len(cache.shape) else slice(None)

    def _fail(self, loading: _Loading, problem: str) -> None:
        loading.problem = problem[:MAX_PROBLEM]
        blocks = loading.step.blocks
        if len(blocks) == 1:
            self._bad_blocks.update(blocks[0])
