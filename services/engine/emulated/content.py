"""KV bytes that are a function of the request, so that the decode side can check every one of them.

Pure. The bytes of token p in (layer, tensor, head) follow from all prompt tokens up to p, as a real model's do; a state
follows from all tokens before its range's end. The words look like bfloat16 of ordinary size (11 of 16 bits vary), so
that a codec finds about as much to save as in real KV.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from prfaas.common.kv_layout import MAX_DIM, KvLayout, LayerLayout, TensorKind, TensorLayout

Words = NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1
_VARYING = np.uint64(0x83FF83FF83FF83FF)  # sign, 3 low exponent bits, mantissa
_FIXED = np.uint64(0x3C003C003C003C00)  # exponents from −7 to 0
_WORD_BYTES = 8
_BLOCK_BYTES = 4 << 20  # of one comparison, so that temporary memory is bounded whatever the prompt


def emulated_layout(layers: int, kv_heads: int, head_dim: int, state_bytes: int) -> KvLayout:
    """Each layer: key and value, and a recurrent state if `state_bytes` (rounded up to whole elements of a shape)."""
    tensors = [
        TensorLayout(TensorKind.KEY, "bfloat16", kv_heads, (head_dim,)),
        TensorLayout(TensorKind.VALUE, "bfloat16", kv_heads, (head_dim,)),
    ]
    if state_bytes:
        elements = math.ceil(state_bytes / 2)
        rows = math.ceil(elements / MAX_DIM)
        tensors.append(TensorLayout(TensorKind.RECURRENT, "bfloat16", 1, (rows, math.ceil(elements / rows))))
    return KvLayout((LayerLayout(tuple(tensors)),) * layers)


class KvContent:
    """The KV of one token sequence. Reading and comparing are safe from any thread."""

    def __init__(self, layout: KvLayout, token_ids: Sequence[int]) -> None:
        self._layout = layout
        ids = np.asarray(token_ids, dtype=np.uint64)
        positions = np.arange(len(ids), dtype=np.uint64)
        # A running sum of mixed (token, position) pairs: each prefix has its own value, in one vectorised pass.
        self._prefix = _mix(np.cumsum(_mix(ids + positions * np.uint64(_GOLDEN)), dtype=np.uint64))

    def fill(self, out: memoryview, layer: int, tensor: int, head: int, start: int, end: int) -> None:
        """Write the row's bytes for tokens [start, end) (a state: the whole of it after `end` tokens)."""
        for offset, block in self._blocks(layer, tensor, head, start, end):
            out[offset : offset + block.nbytes] = block.data

    def mismatch(self, data: memoryview, layer: int, tensor: int, head: int, start: int, end: int) -> int | None:
        """The offset of the first byte that is not what `fill` writes, or None."""
        got = np.frombuffer(data, dtype=np.uint8)
        for offset, block in self._blocks(layer, tensor, head, start, end):
            part = got[offset : offset + block.nbytes]
            if not np.array_equal(part, block):
                return offset + int(np.argmax(part != block))
        return None

    def _blocks(
        self, layer: int, tensor: int, head: int, start: int, end: int
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(offset in the row, bytes), in order."""
        spec = self._layout.layers[layer].tensors[tensor]
        salt = np.uint64(_mix_one(layer << 40 | tensor << 32 | head))
        if spec.kind.is_state:
            columns = _BLOCK_BYTES // 8
            words = math.ceil(spec.fixed_bytes / _WORD_BYTES)
            seed = self._prefix[end - 1 : end] ^ salt
            for first in range(0, words, columns):
                block = _words(seed, first, min(columns, words - first)).reshape(-1).view(np.uint8)
                yield first * _WORD_BYTES, block[: spec.fixed_bytes - first * _WORD_BYTES]
            return
        row = spec.row_bytes_per_token
        words = math.ceil(row / _WORD_BYTES)
        tokens = max(1, _BLOCK_BYTES // row)
        for first in range(start, end, tokens):
            seeds = self._prefix[first : min(first + tokens, end)] ^ salt
            block = _words(seeds, 0, words).view(np.uint8)[:, :row]
            yield (first - start) * row, np.ascontiguousarray(block).reshape(-1)


def _words(seeds: Words, first_column: int, columns: int) -> Words:
    """[len(seeds), columns] words: each column multiplies the seeds by an odd number of its own."""
    factors = _mix(np.arange(first_column, first_column + columns, dtype=np.uint64)) | np.uint64(1)
    words: Words = seeds[:, None] * factors[None, :]
    words &= _VARYING
    words |= _FIXED
    return words


def _mix(x: Words) -> Words:
    """splitmix64's finalizer: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_one(x: int) -> int:
    return int(_mix(np.array([(x + 1) * _GOLDEN & _MASK_64], dtype=np.uint64))[0])
