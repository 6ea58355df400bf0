"""The model without a node around it: prefill to bytes, and decode from bytes, for captures and benchmarks.

The same weights, layers, attention and KV memory as the engine's, driven by the caller's thread. KV is bytes in wire
order, that of tokens [0, n − 1) of a prompt of n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from prfaas.common.config import EngineConfig
from prfaas.common.errors import EngineError, UsageError
from prfaas.common.kv_layout import TokenRange
from prfaas.services.engine.api import SamplingParams, TokenEvent
from prfaas.services.engine.transformers import kv_memory, loader
from prfaas.services.engine.transformers.attention import PrefillCache
from prfaas.services.engine.transformers.decode import DecodeRow, SlipstreamBatch
from prfaas.services.engine.transformers.kv_memory import RequestKv
from prfaas.services.engine.transformers.prefill import PrefillJob, run_step
from prfaas.services.kv_file import KvCapture, Prompt, rows
from prfaas.transport.arena import Arena

Counted = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""

_GREEDY = SamplingParams(temperature=0, ignore_eos=True)
_LOGIT_ROWS = 64
"""Positions whose logits are computed at once: what a vocabulary of 256K takes stays under 70 MB."""


class OfflineModel:
    """Raises ConfigError and ModelRefusedError when the model can't be loaded; takes seconds."""

    def __init__(self, model: str, name: str) -> None:
        self._config = EngineConfig(model=model)
        torch.set_num_threads(self._config.threads)
        self._loaded = loader.load(self._config)
        self._name = name

    @property
    def max_model_tokens(self) -> int:
        return self._loaded.max_model_tokens

    def check_ids(self, token_ids: Sequence[int], more_tokens: int) -> None:
        """Raises UsageError when the prompt, and so many tokens after it, don't fit the model."""
        if len(token_ids) + more_tokens > self._loaded.max_model_tokens:
            raise UsageError(
                f"{len(token_ids)} prompt tokens and {more_tokens} more don't fit: "
                f"{self._name} has {self._loaded.max_model_tokens} positions"
            )
        if token_ids and max(token_ids) >= self._loaded.vocabulary:
            raise UsageError(f"token {max(token_ids)} is not in {self._name}'s vocabulary of {self._loaded.vocabulary}")

    def check_capture(self, capture: KvCapture) -> None:
        """Raises UsageError when the KV is another model's."""
        mine, other = self._loaded.fingerprint, capture.model_fingerprint
        if mine != other or self._loaded.layout != capture.layout:
            raise UsageError(
                f"the KV is of {capture.model} ({other[:8]}), the model is {self._name} ({mine[:8]}); name the KV's "
                "model with --model, or leave the effect out with --effect-tokens 0"
            )

    def capture(
        self, prompt_token_ids: Sequence[int], following_token_ids: Sequence[int], counted: Counted
    ) -> KvCapture:
        """Prefill the first n − 1 tokens, in the engine's steps. Raises UsageError."""
        if len(prompt_token_ids) < 2:
            raise UsageError("a prompt of one token has no KV to capture; give at least two")
        self.check_ids([*prompt_token_ids, *following_token_ids], 0)
        layout = self._loaded.layout
        tokens = TokenRange(0, len(prompt_token_ids) - 1)
        kv = self._carve(Arena(kv_memory.plan(layout, tokens.end).total_bytes), tokens.end)
        kv.clear_states()
        job = PrefillJob(prompt_token_ids, tokens.end, kv, None, lambda *_: None, lambda _: None, 0.0)
        with torch.inference_mode():
            while job.remaining_tokens:
                for _ in run_step(self._loaded.model, job, self._config.prefill_step_tokens):
                    pass
                counted(job.computed_tokens, tokens.end)
        data = bytearray()
        for row in rows(layout, tokens):
            data += kv.row(row.layer, row.tensor_index, row.extent, row.row)
        kv.free()
        return KvCapture(
            self._name,
            self._loaded.fingerprint,
            layout,
            tuple(prompt_token_ids),
            tuple(following_token_ids),
            data,
        )

    def logits(self, prompt: Prompt, continuation: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Teacher-forced: logits of the tokens that may stand at each place of the continuation, given the prompt's KV
        and the continuation before that place. Blocks of [places, vocabulary], in order. The prompt's last token and
        the continuation run as one step, on top of that KV.
        """
        start = len(prompt.token_ids) - 1
        end = start + len(continuation)
        kv = self._restored(Arena(kv_memory.plan(self._loaded.layout, end, start).total_bytes), prompt, end)
        model = self._loaded.model
        fed = [prompt.token_ids[-1], *continuation[:-1]]
        with torch.inference_mode():
            hidden = model.embed(torch.tensor([fed]))
            positions = torch.arange(start, end)[None]
            rotary = model.rotary(hidden, positions)
            cache = PrefillCache(kv, start, end)
            for layer in range(model.layer_count):
                hidden = model.run_layer(layer, hidden, positions, rotary, cache)
            kv.free()
            for places in hidden[0].split(_LOGIT_ROWS):
                yield model.logits(places[:, None]).numpy()

    def greedy(self, prompts: Sequence[Prompt], output_tokens: int, counted: Counted) -> list[list[int]]:
        """Free-running: the most likely token each time, `output_tokens` of each prompt, all in one decode batch, so
        that what differs between rows is their KV alone. End-of-sequence tokens don't end it."""
        ends = [len(prompt.token_ids) + output_tokens for prompt in prompts]
        plans = [
            kv_memory.plan(self._loaded.layout, end, len(prompt.token_ids) - 1)
            for end, prompt in zip(ends, prompts, strict=True)
        ]
        arena = Arena(sum(-(-plan.total_bytes // 64) * 64 for plan in plans))
        batch = SlipstreamBatch(self._loaded.model, len(prompts))
        outputs: dict[int, list[int]] = {}
        made: list[DecodeRow] = []
        for prompt, end in zip(prompts, ends, strict=True):
            row = self._row(prompt, output_tokens)
            row.kv = self._restored(arena, prompt, end)
            outputs[id(row)] = []
            made.append(row)
            batch.join(row)
        with torch.inference_mode():
            while batch.can_run:
                for told in batch.run_pass():
                    _note(told, outputs)
                counted(len(outputs[id(made[0])]), output_tokens)
        for row in made:
            if row.kv is not None:
                row.kv.free()
        return [outputs[id(row)] for row in made]

    def _row(self, prompt: Prompt, output_tokens: int) -> DecodeRow:
        row = DecodeRow(
            token=prompt.token_ids[-1],
            position=len(prompt.token_ids) - 1,
            output_tokens=0,
            max_output_tokens=output_tokens,
            params=_GREEDY,
            seed=0,
            eos_token_ids=(),
            layer_count=self._loaded.model.layer_count,
            emit=lambda _: None,
        )
        row.have_all()
        return row

    def _carve(self, arena: Arena, capacity_tokens: int, received_end: int | None = None) -> RequestKv:
        kv = kv_memory.carve(arena, self._loaded.layout, capacity_tokens, received_end)
        assert kv is not None, "the arena was made for this"
        return kv

    def _restored(self, arena: Arena, prompt: Prompt, capacity_tokens: int) -> RequestKv:
        """The prompt's KV in memory, as if it had come over the wire."""
        tokens = TokenRange(0, len(prompt.token_ids) - 1)
        kv = self._carve(arena, capacity_tokens, tokens.end)
        source = memoryview(prompt.kv)
        for row in rows(self._loaded.layout, tokens):
            kv.row(row.layer, row.tensor_index, row.extent, row.row)[:] = source[
                row.start : row.start + row.extent.row_bytes
            ]
        return kv


def _note(told: Any, outputs: dict[int, list[int]]) -> None:
    for row, event in told:
        if isinstance(event, Exception):
            raise EngineError(str(event))
        if isinstance(event, TokenEvent):
            outputs[id(row)].append(event.token_id)
