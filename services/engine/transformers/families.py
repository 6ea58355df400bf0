"""The model types that have been verified, and how each is driven one decoder layer at a time.

Verified means: `tests/services/engine_transformers/test_families.py` shows for this type that chunked prefill in one
engine, a transfer, and ragged batched decode in another give `generate`'s tokens. A type that is not in VERIFIED is
refused at load; adding one is a line here and a line there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from prfaas.common.errors import ModelRefusedError
from prfaas.services.engine.transformers.output_head import output_head

# These scale the rotary frequencies with the length seen so far: a batch of several lengths has no one such length.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class LayerwiseModel:
    """A causal language model whose decoder layers run one call each.

    hidden is [rows, tokens, hidden_size], positions [rows, tokens]. `cache` is what the layer's attention and state
    modules talk to (attention.py). Nothing is kept between calls: a row may pause after any layer and go on later, in
    another batch.
    """

    norm_name = "norm"

    def __init__(self, causal_lm: Any) -> None:
        self.config = causal_lm.config
        self._output_head = output_head(causal_lm.lm_head)
        self._decoder = causal_lm.model
        self._layers = list(self._decoder.layers)
        self._norm = getattr(self._decoder, self.norm_name)
        self.layer_count = len(self._layers)

    @staticmethod
    def refusal(config: Any) -> str | None:
        """Why this variant of the family has not been verified, or None."""
        return None

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._decoder.embed_tokens(token_ids)

    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        """Rotary embeddings for `run_layer`; they depend on the positions alone."""
        return self._decoder.rotary_emb(hidden, positions)

    def run_layer(
        self, index: int, hidden: torch.Tensor, positions: torch.Tensor, rotary: Any, cache: Any
    ) -> torch.Tensor:
        return self._layers[index](
            hidden, attention_mask=None, position_ids=positions, past_key_values=cache, position_embeddings=rotary
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [rows, vocabulary] of each row's last token."""
        return self._head(self._norm(hidden[:, -1])).float()

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._output_head(hidden)


class Gemma3(LayerwiseModel):
    """Sliding and full layers, each kind with its own rotary embedding; soft-capped logits."""

    @staticmethod
    def refusal(config: Any) -> str | None:
        return "bidirectional attention" if getattr(config, "use_bidirectional_attention", False) else None

    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        kinds = set(self.config.layer_types)
        return {kind: self._decoder.rotary_emb(hidden, positions, kind) for kind in kinds}

    def run_layer(
        self, index: int, hidden: torch.Tensor, positions: torch.Tensor, rotary: Any, cache: Any
    ) -> torch.Tensor:
        return super().run_layer(index, hidden, positions, rotary[self.config.layer_types[index]], cache)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super()._head(hidden)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap


class FalconH1(LayerwiseModel):
    """Attention and Mamba side by side in each layer; multipliers on embedding and logits."""

    norm_name = "final_layernorm"

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return super().embed(token_ids) * self._decoder.embedding_multiplier

    def run_layer(
        self, index: int, hidden: torch.Tensor, positions: torch.Tensor, rotary: Any, cache: Any
    ) -> torch.Tensor:
        return super().run_layer(index, hidden, positions, rotary, cache)[0]

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return super()._head(hidden) * self._decoder.lm_head_multiplier


VERIFIED: Mapping[str, type[LayerwiseModel]] = {
    "llama": LayerwiseModel,
    "qwen3": LayerwiseModel,
    "gemma3_text": Gemma3,
    "qwen3_next": LayerwiseModel,
    "falcon_h1": FalconH1,
}


def family_of(config: Any) -> type[LayerwiseModel]:
    """The verified way to drive a model of this configuration. Raises ModelRefusedError."""
    family = VERIFIED.get(config.model_type)
    if family is None:
        raise ModelRefusedError(
            f"model type {config.model_type!r} has not been verified with disaggregated prefill; "
            f"verified types: {', '.join(VERIFIED)}"
        )
    reason = family.refusal(config) or _rope_refusal(config)
    if reason is not None:
        raise ModelRefusedError(f"model type {config.model_type!r} with {reason} has not been verified")
    return family


def _rope_refusal(config: Any) -> str | None:
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [p for p in parameters.values() if isinstance(p, Mapping)] or [parameters]
    for kind in kinds:
        if kind.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            return f"rope type {kind['rope_type']!r} (its frequencies depend on the length seen)"
    return None
