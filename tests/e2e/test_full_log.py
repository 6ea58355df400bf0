"""Real processes whose log can't be written, or blocks: requests, transfers and lanes don't notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path

FAST = ["--engine", "emulated", "--engine-decode-step-s", "0.005", "--engine-prefill-tokens-per-s", "20000"]
ROUTER = ["--model", "bytes"]
PROMPT = list(range(32, 127)) * 20


def lines_dropped(metrics) -> float:
    return metrics["prfaas_log_lines_dropped_total"][""]


async def test_a_full_disk_for_logs_costs_log_lines_only(cluster):
    """Router, nodes and the emulated WAN write to a full device. Requests are answered over the WAN, at once and one
    after the other; a prefill node that is killed is survived and a new one used; what was lost is counted."""
    cluster.logs_to = dict.fromkeys(["wan", "router", "decode", "prefill"], Path("/dev/full"))
    await cluster.start(FAST, ROUTER)
    answers = await asyncio.gather(*(cluster.complete(PROMPT[: 300 + 100 * i], 12) for i in range(8)))
    assert {answer["headers"]["x-prfaas-reason"] for answer in answers} == {"offloaded"}

    cluster.processes["prefill"].kill()
    await cluster.wait_for(lambda m: m["prfaas_transport_lanes"][""] == 0, "decode")
    local = await cluster.complete(PROMPT, 12)
    assert local["choices"][0]["finish_reason"] == "length"
    cluster.processes["prefill"].start()
    await cluster.wait_for(lambda m: m["prfaas_transport_lanes"][""] > 0, "decode")
    await cluster.wait_for(lambda m: m["prfaas_router_nodes"].get('role="prefill",state="usable"') == 1)
    again = await cluster.complete(PROMPT, 12)
    assert again["headers"]["x-prfaas-reason"] == "offloaded"
    assert again["choices"] == local["choices"]

    for name in ("router", "decode", "prefill"):
        assert lines_dropped(await cluster.metrics(name)) > 0, name
    for name in ("prefill", "decode", "router"):
        assert cluster.processes[name].stop() == 0, name


async def test_a_log_that_nobody_reads_stops_nothing(cluster, tmp_path):
    """Router and nodes write into one pipe that is full. Once it is read again the log says how much is missing, and
    when its reader ends they go on as well."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    cluster.logs_to = dict.fromkeys(["router", "decode", "prefill"], pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    try:
        fill(writer)
        await cluster.start(FAST, ROUTER)
        answers = await asyncio.gather(*(cluster.complete(PROMPT[: 300 + 100 * i], 12) for i in range(8)))
        assert {answer["headers"]["x-prfaas-reason"] for answer in answers} == {"offloaded"}
        dropped = lines_dropped(await cluster.metrics())
        assert dropped > 0

        empty(reader)
        assert cluster.processes["prefill"].stop() == 0
        told = [json.loads(line) for line in empty(reader).splitlines() if line.startswith(b"{")]
        assert {line["reason"] for line in told if line["event"] == "log lines were lost"} == {"nobody read it in time"}
    finally:
        os.close(reader)
        os.close(writer)
    await cluster.wait_for(lambda m: m["prfaas_transport_lanes"][""] == 0, "decode")
    assert (await cluster.complete(PROMPT, 12))["choices"][0]["finish_reason"] == "length"
    assert lines_dropped(await cluster.metrics()) > dropped
    for name in ("decode", "router"):
        assert cluster.processes[name].stop() == 0, name


def fill(pipe: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"\n" * 4096)


def empty(pipe: int) -> bytes:
    data = b""
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(pipe, 1 << 20):
            data += piece
    return data
