"""Which elements of a chunk share a scale.

    key               each channel of 128 consecutive tokens of the chunk, the last group of a channel may be shorter
    value, latent     each token: its channels in the fewest equal groups of at most 128; in one group where equal
                      groups would have fewer than 32 channels
    conv, recurrent   each 128 consecutive elements of the chunk, the last group may be shorter

Groups are numbered along the chunk's elements: for keys [ceil(tokens / 128), channels], for the others [tokens,
groups of a token] or [groups], in C order. Keys have outlier channels, so a token's channels don't fit one scale; the
channels of a value are alike, but tokens differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from prfaas.common.kv_layout import DTYPE_BYTES, TensorKind
from prfaas.transport.codecs.api import ChunkForm

GROUP = 128
_SMALLEST_GROUP = 32
_SLAB_ELEMENTS = 1 << 15  # as float32 it stays in a core's cache


class Slab(NamedTuple):
    """A run of elements whose groups are whole, small enough to be worked on in cache (or one group)."""

    elements: slice
    groups: slice
    shape: tuple[int, int, int]
    """Of the elements."""
    axis: int
    """Of `shape`, along which a group lies: 1 or 2."""


def whole_elements(form: ChunkForm, size_bytes: int) -> int | None:
    """Elements of a chunk that can be grouped; None if it is cut within a token (a state: an element)."""
    unit = DTYPE_BYTES[form.dtype] if form.kind.is_state else form.token_bytes
    return None if size_bytes % unit else size_bytes // DTYPE_BYTES[form.dtype]


def channel_groups(channels: int) -> int:
    """How many groups a token's channels make."""
    fewest = -(-channels // GROUP)
    most = channels // _SMALLEST_GROUP
    return next((n for n in range(fewest, most + 1) if channels % n == 0), 1)


def count_groups(form: ChunkForm, elements: int) -> int:
    if form.kind.is_state:
        return -(-elements // GROUP)
    tokens = elements // form.channels
    if form.kind is TensorKind.KEY:
        return -(-tokens // GROUP) * form.channels
    return tokens * channel_groups(form.channels)


def slabs(form: ChunkForm, elements: int) -> Iterator[Slab]:
    """In order; together they cover all elements and groups. elements: see `whole_elements`."""
    if form.kind is TensorKind.KEY:
        rows, row = elements // form.channels, form.channels
        step, groups = GROUP, form.channels
    elif form.kind.is_state:
        rows, row = elements // GROUP, GROUP
        step, groups = 1, 1
    else:
        rows, row = elements // form.channels, form.channels
        step, groups = 1, channel_groups(form.channels)
    whole = rows // step  # of `step` rows, which hold `groups` groups
    at_once = max(1, _SLAB_ELEMENTS // (step * row))
    for first in range(0, whole, at_once):
        n = min(at_once, whole - first)
        shape, axis = ((n, step, row), 1) if form.kind is TensorKind.KEY else ((n, groups, row // groups), 2)
        yield _slab(first * step * row, first * groups, shape, axis)
    if left := elements - whole * step * row:
        shape, axis = ((1, left // row, row), 1) if form.kind is TensorKind.KEY else ((1, 1, left), 2)
        yield _slab(whole * step * row, whole * groups, shape, axis)


def _slab(element: int, group: int, shape: tuple[int, int, int], axis: int) -> Slab:
    elements = shape[0] * shape[1] * shape[2]
    return Slab(slice(element, element + elements), slice(group, group + elements // shape[axis]), shape, axis)
