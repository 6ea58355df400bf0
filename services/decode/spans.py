"""A call's spans in the decode node (services/telemetry/spans.py has the whole trace). Pure."""

from __future__ import annotations

from collections.abc import Sequence

from prfaas.services.messages import DecodeNodeTimeline
from prfaas.services.telemetry.spans import Span, Value, around, between, error_of, kv_sizes, layer_groups

NAME = "prfaas.decode"


def decode_span(
    request_id: str, timeline: DecodeNodeTimeline, ended_s: float, outcome: str, output_tokens: int
) -> Span:
    """Of the decode node; what prefill sent is `receive_span`'s."""
    arrived = [s for s in timeline.arrived_s if s is not None]
    first_s = timeline.first_token_s if output_tokens else None
    attributes: dict[str, Value] = {
        "prfaas.request_id": request_id,
        "prfaas.outcome": outcome,
        "gen_ai.usage.output_tokens": output_tokens,
        "prfaas.held_tokens": timeline.held_tokens,
        "prfaas.local_prefill": timeline.local_prefill,
    }
    children = between(
        ("prfaas.first_step", max(arrived, default=None), first_s), ("prfaas.output", first_s, timeline.last_token_s)
    )
    return Span(NAME, timeline.received_s, ended_s, attributes, children, error_of(outcome))


def receive_span(timeline: DecodeNodeTimeline) -> Span | None:
    """The transfer as it came to the decode node; None: nothing came."""
    layers = {layer: at_s for layer, at_s in enumerate(timeline.arrived_s) if at_s is not None}
    if not layers:
        return None
    groups = []
    for group in layer_groups(len(timeline.arrived_s)):
        arrived = [layers[layer] for layer in group if layer in layers]
        if not arrived:
            continue
        # From when the first of them was on its way, where the clocks of both nodes have been compared.
        sent = [s for layer in group if (s := _at(timeline.sent_s, layer)) is not None]
        used = [s for layer in group if (s := _at(timeline.used_s, layer)) is not None]
        attributes: dict[str, Value] = {"prfaas.layer.first": group[0], "prfaas.layer.last": group[-1]}
        if used:
            attributes["prfaas.used_after_s"] = min(used) - min(arrived)
        start_s = min([*sent, *arrived])
        groups.append(Span("prfaas.kv.receive.layers", start_s, max(arrived), attributes))
    return around("prfaas.kv.receive", groups, kv_sizes(timeline.kv_raw_bytes, timeline.kv_wire_bytes))


def _at(column: Sequence[float | None], layer: int) -> float | None:
    return column[layer] if layer < len(column) else None
