"""Which peers there are, what each needs, and how to install it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DEFAULT_FOLDER = Path("~/.cache/prfaas/peers").expanduser()
OURS = "prfaas"


@dataclass(frozen=True)
class Kind:
    name: str
    script: str
    environment: str = ""
    """The virtual environment's folder; empty = the Python that runs the benchmark."""
    requirements: Sequence[str] = ()
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Debian packages that are needed too, and a program or library of each."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of its own, for the script."""
    per_socket: bool = True
    """It can be told the congestion control; the others take the network's."""
    note: str = ""

    def python(self, folder: Path) -> str:
        return str(folder / self.environment / "bin" / "python") if self.environment else sys.executable


# NIXL's other dependencies are torch and CUDA, which a transfer between host memories does without.
NIXL = ("nixl-cu12==1.5.1", "numpy==2.4.6")

KINDS = (
    Kind(OURS, "prfaas_kv.py", note="checksum on"),
    Kind("sockets + xxh3", "sockets_loop.py", options={"hash": True}, note="bare uvloop pair"),
    Kind("sockets", "sockets_loop.py", options={"hash": False}, note="bare uvloop pair"),
    Kind("threads + xxh3", "sockets_threads.py", options={"hash": True}, note="blocking sockets, a thread a lane"),
    Kind("threads", "sockets_threads.py", options={"hash": False}, note="blocking sockets, a thread a lane"),
    Kind(
        "iperf3",
        "iperf.py",
        libraries={"iperf3": "/usr/bin/iperf3"},
        note="one buffer of its own, nothing kept; chunks of at most 1 MiB",
    ),
    Kind("nixl", "nixl_tcp.py", "nixl", NIXL, per_socket=False, note="UCX over TCP, all outstanding"),
    Kind(
        "nixl threads",
        "nixl_tcp.py",
        "nixl",
        NIXL,
        options={"threads": True},
        per_socket=False,
        note="the same with a UCX worker a lane",
    ),
    Kind(
        "mooncake",
        "mooncake_tcp.py",
        "mooncake",
        ("mooncake-transfer-engine-non-cuda==0.3.13",),
        {
            "libibverbs1": "/usr/lib/x86_64-linux-gnu/libibverbs.so.1",
            "libnuma1": "/usr/lib/x86_64-linux-gnu/libnuma.so.1",
        },
        per_socket=False,
        note="TCP, batches",
    ),
    Kind(
        "ucxx",
        "ucxx_tcp.py",
        "ucxx",
        ("libucx-cu12==1.21.0", "libucxx-cu12==0.52.0", "ucxx-cu12==0.52.0", "numpy==2.4.6", "uvloop==0.23.0"),
        per_socket=False,
        note="UCX over TCP, 64 outstanding a lane",
    ),
)


class PeerError(Exception):
    """Why a peer has no figures."""


def missing(kind: Kind, folder: Path) -> str | None:
    """What the peer lacks on this machine, or None."""
    for package, file in kind.libraries.items():
        if not Path(file).exists():
            return f"Debian package {package} is not installed; --install as root"
    if kind.environment and _stamp(kind, folder) != _wanted(kind):
        return f"not installed in {folder / kind.environment}; --install"
    return None


def install(kind: Kind, folder: Path) -> None:
    """Bring it in; a no-op where these versions are in. Raises PeerError."""
    absent = [package for package, file in kind.libraries.items() if not Path(file).exists()]
    if absent:
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise PeerError(f"Debian packages {' '.join(absent)} are needed: root and apt-get can install them")
        _run("apt-get", "install", "--yes", "--no-install-recommends", *absent)
    if kind.environment and _stamp(kind, folder) != _wanted(kind):
        place = folder / kind.environment
        _run(sys.executable, "-m", "venv", "--clear", str(place))
        _run(kind.python(folder), "-m", "pip", "install", "--quiet", "--no-deps", *kind.requirements)
        (place / "installed.txt").write_text(_wanted(kind))


def _wanted(kind: Kind) -> str:
    return "\n".join(kind.requirements)


def _stamp(kind: Kind, folder: Path) -> str | None:
    file = folder / kind.environment / "installed.txt"
    return file.read_text() if file.exists() else None


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise PeerError(f"{' '.join(command[:4])} …: {last}")
