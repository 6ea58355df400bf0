"""What only vLLM's own server can do works for offloaded requests too: the client's body is vLLM's to answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.vllm.conftest import ADAPTER, NEAR_TIE, near_tie

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

QUESTION = "Name a city in France, and say in one sentence what it is known for. " * 8
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "known_for": {"type": "string", "maxLength": 40}},
    "required": ["city", "known_for"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "strict": True, "description": "Looks a city up.", "parameters": CITY},
}


async def test_a_chat_is_answered_as_vllm_answers_it(vllm_cluster):
    """With vLLM's own chat template, which the router does not know: prefill computes the prompt that vLLM renders."""
    answer = await vllm_cluster.chat(QUESTION, max_tokens=24)
    fields = {"max_tokens": 24, "logprobs": True, "top_logprobs": 2}
    alone = await vllm_cluster.servers["decode"].chat(vllm_cluster.session, QUESTION, **fields)
    assert answer["headers"]["x-prfaas-prefill"] == "prefill-1"
    assert answer["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    margin = near_tie(alone["choices"][0], answer["choices"][0]["message"]["content"])
    assert margin is None or margin <= NEAR_TIE
    assert answer["model"] == await vllm_cluster.models()
    assert "token_ids" not in answer["choices"][0]
    assert "kv_transfer_params" not in answer
    timeline = await vllm_cluster.timeline(answer["headers"]["x-request-id"])
    assert timeline["kv_raw_bytes"] > 0


async def test_a_stream_has_vllms_chunks(vllm_cluster):
    body = {
        "model": await vllm_cluster.models(),
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 12,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 2,
    }
    chunks: list[dict[str, Any]] = []
    async with vllm_cluster.session.post(
        vllm_cluster.router_url + "/v1/chat/completions", json=body, headers={"x-prfaas-pin-route": "offload"}
    ) as response:
        async for line in response.content:
            if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                chunks.append(json.loads(line[6:]))
        last = line
    assert last in (b"data: [DONE]\n", b"\n")
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    tokens = [token for choice in choices if choice.get("logprobs") for token in choice["logprobs"]["content"]]
    assert len(tokens) == 12
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    assert all("token_ids" not in choice for choice in choices)


async def test_structured_output(vllm_cluster):
    format = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    answer = await vllm_cluster.chat(QUESTION, max_tokens=100, response_format=format)
    assert answer["headers"]["x-prfaas-prefill"] == "prefill-1"
    assert set(json.loads(answer["choices"][0]["message"]["content"])) == {"city", "known_for"}


async def test_a_tool_call(vllm_cluster):
    answer = await vllm_cluster.chat(QUESTION, max_tokens=100, tools=[TOOL], tool_choice="required")
    assert answer["headers"]["x-prfaas-prefill"] == "prefill-1"
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "look_up"
    assert set(json.loads(call["function"]["arguments"])) == {"city", "known_for"}


async def test_what_vllm_refuses_is_told_as_vllm_says_it(vllm_cluster):
    answer = await vllm_cluster.chat(QUESTION, expected=400, max_tokens=4, logprobs=True, top_logprobs=1000)
    assert "logprobs" in answer["error"]["message"]


async def test_several_answers_at_once_are_refused(vllm_cluster):
    answer = await vllm_cluster.chat(QUESTION, expected=400, max_tokens=4, n=2)
    assert answer["error"]["param"] == "n"


async def test_an_adapter_is_a_model_of_its_own(vllm_cluster, prompts):
    """Prefill computes with it as well, and what it has computed is nobody else's."""
    await vllm_cluster.wait_for_models({ADAPTER})
    prompt = prompts[257]
    plain = await vllm_cluster.offloaded(prompt, 16)
    answer = await vllm_cluster.offloaded(prompt, 16, model=ADAPTER)
    assert answer["headers"]["x-prfaas-prefill"] == "prefill-1"
    alone = await vllm_cluster.servers["decode"].complete(vllm_cluster.session, prompt, 16, model=ADAPTER)
    margin = near_tie(alone, answer["text"])
    assert margin is None or margin <= NEAR_TIE
    assert answer["text"] != plain["text"]
    timeline = await vllm_cluster.timeline(answer["headers"]["x-request-id"])
    assert timeline["kv_raw_bytes"] > 0
