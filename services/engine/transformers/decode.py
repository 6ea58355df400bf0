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
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from prfaas.services.engine.api import DecodeDone, DecodeEvent, DecodeTimeline, FinishReason, SamplingParams, TokenEvent
from prfaas.services.engine.sampling import Draw, is_stop, sample
from prfaas.services.engine.transformers.attention import RaggedCache
from prfaas.services.engine.transformers.families import LayerwiseModel
from prfaas.services.engine.transformers.kv_memory import RequestKv


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
    waits_for_all: bool = False
    """Enter no layer before all have arrived (a baseline)."""
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

    def can_run(self, layer: int) -> bool:
        return self.present[layer] and not (self.waits_for_all and self.missing_layers)


class SlipstreamBatch:
    """Running rows and joiners, on the worker's thread. Every method is called there."""

    def __init__(self, model: LayerwiseModel, max_batch: int) -> None:
        self._model = model
        self._max_batch = max_batch
        self.running: list[DecodeRow] = []
        self.joining: list[DecodeRow] = []

    def join(self, row: DecodeRow) -> None:
        self.joining.append(row)

    def discard(self, row: DecodeRow) -> None:
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
        """Joiners of which something has arrived, as many as there is room for."""
        started = [row for row in self.joining if row.missing_layers < row.layer_count]
        return started[: max(0, self._max_batch - len(self.running))]

    def run_pass(self) -> list[tuple[DecodeRow, DecodeEvent]]:
        """Advance everybody that can; what is to be told, in order. Rows that have ended are out of the batch."""
        joiners = self._eligible()
        batch = _Batch(self._model, self.running)
        first = 0 if self.running else min((row.next_layer for row in joiners), default=0)
        for layer in range(first, self._model.layer_count):
            batch.enter([row for row in joiners if row.next_layer == layer and row.can_run(layer)])
            if batch.rows:
                batch.run(layer)
                batch.leave([row for row in joiners if row.next_layer == layer + 1 and not _can_go_on(row, layer + 1)])
        return self._sample(batch) if batch.rows else []

    def _sample(self, batch: _Batch) -> list[tuple[DecodeRow, DecodeEvent]]:
        logits = self._model.logits(batch.hidden).numpy()
        draws = [Draw(row.params, row.output_tokens, row.seed, row.eos_token_ids) for row in batch.rows]
        events: list[tuple[DecodeRow, DecodeEvent]] = []
        now = time.monotonic()
        for row, token in zip(list(batch.rows), sample(logits, draws), strict=True):
            if row in self.joining:
                self.joining.remove(row)
                self.running.append(row)
                row.hidden = None
                events.append((row, _timeline(row)))
            events.extend((row, event) for event in self._advance(row, token, now))
        return events

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

    def __init__(self, model: LayerwiseModel, rows: list[DecodeRow]) -> None:
        self._model = model
        self._running = len(rows)
        self.rows = list(rows)
        self.hidden: torch.Tensor = torch.empty(0)
        if rows:
            self.hidden = model.embed(torch.tensor([[row.token] for row in rows]))
            self._arrange()

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
        hiddens = [
            self._model.embed(torch.tensor([[row.token]])) if row.hidden is None else row.hidden for row in entering
        ]
        self.hidden = torch.cat(([self.hidden] if self.rows else []) + hiddens)
        self.rows += entering
        self._arrange()

    def run(self, layer: int) -> None:
        now = time.monotonic()
        self.hidden = self._model.run_layer(layer, self.hidden, self._positions, self._rotary, self._cache)
        self._cache.store_states()
        for row in self.rows[self._running :]:
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
