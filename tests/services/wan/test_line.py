"""The line's rules, without a network."""

import random

import pytest
from prfaas.services.wan.line import VIRTIO_HEADER, Conditions, Line, Packet
from prfaas.services.wan.settings import LEAST_QUEUE_BYTES, Change, Settings, changed

MBIT_1 = Conditions(rate_bits_per_s=1e6, delay_s=0.5, queue_bytes=1 << 20)


def packet(name: bytes = b"p", nbytes: int = 1250, segments: int = 1) -> Packet:
    return Packet(name, nbytes, segments)


def line() -> Line:
    return Line(random.Random(0))


def test_a_packet_takes_the_time_of_its_bytes_and_the_delay() -> None:
    """1,250 bytes at 1 Mbit/s are 10 ms; what comes meanwhile waits for its turn."""
    carried = line()
    carried.enter(packet(b"first"), MBIT_1, 100.0)
    carried.enter(packet(b"second"), MBIT_1, 100.0)
    assert carried.next_s == pytest.approx(100.51)
    assert list(carried.arrived(100.509)) == []
    assert list(carried.arrived(100.511)) == [b"first"]
    assert list(carried.arrived(100.521)) == [b"second"]
    assert carried.counters().packet_bytes == 2500


def test_a_full_queue_drops() -> None:
    narrow = Conditions(rate_bits_per_s=1e6, queue_bytes=2000)
    carried = line()
    for _ in range(5):
        carried.enter(packet(), narrow, 0.0)
    assert (carried.counters().overflowed, len(list(carried.arrived(10.0)))) == (3, 2)


def test_jitter_delays_and_does_not_reorder() -> None:
    shaky = Conditions(rate_bits_per_s=1e9, jitter_s=0.1, queue_bytes=1 << 20)
    carried = line()
    sent = [str(i).encode() for i in range(50)]
    for name in sent:
        carried.enter(packet(name), shaky, 0.0)
    last_s = carried.next_s
    assert last_s is not None
    assert list(carried.arrived(1.0)) == sent
    assert last_s > 0.0001


def test_loss_is_of_packets_on_the_wire() -> None:
    """A bunch of ten is lost when one of its ten is, since it can only be lost whole."""
    lossy = Conditions(rate_bits_per_s=1e12, loss=0.1, queue_bytes=1 << 30)
    single, bunched = line(), line()
    for _ in range(5000):
        single.enter(packet(), lossy, 0.0)
        bunched.enter(packet(segments=10), lossy, 0.0)
    assert single.counters().lost / 5000 == pytest.approx(0.1, abs=0.02)
    assert bunched.counters().lost / 50_000 == pytest.approx(1 - 0.9**10, abs=0.03)


def test_a_line_that_is_down_loses_all_and_keeps_what_is_under_way() -> None:
    carried = line()
    carried.enter(packet(b"before"), MBIT_1, 0.0)
    carried.enter(packet(b"after"), Conditions(down=True), 0.0)
    assert list(carried.arrived(9.0)) == [b"before"]
    assert carried.counters().lost == 1


@pytest.mark.parametrize(
    ("gso_type", "segment_bytes", "nbytes", "segments"),
    [(0, 0, 4054, 1), (1, 1000, 4054 + 3 * 54, 4), (1, 0, 4054, 1)],
)
def test_a_bunch_counts_as_the_packets_that_it_becomes(
    gso_type: int, segment_bytes: int, nbytes: int, segments: int
) -> None:
    """4,000 bytes of payload behind 54 of headers; each further segment has headers of its own."""
    header = VIRTIO_HEADER.pack(0, gso_type, 54, segment_bytes, 0, 0)
    found = Packet.of(header + bytes(4054), offload=True)
    assert (found.nbytes, found.segments) == (nbytes, segments)


def test_a_change_leaves_what_it_does_not_name() -> None:
    before = Settings(rate_mbit=100, delay_ms=10, loss_percent=1)
    after = changed(before, Change(rate_mbit=40, down=True))
    assert after == Settings(rate_mbit=40, delay_ms=10, loss_percent=1, down=True)
    assert changed(after, Change()) == after


def test_the_queue_is_a_round_trip_unless_it_is_set() -> None:
    assert Settings(rate_mbit=800, delay_ms=50).conditions().queue_bytes == 10_000_000
    assert Settings(rate_mbit=1, delay_ms=1).conditions().queue_bytes == LEAST_QUEUE_BYTES
    assert Settings(rate_mbit=800, delay_ms=50, queue_bytes=5).conditions().queue_bytes == 5
