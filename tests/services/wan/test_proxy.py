"""The emulated WAN: its arithmetic with a made-up clock, and real sockets through a real process."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.services.wan.proxy import Bottleneck, Ring, WanSettings

DELAY_MS = 30.0
TIMEOUT_S = 20.0


class TestBottleneck:
    def test_bytes_arrive_after_their_time_on_the_line_and_the_delay(self) -> None:
        """1,000 bytes at 1,000 bytes/s and 0.5 s of delay arrive 1.5 s after they were ready."""
        assert Bottleneck(1000.0, 0.5, 1000).enter(10.0, 1000) == 11.5

    def test_all_sources_share_the_line(self) -> None:
        """A second load that is ready at the same instant waits for the first one."""
        line = Bottleneck(1000.0, 0.0, 1000)
        assert line.enter(0.0, 500) == 0.5
        assert line.enter(0.0, 500) == 1.0

    def test_an_idle_line_saves_nothing_up(self) -> None:
        """After a pause a load takes as long as before it."""
        line = Bottleneck(1000.0, 0.0, 1000)
        line.enter(0.0, 500)
        assert line.enter(100.0, 500) == 100.5

    @given(st.lists(st.tuples(st.floats(0, 0.2), st.integers(1, 100_000)), min_size=1, max_size=50))
    def test_the_rate_and_the_order_always_hold(self, loads: list[tuple[float, int]]) -> None:
        """Whatever comes when: arrivals are in order, none is early, and no window carries more than the rate."""
        line, now, arrivals = Bottleneck(1e6, 0.02, 20_000), 0.0, []
        for pause_s, size in loads:
            now += pause_s
            arrivals.append((now, line.enter(now, size), size))
        ends = [end for _, end, _ in arrivals]
        assert ends == sorted(ends)
        for start, (ready_s, _, _) in enumerate(arrivals):
            carried = 0
            for _, end_s, size in arrivals[start:]:
                carried += size
                assert end_s >= ready_s + carried / 1e6 + 0.02 - 1e-6

    def test_there_is_room_again_when_the_queue_has_drained(self) -> None:
        line = Bottleneck(1000.0, 0.0, queue_bytes=100)
        line.enter(0.0, 500)
        assert line.room_at() == pytest.approx(0.4)

    def test_another_rate_holds_for_what_comes_after(self) -> None:
        """What is on the line arrives as it would have; the queue is as many bytes as before, at the new rate."""
        line = Bottleneck(1000.0, 0.0, queue_bytes=100)
        assert line.enter(0.0, 500) == 0.5
        line.change(100.0, queue_bytes=10)
        assert line.enter(0.0, 50) == 1.0
        assert line.room_at() == pytest.approx(0.9)


class TestRing:
    @given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=100))
    def test_what_goes_in_comes_out(self, steps: list[tuple[bool, int]]) -> None:
        """Any sequence of partial writes and reads leaves the bytes as they were and in order."""
        ring, rng, written, read = Ring(64), random.Random(1), b"", b""
        for write, size in steps:
            if write:
                space = ring.free(size)
                space[:] = data = rng.randbytes(len(space))
                ring.filled(len(space))
                written += data
            else:
                head = ring.head(size)
                read += bytes(head)
                ring.drop(len(head))
            assert ring.used == len(written) - len(read) <= 64
        assert written.startswith(read)

    def test_a_full_ring_gives_no_space(self) -> None:
        ring = Ring(8)
        ring.filled(len(ring.free(100)))
        assert len(ring.free(1)) == 0


def test_a_connection_has_room_for_all_that_is_in_flight() -> None:
    """The ring holds rate × delay + queue, so that one connection can fill the line."""
    settings = WanSettings(bytes_per_s=62.5e6, delay_s=0.1, queue_s=0.02)
    assert settings.ring_bytes >= 62.5e6 * 0.12


class WanProcess:
    """A running WAN, and a listener behind each of its two directions."""

    def __init__(self, rate_mbit: float, *, most_files: int = 1024) -> None:
        self.home, self.remote = _listener(), _listener()
        command = [sys.executable, "-m", "prfaas.services.wan.proxy", "--rate-mbit", str(rate_mbit)]
        command += ["--delay-ms", str(DELAY_MS)]
        command += ["--forward", f"127.0.0.1:0=127.0.0.1:{self.home.getsockname()[1]}"]
        command += ["--backward", f"127.0.0.1:0=127.0.0.1:{self.remote.getsockname()[1]}"]
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            nobody = unused.getsockname()[1]
        command += ["--forward", f"127.0.0.1:0=127.0.0.1:{nobody}"]
        # The shell's builtin: a function between fork and exec is not safe in a process with threads.
        command = ["sh", "-c", f'ulimit -n {most_files}; exec "$@"', "sh", *command]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        word, _, ports = self.process.stdout.readline().partition(" ")
        assert word == "READY"
        self.to_home, self.to_nobody, self.to_remote = json.loads(ports)["ports"]

    def join(self, port: int, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
        """A connection through the WAN: both of its ends."""
        client = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
        listener.settimeout(TIMEOUT_S)
        server, _ = listener.accept()
        server.settimeout(TIMEOUT_S)
        return client, server

    def cpu_s(self) -> float:
        """User and system time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> str:
        """What was still to be read on stderr."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=TIMEOUT_S)
        assert self.process.returncode == 0
        self.home.close()
        self.remote.close()
        return errors


def _listener() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.settimeout(TIMEOUT_S)
    listener.listen()
    return listener


@pytest.fixture(scope="module")
def wan() -> Iterator[WanProcess]:
    running = WanProcess(rate_mbit=800)
    yield running
    running.stop()


async def _pump(sock: socket.socket, data: bytes) -> bytes:
    """Send `data` and half-close, and read to the end meanwhile."""
    sock.settimeout(None)
    sock.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=sock)

    async def send() -> None:
        writer.write(data)
        await writer.drain()
        writer.write_eof()

    received, _ = await asyncio.gather(reader.read(-1), send())
    writer.close()
    return received


async def test_bytes_cross_both_ways_unchanged_over_several_connections(wan: WanProcess) -> None:
    """Four connections, two dialled from each side, each carrying megabytes both ways at once, then FIN both ways."""
    rng = random.Random(7)
    ends = [wan.join(wan.to_home, wan.home) for _ in range(2)] + [wan.join(wan.to_remote, wan.remote) for _ in range(2)]
    payloads = [(rng.randbytes(3_000_001), rng.randbytes(1_000_003)) for _ in ends]
    jobs = [
        job
        for (client, server), (out, back) in zip(ends, payloads, strict=True)
        for job in (_pump(client, out), _pump(server, back))
    ]
    async with asyncio.timeout(TIMEOUT_S):
        received = await asyncio.gather(*jobs)
    for index, (out, back) in enumerate(payloads):
        at_client, at_server = received[2 * index], received[2 * index + 1]
        assert hashlib.sha256(at_server).digest() == hashlib.sha256(out).digest()
        assert hashlib.sha256(at_client).digest() == hashlib.sha256(back).digest()


def test_nothing_is_early(wan: WanProcess) -> None:
    """The first byte takes three delays (handshake and way), later ones one."""
    start_s = time.monotonic()
    client, server = wan.join(wan.to_home, wan.home)
    client.sendall(b"x")
    assert server.recv(1) == b"x"
    assert time.monotonic() - start_s >= 3 * DELAY_MS / 1e3 - 0.002
    start_s = time.monotonic()
    server.sendall(b"y")
    assert client.recv(1) == b"y"
    assert time.monotonic() - start_s >= DELAY_MS / 1e3 - 0.002
    client.close()
    server.close()


def test_a_half_closed_connection_still_carries_the_answer(wan: WanProcess) -> None:
    client, server = wan.join(wan.to_home, wan.home)
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    with server.makefile("rb") as file:
        assert file.read() == b"question"
    server.sendall(b"answer")
    server.close()
    with client.makefile("rb") as file:
        assert file.read() == b"answer"
    client.close()


@pytest.mark.parametrize("resetting", ["client", "server"])
def test_a_reset_reaches_the_other_side(wan: WanProcess, resetting: str) -> None:
    """A peer that dies with unread data (RST) is a reset there too, not a clean end."""
    client, server = wan.join(wan.to_home, wan.home)
    client.sendall(b"x")
    assert server.recv(1) == b"x"
    dying, other = (client, server) if resetting == "client" else (server, client)
    dying.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    dying.close()
    with pytest.raises(ConnectionResetError):
        other.recv(1)
    other.close()


def test_an_end_that_vanished_resets_a_sender_in_full_flow(wan: WanProcess) -> None:
    """The receiver closes in the middle of a transfer: the sender gets an error, and the WAN carries on for others."""
    client, server = wan.join(wan.to_home, wan.home)
    client.sendall(bytes(100_000))
    assert server.recv(1)
    server.close()
    endless = bytes(1 << 30)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        client.sendall(endless)
    client.close()
    client, server = wan.join(wan.to_home, wan.home)
    client.sendall(b"still here")
    assert server.recv(100) == b"still here"
    client.close()
    server.close()


def test_a_target_that_is_not_there_is_a_reset(wan: WanProcess) -> None:
    client = socket.create_connection(("127.0.0.1", wan.to_nobody), timeout=TIMEOUT_S)
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    client.close()


def test_the_rate_changes_at_a_signal(tmp_path: Path) -> None:
    """Read from the file again; a file that holds none changes nothing, and is told."""
    rate = tmp_path / "rate"
    rate.write_text("800\n")
    command = [sys.executable, "-m", "prfaas.services.wan.proxy", "--rate-file", str(rate), "--delay-ms", "0"]
    with (
        _listener() as listener,
        subprocess.Popen(
            [*command, "--forward", f"127.0.0.1:0=127.0.0.1:{listener.getsockname()[1]}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        [port] = json.loads(process.stdout.readline().partition(" ")[2])["ports"]
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as client, listener.accept()[0] as server:
            rate.write_text("1")
            process.send_signal(signal.SIGHUP)
            assert process.stdout.readline() == 'RATE {"mbit": 1.0}\n'
            rate.write_text("fast")
            process.send_signal(signal.SIGHUP)
            assert "the rate stays" in process.stderr.readline()
            began_s = time.monotonic()
            client.sendall(bytes(60_000))
            received = 0
            while received < 60_000:
                received += len(server.recv(60_000))
            assert time.monotonic() - began_s >= 60_000 / 125_000 - 0.05
        process.terminate()


def test_without_descriptors_clients_wait_for_some() -> None:
    """More clients than the process has descriptors for: one line with the mend, no busy loop, and every client is
    served in the end, when others have gone."""
    wan = WanProcess(rate_mbit=800, most_files=40)
    clients = [socket.create_connection(("127.0.0.1", wan.to_home), timeout=TIMEOUT_S) for _ in range(60)]
    assert wan.process.stderr is not None
    assert "(ulimit -n)" in wan.process.stderr.readline()
    before_s = wan.cpu_s()
    time.sleep(0.5)
    assert wan.cpu_s() - before_s < 0.2  # a busy loop takes all that it gets
    for number, client in enumerate(clients):
        client.sendall(bytes([number]))
        client.shutdown(socket.SHUT_WR)
    seen = set()
    for _ in clients:
        server, _ = wan.home.accept()
        with server:
            server.settimeout(TIMEOUT_S)
            seen.add(server.recv(1)[0])
    assert seen == set(range(60))
    for client in clients:
        client.close()
    assert wan.stop() == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "nothing to forward"),
        (["--forward", "9000"], "must look like host:port=host:port"),
        (["--forward", "127.0.0.1:0=127.0.0.1:9", "--rate-mbit", "0"], "must be above 0"),
        (["--forward", "127.0.0.1:0=127.0.0.1:9", "--delay-ms", "-1"], "must not be negative"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: list[str], complaint: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prfaas.services.wan.proxy", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert complaint in done.stderr
