"""What the wheel holds, and what the repository promises about itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("common", "transport", "services", "loadgen")
BUILT_FROM = (*FOLDERS, "pyproject.toml", "setup.py", "README.md", "LICENSE")
# Compiled files are the machine's, not the source's.
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files in a wheel that is built from a fresh copy: a stale build/ would put deleted modules into it."""
    folder = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=IGNORED)
        else:
            shutil.copy(source, folder / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_has_every_module_and_data_file_and_no_other(wheel_names: set[str]) -> None:
    """A new subpackage, or a py.typed, that setup.py misses would be missing for users only."""
    expected = {
        f"prfaas/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in wheel_names if ".dist-info/" not in name} == expected


def test_the_wheel_carries_the_licence_and_the_command(wheel_names: set[str]) -> None:
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)
    assert any(name.endswith("entry_points.txt") for name in wheel_names)


def test_torch_is_an_extra_and_pinned_for_developers() -> None:
    """A plain `pip install prfaas` downloads neither torch nor transformers; the Makefile's version is exact."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not any(name.startswith(("torch", "transformers")) for name in project["dependencies"])
    assert any(name.startswith("torch") for name in project["optional-dependencies"]["torch"])
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    assert any(pin.startswith("torch==") for pin in pins)


def test_every_folder_is_seen_by_type_checkers() -> None:
    """The links in .typing lead mypy to each portion of the namespace."""
    for folder in FOLDERS:
        assert (ROOT / ".typing" / "prfaas" / folder).resolve() == (ROOT / folder).resolve()
        assert (ROOT / folder / "py.typed").is_file()
