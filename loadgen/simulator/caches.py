"""The regions' prefix pools in a simulation: which part of each prompt they hold, and what they take in and give up.

One pool a region, of the host memory of its nodes together, as in the paper: any node of a region reads it over the
fast network inside. A transferred request is in both regions' pools afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from prfaas.common.prefixcache.pool import PrefixPool
from prfaas.common.prefixcache.sizes import CacheSizes, snapshot_points
from prfaas.common.scheduling.types import (
    AdmittingPolicy,
    ClusterSnapshot,
    Decision,
    PrefixMatches,
    Refused,
    RequestSnapshot,
)
from prfaas.loadgen.workloads.prefixes import Prefixes

_OWN_KEYS = 1 << 62
"""Above the ids of traces: keys of blocks that nobody else's prompt has, which stand as negative ids."""


@dataclass(slots=True)
class RegionCaches:
    """capacity_bytes: by region index; a region without an entry has no pool."""

    prefixes: Prefixes
    prompt_tokens: NDArray[np.int64]
    sizes: CacheSizes
    capacity_bytes: Mapping[int, int]
    hit_tokens: int = 0
    """Of the prompts that were routed, in the region that held most."""
    seen_tokens: int = 0
    _pools: dict[int, PrefixPool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for region, size in sorted(self.capacity_bytes.items()):
            self._pools[region] = PrefixPool(self.sizes, size, max_pending_keys=0)

    def matches(self, i: int) -> PrefixMatches | None:
        """What each region holds of the prompt's first n − 1 tokens."""
        keys = self._prompt_keys(i)
        held = [(region, pool.match(keys) * self.sizes.block_tokens) for region, pool in self._pools.items()]
        self.seen_tokens += int(self.prompt_tokens[i])
        self.hit_tokens += max((tokens for _, tokens in held), default=0)
        some = [(region, tokens) for region, tokens in held if tokens]
        if not some:
            return None
        regions, tokens = zip(*some, strict=True)
        return PrefixMatches(np.array(regions, np.int32), np.array(tokens, np.int64))

    def prefilled(self, i: int, region: int, node: int) -> None:
        """The prompt's KV is complete in the region."""
        self._take_in(region, self._prompt_keys(i))

    def decoded(self, i: int, region: int) -> None:
        """So is that of its output, as far as its identity is known."""
        keys = _keys(self.prefixes.sequence_block_ids(i))
        if len(keys) > len(self._prompt_keys(i)):
            self._take_in(region, keys)

    def _prompt_keys(self, i: int) -> list[int]:
        whole = (int(self.prompt_tokens[i]) - 1) // self.sizes.block_tokens
        return _keys(self.prefixes.block_ids(i)[:whole])

    def _take_in(self, region: int, keys: Sequence[int]) -> None:
        pool = self._pools.get(region)
        if pool is None or not keys:
            return
        lease = pool.acquire(keys)
        if pool.insert(lease, keys) and self.sizes.needs_snapshot:
            for blocks in snapshot_points(lease.matched, lease.held, len(keys)):
                pool.add_snapshot(lease, blocks)
        pool.release(lease)


def _keys(block_ids: NDArray[np.int64]) -> list[int]:
    keys: list[int] = np.where(block_ids < 0, _OWN_KEYS - block_ids, block_ids).tolist()
    return keys


@dataclass(slots=True)
class CacheBlind:
    """Routing that doesn't know what caches hold: the policy sees a request without prefixes. Where it sends the
    request, the region's own cache is used nevertheless."""

    policy: AdmittingPolicy

    def __call__(self, request: RequestSnapshot, cluster: ClusterSnapshot) -> Decision | Refused:
        blind = RequestSnapshot(
            request.request_id,
            request.prompt_tokens,
            request.max_output_tokens,
            request.prompt_tokens,
            request.remaining_s,
            request.home_region,
            None,
            request.waited_s,
        )
        answer = self.policy(blind, cluster)
        if request.prefixes is None or isinstance(answer, Refused):
            return answer
        prefill = answer.decode_node if answer.prefill_node is None else answer.prefill_node
        start, held = (
            min(request.prefixes.in_region(int(cluster.region[node])), request.prompt_tokens - 1)
            for node in (prefill, answer.decode_node)
        )
        return Decision(
            answer.prefill_node, answer.decode_node, held, answer.reason, start, None, answer.predicted_ttft_s
        )

    @property
    def adapt(self) -> Callable[[float, ClusterSnapshot], None] | None:
        """The inner policy's."""
        return getattr(self.policy, "adapt", None)
