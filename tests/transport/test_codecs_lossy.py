"""Lossy codecs: every element within its bound, and nothing on the wire does harm."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from prfaas.common.config import LOSSY_CODECS
from prfaas.common.kv_layout import DTYPE_BYTES, TensorKind
from prfaas.transport.codecs.api import ChunkForm, CodecError
from prfaas.transport.codecs.floats import FLOAT_TYPES, from_float32, to_float32
from prfaas.transport.codecs.grouping import channel_groups, count_groups
from prfaas.transport.codecs.registry import CODECS, LOSSLESS_NAMES, codec_by_name
from prfaas.transport.codecs.sections import Method, SectionReader, SectionWriter

LOSSY = [number for number, codec in sorted(CODECS.items()) if not codec.lossless]
STATES = (TensorKind.CONV, TensorKind.RECURRENT)
RELATIVE_ERROR = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-23}
SMALLEST = {"bfloat16": 2.0**-133, "float16": 2.0**-25, "float32": 2.0**-149}

Array = NDArray[Any]


def elements_of(values: Array, dtype: str) -> bytearray:
    """`values` rounded to `dtype`."""
    out = np.empty(values.size, FLOAT_TYPES[dtype])
    with np.errstate(over="ignore"):
        from_float32(values.astype(np.float32).reshape(-1), out)
    return bytearray(out.tobytes())


def floats_of(data: bytes | bytearray, dtype: str) -> Array:
    return to_float32(np.frombuffer(data, FLOAT_TYPES[dtype])).astype(np.float64)


def kv_like(seed: int, tokens: int, channels: int, scale: float) -> Array:
    """Channels of different means and spreads, as keys have, and a few large tokens."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(tokens, channels)) * np.exp(rng.normal(size=channels)) + 4 * rng.normal(size=channels)
    values[rng.random(tokens) < 0.02] *= 30
    return values * scale


def groups_of(values: Array, form: ChunkForm) -> list[Array]:
    """The groups as the documentation says them, one at a time: another way than the codec's."""
    if form.kind in STATES:
        return [values[i : i + 128] for i in range(0, len(values), 128)]
    rows = values.reshape(-1, form.channels)
    if form.kind is TensorKind.KEY:
        return [rows[t : t + 128, c] for t in range(0, len(rows), 128) for c in range(form.channels)]
    counts = [n for n in range(1, form.channels + 1) if form.channels % n == 0 and 32 <= form.channels // n <= 128]
    return [group for row in rows for group in np.split(row, counts[0] if counts else 1)]


def bound(name: str, form: ChunkForm, group: Array) -> Array:
    """What quantised.py promises."""
    largest = np.abs(group).max()
    if name == "fp8":
        lost = np.maximum(np.abs(group) / 15.8, 1.02 * 2.0**-10 * largest / 448)
    elif form.kind is TensorKind.KEY:
        lost = np.full(len(group), 0.51 * np.ptp(group) / (255 if name == "int8" else 15))
    else:
        lost = np.full(len(group), 0.51 * largest / (127 if name == "int8" else 7))
    rounding = 1.1 * largest * RELATIVE_ERROR[form.dtype] + SMALLEST[form.dtype]
    return np.asarray(lost + rounding + 2.0**-126)


@given(
    st.sampled_from(LOSSY),
    st.sampled_from(TensorKind),
    st.sampled_from(sorted(FLOAT_TYPES)),
    st.integers(1, 300),
    st.sampled_from([1, 5, 31, 64, 80, 128, 131, 257, 576]),
    st.sampled_from([1e-38, 1e-6, 1.0, 300.0]),
    st.integers(0, 1 << 30),
)
@settings(max_examples=150, deadline=None)
def test_every_element_is_within_its_bound(
    number: int, kind: TensorKind, dtype: str, tokens: int, channels: int, scale: float, seed: int
) -> None:
    """Of its group's range (keys) or largest value, for any kind, type, number of tokens and of channels."""
    codec, form = CODECS[number], ChunkForm(kind, dtype, channels)
    data = elements_of(kv_like(seed, tokens, channels, scale), dtype)
    wire = codec.encode(memoryview(data), form)
    assume(wire is not None)
    assert wire is not None
    out = bytearray(len(data))
    codec.decode(memoryview(wire), memoryview(out), form)
    for sent, got in zip(groups_of(floats_of(data, dtype), form), groups_of(floats_of(out, dtype), form), strict=True):
        assert np.all(np.abs(got - sent) <= bound(codec.name, form, sent))


@pytest.mark.parametrize("dtype", sorted(FLOAT_TYPES))
@pytest.mark.parametrize(("name", "ratio"), [("int8", 1.9), ("fp8", 2.0), ("int4", 3.5)])
def test_they_shrink(name: str, ratio: float, dtype: str) -> None:
    """By about their bits, whatever the kind."""
    codec = codec_by_name(name)
    assert codec is not None
    data = memoryview(elements_of(kv_like(1, 512, 64, 1.0), dtype))
    for kind in TensorKind:
        wire = codec.encode(data, ChunkForm(kind, dtype, 64))
        assert wire is not None
        assert len(data) / len(wire) > ratio * DTYPE_BYTES[dtype] / 2


@pytest.mark.parametrize("number", LOSSY)
@pytest.mark.parametrize("kind", TensorKind)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3.4e38])
def test_what_is_not_finite_goes_raw(number: int, kind: TensorKind, poison: float) -> None:
    """One NaN or infinity would spoil its group's scale; what rounding could carry out of the type's range too."""
    values = kv_like(2, 256, 64, 1.0).astype(np.float32)
    values[200, 7] = poison
    form = ChunkForm(kind, "float16", 64)
    assert CODECS[number].encode(memoryview(elements_of(values, "float16")), form) is None
    if not np.isfinite(poison):
        form = ChunkForm(kind, "bfloat16", 64)
        assert CODECS[number].encode(memoryview(elements_of(values, "bfloat16")), form) is None


@pytest.mark.parametrize("number", LOSSY)
def test_what_is_not_whole_tokens_of_floats_goes_raw(number: int) -> None:
    """Half a token, half an element of a state, and types that are small already."""
    data = memoryview(elements_of(kv_like(3, 256, 64, 1.0), "bfloat16"))
    codec = CODECS[number]
    assert codec.encode(data[:-2], ChunkForm(TensorKind.KEY, "bfloat16", 64)) is None
    assert codec.encode(data[:-1], ChunkForm(TensorKind.RECURRENT, "bfloat16", 64)) is None
    assert codec.encode(data[:-2], ChunkForm(TensorKind.RECURRENT, "bfloat16", 1 << 20)) is not None
    for dtype in DTYPE_BYTES.keys() - FLOAT_TYPES.keys():
        assert codec.encode(data, ChunkForm(TensorKind.KEY, dtype, 64)) is None


@pytest.mark.parametrize("number", LOSSY)
@pytest.mark.parametrize("kind", TensorKind)
@pytest.mark.parametrize("value", [0.0, -3.5, 1e-40])
def test_a_constant_stays(number: int, kind: TensorKind, value: float) -> None:
    """A group without a range has no step to divide by; what a float32 hardly holds may become 0."""
    data = elements_of(np.full((256, 64), value), "float32")
    codec, form = CODECS[number], ChunkForm(kind, "float32", 64)
    wire = codec.encode(memoryview(data), form)
    assert wire is not None
    out = bytearray(len(data))
    codec.decode(memoryview(wire), memoryview(out), form)
    assert np.allclose(floats_of(out, "float32"), value, rtol=0.01, atol=2.0**-126)


FORMS = st.builds(
    ChunkForm, st.sampled_from(TensorKind), st.sampled_from(sorted(DTYPE_BYTES)), st.sampled_from([1, 3, 64, 200])
)


@given(st.sampled_from(sorted(CODECS)), FORMS, st.binary(max_size=200), st.integers(0, 3000))
@settings(max_examples=300, deadline=None)
def test_any_bytes_decode_or_are_a_codec_error(number: int, form: ChunkForm, wire: bytes, size: int) -> None:
    """Never another exception, whatever the form and the announced length."""
    out = bytearray(size)
    with contextlib.suppress(CodecError):
        CODECS[number].decode(memoryview(wire), memoryview(out), form)
    assert len(out) == size


@given(
    st.sampled_from(sorted(CODECS)),
    st.sampled_from(TensorKind),
    st.sampled_from(sorted(FLOAT_TYPES)),
    st.integers(0, 1 << 30),
    st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), max_size=4),
    st.integers(0, 40),
)
@settings(max_examples=300, deadline=None)
def test_a_damaged_chunk_decodes_or_is_a_codec_error(
    number: int, kind: TensorKind, dtype: str, seed: int, damage: list[tuple[int, int]], lost: int
) -> None:
    """Bytes changed and cut off a good one reach deeper than arbitrary ones; what a lossy one gives is finite."""
    codec, form = CODECS[number], ChunkForm(kind, dtype, 40)
    data = elements_of(kv_like(seed, 150, 40, 1.0), dtype)
    good = codec.encode(memoryview(data), form)
    assume(good is not None)
    assert good is not None
    wire = bytearray(good[: len(good) - lost])
    for place, value in damage:
        wire[place % len(wire)] = value
    out = bytearray(len(data))
    try:
        codec.decode(memoryview(wire), memoryview(out), form)
    except CodecError:
        return
    assert codec.lossless or np.isfinite(floats_of(out, dtype)).all()


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (64, 1), (128, 1), (131, 1), (192, 2), (257, 1), (512, 4), (576, 6), (640, 5)]
)
def test_how_many_groups_a_tokens_channels_make(channels: int, groups: int) -> None:
    """The fewest equal ones of at most 128, none below 32: both sides must agree."""
    assert channel_groups(channels) == groups
    assert count_groups(ChunkForm(TensorKind.LATENT, "bfloat16", channels), 10 * channels) == 10 * groups


def scales_and_codes(steps: Array, codes: Array) -> memoryview:
    """Values of one head: a step a token, [token, 64] codes."""
    writer = SectionWriter()
    for part in (steps >> 8, steps & 0xFF, codes):
        writer.store(part.astype(np.uint8).reshape(-1))
    wire = writer.join(b"", 1 << 30)
    assert wire is not None
    return memoryview(wire)


def test_a_codec_can_be_written_from_its_description() -> None:
    """int4 of values: (code − 7) · step, with the planes of a bfloat16's rotated bits; of keys: low + code · step, with
    codes as differences mod 16 from token to token."""
    form, codec = ChunkForm(TensorKind.VALUE, "bfloat16", 64), codec_by_name("int4")
    assert codec is not None
    codes = np.tile(np.arange(64) % 15, (2, 1))
    one, half = 0x3F80, 0x3F00
    out = bytearray(2 * 128)
    codec.decode(scales_and_codes(np.array([one, half]) << 1, codes), memoryview(out), form)
    assert np.array_equal(floats_of(out, "bfloat16").reshape(2, 64), (codes - 7) * np.array([[1.0], [0.5]]))
    writer = SectionWriter()
    for part in ([0x7F, 0x7E], [0, 0], [0x81, 0x81], [1, 0], [3, 0, 15, 1, 14, 0]):
        writer.store(np.array(part, np.uint8))
    wire, out = writer.join(b"", 1 << 30), bytearray(12)
    assert wire is not None
    codec.decode(memoryview(wire), memoryview(out), ChunkForm(TensorKind.KEY, "bfloat16", 2))
    codes, step, low = np.array([[3, 0], [2, 1], [0, 1]]), np.array([1.0, 0.5]), np.array([-4.0, 4.0])
    assert np.array_equal(floats_of(out, "bfloat16").reshape(3, 2), low + codes * step)


@pytest.mark.parametrize("step", [0x7F80, 0x7FC0, 0x7F7F, 0xBF80, 0xFFC0])
@pytest.mark.parametrize("name", LOSSY_CODECS)
def test_a_scale_that_would_poison_is_refused(name: str, step: int) -> None:
    """Infinite, NaN, negative, or so large that a code leaves the type."""
    form, codec = ChunkForm(TensorKind.VALUE, "bfloat16", 64), codec_by_name(name)
    assert codec is not None
    rotated = np.array([(step << 1 | step >> 15) & 0xFFFF])
    with pytest.raises(CodecError, match="scale"):
        codec.decode(scales_and_codes(rotated, np.ones((1, 64))), memoryview(bytearray(128)), form)


@pytest.mark.parametrize("low", [0xFF80, 0x7F80, 0x7FC0])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_low_that_would_poison_is_refused(name: str, low: int) -> None:
    """Keys have one a group: minus infinity, infinity, NaN."""
    codec, writer, channels = codec_by_name(name), SectionWriter(), 64
    assert codec is not None
    rotated = (low << 1 | low >> 15) & 0xFFFF
    for byte in (0x7F, 0, rotated >> 8, rotated & 0xFF, 1):
        writer.store(np.full(channels, byte, np.uint8))
    wire = writer.join(b"", 1 << 30)
    assert wire is not None
    with pytest.raises(CodecError, match="scale"):
        codec.decode(memoryview(wire), memoryview(bytearray(128)), ChunkForm(TensorKind.KEY, "bfloat16", channels))


@pytest.mark.parametrize("name", LOSSY_CODECS)
def test_bytes_behind_the_codes_are_refused(name: str) -> None:
    """Nothing rides along."""
    form, codec = ChunkForm(TensorKind.VALUE, "bfloat16", 64), codec_by_name(name)
    assert codec is not None
    good = scales_and_codes(np.array([0x3F80 << 1]), np.ones((1, 64)))
    codec.decode(good, memoryview(bytearray(128)), form)
    with pytest.raises(CodecError, match="1 bytes behind"):
        codec.decode(memoryview(bytes(good) + b"."), memoryview(bytearray(128)), form)


@pytest.mark.parametrize(("name", "code"), [("int8", 255), ("int4", 15), ("int4", 200), ("fp8", 0x7F), ("fp8", 0xFF)])
def test_a_code_that_none_writes_is_refused(name: str, code: int) -> None:
    """Beyond the levels, or a NaN."""
    form, codec = ChunkForm(TensorKind.VALUE, "bfloat16", 64), codec_by_name(name)
    assert codec is not None
    codes = np.ones((1, 64))
    codes[0, 63] = code
    with pytest.raises(CodecError, match="code"):
        codec.decode(scales_and_codes(np.array([0x3F80 << 1]), codes), memoryview(bytearray(128)), form)


def test_fp8_gives_back_what_e4m3_holds() -> None:
    """All 254 values, when the largest is 448; a tie goes to the even code."""
    codec = codec_by_name("fp8")
    assert codec is not None
    exponents, mantissas = np.meshgrid(np.arange(1, 16), np.arange(8), indexing="ij")
    held = np.append((8 + mantissas) * 2.0 ** (exponents - 10), np.arange(8) * 2.0**-9)
    held = held[held < 480]
    values = np.concatenate((held, -held, [1.0625, 1.1875]))
    data = elements_of(np.tile(values, (64, 1)), "float32")
    form = ChunkForm(TensorKind.RECURRENT, "float32", len(values))
    # One group of 128 elements may lack 448: give each its own.
    rows = np.concatenate((floats_of(data, "float32").reshape(-1, 1), np.full((64 * len(values), 127), 448.0)), axis=1)
    data = elements_of(rows, "float32")
    wire = codec.encode(memoryview(data), form)
    assert wire is not None
    out = bytearray(len(data))
    codec.decode(memoryview(wire), memoryview(out), form)
    got = floats_of(out, "float32").reshape(-1, 128)[: len(values), 0]
    assert np.array_equal(got, np.concatenate((held, -held, [1.0, 1.25])))


def test_a_section_bomb_is_refused_before_it_is_made() -> None:
    """A frame that announces more than its section holds."""
    writer = SectionWriter()
    writer.compress(np.zeros(1 << 24, np.uint8), Method.ENTROPY)
    wire = writer.join(b"", 1 << 30)
    assert wire is not None
    with pytest.raises(CodecError, match="announces 16777216 bytes, not 1000"):
        SectionReader(memoryview(wire)).take(1000)


def test_settings_and_registry_know_the_same_lossy_codecs() -> None:
    """What an operator can allow is what there is."""
    assert {codec.name for codec in CODECS.values()} - set(LOSSLESS_NAMES) == set(LOSSY_CODECS)
