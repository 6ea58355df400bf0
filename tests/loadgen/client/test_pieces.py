"""The client's pure pieces: event streams, URLs, bodies, and whether the client itself was too slow."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.common.errors import ConfigError
from prfaas.loadgen.client.endpoint import base_url
from prfaas.loadgen.client.stream import MAX_LINE_BYTES, Answer, BadStreamError, SseParser, error_text
from prfaas.loadgen.client.verdict import judge
from prfaas.loadgen.records import Records


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1).map(str.encode), max_size=6),
    st.sampled_from([b"\n", b"\r\n"]),
    st.data(),
)
def test_events_come_out_whole_however_the_bytes_are_cut(events: list[bytes], end: bytes, data: st.DataObject) -> None:
    """Comments and other fields between them are dropped."""
    stream = b"".join(b": ping" + end + b"event: x" + end + b"data: " + e + end + end for e in events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    parser = SseParser()
    got: list[bytes] = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += parser.feed(stream[start:stop])
    assert got == events


def test_an_event_of_several_lines_is_joined_and_a_space_is_not_needed() -> None:
    assert SseParser().feed(b"data:a\ndata: b\n\n") == [b"a\nb"]


def test_a_line_without_end_is_given_up() -> None:
    parser = SseParser()
    for _ in range(MAX_LINE_BYTES // (1 << 20)):
        assert parser.feed(b"x" * (1 << 20)) == []
    with pytest.raises(BadStreamError, match="longer than 8 MiB"):
        parser.feed(b"x")


def _chunk(**choice: object) -> bytes:
    return json.dumps({"choices": [choice]}).encode()


def test_the_first_token_is_the_first_text() -> None:
    """A chat's opening chunk has a role and no text; reasoning is text; the last chunk's usage is no token."""
    answer = Answer()
    answer.take(_chunk(delta={"role": "assistant", "content": ""}), 1.0)
    answer.take(_chunk(delta={"reasoning_content": "hm"}), 2.0)
    answer.take(_chunk(delta={"content": "yes"}), 3.0)
    answer.take(_chunk(delta={}, finish_reason="stop"), 4.0)
    answer.take(b'{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}', 5.0)
    assert answer.times_s == [2.0, 3.0]
    assert (answer.prompt_tokens, answer.output_tokens, answer.finished) == (7, 2, True)


def test_an_answer_without_text_has_its_token_with_the_finish_reason() -> None:
    answer = Answer()
    answer.take(_chunk(text="", finish_reason="stop"), 2.0)
    assert answer.times_s == [2.0]


@pytest.mark.parametrize(
    "text",
    ["http://a:1", "a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/", "http://a:1/v1/chat/completions"],
)
def test_a_url_may_have_what_clients_append(text: str) -> None:
    assert base_url(text) == "http://a:1"


def test_a_url_keeps_its_path() -> None:
    assert base_url("https://a.example/team/v1") == "https://a.example/team"


@pytest.mark.parametrize("text", ["ftp://a", "http://", "http://a:99999", "http://a:0", "http://a/?x=1", "http://[a"])
def test_what_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        base_url(text)


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as told:
        base_url("http://me:s3cret@a:1")
    assert "s3cret" not in str(told.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "no\\nroom"}}', "no room"),
        (b'{"error": "plain"}', "plain"),
        (b'{"message": "flat"}', "flat"),
        (b'{"detail": "fast"}', "fast"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"x" * 1000, "x" * 300),
        (b"[1, 2]", "[1, 2]"),
    ],
)
def test_what_a_server_says_is_one_short_line(body: bytes, said: str) -> None:
    assert error_text(body) == said


def _sent(late_s: float, ttft_s: float = 1.0, **more: object) -> Records:
    at = np.arange(100.0)
    return Records.of(at, first_token_s=at + ttft_s, client_late_s=np.full(100, late_s), **more)


QUIET = np.full(100, 0.0005)


def test_a_client_that_keeps_its_times_is_not_blamed() -> None:
    health = judge(_sent(0.001), QUIET, 0.3)
    assert health.warnings == []
    assert health.late_p99_s == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("records", "lag_s", "cores", "said"),
    [
        (_sent(0.2), QUIET, 0.3, "200 ms late"),
        (_sent(0.001), np.full(100, 0.05), 0.3, "50 ms late"),
        (_sent(0.001), QUIET, 0.97, "97% of a core"),
        (_sent(0.001, error=["no_file_descriptors"] * 100), QUIET, 0.3, "ulimit -n"),
        (_sent(0.001, error=["no_local_ports"] * 100), QUIET, 0.3, "local ports"),
    ],
)
def test_a_client_that_was_the_bottleneck_says_so(records: Records, lag_s: np.ndarray, cores: float, said: str) -> None:
    (warning,) = judge(records, lag_s, cores).warnings
    assert said in warning


def test_lateness_that_is_small_beside_the_latency_is_no_bottleneck() -> None:
    """15 ms late against a TTFT of 10 s changes nothing that anyone reads."""
    assert judge(_sent(0.015, ttft_s=10.0), QUIET, 0.3).warnings == []
