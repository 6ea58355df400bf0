"""Tiny random models of the families that are verified, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SMALL = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 4096,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_HYBRID = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 48,
        "query_pre_attn_scalar": 32,
        "final_logit_softcapping": 30.0,
    },
    "qwen3_next": {
        "layer_types": _HYBRID,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
    "falcon_h1": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_ssm": 128,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "mamba_chunk_size": 32,
        "mamba_d_conv": 4,
        "embedding_multiplier": 1.5,
        "lm_head_multiplier": 0.5,
        "key_multiplier": 0.7,
    },
}


def make_tiny_model(model_type: str, directory: Path) -> None:
    """In float32, always the same weights; without a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(_SMALL | TINY[model_type]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.5 if "embed" in name else 0.08)
    model.save_pretrained(directory)


def add_tokenizer(directory: Path) -> None:
    """A tokenizer whose words are the ids: the text of an output tells its tokens."""
    import tokenizers

    vocabulary = {f"t{i}": i for i in range(_SMALL["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t2", "bos_token": "t1", "unk_token": "t0"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
