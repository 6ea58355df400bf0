"""Places by rank."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st
from prfaas.common.config import MIB
from prfaas.services.engine.api import rank_s
from prfaas.services.engine.emulated.machine import Memory
from prfaas.services.engine.emulated.slots import Slots
from prfaas.transport.arena import Arena


async def served(slots: Slots, ranks: list[float]) -> list[int]:
    """In which order they get the only place, which is taken when they come."""
    order: list[int] = []

    async def one(index: int) -> None:
        async with slots.held(ranks[index]):
            order.append(index)

    await slots.acquire(0.0)
    tasks = [asyncio.create_task(one(index)) for index in range(len(ranks))]
    await asyncio.sleep(0)
    slots.release()
    await asyncio.gather(*tasks)
    return order


@given(st.lists(st.integers(0, 3), max_size=12))
def test_the_least_rank_is_first_and_equal_ones_come_in_their_order(ranks: list[int]) -> None:
    order = asyncio.run(served(Slots(1), [float(rank) for rank in ranks]))
    assert order == sorted(range(len(ranks)), key=lambda index: (ranks[index], index))


async def test_a_place_given_to_who_is_cancelled_goes_to_the_next() -> None:
    """In the same turn of the loop, too: no place is lost, and none is given twice."""
    slots = Slots(1)
    await slots.acquire(0.0)
    given_up, waits, next_one = (asyncio.create_task(slots.acquire(float(rank))) for rank in (1, 0, 2))
    await asyncio.sleep(0)
    slots.release()
    waits.cancel()
    given_up.cancel()
    await asyncio.wait([given_up, waits])
    await next_one
    fourth = asyncio.create_task(slots.acquire(0.0))
    await asyncio.sleep(0)
    assert not fourth.done()
    slots.release()
    await fourth


def test_nobody_is_overtaken_by_who_comes_much_later() -> None:
    """By requests of one unit less for `priority_s` of waiting, and not for longer."""
    waiting = rank_s(100.0, 1, 10.0)
    assert rank_s(109.9, 0, 10.0) < waiting < rank_s(110.1, 0, 10.0)
    assert rank_s(129.9, -2, 10.0) < waiting < rank_s(130.1, -2, 10.0)
    assert rank_s(100.0, 50, 0.0) == 100.0


async def test_memory_goes_to_the_least_rank_and_nobody_past_it() -> None:
    """A small request doesn't starve a large one that waits before it; a lesser rank goes first, whenever it came; who
    has given up is in nobody's way."""
    memory = Memory(Arena(MIB))
    held = memory.allocate_now(MIB)
    assert held is not None
    got: list[str] = []

    async def ask(name: str, size_bytes: int, rank: float) -> None:
        region = await memory.allocate(size_bytes, rank)
        got.append(name)
        await asyncio.sleep(0)
        memory.free(region)

    asked = [("large", MIB, 1.0), ("small", MIB // 2, 2.0), ("first", MIB, 0.0), ("gone", MIB, -1.0)]
    tasks = [asyncio.create_task(ask(*each)) for each in asked]
    await asyncio.sleep(0)
    tasks.pop().cancel()
    memory.free(held)
    async with asyncio.timeout(10):
        await asyncio.gather(*tasks)
    assert got == ["first", "large", "small"]
    assert memory.free_bytes == MIB
