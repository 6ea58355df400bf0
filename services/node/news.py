"""What a node tells its routers beside its load: its profile, and what its prefix pool takes in and gives up.

The pool's events are drained once and go into the stream of each router, which keeps them until that router has
acknowledged them (`prefixcache/events.py`). The profile goes once to each router that asks for it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from prfaas.common.perfmodel.profiles import NodeProfile, dumps, profile_id
from prfaas.common.prefixcache.events import Event, EventBatch
from prfaas.services.messages import HeartbeatAnswer
from prfaas.services.node.heartbeat import RouterLink

MAX_KEYS = 4096
"""Of events in one heartbeat: a hundred KiB of JSON, and some milliseconds of a router's loop. More follow at once."""


class Pool(Protocol):
    """Of a prefix store what is told to others."""

    def drain_events(self) -> list[Event]: ...

    def contents(self) -> list[Event]: ...


class PoolNews:
    """One pool's events to any number of routers."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def batch(self, link: RouterLink, links: Collection[RouterLink]) -> EventBatch:
        """For the next heartbeat to `link`; `links` are all routers'."""
        events = self._pool.drain_events()
        for each in links:
            each.prefix_events.add(events)
        if link.prefix_events.needs_restart:
            link.prefix_events.restart(self._pool.contents())
        return link.prefix_events.batch(MAX_KEYS)

    def answered(self, link: RouterLink, answer: HeartbeatAnswer) -> None:
        if answer.prefix_next is None:
            return
        link.prefix_events.acknowledge(answer.prefix_next)
        if not link.prefix_events.needs_restart and link.prefix_events.batch(1).events:
            link.beat_now()


class ProfileNews:
    """The file of the profile that an engine has now, and its id; made anew only when it has another one."""

    def __init__(self) -> None:
        self._of: NodeProfile | None = None
        self.file = ""
        self.id = ""

    def take(self, profile: NodeProfile | None) -> None:
        if profile is self._of:
            return
        self._of = profile
        data = b"" if profile is None else dumps(profile)
        self.file, self.id = data.decode(), profile_id(data) if data else ""
