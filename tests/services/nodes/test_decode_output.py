"""From tokens to pieces of text with their ids: stop strings, held-back text, resumption; and OpenAI's chunks."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.services.decode.openai_format import ChunkFormat, WholeFormat
from prfaas.services.decode.output import OutputText, Piece
from prfaas.services.decode.stop import StopStrings
from prfaas.services.engine.tokenizer import ByteTokenizer, TextStream
from prfaas.services.messages import FormatMessage


def output(stop: tuple[str, ...] = (), min_tokens: int = 0, include: bool = False) -> OutputText:
    return OutputText(TextStream(ByteTokenizer()), StopStrings(stop, include), min_tokens)


def pieces(out: OutputText, text: str) -> list[Piece]:
    """Push tokens until the output stops, then finish it; without the pieces that have nothing."""
    found = []
    for token_id in text.encode():
        found.append(out.push(token_id))
        if out.stopped:
            break
    found.append(out.finish())
    return [p for p in found if p.text or p.token_ids]


def shown(out: OutputText, text: str) -> str:
    return "".join(p.text for p in pieces(out, text))


def ids(out_pieces: list[Piece]) -> list[int]:
    return [i for p in out_pieces for i in p.token_ids]


# -- stop strings -----------------------------------------------------------------------------------------------------


def test_a_stop_string_across_tokens_ends_the_output_before_it() -> None:
    out = output(("STOP",))
    assert shown(out, "one STop two STOP three") == "one STop two "
    assert out.stopped


def test_the_stop_string_is_shown_when_asked_for() -> None:
    assert shown(output(("STOP",), include=True), "one STOP two") == "one STOP"


def test_what_may_begin_a_stop_string_is_held_back_with_its_ids() -> None:
    """Nothing of a pending stop string leaves; when it turns out to be none, text and ids leave together."""
    out = output(("aab",))
    assert out.push(ord("x")) == Piece("x", [ord("x")])
    assert out.push(ord("a")) == Piece("", [])
    assert out.push(ord("a")) == Piece("", [])
    assert out.push(ord("a")) == Piece("a", [])  # "aa" is still pending
    assert out.push(ord("c")) == Piece("aac", [ord(c) for c in "aaac"])


def test_a_stop_string_may_begin_at_any_of_several_places() -> None:
    stop = StopStrings(("abc",))
    assert [stop.push("xaa"), stop.push("bc")] == ["xa", ""]
    assert stop.stopped


def test_held_text_is_shown_when_the_output_ends() -> None:
    out = output(("abcd",))
    assert shown(out, "xab") == "xab"
    assert not out.stopped


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    """min_tokens honoured: the first match that counts is in the text behind them."""
    assert shown(output(("a",), min_tokens=4), "ababcacd") == "ababc"


def test_a_stop_string_that_is_complete_behind_min_tokens_counts() -> None:
    """Wherever it begins, and nothing of it was shown; one that was complete before does not come up again, though a
    longer one holds its text back."""
    assert shown(output(("bcde",), min_tokens=3), "abcdef") == "a"
    assert shown(output(("bcde",), min_tokens=5), "abcdef") == "abcdef"
    assert shown(output(("bc", "abcdef"), min_tokens=4), "xabcdxbcx") == "xabcdx"


@settings(max_examples=150)
@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=10),
)
def test_the_cut_into_pieces_does_not_matter(text: str, stops: list[str], cuts: list[int]) -> None:
    """Text in any pieces ends where it ends in one, and never shows any part of the stop string that ended it."""

    def run(parts: list[str]) -> tuple[str, bool]:
        stop = StopStrings(stops)
        seen = ""
        for part in parts:
            seen += stop.push(part)
            if stop.stopped:
                return seen, True
        return seen + stop.flush(), False

    bounds = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    parts = [text[a:b] for a, b in itertools.pairwise(bounds)]
    ends = [(text.index(s) + len(s), text.index(s)) for s in stops if s in text]
    expected = (text[: min(ends)[1]], True) if ends else (text, False)
    assert run(parts) == run(list(text)) == expected


# -- ids and resumption -----------------------------------------------------------------------------------------------


def test_ids_wait_for_the_last_byte_of_their_character() -> None:
    found = pieces(output(), "a😀b")
    assert [p.text for p in found] == ["a", "😀", "b"]
    assert found[1].token_ids == list("😀".encode())


def test_ids_of_text_that_is_partly_held_wait() -> None:
    """Bytes that are no text leave as U+FFFD one behind the tokens; their ids leave when nothing is held."""
    out = output()
    found = [out.push(0x80) for _ in range(6)]
    assert ids(found) == []
    assert "".join(p.text for p in found) == "\ufffd" * 5
    assert out.finish() == Piece("\ufffd", [0x80] * 6)


@settings(max_examples=100)
@given(st.binary(max_size=30))
def test_every_id_leaves_exactly_once_and_in_order(data: bytes) -> None:
    out = output(("qq",))
    found = [out.push(i) for i in data] + [out.finish()]
    assert ids(found) == list(data)


@settings(max_examples=100)
@given(data=st.data(), text=st.text("aβ😀bS", min_size=1, max_size=20))
def test_a_stream_resumed_anywhere_says_the_same(data: st.DataObject, text: str) -> None:
    """After any piece: the ids that were sent and the characters of text that were sent are enough to go on."""
    whole = pieces(output(("SS",)), text)
    cut = data.draw(st.integers(0, len(whole)))
    sent_ids = ids(whole[:cut])
    sent_text = "".join(p.text for p in whole[:cut])
    again = output(("SS",))
    rest = again.replay(sent_ids, len(sent_text))
    if not again.stopped:
        more = [again.push(i) for i in ids(whole[cut:]) if not again.stopped] + [again.finish()]
        rest += "".join(p.text for p in more)
        assert sent_ids + ids(more) == ids(whole)
    assert sent_text + rest == "".join(p.text for p in whole)


def test_resume_from_five_tokens() -> None:
    """Five tokens delivered, three of their characters seen: the rest follows, and no id twice."""
    out = output()
    assert out.replay(list(b"hello"), 3) == "lo"
    assert out.push(ord("!")) == Piece("!", [ord("!")])
    assert out.tokens == 6


# -- OpenAI's chunks --------------------------------------------------------------------------------------------------


def format_message(kind: str, **more: Any) -> FormatMessage:
    return FormatMessage(kind, "id-1", 1700000000, 'mo"del', **more)


def data_lines(events: bytes) -> list[Any]:
    lines = [line for line in events.decode().split("\n") if line.startswith("data: ")]
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_chat_chunks() -> None:
    """The role comes with the first delta, the finish reason with the last; ids precede the line with their text."""
    chunks = ChunkFormat(format_message("chat", stream=True), 7, resumed=False)
    first = chunks.piece(Piece('say "é"\n', [1, 23]), 2)
    assert first.startswith(b": ids 1,23\ndata: {")
    assert first.endswith(b"}\n\n")
    assert first.count(b"\n\n") == 1
    [chunk] = data_lines(first)
    assert chunk == {
        "id": "id-1",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": 'mo"del',
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": 'say "é"\n'},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
    }
    [second] = data_lines(chunks.piece(Piece("x", [4]), 3))
    assert second["choices"][0]["delta"] == {"content": "x"}
    assert chunks.piece(Piece("", []), 4) == b""
    [last] = data_lines(chunks.finish(Piece("", []), "stop", 4))
    assert last["choices"][0]["finish_reason"] == "stop"
    assert chunks.end() == b"data: [DONE]\n\n"


def test_the_usage_chunk_has_no_choices() -> None:
    """include_usage: null until the last chunk, which has the figures and empty choices."""
    chunks = ChunkFormat(format_message("completion", stream=True, include_usage=True), 7, resumed=False)
    [piece] = data_lines(chunks.piece(Piece("a", [1]), 1))
    assert piece["usage"] is None
    assert piece["choices"] == [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}]
    finish, usage = data_lines(chunks.finish(Piece("b", [2]), "length", 2))
    assert finish["choices"][0] == {"index": 0, "text": "b", "logprobs": None, "finish_reason": "length"}
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}


def test_usage_in_every_chunk() -> None:
    chunks = ChunkFormat(
        format_message("chat", stream=True, include_usage=True, continuous_usage=True), 7, resumed=False
    )
    [piece] = data_lines(chunks.piece(Piece("a", [1]), 1))
    assert piece["usage"]["completion_tokens"] == 1
    finish, usage = data_lines(chunks.finish(Piece("", []), "length", 2))
    assert finish["usage"] == usage["usage"]


def test_a_resumed_stream_has_no_second_role() -> None:
    chunks = ChunkFormat(format_message("chat", stream=True), 7, resumed=True)
    [piece] = data_lines(chunks.piece(Piece("a", [1]), 1))
    assert piece["choices"][0]["delta"] == {"content": "a"}


@pytest.mark.parametrize(
    ("kind", "object_", "text"),
    [("chat", "chat.completion", ("message", "content")), ("completion", "text_completion", ("text",))],
)
def test_whole_responses(kind: str, object_: str, text: tuple[str, ...]) -> None:
    """Not streaming: nothing until the end, then one line with everything, its ids before it."""
    whole = WholeFormat(format_message(kind), 7)
    assert whole.piece(Piece("Hel", [1]), 1) == b""
    assert whole.finish(Piece("lo", [2, 3]), "stop", 3) == b""
    last = whole.end()
    assert last.startswith(b": ids 1,2,3\ndata: ")
    [body] = data_lines(last)
    assert body["object"] == object_
    choice = body["choices"][0]
    for key in text:
        choice = choice[key]
    assert choice == "Hello"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == 10
