"""What leaves, what has arrived, what may be granted: the two halves against each other."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.errors import ChecksumError, ProtocolError
from prfaas.common.kv_layout import KvLayout, LayerLayout, TensorKind, TensorLayout, TokenRange
from prfaas.transport.api import KvPiece, TransferSpec
from prfaas.transport.frames import HEADER, FrameHeader, encode_chunk_header
from prfaas.transport.transfer import ByteRanges, Cut, Placement, ReceivingTransfer, SendingTransfer, Standing

KEY_AND_VALUE = tuple(TensorLayout(kind, "bfloat16", 2, (4,)) for kind in (TensorKind.KEY, TensorKind.VALUE))
STATE = TensorLayout(TensorKind.RECURRENT, "float32", 1, (10, 3))
LAYOUT = KvLayout((LayerLayout(KEY_AND_VALUE), LayerLayout(()), LayerLayout((STATE,))))
SPEC = TransferSpec("0" * 32, "r", TokenRange(3, 40), 41, 1, "f", LAYOUT.layout_hash)
ROW_BYTES = 37 * 8


def header(cut: Cut) -> FrameHeader:
    size = len(cut.data)
    return FrameHeader._make(HEADER.unpack(encode_chunk_header(1, cut.sequence, cut.place, size, size, 0, 0, cut.copy)))


def rows() -> list[tuple[int, int, int, int]]:
    return [
        (layer, tensor, row, extent.row_bytes)
        for layer, tensors in enumerate(LAYOUT.extents(SPEC.tokens, SPEC.shard))
        for tensor, extent in enumerate(tensors)
        for row in range(extent.rows)
    ]


def pieces(step: int) -> list[KvPiece]:
    return [
        KvPiece(layer, tensor, row, offset, memoryview(bytes(min(step, size - offset))))
        for layer, tensor, row, size in rows()
        for offset in range(0, size, step)
    ]


@given(
    step=st.integers(8, 400),
    chunk=st.integers(16, 400),
    window=st.integers(64, 4000),
    seed=st.integers(0, 1 << 32),
    damage=st.floats(0, 0.5),
)
@settings(max_examples=150, deadline=None)
def test_everything_arrives_once_whatever_the_order_and_the_credit(
    step: int, chunk: int, window: int, seed: int, damage: float
) -> None:
    """Pieces in any order, any chunk size and window, chunks that overtake one another, damage now and then: all bytes
    arrive, each layer completes once, credit is never exceeded and never runs dry."""
    rng = random.Random(seed)
    sender, receiver = SendingTransfer(LAYOUT, SPEC, chunk), ReceivingTransfer(LAYOUT, SPEC, window)
    sender.opened(window)
    all_pieces = pieces(step)
    rng.shuffle(all_pieces)
    sender.put(all_pieces)
    sender.finish()
    on_wire: list[Cut] = []
    hurt: set[tuple[int, int, int, int]] = set()
    layers, arrived = receiver.empty_layers(), 0
    while True:
        while (cut := sender.next_chunk()) is not None:
            sender.sent(cut.sequence)
            on_wire.append(cut)
        if not on_wire:
            break
        cut = on_wire.pop(rng.randrange(len(on_wire)))
        assert receiver.place(header(cut), "lane") is Placement.NEW
        receiver.received(header(cut))
        if rng.random() < damage and cut.place not in hurt:
            hurt.add(cut.place)
            receiver.damaged(header(cut))
            sender.damaged([cut.sequence])
        else:
            arrived += len(cut.data)
            layers += [cut.layer] if receiver.arrived(header(cut)) else []
            sender.acknowledged([cut.sequence])
        if (granted := receiver.credit_due()) is not None:
            sender.grant(granted)
    assert arrived == LAYOUT.total_bytes(SPEC.tokens)
    assert sorted(layers) == [0, 1, 2]
    assert sender.finish_due
    assert not list(sender.unacknowledged)
    assert not receiver.complete
    receiver.finish()
    assert receiver.complete


def test_layer_order_then_token_order_and_never_across_a_row() -> None:
    """Pieces leave by layer, then by token, whatever order they were put in."""
    sender = SendingTransfer(LAYOUT, SPEC, 100)
    sender.opened(1 << 30)
    sender.put(reversed(pieces(80)))
    cuts = []
    while (cut := sender.next_chunk()) is not None:
        cuts.append((cut.layer, cut.offset_bytes))
        assert len(cut.data) <= 100
    assert cuts == sorted(cuts)


def test_finish_waits_for_the_last_byte_and_refuses_gaps() -> None:
    """FINISH is due when all was put *and* handed to a socket; a missing byte is an error at once."""
    sender = SendingTransfer(LAYOUT, SPEC, 1 << 20)
    sender.opened(1 << 30)
    sender.put(pieces(1 << 20)[:-1])
    with pytest.raises(ValueError, match="bytes were put"):
        sender.finish()
    sender.put(pieces(1 << 20)[-1:])
    sender.finish()
    cuts = []
    while (cut := sender.next_chunk()) is not None:
        cuts.append(cut)
    for cut in cuts:
        assert not sender.finish_due
        sender.sent(cut.sequence)
    assert sender.finish_due


def test_pieces_that_do_not_fit_are_refused() -> None:
    """Outside the layout, the rows or a row's bytes."""
    sender = SendingTransfer(LAYOUT, SPEC, 100)
    for place in ((9, 0, 0, 0), (1, 0, 0, 0), (0, 2, 0, 0), (0, 0, 2, 0), (0, 0, 0, ROW_BYTES)):
        with pytest.raises(ValueError, match=r"layout|outside"):
            sender.put([KvPiece(*place, memoryview(b"x"))])


def chunk(offset: int, size: int, row: int = 0, layer: int = 0, copy: int = 0) -> FrameHeader:
    return header(Cut(1, layer, 0, row, offset, memoryview(bytes(size)), 1, copy))


def test_duplicates_overlaps_and_strays() -> None:
    """A range that is here (or on its way) is a duplicate; half of one, or a place outside, breaks the protocol."""
    receiver = ReceivingTransfer(LAYOUT, SPEC, 1 << 20)
    assert receiver.place(chunk(0, 100), 1) is Placement.NEW
    receiver.received(chunk(0, 100))
    assert receiver.place(chunk(0, 100), 2) is Placement.DUPLICATE
    assert receiver.standing(chunk(0, 100)) is Standing.CHECKING
    receiver.arrived(chunk(0, 100))
    assert receiver.place(chunk(0, 100), 1) is Placement.DUPLICATE
    assert receiver.standing(chunk(0, 100)) is Standing.HELD
    assert receiver.place(chunk(100, 50), 1) is Placement.NEW
    assert receiver.place(chunk(20, 120), 2) is Placement.DUPLICATE
    assert receiver.duplicate_chunks == 3
    with pytest.raises(ProtocolError, match="overlaps"):
        receiver.place(chunk(140, 20), 2)
    for stray in (chunk(ROW_BYTES - 1, 2), chunk(0, 1, row=2), chunk(0, 1, layer=1), chunk(0, 1, layer=7)):
        with pytest.raises(ProtocolError, match=r"outside|layout"):
            receiver.place(stray, 2)


def test_a_chunk_that_moved_to_another_lane_is_taken_over() -> None:
    """The sender has given a lane up that we still read from: the new lane gets the range, whole chunks only; when the
    old one is lost later, the range stays the new one's. What a lost lane had begun is free, and costs no credit."""
    receiver = ReceivingTransfer(LAYOUT, SPEC, 100)
    assert receiver.place(chunk(0, 100), "old") is Placement.NEW
    with pytest.raises(ProtocolError, match="another number"):
        receiver.place(chunk(0, 50), "new")
    assert receiver.place(chunk(0, 100, copy=1), "new") is Placement.TAKEN_OVER
    assert receiver.place(chunk(0, 100), "late") is Placement.DUPLICATE
    receiver.lane_lost("old")
    assert receiver.standing(chunk(0, 100)) is Standing.RECEIVING
    receiver.lane_lost("new")
    assert receiver.standing(chunk(0, 100)) is Standing.FREE
    assert receiver.place(chunk(0, 100), "newest") is Placement.NEW


def test_more_than_was_granted_breaks_the_protocol() -> None:
    """A sender that ignores credit can't make us hold more."""
    receiver = ReceivingTransfer(LAYOUT, SPEC, 100)
    receiver.place(chunk(0, 100), 1)
    with pytest.raises(ProtocolError, match="granted"):
        receiver.place(chunk(100, 1), 2)


def test_damage_twice_at_one_place_is_the_end() -> None:
    """On both sides."""
    receiver, sender = ReceivingTransfer(LAYOUT, SPEC, 1 << 20), SendingTransfer(LAYOUT, SPEC, 1 << 20)
    sender.opened(1 << 30)
    sender.put(pieces(1 << 20))
    for again in (False, True):
        cut = sender.next_chunk()
        assert cut is not None
        receiver.place(header(cut), 1)
        receiver.received(header(cut))
        if not again:
            receiver.damaged(header(cut))
            sender.damaged([cut.sequence])
            continue
        with pytest.raises(ChecksumError):
            receiver.damaged(header(cut))
        with pytest.raises(ChecksumError):
            sender.damaged([cut.sequence])


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.booleans()), max_size=40))
@settings(max_examples=200, deadline=None)
def test_byte_ranges_equal_a_set_of_bytes(steps: list[tuple[int, int, bool]]) -> None:
    """Model test: add what is wholly new, remove what is wholly in, compare every overlap."""
    ranges, model = ByteRanges(), set[int]()
    for start, size, add in steps:
        wanted = set(range(start, start + size))
        assert ranges.overlap(start, start + size) == len(wanted & model)
        if add and not wanted & model:
            ranges.add(start, start + size)
            model |= wanted
        elif not add and wanted <= model:
            ranges.remove(start, start + size)
            model -= wanted
