"""Prefill of one request: steps of some tokens through all layers; each layer leaves right after it exists.

A request that starts from a held prefix copies that first, and it leaves as soon as it is copied. What the prefix store
is to keep is copied there layer by layer, too; a step ends where a snapshot is to be taken.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from prfaas.common.kv_layout import KvLayout
from prfaas.services.engine.prefix_store import Writing
from prfaas.services.engine.transformers.attention import PrefillCache
from prfaas.services.engine.transformers.families import LayerwiseModel
from prfaas.services.engine.transformers.kv_memory import RequestKv
from prfaas.services.engine.transformers.prefix_copies import COPY_BYTES_A_TURN, HeldKv, keep_state, keep_tokens
from prfaas.transport.api import KvSender


class Outbox:
    """Computed layers on their way into the senders.

    They leave at once, unless OPEN has not been answered yet (compute doesn't wait for that round trip) or everything
    is to leave after prefill (`hold`). Called by the worker (`computed`, `finish`) and the loop (`opened`).
    """

    def __init__(
        self, kv: RequestKv, layout: KvLayout, senders: Sequence[KvSender], *, hold: bool, opened: bool
    ) -> None:
        self._kv = kv
        self._senders = [(sender, layout.extents(sender.spec.tokens, sender.spec.shard)) for sender in senders]
        self._lock = threading.Lock()
        self._hold = hold
        self._opened = opened
        self._waiting: list[tuple[int, int, int, bool]] = []
        self._timings: dict[str, float | list[float]] | None = None

    @property
    def failed(self) -> bool:
        return any(sender.failed is not None for sender, _ in self._senders)

    def computed(self, layer: int, start: int, end: int, last: bool) -> None:
        """Tokens [start, end) of this layer are in memory; `last`: its states are final."""
        with self._lock:
            self._waiting.append((layer, start, end, last))
            self._flush()

    def finish(self, timings: dict[str, float | list[float]]) -> None:
        """Nothing more will be computed."""
        with self._lock:
            self._timings = timings
            self._hold = False
            self._flush()

    def opened(self) -> None:
        """All receivers have room."""
        with self._lock:
            self._opened = True
            self._flush()

    def _flush(self) -> None:
        if self._hold or not self._opened:
            return
        for layer, start, end, last in self._waiting:
            for sender, extents in self._senders:
                if pieces := list(self._kv.pieces(layer, extents[layer], start, end, last)):
                    sender.put(pieces)
        self._waiting.clear()
        if self._timings is not None:
            for sender, _ in self._senders:
                sender.finish(self._timings)


@dataclass(eq=False, slots=True)
class PrefillJob:
    """Tokens [0, end) of a prompt, those that are held not computed. Belongs to the worker, except `abandoned`, which
    anyone may set: computing stops before the next layer, and from then on nothing touches `kv`, the hold or the
    writing. On the loop's thread run on_step(tokens so far, of them computed in this step, its seconds) and on_end(None
    = all is computed)."""

    token_ids: Sequence[int]
    end: int
    kv: RequestKv
    outbox: Outbox | None
    on_step: Callable[[int, int, float], None]
    on_end: Callable[[Exception | None], None]
    queued_s: float
    held: HeldKv | None = None
    writing: Writing | None = None
    computed_tokens: int = 0
    busy_s: float = 0.0
    """That the thread spent on it."""
    started_s: float = 0.0
    ended_s: float = 0.0
    computed_s: list[float] = field(default_factory=list)
    abandoned: bool = False
    failed: bool = False

    @property
    def remaining_tokens(self) -> int:
        done = self.computed_tokens if self.held is None else max(self.computed_tokens, self.held.tokens)
        return self.end - done

    @property
    def is_done(self) -> bool:
        return self.computed_tokens == self.end

    @property
    def should_stop(self) -> bool:
        return self.abandoned or (self.outbox is not None and self.outbox.failed)

    @property
    def timings(self) -> dict[str, float | list[float]]:
        return {
            "queued_s": self.queued_s,
            "started_s": self.started_s,
            "ended_s": self.ended_s,
            "computed_s": self.computed_s,
        }


def run_step(model: LayerwiseModel, job: PrefillJob, step_tokens: int) -> Iterator[None]:
    """Compute the next tokens of the job, at most `step_tokens`; or copy some of what is held. Yields before each
    layer; at each yield the job may be abandoned, and then (`should_stop`) this ends without touching its KV again."""
    if not job.computed_s:
        job.started_s = time.monotonic()
        job.computed_s = [0.0] * model.layer_count
    if job.held is not None and job.computed_tokens < job.held.tokens:
        yield from _copy_held(job, job.held)
    else:
        yield from _compute(model, job, step_tokens)
    if job.is_done and not job.should_stop:
        job.ended_s = time.monotonic()
        if job.outbox is not None:
            job.outbox.finish(job.timings)


def _copy_held(job: PrefillJob, held: HeldKv) -> Iterator[None]:
    """As many layers as fit into a turn; the last one makes the tokens computed."""
    copied = 0
    while copied < COPY_BYTES_A_TURN and not held.is_complete:
        yield
        if job.should_stop:
            return
        layer = held.copied_layers
        copied += held.copy_layer()
        job.computed_s[layer] = time.monotonic()
        if job.outbox is not None:
            job.outbox.computed(layer, 0, held.tokens, held.tokens == job.end)
    if held.is_complete:
        job.computed_tokens = held.tokens


def _compute(model: LayerwiseModel, job: PrefillJob, step_tokens: int) -> Iterator[None]:
    start, end = job.computed_tokens, min(job.computed_tokens + step_tokens, job.end)
    writing = job.writing
    if writing is not None:
        end = min([end, *(point for point in writing.snapshot_points if point > start)])
    hidden = model.embed(torch.tensor([job.token_ids[start:end]]))
    positions = torch.arange(start, end)[None]
    rotary = model.rotary(hidden, positions)
    cache = PrefillCache(job.kv, start, end)
    for layer in range(model.layer_count):
        yield
        if job.should_stop:
            return
        hidden = model.run_layer(layer, hidden, positions, rotary, cache)
        job.computed_s[layer] = time.monotonic()
        if job.outbox is not None:
            job.outbox.computed(layer, start, end, end == job.end)
        if writing is not None:
            keep_tokens(writing, job.kv, layer, start, end)
            if end in writing.snapshot_points:
                keep_state(writing, job.kv, layer, end)
    if writing is not None and end in writing.snapshot_points:
        writing.complete_state(end)
    job.computed_tokens = end
