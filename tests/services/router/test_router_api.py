"""What the API says to bad input, keys, probes and nodes that don't fit."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from typing import Any

import aiohttp
import msgspec
import pytest
import structlog
from aiohttp import web
from prfaas.common.config import ClusterConfig, Config, RouterConfig
from prfaas.common.errors import ConfigError
from prfaas.common.metrics import Metrics
from prfaas.services import web as services_web
from prfaas.services.router.app import make_app, read_api_keys, run
from prfaas.services.web import Signer
from yarl import URL

PATH = "/v1/completions"
BODY = {"model": "stub-model", "prompt": "Hi"}


@pytest.mark.parametrize(
    ("body", "status", "what"),
    [
        (b"{", 400, "not valid JSON"),
        (b"", 400, "not valid JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b'{"model": "m", "prompt": "ab\xff\xfe"}', 400, "not valid UTF-8 at byte 28"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, 400, "nested too deeply"),
        (BODY | {"prompt": [1, 2.5]}, 400, "2.5 is no token id"),
        (b'{"model": "stub-model", "prompt": "\\ud800"}', 400, "not valid"),
        (b" " * 200_001, 413, "larger than 200000 bytes"),
        ({"prompt": "Hi"}, 400, "model is required"),
        ({"model": "gpt-4", "prompt": "Hi"}, 404, "does not exist"),
        (BODY | {"prompt": [300]}, 400, "token ids must be from 0 to 256"),
        (BODY | {"prompt": "x" * 5000}, 400, "the prompt has 5000 tokens"),
        (BODY | {"max_tokens": 100_000}, 400, "ask for at most 4094"),
        (BODY | {"stop_token_ids": [999]}, 400, "below the vocabulary"),
    ],
    ids=lambda value: repr(value)[:30],
)
async def test_bad_input_is_a_clear_4xx(cluster: Any, body: Any, status: int, what: str) -> None:
    """OpenAI's error body; the node is not called."""
    node = await cluster.add("d1")
    got, answer, headers = await cluster.post(PATH, body)
    assert (got, answer["error"]["type"]) == (status, "not_found_error" if status == 404 else "invalid_request_error")
    assert what in answer["error"]["message"]
    assert headers["x-request-id"]
    assert node.calls == []


@pytest.mark.parametrize(
    ("raw", "status", "what"),
    [
        (b"NONSENSE\r\n\r\n", 400, "malformed HTTP: Invalid method"),
        (b"GET /healthz HTTP/1.1\r\nhost: a\r\nno colon\r\n\r\n", 400, "malformed HTTP: Invalid header token"),
        (b"GET /healthz HTTP/1.1\r\nx: %b\r\n\r\n" % (b"a" * 10_000), 400, "malformed HTTP: Got more than 8190"),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400, "malformed HTTP"),
        (
            b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\nexpect: tea\r\n\r\n",
            417,
            "Expect: tea is not supported",
        ),
        (
            b"GET /no/route HTTP/1.1\r\nhost: a\r\nconnection: close\r\nexpect: \xff\r\n\r\n",
            400,
            "a header is no UTF-8",
        ),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_what_no_handler_sees_has_openais_error_body_too(
    cluster: Any, raw: bytes, status: int, what: str
) -> None:
    """Malformed HTTP and unknown expectations; none of the malformed bytes come back, and the next client is served."""
    url = URL(cluster.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    with contextlib.closing(writer):
        writer.write(raw)
        async with asyncio.timeout(5):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    head, error = head.lower(), msgspec.json.decode(body)["error"]
    assert head.split()[1] == str(status).encode()
    assert (b"content-type: application/json" in head, b"x-request-id: " in head) == (True, True)
    assert (error["type"], set(error)) == ("invalid_request_error", {"message", "type", "param", "code"})
    assert what in error["message"]
    assert "b'" not in error["message"]
    assert (await cluster.get("/healthz"))[0] == 200


async def test_a_chunked_body_over_the_limit_is_refused(cluster: Any) -> None:
    """Without Content-Length the limit is found while reading."""

    async def parts() -> Any:
        for _ in range(30):
            yield b" " * 10_000

    async with cluster.session.post(cluster.url + PATH, data=parts()) as response:
        assert response.status == 413


async def test_a_compressed_body_is_refused(cluster: Any) -> None:
    """Good gzip or not: it is named, and nothing unfolds."""
    for data in (gzip.compress(msgspec.json.encode(BODY)), b"no gzip at all"):
        status, body, _ = await cluster.post(PATH, data, **{"content-encoding": "gzip"})
        assert (status, body["error"]["code"]) == (400, "unsupported_encoding")


async def test_a_body_that_breaks_off_is_refused(cluster: Any) -> None:
    """Malformed chunks are the client's mistake: 400, not 500."""
    host, port = cluster.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n" % PATH.encode())
    await asyncio.sleep(0)
    writer.write(b"not hex\r\n")
    async with asyncio.timeout(5):
        assert b" 400 " in await reader.readline()
    writer.close()


async def test_garbage_on_the_port_is_one_line_in_the_log(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    """400 for what is no HTTP, and no traceback a time."""
    host, port = cluster.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/1.1\r\nx-request-id: \x7f\r\n\r\n")
    async with asyncio.timeout(5):
        assert b" 400 " in await reader.readline()
    writer.close()
    [record] = [r for r in caplog.records if r.name == "prfaas.http"]
    assert "malformed HTTP" in record.getMessage()
    assert record.exc_info is None


async def test_keys_are_asked_for(make_cluster: Any) -> None:
    """Any of several keys opens the API; a missing or a wrong one is 401; probes stay open."""
    cluster = await make_cluster(api_keys=("one", "two"))
    await cluster.add("d1")
    for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "one"}):
        status, body, _ = await cluster.post(PATH, BODY, **headers)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert (await cluster.post(PATH, BODY, authorization="Bearer two"))[0] == 200
    for path in ("/v1/models", "/requests/x/timeline"):
        assert (await cluster.get(path))[0] == 401
    assert (await cluster.get("/healthz"))[0] == 200


def test_keys_come_from_a_file_too(tmp_path: Any) -> None:
    """One a line; an empty file is a mistake, not an open router."""
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n two \n")
    keys = read_api_keys(RouterConfig(api_keys=("zero",), api_keys_file=str(file)))
    assert [(each.key, each.name) for each in keys] == [("zero", "setting-1"), ("one", "key-1"), ("two", "key-2")]
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_api_keys(RouterConfig(api_keys_file=str(file)))


async def test_readiness_needs_a_decode_node(cluster: Any) -> None:
    """/readyz and /health are 503 until one has registered, and again when it has left."""
    assert (await cluster.get("/readyz"))[0] == 503
    node = await cluster.add("d1")
    assert (await cluster.get("/readyz"))[0] == 200
    assert (await cluster.get("/health"))[0] == 200
    await cluster.beat(node, leaving=True)
    assert (await cluster.get("/readyz"))[0] == 503


async def test_a_heartbeat_must_be_signed(cluster: Any) -> None:
    """With another secret it is refused and nothing is registered."""
    node = await cluster.add("d1")
    other = Signer.of(b"other", ClusterConfig())
    status, _ = await cluster.post_heartbeat(node.heartbeat(node="d2"), other)
    assert status == 401
    assert (await cluster.post("/nodes/heartbeat", b"{}"))[0] == 401
    assert cluster.metric("prfaas_router_nodes", role="decode", state="usable") == 1


async def test_a_node_with_another_model_is_refused(cluster: Any) -> None:
    """The answer says what differs from whom."""
    node = await cluster.add("d1")
    status, body = await cluster.post_heartbeat(node.heartbeat(node="d2", model_fingerprint="0" * 32))
    assert status == 400
    assert b"another model than node d1" in body


async def test_heartbeats_name_the_peers_of_the_other_role(cluster: Any) -> None:
    """With their KV addresses, and the router's clock around the answer."""
    await cluster.add("p1", "prefill")
    await cluster.add("p2", "prefill")
    decode = await cluster.add("d1")
    answer = await cluster.beat(decode)
    assert sorted(peer.node for peer in answer.peers) == ["p1", "p2"]
    assert answer.peers[0].kv_addresses[0].port == 9
    assert answer.received_s <= answer.answered_s


async def test_a_timeline_is_kept(cluster: Any) -> None:
    """By request id; its parts sum to the TTFT."""
    await cluster.add("d1")
    await cluster.post(PATH, BODY | {"stream": False}, **{"x-request-id": "r-1"})
    status, timeline = await cluster.get("/requests/r-1/timeline")
    assert status == 200
    assert (timeline["outcome"], timeline["decode_node"], timeline["output_tokens"]) == ("done", "d1", 4)
    assert sum(timeline["ttft_parts"].values()) == pytest.approx(timeline["ttft_s"])
    assert (await cluster.get("/requests/r-2/timeline"))[0] == 404


async def test_the_request_id_is_echoed_if_it_is_sane(cluster: Any) -> None:
    """A strange one is replaced, not reflected."""
    _, _, headers = await cluster.post(PATH, BODY, **{"x-request-id": "abc-1"})
    assert headers["x-request-id"] == "abc-1"
    _, _, headers = await cluster.post(PATH, BODY, **{"x-request-id": "a b"})
    assert headers["x-request-id"] != "a b"


async def test_tokenize_answers_ids(cluster: Any) -> None:
    """As vLLM's does."""
    await cluster.add("d1")
    status, body, _ = await cluster.post("/tokenize", BODY)
    assert (status, body["tokens"], body["count"]) == (200, [72, 105], 2)


async def test_unknown_routes_and_methods_have_openais_error_body(cluster: Any) -> None:
    """404 and 405 in JSON."""
    assert (await cluster.get("/nope"))[1]["error"]["type"] == "not_found_error"
    status, body = await cluster.get(PATH)
    assert (status, body["error"]["type"]) == (405, "invalid_request_error")


async def test_a_bug_is_told_as_a_request_id_only(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback, no message of a foreign exception reaches the client."""

    def broken(*_: Any) -> None:
        raise ValueError("/secret/path")

    monkeypatch.setattr("prfaas.services.router.app._format", broken)
    await cluster.add("d1")
    status, body, headers = await cluster.post(PATH, BODY)
    assert status == 500
    assert headers["x-request-id"] in body["error"]["message"]
    assert "secret" not in body["error"]["message"]


async def test_a_bug_in_a_stream_cuts_it(cluster: Any, scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error body in the middle of a stream would be taken for its text: the connection is cut instead."""

    async def decode(node: Any, call: Any, out: Any) -> None:
        await scripts.ticket(call, out)
        await out.chunk([1], scripts.chunk(call, "Hello"))
        await node.go.wait()
        await out.chunk([2], scripts.chunk(call, "!"))

    node = await cluster.add("d1", decode=decode)
    async with cluster.session.post(cluster.url + PATH, json=BODY | {"stream": True}) as response:
        assert b"Hello" in await response.content.readline()

        def broken(*_: Any) -> None:
            raise ValueError("a bug")

        monkeypatch.setattr("prfaas.services.router.dispatch.Dispatcher._note", broken)
        node.go.set()
        with pytest.raises(aiohttp.ClientError):
            async with asyncio.timeout(5):
                await response.content.read()


async def test_writing_to_a_client_that_left_is_no_error_of_ours() -> None:
    """It is not logged as one, and others are served."""

    async def late(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        response = web.StreamResponse()
        await response.prepare(request)
        return response

    app = services_web.make_app(Metrics(), not_ready=lambda: None)
    app.router.add_get("/late", late)
    with structlog.testing.capture_logs() as logs:
        async with (
            services_web.listening(app, "127.0.0.1:0", secret=b"", shutdown_s=0.05) as (host, port),
            services_web.client_session() as session,
        ):
            with pytest.raises(aiohttp.ClientError):
                await session.get(f"http://{host}:{port}/late")
            assert (await session.get(f"http://{host}:{port}/healthz")).status == 200
    assert logs == []


async def test_a_bind_outside_loopback_needs_a_secret() -> None:
    """ConfigError that names the key and the mend."""
    config = Config(router=RouterConfig(model_path="bytes", bind="0.0.0.0:0", api_keys=("k",)))
    with pytest.raises(ConfigError, match=r"router\.bind.*cluster\.secret_file"):
        await run(config)


async def test_a_port_in_use_is_a_config_error() -> None:
    """One line, not a traceback."""
    config = Config(router=RouterConfig(model_path="bytes"))
    async with services_web.listening(make_app(config), "127.0.0.1:0", secret=b"") as (host, port):
        with pytest.raises(ConfigError, match="can't be bound"):
            async with services_web.listening(make_app(config), f"{host}:{port}", secret=b""):
                pass
