"""Equation 2 over the paper's public models: the egress of a region whose GPUs prefill all the time."""

from __future__ import annotations

from typing import Any

from prfaas.common.perfmodel.kv_rates import public_models


def report(gpus: int, length_tokens: float) -> dict[str, Any]:
    """models: for each, Gbit/s of one instance and of the whole region, at that uncached length."""
    rates = public_models()
    return {
        "gpus": gpus,
        "length_tokens": length_tokens,
        "hardware": rates[0].hardware,
        "provenance": rates[0].provenance,
        "source": rates[0].source,
        "models": [
            {
                "name": rate.name,
                "layers": rate.layers,
                "instance_gbps": rate.gbps_at(length_tokens),
                "egress_gbps": rate.egress_bytes_per_s(gpus, length_tokens) * 8e-9,
            }
            for rate in rates
        ],
    }


def as_text(made: dict[str, Any]) -> str:
    lines = [
        f"egress of {made['gpus']:,} GPUs ({made['hardware']} an instance) that prefill"
        f" {made['length_tokens']:,.0f} tokens a request, Gbit/s",
        "",
        f"{'':18}{'layers':22}{'instance':>10}{'region':>12}",
    ]
    lines += [
        f"{m['name']:18}{m['layers']:22}{m['instance_gbps']:>10.2f}{m['egress_gbps']:>12,.0f}" for m in made["models"]
    ]
    lines += ["", f"{made['provenance']}: {made['source']}"]
    return "\n".join(lines)
