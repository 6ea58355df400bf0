"""Both halves of a transfer over lanes that die at any moment, as a model: no sockets, every interleaving by a seed."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.kv_layout import KvLayout, LayerLayout, TensorKind, TensorLayout, TokenRange
from prfaas.transport.api import KvPiece, TransferSpec
from prfaas.transport.frames import HEADER, FrameHeader, encode_chunk_header
from prfaas.transport.transfer import Cut, Placement, ReceivingTransfer, SendingTransfer, Standing

LAYOUT = KvLayout(
    (
        LayerLayout(tuple(TensorLayout(kind, "bfloat16", 2, (4,)) for kind in (TensorKind.KEY, TensorKind.VALUE))),
        LayerLayout((TensorLayout(TensorKind.RECURRENT, "float32", 1, (10, 3)),)),
    )
)
SPEC = TransferSpec("0" * 32, "r", TokenRange(3, 40), 41, 1, "f", LAYOUT.layout_hash)
MAX_DEATHS = 12
"""Fewer than a chunk may lose lanes."""


def header(cut: Cut) -> FrameHeader:
    size = len(cut.data)
    return FrameHeader._make(HEADER.unpack(encode_chunk_header(1, cut.sequence, cut.place, size, size, 0, 0, cut.copy)))


@dataclass(eq=False)
class Lane:
    queue: deque[Cut] = field(default_factory=deque)
    receiving: Cut | None = None
    drained: bool = False
    """What it is receiving goes to the sink."""
    dead: bool = False
    sender_knows: bool = False
    receiver_knows: bool = False


class Model:
    """What session and shells do with the two states, one small step at a time."""

    def __init__(self, seed: int, chunk: int, window: int, damage: float) -> None:
        self.rng = random.Random(seed)
        self.damage = damage
        self.sender, self.receiver = SendingTransfer(LAYOUT, SPEC, chunk), ReceivingTransfer(LAYOUT, SPEC, window)
        self.lanes = [Lane() for _ in range(self.rng.randrange(1, 5))]
        self.lane_of: dict[int, Lane] = {}
        self.checking: list[tuple[Lane, Cut]] = []
        self.acknowledge_on: dict[int, Lane] = {}
        self.hurt: set[tuple[int, int, int, int]] = set()
        self.memory: dict[tuple[int, int, int, int], int] = {}
        self.layers: list[int] = []
        self.deaths = 0

    def run(self) -> None:
        steps = (self.send, self.head, self.body, self.check, self.die, self.sender_notices, self.receiver_notices)
        for _ in range(200_000):
            if not list(self.sender.unacknowledged) and self.sender.next_bytes == 0 and self.sender.ready_bytes == 0:
                return
            self.rng.choice(steps)()
        raise AssertionError("the transfer came to a stop")

    def some(self, *, alive: bool = True) -> Lane:
        return self.rng.choice([lane for lane in self.lanes if not (alive and lane.sender_knows)])

    def send(self) -> None:
        lane = self.some()
        cut = self.sender.next_chunk()
        if cut is None:
            return
        self.lane_of[cut.sequence] = lane
        if self.rng.random() < 0.9:  # else it is acknowledged, or the lane dies, in the middle of the write
            self.sender.sent(cut.sequence)
        lane.queue.append(cut)

    def head(self) -> None:
        lane = self.some(alive=False)
        if lane.receiver_knows or lane.receiving is not None or not lane.queue:
            return
        cut = lane.queue.popleft()
        placement = self.receiver.place(header(cut), lane)
        if placement is Placement.TAKEN_OVER:
            (old,) = (at for at in self.lanes if at.receiving and at.receiving.place == cut.place and not at.drained)
            old.drained = True
        lane.receiving, lane.drained = cut, placement is Placement.DUPLICATE

    def body(self) -> None:
        lane = self.some(alive=False)
        cut = lane.receiving
        if cut is None or lane.dead:
            return
        lane.receiving = None
        if not lane.drained:
            self.receiver.received(header(cut))
            self.checking.append((lane, cut))
            return
        standing = self.receiver.standing(header(cut))
        if standing is Standing.CHECKING:
            self.acknowledge_on[cut.sequence] = lane
        elif standing is not Standing.RECEIVING:
            self.acknowledge(lane, cut, good=standing is Standing.HELD)

    def check(self) -> None:
        if not self.checking:
            return
        lane, cut = self.checking.pop(self.rng.randrange(len(self.checking)))
        lane = self.acknowledge_on.pop(cut.sequence, lane)
        if self.rng.random() < self.damage and cut.place not in self.hurt:
            self.hurt.add(cut.place)
            self.receiver.damaged(header(cut))
            self.acknowledge(lane, cut, good=False)
            return
        self.memory[cut.place] = self.memory.get(cut.place, 0) + len(cut.data)
        if self.receiver.arrived(header(cut)):
            self.layers.append(cut.layer)
        self.acknowledge(lane, cut, good=True)

    def acknowledge(self, lane: Lane, cut: Cut, *, good: bool) -> None:
        if lane.dead:
            return
        self.lane_of.pop(cut.sequence, None)
        if good:
            self.sender.acknowledged([cut.sequence])
        else:
            self.sender.damaged([cut.sequence])
        if (granted := self.receiver.credit_due()) is not None:
            self.sender.grant(granted)

    def die(self) -> None:
        if self.deaths < MAX_DEATHS and self.rng.random() < 0.2:
            self.deaths += 1
            self.some(alive=False).dead = True

    def sender_notices(self) -> None:
        lane = self.some(alive=False)
        if not lane.dead or lane.sender_knows:
            return
        lane.sender_knows = True
        lost = [sequence for sequence, at in self.lane_of.items() if at is lane]
        for sequence in lost:
            del self.lane_of[sequence]
        self.sender.lost(lost)
        self.lanes.append(Lane())

    def receiver_notices(self) -> None:
        lane = self.some(alive=False)
        if not lane.dead or lane.receiver_knows or len([at for at in self.lanes if not at.dead]) == 0:
            return
        lane.receiver_knows = True
        lane.receiving = None
        self.receiver.lane_lost(lane)
        self.sender.grant(self.receiver.granted_bytes)  # CREDIT is repeated
        if lane.sender_knows:
            self.lanes.remove(lane)


@given(
    chunk=st.integers(16, 400),
    window=st.integers(64, 4000),
    seed=st.integers(0, 1 << 32),
    damage=st.floats(0, 0.3),
)
@settings(max_examples=300, deadline=None)
def test_lanes_may_die_at_any_moment(chunk: int, window: int, seed: int, damage: float) -> None:
    """Chunks on any of several lanes, lanes that die with chunks queued, half received or being checked, each side
    noticing when it will, damage between: every byte is written once, each layer completes once, credit never leaks
    away and is never exceeded, and FINISH becomes due."""
    model = Model(seed, chunk, window, damage)
    model.sender.opened(window)
    model.sender.put(
        KvPiece(layer, tensor, row, 0, memoryview(bytes(extent.row_bytes)))
        for layer, tensors in enumerate(LAYOUT.extents(SPEC.tokens, SPEC.shard))
        for tensor, extent in enumerate(tensors)
        for row in range(extent.rows)
    )
    model.sender.finish()
    model.run()
    assert sum(model.memory.values()) == LAYOUT.total_bytes(SPEC.tokens)
    assert sorted(model.layers) == [0, 1]
    assert model.sender.finish_due
