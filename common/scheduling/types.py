"""What a policy sees and what it answers: (RequestSnapshot, ClusterSnapshot) -> Decision.

The cluster is columnar, one numpy array a property and one entry a node, because a Python loop over 1,000 node
objects costs 80 µs and an argmin costs 2. The shell updates the arrays in place; to a policy they are read-only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

ROLE_PREFILL = 0
ROLE_DECODE = 1


@dataclass(frozen=True, slots=True)
class RequestSnapshot:
    """One request at the moment of its routing; lengths in tokens."""

    request_id: str
    prompt_tokens: int
    max_output_tokens: int
    uncached_tokens: int
    remaining_s: float | None = None
    """Until the client's deadline; None = none."""


@dataclass(slots=True)
class ClusterSnapshot:
    """Columns over nodes, all of the same length. `inflight_*` include what this router has dispatched itself since
    the node's last heartbeat, else every request between two heartbeats goes to the same idle node."""

    names: list[str] = field(default_factory=list)
    regions: list[str] = field(default_factory=list)
    region: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """Index of the node's region in `region_names`."""
    region_names: list[str] = field(default_factory=list)
    role: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, np.int8))
    usable: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """Alive by lease, not draining, and reachable when last tried."""
    inflight_requests: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    inflight_tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Uncached prompt tokens queued or being prefilled (prefill), or context tokens held (decode)."""
    free_kv_bytes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes and why. Node fields are indices into the snapshot.

    prefill_node: None = the decode node prefills locally. token_start: tokens [0, token_start) are held by the decode
    node already. reason: one of the words that the metrics and the `x-prfaas-reason` header carry.
    """

    prefill_node: int | None
    decode_node: int
    token_start: int
    reason: str


class Policy(Protocol):
    """Pure: no clock, no I/O, no randomness of its own."""

    def __call__(self, request: RequestSnapshot, cluster: ClusterSnapshot) -> Decision | None:
        """None: no decode node can serve this now."""
        ...
