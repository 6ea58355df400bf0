"""A call's span in the prefill node (services/telemetry/spans.py has the whole trace). Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prfaas.services.telemetry.spans import Span, Value, around, between, error_of, kv_sizes, layer_groups

NAME = "prfaas.prefill"


@dataclass(frozen=True, slots=True)
class PrefillInstants:
    """What a prefill node knows at a call's end; None: it didn't come to that. computed_s, sent_s: by layer."""

    received_s: float
    ended_s: float
    queued_s: float | None = None
    started_s: float | None = None
    computed_until_s: float | None = None
    computed_s: Sequence[float] = ()
    sent_s: Mapping[int, float] = field(default_factory=dict)
    raw_bytes: int = 0
    wire_bytes: int = 0


def prefill_span(
    request_id: str, instants: PrefillInstants, outcome: str, prompt_tokens: int, held_tokens: int
) -> Span:
    children = between(
        ("prfaas.prefill.queue", instants.queued_s, instants.started_s),
        ("prfaas.prefill.compute", instants.started_s, instants.computed_until_s),
    )
    if instants.computed_s and instants.sent_s:
        groups = tuple(_sent(group, instants) for group in layer_groups(len(instants.computed_s)))
        children += (around("prfaas.kv.send", groups, kv_sizes(instants.raw_bytes, instants.wire_bytes)),)
    attributes: dict[str, Value] = {
        "prfaas.request_id": request_id,
        "prfaas.outcome": outcome,
        "gen_ai.usage.input_tokens": prompt_tokens,
        "prfaas.held_tokens": held_tokens,
    }
    return Span(NAME, instants.received_s, instants.ended_s, attributes, children, error_of(outcome))


def _sent(group: range, instants: PrefillInstants) -> Span:
    start_s = min(instants.computed_s[layer] for layer in group)
    end_s = max((instants.sent_s[layer] for layer in group if layer in instants.sent_s), default=start_s)
    return Span(
        "prfaas.kv.send.layers",
        start_s,
        max(start_s, end_s),
        {"prfaas.layer.first": group[0], "prfaas.layer.last": group[-1]},
    )
