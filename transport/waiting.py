"""Waiting for what must happen before memory may be freed."""

from __future__ import annotations

import asyncio


async def finish_despite_cancel(future: asyncio.Future[None]) -> None:
    """Wait until `future` is done even when the caller is cancelled meanwhile; that cancellation is raised last."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
