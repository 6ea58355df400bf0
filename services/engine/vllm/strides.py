"""The order of elements in memory, written as strides. Pure.

vLLM's backends store keys and values as suits their kernels: token after token, or packed into tiles. Where element i
of an axis lies is learned by trying (`probe.py`); here that list is turned into (size, stride) pairs, so that one
strided copy moves a block instead of a gather of single elements.
"""

from __future__ import annotations

from collections.abc import Sequence

Axis = tuple[tuple[int, int], ...]
"""(size, stride) pairs, the outermost first: an axis that is stored in tiles has several."""


def strides_of(offsets: Sequence[int]) -> Axis | None:
    """`offsets[i]`: where element i of an axis lies, relative to element 0. None: no strides give that."""
    if not offsets or offsets[0] != 0:
        return None
    if len(offsets) == 1:
        return ()
    step = offsets[1]
    run = next((i for i, offset in enumerate(offsets) if offset != i * step), len(offsets))
    if len(offsets) % run:
        return None
    outer = offsets[::run]
    if any(offset != outer[i // run] + i % run * step for i, offset in enumerate(offsets)):
        return None
    rest = strides_of(outer)
    return None if rest is None else (*rest, (run, step))
