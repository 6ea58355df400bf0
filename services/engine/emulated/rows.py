"""Where the rows of one transfer lie in a piece of memory: one after the other, in layout order. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from prfaas.common.kv_layout import Extent, KvLayout, Shard, TokenRange
from prfaas.services.engine.emulated.content import KvContent
from prfaas.services.engine.prefix_store import Hold
from prfaas.transport.api import KvPiece


class Rows:
    """The rows of a token range and a shard in `memory`, which has at least `KvLayout.total_bytes` of them.
    transport.api.KvDestination."""

    def __init__(self, memory: memoryview, layout: KvLayout, tokens: TokenRange, shard: Shard) -> None:
        self._memory = memory
        self._layout = layout
        self._tokens = tokens
        self._extents: list[list[tuple[int, Extent]]] = []
        offset = 0
        for layer, spec in enumerate(layout.layers):
            self._extents.append([])
            for tensor in range(len(spec.tensors)):
                extent = layout.extent(layer, tensor, tokens, shard)
                self._extents[layer].append((offset, extent))
                offset += extent.total_bytes

    def row(self, layer: int, tensor: int, row: int) -> memoryview:
        offset, extent = self._extents[layer][tensor]
        start = offset + row * extent.row_bytes
        return self._memory[start : start + extent.row_bytes]

    def write(self, content: KvContent, layer: int, start: int, end: int) -> list[KvPiece]:
        """Write tokens [start, end) of the layer, those before the range left out (a state with the range's last
        token); the pieces, ready to leave."""
        pieces = []
        start = max(start, self._tokens.start)
        for tensor, head, row, _ in self._rows_of(layer):
            spec = self._layout.layers[layer].tensors[tensor]
            if spec.kind.is_state:
                if end < self._tokens.end:
                    continue
                offset, data = 0, self.row(layer, tensor, row)
            elif start >= end:
                continue
            else:
                offset = (start - self._tokens.start) * spec.row_bytes_per_token
                stop = (end - self._tokens.start) * spec.row_bytes_per_token
                data = self.row(layer, tensor, row)[offset:stop]
            content.fill(data, layer, tensor, head, start, end)
            pieces.append(KvPiece(layer, tensor, row, offset, data))
        return pieces

    def copy(self, hold: Hold, layer: int) -> list[KvPiece]:
        """What a hold has of the layer (its state, if it is as long as the range); the pieces, ready to leave."""
        pieces = []
        end = min(hold.tokens, self._tokens.end)
        for tensor, head, row, _ in self._rows_of(layer):
            spec = self._layout.layers[layer].tensors[tensor]
            data = self.row(layer, tensor, row)
            if spec.kind.is_state:
                if hold.tokens < self._tokens.end:
                    continue
            elif end <= self._tokens.start:
                continue
            else:
                data = data[: (end - self._tokens.start) * spec.row_bytes_per_token]
            hold.read(layer, tensor, head, self._tokens.start, data)
            pieces.append(KvPiece(layer, tensor, row, 0, data))
        return pieces

    def first_wrong_byte(self, content: KvContent, layer: int) -> str | None:
        """Compare the whole layer with what a prefill of these tokens makes; says where they differ."""
        for tensor, head, row, extent in self._rows_of(layer):
            end = extent.token_start + extent.tokens
            offset = content.mismatch(self.row(layer, tensor, row), layer, tensor, head, extent.token_start, end)
            if offset is not None:
                kind = self._layout.layers[layer].tensors[tensor].kind
                return f"layer {layer}, tensor {tensor} ({kind}), row {row} (head {head}), byte {offset}"
        return None

    def _rows_of(self, layer: int) -> Iterator[tuple[int, int, int, Extent]]:
        """(tensor, KV head, row, extent)."""
        for tensor, (_, extent) in enumerate(self._extents[layer]):
            for row in range(extent.rows):
                yield tensor, extent.first_head + row, row, extent


def first_wrong_byte_held(hold: Hold, layout: KvLayout, content: KvContent, layer: int) -> str | None:
    """Compare what is held of the layer with what a prefill of these tokens makes; says where they differ."""
    for tensor, spec in enumerate(layout.layers[layer].tensors):
        for row in range(spec.heads):
            size = spec.fixed_bytes or hold.tokens * spec.row_bytes_per_token
            data = memoryview(bytearray(size))
            hold.read(layer, tensor, row, 0, data)
            offset = content.mismatch(data, layer, tensor, row, 0, hold.tokens)
            if offset is not None:
                return f"layer {layer}, tensor {tensor} ({spec.kind}), row {row}, byte {offset} of {hold.tokens} tokens"
    return None
