"""The engine's load for `prfaas bench link --engine-busy`: the engine prefills a real model in one torch thread."""

from __future__ import annotations

import os
import threading

MODEL_VARIABLE = "PRFAAS_BENCH_MODEL"
"""Its directory, for the processes of the benchmark."""


def prefill_load(stop: threading.Event, ready: threading.Event) -> None:
    """Blocks until `stop`; sets `ready` when the model is loaded and the first step begins."""
    from prfaas.services.engine.transformers.busy import busy_load

    busy_load(stop, os.environ[MODEL_VARIABLE], ready=ready)
