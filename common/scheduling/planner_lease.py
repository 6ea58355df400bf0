"""Which of several routers plans roles: a lease with the nodes as witnesses, since routers share nothing else. Pure.

    router ── answer to a heartbeat: "I bid, as HOLDER, at BID_S of my clock" ──▶ node   grants, if nobody else has it
    router ◀── the next heartbeat: "granted to HOLDER, by the bid of BID_S" ──── node

A node grants to one router at a time, until `lease_s` after that router's last bid. A router holds the lease while more
than half of all nodes have granted to it. What that rests on:

- A router counts a grant from the instant at which it *sent* the bid that the node names, by its own clock: the node's
  own grant began later and so ends later, however long either message took.
- Of all nodes: those that the router knows or has lost lately, and no fewer than any router has told the nodes that it
  sees (`NodeCount`). A router that is cut off with a few nodes, or begins among them, has no majority.
- A node that has just started forgets what it granted before, so it grants nothing for `lease_s`.
- And a node changes its role only for the router that its own grant is to.

Clocks of routers and nodes need not agree, only run equally fast within `DRIFT`. Where two routers bid at once and
neither gets a majority, the one with fewer grants stops, and its grants run out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

DRIFT = 0.05
"""Two clocks differ in speed by less; a process that is stopped is no clock, and is covered by the node's own check."""
REMEMBER_S = 600.0
"""A router's count of nodes holds for so long after its last word: as long as it remembers lost nodes itself."""
MAX_HOLDER = 256
"""Characters of a holder's name."""


@dataclass(slots=True)
class Grant:
    """A node's side. started_s: of its process, on the clock of `now_s`."""

    started_s: float
    holder: str = ""
    bid_s: float = 0.0
    """Of the holder's clock."""
    _until_s: float = -math.inf

    def asked(self, holder: str, bid_s: float, lease_s: float, now_s: float) -> None:
        """A router bids."""
        if now_s < self.started_s + lease_s or (self._until_s > now_s and self.holder != holder):
            return
        if self.holder == holder and bid_s < self.bid_s:
            return  # answers overtook one another
        self.holder, self.bid_s, self._until_s = holder, bid_s, now_s + lease_s

    def to(self, now_s: float) -> str:
        """Whom it is granted to; "": nobody."""
        return self.holder if self._until_s > now_s else ""


@dataclass(slots=True)
class NodeCount:
    """How many nodes there are, as routers have told one node."""

    _told: dict[str, tuple[int, float]] = field(default_factory=dict)

    def told(self, router: str, nodes: int, now_s: float) -> None:
        """A router's answer says how many it knows."""
        self._told[router] = nodes, now_s

    def most(self, now_s: float) -> int:
        """The largest count of the last `REMEMBER_S`; 0: nobody has said."""
        self._told = {router: (n, at_s) for router, (n, at_s) in self._told.items() if at_s > now_s - REMEMBER_S}
        return max((nodes for nodes, _ in self._told.values()), default=0)


@dataclass(frozen=True, slots=True)
class Vote:
    """What a node's last heartbeat said. bid_s: of the holder's clock. counted: the most nodes a router told it of.
    alive: it is no longer ago than a node may be silent."""

    holder: str
    bid_s: float
    counted: int
    alive: bool


@dataclass(frozen=True, slots=True)
class Standing:
    """A router's side, as of one look. holder: who has the most grants, "": nobody has one. grants: of this router's;
    `needed` are a majority. until_s: this router holds the lease so long (its clock); -inf: it doesn't. bids: it asks
    for the lease or for its renewal."""

    holder: str
    grants: int
    needed: int
    until_s: float
    bids: bool

    def holds(self, now_s: float) -> bool:
        return now_s < self.until_s


NOBODY = Standing("", 0, 1, -math.inf, False)


def standing(me: str, votes: Sequence[Vote], lease_s: float, now_s: float) -> Standing:
    """`votes`: one of each node that this router knows, lost ones included."""
    needed = max([len(votes), *(vote.counted for vote in votes if vote.alive)]) // 2 + 1
    alive = [vote for vote in votes if vote.alive]
    ends_s = sorted((vote.bid_s + lease_s * (1 - DRIFT) for vote in votes if vote.holder == me), reverse=True)
    ends_s = [end_s for end_s in ends_s if end_s > now_s]
    until_s = ends_s[needed - 1] if len(ends_s) >= needed else -math.inf
    others = Counter(vote.holder for vote in alive if vote.holder not in ("", me))
    ahead = max(others.items(), key=lambda item: (item[1], _first(item[0])), default=None)
    wins = ahead is None or (len(ends_s), _first(me)) > (ahead[1], _first(ahead[0]))
    leader = me if ends_s and wins else ahead[0] if ahead is not None else ""
    return Standing(leader, len(ends_s), needed, until_s, wins and len(alive) >= needed)


def _first(name: str) -> tuple[int, ...]:
    """Of equals the first by name is the larger."""
    return tuple(-ord(letter) for letter in name)
