"""Codecs: lossless ones give back every byte, none makes more than was announced."""

from __future__ import annotations

import random

import lz4.block
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.kv_layout import DTYPE_BYTES, TensorKind
from prfaas.transport.codecs.api import ChunkForm, CodecError
from prfaas.transport.codecs.registry import CODECS, codec_by_name

KEYS = ChunkForm(TensorKind.KEY, "bfloat16", 64)
LOSSLESS = [number for number, codec in sorted(CODECS.items()) if codec.lossless]


@given(
    st.sampled_from(LOSSLESS),
    st.sampled_from(TensorKind),
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.integers(1, 80),
    st.binary(min_size=1, max_size=300),
    st.integers(1, 40),
)
@settings(max_examples=200, deadline=None)
def test_a_codec_gives_back_every_byte_or_says_that_it_does_not_shrink(
    number: int, kind: TensorKind, dtype: str, channels: int, data: bytes, repeat: int
) -> None:
    """Any length, whole elements or not."""
    codec, source, form = CODECS[number], memoryview(data * repeat), ChunkForm(kind, dtype, channels)
    wire = codec.encode(source, form)
    if wire is not None:
        assert len(wire) < len(source)
        out = bytearray(len(source))
        codec.decode(memoryview(wire), memoryview(out), form)
        assert out == source


@pytest.mark.parametrize("number", LOSSLESS)
def test_floats_shrink_and_noise_does_not(number: int) -> None:
    """The plane transform is there: bfloat16 near 1.0 shrinks, random bytes are left alone."""
    rng = random.Random(0)
    floats = b"".join((0x3F80 + rng.randrange(128) | rng.randrange(2) << 15).to_bytes(2, "little") for _ in range(5000))
    wire = CODECS[number].encode(memoryview(floats), KEYS)
    assert wire is not None
    assert len(wire) < 0.6 * len(floats)
    assert CODECS[number].encode(memoryview(rng.randbytes(5000)), KEYS) is None


@pytest.mark.parametrize("name", ["lz4", "zstd"])
@pytest.mark.parametrize("size", [1, 100, 5000, 1 << 24])
def test_a_bomb_makes_no_more_than_was_announced(name: str, size: int) -> None:
    """What decodes to more (or less) than the header says, and what doesn't decode at all, is an error."""
    codec = codec_by_name(name)
    assert codec is not None
    zeros = bytes(size)
    wire = lz4.block.compress(zeros, store_size=False) if name == "lz4" else zstandard.compress(zeros)
    out = memoryview(bytearray(3000))
    for data in (wire, b"\xff" * 50):
        with pytest.raises(CodecError):
            codec.decode(memoryview(data), out, KEYS)


def test_raw_is_no_codec() -> None:
    """Its bytes are not copied, so there is nothing to call."""
    assert codec_by_name("raw") is None
