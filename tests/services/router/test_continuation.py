"""A decode node is lost in the middle of an output: the stream goes on elsewhere, and the client sees one output."""

from __future__ import annotations

from typing import Any

import msgspec
import openai
import pytest

CHAT: Any = {"model": "stub-model", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION: Any = {"model": "stub-model", "prompt": [5, 6, 7]}
PATH, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WORDS = ("Hello", " there", ", friend", ".")


def resumes(scripts: Any, prefill: Any = None) -> Any:
    """A decode node that goes on behind what it is told was delivered, as the real one does; when `prefill` was called,
    if there is one."""

    async def decode(node: Any, call: Any, out: Any) -> None:
        await scripts.ticket(call, out)
        if prefill is not None:
            await scripts.within(prefill.prefilled)
        done = len(call.output_token_ids)
        ahead = call.text_ahead
        for i in range(done, len(WORDS)):
            word, ahead = WORDS[i][ahead:], 0
            await out.chunk([i + 1], scripts.chunk(call, word, "stop" if i == len(WORDS) - 1 else None))
        await out.raw(b"data: [DONE]\n\n")

    return decode


def breaks(scripts: Any, words: int, how: str = "ends", finish: bool = False) -> Any:
    """One that is lost behind so many words: it ends its stream, or its engine fails."""

    async def decode(node: Any, call: Any, out: Any) -> None:
        await scripts.ticket(call, out)
        first = len(call.output_token_ids)
        for i in range(first, first + words):
            last = finish and i == len(WORDS) - 1
            await out.chunk([i + 1], scripts.chunk(call, WORDS[i], "stop" if last else None))
        if how == "fails":
            await node.go.wait()
            await out.error("the engine died")

    return decode


async def text_of(cluster: Any, path: str = PATH, body: Any = CHAT, **fields: Any) -> tuple[str, bytes]:
    """The text that a client puts together, and all bytes."""
    async with cluster.session.post(cluster.url + path, json=body | {"stream": True} | fields) as response:
        data = await response.read()
    text = ""
    for line in data.split(b"\n\n"):
        if line.startswith(b"data: {"):
            for choice in msgspec.json.decode(line[6:]).get("choices", []):
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return text, data


@pytest.mark.parametrize("how", ["ends", "fails"])
@pytest.mark.parametrize("words", [1, 2, 3])
async def test_the_stream_goes_on_where_it_was_lost(cluster: Any, scripts: Any, words: int, how: str) -> None:
    """Another node is given the delivered ids, prefill their context; the client gets one text under one id, and one
    [DONE]; it is counted by reason."""
    lost = await cluster.add("d1", decode=breaks(scripts, words, how))
    prefill = await cluster.add("p1", "prefill")
    other = await cluster.add("d2", decode=resumes(scripts, prefill))
    await cluster.beat(other, draining=True)
    async with cluster.session.post(cluster.url + PATH, json=CHAT | {"stream": True}) as response:
        prefill.prefilled.clear()
        data = b""
        while data.count(b"data: ") < words:
            data += await response.content.readline()
        lost.go.set()
        await cluster.beat(other)
        data += await response.read()
    texts = [msgspec.json.decode(line[6:]) for line in data.split(b"\n\n") if line.startswith(b"data: {")]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in texts) == "".join(WORDS)
    assert len({chunk["id"] for chunk in texts}) == 1
    assert data.count(b"[DONE]") == 1
    assert data.endswith(b"data: [DONE]\n\n")
    assert (len(lost.calls), len(other.calls)) == (1, 1)
    call = other.calls[0]
    assert call.output_token_ids == list(range(1, words + 1))
    assert call.prompt_token_ids == lost.calls[0].prompt_token_ids
    assert prefill.calls[-1].prompt_token_ids == [*call.prompt_token_ids, *call.output_token_ids]
    reason = "decode_unreachable" if how == "ends" else "decode_failed"
    assert cluster.metric("prfaas_router_continuations_total", reason=reason) == 1
    assert cluster.metric("prfaas_router_output_tokens_total") == len(WORDS)


async def test_it_may_be_lost_again_and_again(make_cluster: Any, scripts: Any) -> None:
    """Up to `router.decode_attempts` nodes; each continuation begins behind all that came before."""
    cluster = await make_cluster(decode_attempts=4)
    nodes = [await cluster.add(f"d{i}", decode=breaks(scripts, 1)) for i in range(3)]
    nodes.append(await cluster.add("d3", decode=resumes(scripts)))
    for node in nodes[1:]:
        await cluster.beat(node, draining=True)
    async with cluster.session.post(cluster.url + COMPLETIONS, json=COMPLETION | {"stream": True}) as response:
        data = b""
        for node in nodes[1:]:
            while not data.endswith(b"}\n\n") or data.count(b"data: ") < nodes.index(node):
                data += await response.content.readline()
            await cluster.beat(node)
        data += await response.read()
    text = "".join(
        msgspec.json.decode(line[6:])["choices"][0]["text"]
        for line in data.split(b"\n\n")
        if line.startswith(b"data: {")
    )
    assert text == "".join(WORDS)
    assert sorted(len(call.output_token_ids) for node in nodes for call in node.calls) == [0, 1, 2, 3]
    assert cluster.metric("prfaas_router_continuations_total", reason="decode_unreachable") == 3


async def test_attempts_are_bounded(make_cluster: Any, scripts: Any) -> None:
    cluster = await make_cluster(decode_attempts=2, continue_wait_s=0.1)
    for i in range(3):
        await cluster.add(f"d{i}", decode=breaks(scripts, 1))
    _, data = await text_of(cluster)
    assert b"stream_broken" in data
    assert b"[DONE]" not in data


async def test_a_stream_waits_for_a_node_that_is_started_again(cluster: Any, scripts: Any) -> None:
    """With the only decode node gone, the stream goes on when it is back as another process."""
    node = await cluster.add("d1", decode=breaks(scripts, 2))
    async with cluster.session.post(cluster.url + PATH, json=CHAT | {"stream": True}) as response:
        data = await response.content.readline()
        node.decode, node.epoch = resumes(scripts), "2"
        await cluster.beat(node)
        data += await response.read()
    assert data.endswith(b"data: [DONE]\n\n")
    assert len(node.calls) == 2


async def test_text_whose_ids_were_held_is_not_said_twice(cluster: Any, scripts: Any) -> None:
    """A chunk without ids is ahead of them: the next node leaves so many characters out."""

    async def decode(node: Any, call: Any, out: Any) -> None:
        await scripts.ticket(call, out)
        await out.chunk([1], scripts.chunk(call, WORDS[0]))
        await out.raw(b"data: %b\n\n" % msgspec.json.encode(scripts.chunk(call, WORDS[1][:3])))
        await out.raw(b"data: %b\n\n" % msgspec.json.encode(scripts.chunk(call, WORDS[1][3:5])))

    await cluster.add("d1", decode=decode)
    other = await cluster.add("d2", decode=resumes(scripts))
    await cluster.beat(other, draining=True)
    async with cluster.session.post(cluster.url + COMPLETIONS, json=COMPLETION | {"stream": True}) as response:
        data = await response.content.readline()
        await cluster.beat(other)
        data += await response.read()
    text = "".join(
        msgspec.json.decode(line[6:])["choices"][0]["text"]
        for line in data.split(b"\n\n")
        if line.startswith(b"data: {")
    )
    assert text == "".join(WORDS)
    assert (other.calls[0].output_token_ids, other.calls[0].text_ahead) == ([1], 5)


@pytest.mark.parametrize("include_usage", [False, True])
async def test_a_node_lost_behind_the_last_word_needs_no_other(cluster: Any, scripts: Any, include_usage: bool) -> None:
    """The finish reason is out: the router ends the stream itself, with the usage if the client wants it."""
    await cluster.add("d1", decode=breaks(scripts, len(WORDS), finish=True))
    other = await cluster.add("d2", decode=resumes(scripts))
    await cluster.beat(other, draining=True)
    async with openai.AsyncOpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0) as client:
        options: Any = {"stream_options": {"include_usage": True}} if include_usage else {}
        stream = await client.chat.completions.create(**CHAT, stream=True, **options)
        chunks = [chunk async for chunk in stream]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "".join(WORDS)
    assert [c.finish_reason for chunk in chunks for c in chunk.choices].count("stop") == 1
    usage = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert [u.completion_tokens for u in usage] == ([len(WORDS)] if include_usage else [])
    assert not other.calls


async def test_prefill_that_fails_for_a_continuation_is_done_locally(cluster: Any, scripts: Any) -> None:
    """Though tokens had come before, from another node."""
    await cluster.add("d1", decode=breaks(scripts, 2))

    async def prefill(node: Any, call: Any, out: Any) -> None:
        if call.prompt_token_ids[-2:] == [1, 2]:
            await out.error("the lanes died", code="lanes_lost")
        else:
            await scripts.prefill_done(node, call, out)

    async def decode(node: Any, call: Any, out: Any) -> None:
        await (resumes(scripts) if call.local_prefill else scripts.ticket_then_hang)(node, call, out)

    await cluster.add("p1", "prefill", prefill=prefill)
    other = await cluster.add("d2", decode=decode)
    await cluster.beat(other, draining=True)
    async with cluster.session.post(cluster.url + PATH, json=CHAT | {"stream": True}) as response:
        data = await response.content.readline()
        await cluster.beat(other)
        data += await response.read()
    assert data.endswith(b"data: [DONE]\n\n")
    assert [call.local_prefill for call in other.calls] == [False, True]
    assert all(call.output_token_ids == [1, 2] for call in other.calls)
