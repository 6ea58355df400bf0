"""From the workers of one vLLM to those of another: their caches and hooks, the control sockets, the shared memory, our
nodes' endpoints. vLLM itself is played by the test; ranks are as many as it says."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prfaas.common.config import TransportConfig
from prfaas.common.errors import ConfigError, EngineError
from prfaas.common.kv_layout import TokenRange
from prfaas.services.engine.vllm.control import VERSION, Ready, Saved
from prfaas.services.engine.vllm.model_layout import ModelKv, model_kv
from prfaas.services.engine.vllm.paged_kv import PagedTensor, StateTensor
from prfaas.services.engine.vllm.probe import probe_order
from prfaas.services.engine.vllm.shared_kv import LAYOUT_DTYPES
from prfaas.services.engine.vllm.steps import LoadStep, SaveStep, Step
from prfaas.services.engine.vllm.worker_link import WorkerLink, socket_path
from prfaas.services.engine.vllm.worker_side import WorkerSide
from prfaas.services.vllm.prefilling import pieces_of
from prfaas.services.vllm.workers import SharedTransfer, Workers
from prfaas.transport.api import TransferSpec
from prfaas.transport.endpoint import KvEndpoint
from prfaas.transport.lanes.memory import MemoryNetwork

from tests.services.engine_vllm.backends import DIM, TOKENS, Backend, layer_with, slots_of

LAYERS, HEADS = 3, 4
BLOCKS = {"prefill": [5, 2, 7], "decode": [1, 6, 3]}
MEMORY_BYTES = 1 << 20
STATE = ((3, 8), (2, 4))
LAYER_WAIT_S = 30.0


class FullAttentionSpec(SimpleNamespace):
    pass


class MambaSpec(SimpleNamespace):
    pass


def model(rank: int, ranks: int, hybrid: bool) -> ModelKv:
    attention = FullAttentionSpec(dtype=torch.bfloat16, head_size=DIM, head_size_v=DIM, sliding_window=None)
    groups: list[Any] = [(attention, [f"layers.{i}.attn" for i in range(LAYERS)])]
    if hybrid:
        mamba = MambaSpec(shapes=STATE, dtypes=(torch.bfloat16, torch.float32), tp_replicated=False)
        groups.append((mamba, ["layers.1.mixer"]))
    return model_kv(
        groups, LAYERS, HEADS, rank, ranks, lambda name: int(name.split(".")[1]), lambda dtype: LAYOUT_DTYPES[dtype]
    )


class Rank:
    """A worker of vLLM: its caches, and our connector's half in it."""

    def __init__(self, folder: Path, rank: int, ranks: int, backend: Backend, hybrid: bool) -> None:
        self.model = model(rank, ranks, hybrid)
        self.backend = backend
        self.caches: dict[str, Any] = {}
        parts: dict[str, list[Any]] = {}
        heads = HEADS // ranks
        for name, part in self.model.parts.items():
            if part.is_state:
                self.caches[name] = [torch.zeros(8, *STATE[0]).bfloat16(), torch.zeros(8, *STATE[1])]
                parts[name] = [StateTensor(each) for each in self.caches[name]]
                continue
            cache = self.caches[name] = torch.zeros(8, heads, TOKENS, 2 * DIM, dtype=torch.bfloat16)
            parts[name] = [PagedTensor(cache, order) for order in probe_order(layer_with(backend), cache, DIM, DIM)]
        ready = Ready(VERSION, "0.32.0", rank, ranks, self.model.layout.to_dict(), TOKENS, 8 * TOKENS)
        self.link = WorkerLink(socket_path(str(folder), rank), ready, self.model.layout)
        self.side = WorkerSide(self.model, parts, self.link)

    def compute(self, name: str, content: dict[str, torch.Tensor], start: int, end: int) -> None:
        """What the model's forward pass writes of a layer."""
        if self.model.parts[name].is_state:
            for cache, values in zip(self.caches[name], (content[f"{name}.conv"], content[f"{name}.ssm"]), strict=True):
                cache[BLOCKS["prefill"][0]] = values[self.model.rank] if self.model.ranks > 1 else values
            return
        heads = slice(self.model.heads.start, self.model.heads.end)
        keys, values = content[f"{name}.key"][start:end, heads], content[f"{name}.value"][start:end, heads]
        slots = slots_of(BLOCKS["prefill"], end)[start:end]
        self.backend.do_kv_cache_update(None, keys, values, self.caches[name], slots)


def random_content(tokens: int, ranks: int) -> dict[str, torch.Tensor]:
    """Of a prompt: [token, head, element] of every layer; a state's shape, for each of the ranks that share it."""
    torch.manual_seed(tokens)
    content = {
        f"layers.{i}.attn.{kind}": torch.randn(tokens, HEADS, DIM).bfloat16()
        for i in range(LAYERS)
        for kind in ("key", "value")
    }
    front = () if ranks == 1 else (ranks,)
    content["layers.1.mixer.conv"] = torch.randn(*front, *STATE[0]).bfloat16()
    content["layers.1.mixer.ssm"] = torch.randn(*front, *STATE[1])
    return content


class Region:
    """A node and its vLLM."""

    def __init__(self, name: str, folder: Path, ranks: int, backend: Backend, hybrid: bool) -> None:
        self.name = name
        self.folder = folder / name
        self.groups = 2 if hybrid else 1
        self.ranks = [Rank(self.folder, rank, ranks, backend, hybrid) for rank in range(ranks)]
        self.failures = 0
        self.workers = Workers(str(self.folder), MEMORY_BYTES, LAYER_WAIT_S, self._failed)

    def _failed(self) -> None:
        self.failures += 1

    async def start(self, network: MemoryNetwork) -> None:
        await self.workers.connect()
        self.endpoint = KvEndpoint(
            TransportConfig(codec="raw"),
            node=self.name,
            layout=self.workers.layout,
            model_fingerprint="f" * 32,
            secret=b"s" * 32,
            backend=network,
        )
        await self.endpoint.start()

    async def close(self) -> None:
        await self.endpoint.aclose()
        await self.workers.close()
        for rank in self.ranks:
            await asyncio.to_thread(rank.link.close)

    async def each_rank(self, work: Any) -> None:
        """Ranks compute at the same time, each in its own process."""
        await asyncio.gather(*(asyncio.to_thread(work, rank) for rank in self.ranks))


@contextlib.asynccontextmanager
async def regions(
    folder: Path, prefill_ranks: int = 1, decode_ranks: int = 1, hybrid: bool = False
) -> AsyncIterator[tuple[Region, Region]]:
    """The two backends store blocks in different orders."""
    network = MemoryNetwork()
    prefill = Region("prefill", folder, prefill_ranks, Backend(tile=16, turned=True), hybrid)
    decode = Region("decode", folder, decode_ranks, Backend(), hybrid)
    for region in (prefill, decode):
        await region.start(network)
    prefill.endpoint.connect("decode", decode.endpoint.addresses)
    try:
        yield prefill, decode
        for region in (prefill, decode):
            assert region.workers.arena.free_bytes == region.workers.arena.total_bytes
    finally:
        for region in (prefill, decode):
            await region.close()


class Transfer:
    """One, from a prompt's first token (or `start`) to its last but one."""

    def __init__(self, prefill: Region, decode: Region, tokens: TokenRange) -> None:
        self.prefill, self.decode, self.tokens = prefill, decode, tokens
        layout = decode.workers.layout
        self.id = uuid.uuid4().hex
        spec = TransferSpec(self.id, "r", tokens, tokens.end + 1, 8, "f" * 32, layout.layout_hash)
        self.ticket, self.receiver = decode.endpoint.receiver(spec)
        self.receiver.bind(self._reserve, self._arrived, lambda error: None)
        self.layers: list[int] = []

    def _reserve(self, spec: TransferSpec) -> SharedTransfer | None:
        self.loading = self.decode.workers.begin(self.id, "load", spec.tokens)
        return self.loading

    def _arrived(self, layer: int) -> None:
        self.layers.append(layer)
        assert self.loading is not None
        self.loading.arrived([layer])

    async def open(self) -> None:
        self.sender = self.prefill.endpoint.sender(self.ticket, "decode", self.decode.endpoint.addresses)
        saving = self.prefill.workers.begin(self.id, "save", self.tokens)
        assert saving is not None
        self.saving = saving
        ranks = self.prefill.workers.ranks

        def saved(rank: int, message: Saved) -> None:
            self.sender.put(pieces_of(saving, rank, ranks, message))

        saving.on_saved = saved
        await self.sender.open()
        await saving.begun
        assert self.loading is not None
        await self.loading.begun

    async def prefill_steps(self, content: dict[str, torch.Tensor], ends: list[int]) -> None:
        """Chunks of the prompt, each up to one of `ends`."""
        start = 0
        for end in ends:

            def chunk(rank: Rank, start: int = start, end: int = end) -> None:
                blocks = (BLOCKS["prefill"],) * self.prefill.groups
                rank.side.begin(Step(saves=[SaveStep(self.id, blocks, end)]))
                for name, part in rank.model.parts.items():
                    rank.compute(name, content, start, end)
                    if not part.is_state:  # vLLM's mixers call no hook
                        rank.side.after_layer(name)
                rank.side.end()

            await self.prefill.each_rank(chunk)
            start = end
        await self.saving.save_ended
        self.sender.finish({})

    async def decode_step(self, start: int) -> list[Any]:
        """The step that needs tokens [start, end); vLLM has written the new token's KV before it asks."""

        def step(rank: Rank) -> None:
            blocks = (BLOCKS["decode"],) * self.decode.groups
            end = self.tokens.end
            rank.side.begin(Step(loads=[LoadStep("r", self.id, blocks, start, end)]))
            rank.side.before_forward()
            for name, part in rank.model.parts.items():
                if not part.is_state:
                    new = torch.full((1, HEADS // rank.model.ranks, DIM), 7.0).bfloat16()
                    slot = slots_of(BLOCKS["decode"], end + 1)[end:]
                    rank.backend.do_kv_cache_update(None, new, new, rank.caches[name], slot)
                rank.side.before_layer(name)
            rank.side.end()

        await self.decode.each_rank(step)
        assert self.loading is not None
        return await self.loading.loaded

    async def close(self) -> None:
        await self.sender.aclose()
        await self.receiver.aclose()
        await self.saving.close()
        if self.loading is not None:
            await self.loading.close()

    def check(self, content: dict[str, torch.Tensor], start: int = 0) -> None:
        """The decode side's caches are what its backend would have written; the new token's KV is untouched."""
        end = self.tokens.end
        slots = slots_of(BLOCKS["decode"], end + 1)
        for rank in self.decode.ranks:
            heads = slice(rank.model.heads.start, rank.model.heads.end)
            for name, part in rank.model.parts.items():
                if part.is_state:
                    states = content[f"{name}.conv"], content[f"{name}.ssm"]
                    for cache, values in zip(rank.caches[name], states, strict=True):
                        own = values[rank.model.rank] if rank.model.ranks > 1 else values
                        assert torch.equal(cache[BLOCKS["decode"][-1]], own)
                    continue
                expected = torch.zeros_like(rank.caches[name])
                keys, values = content[f"{name}.key"][start:, heads], content[f"{name}.value"][start:, heads]
                rank.backend.do_kv_cache_update(None, keys, values, expected, slots[start:end])
                new = torch.full_like(keys[:1], 7.0)
                rank.backend.do_kv_cache_update(None, new, new, expected, slots[end:])
                assert torch.equal(rank.caches[name], expected)


@pytest.mark.parametrize(("prefill_ranks", "decode_ranks"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
async def test_each_rank_sends_its_heads_and_each_gets_its_own(
    tmp_path: Path, prefill_ranks: int, decode_ranks: int
) -> None:
    content = random_content(70, 1)
    async with regions(tmp_path, prefill_ranks, decode_ranks) as (prefill, decode):
        transfer = Transfer(prefill, decode, TokenRange(0, 70))
        await transfer.open()
        await transfer.prefill_steps(content, [32, 65, 70])
        loaded = await transfer.decode_step(0)
        assert not any(each.problem for each in loaded)
        transfer.check(content)
        await transfer.close()


@pytest.mark.parametrize("ranks", [1, 2])
async def test_a_recurrent_state_goes_with_the_last_token(tmp_path: Path, ranks: int) -> None:
    content = random_content(40, ranks)
    async with regions(tmp_path, ranks, ranks, hybrid=True) as (prefill, decode):
        for rank in prefill.ranks:  # the state lies in the last block of its group
            rank.compute = _in_last_block(rank)  # type: ignore[method-assign]
        transfer = Transfer(prefill, decode, TokenRange(0, 40))
        await transfer.open()
        await transfer.prefill_steps(content, [17, 40])
        await transfer.decode_step(0)
        transfer.check(content)
        await transfer.close()


def _in_last_block(rank: Rank) -> Any:
    compute = type(rank).compute

    def computed(name: str, content: dict[str, torch.Tensor], start: int, end: int) -> None:
        compute(rank, name, content, start, end)
        if rank.model.parts[name].is_state:
            for cache in rank.caches[name]:
                cache[BLOCKS["prefill"][-1]] = cache[BLOCKS["prefill"][0]]

    return computed


async def test_what_the_decode_side_holds_is_neither_sent_nor_touched(tmp_path: Path) -> None:
    content = random_content(70, 1)
    async with regions(tmp_path) as (prefill, decode):
        transfer = Transfer(prefill, decode, TokenRange(32, 70))
        await transfer.open()
        await transfer.prefill_steps(content, [70])
        await transfer.decode_step(32)
        transfer.check(content, start=32)
        layout = decode.workers.layout
        assert transfer.receiver.report.raw_bytes == layout.total_bytes(TokenRange(32, 70))
        await transfer.close()


async def test_decode_uses_a_layer_while_later_ones_are_computed(tmp_path: Path) -> None:
    content = random_content(20, 1)
    async with regions(tmp_path) as (prefill, decode):
        transfer = Transfer(prefill, decode, TokenRange(0, 20))
        await transfer.open()
        (source,), (target,) = prefill.ranks, decode.ranks
        names = [f"layers.{i}.attn" for i in range(LAYERS)]
        source.side.begin(Step(saves=[SaveStep(transfer.id, (BLOCKS["prefill"],), 20)]))
        for rank in decode.ranks:
            rank.side.begin(Step(loads=[LoadStep("r", transfer.id, (BLOCKS["decode"],), 0, 20)]))
        for name in names:
            source.compute(name, content, 0, 20)
            source.side.after_layer(name)
            await asyncio.to_thread(target.side.before_layer, name)  # returns: the layer is there
            assert transfer.layers[-1] == names.index(name)
        source.side.end()
        target.side.end()
        await transfer.saving.save_ended
        (loaded,) = await transfer.loading.loaded
        assert loaded.used_s == sorted(loaded.used_s)
        await transfer.close()


async def test_a_transfer_that_fails_lets_the_step_go_on(tmp_path: Path) -> None:
    """The step that waits for a layer is told at once, with the reason, and the blocks are given up."""
    async with regions(tmp_path) as (prefill, decode):
        transfer = Transfer(prefill, decode, TokenRange(0, 20))
        await transfer.open()
        (target,) = decode.ranks
        step = asyncio.create_task(transfer.decode_step(0))
        transfer.loading.abort("the link is down")
        (loaded,) = await step
        assert loaded.problem == "the link is down"
        assert target.side.take_bad_blocks() == set(BLOCKS["decode"])
        await transfer.close()


async def test_a_layer_that_never_comes_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.services.engine_vllm.test_between_workers.LAYER_WAIT_S", 0.05)
    async with regions(tmp_path) as (prefill, decode):
        decode.workers._layer_wait_s = 0.05
        transfer = Transfer(prefill, decode, TokenRange(0, 20))
        await transfer.open()
        (loaded,) = await transfer.decode_step(0)
        assert "not there in time" in loaded.problem
        await transfer.close()


async def test_a_closed_transfer_is_not_written_any_more(tmp_path: Path) -> None:
    content = random_content(20, 1)
    async with regions(tmp_path) as (prefill, decode):
        transfer = Transfer(prefill, decode, TokenRange(0, 20))
        await transfer.open()
        (source,) = prefill.ranks
        await transfer.close()
        before = bytes(transfer.saving.region.view)
        source.side.begin(Step(saves=[SaveStep(transfer.id, (BLOCKS["prefill"],), 20)]))
        source.compute("layers.0.attn", content, 0, 20)
        source.side.after_layer("layers.0.attn")
        source.side.end()
        assert bytes(transfer.saving.region.view) == before


async def test_a_load_of_a_transfer_that_is_gone_fails_alone(tmp_path: Path) -> None:
    async with regions(tmp_path) as (_, decode):
        (target,) = decode.ranks
        target.side.begin(Step(loads=[LoadStep("r", "0" * 32, (BLOCKS["decode"],), 0, 20)]))
        target.side.before_forward()
        target.side.before_layer("layers.0.attn")
        target.side.end()
        assert target.side.take_bad_blocks() == set(BLOCKS["decode"])
        assert target.side.take_bad_blocks() == set()


async def test_a_worker_that_dies_is_told_of_and_leaves_no_memory_taken(tmp_path: Path) -> None:
    async with regions(tmp_path) as (prefill, decode):
        transfer = Transfer(prefill, decode, TokenRange(0, 20))
        await transfer.open()
        (source,) = prefill.ranks
        await asyncio.to_thread(source.link.close)
        closing = asyncio.gather(transfer.sender.aclose(), transfer.saving.close())
        await closing
        assert prefill.failures == 1
        with pytest.raises(EngineError, match="worker 0"):
            prefill.workers.begin("1" * 32, "save", TokenRange(0, 20))
        await transfer.receiver.aclose()
        await transfer.loading.close()


async def test_a_second_node_takes_over_when_the_first_has_left(tmp_path: Path) -> None:
    rank = Rank(tmp_path, 0, 1, Backend(), hybrid=False)
    for _ in range(2):
        workers = Workers(str(tmp_path), MEMORY_BYTES, 1.0, lambda: None)
        assert (await workers.connect()).ranks == 1
        await workers.close()
    await asyncio.to_thread(rank.link.close)


async def test_where_no_vllm_listens_the_folder_is_named(tmp_path: Path) -> None:
    workers = Workers(str(tmp_path), MEMORY_BYTES, 1.0, lambda: None)
    with pytest.raises(ConfigError, match="PrfaasConnector"):
        await workers.connect()


async def test_the_socket_is_for_its_user_alone(tmp_path: Path) -> None:
    rank = Rank(tmp_path, 0, 1, Backend(), hybrid=False)
    assert socket_path(str(tmp_path), 0).stat().st_mode & 0o777 == 0o600
    await asyncio.to_thread(rank.link.close)
    with pytest.raises(ConfigError, match="too long"):
        Rank(tmp_path / ("x" * 100), 0, 1, Backend(), hybrid=False)
