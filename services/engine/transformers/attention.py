"""What stands between a decoder layer of transformers and KV memory on the arena.

A layer's attention calls `cache.update(keys, values, layer)` and hands what that returns to the attention function of
the model's `_attn_implementation`. Ours writes the new keys and values where they belong and returns a *context* that
knows how to attend; the registered function only asks it. So neither a copy of the KV nor a global is needed, and the
layers' own code (projections, norms, rotary embedding, gates) stays transformers'.

`PrefillCache`: one request, many tokens. `RaggedCache`: many requests of different lengths, one token each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from prfaas.services.engine.transformers.kv_memory import LayerKv, RequestKv
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION_NAME = "prfaas"


def register() -> None:
    """Make ATTENTION_NAME known to transformers; idempotent."""
    AttentionInterface.register(ATTENTION_NAME, _attend)


def _attend(
    module: Any, query: torch.Tensor, key: Context, value: Any, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    return key.attend(query, scaling).to(query.dtype), None


class Context(Protocol):
    def attend(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """query [rows, heads, tokens, head_dim] -> [rows, tokens, heads, head_dim]."""
        ...


class PrefillCache:
    """The KV of one request while tokens [start, end) are computed."""

    def __init__(self, kv: RequestKv, start: int, end: int) -> None:
        self._layers = kv.layers
        self._start = start
        self._end = end
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    # -- attention ----------------------------------------------------------------------------------------------------

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any) -> tuple[Context, None]:
        layer = self._layers[layer_idx]
        assert layer.keys is not None
        assert layer.values is not None
        slots = slice(self._start - layer.first_token, self._end - layer.first_token)
        layer.keys[:, slots] = keys[0]
        layer.values[:, slots] = values[0]
        return _PrefillContext(self, layer), None

    def attend(self, layer: LayerKv, query: torch.Tensor, scaling: float) -> torch.Tensor:
        assert layer.keys is not None
        assert layer.values is not None
        low = layer.visible_from(self._start)
        slots = slice(low - layer.first_token, self._end - layer.first_token)
        keys, values = layer.keys[None, :, slots], layer.values[None, :, slots]
        query = query.to(keys.dtype)
        causal = low == self._start == 0 and (layer.window_tokens is None or self._end - 1 <= layer.window_tokens)
        mask = None if causal else self._mask(low, layer.window_tokens, query)
        output = scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2)

    def _mask(self, low: int, window_tokens: int | None, query: torch.Tensor) -> torch.Tensor:
        """Additive [tokens, visible tokens]; the layers of one kind share it."""
        mask = self._masks.get((low, window_tokens))
        if mask is None:
            queries = torch.arange(self._start, self._end, device=query.device)[:, None]
            positions = torch.arange(low, self._end, device=query.device)[None]
            hidden = positions > queries
            if window_tokens is not None:
                hidden |= positions < queries - window_tokens
            mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)
            self._masks[low, window_tokens] = mask
        return mask

    # -- convolution and recurrent states -----------------------------------------------------------------------------

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._layers[layer_idx].conv if self._start else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._layers[layer_idx].recurrent if self._start else None

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> torch.Tensor:
        """Keep the last columns; return the new ones behind the kept ones, which the convolution looks back on."""
        state = self._layers[layer_idx].conv
        assert state is not None
        width = state.shape[-1]
        if self._start:
            conv_states = torch.cat([state, conv_states], dim=-1)
        elif conv_states.shape[-1] < width:
            conv_states = pad(conv_states, (width - conv_states.shape[-1], 0))
        state.copy_(conv_states[..., -width:])
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0
    ) -> torch.Tensor:
        state = self._layers[layer_idx].recurrent
        assert state is not None
        return state.copy_(recurrent_states)


class _PrefillContext:
    __slots__ = ("_cache", "_layer")

    def __init__(self, cache: PrefillCache, layer: LayerKv) -> None:
        self._cache = cache
        self._layer = layer

    def attend(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        return self._cache.attend(self._layer, query, scaling)


class RaggedCache:
    """The KV of a batch of requests, one new token each, at its own position.

    States are stacked for the layer's call and written back by `store_states`, since the layers update them in place.
    """

    def __init__(self, kvs: Sequence[RequestKv], positions: Sequence[int]) -> None:
        self._kvs = kvs
        self._positions = positions
        self._stacked: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        self._recurrent: torch.Tensor | None = None

    # -- attention ----------------------------------------------------------------------------------------------------

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any) -> tuple[Context, None]:
        visible = []
        new_keys, new_values = keys.squeeze(2).unbind(), values.squeeze(2).unbind()
        for row, (kv, position) in enumerate(zip(self._kvs, self._positions, strict=True)):
            layer = kv.layers[layer_idx]
            assert layer.keys is not None
            assert layer.values is not None
            slot = position - layer.first_token
            layer.keys.select(1, slot).copy_(new_keys[row])
            layer.values.select(1, slot).copy_(new_values[row])
            low = layer.visible_from(position) - layer.first_token
            visible.append((layer.keys[:, low : slot + 1], layer.values[:, low : slot + 1]))
        return _RaggedContext(visible), None

    # -- convolution and recurrent states -----------------------------------------------------------------------------

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        return self._stack([kv.layers[layer_idx].conv for kv in self._kvs])

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        self._recurrent = self._stack([kv.layers[layer_idx].recurrent for kv in self._kvs])
        return self._recurrent

    def _stack(self, states: list[torch.Tensor | None]) -> torch.Tensor:
        present = [state for state in states if state is not None]
        if len(present) == 1:
            return present[0]
        stacked = torch.cat(present)
        self._stacked.append((stacked, present))
        return stacked

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0
    ) -> torch.Tensor:
        assert self._recurrent is not None
        return self._recurrent.copy_(recurrent_states)

    def store_states(self) -> None:
        """After a layer: write states that it updated in place back to their requests."""
        for stacked, rows in self._stacked:
            for target, state in zip(rows, stacked.split(1), strict=True):
                target.copy_(state)
        self._stacked.clear()


class _RaggedContext:
    __slots__ = ("_visible",)

    def __init__(self, visible: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._visible = visible

    def attend(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """One call a row, with the query heads of one KV head as its query tokens: on CPU that is up to five times as
        fast as `enable_gqa`, which reads the KV once a query head."""
        rows, heads, _, dim = query.shape
        outputs = []
        for row, (keys, values) in zip(query.to(self._visible[0][0].dtype).unbind(), self._visible, strict=True):
            kv_heads = keys.shape[0]
            grouped = row.reshape(1, kv_heads, heads // kv_heads, dim)
            outputs.append(scaled_dot_product_attention(grouped, keys[None], values[None], scale=scaling))
        return torch.cat(outputs).view(rows, 1, heads, -1)
