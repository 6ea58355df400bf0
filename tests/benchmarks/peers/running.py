"""The two processes of a peer, and the network that all peers share."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from tests.benchmarks.peers.kinds import HERE, Kind, PeerError

ANSWER_S = 60.0
CLONE_NEWNET = 0x40000000
CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")
ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")


def private_network(congestion_control: str) -> str | None:
    """Move this process and its children into a network of their own, whose loopback has this default: peers that can't
    be told otherwise follow it, and nobody else on the machine does. None, or why it is not to be had."""
    if os.geteuid() != 0:
        return f"not root: the default, {CONGESTION.read_text().strip()}, stays for peers that can't be told"
    libc = ctypes.CDLL(None, use_errno=True)
    allowed = ALLOWED.read_text()
    outside = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        # A network may only have a default that the machine allows to everybody.
        ALLOWED.write_text(f"{allowed.strip()} {congestion_control}")
        if libc.unshare(CLONE_NEWNET) != 0:
            return f"no network of its own: {os.strerror(ctypes.get_errno())}"
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        CONGESTION.write_text(congestion_control)
        inside = os.open("/proc/self/ns/net", os.O_RDONLY)
        libc.setns(outside, CLONE_NEWNET)
        ALLOWED.write_text(allowed)
        libc.setns(inside, CLONE_NEWNET)
        os.close(inside)
    except OSError as error:
        return f"{congestion_control} can't be made the default: {error}"
    finally:
        os.close(outside)
    return None


class Process:
    """One side of a peer. `say` and `hear` raise PeerError with what the process said last."""

    def __init__(self, kind: Kind, folder: Path, options: dict[str, Any]) -> None:
        self._kind = kind
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self._process = subprocess.Popen(
            [kind.python(folder), str(HERE / kind.script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._role = options["role"]

    @property
    def pid(self) -> int:
        return self._process.pid

    def say(self, **message: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"its {self._role} ended early: {self._last_words()}") from None

    def hear(self, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """The next line; raises TimeoutError when none comes."""
        stdout = self._process.stdout
        assert stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                raise TimeoutError(f"its {self._role} said nothing for {timeout_s:g} s")
        line = stdout.readline()
        if not line:
            raise PeerError(f"its {self._role} ended early: {self._last_words()}")
        heard = cast(dict[str, Any], json.loads(line))
        if "error" in heard:
            raise PeerError(f"its {self._role}: {heard['error']}")
        return heard

    def _last_words(self) -> str:
        self._process.wait(5)
        self._errors.seek(0)
        return (self._errors.read().decode(errors="replace").strip() or "without a word").splitlines()[-1][:300]

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)
        self._process.kill()
        self._process.wait()
        self._errors.close()


@contextlib.contextmanager
def connected(kind: Kind, folder: Path, options: dict[str, Any]) -> Iterator[tuple[Process, Process]]:
    """(receiver, sender), ready to go."""
    with contextlib.ExitStack() as stack:
        pair = []
        for role in ("receiver", "sender"):
            process = Process(kind, folder, {**options, **kind.options, "role": role})
            stack.callback(process.close)
            pair.append(process)
        receiver, sender = pair
        sender.say(**receiver.hear()["listening"])
        sender.hear()
        yield receiver, sender


def run_once(kind: Kind, folder: Path, options: dict[str, Any], expected: str, idle_s: float) -> dict[str, Any]:
    """One repetition: GB/s and CPU seconds a GB, and what the receiver used before while nothing came. Raises
    PeerError."""
    found: dict[str, Any] = {}
    try:
        with connected(kind, folder, options) as (receiver, sender):
            if idle_s:
                receiver.say(idle_s=idle_s)
                found["idle_receiver_percent"] = 100 * receiver.hear()["cpu_s"] / idle_s
            receiver.say(count=True)
            receiver.hear()
            sender.say(go=True)
            sent = sender.hear()
            receiver.say(done=True)
            received = receiver.hear()
    except (TimeoutError, subprocess.TimeoutExpired) as error:
        raise PeerError(str(error)) from None
    if received["sha256"] not in (None, expected):
        raise PeerError("the receiver's memory is not what was sent")
    gigabytes = options["bytes"] / 1e9
    return {
        **found,
        "gb_per_s": gigabytes / sent["seconds"],
        "sender_cpu_s_per_gb": sent["cpu_s"] / gigabytes,
        "receiver_cpu_s_per_gb": received["cpu_s"] / gigabytes,
    }


def listening_on(pid: int) -> list[str]:
    """Addresses on which the process listens, port by port ("127.0.0.1:80")."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(str(link.readlink()))
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
            host, port = fields[1].split(":")
            found.append(f"{'.'.join(str(byte) for byte in reversed(bytes.fromhex(host)))}:{int(port, 16)}")
    return sorted(found)
