"""Where one transfer's KV lies in the memory that node and vLLM share. Pure: both sides compute the same places.

    region   | layer 0: tensor 0: head 0 [tokens], head 1 [tokens] … | tensor 1 … | layer 1 …

Canonical order (common/kv_layout.py) of the transfer's token range and nothing else; each tensor begins at a multiple
of ALIGN_BYTES.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from prfaas.common.kv_layout import Extent, KvLayout, TokenRange

ALIGN_BYTES = 64


@dataclass(frozen=True)
class StagingPlan:
    """Of one transfer. Offsets count from the region's start."""

    layout: KvLayout
    tokens: TokenRange

    @cached_property
    def extents(self) -> list[list[Extent]]:
        return self.layout.extents(self.tokens)

    @cached_property
    def _offsets(self) -> tuple[list[list[int]], int]:
        offset, places = 0, []
        for layer in self.extents:
            row = []
            for extent in layer:
                row.append(offset)
                offset += -(-extent.total_bytes // ALIGN_BYTES) * ALIGN_BYTES
            places.append(row)
        return places, offset

    @property
    def total_bytes(self) -> int:
        return max(ALIGN_BYTES, self._offsets[1])

    def offset(self, layer: int, tensor: int, row: int = 0) -> int:
        """Of a row's first byte."""
        return self._offsets[0][layer][tensor] + row * self.extents[layer][tensor].row_bytes
