"""Prefill of one request: steps of some tokens through all layers; each layer leaves right after it exists."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from prfaas.common.kv_layout import KvLayout
from prfaas.services.engine.transformers.attention import PrefillCache
from prfaas.services.engine.transformers.families import LayerwiseModel
from prfaas.services.engine.transformers.kv_memory import RequestKv
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
    """Tokens [0, end) of a prompt. Belongs to the worker, except `abandoned`, which anyone may set: computing stops
    before the next layer, and from then on nothing reads or writes `kv`. On the loop's thread run on_step(tokens
    computed so far, of them in this step, its seconds) and on_end(None = all is computed)."""

    token_ids: Sequence[int]
    end: int
    kv: RequestKv
    outbox: Outbox | None
    on_step: Callable[[int, int, float], None]
    on_end: Callable[[Exception | None], None]
    queued_s: float
    computed_tokens: int = 0
    started_s: float = 0.0
    ended_s: float = 0.0
    computed_s: list[float] = field(default_factory=list)
    abandoned: bool = False

    @property
    def remaining_tokens(self) -> int:
        return self.end - self.computed_tokens

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
    """Compute the next tokens of the job, at most `step_tokens`. Yields before each layer; at each yield the job may be
    abandoned, and then (`should_stop`) this ends without touching its KV again."""
    start, end = job.computed_tokens, min(job.computed_tokens + step_tokens, job.end)
    last = end == job.end
    if start == 0:
        job.started_s = time.monotonic()
        job.computed_s = [0.0] * model.layer_count
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
            job.outbox.computed(layer, start, end, last)
    job.computed_tokens = end
    if last:
        job.ended_s = time.monotonic()
        if job.outbox is not None:
            job.outbox.finish(job.timings)
