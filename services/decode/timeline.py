"""What happened when, of one decode, in this node's clock. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from prfaas.services.engine.api import DecodeTimeline
from prfaas.services.messages import DecodeNodeTimeline
from prfaas.transport.api import LinkClock, TransferReport


class TokenTimes:
    """The instants of output tokens that matter."""

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.second_s: float | None = None
        self.last_s: float | None = None
        self.count = 0

    def add(self, at_s: float) -> float | None:
        """One token; the gap to the one before."""
        self.count += 1
        gap_s = None if self.last_s is None else at_s - self.last_s
        if self.first_s is None:
            self.first_s = at_s
        elif self.second_s is None:
            self.second_s = at_s
        self.last_s = at_s
        return gap_s


def node_timeline(
    received_s: float,
    tokens: TokenTimes,
    engine: DecodeTimeline | None,
    report: TransferReport | None,
    router_clock: LinkClock | None,
    held_tokens: int = 0,
    local_prefill: bool = False,
) -> DecodeNodeTimeline:
    """`report`: the receiver's; None = nothing was sent. `router_clock`: router_monotonic − ours, if it is known.
    `held_tokens`: of the own pool. `local_prefill`: this node has computed the rest.

    Prefill's instants are mapped with the lanes' clock; without one (no PONG yet) they are left out.
    """
    layers = engine or DecodeTimeline([], [])
    prefill: dict[str, float | None] = {
        "queued_s": layers.queued_s,
        "started_s": layers.started_s,
        "ended_s": layers.ended_s,
    }
    computed_s: list[float | None] = []
    sent_s: list[float | None] = []
    if report is not None and report.clock is not None:
        offset_s = report.clock.offset_s
        prefill = {name: _instant(report.peer_timings.get(name), offset_s) for name in prefill}
        computed_s = _instants(report.peer_timings.get("computed_s"), offset_s)
        sent_s = _instants(report.peer_timings.get("sent_s"), offset_s)
    return DecodeNodeTimeline(
        received_s=received_s,
        first_token_s=received_s if tokens.first_s is None else tokens.first_s,
        second_token_s=tokens.second_s,
        last_token_s=tokens.last_s,
        queued_s=prefill["queued_s"],
        started_s=prefill["started_s"],
        ended_s=prefill["ended_s"],
        computed_s=computed_s,
        sent_s=sent_s,
        arrived_s=list(layers.arrived_s),
        used_s=list(layers.used_s),
        clock_error_s=report.clock.error_s if report is not None and report.clock is not None else 0.0,
        kv_raw_bytes=report.raw_bytes if report is not None else 0,
        kv_wire_bytes=report.wire_bytes if report is not None else 0,
        local_prefill=local_prefill,
        held_tokens=held_tokens,
        clock_offset_s=router_clock.offset_s if router_clock is not None else 0.0,
        router_clock_error_s=router_clock.error_s if router_clock is not None else 0.0,
    )


def _instant(value: float | list[float] | None, offset_s: float) -> float | None:
    return value - offset_s if isinstance(value, int | float) else None


def _instants(values: float | Sequence[float] | None, offset_s: float) -> list[float | None]:
    return [v - offset_s for v in values] if isinstance(values, list | tuple) else []
