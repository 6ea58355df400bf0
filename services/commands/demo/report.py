"""What the demo says about a run: figures and drawings from a request's timeline. Pure.

All instants are seconds from the client's send. The prefill node's are mapped through the lanes' clock and true within
`clock_error_s`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Instants = Sequence[float | None]

BASELINES = ("send_after_prefill", "join_when_complete")


@dataclass(frozen=True, slots=True)
class Run:
    """One answered request: what its client measured and what the services noted."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    ttft_s: float
    time_to_second_token_s: float | None
    queued_s: float
    """Prefill entered its queue, started, ended."""
    started_s: float
    ended_s: float
    computed_s: Instants
    sent_s: Instants
    arrived_s: Instants
    used_s: Instants
    clock_error_s: float
    kv_raw_bytes: int
    kv_wire_bytes: int

    @property
    def prefill_s(self) -> float:
        return self.ended_s - self.started_s

    @property
    def last_arrival_s(self) -> float:
        """Of all layers; the end of prefill if nothing was sent."""
        return max((s for s in self.arrived_s if s is not None), default=self.ended_s)

    @property
    def exposed_s(self) -> float:
        """How much of the transfer prefill did not hide."""
        return self.last_arrival_s - self.ended_s

    @property
    def layers_used_before_last_arrival(self) -> int:
        return sum(s is not None and s < self.last_arrival_s for s in self.used_s)

    def ttft_parts(self) -> dict[str, float]:
        """They sum to ttft_s: router and decode node, prefill's queue, prefill, what of the transfer was left, and
        the way from the last layer to the first token at the client."""
        return {
            "router_s": self.queued_s,
            "queue_s": self.started_s - self.queued_s,
            "prefill_s": self.prefill_s,
            "exposed_s": self.exposed_s,
            "first_step_s": self.ttft_s - self.last_arrival_s,
        }


def transfer_alone_s(wire_bytes: int, rate_mbit: float, delay_ms: float) -> float:
    """How long the transfer takes on an idle link by itself."""
    return wire_bytes * 8 / (rate_mbit * 1e6) + delay_ms / 1e3


def overlap_ratio(exposed_s: float, alone_s: float) -> float:
    """1: prefill hid all of the transfer; 0: none of it."""
    return 1.0 - exposed_s / alone_s


def as_json(run: Run, baselines: Mapping[str, Run], rate_mbit: float, delay_ms: float) -> dict[str, Any]:
    """The object that `prfaas demo --json` prints."""
    alone_s = transfer_alone_s(run.kv_wire_bytes, rate_mbit, delay_ms)
    columns = (run.computed_s, run.sent_s, run.arrived_s, run.used_s)
    return {
        "text": run.text,
        "token_ids": run.token_ids,
        "ttft_s": run.ttft_s,
        "time_to_second_token_s": run.time_to_second_token_s,
        "ttft_parts": run.ttft_parts(),
        "baselines": {
            name: {"ttft_s": other.ttft_s, "time_to_second_token_s": other.time_to_second_token_s}
            for name, other in baselines.items()
        },
        "layers": [
            {"layer": layer, "computed_s": computed, "sent_s": sent, "arrived_s": arrived, "used_s": used}
            for layer, (computed, sent, arrived, used) in enumerate(zip(*columns, strict=True))
        ],
        "kv_raw_bytes": run.kv_raw_bytes,
        "kv_wire_bytes": run.kv_wire_bytes,
        "exposed_s": run.exposed_s,
        "transfer_alone_s": alone_s,
        "prefill_s": run.prefill_s,
        "overlap_ratio": overlap_ratio(run.exposed_s, alone_s),
        "layers_used_before_last_arrival": run.layers_used_before_last_arrival,
    }


@dataclass(frozen=True, slots=True)
class Bar:
    """One layer on the time axis, as one character a cell, and the style of each run of cells."""

    layer: int
    cells: str


MARKS = {"computed": "c", "sent": "s", "arrived": "a", "used": "U"}
ON_THE_WAY = "─"
EMPTY = "·"


def axis(run: Run) -> tuple[float, float]:
    """From when the first layer was complete to the first token: what is before is prefill without an event."""
    return min((s for s in run.computed_s if s is not None), default=run.started_s), run.ttft_s


def draw_layers(run: Run, width: int) -> list[Bar]:
    """A line a layer: a dot is waiting, a rule is from computed to arrived, a letter is an event (the later one where
    two fall into one cell). The axis is `axis(run)`."""
    start_s, end_s = axis(run)
    span_s = max(end_s - start_s, 1e-9)

    def cell(at_s: float) -> int:
        return min(width - 1, max(0, int((at_s - start_s) / span_s * width)))

    bars = []
    for layer, instants in enumerate(zip(run.computed_s, run.sent_s, run.arrived_s, run.used_s, strict=True)):
        cells = [EMPTY] * width
        computed, _, arrived, _ = instants
        if computed is not None and arrived is not None:
            for i in range(cell(computed), cell(arrived) + 1):
                cells[i] = ON_THE_WAY
        for mark, at_s in zip(MARKS.values(), instants, strict=True):
            if at_s is not None:
                cells[cell(at_s)] = mark
        bars.append(Bar(layer, "".join(cells)))
    return bars


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def milliseconds(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:.0f} ms"
