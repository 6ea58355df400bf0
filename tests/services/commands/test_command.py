"""The `prfaas` command line: help, mistakes, exit statuses, settings from flags, environment and file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prfaas.common.config import FLAG_ALIASES, keys
from prfaas.common.errors import ConfigError
from prfaas.services.__main__ import main
from prfaas.services.commands import serve
from prfaas.services.commands.flags import long_flag, parse_config_command

COMMANDS = ["router", "prefill", "decode", "demo", "doctor"]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PRFAAS_")]:
        monkeypatch.delenv(name)


def _parse(*argv: str) -> object:
    return parse_config_command("prfaas decode", "", "", FLAG_ALIASES, argv)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert 15 <= len(told.splitlines()) <= 40
    assert f"example:\n  prfaas {command}" in told


def test_the_commands_own_help_is_quick_and_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n  {command} " in told for command in [*COMMANDS, "capture-kv", "bench link", "bench codec"])
    assert len(told.splitlines()) <= 40


def test_help_imports_neither_torch_nor_aiohttp() -> None:
    """`prfaas --help` answers at once because it loads next to nothing."""
    code = "import sys; from prfaas.services.__main__ import main; main(['--help'])\n"
    code += "print([m for m in ('torch', 'aiohttp', 'rich', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_all_shows_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["decode", "--help-all"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(long_flag(key) in told for key in keys())


def test_every_mistake_has_its_own_line_and_the_status_is_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wrong values in file, environment and flags are all told at once."""
    file = tmp_path / "cluster.toml"
    file.write_text("[node]\nbimd = '127.0.0.1:1'\n[transport]\nlanes = 1000\n")
    monkeypatch.setenv("PRFAAS_NODE_PING_S", "soon")
    assert main(["decode", "--config", str(file), "--dtype", "int3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert any("node.bimd" in line and "did you mean 'node.bind'" in line for line in lines)
    assert any("transport.lanes = 1000" in line and str(file) in line for line in lines)
    assert any("node.ping_s = 'soon' (environment PRFAAS_NODE_PING_S)" in line for line in lines)
    assert any("engine.dtype = 'int3'" in line for line in lines)
    assert all(line.startswith("prfaas decode: ") for line in lines)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["rooter"], "did you mean prfaas router?"),
        (["decode", "--lane", "3"], "did you mean --lanes?"),
        (["decode", "--config", "/no/such/file"], "No such file or directory"),
        (["decode"], "engine.model is not set"),
        (["router"], "router.model_path is not set"),
        (["bench"], "prfaas bench link"),
        (["certs", "init"], "required: --dir, --nodes; try prfaas certs init --help"),
        (["demo", "--rate-mbit", "0"], "must be a number from 0.1"),
        (["demo", "--max-tokens", "many"], "must be a whole number"),
    ],
)
def test_a_wrong_call_is_one_line_with_a_mend_and_status_2(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(argv)
    except SystemExit as ended:
        status = int(ended.code or 0)
    told = capsys.readouterr().err
    assert status == 2
    assert complaint in told
    assert len(told.splitlines()) == 1


def test_a_failure_is_status_1_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that can't be fetched now; one that can't be a model is a mistake of the call, status 2."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["decode", "--model", "no-such/model"]) == 1
    assert "could not be fetched from Hugging Face" in capsys.readouterr().err
    assert main(["decode", "--model", "/no/such/model"]) == 2
    assert capsys.readouterr().err == "prfaas decode: model '/no/such/model': no such directory\n"


def test_a_broken_config_file_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text("[node\n")
    assert main(["decode", "--config", str(file)]) == 2
    assert "is not TOML" in capsys.readouterr().err


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short and long flags set the same key."""
    file = tmp_path / "cluster.toml"
    file.write_text("[transport]\nlanes = 2\nchunk_bytes = 8192\n[node]\nregion = 'a'\n")
    monkeypatch.setenv("PRFAAS_TRANSPORT_LANES", "3")
    config = parse_config_command("x", "", "", FLAG_ALIASES, ["--config", str(file), "--lanes", "4"])
    assert (config.transport.lanes, config.transport.chunk_bytes, config.node.region) == (4, 8192, "a")
    config = parse_config_command("x", "", "", FLAG_ALIASES, ["--config", str(file)])
    assert config.transport.lanes == 3
    config = parse_config_command("x", "", "", FLAG_ALIASES, ["--transport-lanes", "5", "--node-region", "b"])
    assert (config.transport.lanes, config.node.region) == (5, "b")


class TestModels:
    def test_the_routers_model_is_the_engines_by_default(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        config = parse_config_command("x", "", "", serve.ROUTER_ALIASES, ["--engine-model", str(tmp_path)])
        assert serve.with_router_model(config).router.model_path == str(tmp_path)

    def test_the_emulated_engine_needs_no_model(self) -> None:
        config = parse_config_command("x", "", "", serve.ROUTER_ALIASES, ["--engine", "emulated"])
        assert serve.with_router_model(config).router.model_path == "bytes"
        assert serve.with_engine_model(config) == config

    def test_a_directory_is_served_under_its_own_name(self, tmp_path: Path) -> None:
        """served_model stays empty: the engine takes the directory's name."""
        (tmp_path / "config.json").write_text("{}")
        config = parse_config_command("x", "", "", FLAG_ALIASES, ["--model", str(tmp_path)])
        assert serve.with_engine_model(config).engine.served_model == ""

    def test_no_model_at_all_names_the_flag(self) -> None:
        with pytest.raises(ConfigError, match="--model"):
            serve.with_engine_model(parse_config_command("x", "", "", FLAG_ALIASES, []))

    def test_a_missing_directory_is_a_mistake_of_the_call(self) -> None:
        config = parse_config_command("x", "", "", FLAG_ALIASES, ["--model", "/no/such/model"])
        with pytest.raises(ConfigError, match="no such directory"):
            serve.with_engine_model(config)


def test_ctrl_c_is_quiet() -> None:
    """A router that is interrupted says nothing more than its log, and has a clean status."""
    command = [sys.executable, "-m", "prfaas.services", "router", "--engine", "emulated", "--bind", "127.0.0.1:0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "router_listens" in process.stderr.readline()
    process.send_signal(2)
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait(20) in (0, 130)
    assert "Traceback" not in rest


def _prfaas(arguments: str, streams: str, portion: str = "services") -> subprocess.CompletedProcess[str]:
    """In a shell, that can also close a stream; output is buffered, as it is by default."""
    command = f"'{sys.executable}' -m prfaas.{portion} {arguments} {streams}"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize("streams", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize("portion", ["services", "loadgen"])
def test_the_status_stays_right_when_nothing_can_be_said(streams: str, portion: str) -> None:
    """Standard error is full, or closed."""
    assert _prfaas("rooter", streams, portion).returncode == 2


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("prfaas", "--help"),
        ("prfaas", "bench --help"),
        ("prfaas", "decode --help"),
        ("prfaas-loadgen", "--help"),
        ("prfaas-loadgen", "plan --help"),
        ("prfaas-loadgen", "plan --case public --json"),
    ],
)
def test_output_onto_a_full_disk_is_one_line_and_status_1(program: str, arguments: str) -> None:
    done = _prfaas(arguments, ">/dev/full", "loadgen" if program == "prfaas-loadgen" else "services")
    assert done.returncode == 1
    assert done.stderr == f"{program} {arguments.split()[0]}: [Errno 28] No space left on device\n"


def test_a_closed_standard_error_is_not_given_to_a_socket() -> None:
    """Else what libraries write there goes to a peer."""
    code = "import os; from prfaas.services.__main__ import main; main(['--version']); "
    code += "print(os.readlink('/proc/self/fd/2'))"
    command = f'"{sys.executable}" -c "{code}" 2>&-'
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "/dev/null"
