"""The demo on a terminal: the answer as it streams, then the drawing of the run."""

from __future__ import annotations

from collections.abc import Mapping

from prfaas.services.commands.demo.report import (
    MARKS,
    Run,
    axis,
    draw_layers,
    megabytes,
    milliseconds,
    overlap_ratio,
    transfer_alone_s,
)
from rich.console import Console
from rich.table import Table
from rich.text import Text

STYLES = {MARKS["computed"]: "cyan", MARKS["sent"]: "yellow", MARKS["arrived"]: "green", MARKS["used"]: "bold magenta"}
PART_TEXTS = {
    "router_s": "router, decode node, and the way to the prefill node",
    "queue_s": "waiting in the prefill queue",
    "prefill_s": "prefill",
    "exposed_s": "the rest of the transfer, after prefill",
    "first_step_s": "decode's first step, and the way to the client",
}
BASELINE_TEXTS = {
    "send_after_prefill": "KV sent only after prefill",
    "join_when_complete": "decode joins only when all has arrived",
}


def show_layers(console: Console, run: Run) -> None:
    width = max(20, min(console.width - 12, 100))
    legend = Text("when each layer was ")
    for word, mark in MARKS.items():
        legend.append(mark, STYLES[mark]).append(f" {word}  ")
    console.print()
    console.print(legend)
    for bar in draw_layers(run, width):
        line = Text(f"layer {bar.layer:3} ", "dim")
        for character in bar.cells:
            line.append(character, STYLES.get(character, "dim"))
        console.print(line, no_wrap=True, overflow="crop")
    start_s, end_s = axis(run)
    left, right = f"{milliseconds(start_s)} (first layer computed)", f"{milliseconds(end_s)} (first token)"
    console.print(f"          {left}{right:>{max(1, width - len(left))}}")
    console.print(f"          clocks of the nodes aligned within ±{run.clock_error_s * 1e3:.1f} ms", style="dim")


def show_figures(console: Console, run: Run, rate_mbit: float, delay_ms: float) -> None:
    alone_s = transfer_alone_s(run.kv_wire_bytes, rate_mbit, delay_ms)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    table.add_row(milliseconds(run.ttft_s), Text("time to first token", "bold"))
    for name, value_s in run.ttft_parts().items():
        table.add_row(milliseconds(value_s), f"  {PART_TEXTS[name]}")
    table.add_row(milliseconds(run.time_to_second_token_s), Text("time to second token", "bold"))
    table.add_row(megabytes(run.kv_raw_bytes), f"KVCache of {run.prompt_tokens} prompt tokens")
    table.add_row(
        megabytes(run.kv_wire_bytes), f"on the wire, {milliseconds(alone_s)} at {rate_mbit:g} Mbit/s by itself"
    )
    table.add_row(f"{overlap_ratio(run.exposed_s, alone_s):.0%}", "of that was hidden behind prefill")
    used = f"{run.layers_used_before_last_arrival} of {len(run.used_s)}"
    table.add_row(used, "layers were used before the last one had arrived")
    console.print()
    console.print(table)


def show_baselines(console: Console, run: Run, baselines: Mapping[str, Run]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("first token", "second token"):
        table.add_column(heading, justify="right")
    table.add_column("the same prompt")
    table.add_row(
        milliseconds(run.ttft_s), milliseconds(run.time_to_second_token_s), Text("layer by layer (above)", "bold")
    )
    for name, other in baselines.items():
        table.add_row(
            milliseconds(other.ttft_s), milliseconds(other.time_to_second_token_s), f"{BASELINE_TEXTS[name]} (baseline)"
        )
    console.print()
    console.print(table)
