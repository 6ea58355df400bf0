"""Loading a model, several at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from prfaas.common.config import EngineConfig
from prfaas.services.engine.transformers.loader import load
from transformers import PreTrainedModel


def test_engines_that_load_at_a_time_leave_the_library_as_it_was(tiny_model: Callable[[str], Path]) -> None:
    """transformers replaces its own functions while it loads; a model with tied output weights that is loaded later
    would else have none."""
    before, dtype = PreTrainedModel.tie_weights, torch.get_default_dtype()
    configs = [EngineConfig(model=str(tiny_model(model_type))) for model_type in ("llama", "qwen3")]
    with ThreadPoolExecutor(4) as threads:
        loaded = list(threads.map(load, configs * 4))
    assert len({each.fingerprint for each in loaded}) == 2
    assert PreTrainedModel.tie_weights is before
    assert torch.get_default_dtype() == dtype
