"""Decode: one batch of requests of different lengths, and joiners that ride in its slipstream.

A pass takes every running row through all layers and samples one token for each. A request whose KV is still arriving
*joins* in the same passes: at layer l it enters the batch if l is its next layer and layer l has arrived, and it leaves
the batch, keeping its hidden state, before the first layer that is not there yet. The pass never waits.

    layer            0   1   2   3   4   5  ...
    running rows     ●───●───●───●───●───●───   every pass, all layers
    joiner, pass 1   ●───●───● leaves: layer 3 has not arrived
    joiner, pass 2               ●───● leaves
    joiner, pass 3                       ●───●─── sampled with the others: running from now on

One more row costs a pass next to nothing (the weights are read once either way), so a join stalls nobody, and its first
token comes about one layer after the last arrival. With nobody running a pass begins at the first joiner's next layer.
A joiner that starts from a held prefix has a layer when that is copied as well (`copy_held`).
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from prfaas.common.errors import EngineError
from prfaas.services.engine.api import DecodeDone, DecodeEvent, DecodeTimeline, FinishReason, SamplingParams, TokenEvent
from prfaas.services.engine.sampling import Draw, is_stop, sample
from prfaas.services.engine.transformers.attention import RaggedCache
from prfaas.services.engine.transformers.families import LayerwiseModel
from prfaas.services.engine.transformers.kv_memory import RequestKv
from prfaas.services.engine.transformers.prefix_copies import COPY_BYTES_A_TURN, HeldKv, StateStash


@dataclass(eq=False, slots=True)
class DecodeRow:
    """One request in decode. `token` at `position` is the next to be fed.

    Belongs to the worker once it has joined, except what `arrived` sets, whose only writer is the loop.
    """

    token: int
    position: int
    output_tokens: int
    max_output_tokens: int
    params: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...]
    layer_count: int
    emit: Callable[[DecodeEvent | Exception], None]
    """On the loop's thread."""
    kv: RequestKv | None = None
    held: HeldKv | None = None
    """What is to be copied into `kv` beside what arrives."""
    stash: StateStash | None = None
    kv_tokens: int = 0
    """Whose KV is complete in all layers; 0 before the first pass."""
    waits_for_all: bool = False
    """Enter no layer before all have arrived (a baseline)."""
    rank_s: float = 0.0
    """Who has less is before, where places are few (services/engine/api.py)."""
    present: list[bool] = field(default_factory=list)
    arrived_s: list[float | None] = field(default_factory=list)
    missing_layers: int = 0
    used_s: list[float] = field(default_factory=list)
    prefill_s: tuple[float, float, float] | None = None
    """queued, started, ended of a local prefill."""
    next_layer: int = 0
    hidden: torch.Tensor | None = None

    def expect_all(self) -> None:
        """Every layer will be announced by `arrived`."""
        self.present = [False] * self.layer_count
        self.arrived_s = [None] * self.layer_count
        self.missing_layers = self.layer_count

    def have_all(self) -> None:
        """Nothing is on its way."""
        self.present = [True] * self.layer_count
        self.arrived_s = [None] * self.layer_count
        self.missing_layers = 0

    def arrived(self, layer: int, now: float) -> None:
        self.arrived_s[layer] = now
        self.missing_layers -= 1
        self.present[layer] = True

    @property
    def has_to_copy(self) -> bool:
        return self.held is not None and not self.held.is_complete

    def can_run(self, layer: int) -> bool:
        if self.held is not None and layer >= self.held.copied_layers:
            return False
        return self.present[layer] and not (self.waits_for_all and self.missing_layers)


Told = list[tuple[DecodeRow, DecodeEvent | Exception]]
"""Events, and failures, each with the row that it is for, in order."""


class SlipstreamBatch:
    """Running rows and joiners, on the worker's thread. Every method is called there."""

    def __init__(self, model: LayerwiseModel, max_batch: int) -> None:
        self._model = model
        self._max_batch = max_batch
        self.running: list[DecodeRow] = []
        self.joining: list[DecodeRow] = []
        self._pass: _Batch | None = None

    def join(self, row: DecodeRow) -> None:
        bisect.insort_right(self.joining, row, key=lambda joiner: joiner.rank_s)

    def discard(self, row: DecodeRow) -> None:
        """Idempotent. When it returns, nothing reads or writes the row's KV any more, in the middle of a pass too."""
        self._forget(row)
        if self._pass is not None:
            self._pass.leave([row])

    def _forget(self, row: DecodeRow) -> None:
        for rows in (self.running, self.joining):
            if row in rows:
                rows.remove(row)

    @property
    def can_run(self) -> bool:
        """Whether a pass would advance anybody."""
        return bool(self.running) or any(row.can_run(row.next_layer) for row in self._eligible())

    @property
    def is_busy(self) -> bool:
        """Whether anybody would notice a long pause: streams that run, joins that are under way."""
        return bool(self.running) or bool(self._eligible())

    def _eligible(self) -> list[DecodeRow]:
        """Joiners of which something has arrived, as many as there is room for: those that have begun keep their place,
        whoever comes, then by rank."""
        arriving = [row for row in self.joining if row.missing_layers < row.layer_count]
        places = max(0, self._max_batch - len(self.running))
        if len(arriving) > places:
            arriving.sort(key=lambda row: not row.next_layer)
        return arriving[:places]

    @property
    def has_to_copy(self) -> bool:
        return any(row.has_to_copy for row in self.joining)

    def copy_held(self) -> Iterator[Told]:
        """Copy some of what joiners start from, first come, first served. Yields after each layer, and then the caller
        may `join` and `discard`; an error fails its row."""
        copied = 0
        while copied < COPY_BYTES_A_TURN:
            row = next((row for row in self.joining if row.has_to_copy), None)
            if row is None:
                return
            assert row.held is not None
            told: Told = []
            try:
                copied += row.held.copy_layer()
            except Exception as error:  # this request has failed, the engine goes on
                self._forget(row)
                told = [(row, EngineError(f"a held prefix could not be copied: {error}"))]
            yield told

    def run_pass(self) -> Iterator[Told]:
        """Advance everybody that can. Rows that have ended or failed are out of the batch.

        Yields between two layers, and at the end what is to be told. At each yield the caller may `join` and `discard`;
        the other rows go on in the same pass. An error of one row's sampling fails that row. Any other error fails the
        rows that are in the pass at that time, and ends it: joiners that wait outside for a layer go on in the next.
        """
        batch = self._pass = _Batch(self._model)
        told: Told = []
        try:
            batch.enter(self.running)
            joining = (row.next_layer for row in self._eligible())
            for layer in range(0 if self.running else min(joining, default=0), self._model.layer_count):
                self._run_layer(batch, layer)
                yield []
            if batch.rows:
                told = self._sample(batch)
        except Exception as error:  # whatever torch raises: these requests have failed, the engine goes on
            failure = EngineError(f"a decode step failed: {error}")
            told = [(row, failure) for row in batch.rows]
            for row in batch.rows:
                self._forget(row)
        finally:
            self._pass = None
        yield told

    def _run_layer(self, batch: _Batch, layer: int) -> None:
        batch.enter([row for row in self._eligible() if row.next_layer == layer and row.can_run(layer)])
        if batch.rows:
            batch.run(layer)
            batch.leave([row for row in batch.rows if row.next_layer == layer + 1 and not _can_go_on(row, layer + 1)])

    def _sample(self, batch: _Batch) -> Told:
        logits = self._model.logits(batch.hidden).numpy()
        draws = [Draw(row.params, row.output_tokens, row.seed, row.eos_token_ids) for row in batch.rows]
        told: Told = []
        now = time.monotonic()
        for row, token in zip(batch.rows, sample(logits, draws), strict=True):
            if isinstance(token, Exception):
                self._forget(row)
                told.append((row, token))
                continue
            row.kv_tokens = row.position + 1
            if row.stash is not None and row.kv is not None:
                row.stash.passed(row.kv, row.kv_tokens)
            if row in self.joining:
                self.joining.remove(row)
                self.running.append(row)
                row.hidden = None
                told.append((row, _timeline(row)))
            told.extend((row, event) for event in self._advance(row, token, now))
        return told

    def _advance(self, row: DecodeRow, token: int, now: float) -> Iterable[DecodeEvent]:
        if is_stop(token, row.params, row.eos_token_ids):
            self.running.remove(row)
            yield DecodeDone(FinishReason.STOP, row.output_tokens, token)
            return
        yield TokenEvent(token, row.output_tokens, now)
        row.token = token
        row.position += 1
        row.output_tokens += 1
        if row.output_tokens >= row.max_output_tokens:
            self.running.remove(row)
            yield DecodeDone(FinishReason.LENGTH, row.output_tokens)


def _can_go_on(row: DecodeRow, layer: int) -> bool:
    return layer == row.layer_count or row.can_run(layer)


def _timeline(row: DecodeRow) -> DecodeTimeline:
    queued_s, started_s, ended_s = row.prefill_s or (None, None, None)
    return DecodeTimeline(list(row.arrived_s), row.used_s, queued_s, started_s, ended_s)


class _Batch:
    """The rows that are in the pass at its present layer, and their tensors."""

    def __init__(self, model: LayerwiseModel) -> None:
        self._model = model
        self.rows: list[DecodeRow] = []
        self.hidden: torch.Tensor = torch.empty(0)

    def _arrange(self) -> None:
        """After a change of rows: positions, rotary embeddings and KV of the new composition."""
        places = [row.position for row in self.rows]
        self._positions = torch.tensor(places)[:, None]
        self._rotary: Any = self._model.rotary(self.hidden, self._positions)
        self._cache = RaggedCache([row.kv for row in self.rows if row.kv is not None], places)

    def enter(self, rows: Sequence[DecodeRow]) -> None:
        """Those that are in already stay."""
        entering = [row for row in rows if row not in self.rows]
        if not entering:
            return
        fresh = [row for row in entering if row.hidden is None]
        paused = [row for row in entering if row.hidden is not None]
        hiddens = [self.hidden] if self.rows else []
        self.rows += fresh + paused  # first: what goes wrong from here on goes wrong for them too
        if fresh:
            hiddens.append(self._model.embed(torch.tensor([[row.token] for row in fresh])))
        hiddens += [row.hidden for row in paused if row.hidden is not None]
        self.hidden = torch.cat(hiddens)
        self._arrange()

    def run(self, layer: int) -> None:
        now = time.monotonic()
        self.hidden = self._model.run_layer(layer, self.hidden, self._positions, self._rotary, self._cache)
        self._cache.store_states()
        for row in self.rows:
            if row.next_layer == layer:  # a joiner: those that run have all layers behind them
                row.used_s.append(now)
                row.next_layer = layer + 1

    def leave(self, rows: Sequence[DecodeRow]) -> None:
        """Each keeps its hidden state. Rows that are not in are ignored."""
        if not any(row in rows for row in self.rows):
            return
        staying = []
        for index, row in enumerate(self.rows):
            if row in rows:
                row.hidden = self.hidden[index : index + 1].clone()
            else:
                staying.append(index)
        self.rows = [self.rows[index] for index in staying]
        self.hidden = self.hidden[staying]
        if self.rows:
            self._arrange()
