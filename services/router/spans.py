"""A request's span in the router (services/telemetry/spans.py has the whole trace). Pure."""

from __future__ import annotations

from prfaas.services.router.timeline import RequestFacts, RouterInstants
from prfaas.services.telemetry.spans import Span, Value, between

NAME = "prfaas.request"


def request_span(facts: RequestFacts, instants: RouterInstants, *, model: str) -> Span:
    assert instants.ended_s is not None
    attributes: dict[str, Value] = {
        "gen_ai.request.model": model,
        "gen_ai.usage.input_tokens": facts.prompt_tokens,
        "gen_ai.usage.output_tokens": facts.output_tokens,
        "prfaas.request_id": facts.request_id,
        "prfaas.outcome": facts.outcome,
        "prfaas.reason": facts.decision,
        "prfaas.decision": facts.words,
        "prfaas.offloaded": facts.offloaded,
        "prfaas.decode_node": facts.decode_node,
        "prfaas.prefill_node": facts.prefill_node or "",
        "prfaas.fallbacks": ",".join(facts.fallbacks),
    }
    if instants.first_token_s is not None:
        attributes["prfaas.ttft_s"] = instants.first_token_s - instants.arrived_s
    return Span(
        NAME,
        instants.arrived_s,
        instants.ended_s,
        {key: value for key, value in attributes.items() if value != ""},
        between(
            ("prfaas.decide", instants.arrived_s, instants.decided_s),
            ("prfaas.ticket", instants.decided_s, instants.ticket_s),
        ),
        "failed" if facts.outcome == "failed" else "",
    )
