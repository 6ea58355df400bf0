"""Waiting for what must happen before memory may be freed."""

from __future__ import annotations

import asyncio
from typing import TypeVar

T = TypeVar("T")


async def finish_despite_cancel(future: asyncio.Future[T]) -> T:
    """Wait until `future` is done even when the caller is cancelled meanwhile, however often; that cancellation is
    raised last, and wins over a failure of the future, which is its cause. Else what the future returns or raises."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from (None if future.cancelled() else future.exception())
    return future.result()


async def cancelled(*tasks: asyncio.Task[None] | None) -> None:
    """Cancel them; they have ended, however, when this returns."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
