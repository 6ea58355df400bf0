"""`prfaas plan-live`: what it prints of a router's plan, and what it says when there is none."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from prfaas.services.__main__ import main
from prfaas.services.messages import ChangingNode, PastDecision, PlanFigures, PlannerStanding, PlanReport, RegionPlan

PLAN = PlanFigures(19_500.0, 4, 3, 5, 3.22, "link", 0.4, 1.6e9, 0.128, 0.025)
REGION = RegionPlan(
    "home", 2, 5, [ChangingNode("d7", "decode", "prefill")], 0, 1, "converting",
    "2 : 5 stays (3 : 5 would carry +12%): a node is still changing its role", 0.12, 2.5, 0.9, 1.5, 0.4, 0.0,
    21_000.0, None, 12.3, 200.0, PLAN,
)  # fmt: skip
REPORT = PlanReport(
    "r1", 1_790_000_000.0, "convert", "", 60.0, PlannerStanding("r1", True, 8, 5), [REGION],
    [PastDecision(1_790_000_000.0 - 60 * i, "home", "balanced", 0, f"decision {i}") for i in range(20, 0, -1)],
)  # fmt: skip


class Router(http.server.BaseHTTPRequestHandler):
    """Answers /plan with what the test sets."""

    answer: tuple[int, bytes] = (200, b"")
    asked: ClassVar[list[Any]] = []

    def do_GET(self) -> None:
        type(self).asked.append((self.path, self.headers.get("authorization")))
        status, body = type(self).answer
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Router.answer, Router.asked = (200, msgspec.json.encode(REPORT)), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Router)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def run(*argv: str) -> int:
    try:
        return main(["plan-live", *argv])
    except SystemExit as ended:
        return int(ended.code or 0)


def test_text(url: str, capsys: Any) -> None:
    """Who plans, what it would do and why, the plan, the threshold, what it waits for, what was before."""
    assert run("--router", url) == 0
    out = capsys.readouterr().out
    for part in (
        "router r1: it plans and converts nodes (8 nodes' grants, 5 are needed)",
        "home (2 prefill : 5 decode)",
        "would convert nothing: 2 : 5 stays (3 : 5 would carry +12%): a node is still changing its role",
        "plan: 3 : 5 carries 3.22 requests/s, bounded by link; 40% offloaded to 4 nodes, 12.8 Gbit/s (13% of the",
        "threshold: 21,000 tokens now, none (nothing is offloaded) planned; 2.5 requests/s come",
        "d7 is draining: decode becomes prefill",
        "next plan in 12 s, next conversion in 200 s at the earliest",
        "home: decision 1\n",
    ):
        assert part in out, out
    assert out.count("home: decision") == 10


def test_json(url: str, capsys: Any) -> None:
    assert run("--router", url.removeprefix("http://"), "--json") == 0
    assert json.loads(capsys.readouterr().out) == msgspec.to_builtins(REPORT)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"why_off": "planner.mode is off"}, "router r1 plans nothing: planner.mode is off"),
        ({"lease": PlannerStanding("r2", False, 0, 5)}, "router r1: router r2 converts nodes"),
        ({"lease": PlannerStanding("", False, 0, 5)}, "no router has the planner's lease yet (0 nodes' grants, 5"),
        ({"mode": "threshold"}, "it plans thresholds and only shows"),
        ({"regions": []}, "no region decodes yet"),
    ],
)
def test_other_states(url: str, capsys: Any, changes: dict[str, Any], expected: str) -> None:
    Router.answer = (200, msgspec.json.encode(msgspec.structs.replace(REPORT, **changes)))
    assert run("--router", url) == 0
    assert expected in capsys.readouterr().out


def test_the_key_goes_along(url: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "key").write_text("secret-key\n")
    assert run("--router", url, "--api-key-file", str(tmp_path / "key")) == 0
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    assert run("--router", url) == 0
    assert Router.asked == [("/plan", "Bearer secret-key"), ("/plan", "Bearer another")]


@pytest.mark.parametrize(
    ("argv", "status", "expected"),
    [
        (["--router", "http://127.0.0.1:1"], 1, "no answer from http://127.0.0.1:1: Connection refused"),
        (["--router", "ftp://x"], 2, "--router ftp://x: it is like http://127.0.0.1:8000"),
        (["--router", "http://h:1/v1"], 2, "it is like"),
        (["--watch", "0"], 2, "must be a number from 0.1"),
        (["--api-key-file", "/nowhere"], 2, "--api-key-file /nowhere can't be read"),
        (["--cacert", "/nowhere"], 2, "--cacert /nowhere can't be read"),
        (["--wach", "1"], 2, "did you mean --watch?"),
    ],
)
def test_mistakes(argv: list[str], status: int, expected: str, capsys: Any) -> None:
    """One line that says what is wrong."""
    assert run(*argv) == status
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((401, b'{"error": {"message": "no API key", "type": "authentication_error"}}'), "answered 401: no API key"),
        ((404, b"<html>"), "answered 404: it is no router of this version"),
        ((200, b"{}"), "is no plan: is a router of this version there?"),
    ],
)
def test_answers_that_are_no_plan(url: str, capsys: Any, answer: tuple[int, bytes], expected: str) -> None:
    Router.answer = answer
    assert run("--router", url) == 1
    assert expected in capsys.readouterr().err
