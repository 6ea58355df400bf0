"""The plan as one standalone HTML page with SVG plots: nothing is loaded from anywhere."""

from __future__ import annotations

import math
from html import escape

import numpy as np
from prfaas.common.scheduling.planner import Plan, legs
from prfaas.loadgen.plan import sensitivity
from prfaas.loadgen.plan.inputs import Inputs
from prfaas.loadgen.report.svg import Plot, Series

_POINTS = 200
_SPLITS = 100

STYLE = """\
:root { color-scheme: light dark; }
body { font: 15px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; font-size: 13px; line-height: 1.35; }
svg { width: 100%; height: auto; margin: 1rem 0; }
"""


def page(title: str, text: str, plots: list[Plot]) -> str:
    """`text` as it is in the terminal, then the plots."""
    drawn = "\n".join(plot.svg() for plot in plots)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{STYLE}</style></head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n<pre>{escape(text)}</pre>\n{drawn}\n</body>\n</html>\n"
    )


def plots(inputs: Inputs, base: Plan) -> list[Plot]:
    """Λ over the threshold with the three stages, over the link, and over the split."""
    made = []
    if inputs.offload:
        made += [_by_threshold(inputs, base), _by_link(inputs)]
    numbers = sorted({int(n) for n in np.linspace(0, inputs.home.nodes - 1, min(inputs.home.nodes, _SPLITS))})
    if len(numbers) > 1:
        made.append(
            Plot(
                "Throughput over the split of the home region",
                f"home nodes that prefill, of {inputs.home.nodes} (each with its best threshold)",
                "Λ_max, requests/s",
                [Series("Λ_max", numbers, sensitivity.over_split(inputs, numbers))],
                mark=(base.n_prefill, f"{base.n_prefill} : {base.n_decode}"),
            )
        )
    return made


def _by_threshold(inputs: Inputs, base: Plan) -> Plot:
    lengths = inputs.demand.uncached
    low, high = max(lengths.low, 1.0), max(lengths.high, lengths.low + 1, 2.0)
    grid = np.geomspace(low, high, _POINTS)
    found = legs(inputs.demand, inputs.home, inputs.offload, inputs.settings, base.n_prefill, grid)
    decode = np.full(grid.size, found.pd_decode)
    x = grid.tolist()
    mark = (base.threshold_tokens, f"{base.threshold_tokens:,.0f} tokens") if base.threshold_tokens > 0 else None
    return Plot(
        f"What limits the rate at each threshold ({base.n_prefill} prefill and {base.n_decode} decode nodes at home)",
        "threshold, tokens of uncached length",
        "requests/s of the whole system; the lowest line counts",
        [
            Series("prefill region, with its link", x, found.prfaas.tolist()),
            Series("prefill at home", x, found.pd_prefill.tolist()),
            Series("decode at home", x, decode.tolist()),
        ],
        log_x=True,
        y_top=2.2 * base.lambda_max,
        mark=mark if mark and math.isfinite(mark[0]) else None,
    )


def _by_link(inputs: Inputs) -> Plot:
    now = inputs.far.link.gbps or 100.0
    gbps = np.geomspace(now / 100, now * 4, 60).tolist()
    return Plot(
        "Throughput over the link",
        "Gbit/s between the regions (each with its best threshold and split)",
        "Λ_max, requests/s",
        [Series("Λ_max", gbps, sensitivity.over_link(inputs, gbps))],
        log_x=True,
        mark=(now, f"{now:g} Gbps"),
    )
