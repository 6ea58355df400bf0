"""What nodes hold of prompts' prefixes, as their heartbeats tell. Pure.

A node's pool is its own: another node uses it by FETCH. Holders are the registry's rows; which of them are alive says
the snapshot. A batch that doesn't connect with what came before makes its holder count for nothing until it has begun
anew (`events.py`), so that nothing is claimed which may not be there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from prfaas.common import log
from prfaas.common.prefixcache.hashes import MAX_BLOCK_TOKENS, BlockHasher, BlockKey
from prfaas.common.prefixcache.index import IndexSettings, Match, PrefixIndex
from prfaas.common.scheduling.types import ClusterSnapshot, PrefixMatches
from prfaas.services.messages import Heartbeat
from prfaas.services.router.registry import MAX_NODES

Sharing = Literal["all", "key", "none"]
MAX_HOLDERS_NAMED = 16
"""Of a prompt, longest first: as many as policies look at one by one. What another one holds can be asked."""
MAX_HOLDERS_SEEN = 64
"""Among whom the best of each region is looked for."""
HASHERS = 1024
"""Tenants whose first key is kept."""

logger = log.get_logger("router")


def tenant_of(sharing: Sharing, salt: str, api_key: str, request_id: str) -> str:
    """Who may share prefixes: requests with the same answer. salt: the request's cache_salt, "" = none.

    all: everybody, or everybody with the same salt; key: the same within one API key; none: those with one salt, and
    nobody else. The key itself is in none of them.
    """
    if sharing == "none" and not salt:
        return f"alone/{request_id}"
    key = blake2b(api_key.encode(), digest_size=16, person=b"prfaas-tenant").hexdigest() if sharing == "key" else ""
    return f"{key}/{salt}" if key or salt else ""


@dataclass(slots=True)
class _Holder:
    epoch: str
    block_tokens: int


class Prefixes:
    """`heard` takes each accepted heartbeat, `forget` a row whose node is gone; `keys` and `matches` are asked."""

    def __init__(self, max_blocks: int) -> None:
        self.index = PrefixIndex(IndexSettings(max_blocks=max_blocks, max_holders=MAX_NODES))
        self.block_tokens = 0
        """Of all pools; 0: no node has one."""
        self._exact = False
        self._fingerprint = ""
        self._holders: dict[int, _Holder] = {}
        self._hashers: OrderedDict[str, BlockHasher] = OrderedDict()
        self._misfits: set[str] = set()

    def heard(self, row: int, message: Heartbeat) -> int | None:
        """What the answer's `prefix_next` must be."""
        holder = self._holders.get(row)
        if holder is not None and holder.epoch != message.epoch:
            self.forget(row)
            holder = None
        if message.prefix_events is None or not 1 <= message.prefix_block_tokens <= MAX_BLOCK_TOKENS:
            if holder is not None:
                self.forget(row)
            return None
        if not self._fits(message):
            return None
        if holder is None:
            self._holders[row] = _Holder(message.epoch, message.prefix_block_tokens)
        return self.index.apply(row, message.prefix_events)

    def _fits(self, message: Heartbeat) -> bool:
        """All pools have blocks of one size; the first node's, until none is left."""
        size = message.prefix_block_tokens
        if not self._holders or (size == self.block_tokens and message.model_fingerprint == self._fingerprint):
            if (size, message.model_fingerprint) != (self.block_tokens, self._fingerprint):
                self._hashers.clear()
            self.block_tokens, self._fingerprint = size, message.model_fingerprint
            self._exact = message.prefix_exact
            return True
        if message.node not in self._misfits and len(self._misfits) < MAX_NODES:
            self._misfits.add(message.node)
            logger.warning(
                "prefixes_ignored",
                node=message.node,
                block_tokens=size,
                mend=f"set engine.prefix_block_tokens = {self.block_tokens} as on the other nodes",
            )
        return False

    def forget(self, row: int) -> None:
        """The node is gone, or another process has its row. Idempotent."""
        if self._holders.pop(row, None) is not None:
            self.index.remove(row)

    def hasher(self, tenant: str) -> BlockHasher | None:
        """None: no node has a pool."""
        if not self.block_tokens or not self._holders:
            return None
        found = self._hashers.get(tenant)
        if found is None:
            found = self._hashers[tenant] = BlockHasher(self._fingerprint, tenant, self.block_tokens)
            if len(self._hashers) > HASHERS:
                self._hashers.popitem(last=False)
        return found

    def matches(self, keys: Sequence[BlockKey], cluster: ClusterSnapshot) -> PrefixMatches | None:
        """Who holds how much of a prompt with these keys; None: nobody holds any. Nodes that are not usable now are
        left out. The cost grows with the different lengths among holders, not with nodes."""
        if not keys:
            return None
        match = self.index.match_exact(keys) if self._exact else self.index.match(keys)
        if not match.steps:
            return None
        found = _best_holders(match, cluster, self.block_tokens)
        if found is None:
            return None
        rows, tokens = found
        first = dict(zip(reversed(cluster.region[rows].tolist()), range(rows.size - 1, -1, -1), strict=True))
        regions = sorted(first)
        firsts = [first[region] for region in regions]
        return PrefixMatches(
            np.array(regions, np.int32),
            tokens[firsts],
            rows[:MAX_HOLDERS_NAMED],
            tokens[:MAX_HOLDERS_NAMED],
            rows[firsts],
            partial(_tokens_of, match, self.block_tokens),
        )


def _tokens_of(match: Match, block_tokens: int, row: int) -> int:
    return match.blocks_of(row) * block_tokens


def _best_holders(
    match: Match, cluster: ClusterSnapshot, block_tokens: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]] | None:
    """Usable ones, longest first, and their tokens."""
    rows, blocks = match.deepest(MAX_HOLDERS_SEEN)
    tokens = np.array(blocks, np.int64) * block_tokens
    good = cluster.usable[rows]
    if good.all():
        return rows, tokens
    return (rows[good], tokens[good]) if good.any() else None
