"""The order of prefill steps."""

from __future__ import annotations

from itertools import pairwise

from prfaas.services.engine.prefill_queue import TurnOrder, turn_in_s


def run(left: dict[str, int], step: int, arrivals: dict[int, tuple[str, int]] | None = None) -> list[str]:
    """Who had each step until all was done; arrivals: step number -> (name, tokens)."""
    order: TurnOrder[str] = TurnOrder(lambda name: left[name])
    for name in left:
        order.add(name)
    steps: list[str] = []
    while True:
        if arrivals and len(steps) in arrivals:
            name, tokens = arrivals.pop(len(steps))
            left[name] = tokens
            order.add(name)
        name = order.next() or ""
        if not name:
            return steps
        steps.append(name)
        left[name] -= step
        if left[name] <= 0:
            order.discard(name)


def test_a_short_prompt_is_not_stuck_behind_long_ones() -> None:
    """A prompt of one step that comes while three of 100K tokens are under way waits for one step at most."""
    steps = run({"a": 100_000, "b": 100_000, "c": 100_000}, 512, {10: ("short", 100)})
    assert "short" in steps[10:12]


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    """Though a short prompt comes every other step, the long one has a step every few turns."""
    steps = run({"long": 51_200}, 512, {n: (f"short{n}", 100) for n in range(1, 150, 2)})
    at = [index for index, name in enumerate(steps) if name == "long"]
    assert len(at) == 100
    assert max(later - earlier for earlier, later in pairwise(at)) <= 3


def test_everyone_gets_through() -> None:
    """Steps are shared, none is lost, none is given to who has nothing left."""
    steps = run({"a": 1000, "b": 2000, "c": 10}, 100)
    assert {name: steps.count(name) for name in "abc"} == {"a": 10, "b": 20, "c": 1}


def test_nobody_waits() -> None:
    """An empty order has no next; a discarded stranger is no error."""
    order: TurnOrder[str] = TurnOrder(lambda _: 0)
    order.discard("nobody")
    assert order.next() is None
    assert len(order) == 0


def test_when_a_turn_comes() -> None:
    """The next in line starts when the prefill with the least left has ended; further back it takes longer; with no
    speed known, or nobody to wait for, it can't be told."""
    assert turn_in_s([3000, 1000], 0, 1000.0) == 1.0
    assert turn_in_s([3000, 1000], 1, 1000.0) == 4.0
    assert turn_in_s([3000], 1, 1000.0) == float("inf")
    assert turn_in_s([3000], 0, 0.0) == float("inf")
