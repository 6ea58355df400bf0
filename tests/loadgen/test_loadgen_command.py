"""The `prfaas-loadgen` command line: help, mistakes, exit statuses, and a whole run in a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from prfaas.loadgen.__main__ import COMMANDS, main
from prfaas.loadgen.report.outputs import INPUTS, OUTPUTS

HERE = "127.0.0.1"


def test_the_commands_own_help_is_quick_and_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n  {command} " in told for command in COMMANDS)
    assert len(told.splitlines()) <= 40
    code = "import sys; from prfaas.loadgen.__main__ import main; main(['--help'])\n"
    code += "print([m for m in ('aiohttp', 'rich', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["run", "report"])
def test_help_fits_a_screen_and_has_an_example(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert 15 <= len(told.splitlines()) <= 46
    assert f"\n  prfaas-loadgen {command} " in told


def test_help_all_lists_the_rarer_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    short = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["run", "--help-all"])
    told = capsys.readouterr().out
    rarer = ("--request-timeout", "--extra-body", "--conversation-turn-mean", "--trace-tick-s")
    assert all(flag in told and flag not in short for flag in rarer)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_help_all(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With or without rarer flags, and whatever else is missing."""
    with pytest.raises(SystemExit) as ended:
        main([command, "--help-all"])
    assert ended.value.code == 0
    assert f"usage: prfaas-loadgen {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["nonsense"], "try prfaas-loadgen --help"),
        (["raport"], "did you mean prfaas-loadgen report?"),
        (["run", "--requestrate", "3"], "did you mean --request-rate?"),
        (["report"], "the following arguments are required: FILE"),
        (["run", "--html", "/no/such/folder/x.html"], "--html /no/such/folder/x.html: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_with_a_mend(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(flags)
    except SystemExit as ended:
        status = int(ended.code or 0)
    said = capsys.readouterr()
    assert status == 2
    assert told in said.err
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize(("text", "told"), [(None, "can't be read: No such file"), ("no PEM", "holds no certificates")])
def test_a_file_without_certificates_is_a_mistake_in_the_flags(
    text: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ca.pem"
    if text is not None:
        file.write_text(text)
    assert main(["run", "--cacert", str(file), "--no-progress"]) == 2
    said = capsys.readouterr().err
    assert f"--cacert {file} {told}" in said
    assert len(said.splitlines()) == 1


def test_all_mistakes_of_a_run_are_told_together(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the server, of the workload, of the prompts and of the objective: a line each, status 2; a key isn't shown."""
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret\n")
    flags = {
        "--url": "ftp://x",
        "--request-rate": "-3",
        "--endpoint-type": "telepathy",
        "--goodput": "speed:3",
        "--extra-body": "[1]",
        "--extra-inputs": "top_p",
        "--header": "no colon",
        "--request-timeout": "0",
        "--prompt-format": "verse",
        "--temperature": "warm",
        "--num-warmups": "-1",
    }
    assert main(["run", *(word for pair in flags.items() for word in pair)]) == 2
    said = capsys.readouterr().err
    assert "s3cret" not in said
    for flag in flags:
        assert sum(flag in line for line in said.splitlines()) == 1, flag


@pytest.mark.parametrize(
    "flags",
    [
        ["run", "--dataset-name", "mooncake_trace", "--dataset-path"],
        ["simulate", "--dataset-name", "mooncake_trace", "--dataset-path"],
        ["plan", "--histogram"],
        ["plan", "--isl"],
    ],
)
def test_no_output_overwrites_the_workloads_file(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "t.jsonl"
    text = '{"timestamp": 0, "input_length": 1500, "output_length": 100, "hash_ids": [1, 2, 3]}\n'
    trace.write_text("[1500]" if flags[0] == "plan" else text)
    before = trace.read_text()
    given = f"empirical:{trace}" if flags[-1] == "--isl" else str(trace)
    assert main([*flags, given, "--html", str(trace)]) == 2
    flag = flags[-1].replace("--isl", "--random-input-len")
    assert f"is the file of {flag}, which it would overwrite" in capsys.readouterr().err
    assert trace.read_text() == before


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_that_names_a_file_is_known_to_the_outputs(command: str) -> None:
    """So that none that is read can be overwritten."""
    module = importlib.import_module(COMMANDS[command])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    files = {action.dest for action in parser._actions if action.metavar == "FILE" or "profile" in action.dest}
    assert files
    assert files <= {*INPUTS, *OUTPUTS, "results"}


def test_an_output_may_be_called_like_a_flags_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time, the file is there
        assert main(["plan", "--mode", "mean_time", "--html", "mean_time"]) == 0


def test_outputs_are_tried_before_a_run_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second can't be written: the first isn't there then, and what was there is as it was."""
    old = tmp_path / "old.jsonl"
    old.write_text("kept")
    flags = ["--jsonl", str(old), "--csv", str(tmp_path / "new.csv"), "--html", str(tmp_path / "none" / "x.html")]
    assert main(["run", *flags]) == 2
    assert "x.html: No such file or directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["old.jsonl"]
    assert old.read_text() == "kept"


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], unused_port: int) -> None:
    assert main(["run", "--url", f"{HERE}:{unused_port}", "--no-progress"]) == 1
    said = capsys.readouterr().err
    assert "can't be reached" in said
    assert len(said.splitlines()) == 1


@pytest.fixture
async def unused_port() -> int:
    listener = await asyncio.start_server(lambda *_: None, HERE, 0)
    port: int = listener.sockets[0].getsockname()[1]
    listener.close()
    await listener.wait_closed()
    return port


async def _serve(
    answers: int, began: asyncio.Event, seen: list[tuple[str | None, dict[str, Any]]] | None = None
) -> tuple[web.AppRunner, str]:
    """Answers so many completions; the others say one word and hang. `seen`: gets each call's x-team and body."""
    left = [answers]

    async def complete(http: web.Request) -> web.StreamResponse:
        if seen is not None:
            seen.append((http.headers.get("x-team"), await http.json()))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(http)
        await response.write(b'data: {"choices": [{"text": "one", "finish_reason": null}]}\n\n')
        if not left[0]:
            began.set()
            await asyncio.Event().wait()
        left[0] -= 1
        await response.write(b'data: {"choices": [{"text": "two", "finish_reason": "length"}]}\n\ndata: [DONE]\n\n')
        return response

    async def models(http: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "scripted"}]})

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/v1/models", models)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05)
    await runner.setup()
    await web.TCPSite(runner, HERE, 0).start()
    return runner, f"http://{HERE}:{runner.addresses[0][1]}"


async def _loadgen(*flags: str) -> asyncio.subprocess.Process:
    environment = {k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"}
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "prfaas.loadgen", *flags, stdout=pipe, stderr=pipe, env=environment
    )


async def test_a_run_prints_json_and_saves_files_that_report_reads(tmp_path: Path) -> None:
    """The command as users call it: the model is asked for, all outputs are written, and stdout is nothing but JSON."""
    runner, url = await _serve(12, asyncio.Event())
    files = {name: str(tmp_path / f"x.{name}") for name in ("jsonl", "csv", "html")}
    flags = [word for name, path in files.items() for word in (f"--{name}", path)]
    load = ["--num-prompts", "10", "--isl", "8", "--osl", "2", "--max-concurrency", "3", "--num-warmups", "2"]
    process = await _loadgen("run", "--url", url, *load, *flags, "--json", "--goodput", "ttft:60000")
    out, err = await process.communicate()
    await runner.cleanup()
    assert process.returncode == 0, err
    said = json.loads(out)
    assert said["setup"]["model"] == "scripted"
    (run,) = said["runs"]
    assert (run["ok"], run["output_tokens"], run["share_good"]) == (10, 20, 1.0)
    assert run["max_in_flight"] <= 3
    assert said["client"]["late_max_s"] >= 0
    assert len(Path(files["jsonl"]).read_text().splitlines()) == 10
    assert main(["report", files["jsonl"], "--csv", files["csv"]]) == 0


VLLM = "--backend openai --base-url URL --header x-team=a:b x-b=c --num-warmups 1 --disable-tqdm --num-prompts 2"
AIPERF = "--endpoint-type completions --streaming --url URL --header x-team:a:b --num-warmup-requests 1 --num-prompts 2"


@pytest.mark.parametrize(
    "words",
    [
        [*VLLM.split(), "--model", "m", "--extra-body", '{"top_p": 0.9, "user": "eve"}'],
        [*AIPERF.split(), "--model-names", "m", "--extra-inputs", "top_p:0.9", "user:eve"],
        [*AIPERF.split(), "--model-names", "m", "--extra-inputs", '{"top_p": 0.9}', "--extra-inputs", "user:eve"],
    ],
)
async def test_flags_are_taken_as_the_other_tools_have_them(words: list[str]) -> None:
    """vLLM's and aiperf's way to say it is the same run: model, headers, warm-ups, fields of the body."""
    seen: list[tuple[str | None, dict[str, Any]]] = []
    runner, url = await _serve(3, asyncio.Event(), seen)
    words = [url if word == "URL" else word for word in words]
    process = await _loadgen("run", *words, "--isl", "4", "--osl", "2", "--concurrency", "1")
    _, err = await process.communicate()
    await runner.cleanup()
    assert process.returncode == 0, err
    assert [team for team, _ in seen] == ["a:b"] * 3
    assert {(body["model"], body["top_p"], body["user"]) for _, body in seen} == {("m", 0.9, "eve")}


async def test_sigint_ends_a_run_early_and_still_reports(tmp_path: Path) -> None:
    """What was answered is answered, what was under way is interrupted, the rest is counted as unsent; status 130."""
    began = asyncio.Event()
    runner, url = await _serve(2, began)
    saved = tmp_path / "x.jsonl"
    process = await _loadgen(
        "run", "--url", url, "--num-prompts", "20", "--max-concurrency", "1", "--jsonl", str(saved), "--json"
    )
    await began.wait()
    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    await runner.cleanup()
    assert process.returncode == 130, err
    said = json.loads(out)
    assert said["interrupted"] is True
    assert said["unsent"] == 17
    (run,) = said["runs"]
    assert (run["ok"], run["interrupted"], run["failed"]) == (2, 1, 0)
    assert [json.loads(line)["status"] for line in saved.read_text().splitlines()] == ["ok", "ok", "interrupted"]
    assert b"interrupted" in err
