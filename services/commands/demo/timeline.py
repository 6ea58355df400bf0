"""From the router's timeline of a request (`GET /requests/{id}/timeline`) and its client's clock to a `Run`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prfaas.common.errors import SetupError
from prfaas.services.commands.demo.client import Answer
from prfaas.services.commands.demo.report import Run


def read_run(answer: Answer, timeline: Mapping[str, Any]) -> Run | None:
    """None: the decode node prefilled by itself. Raises SetupError when instants are missing.

    The router counts from the request's arrival, the client from its sending. The way there takes half of what the
    client's TTFT is longer, and that half is added to the error bound.
    """
    if timeline["local_prefill"] or timeline["prefill_node"] is None:
        return None
    missing = [
        key
        for key in ("ttft_s", "queued_s", "prefill_started_s", "prefill_ended_s", "clock_error_s")
        if timeline[key] is None
    ]
    if missing:
        raise SetupError(f"the router's timeline of request {answer.request_id} lacks {', '.join(missing)}")
    way_s = max(0.0, (answer.ttft_s - timeline["ttft_s"]) / 2)

    def column(name: str) -> list[float | None]:
        return [None if layer[name] is None else layer[name] + way_s for layer in timeline["layers"]]

    return Run(
        text=answer.text,
        token_ids=list(timeline.get("output_token_ids", ())),
        prompt_tokens=timeline["prompt_tokens"],
        ttft_s=answer.ttft_s,
        time_to_second_token_s=answer.time_to_second_token_s,
        queued_s=timeline["queued_s"] + way_s,
        started_s=timeline["prefill_started_s"] + way_s,
        ended_s=timeline["prefill_ended_s"] + way_s,
        computed_s=column("computed_s"),
        sent_s=column("sent_s"),
        arrived_s=column("arrived_s"),
        used_s=column("used_s"),
        clock_error_s=timeline["clock_error_s"] + way_s,
        kv_raw_bytes=timeline["kv_raw_bytes"],
        kv_wire_bytes=timeline["kv_wire_bytes"],
    )
