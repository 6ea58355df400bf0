"""Nodes with a pool of prefixes: what they hold isn't sent, what another holds is fetched, routers hear of it all.

The pool here keeps names alone: the emulated engine's KV is a function of the tokens, so what is sent can be made and
what comes can be checked without keeping it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from prfaas.common.errors import TransferError
from prfaas.common.prefixcache.events import RESTART, BlocksAdded, Event
from prfaas.common.prefixcache.hashes import BlockHasher
from prfaas.common.prefixcache.index import PrefixIndex
from prfaas.common.prefixcache.pool import PrefixPool
from prfaas.common.prefixcache.sizes import CacheSizes
from prfaas.services.engine.emulated.content import KvContent
from prfaas.services.engine.emulated.engine import EmulatedEngine
from prfaas.services.engine.emulated.rows import Rows
from prfaas.services.messages import FetchFrom, KvAddressMessage, PrefillCall, PrefillResult, TicketEvent
from prfaas.transport.api import KvReceiver, KvSender
from prfaas.transport.fetching import FetchRequest

BLOCK = 64
PROMPT = bytes(range(200)) + b"and a question"


@dataclass
class Hold:
    keys: list[bytes]
    tokens: int
    ids: Sequence[int]
    released: bool = False

    def release(self) -> None:
        self.released = True


@dataclass
class Names:
    """services.engine.holds.Prefixes."""

    engine: EmulatedEngine
    holds: list[Hold] = field(default_factory=list)
    known: dict[bytes, list[int]] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    refuse: str | None = None
    capacity_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        self.pool = PrefixPool(CacheSizes(1024, BLOCK), self.capacity_bytes)
        self.drain_events, self.contents = self.pool.drain_events, self.pool.contents

    @property
    def used_bytes(self) -> int:
        return self.pool.used_bytes

    def keys(self, ids: Sequence[int], tenant: str = "") -> list[bytes]:
        return BlockHasher(self.engine.info.model_fingerprint, tenant, BLOCK).keys(ids)

    def learn(self, ids: Sequence[int], tenant: str = "") -> None:
        keys = self.keys(ids, tenant)
        lease = self.pool.acquire(keys)
        assert self.pool.insert(lease, keys)
        self.pool.release(lease)
        self.known |= {key: list(ids[: (i + 1) * BLOCK]) for i, key in enumerate(keys)}

    def hold(self, token_ids: Sequence[int], tenant: str = "") -> Hold:
        keys = self.keys(token_ids, tenant)
        hold = Hold(keys, self.pool.match(keys) * BLOCK, token_ids)
        self.holds.append(hold)
        return hold

    async def take_in(self, hold: Hold, receiver: KvReceiver) -> None:
        spec, layout = receiver.spec, receiver.layout
        memory = memoryview(bytearray(layout.total_bytes(spec.tokens)))
        rows = Rows(memory, layout, spec.tokens, spec.shard)
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        receiver.bind(lambda _: rows, lambda _: None, lambda error: failed.done() or failed.set_exception(error))
        finished = asyncio.ensure_future(receiver.finished())
        await asyncio.wait([finished, failed], return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            finished.cancel()
            await failed
        await finished
        content = KvContent(layout, list(hold.ids[: spec.tokens.end]))
        assert not any(rows.first_wrong_byte(content, layer) for layer in range(len(layout.layers)))
        hold.tokens = spec.tokens.end
        lease = self.pool.acquire(hold.keys)
        assert self.pool.insert(lease, hold.keys[: hold.tokens // BLOCK])
        self.pool.release(lease)

    def serve_fetch(self, request: FetchRequest, sender: KvSender) -> str | None:
        ids = self.known.get(request.prefix_hash)
        if self.refuse or ids is None:
            return self.refuse or "this prefix is not here"
        self.tasks.append(asyncio.create_task(self._send(sender, ids)))
        return None

    async def _send(self, sender: KvSender, ids: list[int]) -> None:
        spec, layout = sender.spec, self.engine.info.layout
        rows = Rows(memoryview(bytearray(layout.total_bytes(spec.tokens))), layout, spec.tokens, spec.shard)
        content = KvContent(layout, ids)
        try:
            await sender.open()
            for layer in range(len(layout.layers)):
                sender.put(rows.write(content, layer, spec.tokens.start, spec.tokens.end))
            sender.finish({})
            await sender.done()
        except TransferError:
            pass  # the other side has given up
        finally:
            await sender.aclose()


class WithNames(EmulatedEngine):
    """The emulated engine with a pool of names."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.prefixes = Names(self)


def names(node: Any) -> Names:
    store = node.engine.prefixes
    assert isinstance(store, Names)
    return store


async def prefilled(cluster: Any, node: Any, decode: Any, call: Any, ticket: TicketEvent, **more: Any) -> PrefillResult:
    prompt = [*call.prompt_token_ids, *call.output_token_ids]
    body = PrefillCall(call.request_id, call.router, prompt, decode.name, ticket.ticket, ticket.kv_addresses, **more)
    events = await (await cluster.post(node.url, "prefill", body)).rest()
    assert [event.name for event in events] == ["done"], events
    return msgspec.json.decode(events[-1].data, type=PrefillResult)


async def test_what_the_decode_node_holds_is_not_sent(cluster: Any, make_call: Any) -> None:
    """The ticket begins where its hold ends, the timeline says so, and the hold is released at the end."""
    decode = await cluster.node("decode", make_engine=WithNames)
    prefill = await cluster.node("prefill")
    call = make_call(PROMPT)
    names(decode).learn(call.prompt_token_ids[:-1])
    stream, ticket = await cluster.decode(decode, call)
    assert (ticket.token_start, ticket.token_end) == (192, len(PROMPT) - 1)
    result = await prefilled(cluster, prefill, decode, call, ticket)
    await stream.rest()
    assert stream.timeline["held_tokens"] == 192
    layout = decode.engine.info.layout
    assert result.raw_bytes == layout.bytes_per_token * (len(PROMPT) - 1 - 192)
    assert all(hold.released for hold in names(decode).holds)
    held = decode.metrics.registry.get_sample_value("prfaas_node_prefix_held_tokens_total", {"role": "decode"})
    assert held == 192


async def test_with_everything_held_there_is_neither_prefill_nor_transfer(cluster: Any, make_call: Any) -> None:
    """An empty ticket, and no local prefill either."""
    decode = await cluster.node("decode", make_engine=WithNames)
    call = make_call(PROMPT[:129])
    names(decode).learn(call.prompt_token_ids[:-1])
    stream, ticket = await cluster.decode(decode, call)
    assert (ticket.ticket, ticket.token_start, ticket.token_end) == ("", 128, 128)
    await stream.rest()
    assert not stream.timeline.get("local_prefill")
    assert decode.metrics.registry.get_sample_value("prfaas_node_local_prefills_total") == 0


async def test_tenants_share_nothing(cluster: Any, make_call: Any) -> None:
    """What one tenant's prompt has left is not held for another's."""
    decode = await cluster.node("decode", make_engine=WithNames)
    call = make_call(PROMPT, tenant="mine", local_prefill=True)
    names(decode).learn(call.prompt_token_ids[:-1], "yours")
    stream, ticket = await cluster.decode(decode, call)
    assert ticket.token_start == 0
    await stream.rest()


def fetch_from(node: Any, tokens: int) -> FetchFrom:
    return FetchFrom(node.name, [KvAddressMessage(a.host, a.port, a.rank) for a in node.endpoint.addresses], tokens)


async def test_a_prefix_is_fetched_before_prefill(cluster: Any, make_call: Any) -> None:
    """From the node that the router names, what the own pool lacks, byte for byte; afterwards the pool has it."""
    decode = await cluster.node("decode")
    prefill = await cluster.node("prefill", make_engine=WithNames)
    holder = await cluster.node("prefill", "holder", make_engine=WithNames)
    call = make_call(PROMPT)
    names(prefill).learn(call.prompt_token_ids[:70])
    names(holder).learn(call.prompt_token_ids[:-1])
    stream, ticket = await cluster.decode(decode, call)
    result = await prefilled(cluster, prefill, decode, call, ticket, fetch=fetch_from(holder, 192))
    await stream.rest()
    assert (result.held_tokens, result.fetched_tokens, result.fetch_failed) == (192, 128, "")
    assert result.fetched_wire_bytes > 0
    assert names(prefill).hold(call.prompt_token_ids[:-1]).tokens == 192


@pytest.mark.parametrize("trouble", ["refused", "gone", "silent", "no time"])
async def test_a_fetch_that_fails_costs_only_the_reuse(
    cluster: Any, make_call: Any, free_port: int, trouble: str
) -> None:
    """The holder doesn't have it any more, isn't there, sends nothing in the time that it is worth, or in half of what
    the request has left: the request is served all the same, and the reason is told and counted."""
    transport = {"open_timeout_s": 0.5}
    decode = await cluster.node("decode", transport=transport)
    prefill = await cluster.node("prefill", make_engine=WithNames, transport=transport)
    holder = await cluster.node("prefill", "holder", make_engine=WithNames)
    call = make_call(PROMPT)
    source = fetch_from(holder, 192)
    if trouble == "gone":
        source = FetchFrom("nobody", [KvAddressMessage("127.0.0.1", free_port)], 192)
    if trouble in ("silent", "no time"):
        holder.endpoint.on_fetch(lambda request, sender: None)
        source = msgspec.structs.replace(source, timeout_s=0.3 if trouble == "silent" else None)
    stream, ticket = await cluster.decode(decode, call)
    timeout_s = 2.0 if trouble == "no time" else 60.0
    result = await prefilled(cluster, prefill, decode, call, ticket, fetch=source, timeout_s=timeout_s)
    await stream.rest()
    assert (result.held_tokens, result.fetched_tokens) == (0, 0)
    assert result.fetch_failed
    failures = prefill.metrics.registry.collect()
    counted = [s for m in failures for s in m.samples if s.name == "prfaas_node_fetch_failures_total"]
    assert sum(sample.value for sample in counted) == 1
    assert all(hold.released for hold in names(prefill).holds)


async def test_routers_hear_what_a_pool_takes_in(cluster: Any, router: Any) -> None:
    """The contents first, then what changes; what a router has not acknowledged comes again."""
    node = await cluster.node("prefill", make_engine=WithNames)
    index = PrefixIndex()
    ids = list(PROMPT)
    names(node).learn(ids[:70])
    beat = await router.saw(lambda b: b.prefix_events is not None and _added(b.prefix_events.events) == 1)
    assert (beat.prefix_block_tokens, beat.prefix_exact, beat.routers) == (BLOCK, False, 1)
    names(node).learn(ids)
    beat = await router.saw(lambda b: b.prefix_events is not None and _added(b.prefix_events.events) == 3)
    assert beat.prefix_events is not None
    assert index.apply(0, beat.prefix_events) != RESTART
    assert index.match(names(node).keys(ids)).longest == 3


def _added(events: Sequence[Event]) -> int:
    return sum(len(event.keys) for event in events if isinstance(event, BlocksAdded))


async def test_a_profile_goes_to_who_asks(cluster: Any, router: Any) -> None:
    """Its id in every heartbeat, the file in the next one after the router wanted it."""
    router.wants_profile = True
    await cluster.node("prefill", prefill_tokens_per_s=500.0, time_scale=2.0)
    beat = await router.saw(lambda b: b.profile != "")
    assert beat.profile_id
    profile = msgspec.json.decode(beat.profile)
    assert profile["prefill_s"]["values"][-1] == pytest.approx(1000 / 500 * 2)
