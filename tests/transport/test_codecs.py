"""Codecs: lossless ones give back every byte, none makes more than was announced."""

from __future__ import annotations

import random
import struct
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.kv_layout import DTYPE_BYTES, TensorKind
from prfaas.transport.codecs.api import ChunkForm, CodecError
from prfaas.transport.codecs.lossless import ZSTD
from prfaas.transport.codecs.registry import CODECS, codec_by_name
from prfaas.transport.codecs.sections import Method, SectionWriter

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


@pytest.mark.parametrize("number", LOSSLESS)
@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("size", [1, 100, 5000, 1 << 24])
def test_a_bomb_makes_no_more_than_was_announced(number: int, method: Method, size: int) -> None:
    """A section that decodes to more (or less) than the form and the header say is an error."""
    writer = SectionWriter()
    for _ in range(2):
        writer.compress(np.zeros(size, np.uint8), method)
    wire = writer.join(b"\0", 1 << 30)
    assert wire is not None
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            CODECS[number].decode(memoryview(wire), memoryview(bytearray(3000)), KEYS)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_a_frame_that_hides_its_size_is_refused() -> None:
    """Without the announced size only decompressing would tell, and a second frame could follow."""
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1500))
    twice = zstandard.compress(bytes(1500)) + zstandard.compress(bytes(1500))
    for frame in (hidden, twice):
        wire = struct.pack("<BBI", 0, 1, len(frame)) + frame + struct.pack("<BI", 0, 1500) + bytes(1500)
        with pytest.raises(CodecError):
            ZSTD.decode(memoryview(wire), memoryview(bytearray(3000)), KEYS)


def test_a_codec_can_be_written_from_its_description() -> None:
    """Two tokens of two channels in bfloat16: exponents less their channel's reference, then mantissa and sign."""
    form = ChunkForm(TensorKind.VALUE, "bfloat16", 2)
    references, exponents, mantissas = bytes([127, 3]), bytes([0, 1, 1, 254]), bytes([0, 3, 0x80, 0])
    wire = b"\1" + b"".join(struct.pack("<BI", 0, len(s)) + s for s in (references, exponents, mantissas))
    out = bytearray(8)
    ZSTD.decode(memoryview(wire), memoryview(out), form)
    assert struct.unpack("<4H", out) == (127 << 7, 1 << 15 | 4 << 7 | 1, 128 << 7 | 64, 1 << 7)


@pytest.mark.parametrize("damage", ["flags", "cut", "method", "behind", "half-token", "empty"])
def test_a_malformed_chunk_says_what_is_wrong(damage: str) -> None:
    """Before anything is decoded into place."""
    good = b"\0" + struct.pack("<BI", 0, 64) + bytes(64) + struct.pack("<BI", 0, 64) + bytes(64)
    wire, words = {
        "flags": (b"\2" + good[1:], "unknown ones"),
        "cut": (good[:-1], "63 are left"),
        "method": (b"\0\7" + good[2:], "method 7"),
        "behind": (good + b"..", "2 bytes behind"),
        "half-token": (b"\1" + good[1:], "not whole tokens"),
        "empty": (b"", "no flags"),
    }[damage]
    form = ChunkForm(TensorKind.KEY, "bfloat16", 48)
    with pytest.raises(CodecError, match=words):
        ZSTD.decode(memoryview(wire), memoryview(bytearray(128)), form)


def test_repeated_tokens_are_found_in_mantissas_too() -> None:
    """A first layer's values depend on the token alone: text repeats them."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0x3F00, 0x4000, (20, 64)).astype("<u2")
    data = memoryview(rows[rng.integers(0, 20, 600)].tobytes())
    wire = ZSTD.encode(data, KEYS)
    assert wire is not None
    assert len(wire) < len(data) / 4


def test_references_bring_channels_of_different_scale_together() -> None:
    """Keys whose channels differ, but are each alike, take far fewer bytes than their exponents' spread would."""
    rng = np.random.default_rng(1)
    exponents = rng.integers(100, 140, 64) + rng.integers(0, 8, (512, 64))
    words = (exponents << 7 | rng.integers(0, 128, (512, 64))).astype("<u2")
    wire = ZSTD.encode(memoryview(words.tobytes()), KEYS)
    whole = ZSTD.encode(memoryview(words.tobytes()), KEYS._replace(kind=TensorKind.RECURRENT))
    assert wire is not None
    assert whole is not None
    assert len(wire) < 1.45 * words.size < 1.52 * words.size < len(whole)


def test_raw_is_no_codec() -> None:
    """Its bytes are not copied, so there is nothing to call."""
    assert codec_by_name("raw") is None
