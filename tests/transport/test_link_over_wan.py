"""LinkEstimate against an emulated WAN whose rate and loss change while it runs."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import pytest
from prfaas.transport.api import LinkEstimate
from prfaas.transport.lanes import tcp_info
from prfaas.transport.link import LinkEstimator

from tests.wan_link import TCP_PAYLOAD_SHARE, WanLink, missing, wan_link

pytestmark = [
    pytest.mark.netns,
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

PORT = 5000
LANES = 3
CHUNK = bytes(64 << 10)
TICK_S = 0.25
PATIENCE_S = 20.0


class Traffic:
    """Chunks as fast as the link takes them, on some connections; the far side acknowledges each with a byte."""

    def __init__(self, link: WanLink) -> None:
        self.estimator = LinkEstimator()
        self._lock = threading.Lock()
        self._stopped = False
        self._threads: list[threading.Thread] = []
        with link.near.socket() as server:
            server.bind((link.near.address, PORT))
            server.listen()
            self._sending = [link.far.socket() for _ in range(LANES)]
            for sock in self._sending:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")
                before_s = time.monotonic()
                sock.connect((link.near.address, PORT))
                self.estimator.ping(time.monotonic() - before_s, time.monotonic())
            self._receiving = [server.accept()[0] for _ in range(LANES)]
        for sending in self._sending:
            sent_at_s: deque[float] = deque()
            self._start(self._send, sending, sent_at_s)
            self._start(self._take_acknowledgements, sending, sent_at_s)
        for receiving in self._receiving:
            self._start(self._acknowledge, receiving)

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        def quietly() -> None:
            with contextlib.suppress(OSError):
                run(*arguments)

        thread = threading.Thread(target=quietly)
        thread.start()
        self._threads.append(thread)

    def _send(self, sock: socket.socket, sent_at_s: deque[float]) -> None:
        while not self._stopped:
            with self._lock:
                self.estimator.supplied(time.monotonic())
            sent_at_s.append(time.monotonic())
            sock.sendall(CHUNK)

    def _acknowledge(self, sock: socket.socket) -> None:
        target = bytearray(len(CHUNK))
        while sock.recv_into(target, len(CHUNK), socket.MSG_WAITALL) == len(CHUNK):
            sock.sendall(b"!")

    def _take_acknowledgements(self, sock: socket.socket, sent_at_s: deque[float]) -> None:
        while acknowledged := sock.recv(1000):
            with self._lock:
                for _ in acknowledged:
                    self.estimator.acknowledged(len(CHUNK), sent_at_s.popleft(), time.monotonic())

    def estimate(self) -> LinkEstimate:
        now_s = time.monotonic()
        samples = {lane: tcp_info.read(sock) for lane, sock in enumerate(self._sending)}
        with self._lock:
            self.estimator.lanes({lane: sample for lane, sample in samples.items() if sample is not None}, now_s)
            self.estimator.queue(len(CHUNK), 0, now_s)
            return self.estimator.estimate(now_s)

    def wait_for(self, what: str, reached: Callable[[LinkEstimate], bool]) -> LinkEstimate:
        deadline_s = time.monotonic() + PATIENCE_S
        while not reached(found := self.estimate()):
            if time.monotonic() > deadline_s:
                pytest.fail(f"not within {PATIENCE_S:g} s: {what}; the last estimate: {found}")
            time.sleep(TICK_S)  # a session's tick, not a wait: each look at the lanes is one
        return found

    def close(self) -> None:
        self._stopped = True
        for sock in self._sending + self._receiving:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sending + self._receiving:
            sock.close()


@pytest.fixture
def link() -> Iterator[WanLink]:
    """Its queue is long enough for bbr, which loses nothing by itself then."""
    with wan_link(rate_bits_per_s=40e6, rtt_s=0.04, queue_bytes=1 << 20, offload=False) as made:
        yield made


@pytest.fixture
def traffic(link: WanLink) -> Iterator[Traffic]:
    made = Traffic(link)
    yield made
    made.close()


def near(rate_bits_per_s: float) -> Callable[[LinkEstimate], bool]:
    payload = rate_bits_per_s / 8 * TCP_PAYLOAD_SHARE
    return lambda found: found.bandwidth_bytes_per_s == pytest.approx(payload, rel=0.12)


def test_the_estimate_follows_rate_and_loss(link: WanLink, traffic: Traffic) -> None:
    """Under load: the bandwidth follows the link down and up again, the loss as it comes and goes, the round trip as
    the way becomes longer."""
    found = traffic.wait_for("40 Mbit/s", near(40e6))
    assert 0.04 <= found.min_rtt_s < 0.06
    assert found.utilisation > 0.9
    link.change(rate_bits_per_s=10e6)
    traffic.wait_for("10 Mbit/s", near(10e6))
    link.change(rate_bits_per_s=40e6)
    traffic.wait_for("40 Mbit/s again", near(40e6))
    link.change(loss=0.02)
    traffic.wait_for("two percent are lost", lambda found: 0.015 < found.loss < 0.03)
    link.change(loss=0.0)
    traffic.wait_for("nothing is lost", lambda found: found.loss < 0.005)
    link.change(delay_s=0.06)
    traffic.wait_for("the way is longer", lambda found: found.rtt_s >= 0.12)
