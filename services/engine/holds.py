"""What services see of an engine's pool of prefixes: `Prefixes`, and a `Hold` on what it has of one context.

    node        hold(context) ──▶ Hold, pinned ──▶ take_in (a FETCH makes it longer) ──▶ into PrefillRequest or
    engine      DecodeRequest: what it holds is not computed, and the engine releases it at the end

All calls are made on the event loop's thread, except those that engines make of a Hold's memory, which are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prfaas.common.prefixcache.events import Event
from prfaas.transport.api import KvReceiver, KvSender
from prfaas.transport.fetching import FetchRequest


class Hold(Protocol):
    """The longest usable prefix of a context that the pool has, pinned until `release`."""

    @property
    def tokens(self) -> int:
        """0: it has none."""
        ...

    def release(self) -> None:
        """Idempotent. Not before whoever reads it has ended."""
        ...


class Prefixes(Protocol):
    """A node's pool of prefixes, in host memory."""

    @property
    def used_bytes(self) -> int: ...

    @property
    def capacity_bytes(self) -> int: ...

    def hold(self, token_ids: Sequence[int], tenant: str = "") -> Hold:
        """Of a context of n tokens give the first n−1."""
        ...

    async def take_in(self, hold: Hold, receiver: KvReceiver) -> None:
        """Bind the receiver, in the first step, and store what it brings behind the hold, which is then longer.
        receiver.spec.tokens: [hold.tokens, whole blocks). Raises TransferError, TimeoutError; the hold is then as it
        was. It closes nothing that the caller opened."""
        ...

    def serve_fetch(self, request: FetchRequest, sender: KvSender) -> str | None:
        """transport.fetching.ServeFetch."""
        ...

    def drain_events(self) -> list[Event]: ...

    def contents(self) -> list[Event]: ...
