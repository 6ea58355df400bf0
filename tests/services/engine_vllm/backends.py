"""Stand-ins for vLLM's attention backends: each stores a block in an order of its own, as the real ones do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

HEADS, TOKENS, DIM = 2, 32, 16


class Backend:
    """Keys in tiles of `tile` tokens (1: one after the other), transposed within a tile when `turned`."""

    def __init__(self, tile: int = 1, turned: bool = False) -> None:
        self.tile = tile
        self.turned = turned

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """As CPUAttentionBackendImpl: key and value [token, head, dim]; a block has its keys before its values."""
        tokens = cache.shape[2]
        for i, slot in enumerate(slots.tolist()):
            block, token = divmod(slot, tokens)
            for head in range(cache.shape[1]):
                keys, values = cache[block, head].reshape(-1).view(2, tokens, -1)
                self._tiles(keys)[token // self.tile, token % self.tile] = key[i, head]
                values[token] = value[i, head]

    def _tiles(self, keys: torch.Tensor) -> torch.Tensor:
        """[tile, token in it, element], of memory that has each tile's elements outermost when turned."""
        dim = keys.shape[1]
        if not self.turned:
            return keys.view(-1, self.tile, dim)
        return keys.view(-1, dim, self.tile).transpose(1, 2)


def layer_with(backend: Any) -> Any:
    return SimpleNamespace(impl=backend)


def empty_cache(blocks: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(blocks, HEADS, TOKENS, 2 * DIM, dtype=dtype)


def random_tokens(tokens: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, [token, head, dim]."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(tokens, HEADS, DIM, generator=generator).to(dtype) for _ in range(2))
    return keys, values


def slots_of(blocks: list[int], tokens: int) -> torch.Tensor:
    return torch.tensor([blocks[i // TOKENS] * TOKENS + i % TOKENS for i in range(tokens)])
