"""Nodes with a pool of prefixes: what they hold isn't sent, what another holds is fetched, routers hear of it all.

The emulated engine checks every byte of a context before its first token, what its pool holds included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from prfaas.common.prefixcache.events import RESTART, BlocksAdded, Event
from prfaas.common.prefixcache.index import PrefixIndex
from prfaas.services.engine.emulated.keeping import keep
from prfaas.services.engine.prefix_store import PrefixStore
from prfaas.services.messages import FetchFrom, KvAddressMessage, PrefillCall, PrefillResult, TicketEvent

BLOCK = 64
PROMPT = bytes(range(200)) + b"and a question"


def pool(node: Any) -> PrefixStore:
    store = node.engine.prefixes
    assert isinstance(store, PrefixStore)
    return store


async def learn(node: Any, ids: Sequence[int], tenant: str = "") -> None:
    """As if a prompt of these tokens had been computed there."""
    await keep(node.engine._machine, ids, tenant)


async def prefilled(cluster: Any, node: Any, decode: Any, call: Any, ticket: TicketEvent, **more: Any) -> PrefillResult:
    prompt = [*call.prompt_token_ids, *call.output_token_ids]
    body = PrefillCall(call.request_id, call.router, prompt, decode.name, ticket.ticket, ticket.kv_addresses, **more)
    events = await (await cluster.post(node.url, "prefill", body)).rest()
    assert [event.name for event in events] == ["done"], events
    return msgspec.json.decode(events[-1].data, type=PrefillResult)


async def test_what_the_decode_node_holds_is_not_sent(cluster: Any, make_call: Any) -> None:
    """The ticket begins where its hold ends, the timeline says so, and the hold is released at the end."""
    decode = await cluster.node("decode")
    prefill = await cluster.node("prefill")
    call = make_call(PROMPT)
    await learn(decode, call.prompt_token_ids[:-1])
    stream, ticket = await cluster.decode(decode, call)
    assert (ticket.token_start, ticket.token_end) == (192, len(PROMPT) - 1)
    result = await prefilled(cluster, prefill, decode, call, ticket)
    await stream.rest()
    assert stream.timeline["held_tokens"] == 192
    layout = decode.engine.info.layout
    assert result.raw_bytes == layout.bytes_per_token * (len(PROMPT) - 1 - 192)
    assert pool(decode).pool.pinned_bytes == 0
    held = decode.metrics.registry.get_sample_value("prfaas_node_prefix_held_tokens_total", {"role": "decode"})
    assert held == 192


async def test_with_everything_held_there_is_neither_prefill_nor_transfer(cluster: Any, make_call: Any) -> None:
    """An empty ticket, and no local prefill either."""
    decode = await cluster.node("decode")
    call = make_call(PROMPT[:129])
    await learn(decode, call.prompt_token_ids[:-1])
    stream, ticket = await cluster.decode(decode, call)
    assert (ticket.ticket, ticket.token_start, ticket.token_end) == ("", 128, 128)
    await stream.rest()
    assert not stream.timeline.get("local_prefill")
    assert decode.metrics.registry.get_sample_value("prfaas_node_local_prefills_total") == 0


async def test_tenants_share_nothing(cluster: Any, make_call: Any) -> None:
    """What one tenant's prompt has left is not held for another's."""
    decode = await cluster.node("decode")
    call = make_call(PROMPT, tenant="mine", local_prefill=True)
    await learn(decode, call.prompt_token_ids[:-1], "yours")
    stream, ticket = await cluster.decode(decode, call)
    assert ticket.token_start == 0
    await stream.rest()


def fetch_from(node: Any, tokens: int) -> FetchFrom:
    return FetchFrom(node.name, [KvAddressMessage(a.host, a.port, a.rank) for a in node.endpoint.addresses], tokens)


async def test_a_prefix_is_fetched_before_prefill(cluster: Any, make_call: Any) -> None:
    """From the node that the router names, what the own pool lacks, byte for byte; afterwards the pool has it."""
    decode = await cluster.node("decode")
    prefill = await cluster.node("prefill")
    holder = await cluster.node("prefill", "holder")
    call = make_call(PROMPT)
    await learn(prefill, call.prompt_token_ids[:70])
    await learn(holder, call.prompt_token_ids[:-1])
    stream, ticket = await cluster.decode(decode, call)
    result = await prefilled(cluster, prefill, decode, call, ticket, fetch=fetch_from(holder, 192))
    await stream.rest()
    assert (result.held_tokens, result.fetched_tokens, result.fetch_failed) == (192, 128, "")
    assert result.fetched_wire_bytes > 0
    assert pool(prefill).hold(call.prompt_token_ids[:-1]).tokens == 192


@pytest.mark.parametrize("trouble", ["refused", "gone", "silent", "no time"])
async def test_a_fetch_that_fails_costs_only_the_reuse(
    cluster: Any, make_call: Any, free_port: int, trouble: str
) -> None:
    """The holder doesn't have it any more, isn't there, sends nothing in the time that it is worth, or in half of what
    the request has left: the request is served all the same, and the reason is told and counted."""
    transport = {"open_timeout_s": 0.5}
    decode = await cluster.node("decode", transport=transport)
    prefill = await cluster.node("prefill", transport=transport)
    holder = await cluster.node("prefill", "holder")
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
    assert pool(prefill).pool.pinned_bytes == 0


async def test_routers_hear_what_a_pool_takes_in(cluster: Any, router: Any) -> None:
    """The contents first, then what changes; what a router has not acknowledged comes again."""
    node = await cluster.node("prefill")
    index = PrefixIndex()
    ids = list(PROMPT)
    await learn(node, ids[:70])
    beat = await router.saw(lambda b: b.prefix_events is not None and _added(b.prefix_events.events) == 1)
    assert (beat.prefix_block_tokens, beat.prefix_exact, beat.routers) == (BLOCK, False, 1)
    await learn(node, ids)
    beat = await router.saw(lambda b: b.prefix_events is not None and _added(b.prefix_events.events) == 3)
    assert beat.prefix_events is not None
    assert index.apply(0, beat.prefix_events) != RESTART
    assert index.match(pool(node).keys(ids)).longest == 3


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
