"""Bytes of blocks and snapshots, and where snapshots are taken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.common.errors import ConfigError
from prfaas.common.kv_layout import KvLayout, LayerLayout, TensorKind, TensorLayout, TokenRange
from prfaas.common.prefixcache.sizes import CacheSizes, snapshot_points

FULL = LayerLayout(tuple(TensorLayout(kind, "bfloat16", 2, (8,)) for kind in (TensorKind.KEY, TensorKind.VALUE)))
LATENT = LayerLayout((TensorLayout(TensorKind.LATENT, "bfloat16", 1, (6,)),))
WINDOWED = LayerLayout((TensorLayout(TensorKind.KEY, "bfloat16", 2, (8,), window_tokens=40),))
LINEAR = LayerLayout((TensorLayout(TensorKind.RECURRENT, "float32", 1, (5, 5)),))


@given(st.lists(st.sampled_from([FULL, LATENT, WINDOWED, LINEAR]), min_size=1, max_size=6), st.integers(1, 20))
def test_blocks_and_a_snapshot_are_the_whole_kv(layers: list[LayerLayout], blocks: int) -> None:
    """Together as many bytes as a transfer of that prefix has."""
    layout = KvLayout(tuple(layers))
    sizes = CacheSizes.of_layout(layout, block_tokens=16)
    total = blocks * sizes.paged_block_bytes + sizes.snapshot_bytes(blocks)
    assert total == layout.total_bytes(TokenRange(0, 16 * blocks))
    assert sizes.needs_snapshot == any(layer in (WINDOWED, LINEAR) for layer in layers)


def test_pages_round_up() -> None:
    """Blocks, snapshots and tails each take whole pages."""
    sizes = CacheSizes(block_bytes=640, block_tokens=64, fixed_bytes=100, windows=((128, 3),), page_bytes=256)
    assert sizes.paged_block_bytes == 768
    assert sizes.snapshot_bytes(1) == 512  # 100 + 64 · 3 = 292
    assert sizes.snapshot_bytes(9) == 512  # 100 + 128 · 3 = 484
    assert [sizes.tail_bytes(tokens) for tokens in (0, 1, 25, 26)] == [0, 256, 256, 512]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"block_bytes": 1, "block_tokens": 0}, "block_tokens 0"),
        ({"block_bytes": -1, "page_bytes": 0}, "page_bytes 0.*negative"),
        ({"block_bytes": 1, "windows": ((0, 5),)}, "negative"),
        ({"block_bytes": 0}, "neither"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(wrong: dict, says: str) -> None:
    """All mistakes at once."""
    with pytest.raises(ConfigError, match=says):
        CacheSizes(**wrong)


def test_snapshots_are_taken_at_the_end_at_branches_and_at_intervals() -> None:
    """Never where the pool has one already, never behind the prompt."""
    assert snapshot_points(0, 0, 10) == (10,)
    assert snapshot_points(2, 5, 10) == (5, 10)
    assert snapshot_points(2, 5, 10, at_branch=False) == (10,)
    assert snapshot_points(2, 5, 10, every_blocks=4) == (4, 5, 8, 10)
    assert snapshot_points(10, 10, 10, every_blocks=1) == ()
    assert snapshot_points(0, 0, 0) == ()
