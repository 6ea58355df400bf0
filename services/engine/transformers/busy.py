"""The load of a node that prefills, for the transport's benchmark: does a computing thread slow the event loop down?"""

from __future__ import annotations

import threading

import torch
from prfaas.common.config import EngineConfig
from prfaas.services.engine.transformers import kv_memory, loader
from prfaas.services.engine.transformers.prefill import PrefillJob, run_step
from prfaas.transport.arena import Arena

_PROMPT_TOKENS = 2048


def busy_load(stop: threading.Event, model: str, dtype: str = "auto", ready: threading.Event | None = None) -> None:
    """Prefill a prompt of 2,048 tokens again and again until `stop` is set. Blocks: run it in a thread.

    model: directory or Hugging Face id. `ready` is set when the model is loaded and the first step begins.
    """
    config = EngineConfig(model=model, dtype=dtype)  # type: ignore[arg-type]
    torch.set_num_threads(config.threads)
    loaded = loader.load(config)
    needed = kv_memory.plan(loaded.layout, _PROMPT_TOKENS).total_bytes
    kv = kv_memory.carve(Arena(needed), loaded.layout, _PROMPT_TOKENS)
    assert kv is not None
    tokens = [token % loaded.vocabulary for token in range(_PROMPT_TOKENS)]
    if ready is not None:
        ready.set()
    with torch.inference_mode():
        while not stop.is_set():
            job = PrefillJob(tokens, len(tokens), kv, None, lambda computed, tokens, s: None, lambda error: None, 0.0)
            while job.remaining_tokens and not stop.is_set():
                for _ in run_step(loaded.model, job, config.prefill_step_tokens):
                    pass
    kv.free()
