"""Who gets a prefill slot, and when OPEN goes out."""

from __future__ import annotations

from prfaas.services.engine.prefill_line import PrefillLine


class Item:
    def __init__(self, tokens: int, *, lead_s: float = 0.1, room: bool = True, rank_s: float = 0.0) -> None:
        self.remaining_tokens = tokens
        self.rank_s = rank_s
        self.lead_s = lead_s
        self.room = room
        self.aside = False
        self.started = False
        self.near = False

    def turn_is_near(self) -> None:
        self.near = True

    def start(self) -> bool:
        self.started = self.room
        return self.room


def test_slots_are_filled_in_order() -> None:
    """At most so many compute; when one has ended the next one starts."""
    line = PrefillLine(2)
    items = [Item(1000) for _ in range(4)]
    for item in items:
        line.join(item)
    assert [item.started for item in items] == [True, True, False, False]
    line.leave(items[1])
    assert [item.started for item in items] == [True, True, True, False]
    assert line.queued_requests == 3
    assert line.queued_tokens == 3000


def test_who_has_the_least_rank_is_next() -> None:
    """And keeps that place when it has to give up what it had started; those that compute are let go on."""
    line = PrefillLine(1)
    running, late, soon, sooner = (Item(10, rank_s=rank_s) for rank_s in (9.0, 5.0, 3.0, 1.0))
    for item in (running, late, soon):
        line.join(item)
    assert [item.started for item in (running, late, soon)] == [True, False, False]
    line.leave(running)
    assert [item.started for item in (late, soon)] == [False, True]
    line.join(sooner)
    soon.room = False
    line.rejoin(soon)
    assert sooner.started
    soon.room = True
    soon.started = False
    line.leave(sooner)
    assert [item.started for item in (late, soon)] == [False, True]


def test_a_copied_prefix_says_nothing_of_the_speed() -> None:
    """A turn that copied what is held computed no tokens: when the next one's turn comes is reckoned as before."""
    line = PrefillLine(1)
    running, first = Item(90), Item(500)
    line.join(running)
    line.stepped(100, 0.1)
    line.stepped(0, 10.0)
    line.join(first)
    assert first.near, "0.09 s at 1,000 tokens/s"


def test_open_goes_out_shortly_before_the_turn() -> None:
    """A waiting prefill is told when what is left before it takes no longer than its lead; the one behind it later."""
    line = PrefillLine(1)
    running, first, second = Item(1000), Item(500), Item(500)
    for item in (running, first, second):
        line.join(item)
    line.stepped(100, 0.1)
    assert not first.near, "a second to go"
    running.remaining_tokens = 50
    line.stepped(100, 0.1)
    assert first.near
    assert not second.near


def test_those_aside_are_passed_over() -> None:
    """Nobody waits behind a request whose receiver has no room; back in line it has its old place."""
    line = PrefillLine(1)
    running, aside, other, last = Item(10), Item(10), Item(10), Item(10)
    aside.aside = True
    for item in (running, aside, other, last):
        line.join(item)
    line.leave(running)
    assert [item.started for item in (aside, other, last)] == [False, True, False]
    aside.aside = False
    line.leave(other)
    assert [item.started for item in (aside, last)] == [True, False]


def test_without_memory_the_line_stands_still() -> None:
    """A large request isn't starved by small ones that would fit: first come, first served."""
    line = PrefillLine(2)
    large, small = Item(10_000, room=False), Item(10)
    line.join(large)
    line.join(small)
    assert not small.started
    large.room = True
    line.advance()
    assert large.started
    assert small.started
