"""The byte-plane transform that makes floats compressible.

General compressors find nothing in floats because each element mixes a predictable exponent with a random mantissa.
Here every element is rotated left by one bit, which moves the sign from above the exponent to below the mantissa, and
then all first bytes are stored together, all second bytes, and so on:

    bfloat16   s eeeeeeee mmmmmmm   ->   eeeeeeee | mmmmmmm s     plane of exponents, plane of mantissas
    float16    s eeeee mmmmmmmmmm   ->   eeeeemmm | mmmmmmm s
    float32    s eeeeeeee m * 23    ->   eeeeeeee | m * 8 | m * 8 | mmmmmmm s

Types of one byte are one plane as they are. Bytes beyond a whole number of elements stay as they are, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

_WORDS: Mapping[str, np.dtype[np.unsignedinteger]] = MappingProxyType(
    {"bfloat16": np.dtype("<u2"), "float16": np.dtype("<u2"), "float32": np.dtype("<u4")}
)

# Elements at once: their words stay in a core's cache between the passes over them.
_SLAB = 1 << 15


def to_planes(data: memoryview, dtype: str) -> NDArray[np.uint8]:
    """A new array of `len(data)` bytes; for types of one byte a view of `data`."""
    source = np.frombuffer(data, np.uint8)
    word = _WORDS.get(dtype)
    if word is None:
        return source
    size = word.itemsize
    elements = len(source) // size
    planes = np.empty(len(source), np.uint8)
    planes[elements * size :] = source[elements * size :]
    words, by_plane = source[: elements * size].view(word), planes[: elements * size].reshape(size, elements)
    for first in range(0, elements, _SLAB):
        slab = slice(first, first + _SLAB)
        rotated = words[slab] << 1
        rotated |= words[slab] >> (8 * size - 1)
        for i in range(size - 1):
            np.right_shift(rotated, 8 * (size - 1 - i), out=by_plane[i, slab], casting="unsafe", dtype=word)
        by_plane[size - 1, slab] = rotated
    return planes


def from_planes(planes: Sequence[NDArray[np.uint8]], out: memoryview, dtype: str) -> None:
    """The inverse, into `out`. planes: as many as an element has bytes, of one length; `out` is as long as all of
    them, or longer by a part of an element, which is left alone."""
    target = np.frombuffer(out, np.uint8)
    word = _WORDS.get(dtype)
    if word is None:
        target[:] = planes[0]
        return
    size, elements = word.itemsize, len(planes[0])
    words = target[: elements * size].view(word)
    for first in range(0, elements, _SLAB):
        slab = slice(first, first + _SLAB)
        rotated = planes[0][slab].astype(word)
        for plane in planes[1:]:
            rotated <<= 8
            rotated |= plane[slab]
        lowest = rotated << (8 * size - 1)
        rotated >>= 1
        rotated |= lowest
        words[slab] = rotated
