"""Nodes that aren't there, refuse, fail or fall silent: another way, or a clear error, never a hang."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import openai
import pytest
from prfaas.common.scheduling.least_loaded import LeastLoaded
from prfaas.services.messages import LoadMessage
from prfaas.services.router import upstream
from prfaas.services.router.app import DISPATCHER

CHAT: Any = {"model": "stub-model", "messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"


async def read_events(response: Any) -> list[Any]:
    """The data lines of a stream that was read to its end."""
    lines = (await response.read()).split(b"\n\n")
    return [msgspec.json.decode(line[6:]) for line in lines if line and line != b"data: [DONE]"]


async def test_without_a_decode_node_the_answer_is_503(cluster: Any) -> None:
    """With Retry-After and OpenAI's error body; a prefill node alone doesn't help."""
    await cluster.add("p1", "prefill")
    status, body, headers = await cluster.post(PATH, CHAT)
    assert status == 503
    assert int(headers["retry-after"]) >= 1
    assert "decode" in body["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prefill_that_fails_before_a_token_is_done_again_locally(
    cluster: Any, scripts: Any, stream: bool
) -> None:
    """The decode call is cancelled, the request runs again with local_prefill, and the fallback is counted."""

    async def decode(node: Any, call: Any, out: Any) -> None:
        await (scripts.answer if call.local_prefill else scripts.ticket_then_hang)(node, call, out)

    async def prefill(node: Any, call: Any, out: Any) -> None:
        await out.error("the lanes died", code="lanes_lost")

    await cluster.add("p1", "prefill", prefill=prefill)
    node = await cluster.add("d1", decode=decode)
    async with cluster.session.post(cluster.url + PATH, json=CHAT | {"stream": stream}) as response:
        assert response.status == 200
        assert response.headers["x-prfaas-reason"] == "prefill_failed"
        assert "x-prfaas-prefill" not in response.headers
        await response.read()
    assert [call.local_prefill for call in node.calls] == [False, True]
    await scripts.within(node.cancelled)
    assert cluster.metric("prfaas_router_fallbacks_total", reason="prefill_failed") == 1


async def test_a_prefill_node_that_is_gone_is_left_alone_until_it_beats_again(cluster: Any, scripts: Any) -> None:
    """The first request finds out and falls back; the next doesn't try; after a heartbeat it is used again."""

    async def decode(node: Any, call: Any, out: Any) -> None:
        await (scripts.answer if call.local_prefill else scripts.ticket_then_hang)(node, call, out)

    prefill = await cluster.add("p1", "prefill")
    await cluster.add("d1", decode=decode)
    await cluster.beat(prefill, url="http://127.0.0.1:1")
    reasons = [(await cluster.post(PATH, CHAT))[2]["x-prfaas-reason"] for _ in range(2)]
    assert reasons == ["prefill_failed", "no_prefill_node"]
    assert cluster.metric("prfaas_router_fallbacks_total", reason="prefill_unreachable") == 1
    await cluster.beat(prefill)
    asking = asyncio.create_task(cluster.post(PATH, CHAT))
    await scripts.within(prefill.called)
    asking.cancel()


@pytest.mark.parametrize("refusing", [1, 2, 3])
async def test_a_prefill_node_that_refuses_is_replaced_by_another(cluster: Any, scripts: Any, refusing: int) -> None:
    """It drains, perhaps to take another role, and the router has not heard of it yet. Once; then decode prefills."""

    async def decode(node: Any, call: Any, out: Any) -> None:
        if not call.local_prefill:
            await scripts.ticket(call, out)
            await scripts.within(good.prefilled)
        await (scripts.words(call, out, 0.0) if not call.local_prefill else scripts.answer(node, call, out))

    refusal = (503, {"error": {"message": "draining", "type": "service_unavailable_error"}})
    bad = [await cluster.add(f"p{i}", "prefill", refuse=refusal) for i in range(refusing)]
    await cluster.add("d1", decode=decode)
    good = await cluster.add("p9", "prefill")
    cluster.app[DISPATCHER].policy = LeastLoaded(0)
    await cluster.beat(good, load=LoadMessage(queued_requests=5, queued_tokens=5000))
    status, _, headers = await cluster.post(PATH, CHAT)
    assert status == 200
    reason = "prefill_failed" if refusing > 1 else "offloaded"
    assert headers["x-prfaas-reason"] == reason
    assert headers.get("x-prfaas-prefill") == ("p9" if refusing == 1 else None)
    assert sum(len(node.calls) for node in bad) == min(refusing, 2)
    assert cluster.metric("prfaas_router_fallbacks_total", reason="prefill_refused") == min(refusing, 2)


async def test_a_decode_node_that_is_gone_is_replaced_by_another(cluster: Any, scripts: Any) -> None:
    """Once; the client sees only the answer."""
    gone = await cluster.add("d1")
    await cluster.beat(gone, url="http://127.0.0.1:1")
    await cluster.add("d2")
    status, body, headers = await cluster.post(PATH, CHAT)
    assert (status, headers["x-prfaas-decode"]) == (200, "d2")
    assert body["choices"][0]["message"]["content"] == scripts.text
    assert cluster.metric("prfaas_router_fallbacks_total", reason="decode_unreachable") == 1


async def test_a_decode_node_that_refuses_is_replaced_or_503(cluster: Any) -> None:
    """A draining node's 503 sends the request elsewhere; with nowhere to go the client is told to come back."""
    refusal = (503, {"error": {"message": "draining", "type": "service_unavailable_error"}})
    await cluster.add("d1", refuse=refusal)
    status, _, headers = await cluster.post(PATH, CHAT)
    assert status == 503
    assert "retry-after" in headers


async def test_a_mistake_that_the_node_finds_reaches_the_client_as_it_is(cluster: Any) -> None:
    """400 with the node's own words, and no second attempt."""
    detail = {"message": "max_tokens must be from 1 to 5", "type": "invalid_request_error", "param": "max_tokens"}
    node = await cluster.add("d1", refuse=(400, {"error": detail}))
    status, body, _ = await cluster.post(PATH, CHAT)
    assert (status, body["error"]["param"]) == (400, "max_tokens")
    assert len(node.calls) == 1


async def test_a_stream_that_nobody_can_continue_ends_in_an_error_event(make_cluster: Any, scripts: Any) -> None:
    """No [DONE]; the OpenAI client raises."""
    cluster = await make_cluster(continue_wait_s=0.1)

    async def decode(node: Any, call: Any, out: Any) -> None:
        await scripts.ticket(call, out)
        await out.chunk([1], scripts.chunk(call, "Hello"))
        await node.go.wait()
        await out.error("the engine died")

    node = await cluster.add("d1", decode=decode)
    async with openai.AsyncOpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(**CHAT, stream=True)
        chunks = aiter(stream)
        assert (await anext(chunks)).choices[0].delta.content == "Hello"
        node.go.set()
        with pytest.raises(openai.APIError, match="broke off"):
            await anext(chunks)
    assert len(node.calls) == 1


async def test_a_node_that_just_ends_its_stream_is_an_error_too(make_cluster: Any, scripts: Any) -> None:
    """A stream without [DONE] is incomplete, however cleanly it was closed."""
    cluster = await make_cluster(continue_wait_s=0.1)

    async def decode(node: Any, call: Any, out: Any) -> None:
        await scripts.ticket(call, out)
        await out.chunk([1], scripts.chunk(call, "Hello"))

    await cluster.add("d1", decode=decode)
    async with cluster.session.post(cluster.url + PATH, json=CHAT | {"stream": True}) as response:
        events = await read_events(response)
    assert events[-1]["error"]["code"] == "stream_broken"


async def test_the_end_of_the_decode_stream_stops_prefill(cluster: Any, scripts: Any) -> None:
    """However the decode call ends, the prefill call is closed."""

    async def decode(node: Any, call: Any, out: Any) -> None:
        await scripts.ticket(call, out)
        await scripts.within(prefill.called)
        await scripts.words(call, out, 0.0)

    prefill = await cluster.add("p1", "prefill", prefill=scripts.hang)
    await cluster.add("d1", decode=decode)
    status, _, _ = await cluster.post(PATH, CHAT)
    assert status == 200
    await scripts.within(prefill.cancelled)


SILENT_S = 0.2


@pytest.fixture
async def impatient(make_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A router that gives a silent node less time."""
    monkeypatch.setattr(upstream, "LOOK_S", 0.05)
    return await make_cluster(node_silent_s=SILENT_S, continue_wait_s=0.1)


async def test_a_silent_node_is_dead(impatient: Any, scripts: Any) -> None:
    """Nothing for longer than the limit, not even a ping: the client gets 503, not a hang, and the node is let go."""
    cluster = impatient

    async def decode(node: Any, call: Any, out: Any) -> None:
        await scripts.ticket(call, out)
        await node.go.wait()

    node = await cluster.add("d1", decode=decode)
    status, _, _ = await cluster.post(PATH, CHAT)
    assert status == 503
    await scripts.within(node.cancelled)


async def test_a_node_that_does_not_begin_to_answer_is_dead(impatient: Any, scripts: Any) -> None:
    """A stopped process's kernel still accepts: the call goes to another node."""
    cluster = impatient
    accepted: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: accepted.append(writer), "127.0.0.1", 0)
    try:
        stopped, other = await cluster.add("d1"), await cluster.add("d2")
        stopped.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await cluster.beat(stopped)
        status, _, headers = await cluster.post(PATH, CHAT)
        assert (status, headers["x-prfaas-decode"]) == (200, "d2")
        assert (len(accepted), len(stopped.calls), len(other.calls)) == (1, 0, 1)
    finally:
        for writer in accepted:
            writer.close()
        server.close()


async def test_a_slow_client_is_not_taken_for_a_silent_node(impatient: Any, scripts: Any) -> None:
    """While the router waits for the client to take what it has, it doesn't read: the node is not to blame."""
    cluster = impatient
    filler = "x" * 4_000_000

    async def decode(node: Any, call: Any, out: Any) -> None:
        await scripts.ticket(call, out)
        for i in range(8):
            await out.chunk([i], scripts.chunk(call, filler))
        await out.raw(b"data: [DONE]\n\n")

    await cluster.add("d1", decode=decode)
    async with cluster.session.post(cluster.url + PATH, json=CHAT | {"stream": True}) as response:
        await asyncio.sleep(4 * SILENT_S)  # reading nothing for so long is what is tried here
        body = await response.read()
    assert body.count(filler.encode()) == 8
    assert body.endswith(b"data: [DONE]\n\n")


async def test_a_request_ends_at_its_deadline(make_cluster: Any, scripts: Any) -> None:
    """A node that pings for ever is cut off, and frees what it held."""
    cluster = await make_cluster(request_timeout_s=0.3)
    node = await cluster.add("d1", decode=scripts.ticket_then_hang)
    status, body, _ = await cluster.post(PATH, CHAT)
    assert (status, body["error"]["code"]) == (504, "timeout")
    await scripts.within(node.cancelled)


async def test_a_router_that_ends_tells_its_clients(cluster: Any, scripts: Any) -> None:
    """A stream gets an error event, a request that waits a 503; both are counted as ended by the shutdown."""
    node = await cluster.add("d1", decode=scripts.one_word_then_hang)
    async with cluster.session.post(cluster.url + PATH, json=CHAT | {"stream": True}) as response:
        assert b"Hello" in await response.content.readline()
        node.called.clear()
        waiting = asyncio.create_task(cluster.post(PATH, CHAT))
        await scripts.within(node.called)
        cluster.app[DISPATCHER].close(0.05)
        error = (await read_events(response))[-1]["error"]
        assert (error["code"], "shutting down" in error["message"]) == ("unavailable", True)
        status, _, headers = await waiting
        assert (status, headers["retry-after"]) == (503, "1")
    assert (await cluster.post(PATH, CHAT))[0] == 503
    assert cluster.metric("prfaas_router_cancels_total", reason="shutdown") == 2
