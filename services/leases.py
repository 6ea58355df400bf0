"""Who holds what of a node: an open call is a lease, and it belongs to the router that made it."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from aiohttp import web
from prfaas.common.errors import UnavailableError


class Lease:
    """`async with` it around the handler's work. When the lease is freed the work is cancelled; the block ends without
    an exception once its cleaning up is done, and the connection is cut: nobody listens at its other end."""

    def __init__(self, leases: Leases, router: str, request: web.Request) -> None:
        self._leases = leases
        self._request = request
        self.router = router
        self.freed = False

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._leases.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._leases.remove(self)
        if not self.freed:
            return False
        if self._request.transport is not None:
            self._request.transport.abort()
        if kind is asyncio.CancelledError:
            self._task.uncancel()
            return True
        return False

    def free(self) -> None:
        """Idempotent."""
        if not self.freed:
            self.freed = True
            self._task.cancel()


class Leases:
    """role: the only one that calls are taken for."""

    def __init__(self, role: str) -> None:
        self.role = role
        self._held: set[Lease] = set()
        self._changed = asyncio.Event()
        self._refusing = False

    def hold(self, router: str, request: web.Request, role: str) -> Lease:
        """Raises UnavailableError for another role, and from `refuse_new` to `take_new`."""
        if self._refusing:
            raise UnavailableError("this node is draining; ask another one")
        if role != self.role:
            raise UnavailableError(f"this node's role is {self.role} now, not {role}; ask another one")
        return Lease(self, router, request)

    def refuse_new(self) -> None:
        self._refusing = True

    def take_new(self, role: str) -> None:
        """In this role, after `refuse_new`."""
        self.role = role
        self._refusing = False

    def __len__(self) -> int:
        return len(self._held)

    def free(self, router: str | None = None) -> int:
        """Those of one router, or all. How many."""
        freed = [lease for lease in self._held if router is None or lease.router == router]
        for lease in freed:
            lease.free()
        return len(freed)

    async def none_left(self) -> None:
        while self._held:
            self._changed.clear()
            await self._changed.wait()

    def add(self, lease: Lease) -> None:
        self._held.add(lease)

    def remove(self, lease: Lease) -> None:
        self._held.discard(lease)
        self._changed.set()
