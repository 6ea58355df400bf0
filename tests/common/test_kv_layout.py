"""KV layouts: sizes as functions of (range, shard), and what the hash covers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.common.errors import ConfigError
from prfaas.common.kv_layout import (
    KvLayout,
    LayerLayout,
    Shard,
    TensorKind,
    TensorLayout,
    TokenRange,
    model_fingerprint,
)

KEY = TensorLayout(TensorKind.KEY, "bfloat16", 4, (64,))
VALUE = replace(KEY, kind=TensorKind.VALUE)
WINDOWED = replace(KEY, window_tokens=100)
STATE = TensorLayout(TensorKind.RECURRENT, "float32", 1, (8, 16, 16))
LATENT = TensorLayout(TensorKind.LATENT, "bfloat16", 1, (576,))
LAYOUT = KvLayout((LayerLayout((KEY, VALUE)), LayerLayout((WINDOWED,)), LayerLayout((STATE, LATENT)), LayerLayout(())))


def test_bytes_of_a_range():
    """A token costs its heads x dim x width; a window is bounded; a state is whole; an empty layer is nothing."""
    tokens = TokenRange(0, 1000)
    assert LAYOUT.layer_bytes(0, tokens) == 2 * 1000 * 4 * 64 * 2
    assert LAYOUT.layer_bytes(1, tokens) == 100 * 4 * 64 * 2
    assert LAYOUT.layer_bytes(2, tokens) == 8 * 16 * 16 * 4 + 1000 * 576 * 2
    assert LAYOUT.layer_bytes(3, tokens) == 0


def test_window_counts_back_from_the_end():
    """The window is the last tokens before `end`, whatever the start."""
    extent = LAYOUT.extent(1, 0, TokenRange(0, 1000))
    assert (extent.token_start, extent.tokens) == (900, 100)
    extent = LAYOUT.extent(1, 0, TokenRange(950, 1000))
    assert (extent.token_start, extent.tokens) == (950, 50)


def test_empty_range_is_empty():
    """Nothing to compute is nothing to send, states included."""
    assert LAYOUT.total_bytes(TokenRange(7, 7)) == 0


@given(start=st.integers(0, 500), more=st.integers(0, 500), cut=st.integers(0, 4))
def test_shards_add_up_to_the_whole(start, more, cut):
    """Two shards that split the heads carry together exactly what one whole transfer carries."""
    tokens = TokenRange(start, start + more)
    parts = [Shard(0, 2, 0, cut), Shard(1, 2, cut, None)]
    assert sum(LAYOUT.total_bytes(tokens, p) for p in parts) == LAYOUT.total_bytes(tokens)


def test_hash_covers_shape_not_dtype():
    """Two engines with the same shapes and other dtypes have one layout hash; another window has another."""
    other_dtype = KvLayout((LayerLayout((replace(KEY, dtype="float32"), VALUE)), *LAYOUT.layers[1:]))
    other_window = KvLayout((LAYOUT.layers[0], LayerLayout((KEY,)), *LAYOUT.layers[2:]))
    assert other_dtype.layout_hash == LAYOUT.layout_hash
    assert other_window.layout_hash != LAYOUT.layout_hash


def test_round_trip():
    """The JSON-able form reads back as the same layout."""
    assert KvLayout.from_dict(LAYOUT.to_dict()) == LAYOUT


@pytest.mark.parametrize(
    "change", [{"dtype": "float12"}, {"heads": 0}, {"dims": ()}, {"dims": (1 << 30,)}, {"window_tokens": 0}]
)
def test_nonsense_is_refused(change):
    """A layout from a peer or a file is checked before anything is allocated."""
    with pytest.raises(ConfigError, match="KV layout"):
        replace(KEY, **change)


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (5, 4), (0, 1 << 30)])
def test_bad_ranges_are_refused(start, end):
    """A token range is ordered and bounded."""
    with pytest.raises(ConfigError):
        TokenRange(start, end)


def test_fingerprint_is_order_free_and_content_bound():
    """The order of files doesn't matter, their names and contents do."""
    a, b = ("config.json", b"1"), ("model.safetensors", b"2")
    assert model_fingerprint([a, b]) == model_fingerprint([b, a])
    assert model_fingerprint([a, b]) != model_fingerprint([a, ("model.safetensors", b"3")])
