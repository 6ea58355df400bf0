"""`prfaas doctor`: each finding against a machine state that is made for it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from prfaas.services.__main__ import main
from prfaas.services.commands import doctor


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PRFAAS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


QUIET = ["--router-bind", "127.0.0.1:0", "--engine-arena-bytes", "1M", "--engine", "emulated"]


def _run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[dict[str, str]]]:
    status = main(["doctor", "--json", *argv])
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] == (status == 0)
    return status, told["checks"]


def test_a_sound_machine_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """Status 0, and every subject was looked at."""
    status, checks = _run(capsys, *QUIET)
    assert status == 0
    assert {"python", "packages", "config", "port", "memory", "model", "kernel"} <= {c["name"] for c in checks}
    assert all(check["mend"] for check in checks if check["status"] == "fail")


def test_text_has_one_line_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *QUIET]) == 0
    assert all(line.split()[0] in ("ok", "warn", "fail") for line in capsys.readouterr().out.splitlines())


def test_every_mistake_in_a_file_is_a_finding(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text("[node]\nbimd = 'x'\n[transport]\nlanes = 0\n")
    status, checks = _run(capsys, "--config", str(file))
    assert status == 1
    assert len([c for c in checks if c["name"] == "config" and c["status"] == "fail"]) == 2


def test_a_port_in_use_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, checks = _run(capsys, *QUIET, "--router-bind", f"127.0.0.1:{port}")
    assert status == 1
    assert any(c["status"] == "fail" and str(port) in c["message"] for c in checks)


def test_an_open_address_needs_a_secret(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without one it fails; with a private file it passes; with a readable or empty one it says so."""
    secret = tmp_path / "secret"
    assert _run(capsys, *QUIET, "--bind", "0.0.0.0:0")[0] == 1
    secret.write_text("s3cret")
    secret.chmod(0o600)
    assert _run(capsys, *QUIET, "--bind", "0.0.0.0:0", "--secret-file", str(secret))[0] == 0
    secret.chmod(0o644)
    assert any("chmod 600" in c["mend"] for c in _run(capsys, *QUIET, "--secret-file", str(secret))[1])
    secret.write_text("")
    assert _run(capsys, *QUIET, "--secret-file", str(secret))[0] == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "[::1]"])
def test_loopback_needs_no_secret(capsys: pytest.CaptureFixture[str], host: str) -> None:
    """All of 127.0.0.0/8, as the services themselves see it."""
    binds = ["--bind", f"{host}:0", "--kv-bind", f"{host}:0"]
    assert not any(check["name"] == "secret" for check in _run(capsys, *QUIET, *binds)[1])


def test_an_arena_beyond_the_memory_fails() -> None:
    assert doctor.check_memory(1 << 20).status == "ok"
    assert doctor.check_memory(1 << 50).status == "fail"


@pytest.mark.model
@pytest.mark.parametrize(("model_type", "status"), [("llama", "ok"), ("mamba2", "fail")])
def test_only_verified_model_types_pass(tmp_path: Path, model_type: str, status: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert doctor.check_model(str(tmp_path)).status == status


def test_a_model_that_is_not_here_yet_is_a_warning() -> None:
    assert doctor.check_model("smollm2").status == "warn"


def test_kernel_limits_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buffers, a missing congestion control and slow start after idle are warnings with a mend."""
    for name, text in {
        "tcp_wmem": "4096 16384 262144",
        "tcp_rmem": "4096 131072 33554432",
        "tcp_available_congestion_control": "reno cubic",
        "tcp_slow_start_after_idle": "1",
    }.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(doctor, "SYSCTL", tmp_path)
    found = list(doctor.check_kernel("cubic"))
    mends = [f.mend for f in found if f.status == "warn"]
    assert any("tcp_wmem" in mend for mend in mends)
    assert any("tcp_bbr" in mend for mend in mends)
    assert any("tcp_slow_start_after_idle=0" in mend for mend in mends)
    assert [f.status for f in found if "tcp_rmem" in f.message] == ["ok"]
