"""vLLM's prefix cache under our keys."""

from __future__ import annotations

import msgspec
import pytest
from prfaas.common.prefixcache.events import BlocksAdded, BlocksEvicted, Reset
from prfaas.common.prefixcache.hashes import BlockHasher
from prfaas.common.prefixcache.index import PrefixIndex
from prfaas.services.vllm.prefix_mirror import Cleared, PrefixMirror, Removed, Stored, VllmEvents, salt_of

MODEL = "f" * 32
IDS = list(range(1000, 1640))


def stored(first: int, end: int, size: int, salt: str = "", name: str = "h") -> Stored:
    """Blocks [first, end) of IDS."""
    extra: list[tuple[str, ...] | None] = [None] * (end - first)
    if salt and first == 0:
        extra[0] = (salt,)
    return Stored(
        [f"{name}{salt}{i}".encode() for i in range(first, end)],
        f"{name}{salt}{first - 1}".encode() if first else None,
        IDS[first * size : end * size],
        size,
        extra_keys=extra,
    )


def mirror_of(*events: Stored | Removed | Cleared, block_tokens: int = 64) -> PrefixMirror:
    mirror = PrefixMirror(MODEL, block_tokens)
    mirror.apply(VllmEvents(0.0, list(events)))
    return mirror


@pytest.mark.parametrize("size", [16, 32, 64, 128, 48])
def test_blocks_of_any_size_are_our_keys(size: int) -> None:
    """Whatever fills our blocks is known under the keys that the router makes of the same tokens."""
    blocks = 384 // size
    mirror = mirror_of(stored(0, blocks, size))
    (event,) = mirror.drain_events() if size == 384 else [mirror.contents()[0]]
    keys = [key for each in mirror.contents() for key in each.keys]
    assert keys == BlockHasher(MODEL).keys(IDS[: blocks * size])
    assert isinstance(event, BlocksAdded)
    held = mirror.held_tokens(IDS, "")
    assert held == len(keys) * 64 - len(keys) * 64 % size
    assert held % size == 0


def test_a_chain_goes_on_where_it_ended() -> None:
    mirror = mirror_of(stored(0, 3, 48), stored(3, 8, 48))
    assert [key for event in mirror.drain_events() for key in event.keys] == BlockHasher(MODEL).keys(IDS[: 8 * 48])


def test_another_prompt_shares_what_it_begins_with() -> None:
    mirror = mirror_of(stored(0, 3, 128))
    assert mirror.held_tokens([*IDS[:256], *range(200)], "") == 256
    assert mirror.held_tokens(IDS[1:], "") == 0
    assert mirror.held_tokens(IDS[:383], "") == 256


def test_what_vllm_gives_up_is_given_up() -> None:
    mirror = mirror_of(stored(0, 3, 128))
    mirror.drain_events()
    mirror.apply(VllmEvents(0.0, [Removed([b"h2"])]))
    (event,) = mirror.drain_events()
    assert isinstance(event, BlocksEvicted)
    assert len(event.keys) == 2
    assert mirror.held_tokens(IDS, "") == 256
    mirror.apply(VllmEvents(0.0, [Removed([b"h0", b"unknown"])]))
    assert mirror.held_tokens(IDS, "") == 0


def test_a_salt_keeps_prompts_apart() -> None:
    salt = salt_of("mine/and@yours")
    assert salt is not None
    mirror = PrefixMirror(MODEL, 64)
    mirror.apply(VllmEvents(0.0, [stored(0, 2, 128, salt=salt)]))
    assert not mirror.drain_events()  # of a tenant that is none of ours
    mirror.learn("mine/and@yours")
    mirror.apply(VllmEvents(0.0, [stored(0, 2, 128, salt=salt)]))
    assert mirror.held_tokens(IDS, "mine/and@yours") == 256
    assert mirror.held_tokens(IDS, "") == 0


def test_what_can_not_be_told_apart_is_left_out() -> None:
    """Adapters, pictures in the hash, windows; and blocks whose beginning was not heard of."""
    whole = stored(0, 2, 128)
    replace = msgspec.structs.replace
    for event in (
        replace(whole, lora_name="adapter"),
        replace(whole, group_idx=1),
        replace(whole, extra_keys=[(("image", 3),), None]),
        stored(2, 3, 128),
    ):
        mirror = mirror_of(event)
        assert mirror.held_tokens(IDS, "") == 0
        assert not mirror.drain_events()


def test_a_cleared_cache_is_empty() -> None:
    mirror = mirror_of(stored(0, 2, 128), Cleared())
    assert mirror.held_tokens(IDS, "") == 0
    assert mirror.drain_events() == [Reset()]


def test_the_router_comes_to_know_the_same() -> None:
    mirror, index = PrefixMirror(MODEL, 64), PrefixIndex()
    keys = BlockHasher(MODEL).keys(IDS[:384])
    for event in (stored(0, 2, 128), stored(2, 3, 128), Removed([b"h1"])):
        mirror.apply(VllmEvents(0.0, [event]))
        index.take(0, mirror.drain_events())
        assert index.match(keys).blocks_of(0) * 64 == mirror.held_tokens(IDS, "")
    fresh = PrefixIndex()
    fresh.take(0, mirror.contents())
    assert fresh.match(keys).blocks_of(0) == 2


def test_events_come_as_vllm_packs_them() -> None:
    """msgspec structs: the batch an array, the events tagged maps with fields that we don't read."""
    packed = msgspec.msgpack.encode(
        [
            1.5,
            [
                {
                    "type": "BlockStored",
                    "block_hashes": [b"a"],
                    "parent_block_hash": None,
                    "token_ids": IDS[:128],
                    "block_size": 128,
                    "lora_id": None,
                    "medium": "GPU",
                    "lora_name": None,
                    "kv_cache_spec_kind": "full_attention",
                },
                {"type": "BlockRemoved", "block_hashes": [b"a"], "medium": "GPU"},
                {"type": "AllBlocksCleared"},
            ],
            0,
        ]
    )
    batch = msgspec.msgpack.decode(packed, type=VllmEvents)
    assert [type(event) for event in batch.events] == [Stored, Removed, Cleared]
