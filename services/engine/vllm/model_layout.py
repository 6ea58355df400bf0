"""vLLM's KV cache groups as this project's KV layout, and which of vLLM's layers is which of its tensors.

vLLM names what holds KV by module ("model.layers.5.self_attn.attn") and puts modules of one kind into a group with a
block table of its own. A layer of the model may have several (attention beside a recurrent mixer), or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prfaas.common.errors import ConfigError
from prfaas.common.kv_layout import KvLayout, LayerLayout, TensorKind, TensorLayout


@dataclass(frozen=True, slots=True)
class Heads:
    """KV heads [start, end) of the model that a rank has; `sends`: of the ranks that have the same ones, the first."""

    start: int
    end: int
    sends: bool


def heads_of_rank(total: int, ranks: int, rank: int) -> Heads:
    """With more ranks than heads each head is on several, as vLLM does it."""
    if ranks <= total:
        each = total // ranks
        return Heads(rank * each, (rank + 1) * each, True)
    copies = ranks // total
    return Heads(rank // copies, rank // copies + 1, rank % copies == 0)


@dataclass(frozen=True, slots=True)
class Part:
    """One of vLLM's modules. layer: of the model. group: of the block tables. tensors: its own, in the layer's
    layout."""

    name: str
    layer: int
    group: int
    tensors: tuple[int, ...]
    is_state: bool
    spec: Any


@dataclass(frozen=True, slots=True)
class ModelKv:
    layout: KvLayout
    parts: Mapping[str, Part]
    heads: Heads
    """Of this rank, where a tensor has heads."""
    rank: int
    ranks: int


def model_kv(
    groups: Sequence[tuple[Any, Sequence[str]]],
    layers: int,
    total_heads: int,
    rank: int,
    ranks: int,
    layer_index: Any,
    dtype_name: Any,
) -> ModelKv:
    """groups: of vLLM, each a spec and its layers' names. layers: of the model. layer_index(name): which of them.
    dtype_name(dtype): as in the layout; it raises ConfigError for one that has no name there.

    Raises ConfigError for a kind of cache that has no canonical form here.
    """
    parts: list[list[tuple[str, int, Any]]] = [[] for _ in range(layers)]
    for group, (spec, names) in enumerate(groups):
        for name in names:
            index = layer_index(name)
            if index >= layers and hasattr(spec, "shapes"):
                index -= layers  # Falcon-H1's mixers are numbered on from the attention modules beside them
            if index >= layers:
                raise ConfigError([f"vLLM's layer {name} is none of the model's {layers} (a draft model's?)"])
            parts[index].append((name, group, getattr(spec, "kv_cache_specs", {}).get(name, spec)))
    found, layout = {}, []
    for index, modules in enumerate(parts):
        tensors: list[TensorLayout] = []
        # Attention first, as transformers' caches have it, so that either engine can feed the other.
        for name, group, spec in sorted(modules, key=lambda module: hasattr(module[2], "shapes")):
            own = _tensors(name, spec, total_heads, ranks, dtype_name)
            numbers = tuple(range(len(tensors), len(tensors) + len(own)))
            found[name] = Part(name, index, group, numbers, hasattr(spec, "shapes"), spec)
            tensors += own
        layout.append(LayerLayout(tuple(tensors)))
    return ModelKv(KvLayout(tuple(layout)), found, heads_of_rank(total_heads, ranks, rank), rank, ranks)


def _tensors(name: str, spec: Any, total_heads: int, ranks: int, dtype_name: Any) -> list[TensorLayout]:
    kind = type(spec).__name__
    if hasattr(spec, "shapes"):
        kinds = [TensorKind.CONV] * (len(spec.shapes) - 1) + [TensorKind.RECURRENT]
        if len(spec.shapes) == 1:
            kinds = [TensorKind.CONV]
        # Each rank has a shard of its own form: both sides need as many ranks.
        front = () if ranks == 1 or spec.tp_replicated else (ranks,)
        return [
            TensorLayout(kind, dtype_name(dtype), 1, (*front, *shape))
            for kind, shape, dtype in zip(kinds, spec.shapes, spec.dtypes, strict=True)
        ]
    if kind not in ("FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec"):
        raise ConfigError([f"vLLM's layer {name} has a cache of kind {kind}, which can't be sent yet"])
    dtype = dtype_name(spec.dtype)
    if kind == "MLAAttentionSpec":
        return [TensorLayout(TensorKind.LATENT, dtype, 1, (spec.head_size,))]
    # A token at position p attends to p − W < k ≤ p: W − 1 tokens besides itself.
    window = getattr(spec, "sliding_window", None)
    window = window - 1 if window else None
    return [
        TensorLayout(TensorKind.KEY, dtype, total_heads, (spec.head_size,), window),
        TensorLayout(TensorKind.VALUE, dtype, total_heads, (spec.head_size_v or spec.head_size,), window),
    ]
