"""Tokens of one tensor of one layer, out of vLLM's paged cache and into it, in canonical order.

Called on vLLM's model thread. A block may hold tokens that aren't ours to touch (vLLM writes the new token's KV before
it asks for the layer), so the blocks at a range's ends are read, changed and written back whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from prfaas.services.engine.vllm.probe import BlockOrder


class PagedTensor:
    """Keys, values or latents of one layer. cache: as registered; its first dimension counts blocks of the kernel,
    `kernel_blocks` of which make one of the block table."""

    def __init__(self, cache: torch.Tensor, order: BlockOrder, kernel_blocks: int = 1) -> None:
        self._axes = (order.head, order.token, order.element)
        head, token, element = self._axes
        sizes = [size for size, _ in (*head, *token, *element)]
        strides = [stride for _, stride in (*head, *token, *element)]
        self.heads, self.kernel_tokens, self.dim = (prod(size for size, _ in axis) for axis in self._axes)
        self.block_tokens = self.kernel_tokens * kernel_blocks
        self._kernel_blocks = kernel_blocks
        self._view = cache.as_strided(
            (cache.shape[0], *sizes), (cache.stride(0), *strides), cache.storage_offset() + order.start
        )
        """[block, head…, token…, element…]"""
        heads = len(head)
        # [head…, block, token…, element…] is canonical order but for the blocks' ends.
        self._to_canonical = (*range(1, 1 + heads), 0, *range(1 + heads, self._view.dim()))
        self._from_canonical = (heads, *range(heads), *range(1 + heads, self._view.dim()))
        self._canonical_sizes = ([s for s, _ in head], [s for s, _ in (*token, *element)])

    def read(self, block_ids: Sequence[int], start: int, end: int, out: torch.Tensor) -> None:
        """Tokens [start, end) of the request whose blocks these are. out: [heads, end − start, dim]."""
        first = start // self.kernel_tokens
        blocks = self._blocks(block_ids, first, -(-end // self.kernel_tokens))
        skipped = first * self.kernel_tokens
        out.copy_(self._read(blocks)[:, start - skipped : end - skipped])

    def write(self, block_ids: Sequence[int], start: int, end: int, data: torch.Tensor) -> None:
        """data: [heads, end − start, dim]; the other tokens of the blocks stay as they are."""
        size = self.kernel_tokens
        whole_start, whole_end = min(end, -(-start // size) * size), max(start, end // size * size)
        if whole_start < whole_end:
            blocks = self._blocks(block_ids, whole_start // size, whole_end // size)
            self._write(blocks, data[:, whole_start - start : whole_end - start])
        else:
            whole_start = whole_end = end
        for low, high in ((start, whole_start), (whole_end, end)):
            while low < high:
                upto = min(high, (low // size + 1) * size)
                block = self._blocks(block_ids, low // size, low // size + 1)
                content = self._read(block)
                skipped = low // size * size
                content[:, low - skipped : upto - skipped] = data[:, low - start : upto - start]
                self._write(block, content)
                low = upto

    def _blocks(self, block_ids: Sequence[int], first: int, end: int) -> torch.Tensor:
        """The kernel's blocks [first, end) of a request."""
        ratio = self._kernel_blocks
        found = [block_ids[i // ratio] * ratio + i % ratio for i in range(first, end)]
        return torch.tensor(found, dtype=torch.long, device=self._view.device)

    def _read(self, blocks: torch.Tensor) -> torch.Tensor:
        picked = self._view.index_select(0, blocks).permute(self._to_canonical)
        return picked.reshape(self.heads, len(blocks) * self.kernel_tokens, self.dim)

    def _write(self, blocks: torch.Tensor, data: torch.Tensor) -> None:
        heads, rest = self._canonical_sizes
        content = data.reshape(*heads, len(blocks), *rest).permute(self._from_canonical)
        self._view.index_copy_(0, blocks, content.to(self._view.device))


class StateTensor:
    """A recurrent or convolution state of one layer: a block holds one request's. cache: [blocks, *shape]."""

    def __init__(self, cache: torch.Tensor) -> None:
        self._cache = cache

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one request's."""
        return tuple(self._cache.shape[1:])

    def read(self, block_id: int, out: torch.Tensor) -> None:
        """out: the state's shape."""
        out.copy_(self._cache[block_id])

    def write(self, block_id: int, data: torch.Tensor) -> None:
        self._cache[block_id].copy_(data)
