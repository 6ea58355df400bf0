"""Out of a paged cache and into it, whatever order the backend stores a block in."""

from __future__ import annotations

import pytest
import torch
from prfaas.common.errors import EngineError
from prfaas.services.engine.vllm.paged_kv import PagedTensor, StateTensor
from prfaas.services.engine.vllm.probe import plain_order, probe_order

from tests.services.engine_vllm.backends import (
    DIM,
    HEADS,
    TOKENS,
    Backend,
    empty_cache,
    layer_with,
    random_tokens,
    slots_of,
)

BACKENDS = [Backend(), Backend(tile=16), Backend(tile=16, turned=True), Backend(tile=TOKENS, turned=True)]
BLOCKS = [3, 1, 4]


def paged(backend: Backend, cache: torch.Tensor) -> tuple[PagedTensor, PagedTensor]:
    keys, values = probe_order(layer_with(backend), cache, DIM, DIM)
    return PagedTensor(cache, keys), PagedTensor(cache, values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_the_backend_wrote_is_read_in_canonical_order(backend: Backend, dtype: torch.dtype) -> None:
    cache = empty_cache(6, dtype)
    keys, values = random_tokens(80, dtype=dtype)
    backend.do_kv_cache_update(None, keys, values, cache, slots_of(BLOCKS, 80))
    for tensor, written in zip(paged(backend, cache), (keys, values), strict=True):
        for start, end in ((0, 80), (5, 6), (30, 70), (32, 64), (79, 80)):
            out = torch.empty(HEADS, end - start, DIM, dtype=dtype)
            tensor.read(BLOCKS, start, end, out)
            assert torch.equal(out, written[start:end].transpose(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("start", "end"), [(0, 80), (5, 6), (30, 70), (32, 64), (33, 63), (31, 33), (64, 80)])
def test_what_is_written_is_as_if_the_backend_had(backend: Backend, start: int, end: int) -> None:
    """And the other tokens of the blocks stay as they were."""
    cache = empty_cache(6)
    backend.do_kv_cache_update(None, *random_tokens(96, seed=1), cache, slots_of(BLOCKS, 96))
    expected = cache.clone()
    keys, values = random_tokens(80, seed=2)
    backend.do_kv_cache_update(None, keys[start:end], values[start:end], expected, slots_of(BLOCKS, 80)[start:end])
    for tensor, data in zip(paged(backend, cache), (keys, values), strict=True):
        tensor.write(BLOCKS, start, end, data[start:end].transpose(0, 1).contiguous())
    assert torch.equal(cache, expected)


def test_probing_leaves_the_cache_alone() -> None:
    cache = empty_cache(2)
    cache.fill_(7)
    paged(Backend(tile=16), cache)
    assert (cache == 7).all()


def test_a_block_of_the_table_may_be_several_of_the_kernel() -> None:
    backend, cache = Backend(tile=16), empty_cache(12)
    keys, values = random_tokens(96)
    kernel_blocks = [6, 7, 2, 3]  # blocks 3 and 1 of the table, of two each
    backend.do_kv_cache_update(None, keys, values, cache, slots_of(kernel_blocks, 96))
    order, _ = probe_order(layer_with(backend), cache, DIM, DIM)
    tensor = PagedTensor(cache, order, kernel_blocks=2)
    assert tensor.block_tokens == 2 * TOKENS
    out = torch.empty(HEADS, 60, DIM, dtype=cache.dtype)
    tensor.read([3, 1], 20, 80, out)
    assert torch.equal(out, keys[20:80].transpose(0, 1))


def test_a_cache_whose_tokens_lie_outside_its_heads() -> None:
    """As [block, token, head, content] in memory: the strides of the view say so."""
    cache = torch.zeros(4, TOKENS, HEADS, 2 * DIM, dtype=torch.bfloat16).transpose(1, 2)
    keys, _ = random_tokens(40)
    # A backend of this kind has key and value of a token side by side.
    for i in range(40):
        cache[[2, 0][i // TOKENS], :, i % TOKENS, :DIM] = keys[i]
    tensor = PagedTensor(cache, plain_order(cache, 0, DIM))
    out = torch.empty(HEADS, 38, DIM, dtype=cache.dtype)
    tensor.read([2, 0], 2, 40, out)
    assert torch.equal(out, keys[2:40].transpose(0, 1))


def test_a_backend_that_stores_other_numbers_is_refused() -> None:
    class Quantizing(Backend):
        def do_kv_cache_update(self, layer, key, value, cache, slots) -> None:  # type: ignore[no-untyped-def]
            super().do_kv_cache_update(layer, key / 2, value, cache, slots)

    with pytest.raises(EngineError, match="does not store every key"):
        probe_order(layer_with(Quantizing()), empty_cache(2, torch.float32), DIM, DIM)


def test_an_order_without_strides_is_refused() -> None:
    class Shuffled(Backend):
        def do_kv_cache_update(self, layer, key, value, cache, slots) -> None:  # type: ignore[no-untyped-def]
            order = torch.arange(TOKENS)
            order[[3, 17]] = order[[17, 3]]
            super().do_kv_cache_update(layer, key, value, cache, order[slots])

    with pytest.raises(EngineError, match="strides"):
        probe_order(layer_with(Shuffled()), empty_cache(2), DIM, DIM)


def test_a_state_goes_whole() -> None:
    cache = torch.randn(5, 4, 3)
    state = StateTensor(cache)
    out = torch.empty(4, 3)
    state.read(2, out)
    assert torch.equal(out, cache[2])
    state.write(4, out)
    assert torch.equal(cache[4], cache[2])
