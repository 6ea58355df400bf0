"""Spans to an OpenTelemetry collector, over OTLP/HTTP. The only module that knows OpenTelemetry; it is imported where
`telemetry.otlp_endpoint` is set, and nowhere else is anything paid for it.

A process has one span a request, begun when it comes, so that its context can travel on; what lies in it is made at its
end. Exporting is a thread's work, and what can't be delivered is dropped: no request waits for a collector.
"""

from __future__ import annotations

import asyncio
import re
import time
from importlib.metadata import version
from typing import TYPE_CHECKING

from prfaas.common.config import TelemetryConfig
from prfaas.common.errors import ConfigError
from prfaas.services.telemetry.spans import Span

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan

CLOSE_S = 5.0
"""At the end of a process, for the collector to take what is left."""
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def open_tracing(config: TelemetryConfig, role: str, node: str, region: str = "") -> Tracing | None:
    """None: traces are off. Raises ConfigError: OpenTelemetry is not installed."""
    if not config.otlp_endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError:
        raise ConfigError(
            ["telemetry.otlp_endpoint is set, and OpenTelemetry is not installed; the mend: pip install 'prfaas[otel]'"]
        ) from None
    resource = {
        "service.name": f"prfaas-{role}",
        "service.instance.id": node,
        "service.version": version("prfaas"),
        "prfaas.region": region,
    }
    provider = TracerProvider(
        resource=Resource.create({key: value for key, value in resource.items() if value}),
        sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=config.otlp_endpoint)))
    return Tracing(provider)


class Tracing:
    """Of one process."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("prfaas", version("prfaas"))

    def begin(self, name: str, traceparent: str, start_s: float) -> Trace:
        """The process's span of a request that came at `start_s` (monotonic), in the trace that `traceparent` names; of
        a new one when it names none."""
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(name, _context(traceparent), kind=SpanKind.SERVER, start_time=_unix_ns(start_s))
        return Trace(self, span)

    def add(self, span: Span, context: Context) -> None:
        """A finished span and all in it."""
        from opentelemetry.trace import set_span_in_context

        made = self._tracer.start_span(span.name, context, start_time=_unix_ns(span.start_s))
        self.end(made, span, set_span_in_context(made, context))

    def end(self, made: OtelSpan, span: Span, context: Context) -> None:
        from opentelemetry.trace import Status, StatusCode

        made.set_attributes(dict(span.attributes))
        if span.error:
            made.set_status(Status(StatusCode.ERROR, span.error))
        for child in span.children:
            self.add(child, context)
        made.end(_unix_ns(span.end_s))

    async def close(self) -> None:
        """What is left goes to the collector, if it takes it within CLOSE_S."""
        await asyncio.to_thread(self._provider.force_flush, int(CLOSE_S * 1e3))
        await asyncio.to_thread(self._provider.shutdown)


class Trace:
    """One request's span in this process. It must be ended."""

    def __init__(self, tracing: Tracing, span: OtelSpan) -> None:
        from opentelemetry.trace import set_span_in_context

        self._tracing = tracing
        self._span = span
        self._context = set_span_in_context(span)

    @property
    def recorded(self) -> bool:
        """False: it is not sampled, and nobody looks at what it ends with."""
        return self._span.is_recording()

    @property
    def traceparent(self) -> str:
        """W3C Trace Context, for the next process."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def end(self, span: Span) -> None:
        """`span` tells what it was; its start has been given."""
        self._tracing.end(self._span, span, self._context)

    def add_under(self, traceparent: str, span: Span) -> None:
        """A finished span whose parent is another process's; this one's when `traceparent` names none."""
        parent = _context(traceparent)
        self._tracing.add(span, self._context if parent is None else parent)


def _context(traceparent: str) -> Context | None:
    """None for what is no traceparent of version 00: it may come from anybody."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if not _TRACEPARENT.fullmatch(traceparent):
        return None
    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


def _unix_ns(instant_s: float) -> int:
    return time.time_ns() - round((time.monotonic() - instant_s) * 1e9)
