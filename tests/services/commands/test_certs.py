"""`prfaas certs init`: what it makes, keeps and refuses."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from cryptography import x509
from prfaas.common.config import TlsConfig
from prfaas.services.__main__ import main
from prfaas.transport.certificates import read_credentials

from tests.certificates import files_of


def run(directory: Path, *argv: str) -> int:
    return main(["certs", "init", "--dir", str(directory), "--nodes", *argv])


def credentials(config: TlsConfig):  # type: ignore[no-untyped-def]
    return read_credentials(config, datetime.datetime.now(datetime.UTC).timestamp())


def test_a_ca_and_nodes_are_made(tmp_path: Path) -> None:
    """Private keys are private; each certificate fits its key and the CA, and names its node, roles and hosts."""
    directory = tmp_path / "certs"
    assert run(directory, "r1:router:api.example.com,10.0.0.1,[::1]", "n1:prefill+decode") == 0
    assert sorted(path.name for path in directory.iterdir()) == [
        "ca.key", "ca.pem", "n1.key", "n1.pem", "r1.key", "r1.pem",
    ]  # fmt: skip
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in directory.glob("*.key"))
    both = credentials(files_of(directory, "n1")).identity
    assert (both.name, sorted(both.roles)) == ("n1", ["decode", "prefill"])
    router = x509.load_pem_x509_certificate((directory / "r1.pem").read_bytes())
    names = router.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["api.example.com"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "::1"]


def test_a_node_that_is_added_later_has_the_same_ca(tmp_path: Path) -> None:
    """The CA and the other nodes' files stay byte for byte; the new node is trusted with the old CA file."""
    run(tmp_path, "p1:prefill")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(tmp_path, "p2:prefill") == 0
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    assert credentials(files_of(tmp_path, "p2")).identity.name == "p2"


def test_nothing_is_overwritten_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Then nothing at all is made; with --force that node's files are new, and the CA is not."""
    run(tmp_path, "p1:prefill")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(tmp_path, "p2:prefill", "p1:prefill") == 2
    assert "p1.pem is there already; --force replaces it" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run(tmp_path, "p1:decode", "--force") == 0
    assert (tmp_path / "ca.pem").read_bytes() == before["ca.pem"]
    assert (tmp_path / "p1.key").read_bytes() != before["p1.key"]
    assert credentials(files_of(tmp_path, "p1")).identity.roles == {"decode"}


def test_validity_is_a_setting(tmp_path: Path) -> None:
    assert run(tmp_path, "p1:prefill", "--days", "7") == 0
    left_s = credentials(files_of(tmp_path, "p1")).not_after_s - datetime.datetime.now(datetime.UTC).timestamp()
    assert 6.9 * 86400 < left_s <= 7 * 86400


@pytest.mark.parametrize(
    ("nodes", "problem"),
    [
        (["p1"], "after the name comes its role"),
        (["p1:king"], "after the name comes its role"),
        (["p/1:prefill"], "a name has 1 to 128 letters"),
        (["../p1:prefill"], "a name has 1 to 128 letters"),
        (["ca:router"], "is not ca"),
        (["p1:prefill:no host"], "'no host' is neither a host's name nor an address"),
        (["p1:prefill", "p1:decode"], "names p1 twice; a node with several roles is p1:prefill+decode"),
    ],
)
def test_what_is_no_node_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], nodes: list[str], problem: str
) -> None:
    assert run(tmp_path / "certs", *nodes) == 2
    told = capsys.readouterr().err
    assert problem in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "certs").exists()


def test_a_ca_that_is_not_complete_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its key gone, or another's: a new CA would lock out every node that is there."""
    run(tmp_path, "p1:prefill")
    run(tmp_path / "other", "p1:prefill")
    (tmp_path / "ca.key").rename(tmp_path / "kept")
    assert run(tmp_path, "p2:prefill") == 2
    assert "the CA is not complete" in capsys.readouterr().err
    (tmp_path / "other" / "ca.key").rename(tmp_path / "ca.key")
    assert run(tmp_path, "p2:prefill") == 2
    assert "is not the key of" in capsys.readouterr().err
