"""`prfaas doctor`: each finding against a machine state that is made for it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from prfaas.common.config import TlsConfig, VllmConfig
from prfaas.services.__main__ import main
from prfaas.services.commands import doctor

from tests.certificates import make_certificates


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
    file.write_text("[node]\nbimd = 'x'\n[transport]\nlanes = 65\n")
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


def _tls_flags(files: TlsConfig) -> list[str]:
    return ["--tls-ca-file", files.ca_file, "--tls-cert-file", files.cert_file, "--tls-key-file", files.key_file]


def _tls(checks: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(check["status"], check["message"]) for check in checks if check["name"] == "tls"]


ROUTERS = ["--routers", "https://127.0.0.1:8000"]


def test_good_certificates_pass(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = make_certificates(tmp_path, "d1:decode")["d1"]
    status, checks = _run(capsys, *QUIET, *ROUTERS, *_tls_flags(files), "--name", "d1")
    assert status == 0
    [(verdict, text)] = _tls(checks)
    assert verdict == "ok"
    assert "d1 (decode), good for 36" in text


def test_each_mistake_with_certificates_is_a_finding(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A key that others may read, another node's certificate, http URLs, one that ends soon, one that has ended, a key
    of another, a CA of another."""
    files = make_certificates(tmp_path, "d1:decode", "d2:decode")
    Path(files["d1"].key_file).chmod(0o640)
    status, checks = _run(capsys, *QUIET, *_tls_flags(files["d1"]), "--name", "d2")
    assert status == 1
    told = [text for verdict, text in _tls(checks) if verdict == "fail"]
    assert any("others may read" in text for text in told)
    assert any("is d1's, but node.name = 'd2'" in text for text in told)
    assert any("node.routers" in text for text in told)

    def after(age_days: int) -> list[tuple[str, str]]:
        old = make_certificates(tmp_path, "d2:decode", force=True, age_days=age_days)["d2"]
        return _tls(_run(capsys, *QUIET, *ROUTERS, *_tls_flags(old), "--name", "d2")[1])

    [(verdict, text)] = after(360)
    assert (verdict, "expires in 5.0 days" in text) == ("warn", True)
    [(verdict, text)] = after(400)
    assert (verdict, "expired on" in text) == ("fail", True)
    mixed = TlsConfig(files["d1"].ca_file, files["d1"].cert_file, files["d2"].key_file)
    assert "is not the key of" in _tls(_run(capsys, *QUIET, *_tls_flags(mixed))[1])[0][1]
    other = make_certificates(tmp_path / "other", "d1:decode")["d1"]
    foreign = TlsConfig(other.ca_file, files["d1"].cert_file, files["d1"].key_file)
    assert "is not signed by" in _tls(_run(capsys, *QUIET, *_tls_flags(foreign))[1])[0][1]


def test_an_open_address_without_tls_is_a_warning(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One, that names the addresses; loopback has none."""
    [(verdict, text)] = _tls(_run(capsys, *QUIET, "--bind", "0.0.0.0:0", "--kv-bind", "0.0.0.0:0")[1])
    assert verdict == "warn"
    assert "node.bind = 0.0.0.0:0, transport.bind = 0.0.0.0:0" in text
    assert _tls(_run(capsys, *QUIET)[1]) == []


@pytest.mark.parametrize(("user", "status"), [(0, "ok"), (1000, "warn")])
def test_bbr_that_only_root_may_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int, status: str) -> None:
    """The mend keeps what is allowed now."""
    (tmp_path / "tcp_available_congestion_control").write_text("reno cubic bbr\n")
    (tmp_path / "tcp_allowed_congestion_control").write_text("reno cubic\n")
    monkeypatch.setattr(doctor, "SYSCTL", tmp_path)
    monkeypatch.setattr(doctor.os, "geteuid", lambda: user)
    [bbr] = [f for f in doctor.check_kernel("cubic") if "congestion control bbr" in f.message]
    assert bbr.status == status
    assert bbr.mend == ("" if user == 0 else "sysctl -w net.ipv4.tcp_allowed_congestion_control='reno cubic bbr'")


def test_buffers_that_the_kernel_would_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where transport.socket_buffer_bytes asks for more than net.core allows."""
    for name in ("wmem_max", "rmem_max"):
        (tmp_path / name).write_text("212992\n")
    monkeypatch.setattr(doctor, "CORE_SYSCTL", tmp_path)

    def verdicts(wanted: int) -> list[tuple[str, str]]:
        return [(f.status, f.mend) for f in doctor.check_kernel("", wanted) if "net.core" in f.message]

    assert [status for status, _ in verdicts(0)] == ["ok", "ok"]
    assert [status for status, _ in verdicts(1 << 20)] == ["warn", "warn"]
    assert "sysctl -w net.core.wmem_max=1048576" in verdicts(1 << 20)[0][1]


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


def test_the_vllm_that_a_node_would_start_must_be_a_supported_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, status in (("0.32.1+cpu", "ok"), ("0.31.0", "fail")):
        monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name, version=version: version)
        assert doctor.check_vllm(VllmConfig()).status == status


def test_a_vllm_that_runs_must_have_its_sockets_where_the_node_looks(tmp_path: Path) -> None:
    config = VllmConfig(url="http://127.0.0.1:8100", control=str(tmp_path))
    assert doctor.check_vllm(config).status == "fail"
    assert "kv-transfer-config" in doctor.check_vllm(config).mend
    (tmp_path / "rank-0.sock").touch()
    assert doctor.check_vllm(config).status == "ok"
