"""The OpenAI Python client against the router, with stub nodes: what users do on a good day, and leaving early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

CHAT: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def client(cluster: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_chat_is_answered_whole(cluster: Any, scripts: Any, client: openai.AsyncOpenAI) -> None:
    """The response is the decode node's object; without a prefill node it prefills locally, and the headers say so."""
    await cluster.add("d1")
    raw = await client.chat.completions.with_raw_response.create(model=scripts.model, messages=CHAT)
    answer = raw.parse()
    assert answer.choices[0].message.content == scripts.text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert answer.id.startswith("chatcmpl-")
    assert raw.headers["x-prfaas-decode"] == "d1"
    assert raw.headers["x-prfaas-reason"] == "no_prefill_node"


async def test_a_chat_streams_with_usage_in_a_last_chunk_without_choices(
    cluster: Any, scripts: Any, client: openai.AsyncOpenAI
) -> None:
    """Comments and named events of the node never reach the client; all its chunks do."""
    await cluster.add("d1")
    stream = await client.chat.completions.create(
        model=scripts.model, messages=CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == scripts.text
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


@pytest.mark.parametrize("prompt", ["Hi", ["Hi"], [72, 105], [[72, 105]]], ids=str)
async def test_a_completion_takes_text_or_token_ids(
    cluster: Any, scripts: Any, client: openai.AsyncOpenAI, prompt: Any
) -> None:
    """A string, token ids, or a list with one of them give the node the same ids."""
    node = await cluster.add("d1")
    answer = await client.completions.create(model=scripts.model, prompt=prompt, stop=["x"], max_tokens=7)
    assert answer.choices[0].text == scripts.text
    assert node.calls[0].prompt_token_ids == [72, 105]
    assert node.calls[0].sampling.stop == ("x",)
    assert node.calls[0].max_output_tokens == 7


async def test_an_offloaded_request_calls_both_nodes(cluster: Any, scripts: Any, client: openai.AsyncOpenAI) -> None:
    """The prefill node gets the decode node's ticket, name and KV addresses while the decode call is open."""

    async def decode(node: Any, call: Any, out: Any) -> None:
        await scripts.ticket(call, out)
        await scripts.within(prefill.prefilled)
        await scripts.words(call, out, 0.0)

    prefill = await cluster.add("p1", "prefill")
    await cluster.add("d1", decode=decode)
    raw = await client.chat.completions.with_raw_response.create(
        model=scripts.model, messages=CHAT, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.parse().choices[0].message.content == scripts.text
    call = prefill.calls[0]
    assert (call.ticket, call.decode_node, call.request_id) == ("ticket-for-mine-1", "d1", "mine-1")
    assert call.kv_addresses[0].port == 9
    assert raw.headers["x-request-id"] == "mine-1"
    assert (raw.headers["x-prfaas-prefill"], raw.headers["x-prfaas-reason"]) == ("p1", "offloaded")
    assert not prefill.cancelled.is_set()


async def test_errors_are_the_clients_exceptions(cluster: Any, scripts: Any, client: openai.AsyncOpenAI) -> None:
    """A wrong field is a BadRequestError that names it; an unknown model is NotFoundError."""
    await cluster.add("d1")
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model=scripts.model, messages=CHAT, max_tokens=-1)
    assert bad.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-4", messages=CHAT)
    assert missing.value.code == "model_not_found"


async def test_a_client_that_leaves_frees_both_nodes_at_once(
    cluster: Any, scripts: Any, client: openai.AsyncOpenAI
) -> None:
    """Closing the stream closes the decode call and the prefill call."""
    prefill = await cluster.add("p1", "prefill", prefill=scripts.hang)
    decode = await cluster.add("d1", decode=scripts.one_word_then_hang)
    stream = await client.chat.completions.create(model=scripts.model, messages=CHAT, stream=True)
    first = await anext(aiter(stream))
    assert first.choices[0].delta.content == "Hello"
    await scripts.within(prefill.called)
    await stream.close()
    await scripts.within(decode.cancelled)
    await scripts.within(prefill.cancelled)
    assert cluster.metric("prfaas_router_cancels_total", reason="client") == 1


async def test_a_client_that_leaves_before_the_first_token_frees_both_nodes(cluster: Any, scripts: Any) -> None:
    """The same while prefill is still running and nothing has been sent to the client."""
    prefill = await cluster.add("p1", "prefill", prefill=scripts.hang)
    decode = await cluster.add("d1", decode=scripts.ticket_then_hang)
    body = {"model": scripts.model, "messages": CHAT}
    asking = asyncio.create_task(cluster.post("/v1/chat/completions", body))
    await scripts.within(prefill.called)
    asking.cancel()
    await scripts.within(decode.cancelled)
    await scripts.within(prefill.cancelled)


async def test_models_are_listed(cluster: Any, scripts: Any, client: openai.AsyncOpenAI) -> None:
    """The model's name is what the nodes report."""
    assert (await client.models.list()).data == []
    await cluster.add("d1")
    assert [m.id for m in (await client.models.list()).data] == [scripts.model]
    assert (await client.models.retrieve(scripts.model)).id == scripts.model
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other/model")


async def test_a_very_long_prompt_goes_through(make_cluster: Any, scripts: Any) -> None:
    """400,000 ids, in several slices and off the loop, reach both nodes whole."""

    async def decode(node: Any, call: Any, out: Any) -> None:
        await scripts.ticket(call, out)
        await scripts.within(prefill.called)
        await scripts.words(call, out, 0.0)

    cluster = await make_cluster(max_body_bytes=16 << 20)
    prefill = await cluster.add("p1", "prefill", max_model_tokens=1 << 20)
    node = await cluster.add("d1", decode=decode, max_model_tokens=1 << 20)
    ids = [i % 200 for i in range(400_000)]
    status, _, _ = await cluster.post("/v1/completions", {"model": scripts.model, "prompt": ids})
    assert status == 200
    assert node.calls[0].prompt_token_ids == ids
    assert prefill.calls[0].prompt_token_ids == ids
