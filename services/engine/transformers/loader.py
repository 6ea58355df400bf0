"""From a directory or a Hugging Face id to a model that can be driven: refusal, fingerprint, weights, KV layout."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from prfaas.common.config import EngineConfig
from prfaas.common.errors import ConfigError, ModelRefusedError
from prfaas.common.kv_layout import KvLayout, LayerLayout, TensorKind, TensorLayout
from prfaas.services.engine.model_files import fingerprint, weight_files
from prfaas.services.engine.tokenizer import read_eos_token_ids
from prfaas.services.engine.transformers import attention
from prfaas.services.engine.transformers.families import LayerwiseModel, family_of
from prfaas.services.engine.transformers.kv_memory import LAYOUT_DTYPES, TORCH_DTYPES
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: LayerwiseModel
    fingerprint: str
    layout: KvLayout
    max_model_tokens: int
    vocabulary: int
    eos_token_ids: tuple[int, ...]


_LOADING = threading.Lock()
"""transformers replaces functions of its own while it loads (`no_tie_weights`, torch's default dtype): of two loads at
a time the one that ends last would leave them so, and later models of this process without their output weights."""


def load(config: EngineConfig) -> LoadedModel:
    """Read the model that `config` names. Blocks for seconds.

    Raises ConfigError (no such model, no safetensors), ModelRefusedError (before any weight is read).
    """
    if config.device != "cpu":
        raise ConfigError([f"engine.device = {config.device!r}: this engine computes on the CPU only so far"])
    try:
        model_config = AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError) as error:
        raise _config_error(config.model, error) from error
    family = family_of(model_config)
    directory = _directory(config.model)
    weight_files(directory)
    dtype = _dtype(config, model_config)
    transformers_logging.disable_progress_bar()  # a service's stderr is its log
    # transformers' own attention first: the layout is read off what its cache holds.
    with _LOADING:
        causal_lm = AutoModelForCausalLM.from_pretrained(
            directory, dtype=_compute_dtype(dtype), use_safetensors=True, attn_implementation="sdpa"
        ).eval()
    layout = _probe_layout(causal_lm, LAYOUT_DTYPES[dtype])
    attention.register()
    causal_lm.set_attn_implementation(attention.ATTENTION_NAME)
    return LoadedModel(
        model=family(causal_lm),
        fingerprint=fingerprint(directory),
        layout=layout,
        max_model_tokens=_max_model_tokens(config, model_config),
        vocabulary=model_config.vocab_size,
        eos_token_ids=read_eos_token_ids(directory),
    )


def _config_error(model: str, error: Exception) -> ConfigError | ModelRefusedError:
    """transformers knows a model type by its config.json; one that it doesn't know has not been verified either."""
    if isinstance(error, ValueError) and "model type" in str(error):
        return ModelRefusedError(f"the model type of {model!r} is unknown to the installed transformers")
    reason = str(error).strip().split("\n")[0]
    return ConfigError([f"engine.model = {model!r}: no such directory or Hugging Face model ({reason})"])


def _directory(model: str) -> Path:
    path = Path(model)
    if path.is_dir():
        return path
    return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))


def _dtype(config: EngineConfig, model_config: Any) -> torch.dtype:
    """Of the model as configured, and so of its KV."""
    dtype = model_config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    if dtype not in LAYOUT_DTYPES:
        names = ", ".join(TORCH_DTYPES)
        raise ConfigError([f"engine.dtype = {config.dtype!r}: the model's dtype is {dtype}; name one of {names}"])
    return dtype


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 where the CPU can't multiply in `dtype`: torch then emulates it at a tenth of the speed. The KV keeps
    `dtype` all the same."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype not in supported or supported[dtype]() else torch.float32


def _max_model_tokens(config: EngineConfig, model_config: Any) -> int:
    own = int(model_config.max_position_embeddings)
    if config.max_model_tokens > own:
        raise ConfigError([f"engine.max_model_tokens = {config.max_model_tokens}: the model has {own} positions"])
    return config.max_model_tokens or own


def _probe_layout(causal_lm: Any, dtype: str) -> KvLayout:
    """Run two tokens and look at what transformers' cache holds of each layer: real shapes, real dtypes.

    What the model holds in its own dtype is kept in `dtype`; recurrent states are float32 in all dtypes.
    """
    cache = DynamicCache(config=causal_lm.config)
    with torch.inference_mode():
        causal_lm(torch.zeros((1, 2), dtype=torch.long), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return KvLayout(tuple(LayerLayout(tuple(_tensors_of(layer, dtype))) for layer in cache.layers))


def _tensors_of(layer: Any, dtype: str) -> list[TensorLayout]:
    tensors = []
    if getattr(layer, "keys", None) is not None:
        # A token at position p attends to p − W < k ≤ p: W − 1 tokens besides itself.
        window = layer.sliding_window - 1 if getattr(layer, "is_sliding", False) else None
        for kind, tensor in ((TensorKind.KEY, layer.keys), (TensorKind.VALUE, layer.values)):
            _, heads, _, dim = tensor.shape
            tensors.append(TensorLayout(kind, dtype, heads, (dim,), window))
    if getattr(layer, "number_of_states", 0) > 1:
        raise ModelRefusedError("layers with several convolution states have not been verified")
    for kind, states in ((TensorKind.CONV, "conv_states"), (TensorKind.RECURRENT, "recurrent_states")):
        state = getattr(layer, states, {}).get(0)
        if state is not None:
            state_dtype = dtype if kind is TensorKind.CONV else LAYOUT_DTYPES[state.dtype]
            tensors.append(TensorLayout(kind, state_dtype, 1, tuple(state.shape[1:])))
    return tensors
