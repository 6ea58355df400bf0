# ruff: noqa: T201
"""Install torch into the running interpreter's environment without downloading CUDA by accident.

    python .ci/install_torch.py [--cuda]

In this order: the index TORCH_INDEX (by default PyTorch's index of CPU builds) when it answers within 5 s; else the
configured index, if a dry run there would fetch no nvidia-* package; else nothing is installed and the mend is named.
`--cuda` takes whatever the configured index has. The version is the one in constraints.txt.

It lies in .ci because it belongs to how this repository sets itself up; it is no part of the package.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import ssl
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ANSWER_S = 5.0
MEND = (
    "torch: the CPU index does not answer, and the configured index has only a CUDA build (several GB).\n"
    "The mend: `make CUDA=1 ...` if you want that build, or TORCH_INDEX=<an index with CPU builds of torch>."
)


def pinned_version() -> str:
    for line in CONSTRAINTS.read_text().splitlines():
        if line.startswith("torch=="):
            return line.removeprefix("torch==").strip()
    sys.exit(f"{CONSTRAINTS} has no line torch==")


def is_installed(version: str) -> bool:
    try:
        return importlib.metadata.version("torch").split("+")[0] == version
    except importlib.metadata.PackageNotFoundError:
        return False


def answers(index: str) -> bool:
    """Does the index serve a page for torch within ANSWER_S? In a thread, since name resolution has no timeout."""
    found = threading.Event()

    def ask() -> None:
        context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
        try:
            with urllib.request.urlopen(f"{index.rstrip('/')}/torch/", timeout=ANSWER_S, context=context):  # noqa: S310
                found.set()
        except (OSError, ValueError):
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    return found.is_set()


def pip(*arguments: str) -> int:
    return subprocess.call([sys.executable, "-m", "pip", *arguments])  # noqa: S603


def would_fetch_cuda(requirement: str) -> bool:
    """Would the configured index bring an nvidia-* package along? (Also true when it can't be asked.)"""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        if pip("install", "--dry-run", "--quiet", "--report", str(report), "-c", str(CONSTRAINTS), requirement) != 0:
            sys.exit(f"torch: neither the CPU index nor the configured index has {requirement}; check the network")
        names = [item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]]
    return any(name.startswith("nvidia") for name in names)


def main() -> int:
    version = pinned_version()
    if is_installed(version):
        return 0
    requirement = f"torch=={version}"
    install = ["install", "--quiet", "-c", str(CONSTRAINTS), requirement]
    index = os.environ.get("TORCH_INDEX", CPU_INDEX)
    if "--cuda" in sys.argv[1:]:
        print(f"torch: {requirement} from the configured index, CUDA or not")
    elif index and answers(index):
        print(f"torch: {requirement} from {index}")
        # Its dependencies come later, at their pinned versions, from the configured index.
        install += ["--no-deps", "--index-url", index]
    elif would_fetch_cuda(requirement):
        print(MEND, file=sys.stderr)
        return 1
    else:
        print(f"torch: {requirement}, a CPU build, from the configured index")
    return pip(*install)


if __name__ == "__main__":
    sys.exit(main())
