"""/decode and /prefill of real nodes, called by hand as the router does: emulated engines, KV over TCP."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from prfaas.common.config import MIB
from prfaas.services.engine.emulated.output import OutputTokens
from prfaas.services.messages import FormatMessage, KvAddressMessage, PrefillResult, SamplingMessage, TicketEvent

LONG = bytes(65 + i % 26 for i in range(1500))
SLOW = {"prefill_tokens_per_s": 1000.0, "time_scale": 1.0, "prefill_step_tokens": 100}


def expected(prompt: bytes, tokens: int) -> str:
    output = OutputTokens(list(prompt), None)
    return bytes(output.token(i) for i in range(tokens)).decode()


def text_of(events: list[Any]) -> str:
    chunks = [e.json for e in events if e.name == "" and e.data != "[DONE]"]
    return "".join(c["choices"][0]["text"] for c in chunks if c["choices"])


async def test_a_transfer_is_timed_and_its_compression_told(cluster: Any, make_call: Any) -> None:
    """Once it has completed, by the node that sent it."""
    decode, prefill = await cluster.node("decode"), await cluster.node("prefill")
    call = make_call(prompt=bytes(range(32, 127)) * 10)
    stream, ticket = await cluster.decode(decode, call)
    sent = await cluster.prefill(prefill, decode, call, ticket)
    assert (await sent.rest())[-1].name == "done"
    await stream.rest()
    value = prefill.metrics.registry.get_sample_value
    assert value("prfaas_transport_transfer_seconds_count") == 1
    assert 0 < value("prfaas_transport_transfer_seconds_sum") < 60
    assert value("prfaas_transport_codec_ratio_count") == 1
    assert 0.3 < value("prfaas_transport_codec_ratio_sum") < 1.2
    assert decode.metrics.registry.get_sample_value("prfaas_transport_codec_ratio_count") == 0


async def test_prefill_in_one_node_decode_in_the_other(cluster: Any, make_call: Any) -> None:
    """Ticket, prefill, tokens: the text is what the engine says of this prompt, each id is told once, the timeline has
    every layer on both sides in order, and afterwards nothing is held."""
    prefill, decode = await cluster.node("prefill"), await cluster.node("decode")
    call = make_call(LONG, max_output_tokens=20)
    stream, ticket = await cluster.decode(decode, call)
    assert (ticket.token_start, ticket.token_end) == (0, len(LONG) - 1)
    sent = await cluster.prefill(prefill, decode, call, ticket)
    [done] = await sent.rest()
    assert done.name == "done"
    result = msgspec.json.decode(done.data, type=PrefillResult)
    assert result.queued_s <= result.started_s <= result.ended_s
    assert result.raw_bytes == decode.engine.info.layout.bytes_per_token * (len(LONG) - 1)

    events = await stream.rest()
    assert text_of(events) == expected(LONG, 20)
    assert [i for e in events for i in e.ids] == list(expected(LONG, 20).encode())
    assert events[-2].json["choices"][0]["finish_reason"] == "length"
    assert events[-1].data == "[DONE]"

    timeline = stream.timeline
    assert not timeline.get("local_prefill")
    assert timeline["kv_raw_bytes"] == result.raw_bytes <= timeline["kv_wire_bytes"]
    slack_s = timeline["clock_error_s"] + 0.001
    for computed, sent_s, arrived, used in zip(
        *(timeline[f"{what}_s"] for what in ("computed", "sent", "arrived", "used")), strict=True
    ):
        assert computed <= sent_s + slack_s
        assert sent_s <= arrived + slack_s
        assert arrived <= used
    for node in (prefill, decode):
        assert node.engine.load().free_kv_bytes == 16 * MIB
        assert len(node.leases) == 0


async def test_whole_responses_wait_with_pings(cluster: Any, make_call: Any) -> None:
    """Not streaming: pings while nothing is to be said, then one object."""
    decode = await cluster.node("decode", node={"ping_s": 0.1}, time_scale=1.0, decode_step_s=0.04)
    format = FormatMessage("chat", "chat-1", 1700000000, "emulated")
    call = make_call(b"hi", format=format, local_prefill=True)
    stream, ticket = await cluster.decode(decode, call)
    assert ticket.ticket == ""
    [event] = await stream.rest()
    assert event.json["choices"][0]["message"]["content"] == expected(b"hi", 8)
    assert event.ids == list(expected(b"hi", 8).encode())
    assert stream.comments.count(" ping") >= 1
    assert stream.timeline["local_prefill"] is True


async def test_a_one_token_prompt_needs_no_transfer(cluster: Any, make_call: Any) -> None:
    decode = await cluster.node("decode")
    stream, ticket = await cluster.decode(decode, make_call(b"x"))
    assert ticket.ticket == ""
    assert text_of(await stream.rest()) == expected(b"x", 8)


async def test_stop_strings_end_the_output_and_free_the_engine(cluster: Any, make_call: Any, until: Any) -> None:
    decode = await cluster.node("decode")
    whole = expected(b"hello", 200)
    stop = whole[20:24]
    call = make_call(
        b"hello", max_output_tokens=5000, local_prefill=True, sampling=SamplingMessage(temperature=0.0, stop=(stop,))
    )
    stream, _ = await cluster.decode(decode, call)
    events = await stream.rest()
    assert text_of(events) == whole[: whole.index(stop)]
    assert events[-2].json["choices"][0]["finish_reason"] == "stop"
    await until(lambda: decode.engine.load().running_requests == 0)


async def test_resumed_from_five_tokens(cluster: Any, make_call: Any) -> None:
    """prompt + five delivered tokens are prefilled again; what follows is what would have followed, no id twice."""
    prefill, decode = await cluster.node("prefill"), await cluster.node("decode")
    whole = expected(LONG, 20)
    call = make_call(LONG, max_output_tokens=20, output_token_ids=list(whole[:5].encode()), text_offset=5)
    stream, ticket = await cluster.decode(decode, call)
    assert ticket.token_end == len(LONG) + 4
    await (await cluster.prefill(prefill, decode, call, ticket)).rest()
    events = await stream.rest()
    assert text_of(events) == whole[5:]
    assert [i for e in events for i in e.ids] == list(whole[5:].encode())


async def test_a_client_that_leaves_frees_memory_and_stops_prefill(cluster: Any, make_call: Any, until: Any) -> None:
    """Closing /decode in the middle of the prefill: the decode node's memory is free, prefill ends with `cancelled`
    long before its time, and both go on working over the same lanes."""
    prefill, decode = await cluster.node("prefill", **SLOW), await cluster.node("decode")
    call = make_call(LONG)
    stream, ticket = await cluster.decode(decode, call)
    sent = await cluster.prefill(prefill, decode, call, ticket)
    await until(lambda: decode.engine.load().free_kv_bytes < 16 * MIB)
    stream.response.close()
    [event] = await sent.rest()
    assert (event.name, event.json["error"]["code"]) == ("error", "cancelled")
    await until(lambda: decode.engine.load().free_kv_bytes == prefill.engine.load().free_kv_bytes == 16 * MIB)
    assert prefill.engine.load().queued_tokens == 0

    again = make_call(b"short", request_id="request-2")
    stream, ticket = await cluster.decode(decode, again)
    sent = await cluster.prefill(prefill, decode, again, ticket)
    assert text_of(await stream.rest()) == expected(b"short", 8)


async def test_a_prefill_that_is_closed_ends_the_decode(cluster: Any, make_call: Any, until: Any) -> None:
    """The other direction: the decode call gets an error event, and its memory is free."""
    prefill, decode = await cluster.node("prefill", **SLOW), await cluster.node("decode")
    call = make_call(LONG)
    stream, ticket = await cluster.decode(decode, call)
    sent = await cluster.prefill(prefill, decode, call, ticket)
    await until(lambda: decode.engine.load().free_kv_bytes < 16 * MIB)
    sent.response.close()
    [event] = await stream.rest()
    assert (event.name, event.json["error"]["code"]) == ("error", "cancelled")
    await until(lambda: decode.engine.load().free_kv_bytes == prefill.engine.load().free_kv_bytes == 16 * MIB)


async def test_without_room_the_second_waits_for_the_first(cluster: Any, make_call: Any) -> None:
    """The decode node has memory for one: the other's OPEN is answered "no room" until the first has ended."""
    prefill = await cluster.node("prefill")
    room_tokens = 4 * MIB // prefill.engine.info.layout.bytes_per_token
    assert len(LONG) + 200 < room_tokens < 2 * len(LONG)
    decode = await cluster.node("decode", arena_bytes=4 * MIB)
    calls = [make_call(LONG, request_id=f"request-{i}", max_output_tokens=200) for i in range(2)]
    opened = [await cluster.decode(decode, call) for call in calls]
    sent = [
        await cluster.prefill(prefill, decode, call, ticket) for call, (_, ticket) in zip(calls, opened, strict=True)
    ]
    for stream, _ in opened:
        assert text_of(await stream.rest()) == expected(LONG, calls[0].max_output_tokens)
    for stream in sent:
        assert [e.name for e in await stream.rest()] == ["done"]


async def test_many_at_once_over_the_same_lanes(cluster: Any, make_call: Any) -> None:
    prefill, decode = await cluster.node("prefill"), await cluster.node("decode")

    async def one(i: int) -> None:
        prompt = LONG[i : 100 * i + 7]
        call = make_call(prompt, request_id=f"request-{i}")
        stream, ticket = await cluster.decode(decode, call)
        sent, events = await asyncio.gather(cluster.prefill(prefill, decode, call, ticket), stream.rest())
        assert text_of(events) == expected(prompt, 8)
        assert [e.name for e in await sent.rest()] == ["done"]

    await asyncio.gather(*(one(i) for i in range(8)))


@pytest.mark.parametrize("ticket", ["garbage", "", "AAAA" * 50_000, "é"])
async def test_a_garbage_ticket_is_refused(cluster: Any, make_call: Any, ticket: str) -> None:
    prefill, decode = await cluster.node("prefill"), await cluster.node("decode")
    stream = await cluster.prefill(prefill, decode, make_call(), TicketEvent(ticket, [], 0, 26))
    assert stream.status == 503
    body = msgspec.json.decode(await stream.response.read())
    assert body["error"]["code"] == "ticket_refused"


async def test_a_ticket_of_another_decode_node_is_refused(cluster: Any, make_call: Any) -> None:
    """The node that issued it is the only one that takes it; the request of its own goes on waiting."""
    prefill = await cluster.node("prefill")
    decode, other = await cluster.node("decode"), await cluster.node("decode", "other")
    call = make_call()
    stream, ticket = await cluster.decode(decode, call)
    theirs = [KvAddressMessage(a.host, a.port) for a in other.endpoint.addresses]
    wrong = msgspec.structs.replace(ticket, kv_addresses=theirs)
    [event] = await (await cluster.prefill(prefill, other, call, wrong)).rest()
    assert (event.name, event.json["error"]["code"]) == ("error", "ticket_refused")
    assert [e.name for e in await (await cluster.prefill(prefill, decode, call, ticket)).rest()] == ["done"]
    assert text_of(await stream.rest()) == expected(bytes(call.prompt_token_ids), 8)


async def test_a_prefill_node_must_get_the_prompt_of_the_ticket(cluster: Any, make_call: Any) -> None:
    prefill, decode = await cluster.node("prefill"), await cluster.node("decode")
    _, ticket = await cluster.decode(decode, make_call(b"twelve bytes"))
    stream = await cluster.prefill(prefill, decode, make_call(b"thirteen byte"), ticket)
    assert stream.status == 400
    assert "the ticket is for 12 tokens, the prompt has 13" in await stream.response.text()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (list(b"thirteen byte"), "the ticket is for 12 tokens, the prompt has 13"),
        ([*b"eleven byte", 999], "token ids must be from 0 to 256"),
    ],
)
async def test_a_prefill_that_is_refused_leaves_no_sender(
    cluster: Any, make_call: Any, monkeypatch: pytest.MonkeyPatch, prompt: list[int], words: str
) -> None:
    """What is known at once is a 400, before the stream begins, and the sender that was made for it is closed: it would
    hold its session open."""
    prefill, decode = await cluster.node("prefill"), await cluster.node("decode")
    make, made = prefill.endpoint.sender, []
    monkeypatch.setattr(prefill.endpoint, "sender", lambda *arguments: made.append(make(*arguments)) or made[-1])
    _, ticket = await cluster.decode(decode, make_call(b"twelve bytes"))
    stream = await cluster.prefill(prefill, decode, make_call(prompt), ticket)
    assert stream.status == 400
    assert words in await stream.response.text()
    [sender] = made
    assert sender.failed is not None


async def test_a_decode_that_is_refused_holds_no_ticket(cluster: Any, make_call: Any) -> None:
    """The receiver that was made for it is closed, so that nobody waits for an OPEN."""
    decode = await cluster.node("decode")
    for _ in range(3):
        stream = await cluster.post(decode.url, "decode", make_call([1, 2, 999]))
        assert stream.status == 400
    metrics = decode.metrics.render().decode()
    assert 'prfaas_transport_transfers_total{direction="received",outcome="cancelled"} 3.0' in metrics


async def test_calls_without_the_secret_are_refused(cluster: Any, make_call: Any) -> None:
    node = await cluster.node("decode")
    for path in ("decode", "prefill"):
        async with cluster.session.post(f"{node.url}/{path}", data=msgspec.json.encode(make_call())) as response:
            assert response.status == 401


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt_token_ids": []}, "prompt"),
        ({"prompt_token_ids": [1, 999]}, "prompt"),
        ({"prompt_token_ids": [-1]}, "prompt"),
        ({"prompt_token_ids": [1], "output_token_ids": [999]}, "prompt"),
        ({"prompt_token_ids": [1], "output_token_ids": [999], "max_output_tokens": 1}, "prompt"),
        ({"max_output_tokens": 0}, "max_tokens"),
        ({"max_output_tokens": 1 << 20}, "max_tokens"),
        ({"prompt_token_ids": [1] * 262_144}, "max_tokens"),
        ({"prompt_token_ids": [1] * 100_000}, "max_tokens"),
    ],
)
async def test_what_can_be_known_at_once_is_a_400(cluster: Any, make_call: Any, change: Any, param: str | None) -> None:
    node = await cluster.node("decode")
    stream = await cluster.post(node.url, "decode", make_call(**change))
    assert stream.status == 400
    assert msgspec.json.decode(await stream.response.read())["error"]["param"] == param


async def test_the_probes_and_metrics_answer(cluster: Any, make_call: Any) -> None:
    node = await cluster.node("decode")
    stream, _ = await cluster.decode(node, make_call(local_prefill=True))
    await stream.rest()
    for path in ("healthz", "readyz"):
        async with cluster.session.get(f"{node.url}/{path}") as response:
            assert response.status == 200
    async with cluster.session.get(f"{node.url}/metrics") as response:
        text = await response.text()
    assert 'prfaas_node_requests_total{outcome="done",route="decode"} 1.0' in text
    assert "prfaas_node_local_prefills_total 1.0" in text
    assert "prfaas_node_output_tokens_total 8.0" in text
