"""How many bytes a model's prefix blocks and snapshots take in a pool."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from prfaas.common.errors import ConfigError
from prfaas.common.kv_layout import KvLayout
from prfaas.common.prefixcache.hashes import DEFAULT_BLOCK_TOKENS, MAX_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """Full attention is kept in blocks, everything else in snapshots.

    block_tokens: tokens a block [open in the paper]. block_bytes: full-attention KV of one block, all layers and groups
    together, since a prefix that lacks one of them is worth nothing. fixed_bytes: recurrent and convolution state.
    windows: (window_tokens, bytes a token) of each length of sliding window; a snapshot holds the whole window, all
    tokens of it when the prefix is shorter, or it would be of no use. page_bytes: blocks and snapshots are rounded up
    to whole pages, for an engine that carves both from one pool of aligned pages; 1 = to the byte.
    """

    block_bytes: int
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    fixed_bytes: int = 0
    windows: tuple[tuple[int, int], ...] = ()
    page_bytes: int = 1

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.block_tokens <= MAX_BLOCK_TOKENS:
            problems.append(f"block_tokens {self.block_tokens} is not from 1 to {MAX_BLOCK_TOKENS}")
        if self.page_bytes < 1:
            problems.append(f"page_bytes {self.page_bytes} is less than 1")
        if self.block_bytes < 0 or self.fixed_bytes < 0 or any(w < 1 or b < 1 for w, b in self.windows):
            problems.append("a size is negative")
        if self.block_bytes == 0 and not self.needs_snapshot:
            problems.append("neither blocks nor snapshots have any bytes")
        if problems:
            raise ConfigError([f"prefix cache: {problem}" for problem in problems])

    @staticmethod
    def of_layout(layout: KvLayout, block_tokens: int = DEFAULT_BLOCK_TOKENS, page_bytes: int = 1) -> CacheSizes:
        windows: Counter[int] = Counter()
        token_bytes = 0
        for tensor in (tensor for layer in layout.layers for tensor in layer.tensors):
            if tensor.window_tokens is None:
                token_bytes += tensor.bytes_per_token
            else:
                windows[tensor.window_tokens] += tensor.bytes_per_token
        return CacheSizes(
            token_bytes * block_tokens, block_tokens, layout.fixed_bytes, tuple(sorted(windows.items())), page_bytes
        )

    @property
    def needs_snapshot(self) -> bool:
        """The model is not full attention alone: a prefix is usable at exactly a snapshot's length."""
        return self.fixed_bytes > 0 or bool(self.windows)

    @property
    def paged_block_bytes(self) -> int:
        return self._paged(self.block_bytes)

    def snapshot_bytes(self, blocks: int) -> int:
        """Of a snapshot after `blocks` blocks."""
        tokens = blocks * self.block_tokens
        return self._paged(self.fixed_bytes + sum(size * min(tokens, window) for window, size in self.windows))

    def tail_bytes(self, tokens: int) -> int:
        """Full-attention KV of `tokens` tokens that fill no block (the paper's transfer-cache blocks)."""
        return self._paged(-(-self.block_bytes * tokens // self.block_tokens))

    def _paged(self, size_bytes: int) -> int:
        return -(-size_bytes // self.page_bytes) * self.page_bytes


def snapshot_points(
    matched: int, held: int, total: int, *, every_blocks: int = 0, at_branch: bool = True
) -> tuple[int, ...]:
    """After how many blocks to take snapshots while the blocks (matched, total] of a prompt are computed; ascending.

    Where is open in the paper. Always at the end, where the conversation's next turn begins; every `every_blocks`
    blocks (0 = nowhere between); and with `at_branch` after the `held` blocks (≥ matched) that the pool has of this
    prompt, where another prompt has gone on differently: a third that begins like both can then be served from there.
    """
    points = {total} | ({held} if at_branch else set())
    if every_blocks > 0:
        points.update(range(matched // every_blocks * every_blocks, total, every_blocks))
    return tuple(sorted(point for point in points if matched < point <= total))
