"""What an API key may ask for, in requests and tokens a minute, and what a client hears when that is used up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.common.errors import ConfigError, QuotaError
from prfaas.services.router.quotas import KeyLimits, Quotas, parse_keys

BODY: Any = {"model": "stub-model", "prompt": "Hi", "max_tokens": 100}


def test_a_file_says_who_may_have_what() -> None:
    lines = [
        "# ours",
        "sk-a  name=team-a requests_per_min=60 tokens_per_min=1e6",
        "",
        "sk-b tokens_per_min=5  # few",
        "sk-c first_priority=-5",
    ]
    assert parse_keys(lines, "keys") == [
        KeyLimits("sk-a", "team-a", 60.0, 1e6),
        KeyLimits("sk-b", "key-2", tokens_per_min=5.0),
        KeyLimits("sk-c", "key-3", first_priority=-5),
    ]


def test_all_mistakes_of_a_file_are_told_at_once_and_no_key_is() -> None:
    lines = ["sk-a rate=5", "sk-b name=x requests_per_min=0", "sk-c name=y", "sk-d name=y", "sk-e tokens_per_min=nan"]
    lines += ["sk-f first_priority=101", "sk-g first_priority=soon"]
    with pytest.raises(ConfigError) as caught:
        parse_keys(lines, "keys")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "keys line 1", "keys line 2", "keys line 5", "keys line 6", "keys line 7", "keys",
    ]  # fmt: skip
    assert "sk-" not in str(caught.value)


def refused_for_s(quotas: Quotas, tokens: int, now_s: float) -> int:
    """0: it was let in."""
    try:
        quotas.admit("k", tokens, now_s)
    except QuotaError as error:
        return error.retry_after_s
    return 0


def test_requests_a_minute() -> None:
    """A minute's worth at once, then one every so many seconds."""
    quotas = Quotas([KeyLimits("k", "n", requests_per_min=30)])
    assert [refused_for_s(quotas, 1, 0.0) for _ in range(31)] == [0] * 30 + [2]
    assert refused_for_s(quotas, 1, 1.9) > 0
    assert refused_for_s(quotas, 1, 2.1) == 0
    assert refused_for_s(quotas, 1, 2.1) > 0


def test_tokens_a_minute_and_what_was_not_used() -> None:
    """A long request is let in and those behind it wait for it; what it didn't generate comes back."""
    quotas = Quotas([KeyLimits("k", "n", tokens_per_min=600)])
    assert refused_for_s(quotas, 900, 0.0) == 0
    assert refused_for_s(quotas, 1, 0.0) == 31
    quotas.give_back("k", 400)
    assert refused_for_s(quotas, 1, 0.0) == 0
    quotas.give_back("k", 10_000)
    assert refused_for_s(quotas, 601, 0.0) == 0
    assert refused_for_s(quotas, 1, 0.0) > 0


def test_a_refused_request_takes_nothing_and_others_have_no_limit() -> None:
    quotas = Quotas([KeyLimits("k", "n", requests_per_min=1, tokens_per_min=1), KeyLimits("free", "f")])
    assert refused_for_s(quotas, 5, 0.0) == 0
    for _ in range(100):
        assert refused_for_s(quotas, 5, 0.0) == 60
    for key in ("free", "unknown", ""):
        for _ in range(1000):
            quotas.admit(key, 1 << 30, 0.0)
    assert (quotas.name("k"), quotas.name("")) == ("n", "")


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 2000)), max_size=60))
def test_nobody_has_more_than_the_rate(asked: list[tuple[float, int]]) -> None:
    """In any time: the rate times it, a minute's worth to begin with, and one request's overdraft."""
    quotas, now_s, had = Quotas([KeyLimits("k", "n", tokens_per_min=1000)]), 0.0, 0
    for later_s, tokens in asked:
        now_s += later_s
        if not refused_for_s(quotas, tokens, now_s):
            had += tokens
        assert had <= 1000 + now_s * 1000 / 60 + 2001
        wait_s = refused_for_s(quotas, 1, now_s)
        had += not wait_s
        assert math.isfinite(wait_s)


async def test_a_key_may_not_ask_for_more_than_its_first_priority(make_cluster: Any, tmp_path: Path) -> None:
    """The client is told which it may; keys without that bound may ask for any. The node is told what was asked for."""
    file = tmp_path / "keys"
    file.write_text("sk-a first_priority=5\nsk-b\n")
    cluster = await make_cluster(api_keys_file=str(file))
    node = await cluster.add("d1")
    a, b = ({"authorization": f"Bearer {key}"} for key in ("sk-a", "sk-b"))
    status, body, _ = await cluster.post("/v1/completions", BODY, **a)
    assert (status, body["error"]["param"]) == (400, "priority")
    assert "priority 5 or a higher number" in body["error"]["message"]
    assert (await cluster.post("/v1/completions", {**BODY, "priority": 5}, **a))[0] == 200
    assert (await cluster.post("/v1/completions", {**BODY, "priority": -100}, **b))[0] == 200
    assert [call.priority for call in node.calls] == [5, -100]


async def test_a_client_beyond_its_quota_gets_429(make_cluster: Any, tmp_path: Path) -> None:
    """With Retry-After and OpenAI's error body; counted by the key's name. Another key goes on; output that was not
    made is not counted."""
    file = tmp_path / "keys"
    file.write_text("sk-a name=team-a tokens_per_min=150\nsk-b name=team-b requests_per_min=1\n")
    cluster = await make_cluster(api_keys_file=str(file))
    await cluster.add("d1")
    a, b = ({"authorization": f"Bearer {key}"} for key in ("sk-a", "sk-b"))
    # Prompt of 2 and output of 4 tokens each, though 100 were asked for.
    for _ in range(5):
        assert (await cluster.post("/v1/completions", BODY, **a))[0] == 200
    assert (await cluster.post("/v1/completions", BODY, **b))[0] == 200
    status, body, headers = await cluster.post("/v1/completions", BODY, **b)
    assert (status, body["error"]["code"], body["error"]["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert 1 <= int(headers["retry-after"]) <= 60
    assert "sk-b" not in body["error"]["message"]
    assert cluster.metric("prfaas_router_quota_refusals_total", key="team-b") == 1
    assert cluster.metric("prfaas_router_quota_refusals_total", key="team-a") == 0
    assert (await cluster.post("/v1/completions", BODY, **a))[0] == 200
