"""One trace over router, prefill node, lanes and decode node, as a collector gets it from real processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.e2e.conftest import free_ports

pytestmark = pytest.mark.deploy

HERE = "127.0.0.1"
ENGINE = ["--engine", "emulated", "--engine-prefill-tokens-per-s", "20000", "--engine-decode-step-s", "0.005"]
ENGINE += ["--engine-arena-bytes", "64M", "--engine-layers", "20"]
TRACE_ID, CLIENT_SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
WAIT_S = 60


@dataclass
class Collected:
    """One span, and the process that it came from."""

    service: str
    node: str
    span: object
    attributes: dict[str, object]

    @property
    def name(self) -> str:
        return self.span.name

    @property
    def id(self) -> str:
        return self.span.span_id.hex()

    @property
    def parent(self) -> str:
        return self.span.parent_span_id.hex()

    @property
    def trace(self) -> str:
        return self.span.trace_id.hex()


@dataclass
class Collector:
    """What OpenTelemetry's own does at its HTTP port: takes protobuf, answers with an empty object."""

    url: str = ""
    spans: list[Collected] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def take(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/x-protobuf"
        body = ExportTraceServiceRequest.FromString(await request.read())
        for resource in body.resource_spans:
            about = values(resource.resource.attributes)
            for scope in resource.scope_spans:
                for span in scope.spans:
                    made = Collected(about["service.name"], about["service.instance.id"], span, values(span.attributes))
                    self.spans.append(made)
        self.news.set()
        return web.Response(content_type="application/x-protobuf")

    async def until(self, holds) -> None:
        async with asyncio.timeout(WAIT_S):
            while not holds():
                await self.news.wait()
                self.news.clear()

    def of(self, trace: str) -> list[Collected]:
        return [span for span in self.spans if span.trace == trace]


def values(attributes) -> dict[str, object]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextlib.asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    (port,) = free_ports(1)
    made = Collector(f"http://{HERE}:{port}/v1/traces")
    app = web.Application()
    app.router.add_post("/v1/traces", made.take)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, HERE, port).start()
        yield made
    finally:
        await runner.cleanup()


def named(spans: list[Collected], name: str) -> list[Collected]:
    return sorted((span for span in spans if span.name == name), key=lambda s: s.span.start_time_unix_nano)


async def test_a_request_is_one_trace_over_all_processes_with_a_span_a_layer_group(cluster, monkeypatch) -> None:
    """In the client's trace, with the right parents: the receiver's spans hang on the prefill node's, by what OPEN
    carried. A trace that the client doesn't sample is not sampled here either, and a refused call is an error."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    async with collector() as found:
        telemetry = ["--telemetry-otlp-endpoint", found.url]
        await cluster.start([*ENGINE, *telemetry], ["--model", "bytes", *telemetry])
        unsampled = {"traceparent": f"00-{'a' * 32}-{CLIENT_SPAN_ID}-00"}
        await ask(cluster, unsampled)
        await ask(cluster, {"traceparent": f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-01"})
        await found.until(lambda: {"prfaas.request", "prfaas.prefill", "prfaas.decode"} <= names(found, TRACE_ID))
        assert found.of("a" * 32) == []
        spans = found.of(TRACE_ID)
        check_tree(spans)
        check_times(spans)
        await ask(cluster, {"traceparent": "00-nonsense"})
        await found.until(lambda: len(named(found.spans, "prfaas.request")) == 2)
        (own,) = (span for span in named(found.spans, "prfaas.request") if span.trace != TRACE_ID)
        assert own.parent == ""


async def ask(cluster, headers: dict[str, str]) -> None:
    body = {"model": "emulated", "prompt": [65] * 4000, "max_tokens": 6, "cache_salt": str(headers)}
    async with cluster.session.post(cluster.router_url + "/v1/completions", json=body, headers=headers) as response:
        assert response.status == 200, await response.text()


def names(found: Collector, trace: str) -> set[str]:
    return {span.name for span in found.of(trace)}


def check_tree(spans: list[Collected]) -> None:
    (request,), (prefill,), (decode,) = (named(spans, f"prfaas.{what}") for what in ("request", "prefill", "decode"))
    assert (request.parent, request.service, request.node) == (CLIENT_SPAN_ID, "prfaas-router", "router")
    assert request.attributes["gen_ai.usage.input_tokens"] == 4000
    assert request.attributes["prfaas.reason"] == "offloaded"
    assert (prefill.parent, prefill.node) == (request.id, "prefill-1")
    assert (decode.parent, decode.node) == (request.id, "decode-1")
    assert decode.attributes["gen_ai.usage.output_tokens"] == 6
    (send,), (receive,) = named(spans, "prfaas.kv.send"), named(spans, "prfaas.kv.receive")
    assert (send.parent, send.node) == (prefill.id, "prefill-1")
    assert (receive.parent, receive.node) == (prefill.id, "decode-1")
    assert send.attributes["prfaas.kv.raw_bytes"] == receive.attributes["prfaas.kv.raw_bytes"] > 0
    for transfer in (send, receive):
        groups = named(spans, f"{transfer.name}.layers")
        covered = [
            layer
            for group in groups
            for layer in range(group.attributes["prfaas.layer.first"], group.attributes["prfaas.layer.last"] + 1)
        ]
        assert (len(groups), sorted(covered)) == (8, list(range(20)))
        assert {group.parent for group in groups} == {transfer.id}
    parents = {"prfaas.decide": request, "prfaas.ticket": request, "prfaas.prefill.queue": prefill}
    parents |= {"prfaas.prefill.compute": prefill, "prfaas.first_step": decode, "prfaas.output": decode}
    for name, parent in parents.items():
        (span,) = named(spans, name)
        assert span.parent == parent.id, name


def check_times(spans: list[Collected]) -> None:
    """All processes are on one machine here: what lies in another span lies within its time."""
    by_id = {span.id: span for span in spans}
    slack_ns = 20e6  # clocks of processes are read one after the other; the receiver's are mapped by PINGs
    for span in spans:
        assert span.span.start_time_unix_nano <= span.span.end_time_unix_nano
        if span.parent in by_id:
            parent = by_id[span.parent].span
            assert span.span.start_time_unix_nano >= parent.start_time_unix_nano - slack_ns, span.name
    (compute,), (receive,) = named(spans, "prfaas.prefill.compute"), named(spans, "prfaas.kv.receive")
    assert receive.span.start_time_unix_nano < compute.span.end_time_unix_nano, "layers travel during prefill"


async def test_services_that_can_not_reach_the_collector_serve_all_the_same(cluster) -> None:
    """And end in time, though spans are left that nobody takes."""
    telemetry = ["--telemetry-otlp-endpoint", f"http://{HERE}:{free_ports(1)[0]}/v1/traces"]
    await cluster.start([*ENGINE, *telemetry], ["--model", "bytes", *telemetry])
    await ask(cluster, {})
    for name in ("router", "prefill", "decode"):
        assert cluster.processes[name].stop() == 0
