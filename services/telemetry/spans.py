"""The spans of one request in each process that it passes, made at its end from what happened when. Pure.

Those of the router are in services/router/spans.py, the others beside their handlers.

    prfaas.request                       router: arrival to last byte
      prfaas.decide                      tokenized and routed
      prfaas.ticket                      the decode node's answer
      prfaas.prefill                     prefill node: the call
        prfaas.prefill.queue
        prfaas.prefill.compute
        prfaas.kv.send                   first layer computed to last layer handed to the sockets
          prfaas.kv.send.layers          a group of layers
        prfaas.kv.receive                decode node, by the context that OPEN brought: first to last arrival
          prfaas.kv.receive.layers       a group of layers
      prfaas.decode                      decode node: the call
        prfaas.first_step                last layer here to the first token
        prfaas.output                    first to last token

All instants are seconds of the monotonic clock of the process whose span it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Value = str | int | float | bool
MAX_GROUPS = 8
"""Of layers, in a trace: it shows the overlap, and stays readable at 100 layers."""


@dataclass(frozen=True, slots=True)
class Span:
    """error: why it failed, in a word; "": it didn't."""

    name: str
    start_s: float
    end_s: float
    attributes: Mapping[str, Value] = field(default_factory=dict)
    children: tuple[Span, ...] = ()
    error: str = ""


def layer_groups(layers: int) -> list[range]:
    """At most MAX_GROUPS runs of layers, of sizes that differ by one at most."""
    groups = min(MAX_GROUPS, layers)
    bounds = [layers * i // groups for i in range(groups + 1)] if groups else [0]
    return [range(first, end) for first, end in itertools.pairwise(bounds)]


def around(name: str, spans: Sequence[Span], attributes: Mapping[str, Value]) -> Span:
    start_s, end_s = min(span.start_s for span in spans), max(span.end_s for span in spans)
    return Span(name, start_s, end_s, attributes, tuple(spans))


def kv_sizes(raw_bytes: int, wire_bytes: int) -> dict[str, Value]:
    """A transfer's attributes."""
    return {"prfaas.kv.raw_bytes": raw_bytes, "prfaas.kv.wire_bytes": wire_bytes}


def between(*spans: tuple[str, float | None, float | None]) -> tuple[Span, ...]:
    """Those whose both ends are there; a start that the clocks' error puts behind the end is the end."""
    return tuple(
        Span(name, min(start_s, end_s), end_s)
        for name, start_s, end_s in spans
        if start_s is not None and end_s is not None
    )


def error_of(outcome: str) -> str:
    return "" if outcome in ("done", "cancelled") else outcome
