"""Where vLLM's backend puts the elements of a block, found out by letting it write a known block.

Backends pack keys as their kernels like them (for AMX in tiles), and say so nowhere. `do_kv_cache_update` is what they
write new tokens with: it is given blocks of numbers, and what then lies where tells the order. A backend that writes
its cache within its attention kernel can't be asked this way; it is taken to store a token's key and value one after
the other, as vLLM's logical shape [block, head, token, content] says.
"""

from __future__ import annotations

from typing import Any

import torch
from prfaas.common.errors import EngineError
from prfaas.services.engine.vllm.strides import Axis, strides_of

MAX_SCRATCH_BYTES = 256 << 20
DIGIT = 128
"""Of the numbers that are written, one digit a round: every dtype of a cache holds integers below it exactly."""


def probe_order(layer: Any, cache: torch.Tensor, key_dim: int, value_dim: int) -> tuple[BlockOrder, BlockOrder]:
    """Of the keys, and of the values. layer: the attention module (its `impl` is the backend's). cache: as registered,
    logical shape [blocks, kv heads, tokens, key_dim + value_dim].

    Raises EngineError when the order can't be written as strides, or could not be probed.
    """
    heads, tokens = cache.shape[1], cache.shape[2]
    if not hasattr(layer.impl, "do_kv_cache_update"):
        return plain_order(cache, 0, key_dim), plain_order(cache, key_dim, value_dim)
    scratch = _scratch(cache)
    positions = _positions(layer, scratch, heads, tokens, key_dim, value_dim)
    parts = positions[: heads * tokens * key_dim], positions[heads * tokens * key_dim :]
    shapes = (heads, tokens, key_dim), (heads, tokens, value_dim)
    return tuple(_order(part.view(shape)) for part, shape in zip(parts, shapes, strict=True))  # type: ignore[return-value]


class BlockOrder:
    """Strides within a block's storage, in elements: `start` is where head 0, token 0, element 0 lies."""

    def __init__(self, start: int, head: Axis, token: Axis, element: Axis) -> None:
        self.start = start
        self.head = head
        self.token = token
        self.element = element

    def __repr__(self) -> str:
        return f"BlockOrder({self.start}, {self.head}, {self.token}, {self.element})"


def plain_order(cache: torch.Tensor, start: int, dim: int) -> BlockOrder:
    """As the logical shape says; `start` counts within a token's content."""
    _, heads, tokens, _ = cache.shape
    _, head, token, element = cache.stride()
    return BlockOrder(start * element, ((heads, head),), ((tokens, token),), ((dim, element),))


def _scratch(cache: torch.Tensor) -> torch.Tensor:
    """One block with the cache's strides."""
    size = (1, *cache.shape[1:])
    elements = 1 + sum((n - 1) * stride for n, stride in zip(size, cache.stride(), strict=True))
    if elements * cache.element_size() > MAX_SCRATCH_BYTES:
        raise EngineError(f"vLLM's KV cache has strides {cache.stride()}: a block of it can't be probed")
    flat = torch.zeros(elements, dtype=cache.dtype, device=cache.device)
    return flat.as_strided(size, cache.stride())


def _positions(
    layer: Any, scratch: torch.Tensor, heads: int, tokens: int, key_dim: int, value_dim: int
) -> torch.Tensor:
    """Offset in the block's storage of every element: keys [head, token, element], then values, flattened."""
    keys = heads * tokens * key_dim
    total = keys + heads * tokens * value_dim
    numbers = torch.arange(1, total + 1)  # 0: nothing was written
    flat = scratch.as_strided((scratch.untyped_storage().nbytes() // scratch.element_size(),), (1,))
    found = torch.zeros(flat.numel(), dtype=torch.long)
    slots = torch.arange(tokens, dtype=torch.long, device=scratch.device)
    scale = 1
    while scale <= total:
        digits = numbers // scale % DIGIT
        key = digits[:keys].view(heads, tokens, key_dim).transpose(0, 1)
        value = digits[keys:].view(heads, tokens, value_dim).transpose(0, 1)
        flat.zero_()
        layer.impl.do_kv_cache_update(layer, *(_as(each, scratch) for each in (key, value)), scratch, slots)
        found += flat.float().cpu().round().long() * scale
        scale *= DIGIT
    positions = torch.full((total,), -1, dtype=torch.long)
    written = found.nonzero().flatten()
    if int(found.max()) > total:
        raise EngineError("vLLM's KV cache stores other numbers than it is given (a quantized cache?)")
    positions[found[written] - 1] = written
    if (positions < 0).any():
        raise EngineError("vLLM's KV cache does not store every key and value that it is given")
    return positions


def _as(digits: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    return digits.to(dtype=cache.dtype, device=cache.device).contiguous()


def _order(positions: torch.Tensor) -> BlockOrder:
    """positions: [head, token, element]. Raises EngineError unless each axis has strides of its own."""
    start = int(positions[0, 0, 0])
    axes = [(each - start).tolist() for each in (positions[:, 0, 0], positions[0, :, 0], positions[0, 0, :])]
    strides = [strides_of(axis) for axis in axes]
    head, token, element = (torch.tensor(axis) for axis in axes)
    together = start + head[:, None, None] + token[None, :, None] + element[None, None, :]
    if None in strides or not torch.equal(together, positions):
        raise EngineError("the order of vLLM's KV cache can't be written as strides")
    return BlockOrder(start, *(axis for axis in strides if axis is not None))
