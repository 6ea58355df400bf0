"""Elements of a chunk as float32 and back. Little-endian, vectorised, the same on every machine."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

FLOAT_TYPES: Mapping[str, np.dtype[np.generic]] = MappingProxyType(
    {"bfloat16": np.dtype("<u2"), "float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
)
"""What numpy holds an element of each in; a bfloat16 is the upper half of a float32."""

LARGEST: Mapping[str, float] = MappingProxyType(
    {
        "bfloat16": float(np.array(0x7F7F << 16, np.uint32).view(np.float32)),
        "float16": float(np.finfo(np.float16).max),
        "float32": float(np.finfo(np.float32).max),
    }
)


def to_float32(elements: NDArray[np.generic]) -> Floats:
    """A new array. elements: of a FLOAT_TYPES type."""
    if elements.dtype == FLOAT_TYPES["bfloat16"]:
        bits = elements.astype("<u4")
        bits <<= 16
        return bits.view("<f4")
    return elements.astype("<f4")


def from_float32(values: Floats, out: NDArray[np.generic]) -> None:
    """Into `out` (of a FLOAT_TYPES type), rounded to nearest, ties to even. values: finite; overwritten."""
    if out.dtype == FLOAT_TYPES["bfloat16"]:
        bits = values.view("<u4")
        odd = bits >> 16
        odd &= 1
        odd += 0x7FFF
        bits += odd
        bits >>= 16
        out[:] = bits
    else:
        out[:] = values


def bfloat16_at_least(values: Floats) -> NDArray[np.uint16]:
    """The smallest bfloat16 bits that are not below `values` (not negative; infinity stays)."""
    bits = values.view("<u4") + np.uint32(0xFFFF)
    bits >>= 16
    return bits.astype("<u2")
