"""The client against a scripted server over real sockets: what it sends, what it notes, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from prfaas.loadgen.report.objective import ttft_s


async def test_an_answer_is_noted_with_its_tokens_and_their_times(client: Any, make_workload: Any) -> None:
    """Usage says the counts, the pieces of text say the times; instants are in the order of cause and effect."""
    records = await client.run(make_workload([0.0]))
    record = records[0]
    assert (record.status, record.prompt_tokens, record.output_tokens, record.cached_tokens) == ("ok", 9, 3, 5)
    marks = [record.scheduled_s, record.sent_s, record.first_token_s, record.second_token_s, record.last_token_s]
    assert marks == sorted(marks)
    assert record.last_token_s <= record.end_s
    assert sum(record.itl_s) == pytest.approx(record.last_token_s - record.first_token_s, abs=1e-6)
    assert len(record.itl_s) == 2


async def test_completions_carry_the_same_prompt_as_text_and_as_token_ids(
    server: Any, client: Any, make_workload: Any
) -> None:
    await client.run(make_workload([0.0], prompt=5))
    await client.run(make_workload([0.0], prompt=5), token_ids=True, ignore_eos=True, extra={"top_p": 0.5})
    text, ids = (call.body for call in server.calls)
    assert len(text["prompt"].split()) == 5
    assert "ignore_eos" not in text
    assert len(ids["prompt"]) == 5
    assert all(0 <= token < 100 for token in ids["prompt"])
    assert ids["max_tokens"] == 3
    assert ids["stream"] is True
    assert ids["ignore_eos"] is True
    assert ids["top_p"] == 0.5


async def test_a_chat_says_what_was_really_answered(server: Any, client: Any, make_workload: Any) -> None:
    """Later turns hold the earlier questions and the server's own answers, and leave after them."""
    records = await client.run(make_workload([0.0, math.nan, math.nan], turns=[0, 1, 2]), kind="chat")
    said = [[(m["role"], m["content"]) for m in call.body["messages"]] for call in server.calls]
    assert [len(messages) for messages in said] == [1, 3, 5]
    assert said[2][:3] == said[1]
    assert said[1][1] == ("assistant", "one two three")
    assert said[1][0] == said[0][0]
    assert said[1][2] != said[0][0]
    assert (records.scheduled_s[1:] >= records.end_s[:-1]).all()


async def test_a_failed_turn_ends_its_conversation(server: Any, client: Any, make_workload: Any) -> None:
    async def no(call: Any) -> web.Response:
        return web.Response(status=500, text="broken")

    server.script = no
    records = await client.run(make_workload([0.0, math.nan, math.nan], turns=[0, 1, 2]))
    assert len(records) == 1
    assert client.runner.given_up == 2
    assert client.runner.unsent == 2


# -- when requests leave ----------------------------------------------------------------------------------------------


async def test_a_server_that_stalls_does_not_slow_the_sending(server: Any, client: Any, make_workload: Any) -> None:
    """Open loop: the server answers nothing until all requests have come, so all must come while none is answered; the
    time that it let them wait is in every latency."""
    gate = asyncio.Event()
    released: list[float] = []

    async def stall(call: Any) -> None:
        await gate.wait()
        await three_words(call)

    three_words = server.script
    server.script = stall
    running = asyncio.create_task(client.run(make_workload([0.0, 0.01, 0.02, 0.03, 0.04])))
    await server.received(5)
    released.append(client.runner._clock.now_s())
    gate.set()
    records = await running
    assert records.ok.all()
    assert (records.first_token_s >= released[0]).all()
    assert (ttft_s(records) >= released[0] - records.scheduled_s).all()


async def test_waiting_for_a_slot_is_latency(server: Any, client: Any, make_workload: Any) -> None:
    """Coordinated omission: with one request in flight at a time those behind a slow one leave late, and their latency
    counts from when they should have left."""
    gate = asyncio.Event()
    three_words = server.script

    async def stall_the_first(call: Any) -> None:
        if len(server.calls) == 1:
            await gate.wait()
        await three_words(call)

    server.script = stall_the_first
    running = asyncio.create_task(client.run(make_workload([0.0, 0.0, 0.0], cap=1)))
    await server.received(1)
    gate.set()
    records = await running
    assert (records.sent_s[1:] >= records.end_s[:-1]).all()
    assert records.scheduled_s.tolist() == [0.0, 0.0, 0.0]
    assert ttft_s(records)[2] >= records.end_s[0]
    # The wait for the slot is the server's doing, not the client's.
    assert records.client_late_s[2] <= records.sent_s[2] - records.end_s[1]


async def test_a_closed_loop_keeps_its_users_busy(server: Any, client: Any, make_workload: Any) -> None:
    """As many requests as users come before any is answered, never more, and each next one follows an end."""
    gate = asyncio.Event()
    three_words = server.script
    in_flight, most = 0, 0

    async def count(call: Any) -> None:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await gate.wait()
        in_flight -= 1
        await three_words(call)

    server.script = count
    running = asyncio.create_task(client.run(make_workload([0.0] * 12, cap=4, closed=True)))
    await server.received(4)
    gate.set()
    records = await running
    assert len(records) == 12
    assert records.ok.all()
    assert most == 4
    ends = set(records.end_s.tolist())
    assert all(any(s >= e for e in ends) for s in records.scheduled_s[4:].tolist())


async def test_hundreds_of_requests_are_in_flight_at_once(server: Any, client: Any, make_workload: Any) -> None:
    """No limit on connections makes requests wait inside the client."""
    gate = asyncio.Event()
    three_words = server.script

    async def stall(call: Any) -> None:
        await gate.wait()
        await three_words(call)

    server.script = stall
    running = asyncio.create_task(client.run(make_workload([0.0] * 300)))
    await server.received(300)
    gate.set()
    assert (await running).ok.all()


async def test_a_long_prompt_arrives_whole(server: Any, client: Any, make_workload: Any) -> None:
    """Long prompts are made ahead in a thread; they are the same as if they weren't."""
    server_limit = 50_000
    await client.run(make_workload([0.0, 0.0], prompt=server_limit), token_ids=True)
    first, second = (call.body["prompt"] for call in server.calls)
    assert len(first) == len(second) == server_limit
    assert first != second


async def test_stopping_writes_down_what_was_in_flight(server: Any, client: Any, make_workload: Any) -> None:
    """`stop` sends nothing more, breaks off what is under way, and leaves a record of it with the tokens it had."""
    begun = asyncio.Event()

    async def one_word_then_silence(call: Any) -> None:
        await call.begin()
        await call.word("one ")
        begun.set()
        await asyncio.Event().wait()

    server.script = one_word_then_silence
    workload = make_workload([0.0, 3600.0])
    running = asyncio.create_task(client.run(workload))
    await begun.wait()
    client.runner.stop()
    records = await running
    assert [record.status for record in records] == ["interrupted"]
    assert math.isfinite(records.end_s[0])
    assert client.runner.unsent == 1


# -- what goes wrong --------------------------------------------------------------------------------------------------


def _error(status: int, body: Any) -> Any:
    async def script(call: Any) -> web.Response:
        text = body if isinstance(body, str) else json.dumps(body)
        return web.Response(status=status, text=text, content_type="application/json")

    return script


def _stream(*pieces: str) -> Any:
    async def script(call: Any) -> None:
        await call.begin()
        for piece in pieces:
            await call.send(piece)
        await call.response.write_eof()

    return script


WORD = 'data: {"choices": [{"text": "one", "finish_reason": null}]}\n\n'


@pytest.mark.parametrize(
    ("script", "status", "error", "text"),
    [
        (_error(500, {"error": {"message": "out of luck"}}), "failed", "http_500", "out of luck"),
        (_error(404, {"detail": "no such path"}), "failed", "http_404", "no such path"),
        (_error(429, {"error": {"message": "come later"}}), "refused", "http_429", "come later"),
        (_error(503, "<html>down\nfor now</html>"), "failed", "http_503", "<html>down for now</html>"),
        (_error(200, {"choices": []}), "failed", "not_sse", "application/json"),
        (_stream(WORD, "data: {nonsense\n\n"), "failed", "not_json", "no chunk"),
        (_stream(WORD, 'data: {"choices": 5}\n\n'), "failed", "not_json", "choices"),
        (_stream(WORD), "failed", "stream_broken", "before the answer was complete"),
        (_stream("data: [DONE]\n\n"), "failed", "no_tokens", "no token"),
        (_stream(""), "failed", "stream_broken", "before the answer was complete"),
        (
            _stream(WORD, 'data: {"error": {"message": "node lost", "code": "Stream-Broken"}}\n\n'),
            "failed",
            "stream_broken",
            "node lost",
        ),
        (_stream('data: {"error": "plain"}\n\n'), "failed", "error_in_stream", "plain"),
    ],
)
async def test_a_wrong_answer_is_a_failed_request_with_a_word(
    server: Any, client: Any, make_workload: Any, script: Any, status: str, error: str, text: str
) -> None:
    """Each kind has its word in the record, and what the server said is kept once; the run goes on."""
    server.script = script
    records = await client.run(make_workload([0.0, 0.0]))
    assert [(record.status, record.error) for record in records] == [(status, error)] * 2
    assert text in client.exchange.errors[error]
    assert np.isfinite(records.end_s).all()


async def test_a_stream_that_is_cut_is_broken(server: Any, client: Any, make_workload: Any) -> None:
    """The connection goes in the middle of the body; the tokens that came are in the record."""

    async def cut(call: Any) -> None:
        await call.begin()
        await call.word("one ")
        await call.word("two ")
        call.http.transport.close()

    server.script = cut
    record = (await client.run(make_workload([0.0])))[0]
    assert (record.status, record.error) == ("failed", "stream_broken")
    assert record.output_tokens == 2
    assert record.first_token_s is not None


async def test_a_refused_connection_is_counted_and_the_run_ends(client: Any, make_workload: Any, deaf_url: str) -> None:
    client.url = deaf_url
    records = await client.run(make_workload([0.0] * 5))
    assert records.error.counts() == {"connection_refused": 5}


async def test_an_answer_that_never_comes_is_a_timeout(server: Any, client: Any, make_workload: Any) -> None:
    async def silence(call: Any) -> None:
        await asyncio.Event().wait()

    server.script = silence
    records = await client.run(make_workload([0.0]), timeout_s=0.05)
    assert records.error.counts() == {"timeout": 1}


async def test_what_is_no_http_is_an_error_like_others(client: Any, make_workload: Any) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        # All of it: closing with something unread would reset the connection.
        await reader.readexactly(int(re.search(rb"content-length: (\d+)", head.lower())[1]))
        writer.write(b"this is no HTTP\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as listener:
        client.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        records = await client.run(make_workload([0.0]))
    assert records.error.counts() == {"malformed_http": 1}


# -- a PrfaaS router --------------------------------------------------------------------------------------------------

TIMELINE = {
    "decision": "offloaded",
    "fallbacks": ["prefill_lost"],
    "prefill_node": "p1",
    "decode_node": "d1",
    "ttft_parts": {"router_s": 0.1, "queue_s": 0.2, "prefill_s": 0.3, "exposed_s": 0.1, "first_step_s": 0.05},
    "kv_raw_bytes": 2000,
    "kv_wire_bytes": 1000,
    "local_prefill": False,
    "clock_error_s": 0.001,
    "layers": [{"layer": 0}],
}


def _with_headers(script: Any, headers: dict[str, str]) -> Any:
    """The script, its answers with `headers`."""

    async def routed(call: Any) -> None:
        begin = call.begin
        call.begin = lambda: begin(**headers)
        await script(call)

    return routed


async def test_a_router_is_asked_what_became_of_a_request(server: Any, client: Any, make_workload: Any) -> None:
    """The answer's headers say that it is one; its timeline fills in what a client can't see."""
    headers = {"x-request-id": "r1", "x-prfaas-reason": "offloaded", "x-prfaas-prefill": "p1"}
    server.script = _with_headers(server.script, headers)
    server.timelines["r1"] = TIMELINE
    record = (await client.run(make_workload([0.0]), timelines=True))[0]
    assert record.request_id == "r1"
    assert record.offloaded is True
    assert record.fallbacks == ["prefill_lost"]
    assert (record.queue_s, record.exposed_s, record.kv_wire_bytes) == (0.2, 0.1, 1000)
    assert record.transfer_s == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("said", "region", "offloaded"),
    [
        ({"prefill": "p1", "prefill-region": "dense", "decode-region": "home"}, "dense", True),
        ({"prefill": "p2", "prefill-region": "home", "decode-region": "home"}, "home", False),
        ({"decode-region": "home"}, "home", False),
        ({"prefill": "p1", "prefill-region": "dense"}, "dense", None),
        ({"prefill": "p1"}, "", None),
        ({}, "", None),
    ],
)
async def test_a_routers_headers_say_where_a_request_was_prefilled(
    server: Any, client: Any, make_workload: Any, said: dict[str, str], region: str, offloaded: bool | None
) -> None:
    """By a node of the region that decodes, of another, or by the decode node itself; what isn't said isn't known."""
    headers = {"x-prfaas-decision": "uncached=9; threshold=5", "x-prfaas-decode": "d1"}
    headers |= {f"x-prfaas-{name}": word for name, word in said.items()}
    server.script = _with_headers(server.script, headers)
    record = (await client.run(make_workload([0.0])))[0]
    assert (record.region, record.offloaded) == (region, offloaded)
    assert record.decode_region == said.get("decode-region", "")
    assert record.decision == "uncached=9; threshold=5"


@pytest.mark.parametrize(
    ("prefill_region", "local_prefill", "region", "offloaded"),
    [("dense", False, "dense", True), ("home", False, "home", False), ("dense", True, "home", False)],
)
async def test_a_timeline_leaves_to_the_headers_whether_prefill_was_in_another_region(
    server: Any,
    client: Any,
    make_workload: Any,
    prefill_region: str,
    local_prefill: bool,
    region: str,
    offloaded: bool,
) -> None:
    """A prefill node is not one of another region by itself; but a decode node that says that it has computed the
    prompt knows better than the header that was sent before."""
    headers = {"x-request-id": "r1", "x-prfaas-reason": "any", "x-prfaas-prefill": "p1", "x-prfaas-decode": "d1"}
    headers |= {"x-prfaas-prefill-region": prefill_region, "x-prfaas-decode-region": "home"}
    server.script = _with_headers(server.script, headers)
    server.timelines["r1"] = TIMELINE | {"local_prefill": local_prefill}
    record = (await client.run(make_workload([0.0]), timelines=True))[0]
    assert client.runner._timelines.missed == 0
    assert (record.region, record.offloaded) == (region, offloaded)


async def test_a_router_that_has_forgotten_leaves_the_record_as_it_is(
    server: Any, client: Any, make_workload: Any
) -> None:
    server.script = _with_headers(server.script, {"x-request-id": "r2", "x-prfaas-reason": "offloaded"})
    record = (await client.run(make_workload([0.0]), timelines=True))[0]
    assert (record.status, record.reason, record.offloaded) == ("ok", "offloaded", None)
    assert client.runner._timelines.missed == 1


async def test_a_foreign_server_is_not_asked(server: Any, client: Any, make_workload: Any) -> None:
    record = (await client.run(make_workload([0.0]), timelines=True))[0]
    assert record.offloaded is None
    assert client.runner._timelines.missed == 0
