"""`prfaas demo` as a user runs it, with the emulated engine: real processes, a real WAN between them, no model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

TIMEOUT_S = 60.0
QUICK = ["--engine", "emulated", "--prompt-tokens", "1200", "--max-tokens", "8", "--delay-ms", "5"]
SETTINGS = {"PRFAAS_ENGINE_ARENA_BYTES": "64M", "PRFAAS_ENGINE_PREFILL_TOKENS_PER_S": "5000"}
JSON_KEYS = {
    "text", "token_ids", "ttft_s", "time_to_second_token_s", "ttft_parts", "baselines", "layers", "kv_raw_bytes",
    "kv_wire_bytes", "exposed_s", "transfer_alone_s", "prefill_s", "overlap_ratio", "layers_used_before_last_arrival",
}  # fmt: skip


class Demo:
    """A running demo whose whole offspring carries a mark in its environment."""

    def __init__(self, *flags: str, **settings: str) -> None:
        self.mark = f"MARK={uuid.uuid4().hex}"
        plain = {key: value for key, value in os.environ.items() if not key.startswith("PRFAAS_")}
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prfaas.services", "demo", *QUICK, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=plain | SETTINGS | settings | {name: value},
        )

    def read_until(self, word: str) -> str:
        """What it prints up to the line with `word`."""
        said = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said += line
            if word in line:
                return said
        raise AssertionError(f"it never said {word!r}:\n{said}")

    def family(self) -> set[int]:
        """Every living process with the mark."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = self.mark.encode() in (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if marked and "State:\tZ" not in (folder / "status").read_text():
                found.add(int(folder.name))
        return found

    def wait_gone(self) -> None:
        until_s = time.monotonic() + TIMEOUT_S
        while (left := self.family()) and time.monotonic() < until_s:
            time.sleep(0.02)
        assert left == set()

    def end(self) -> None:
        for pid in self.family():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(TIMEOUT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def demos() -> Iterator[list[Demo]]:
    running: list[Demo] = []
    yield running
    for demo in running:
        demo.end()


def test_json_is_one_object_with_the_promised_keys(demos: list[Demo]) -> None:
    """Text, ids, times whose parts sum up, every layer's four instants in order, both baselines; it ends by itself."""
    demo = Demo("--json")
    demos.append(demo)
    out, _ = demo.process.communicate(timeout=TIMEOUT_S)
    assert demo.process.returncode == 0, out
    told = json.loads(out.splitlines()[-1])
    assert set(told) == JSON_KEYS
    assert told["text"]
    assert len(told["token_ids"]) == 8
    assert sum(told["ttft_parts"].values()) == pytest.approx(told["ttft_s"], abs=0.005)
    assert set(told["baselines"]) == {"send_after_prefill", "join_when_complete"}
    for baseline in told["baselines"].values():
        assert 0 < baseline["ttft_s"] < baseline["time_to_second_token_s"]
    assert [layer["layer"] for layer in told["layers"]] == list(range(8))
    for layer in told["layers"]:
        # The prefill node's instants are true within half a round trip of the WAN.
        assert layer["computed_s"] <= layer["sent_s"]
        assert layer["arrived_s"] <= layer["used_s"]
        assert layer["used_s"] <= told["ttft_s"] + 0.005  # the router's clock and the node's
    assert min(told["kv_wire_bytes"], told["kv_raw_bytes"]) > 0  # which is more, the codec decides
    assert told["layers_used_before_last_arrival"] >= 1
    assert demo.family() == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_survives_an_interrupted_demo(demos: list[Demo], number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM, and even a killed demo leave no process behind."""
    demo = Demo("--keep", "--no-baselines")
    demos.append(demo)
    assert "layers were used before the last one" in demo.read_until("curl ")
    assert len(demo.family()) == 5
    demo.process.send_signal(number)
    demo.wait_gone()
    assert demo.process.wait(TIMEOUT_S) == {signal.SIGINT: 0, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]


def test_interrupting_it_while_it_starts_is_quiet(demos: list[Demo]) -> None:
    """Ctrl-C before anything is ready: status 130, no traceback, nobody left."""
    demo = Demo("--json")
    demos.append(demo)
    until_s = time.monotonic() + TIMEOUT_S
    while len(demo.family()) < 3 and time.monotonic() < until_s:
        time.sleep(0.01)
    demo.process.send_signal(signal.SIGINT)
    out, _ = demo.process.communicate(timeout=TIMEOUT_S)
    assert demo.process.returncode == 130
    assert "Traceback" not in out
    demo.wait_gone()


def test_a_child_that_dies_is_shown_with_the_end_of_its_log(demos: list[Demo]) -> None:
    """A setting that the services refuse: status 1, the child's own words, where the logs are, nobody left."""
    demo = Demo(PRFAAS_LOG_LEVEL="loud")
    demos.append(demo)
    out, _ = demo.process.communicate(timeout=TIMEOUT_S)
    assert demo.process.returncode == 1
    assert "ended with status 2" in out
    assert "log.level = 'loud' (environment PRFAAS_LOG_LEVEL): must be one of debug, info, warning, error" in out
    assert "Traceback" not in out
    demo.wait_gone()
