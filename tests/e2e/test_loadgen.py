"""`prfaas-loadgen run` against real services in two regions."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

ENGINE = [
    "--engine",
    "emulated",
    "--engine-decode-step-s",
    "0.005",
    "--engine-prefill-tokens-per-s",
    "20000",
    "--engine-arena-bytes",
    "256M",
]
ROUTER = ["--model", "bytes", "--router-offload-threshold-tokens", "1000"]


async def loadgen(*flags: str) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "prfaas.loadgen",
        *flags,
        "--json",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return json.loads(out)


async def test_a_run_against_two_regions_fills_the_whole_report(cluster, tmp_path: Path):
    """Token-id prompts on both sides of the threshold: every answer has all its tokens, and the router's timelines
    give where requests were prefilled, the parts of TTFT, and the KV that crossed the WAN."""
    await cluster.start(ENGINE, ROUTER)
    saved = tmp_path / "run.jsonl"
    said = await loadgen(
        "run",
        *("--url", cluster.router_url, "--request-rate", "20", "--num-prompts", "24"),
        *("--isl", "uniform:200:3000", "--osl", "6", "--prompt-format", "token-ids", "--vocab-size", "250"),
        *("--jsonl", str(saved), "--html", str(tmp_path / "run.html"), "--goodput", "ttft:60000"),
    )
    (run,) = said["runs"]
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert (run["ok"], run["output_tokens"], run["goodput_per_s"]) == (24, 24 * 6, pytest.approx(run["requests_per_s"]))
    assert [row["index"] for row in rows] == list(range(24))
    long = [row for row in rows if row["prompt_tokens"] > 1000]
    assert 0 < len(long) < 24
    offload = run["offload"]
    assert (offload["known"], offload["offloaded"]) == (24, len(long))
    assert {row["index"] for row in rows if row["offloaded"]} == {row["index"] for row in long}
    assert offload["reasons"]["offloaded"] == len(long)
    assert offload["prefill_regions"] == {"dense": len(long), "home": 24 - len(long)}
    assert {row["decode_region"] for row in rows} == {"home"}
    assert all(row["decision"].startswith("uncached=") for row in rows)
    assert offload["transfers"] == len(long)
    assert offload["kv_wire_bytes"] > 0
    assert offload["kv_raw_bytes"] == sum(row["kv_raw_bytes"] for row in long)
    assert 0 <= offload["overlap"] <= 1
    for row in long:
        parts = sum(row[f"{part}_s"] for part in ("router", "queue", "prefill", "exposed", "first_step"))
        # The router's clock and ours both count time; what is left is the way there and back.
        assert parts <= row["first_token_s"] - row["scheduled_s"] + 0.005
    assert "what left home" in (tmp_path / "run.html").read_text()


async def test_a_conversation_goes_on_with_what_was_answered(cluster):
    """Chats of three turns through the router: every turn is answered and prompts grow."""
    await cluster.start(ENGINE, ROUTER)
    said = await loadgen(
        "run",
        *("--url", cluster.router_url, "--endpoint-type", "chat", "--dataset-name", "conversation"),
        *("--conversation-num", "4", "--conversation-turn-mean", "3", "--isl", "20", "--osl", "5"),
        *("--max-concurrency", "2"),
    )
    (run,) = said["runs"]
    assert (run["requests"], run["ok"]) == (12, 12)
    assert run["max_in_flight"] <= 2
    assert run["prompt_tokens_each"]["max"] > 2 * run["prompt_tokens_each"]["min"]
