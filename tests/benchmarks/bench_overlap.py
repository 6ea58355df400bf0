"""How much of the transfer prefill hides, with the real model over the emulated WAN, at several link rates.

    python -m tests.benchmarks.bench_overlap --rates 100,200,500,2000 --runs 5

For each rate, on one cluster: an answer with KV sent layer by layer and one with KV sent after prefill, in turn, since
the machine's speed drifts by more than a short transfer takes; `--runs` such pairs. Prints one JSON object a rate;
exposed_s must not exceed bound_s = max(0, transfer_alone_s - prefill_s) + 0.15.
"""

from __future__ import annotations

import argparse
import json
import secrets
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from prfaas.services.commands.demo import Demo, parser, report
from prfaas.services.commands.demo.cluster import Cluster, Plan, running
from prfaas.services.commands.demo.report import Run
from prfaas.services.model_store import ensure_model
from rich.console import Console

ALLOWED_S = 0.15
TOKENS = 4


def measure(rate_mbit: float, delay_ms: float, runs: int, prompt_tokens: int, model: str, dtype: str) -> dict[str, Any]:
    given = parser().parse_args(["--prompt-tokens", str(prompt_tokens), "--json"])
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan("transformers", model, dtype, rate_mbit, delay_ms, secrets.token_hex(16), Path(folder))
        with running(plan) as cluster:
            demo = Demo(given, Console(quiet=True), cluster)
            demo.settle()
            layerwise, after = [], []
            for _ in range(runs):
                layerwise.append(demo.answer(TOKENS, stream=False))
                switch(cluster, demo, send="after_prefill")
                after.append(demo.answer(TOKENS, stream=False))
                switch(cluster, demo, send="layerwise")
    return verdict(layerwise, after, rate_mbit, delay_ms)


def switch(cluster: Cluster, demo: Demo, send: str) -> None:
    cluster.stop("prefill")
    cluster.start_prefill(send=send)
    demo.settle()


def verdict(layerwise: list[Run], after: list[Run], rate_mbit: float, delay_ms: float) -> dict[str, Any]:
    alone_s = report.transfer_alone_s(layerwise[0].kv_wire_bytes, rate_mbit, delay_ms)
    prefill_s = median(run.prefill_s for run in layerwise)
    exposed_s = median(run.exposed_s for run in layerwise)
    bound_s = max(0.0, alone_s - prefill_s) + ALLOWED_S
    ttft_s, after_ttft_s = (median(run.ttft_s for run in group) for group in (layerwise, after))
    saved_s = median(late.ttft_s - early.ttft_s for early, late in zip(layerwise, after, strict=True))
    return {
        "rate_mbit": rate_mbit,
        "prompt_tokens": layerwise[0].prompt_tokens,
        "kv_wire_bytes": layerwise[0].kv_wire_bytes,
        "transfer_alone_s": round(alone_s, 3),
        "prefill_s": round(prefill_s, 3),
        "exposed_s": round(exposed_s, 3),
        "bound_s": round(bound_s, 3),
        "exposed_holds": exposed_s <= bound_s,
        "overlap_ratio": round(report.overlap_ratio(exposed_s, alone_s), 3),
        "ttft_s": round(ttft_s, 3),
        "send_after_prefill_ttft_s": round(after_ttft_s, 3),
        # Prefill's own time drifts with the machine by more than a short transfer takes: compare what is behind it.
        "after_prefill_s": round(median(run.ttft_s - run.prefill_s for run in layerwise), 3),
        "send_after_prefill_after_prefill_s": round(median(run.ttft_s - run.prefill_s for run in after), 3),
        "ttft_saved_s": round(saved_s, 3),
        "faster_than_after_prefill": saved_s > 0,
        "layers_used_before_last_arrival": [run.layers_used_before_last_arrival for run in layerwise],
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--rates", default="100,200,500,2000", help="Mbit/s, comma-separated")
    flags.add_argument("--delay-ms", type=float, default=20.0)
    flags.add_argument("--runs", type=int, default=5)
    flags.add_argument("--prompt-tokens", type=int, default=2048)
    flags.add_argument("--model", default="smollm2")
    flags.add_argument("--dtype", default="bfloat16")
    given = flags.parse_args()
    model = str(ensure_model(given.model))
    for rate in given.rates.split(","):
        found = measure(float(rate), given.delay_ms, given.runs, given.prompt_tokens, model, given.dtype)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
