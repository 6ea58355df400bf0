"""KV of prefixes in host memory: what is written is what is read, and what others may see of it when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.config import TransportConfig
from prfaas.common.errors import ConfigError, NoRoomError, PeerRefusedError, TransferError
from prfaas.common.kv_layout import KvLayout, LayerLayout, TensorKind, TensorLayout, TokenRange
from prfaas.common.prefixcache.events import BlocksAdded, BlocksEvicted, SnapshotsAdded
from prfaas.services.engine.prefix_store import Hold, PrefixStore, Writing
from prfaas.transport.api import KvSender, TransferSpec
from prfaas.transport.endpoint import KvEndpoint
from prfaas.transport.fetching import FetchRequest

BLOCK = 16
WAIT_S = 20
DENSE = KvLayout(
    (
        LayerLayout(
            (
                TensorLayout(TensorKind.KEY, "bfloat16", 2, (4,)),
                TensorLayout(TensorKind.VALUE, "bfloat16", 2, (4,)),
            )
        ),
    )
    * 2
)
LATENT = KvLayout((LayerLayout((TensorLayout(TensorKind.LATENT, "bfloat16", 1, (12,)),)),) * 3)
HYBRID = KvLayout(
    (
        LayerLayout((TensorLayout(TensorKind.RECURRENT, "float32", 1, (7, 11)),)),
        LayerLayout(
            (
                TensorLayout(TensorKind.KEY, "bfloat16", 2, (4,)),
                TensorLayout(TensorKind.VALUE, "bfloat16", 2, (4,), window_tokens=40),
            )
        ),
        LayerLayout(()),
        LayerLayout(
            (TensorLayout(TensorKind.CONV, "bfloat16", 1, (5, 3)), TensorLayout(TensorKind.KEY, "int8", 3, (2,)))
        ),
    )
)
STATE_ONLY = KvLayout((LayerLayout((TensorLayout(TensorKind.RECURRENT, "float32", 1, (9,)),)),))
LAYOUTS = {"dense": DENSE, "latent": LATENT, "hybrid": HYBRID, "state_only": STATE_ONLY}


def tokens_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, count).tolist()


def row_bytes(layout: KvLayout, ids: list[int], layer: int, tensor: int, row: int, start: int, end: int) -> bytes:
    """KV that follows from the tokens, as a model's does: of tokens [start, end), or of the state after `end`."""
    spec = layout.layers[layer].tensors[tensor]
    salt = layer * 101 + tensor * 31 + row * 7

    def of(position: int, size: int) -> bytes:
        seed = hash((salt, tuple(ids[: position + 1]))) & 0xFFFFFFFF
        return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()

    if spec.kind.is_state:
        return of(end - 1, spec.fixed_bytes)
    return b"".join(of(i, spec.row_bytes_per_token) for i in range(start, end))


def fill(writing: Writing, layout: KvLayout, ids: list[int], *, step: int = 37) -> None:
    """As an engine does: step by step, states where they are wanted."""
    for layer, tensors in enumerate(layout.layers):
        for tensor, spec in enumerate(tensors.tensors):
            for row in range(spec.heads):
                if not spec.kind.is_state and spec.window_tokens is None:
                    for start in range(0, len(ids), step):
                        end = min(start + step, len(ids))
                        data = row_bytes(layout, ids, layer, tensor, row, start, end)
                        writing.write(layer, tensor, row, start, memoryview(data))
                    continue
                for point in writing.snapshot_points:
                    first = max(0, point - (spec.window_tokens or 0))
                    data = row_bytes(layout, ids, layer, tensor, row, first, point)
                    writing.write_state(point, layer, tensor, row, memoryview(data))
    for point in writing.snapshot_points:
        writing.complete_state(point)


def keep(store: PrefixStore, ids: list[int], tenant: str = "", **options: Any) -> int:
    writing = store.reserve(ids, tenant, **options)
    if writing is None:
        return 0
    fill(writing, store.layout, ids)
    return writing.commit()


def check(hold: Hold, layout: KvLayout, ids: list[int], step: int = 29) -> None:
    """Every byte of the hold, in pieces that don't fit blocks."""
    if not hold.tokens:
        return
    for layer, tensors in enumerate(layout.layers):
        for tensor, spec in enumerate(tensors.tensors):
            for row in range(spec.heads):
                first, pieces = 0, range(0, hold.tokens, step)
                if spec.kind.is_state:
                    pieces = range(1)
                elif spec.window_tokens is not None:
                    first = max(0, hold.tokens - spec.window_tokens)
                    pieces = range(first, hold.tokens, step)
                for start in pieces:
                    end = hold.tokens if spec.kind.is_state else min(start + step, hold.tokens)
                    want = row_bytes(layout, ids, layer, tensor, row, start, end)
                    got = memoryview(bytearray(len(want)))
                    hold.read(layer, tensor, row, start, got)
                    assert bytes(got) == want, (layer, tensor, row, start)


def make(layout: KvLayout = DENSE, blocks: int = 64, fingerprint: str = "model") -> PrefixStore:
    probe = PrefixStore(layout, fingerprint, 1 << 20, BLOCK)
    return PrefixStore(layout, fingerprint, blocks * probe.sizes.page_bytes, BLOCK)


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_kept_comes_back(name: str) -> None:
    """A prompt of ten blocks and a bit: all of its blocks, with the state at exactly their end. A longer prompt that
    begins like it holds as much, one that differs in the first token nothing."""
    layout, ids = LAYOUTS[name], tokens_of(1, 10 * BLOCK + 5)
    store = make(layout, 200)
    assert keep(store, ids) == 10 * BLOCK
    hold = store.hold([*ids, *tokens_of(2, 50)])
    assert hold.tokens == 10 * BLOCK
    check(hold, layout, ids)
    other = store.hold([(ids[0] + 1) % 1000, *ids[1:]])
    assert other.tokens == 0
    hold.release()
    other.release()
    assert (store.counters.asked_tokens, store.counters.hit_tokens) == (2 * len(ids) + 50, 10 * BLOCK)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_second_turn_adds_its_own(name: str) -> None:
    """Only the blocks behind the first turn's are written; both turns can be read afterwards."""
    layout, ids = LAYOUTS[name], tokens_of(1, 13 * BLOCK)
    store = make(layout, 200)
    keep(store, ids[: 6 * BLOCK])
    writing = store.reserve(ids)
    assert writing is not None
    assert (writing.start, writing.end) == (6 * BLOCK, 13 * BLOCK)
    fill(writing, layout, ids)
    assert writing.commit() == 13 * BLOCK
    for length in (6 * BLOCK, 13 * BLOCK):
        hold = store.hold(ids[:length])
        assert hold.tokens == length
        check(hold, layout, ids)
        hold.release()


def test_a_snapshot_in_anothers_place() -> None:
    """Room for one: the second prompt's state takes the first one's, and is what was written."""
    store = make(STATE_ONLY, 1)
    for seed in (1, 2):
        ids = tokens_of(seed, 3 * BLOCK)
        assert keep(store, ids) == 3 * BLOCK
        hold = store.hold(ids)
        assert hold.tokens == 3 * BLOCK
        check(hold, STATE_ONLY, ids)
        hold.release()


def test_state_is_reused_at_exact_lengths_only() -> None:
    """A prompt that leaves in the middle finds blocks but no state; when it comes a second time, it has left one at the
    branch, and a third that leaves there too can begin from it."""
    store, ids = make(HYBRID, 200), tokens_of(1, 8 * BLOCK)
    keep(store, ids)
    branch = [*ids[: 3 * BLOCK], *tokens_of(2, 4 * BLOCK)]
    hold = store.hold(branch)
    assert hold.tokens == 0
    hold.release()
    assert keep(store, branch) == 7 * BLOCK
    third = [*ids[: 3 * BLOCK], *tokens_of(3, 4 * BLOCK)]
    hold = store.hold(third)
    assert hold.tokens == 3 * BLOCK
    check(hold, HYBRID, ids)
    hold.release()


def test_snapshots_between() -> None:
    """Every second block, too: a prompt that leaves there needs no earlier visitor."""
    store, ids = make(HYBRID, 400), tokens_of(1, 8 * BLOCK)
    keep(store, ids, every_blocks=2)
    for length in (2 * BLOCK, 4 * BLOCK, 5 * BLOCK):
        hold = store.hold([*ids[:length], *tokens_of(9, 30)])
        assert hold.tokens == length // (2 * BLOCK) * 2 * BLOCK
        check(hold, HYBRID, ids)
        hold.release()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_happens_what_is_held_is_right(data: st.DataObject) -> None:
    """Prompts that share beginnings come and go in a small store: every hold has its own prompt's bytes, holds keep
    theirs while others evict, and when all is released nothing is pinned."""
    layout = data.draw(st.sampled_from(list(LAYOUTS.values())))
    store = make(layout, data.draw(st.integers(8, 60)))
    holds: list[tuple[Hold, list[int]]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        trunk = data.draw(st.integers(0, 2))
        length = data.draw(st.integers(1, 9 * BLOCK))
        ids = [*tokens_of(trunk, min(length, 3 * BLOCK)), *tokens_of(data.draw(st.integers(10, 12)), length)]
        action = data.draw(st.sampled_from(["keep", "abandon", "part", "hold", "release"]))
        if action in ("keep", "abandon", "part"):
            writing = store.reserve(ids)
            if writing is not None:
                fill(writing, layout, ids, step=data.draw(st.integers(1, 50)))
                if action == "abandon":
                    writing.abandon()
                else:
                    writing.commit(None if action == "keep" else data.draw(st.integers(0, len(ids))))
        elif action == "hold":
            holds.append((store.hold(ids), ids))
        elif holds:
            hold, held_ids = holds.pop()
            check(hold, layout, held_ids)
            hold.release()
        assert store.used_bytes <= store.capacity_bytes
    for hold, held_ids in holds:
        check(hold, layout, held_ids)
        hold.release()
    assert store.pool.pinned_bytes == 0


# -- who sees what when -----------------------------------------------------------------------------------------------


def test_nothing_is_seen_before_commit() -> None:
    """Nor is anything of what was abandoned, whose room is free again."""
    store, ids = make(), tokens_of(1, 4 * BLOCK)
    writing = store.reserve(ids)
    assert writing is not None
    fill(writing, DENSE, ids)
    assert store.hold(ids).tokens == 0
    writing.abandon()
    assert store.hold(ids).tokens == 0
    assert store.used_bytes == 0
    assert store.drain_events() == []


def test_a_part_may_be_committed() -> None:
    """An output that was cut short: whole blocks up to there, for a model with state none without its state."""
    ids = tokens_of(1, 6 * BLOCK)
    for layout, held in ((DENSE, 3 * BLOCK), (HYBRID, 0)):
        store = make(layout, 200)
        writing = store.reserve(ids)
        assert writing is not None
        fill(writing, layout, ids)
        assert writing.commit(3 * BLOCK + 9) == held
        assert store.hold(ids).tokens == held


def test_a_state_that_was_not_written_whole_is_none() -> None:
    store, ids = make(HYBRID, 200), tokens_of(1, 4 * BLOCK)
    writing = store.reserve(ids)
    assert writing is not None
    fill(writing, HYBRID, ids)
    writing._written.clear()
    assert writing.commit() == 0
    assert store.used_bytes == 0


def test_two_that_write_the_same_keep_it_once() -> None:
    store, ids = make(), tokens_of(1, 4 * BLOCK)
    first, second = store.reserve(ids), store.reserve(ids)
    assert first is not None
    assert second is not None
    for writing in (first, second):
        fill(writing, DENSE, ids)
        assert writing.commit() == 4 * BLOCK
    assert store.used_bytes == 4 * store.sizes.page_bytes
    hold = store.hold(ids)
    check(hold, DENSE, ids)
    assert store.reserve(ids) is None, "there is nothing new to keep"


def test_the_oldest_make_way_but_never_what_is_held() -> None:
    """A store of eight blocks: the first prompt is held and stays, the second goes, the third is in its place."""
    store = make(blocks=8)
    prompts = [tokens_of(seed, 3 * BLOCK) for seed in range(3)]
    keep(store, prompts[0])
    hold = store.hold(prompts[0])
    keep(store, prompts[1])
    assert keep(store, prompts[2]) == 3 * BLOCK
    check(hold, DENSE, prompts[0])
    assert store.hold(prompts[1]).tokens < 3 * BLOCK
    assert store.reserve(tokens_of(9, 9 * BLOCK)) is None
    hold.release()


def test_tenants_share_nothing() -> None:
    store, ids = make(), tokens_of(1, 4 * BLOCK)
    keep(store, ids, "red")
    assert store.hold(ids, "blue").tokens == 0
    assert store.hold(ids, "red").tokens == 4 * BLOCK


def test_events_tell_of_blocks_and_states() -> None:
    """What an index needs: added with the chain's keys, state at the end, evicted when it goes."""
    store, ids = make(HYBRID, 40), tokens_of(1, 2 * BLOCK)
    keep(store, ids)
    added, state = store.drain_events()
    assert isinstance(added, BlocksAdded)
    assert added.keys == tuple(store.keys(ids))
    assert state == SnapshotsAdded((store.keys(ids)[-1],))
    for seed in range(2, 12):
        keep(store, tokens_of(seed, 4 * BLOCK))
    assert any(isinstance(event, BlocksEvicted) and added.keys[0] in event.keys for event in store.drain_events())


def test_mistakes_of_an_engine_are_told() -> None:
    """Reading what isn't held or was released, a state at another length, and a store that is too small for a block."""
    store, ids = make(HYBRID, 200), tokens_of(1, 4 * BLOCK)
    keep(store, ids)
    hold = store.hold(ids)
    with pytest.raises(ValueError, match="of a hold of 64"):
        hold.read(3, 1, 0, 60, memoryview(bytearray(2 * 9)))
    with pytest.raises(ValueError, match=r"window tokens \[0, 1\)"):
        hold.read(1, 1, 0, 0, memoryview(bytearray(8)))
    with pytest.raises(ValueError, match="bytes of a state"):
        hold.read(0, 0, 0, 0, memoryview(bytearray(3)))
    hold.release()
    with pytest.raises(ValueError, match="released"):
        hold.read(3, 1, 0, 0, memoryview(bytearray(2)))
    writing = store.reserve(tokens_of(2, 4 * BLOCK))
    assert writing is not None
    with pytest.raises(ValueError, match="no snapshot is taken"):
        writing.write_state(3 * BLOCK, 0, 0, 0, memoryview(bytearray(308)))
    writing.abandon()
    with pytest.raises(ConfigError, match=r"engine\.prefix_bytes = 100 is less than one block"):
        PrefixStore(DENSE, "model", 100, BLOCK)


# -- FETCH ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def two_nodes(
    layout: KvLayout, blocks: int = 400, ends: list[KvEndpoint] | None = None, egress_bytes_per_s: float = 0.0
) -> AsyncIterator[tuple[PrefixStore, PrefixStore, Any]]:
    """Stores behind real endpoints: the holder's, the asking node's, and `fetch(hold, ids, tokens)` of the latter."""
    holder, asker = make(layout, blocks), make(layout, blocks)
    ends = [] if ends is None else ends
    for name in ("holder", "asker"):
        config = TransportConfig(lanes=2, egress_bytes_per_s=egress_bytes_per_s)
        end = KvEndpoint(config, node=name, layout=layout, model_fingerprint="model", secret=b"secret")
        await end.start()
        ends.append(end)
    ends[0].on_fetch(holder.serve_fetch)

    async def fetch(hold: Hold, end_tokens: int, key: bytes | None = None) -> None:
        spec = TransferSpec(
            "ab" * 16, "r", TokenRange(hold.tokens, end_tokens), end_tokens + 1, 1, "model", layout.layout_hash
        )
        ticket, receiver = ends[1].receiver(spec, "holder")
        key = key or hold.keys[end_tokens // BLOCK - 1]
        # Bound in its first step, before anything can come.
        taking = asyncio.create_task(asker.take_in(hold, receiver))
        try:
            async with asyncio.timeout(WAIT_S):
                await asyncio.sleep(0)
                if not taking.done():
                    await ends[1].fetch(ticket, key, "holder", ends[0].addresses, 10.0)
                await taking
        finally:
            taking.cancel()
            await asyncio.wait([taking])
            await receiver.aclose()

    try:
        yield holder, asker, fetch
    finally:
        await holder.aclose()
        for end in ends:
            await end.aclose()


def told_when_asked(holder: PrefixStore, end: KvEndpoint) -> asyncio.Event:
    """Set when a FETCH has come."""
    asked = asyncio.Event()

    def serve(request: FetchRequest, sender: KvSender) -> str | None:
        asked.set()
        return holder.serve_fetch(request, sender)

    end.on_fetch(serve)
    return asked


@pytest.mark.parametrize("name", LAYOUTS)
async def test_a_prefix_is_fetched_from_another_node(name: str) -> None:
    """All of it, or what is behind that which is there already; afterwards it is held here, and told of in events."""
    layout, ids = LAYOUTS[name], tokens_of(1, 12 * BLOCK)
    async with two_nodes(layout) as (holder, asker, fetch):
        keep(holder, ids)
        keep(asker, ids[: 5 * BLOCK])
        asker.drain_events()
        hold = asker.hold(ids)
        assert hold.tokens == 5 * BLOCK
        await fetch(hold, 12 * BLOCK)
        assert hold.tokens == 12 * BLOCK
        check(hold, layout, ids)
        hold.release()
        moved = layout.total_bytes(TokenRange(5 * BLOCK, 12 * BLOCK))
        assert asker.counters.fetched_bytes == moved
        assert asker.drain_events()
        assert asker.hold(ids).tokens == 12 * BLOCK
        await asyncio.gather(*holder._serving)
    assert holder.counters.served_bytes == moved
    assert holder.pool.pinned_bytes == 0


async def test_what_is_not_held_is_refused_and_the_hold_stays() -> None:
    """Another prefix, or a shorter one than was asked for; nothing is left behind."""
    ids = tokens_of(1, 8 * BLOCK)
    async with two_nodes(DENSE) as (holder, asker, fetch):
        keep(holder, ids[: 4 * BLOCK])
        keep(asker, ids[: 2 * BLOCK])
        hold = asker.hold(ids)
        used = asker.used_bytes
        with pytest.raises(PeerRefusedError, match="it holds no such prefix"):
            await fetch(hold, 8 * BLOCK)
        with pytest.raises(PeerRefusedError, match="it holds 64 tokens of that prefix"):
            await fetch(hold, 8 * BLOCK, holder.keys(ids[: 4 * BLOCK])[-1])
        assert hold.tokens == 2 * BLOCK
        check(hold, DENSE, ids)
        hold.release()
        assert (asker.used_bytes, asker.pool.pinned_bytes) == (used, 0)


async def test_a_holder_that_leaves_costs_the_fetch_alone() -> None:
    """In the middle of it: an error, the hold as it was, and no memory lost."""
    ids = tokens_of(1, 8 * BLOCK)
    ends: list[KvEndpoint] = []
    async with two_nodes(DENSE, 400, ends, egress_bytes_per_s=1000) as (holder, asker, fetch):
        keep(holder, ids)
        agreed = told_when_asked(holder, ends[0])
        hold = asker.hold(ids)
        fetching = asyncio.create_task(fetch(hold, 8 * BLOCK))
        await agreed.wait()
        assert holder.pool.pinned_bytes > 0
        assert asker.pool.pinned_bytes > 0
        await ends[0].aclose()
        with pytest.raises(TransferError):
            await fetching
        assert hold.tokens == 0
        hold.release()
        assert (asker.used_bytes, asker.pool.pinned_bytes) == (0, 0)
    assert holder.pool.pinned_bytes == 0


async def test_a_fetch_that_is_cancelled_leaves_nothing() -> None:
    """The request's client has left while the prefix was on its way."""
    ids = tokens_of(1, 8 * BLOCK)
    ends: list[KvEndpoint] = []
    async with two_nodes(DENSE, 400, ends, egress_bytes_per_s=1000) as (holder, asker, fetch):
        keep(holder, ids)
        agreed = told_when_asked(holder, ends[0])
        hold = asker.hold(ids)
        fetching = asyncio.create_task(fetch(hold, 8 * BLOCK))
        await agreed.wait()
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        hold.release()
        assert (asker.used_bytes, asker.pool.pinned_bytes) == (0, 0)
    assert holder.pool.pinned_bytes == 0


async def test_no_room_is_said_before_anything_is_asked_for() -> None:
    ids = tokens_of(1, 8 * BLOCK)
    async with two_nodes(DENSE, blocks=12) as (holder, asker, fetch):
        keep(holder, ids)
        blocker = tokens_of(5, 10 * BLOCK)
        keep(asker, blocker)
        pinned = asker.hold(blocker)
        hold = asker.hold(ids)
        with pytest.raises(NoRoomError, match="no room for the fetched prefix"):
            await fetch(hold, 8 * BLOCK)
        assert holder.counters.served_bytes == 0
        pinned.release()
        hold.release()
