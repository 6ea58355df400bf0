"""Every field of the OpenAI API is read, refused with a clear 4xx that names it, or accepted in its neutral form."""

from __future__ import annotations

from typing import Any

import pytest
from prfaas.common.errors import RequestError, UnsupportedError
from prfaas.services.router.openai import GenerationRequest, parse_request

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hi"}


def chat(**fields: Any) -> GenerationRequest:
    return parse_request("chat", CHAT | fields)


def completion(**fields: Any) -> GenerationRequest:
    return parse_request("completion", COMPLETION | fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", None),
        ("model", 3),
        ("prompt", None),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", {"text": "Hi"}),
        ("prompt", [1, "a"]),
        ("prompt", [1, True]),
        ("prompt", [1, 2.5]),
        ("prompt", [[]]),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 10**30),
        ("max_tokens", "5"),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("seed", 1 << 64),
        ("min_tokens", -1),
        ("ignore_eos", 1),
        ("stream", "yes"),
        ("stop", 5),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop", ["a" * 257]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "5"),
        ("stream_options", {"include_usage": True}),
        ("user", 5),
        ("metadata", "m"),
        ("store", "yes"),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: Any) -> None:
    """RequestError with the field in `param` and in the message."""
    with pytest.raises(RequestError, match=field) as error:
        completion(**{field: value})
    assert error.value.param == field
    assert error.value.status == 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("best_of", 3),
        ("logprobs", 0),
        ("logprobs", True),
        ("logit_bias", {"5": 1}),
        ("suffix", "end"),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("repetition_penalty", 1.1),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("audio", {"voice": "alloy"}),
        ("modalities", ["audio"]),
    ],
)
def test_an_unsupported_feature_is_refused_by_name(field: str, value: Any) -> None:
    """400 that says so, never ignored."""
    with pytest.raises(UnsupportedError, match=f"{field} is not supported") as error:
        chat(**{field: value})
    assert error.value.param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1),
        ("n", None),
        ("logprobs", None),
        ("logprobs", False),
        ("repetition_penalty", 1.0),
        ("presence_penalty", 0),
        ("frequency_penalty", 0.0),
        ("tools", []),
        ("tool_choice", "none"),
        ("response_format", {"type": "text"}),
        ("logit_bias", {}),
        ("user", "someone"),
        ("temperature", None),
        ("stop", None),
        ("no_such_field", None),
    ],
)
def test_a_neutral_value_changes_nothing(field: str, value: Any) -> None:
    """Clients send fields that they don't mean."""
    assert chat(**{field: value}) == chat()


def test_an_unknown_field_is_refused_with_a_hint() -> None:
    """A misspelt field would otherwise be ignored in silence."""
    with pytest.raises(RequestError, match="did you mean temperature") as error:
        chat(temprature=1)
    assert error.value.param == "temprature"


def test_a_field_of_the_other_endpoint_is_refused() -> None:
    """`messages` in a completion is a mistake, not an extra."""
    with pytest.raises(RequestError, match="does not belong"):
        completion(messages=[])


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        (["Hi"], "messages[0]"),
        ([{"role": "wizard", "content": "Hi"}], "messages[0].role"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([{"role": "tool", "content": "Hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(messages: Any, param: str) -> None:
    """The path to the mistake is in `param`."""
    with pytest.raises(RequestError) as error:
        chat(messages=messages)
    assert error.value.param == param


def test_text_parts_become_one_text_and_developer_becomes_system() -> None:
    """Chat templates know strings and three roles."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert request.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}]


def test_both_names_of_max_tokens_are_read() -> None:
    """They must agree when both are given."""
    assert chat(max_tokens=5).max_output_tokens == 5
    assert chat(max_completion_tokens=5).max_output_tokens == 5
    assert chat(max_completion_tokens=5, max_tokens=5).max_output_tokens == 5
    with pytest.raises(RequestError, match="differ"):
        chat(max_completion_tokens=5, max_tokens=6)


def test_min_tokens_above_max_tokens_is_refused() -> None:
    """It could never end."""
    with pytest.raises(RequestError, match="min_tokens"):
        chat(max_tokens=5, min_tokens=6)


def test_vllms_extras_are_read() -> None:
    """top_k −1 is off; continuous usage needs include_usage."""
    request = chat(
        top_k=-1,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[7],
        stop="end",
        include_stop_str_in_output=True,
        seed=1,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    sampling = request.sampling
    assert (sampling.top_k, sampling.min_tokens, sampling.ignore_eos, sampling.seed) == (0, 2, True, 1)
    assert (sampling.stop, sampling.stop_token_ids, sampling.include_stop_str_in_output) == (("end",), (7,), True)
    assert (request.include_usage, request.continuous_usage) == (True, True)


def test_a_long_mistake_is_not_sent_back() -> None:
    """The message stays short whatever was given."""
    with pytest.raises(RequestError) as error:
        chat(temperature="x" * 1_000_000)
    assert len(str(error.value)) < 200


# -- where decode nodes forward bodies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True, "top_logprobs": 5},
        {"frequency_penalty": 0.5},
        {"a_field_of_next_year": 1},
        {"messages": [{"role": "tool", "tool_call_id": "1", "content": "42"}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
    ],
)
def test_what_an_engines_own_server_may_know_is_forwarded(fields: dict[str, Any]) -> None:
    body = CHAT | fields
    request = parse_request("chat", body, forwards=True)
    assert request.forward == body
    with pytest.raises(RequestError):
        parse_request("chat", body)


def test_every_chat_is_forwarded_and_of_completions_what_is_not_ours() -> None:
    """A completion that a decode node can answer from token ids may go on elsewhere when the node is lost."""
    assert parse_request("chat", CHAT, forwards=True).forward == CHAT
    ours = {"model": "m", "prompt": "hi", "seed": 3, "n": 1, "user": "u"}
    assert parse_request("completion", ours, forwards=True).forward is None
    theirs = ours | {"logprobs": 3}
    assert parse_request("completion", theirs, forwards=True).forward == theirs


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 2), ("use_beam_search", True), ("kv_transfer_params", {"prfaas": {}}), ("modalities", ["audio"])],
)
def test_what_does_not_go_with_kv_from_elsewhere_is_refused_all_the_same(field: str, value: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        parse_request("chat", CHAT | {field: value}, forwards=True)
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"stream": 1}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_what_routing_needs_is_checked_before_it_is_forwarded(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request("chat", CHAT | fields, forwards=True)
    assert caught.value.param == param
