"""What is waited for although the caller was cancelled."""

from __future__ import annotations

import asyncio

import pytest
from prfaas.transport.waiting import finish_despite_cancel


async def cancelled_twice(future: asyncio.Future[int]) -> asyncio.Task[int]:
    """A caller who waits on, although it was cancelled two times."""
    task = asyncio.create_task(finish_despite_cancel(future))
    for _ in range(2):
        await asyncio.sleep(0)  # it waits
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
    return task


async def test_without_a_cancel_it_is_an_await() -> None:
    """The result, or the failure."""
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, 7)
    assert await finish_despite_cancel(future) == 7
    failed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    failed.set_exception(ValueError("why"))
    with pytest.raises(ValueError, match="why"):
        await finish_despite_cancel(failed)


@pytest.mark.parametrize("outcome", [7, ValueError("why")])
async def test_a_cancel_waits_and_is_raised_last(outcome: int | Exception) -> None:
    """Also when the future fails after it: the caller was cancelled, and the failure is the cause, not lost and not
    reported as never looked at."""
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = await cancelled_twice(future)
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
    with pytest.raises(asyncio.CancelledError) as raised:
        await task
    assert raised.value.__cause__ is (outcome if isinstance(outcome, Exception) else None)


async def test_a_future_that_is_cancelled_itself() -> None:
    """Is over as well."""
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = await cancelled_twice(future)
    future.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
