"""What vLLM's own prefix cache holds, told by its KV events, under this project's block keys. Pure.

vLLM names a block by a hash of its own and says which tokens are in it and which block comes before. From that the
chain of our keys follows (`common/prefixcache/hashes.py`), whatever the two block sizes. Nothing here is pinned: vLLM
may have evicted a block by the time that a request comes to it, and then computes the prompt itself
(scheduler_side.py, `prefix_gone`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec
from prfaas.common.prefixcache.events import BlocksEvicted, Event, Reset, added, in_runs
from prfaas.common.prefixcache.hashes import BlockHasher

MAX_BLOCKS = 1 << 20
"""That are remembered; more of them than any cache has blocks."""
MAX_HASHERS = 1024

Hash = bytes | int


class Stored(msgspec.Struct, tag="BlockStored", frozen=True):
    """vLLM's events, as far as we read them."""

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_name: str | None = None
    medium: str | None = None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None


class Removed(msgspec.Struct, tag="BlockRemoved", frozen=True):
    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None


class Cleared(msgspec.Struct, tag="AllBlocksCleared", frozen=True):
    pass


class VllmEvents(msgspec.Struct, array_like=True, frozen=True):
    ts: float
    events: list[Stored | Removed | Cleared]


@dataclass(frozen=True, slots=True)
class _Block:
    """One of vLLM's. tail: tokens up to its end that fill none of our blocks yet; keys: of ours that it completes."""

    hasher: BlockHasher
    last_key: bytes | None
    tail: tuple[int, ...]
    keys: tuple[bytes, ...]


def salt_of(tenant: str) -> str | None:
    """vLLM's `cache_salt` of a tenant's requests: ours may have characters that vLLM's may not. None: everybody's."""
    return blake2b(tenant.encode(), digest_size=16).hexdigest() if tenant else None


class PrefixMirror:
    def __init__(self, model_fingerprint: str, block_tokens: int) -> None:
        """block_tokens: of our keys."""
        self._fingerprint = model_fingerprint
        self._block_tokens = block_tokens
        self._vllm_block_tokens = 1
        self._hashers: dict[str | None, BlockHasher] = {}
        """By salt: of the tenants that this node has had requests of."""
        self._blocks: dict[Hash, _Block] = {}
        self._holders: dict[bytes, int] = {}
        """Our keys, and how many of vLLM's blocks complete each."""
        self._parents: dict[bytes, bytes | None] = {}
        self._events: list[Event] = []

    # -- from vLLM --------------------------------------------------------------------------------------------------

    def apply(self, batch: VllmEvents) -> None:
        for event in batch.events:
            if isinstance(event, Stored):
                self._stored(event)
            elif isinstance(event, Removed):
                self._removed(event.block_hashes)
            else:
                self.reset()

    def reset(self) -> None:
        """What was known is not any more: events were lost, or vLLM is another one."""
        self._blocks.clear()
        self._holders.clear()
        self._parents.clear()
        self._events = [Reset()]

    def _stored(self, event: Stored) -> None:
        if event.group_idx or event.lora_name or event.block_size < 1:
            return  # of windows, or of an adapter's own
        self._vllm_block_tokens = event.block_size
        before = None if event.parent_block_hash is None else self._blocks.get(event.parent_block_hash)
        if event.parent_block_hash is not None and before is None:
            return  # from before we listened
        for i, block_hash in enumerate(event.block_hashes):
            tokens = event.token_ids[i * event.block_size : (i + 1) * event.block_size]
            if len(tokens) < event.block_size or len(self._blocks) >= MAX_BLOCKS:
                return
            if before is None:
                hasher = self._hasher_of(event.extra_keys[i] if event.extra_keys else None)
                if hasher is None:
                    return
                before = _Block(hasher, None, (), ())
            known = self._blocks.get(block_hash)
            before = known or self._add(block_hash, before, tokens)

    def _add(self, block_hash: Hash, before: _Block, tokens: Sequence[int]) -> _Block:
        data = (*before.tail, *tokens)
        keys = tuple(before.hasher.keys(data, before.last_key))
        rest = data[len(keys) * self._block_tokens :]
        block = self._blocks[block_hash] = _Block(before.hasher, keys[-1] if keys else before.last_key, rest, keys)
        parent = before.last_key
        for key in keys:
            self._holders[key] = self._holders.get(key, 0) + 1
            self._parents[key] = parent
            parent = key
        if keys:
            self._events += added(before.last_key, keys)
        return block

    def _removed(self, hashes: Sequence[Hash]) -> None:
        gone: list[bytes] = []
        for block_hash in hashes:
            block = self._blocks.pop(block_hash, None)
            for key in block.keys if block is not None else ():
                self._holders[key] -= 1
                if not self._holders[key]:
                    del self._holders[key], self._parents[key]
                    gone.append(key)
        self._events += [BlocksEvicted(run) for run in in_runs(gone)]

    def _hasher_of(self, extra: Sequence[Any] | None) -> BlockHasher | None:
        """extra: what is in the hash of a prompt's first block beside its tokens; None: we don't know whose it is."""
        if not extra:
            return self.learn("")
        return self._hashers.get(extra[0]) if len(extra) == 1 else None

    # -- for our node -----------------------------------------------------------------------------------------------

    def learn(self, tenant: str) -> BlockHasher:
        """vLLM is going to be given a request of this tenant's."""
        salt = salt_of(tenant)
        if salt not in self._hashers:
            if len(self._hashers) >= MAX_HASHERS:
                self._hashers.clear()
            self._hashers[salt] = BlockHasher(self._fingerprint, tenant, self._block_tokens)
        return self._hashers[salt]

    def held_tokens(self, token_ids: Sequence[int], tenant: str) -> int:
        """Of these, from the first on, that vLLM would find in its cache now: whole blocks of its own."""
        held = 0
        for key in self.learn(tenant).keys(token_ids):
            if key not in self._holders:
                break
            held += self._block_tokens
        return held - held % self._vllm_block_tokens

    def drain_events(self) -> list[Event]:
        """services.node.news.Pool."""
        events, self._events = self._events, []
        return events

    def contents(self) -> list[Event]:
        """Parents before their children: in the order in which they came."""
        return [event for key, parent in self._parents.items() for event in added(parent, [key])]
