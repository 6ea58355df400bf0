"""vLLM's cache groups as a KV layout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prfaas.common.errors import ConfigError
from prfaas.common.kv_layout import TensorKind
from prfaas.services.engine.vllm.model_layout import Heads, heads_of_rank, model_kv


class FullAttentionSpec(SimpleNamespace):
    pass


class SlidingWindowSpec(SimpleNamespace):
    pass


class MLAAttentionSpec(SimpleNamespace):
    pass


class MambaSpec(SimpleNamespace):
    pass


class ChunkedLocalAttentionSpec(SimpleNamespace):
    pass


FULL = FullAttentionSpec(dtype="bfloat16", head_size=64, head_size_v=64, sliding_window=None)
MAMBA = MambaSpec(shapes=((3, 160), (8, 16, 16)), dtypes=("bfloat16", "float32"), tp_replicated=False)


def layout_of(groups: Any, layers: int, heads: int = 4, rank: int = 0, ranks: int = 1) -> Any:
    return model_kv(groups, layers, heads, rank, ranks, lambda name: int(name.split(".")[1]), str)


def test_attention_has_a_key_and_a_value_a_layer() -> None:
    kv = layout_of([(FULL, ["layers.0.attn", "layers.1.attn"])], 2)
    assert [[t.kind for t in layer.tensors] for layer in kv.layout.layers] == [[TensorKind.KEY, TensorKind.VALUE]] * 2
    assert kv.parts["layers.1.attn"].layer == 1
    assert kv.layout.layers[0].tensors[0].heads == 4


def test_a_window_is_what_a_token_sees_besides_itself() -> None:
    spec = SlidingWindowSpec(dtype="bfloat16", head_size=64, head_size_v=64, sliding_window=48)
    kv = layout_of([(FULL, ["layers.0.attn"]), (spec, ["layers.1.attn"])], 2)
    assert [layer.tensors[0].window_tokens for layer in kv.layout.layers] == [None, 47]
    assert kv.parts["layers.1.attn"].group == 1


def test_a_mixer_beside_attention_comes_behind_it() -> None:
    """Falcon-H1: vLLM numbers the mixers on from the attention modules."""
    kv = layout_of([(MAMBA, ["layers.2.mixer", "layers.3.mixer"]), (FULL, ["layers.0.attn", "layers.1.attn"])], 2)
    kinds = [TensorKind.KEY, TensorKind.VALUE, TensorKind.CONV, TensorKind.RECURRENT]
    assert [[t.kind for t in layer.tensors] for layer in kv.layout.layers] == [kinds, kinds]
    assert kv.parts["layers.3.mixer"].tensors == (2, 3)
    assert kv.parts["layers.3.mixer"].is_state


def test_latents_have_one_row_for_all_ranks() -> None:
    spec = MLAAttentionSpec(dtype="bfloat16", head_size=576, head_size_v=0)
    kv = layout_of([(spec, ["layers.0.attn"])], 1, ranks=4, rank=2)
    (latent,) = kv.layout.layers[0].tensors
    assert (latent.kind, latent.heads, latent.dims) == (TensorKind.LATENT, 1, (576,))


def test_a_layer_without_a_cache_has_no_tensors() -> None:
    kv = layout_of([(FULL, ["layers.1.attn"])], 2)
    assert kv.layout.layers[0].tensors == ()


def test_states_of_several_ranks_stand_side_by_side() -> None:
    kv = layout_of([(MAMBA, ["layers.0.mixer"])], 1, ranks=2)
    assert [t.dims for t in kv.layout.layers[0].tensors] == [(2, 3, 160), (2, 8, 16, 16)]


@pytest.mark.parametrize(
    ("total", "ranks", "rank", "heads"),
    [
        (8, 1, 0, Heads(0, 8, True)),
        (8, 4, 3, Heads(6, 8, True)),
        (2, 4, 0, Heads(0, 1, True)),
        (2, 4, 1, Heads(0, 1, False)),
        (2, 4, 2, Heads(1, 2, True)),
    ],
)
def test_each_rank_has_its_heads(total: int, ranks: int, rank: int, heads: Heads) -> None:
    assert heads_of_rank(total, ranks, rank) == heads


def test_other_caches_are_refused() -> None:
    spec = ChunkedLocalAttentionSpec(dtype="bfloat16", head_size=64, head_size_v=64)
    with pytest.raises(ConfigError, match="ChunkedLocalAttentionSpec"):
        layout_of([(spec, ["layers.0.attn"])], 1)
    with pytest.raises(ConfigError, match="none of the model's 1"):
        layout_of([(FULL, ["layers.5.attn"])], 1)
