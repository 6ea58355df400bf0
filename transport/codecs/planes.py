"""The byte-plane transform that makes floats compressible.

General compressors find nothing in floats because each element mixes a predictable exponent with a random mantissa.
Here every element is rotated left by one bit, which moves the sign from above the exponent to below the mantissa, and
then all first bytes are stored together, all second bytes, and so on:

    bfloat16   s eeeeeeee mmmmmmm   ->   eeeeeeee | mmmmmmm s     plane of exponents, plane of mantissas
    float16    s eeeee mmmmmmmmmm   ->   eeeeemmm | mmmmmmm s
    float32    s eeeeeeee m * 23    ->   eeeeeeee | m * 8 | m * 8 | mmmmmmm s

Bytes beyond a whole number of elements stay as they are, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

_WORDS: Mapping[str, np.dtype[np.unsignedinteger]] = MappingProxyType(
    {"bfloat16": np.dtype("<u2"), "float16": np.dtype("<u2"), "float32": np.dtype("<u4")}
)


def to_planes(data: memoryview, dtype: str) -> NDArray[np.uint8]:
    """A new array of `len(data)` bytes; for types of one byte a view of `data`."""
    source = np.frombuffer(data, np.uint8)
    word = _WORDS.get(dtype)
    if word is None:
        return source
    size = word.itemsize
    elements = len(source) // size
    words = source[: elements * size].view(word)
    rotated = words << 1
    rotated |= words >> (8 * size - 1)
    planes = np.empty(len(source), np.uint8)
    by_byte = rotated.view(np.uint8).reshape(elements, size)
    for i in range(size):
        planes[i * elements : (i + 1) * elements] = by_byte[:, size - 1 - i]
    planes[elements * size :] = source[elements * size :]
    return planes


def from_planes(planes: NDArray[np.uint8], out: memoryview, dtype: str) -> None:
    """The inverse, into `out` (as many bytes as `planes`)."""
    target = np.frombuffer(out, np.uint8)
    word = _WORDS.get(dtype)
    if word is None:
        target[:] = planes
        return
    size = word.itemsize
    elements = len(planes) // size
    rotated = np.empty(elements, word)
    by_byte = rotated.view(np.uint8).reshape(elements, size)
    for i in range(size):
        by_byte[:, size - 1 - i] = planes[i * elements : (i + 1) * elements]
    words = rotated >> 1
    rotated <<= 8 * size - 1
    words |= rotated
    target[: elements * size] = words.view(np.uint8)
    target[elements * size :] = planes[elements * size :]
