"""The engine's load for `prfaas bench link --engine-busy`: prefill of a real model in one torch thread."""

from __future__ import annotations

import os
import threading

MODEL_VARIABLE = "PRFAAS_BENCH_MODEL"
STEP_TOKENS = 512


def prefill_load(stop: threading.Event, ready: threading.Event) -> None:
    """Prefill 512 tokens again and again until `stop`; sets `ready` after the first time. The model's directory is in
    the environment (PRFAAS_BENCH_MODEL)."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        os.environ[MODEL_VARIABLE], dtype=torch.bfloat16, local_files_only=True
    )
    ids = torch.arange(STEP_TOKENS).unsqueeze(0)
    with torch.inference_mode():
        while not stop.is_set():
            model(ids, use_cache=True, logits_to_keep=1)
            ready.set()
