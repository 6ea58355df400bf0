"""Block keys name whole prefixes of one model and tenant."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.common.errors import ConfigError
from prfaas.common.prefixcache.hashes import BlockHasher, trace_keys

TOKENS = st.lists(st.integers(0, (1 << 31) - 1), max_size=40)
BLOCK = 4


@given(TOKENS, st.sampled_from([np.int32, np.int64, np.uint32]))
def test_same_ids_have_the_same_keys(tokens: list[int], dtype: type) -> None:
    """As a list or an array of any of the three types, strided or not."""
    keys = BlockHasher("model", "tenant", BLOCK).keys(tokens)
    array = np.array(tokens, dtype)
    assert BlockHasher("model", "tenant", BLOCK).keys(array) == keys
    assert BlockHasher("model", "tenant", BLOCK).keys(np.repeat(array, 2)[::2]) == keys
    assert len(keys) == len(tokens) // BLOCK
    assert all(len(key) == 16 for key in keys)


@given(TOKENS, TOKENS)
def test_a_key_names_all_tokens_before_it(left: list[int], right: list[int]) -> None:
    """Two prompts share the keys of the blocks that they have in common from the start, and no other."""
    hasher = BlockHasher("model", "", BLOCK)
    common = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    ours, theirs = hasher.keys(left), hasher.keys(right)
    shared = common // BLOCK
    assert ours[:shared] == theirs[:shared]
    assert not set(ours[shared:]) & set(theirs)


@given(st.lists(st.integers(0, 9), min_size=BLOCK, max_size=40))
def test_models_tenants_and_block_sizes_share_no_key(tokens: list[int]) -> None:
    """Not even where the names run into one another."""
    seeds = [("model", "ab", 4), ("modela", "b", 4), ("other", "ab", 4), ("model", "", 4), ("model", "ab", 2)]
    keys = [key for model, tenant, block in seeds for key in set(BlockHasher(model, tenant, block).keys(tokens))]
    assert len(set(keys)) == len(keys)


@given(TOKENS, st.integers(0, 10))
def test_a_chain_goes_on_from_any_block(tokens: list[int], blocks: int) -> None:
    """Hashing what came later, with the last key as parent, gives what hashing everything gives."""
    hasher = BlockHasher("model", "", BLOCK)
    first = hasher.keys(tokens[: blocks * BLOCK])
    rest = hasher.keys(tokens[len(first) * BLOCK :], first[-1] if first else None)
    assert first + rest == hasher.keys(tokens)


def test_the_format_is_fixed() -> None:
    """Nodes and routers of different builds must agree; this is the formula of the module's docstring, by hand."""
    root = hashlib.blake2b(digest_size=16, person=b"prfaas-prefix-1")
    for part in (b"2", b"m", b"t"):
        root.update(len(part).to_bytes(8, "little") + part)
    first = hashlib.blake2b(b"\x01\0\0\0\xff\xff\xff\xff", digest_size=16, salt=root.digest()).digest()
    second = hashlib.blake2b(b"\x02\0\0\0\x00\x01\0\0", digest_size=16, salt=first).digest()
    assert BlockHasher("m", "t", 2).keys([1, (1 << 32) - 1, 2, 256, 7]) == [first, second]


@pytest.mark.parametrize(
    "tokens", [[-1, 0], [1 << 32, 0], np.array([[1, 2]]), np.array([1.0, 2.0]), np.array([-1], np.int32)]
)
def test_what_is_no_token_id_is_refused(tokens: object) -> None:
    """Rather than wrapped around to another token's bytes."""
    with pytest.raises((ValueError, TypeError)):
        BlockHasher("model", "", 1).keys(tokens)  # type: ignore[arg-type]


def test_a_block_size_out_of_bounds_is_refused() -> None:
    with pytest.raises(ConfigError, match="block_tokens 0"):
        BlockHasher("model", "", 0)


def test_trace_ids_are_keys_less_the_incomplete_block() -> None:
    """A block counts when the first n−1 tokens fill it."""
    assert trace_keys([7, 3, 9], 1536) == [7, 3]
    assert trace_keys([7, 3, 9], 1100) == [7, 3]
    assert trace_keys([7, 3], 1024) == [7]
    assert trace_keys([7], 512) == []
    assert trace_keys([7, 3, 9], 513, block_tokens=200) == [7, 3]


@pytest.mark.parametrize(("ids", "tokens"), [([1], 513), ([1, 2], 512), ([], 0), ([1, -2], 600), ([1, 1], 600)])
def test_trace_ids_that_can_t_be_a_prompt_s_are_refused(ids: list[int], tokens: int) -> None:
    with pytest.raises(ValueError, match="block id"):
        trace_keys(ids, tokens)
