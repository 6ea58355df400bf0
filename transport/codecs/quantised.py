"""int8, fp8 and int4: lossy codecs with a scale for each group of elements.

They take bfloat16, float16 and float32 chunks of whole tokens (a state: whole elements) whose values are all finite;
anything else goes raw. `grouping` says which elements share a scale. With x the elements of a group, and all arithmetic
in float32:

    int8, int4 of keys       low = min(x); step = up((max(x) − low) / levels); code = floor((x − low) / step + 1/2)
                             decoded low + code · step; levels 255 and 15: codes 0 … levels
    int8, int4 of the rest   step = up(max|x| / half); code = floor(x / step + half + 1/2)
                             decoded (code − half) · step; half 127 and 7: codes 0 … 2 · half
    fp8                      step = up(max|x| / 448); code = the float8 e4m3 (OCP, "fn") nearest to x / step, by way of
                             bfloat16; decoded code · step; codes 0x7F and 0xFF (NaN) are not used

`up` rounds up to a bfloat16, at least 2^−126 (the decoder takes any finite step that isn't negative). The decoded value
is rounded to the chunk's type. `low` is of the chunk's type, so it is exact.

On the wire: sections (see `sections`), each of one byte per element or group, `n` elements and `g` groups:

    1      steps, bfloat16, as planes (see `planes`): a section of g bytes for each plane, upper bytes first
    2      only int8 and int4 of keys: lows, in the chunk's type, as planes likewise
    3      codes, one byte each, n bytes; int8 and int4 of keys: of a channel's first token in the group the code, of
           the next ones (code − code of the token before) mod (levels + 1), as keys wander from token to token

Error of an element, beside the rounding to the chunk's type: int8 and int4 at most 0.51 · (max − min) / levels of the
group for keys, 0.51 · max|x| / half for the rest; fp8 at most |x| / 15.8, and below 2^−6 · max|x| / 448 at most 2^−10 ·
1.02 · max|x| / 448 (all plus 2^−126). A group whose decoded range would leave the chunk's type makes the chunk go raw.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from prfaas.common.kv_layout import TensorKind
from prfaas.transport.codecs.api import ChunkForm, CodecError
from prfaas.transport.codecs.floats import (
    FLOAT_TYPES,
    LARGEST,
    Floats,
    bfloat16_at_least,
    from_float32,
    to_float32,
)
from prfaas.transport.codecs.grouping import Slab, count_groups, slabs, whole_elements
from prfaas.transport.codecs.planes import from_planes, to_planes
from prfaas.transport.codecs.sections import Bytes, Method, SectionReader, SectionWriter

_SMALLEST_STEP = np.float32(2.0**-126)


class Scales:
    """Step (and for keys low) of each group."""

    def __init__(self, groups: int, dtype: str, *, with_low: bool) -> None:
        self._dtype = dtype
        self.steps: NDArray[np.generic] = np.empty(groups, FLOAT_TYPES["bfloat16"])
        self.lows: NDArray[np.generic] | None = np.empty(groups, FLOAT_TYPES[dtype]) if with_low else None

    def write(self, writer: SectionWriter) -> None:
        _write_planes(writer, self.steps, "bfloat16")
        if self.lows is not None:
            _write_planes(writer, self.lows, self._dtype)

    def read(self, reader: SectionReader) -> None:
        _read_planes(reader, self.steps, "bfloat16")
        if self.lows is not None:
            _read_planes(reader, self.lows, self._dtype)

    def of(self, slab: Slab) -> tuple[Floats, Floats | None]:
        """Step and low, shaped to multiply the slab's elements."""
        shape = _kept(slab)
        step = to_float32(self.steps[slab.groups]).reshape(shape)
        return step, None if self.lows is None else to_float32(self.lows[slab.groups]).reshape(shape)

    def fit(self, limit: float, reach: float) -> bool:
        """Whether all are finite and what they decode to, at most `reach` steps away from low, is within `limit`."""
        steps = to_float32(self.steps)
        with np.errstate(over="ignore", invalid="ignore"):
            ends = steps * np.float32(reach)
            if self.lows is not None:
                lows = to_float32(self.lows)
                ends += lows
                if not np.isfinite(lows).all():
                    return False
            return bool((steps >= 0).all() and (ends <= limit).all())


class _QuantisedCodec:
    """What the three have in common."""

    name: str
    number: int
    lossless = False

    def encode(self, data: memoryview, form: ChunkForm) -> bytes | None:
        elements = whole_elements(form, len(data)) if form.dtype in FLOAT_TYPES else None
        if not elements:
            return None
        source = np.frombuffer(data, FLOAT_TYPES[form.dtype])
        scales = Scales(count_groups(form, elements), form.dtype, with_low=self._has_low(form))
        codes = np.empty(elements, np.uint8)
        for slab in slabs(form, elements):
            values = to_float32(source[slab.elements]).reshape(slab.shape)
            if not self._quantise(values, slab, scales, codes[slab.elements].reshape(slab.shape)):
                return None
        if not scales.fit(LARGEST[form.dtype], self._reach(form)):
            return None
        writer = SectionWriter()
        scales.write(writer)
        writer.compress(codes, Method.ENTROPY)
        return writer.join(b"", len(data))

    def decode(self, wire: memoryview, out: memoryview, form: ChunkForm) -> None:
        elements = whole_elements(form, len(out)) if form.dtype in FLOAT_TYPES else None
        if elements is None:
            raise CodecError(f"{self.name}: {len(out)} bytes are not whole tokens of {form.channels} {form.dtype}")
        scales = Scales(count_groups(form, elements), form.dtype, with_low=self._has_low(form))
        reader = SectionReader(wire)
        scales.read(reader)
        codes = reader.take(elements)
        reader.end()
        if not scales.fit(LARGEST[form.dtype], self._reach(form)):
            raise CodecError(f"{self.name}: a scale beyond {form.dtype}")
        if not self._valid(codes, form):
            raise CodecError(f"{self.name}: a code that is not one")
        target = np.frombuffer(out, FLOAT_TYPES[form.dtype])
        for slab in slabs(form, elements):
            values = self._restore(codes[slab.elements].reshape(slab.shape), slab, scales)
            from_float32(values.reshape(-1), target[slab.elements])

    def _has_low(self, form: ChunkForm) -> bool:
        raise NotImplementedError

    def _reach(self, form: ChunkForm) -> float:
        """The largest |decoded value − low| in steps."""
        raise NotImplementedError

    def _quantise(self, values: Floats, slab: Slab, scales: Scales, codes: Bytes) -> bool:
        """Fill codes and the slab's scales; `values` may be overwritten. False: not all values are finite."""
        raise NotImplementedError

    def _valid(self, codes: Bytes, form: ChunkForm) -> bool:
        raise NotImplementedError

    def _restore(self, codes: Bytes, slab: Slab, scales: Scales) -> Floats:
        raise NotImplementedError


class IntCodec(_QuantisedCodec):
    """levels: 255 (int8) or 15 (int4), one less than a power of two."""

    def __init__(self, name: str, number: int, levels: int) -> None:
        self.name = name
        self.number = number
        self._levels: Final = levels
        self._half: Final = levels // 2

    def _has_low(self, form: ChunkForm) -> bool:
        return form.kind is TensorKind.KEY

    def _reach(self, form: ChunkForm) -> float:
        return self._levels if self._has_low(form) else self._half

    def _quantise(self, values: Floats, slab: Slab, scales: Scales, codes: Bytes) -> bool:
        if scales.lows is None:
            largest = np.abs(values).max(axis=slab.axis, keepdims=True)
            inverse = _set_steps(largest, self._half, slab, scales)
            bias = np.float32(self._half + 0.5)
        else:
            lows = values.min(axis=slab.axis, keepdims=True)
            with np.errstate(over="ignore", invalid="ignore"):
                largest = values.max(axis=slab.axis, keepdims=True) - lows
            inverse = _set_steps(largest, self._levels, slab, scales)
            from_float32(lows.reshape(-1).copy(), scales.lows[slab.groups])
            bias = np.float32(0.5)
            if inverse is not None:
                values -= lows
        if inverse is None:
            return False
        values *= inverse
        values += bias
        codes[:] = values  # truncates
        if scales.lows is not None:
            codes[:, 1:] -= codes[:, :-1].copy()
            codes &= np.uint8(self._levels)
        return True

    def _valid(self, codes: Bytes, form: ChunkForm) -> bool:
        largest = self._levels if self._has_low(form) else 2 * self._half
        return not len(codes) or int(codes.max()) <= largest

    def _restore(self, codes: Bytes, slab: Slab, scales: Scales) -> Floats:
        step, low = scales.of(slab)
        if low is None:
            values = codes.astype(np.float32)
            values -= np.float32(self._half)
            values *= step
            return values
        sums = _running_sums(codes)
        sums &= np.uint8(self._levels)
        values = sums.astype(np.float32)
        values *= step
        values += low
        return values


def _running_sums(codes: Bytes) -> Bytes:
    """Mod 256, along axis 1, which is at most a group long. In doubling steps: a few passes over all elements at once
    are faster than numpy's accumulate, which goes element by element."""
    sums = codes.copy()
    distance = 1
    while distance < sums.shape[1]:
        sums[:, distance:] += sums[:, :-distance].copy()
        distance *= 2
    return sums


class Fp8Codec(_QuantisedCodec):
    name = "fp8"
    number = 4
    _LARGEST: Final = 448.0

    def __init__(self) -> None:
        self._values, self._nearest = _e4m3_tables()

    def _has_low(self, form: ChunkForm) -> bool:
        return False

    def _reach(self, form: ChunkForm) -> float:
        return self._LARGEST

    def _quantise(self, values: Floats, slab: Slab, scales: Scales, codes: Bytes) -> bool:
        largest = np.abs(values).max(axis=slab.axis, keepdims=True)
        inverse = _set_steps(largest, self._LARGEST, slab, scales)
        if inverse is None:
            return False
        values *= inverse
        nearest = np.empty(values.size, np.uint16)
        from_float32(values.reshape(-1), nearest)
        self._nearest.take(nearest.reshape(slab.shape), out=codes, mode="clip")
        return True

    def _valid(self, codes: Bytes, form: ChunkForm) -> bool:
        return not len(codes) or int((codes & 0x7F).max()) < 0x7F

    def _restore(self, codes: Bytes, slab: Slab, scales: Scales) -> Floats:
        step, _ = scales.of(slab)
        values = self._values.take(codes)
        values *= step
        return values


def _set_steps(largest: Floats, reach: float, slab: Slab, scales: Scales) -> Floats | None:
    """Steps with which `reach` of them are `largest`; what to multiply by, or None: not all are finite."""
    if not np.isfinite(largest).all():
        return None
    steps = np.maximum(largest / np.float32(reach), _SMALLEST_STEP)
    bits = bfloat16_at_least(steps.reshape(-1))
    scales.steps[slab.groups] = bits
    return np.float32(1) / to_float32(bits).reshape(_kept(slab))


def _kept(slab: Slab) -> tuple[int, int, int]:
    """Shape of a slab's groups, with the axis that they lie along kept."""
    a, b, c = slab.shape
    return (a, 1, c) if slab.axis == 1 else (a, b, 1)


def _write_planes(writer: SectionWriter, values: NDArray[np.generic], dtype: str) -> None:
    planes = to_planes(values.view(np.uint8).data, dtype)
    for plane in planes.reshape(values.itemsize, len(values)):
        writer.compress(plane, Method.ENTROPY)


def _read_planes(reader: SectionReader, values: NDArray[np.generic], dtype: str) -> None:
    planes = [reader.take(len(values)) for _ in range(values.itemsize)]
    from_planes(planes, values.view(np.uint8).data, dtype)


def _e4m3_tables() -> tuple[Floats, Bytes]:
    """(value of each of the 256 codes, nearest code of each of the 65536 bfloat16), ties to the even code."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    magnitude = np.where(exponent > 0, np.ldexp(8 + mantissa, exponent - 10), np.ldexp(mantissa, -9)).astype(np.float32)
    magnitude[127] = 0  # NaN; never decoded
    values = np.concatenate((magnitude, -magnitude))
    positive = to_float32(np.arange(1 << 15, dtype="<u2"))
    halves = (magnitude[:126] + magnitude[1:127]) / 2
    nearest = np.searchsorted(halves, positive, side="left")
    tie = (nearest < 126) & (halves[np.minimum(nearest, 125)] == positive) & (nearest % 2 == 1)
    nearest = (nearest + tie).astype(np.uint8)
    return values, np.concatenate((nearest, nearest | np.uint8(0x80)))


INT8 = IntCodec("int8", 3, 255)
FP8 = Fp8Codec()
INT4 = IntCodec("int4", 5, 15)
