"""A request's KV on the arena: where each tensor lies, torch views on it, and the same bytes for the transport.

    region of one request in the arena
    ├── layer 0  key   [kv_head, capacity, head_dim]     a head's tokens are contiguous: one row of the canonical order
    │            value [kv_head, capacity, head_dim]
    │            conv, recurrent                         whole, C order
    ├── layer 1  ...

Slot 0 of a key or value tensor holds token `first_token`: 0, or where the window begins when only the window comes
over the wire. The transport receives into, and sends from, these bytes; nothing is copied in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from prfaas.common.kv_layout import Extent, KvLayout, TensorKind, TensorLayout
from prfaas.transport.api import KvPiece, TransferSpec
from prfaas.transport.arena import Arena, Region

_ALIGN_BYTES = 64
TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LAYOUT_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor in a request's region. For states capacity_tokens is 0 and row_bytes the whole state."""

    offset_bytes: int
    row_bytes: int
    first_token: int
    capacity_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Places of every tensor, `places[layer][tensor]`, and the size of the whole."""

    places: tuple[tuple[Place, ...], ...]
    total_bytes: int


def plan(layout: KvLayout, capacity_tokens: int, received_end: int | None = None) -> Plan:
    """Lay out room for tokens [0, capacity_tokens).

    received_end: the KV up to this token comes over the wire or from a prefix, so windowed tensors need no room before
    their window.
    """
    offset = 0
    layers = []
    for layer in layout.layers:
        places = []
        for tensor in layer.tensors:
            place = _place(tensor, offset, capacity_tokens, received_end)
            places.append(place)
            offset += _aligned(tensor.heads * place.row_bytes)
        layers.append(tuple(places))
    return Plan(tuple(layers), max(offset, _ALIGN_BYTES))


def _place(tensor: TensorLayout, offset: int, capacity_tokens: int, received_end: int | None) -> Place:
    if tensor.kind.is_state:
        return Place(offset, tensor.fixed_bytes, 0, 0)
    first = 0
    if received_end is not None and tensor.window_tokens is not None:
        first = max(0, received_end - tensor.window_tokens)
    tokens = capacity_tokens - first
    return Place(offset, tokens * tensor.row_bytes_per_token, first, tokens)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES


@dataclass(slots=True)
class LayerKv:
    """Torch views of one layer. keys, values: [kv_head, capacity, head_dim]; conv, recurrent: [1, *dims].

    window_tokens: how many earlier tokens a token attends to, None = all.
    """

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    first_token: int = 0
    window_tokens: int | None = None
    conv: torch.Tensor | None = None
    recurrent: torch.Tensor | None = None

    def visible_from(self, position: int) -> int:
        """The first token that the token at `position` attends to."""
        return 0 if self.window_tokens is None else max(0, position - self.window_tokens)


class RequestKv:
    """Owns its region from `carve` to `free`. Both are called on the loop's thread; the views are for the worker."""

    def __init__(self, layout: KvLayout, planned: Plan, region: Region) -> None:
        self.layout = layout
        self._plan = planned
        self._region: Region | None = region
        self._view = region.view
        self.layers = [self._layer_views(index) for index in range(len(layout.layers))]

    def _layer_views(self, index: int) -> LayerKv:
        layer = LayerKv()
        for tensor, place in zip(self.layout.layers[index].tensors, self._plan.places[index], strict=True):
            if tensor.kind.is_state:
                view = self._torch_view(tensor, place, (1, *tensor.dims))
            else:
                view = self._torch_view(tensor, place, (tensor.heads, place.capacity_tokens, *tensor.dims))
                layer.first_token, layer.window_tokens = place.first_token, tensor.window_tokens
            setattr(layer, _VIEW_NAMES[tensor.kind], view)
        return layer

    def _torch_view(self, tensor: TensorLayout, place: Place, shape: tuple[int, ...]) -> Any:
        dtype = TORCH_DTYPES[tensor.dtype]
        return torch.frombuffer(self._view, dtype=dtype, count=prod(shape), offset=place.offset_bytes).view(shape)

    def clear_states(self) -> None:
        """Recycled memory holds another request's state; a prompt that is computed from its start begins with zeros."""
        for layer in self.layers:
            for state in (layer.conv, layer.recurrent):
                if state is not None:
                    state.zero_()

    def row(self, layer: int, tensor: int, extent: Extent, row: int) -> memoryview:
        """Bytes of row `row` of an extent: tokens of one head, or a whole state."""
        return self.row_tokens(layer, tensor, extent, row, extent.token_start, extent.token_start + extent.tokens)

    def row_tokens(self, layer: int, tensor: int, extent: Extent, row: int, start: int, end: int) -> memoryview:
        """The same for tokens [start, end) of the row; a state ignores them."""
        return self.head_tokens(layer, tensor, extent.first_head + row, start, end)

    def head_tokens(self, layer: int, tensor: int, head: int, start: int, end: int) -> memoryview:
        """Bytes of tokens [start, end) of one head; of a state all of it."""
        place = self._plan.places[layer][tensor]
        spec = self.layout.layers[layer].tensors[tensor]
        if spec.kind.is_state:
            return self._view[place.offset_bytes : place.offset_bytes + place.row_bytes]
        per_token = spec.row_bytes_per_token
        begin = place.offset_bytes + head * place.row_bytes
        begin += (start - place.first_token) * per_token
        return self._view[begin : begin + (end - start) * per_token]

    def first_token(self, layer: int, tensor: int) -> int:
        """That there is room for."""
        return self._plan.places[layer][tensor].first_token

    def pieces(self, layer: int, extents: list[Extent], start: int, end: int, last: bool) -> Iterator[KvPiece]:
        """What a transfer with these extents (one a tensor) gets when tokens [start, end) of a layer are computed;
        states leave after the `last` step."""
        for tensor, extent in enumerate(extents):
            spec = self.layout.layers[layer].tensors[tensor]
            if spec.kind.is_state:
                if last and extent.rows:
                    yield KvPiece(layer, tensor, 0, 0, self.row(layer, tensor, extent, 0))
                continue
            low, high = max(start, extent.token_start), min(end, extent.token_start + extent.tokens)
            if low >= high:
                continue
            offset = (low - extent.token_start) * spec.row_bytes_per_token
            for row in range(extent.rows):
                yield KvPiece(layer, tensor, row, offset, self.row_tokens(layer, tensor, extent, row, low, high))

    def free(self) -> None:
        """Give the region back. Idempotent. The caller has made sure that neither worker nor transport touches it."""
        if self._region is not None:
            self.layers = []
            self._region.free()
            self._region = None


_VIEW_NAMES = {
    TensorKind.KEY: "keys",
    TensorKind.VALUE: "values",
    TensorKind.CONV: "conv",
    TensorKind.RECURRENT: "recurrent",
}


class TransferDestination:
    """`transport.api.KvDestination` over a request's KV, for one transfer's range and shard."""

    def __init__(self, kv: RequestKv, layout: KvLayout, spec: TransferSpec) -> None:
        self._kv = kv
        self._layout = layout
        self._spec = spec

    def row(self, layer: int, tensor: int, row: int) -> memoryview:
        extent = self._layout.extent(layer, tensor, self._spec.tokens, self._spec.shard)
        return self._kv.row(layer, tensor, extent, row)


def carve(arena: Arena, layout: KvLayout, capacity_tokens: int, received_end: int | None = None) -> RequestKv | None:
    """Memory for one request, or None when the arena is momentarily full."""
    planned = plan(layout, capacity_tokens, received_end)
    region = arena.allocate(planned.total_bytes, align=_ALIGN_BYTES)
    return None if region is None else RequestKv(layout, planned, region)


def fits(arena: Arena, layout: KvLayout, capacity_tokens: int, received_end: int | None = None) -> bool:
    """Whether an empty arena would have room."""
    return plan(layout, capacity_tokens, received_end).total_bytes <= arena.total_bytes
