"""Which of several routers plans: one at most, and one soon where most of the nodes are alive."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.scheduling.planner_lease import DRIFT, REMEMBER_S, Grant, NodeCount, Vote, standing

LEASE_S = 15.0


def vote(holder: str = "", bid_s: float = 0.0, counted: int = 0, *, alive: bool = True) -> Vote:
    return Vote(holder, bid_s, counted, alive)


# -- a node -----------------------------------------------------------------------------------------------------------


def test_a_node_grants_to_one_router_until_its_lease_ends() -> None:
    grant = Grant(started_s=-100.0)
    grant.asked("a/1", 5.0, LEASE_S, 10.0)
    grant.asked("b/1", 6.0, LEASE_S, 11.0)
    assert (grant.to(24.9), grant.bid_s) == ("a/1", 5.0)
    assert grant.to(25.0) == ""
    grant.asked("b/1", 20.0, LEASE_S, 25.0)
    assert grant.to(26.0) == "b/1"


def test_a_bid_renews_and_one_that_was_overtaken_does_not() -> None:
    """The grant names the newest bid, since its router counts from that."""
    grant = Grant(started_s=-100.0)
    grant.asked("a/1", 5.0, LEASE_S, 10.0)
    grant.asked("a/1", 9.0, LEASE_S, 14.0)
    grant.asked("a/1", 7.0, LEASE_S, 15.0)
    assert (grant.bid_s, grant.to(28.9), grant.to(29.0)) == (9.0, "a/1", "")


def test_a_node_that_has_just_started_grants_nothing() -> None:
    """It may have granted to another one before."""
    grant = Grant(started_s=100.0)
    grant.asked("a/1", 1.0, LEASE_S, 114.9)
    assert grant.to(114.9) == ""
    grant.asked("a/1", 2.0, LEASE_S, 115.0)
    assert grant.to(115.0) == "a/1"


def test_the_largest_count_of_lately_holds() -> None:
    count = NodeCount()
    assert count.most(0.0) == 0
    count.told("a", 9, 0.0)
    count.told("b", 4, 1.0)
    assert count.most(REMEMBER_S - 0.1) == 9
    assert count.most(REMEMBER_S) == 4
    count.told("b", 3, 2.0)
    assert count.most(REMEMBER_S) == 3


# -- a router ---------------------------------------------------------------------------------------------------------


def test_more_than_half_of_the_nodes_make_a_holder() -> None:
    """For so long as that many grants last, counted from the bids."""
    votes = [vote("a/1", 10.0), vote("a/1", 12.0), vote(), vote()]
    assert not standing("a/1", votes, LEASE_S, 13.0).holds(13.0)
    seen = standing("a/1", [*votes[:3], vote("a/1", 11.0)], LEASE_S, 13.0)
    assert (seen.holder, seen.grants, seen.needed) == ("a/1", 3, 3)
    assert seen.until_s == pytest.approx(10.0 + LEASE_S * (1 - DRIFT))
    assert seen.holds(24.0)
    assert not seen.holds(seen.until_s)


def test_lost_nodes_and_those_that_others_see_count_too() -> None:
    """A router that is cut off with a few of the nodes, or has just begun among them, has no majority."""
    granted = [vote("a/1", 10.0)] * 2
    assert standing("a/1", granted, LEASE_S, 11.0).holds(11.0)
    assert not standing("a/1", [*granted, *[vote(alive=False)] * 2], LEASE_S, 11.0).holds(11.0)
    assert not standing("a/1", [vote("a/1", 10.0, 4)] * 2, LEASE_S, 11.0).holds(11.0)


def test_a_router_asks_unless_another_one_is_ahead() -> None:
    """With equals, the first by name goes on."""
    assert standing("b/1", [vote(), vote()], LEASE_S, 0.0).bids
    split = [vote("a/1", 1.0), vote("b/1", 1.0)]
    assert standing("a/1", split, LEASE_S, 2.0).bids
    assert not standing("b/1", split, LEASE_S, 2.0).bids
    assert standing("b/1", [*split, vote("b/1", 1.0)], LEASE_S, 2.0).bids
    assert standing("b/1", split, LEASE_S, 2.0).holder == "a/1"


def test_a_router_without_enough_living_nodes_does_not_ask() -> None:
    """It could not win, and would keep others from it."""
    assert not standing("a/1", [vote(), vote(alive=False)], LEASE_S, 0.0).bids
    assert not standing("a/1", [], LEASE_S, 0.0).bids


class World:
    """Routers and nodes with clocks of their own; heartbeats and answers take their time and may be lost."""

    def __init__(self, routers: int, nodes: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.names = [f"r{i}/1" for i in range(routers)]
        self.offset = {name: self.rng.uniform(0, 1e5) for name in self.names}
        self.speed = {name: self.rng.uniform(1 - DRIFT / 3, 1 + DRIFT / 3) for name in self.names}
        self.grants = [Grant(-LEASE_S) for _ in range(nodes)]
        self.counts = [NodeCount() for _ in range(nodes)]
        self.votes: dict[str, dict[int, tuple[Vote, float]]] = {name: {} for name in self.names}
        self.post: list[tuple[float, object]] = []
        self.cut: set[tuple[str, int]] = set()

    def clock(self, name: str) -> float:
        return self.offset[name] + self.now_s * self.speed[name]

    def seen(self, name: str) -> list[Vote]:
        clock = self.clock(name)
        return [
            Vote(vote.holder, vote.bid_s, vote.counted, clock - at_s < 10.0) for vote, at_s in self.votes[name].values()
        ]

    def standing(self, name: str):
        return standing(name, self.seen(name), LEASE_S, self.clock(name))

    def beat(self, node: int, name: str) -> None:
        """A heartbeat and its answer, each of which arrives later or never."""
        if (name, node) in self.cut or self.rng.random() < 0.1:
            return
        grant = self.grants[node]
        vote = Vote(grant.to(self.now_s), grant.bid_s, self.counts[node].most(self.now_s), True)
        arrives_s = self.now_s + self.rng.uniform(0, 3)
        back_s = arrives_s + self.rng.uniform(0, 3)

        def heard() -> None:
            self.votes[name][node] = vote, self.clock(name)
            bid_s, bids, count = self.clock(name), self.standing(name).bids, len(self.votes[name])

            def answered() -> None:
                self.counts[node].told(name, count, self.now_s)
                if bids:
                    grant.asked(name, bid_s, LEASE_S, self.now_s)

            self.post.append((back_s, answered))

        self.post.append((arrives_s, heard))

    def step(self) -> None:
        self.now_s += 0.5
        for due in sorted((entry for entry in self.post if entry[0] <= self.now_s), key=lambda entry: entry[0]):
            self.post.remove(due)
            due[1]()  # type: ignore[operator]
        for node in range(len(self.grants)):
            for name in self.names:
                if self.rng.random() < 0.25:
                    self.beat(node, name)

    def holders(self) -> list[str]:
        return [name for name in self.names if self.standing(name).holds(self.clock(name))]


@settings(max_examples=60, deadline=None)
@given(routers=st.integers(1, 4), nodes=st.integers(1, 7), seed=st.integers(0, 1 << 30))
def test_never_two_holders_and_soon_one(routers: int, nodes: int, seed: int) -> None:
    """However heartbeats are late or lost, lines are cut, clocks differ and nodes restart; and once the lines are
    whole, one holds."""
    world = World(routers, nodes, seed)
    for _ in range(60):
        world.step()
    for _ in range(120):
        if world.rng.random() < 0.1:
            world.cut = {(n, i) for n in world.names for i in range(nodes) if world.rng.random() < 0.4}
        if world.rng.random() < 0.02:
            world.grants[world.rng.randrange(nodes)] = Grant(world.now_s)
        world.step()
        assert len(world.holders()) <= 1
    world.cut = set()
    found = False
    for _ in range(200):
        world.step()
        assert len(world.holders()) <= 1
        found = found or len(world.holders()) == 1
    assert found
