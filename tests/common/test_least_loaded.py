"""The static policy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.common.scheduling.least_loaded import LeastLoaded
from prfaas.common.scheduling.types import ROLE_DECODE, ROLE_PREFILL, ClusterSnapshot, Refused, RequestSnapshot


def cluster(*nodes):
    """Nodes as (role, usable, inflight_tokens, inflight_requests)."""
    columns = list(zip(*nodes, strict=True)) if nodes else [[], [], [], []]
    return ClusterSnapshot(
        names=[f"n{i}" for i in range(len(nodes))],
        role=np.array(columns[0], np.int8),
        usable=np.array(columns[1], np.bool_),
        inflight_tokens=np.array(columns[2], np.int64),
        inflight_requests=np.array(columns[3], np.int64),
    )


def request(tokens):
    return RequestSnapshot("r", tokens, 16, tokens)


@pytest.mark.parametrize(
    ("nodes", "tokens", "threshold", "expected"),
    [
        ([(ROLE_DECODE, True, 0, 0)], 100, 0, (None, 0, "no_prefill_node")),
        ([(ROLE_DECODE, True, 0, 0), (ROLE_PREFILL, True, 0, 0)], 100, 0, (1, 0, "offloaded")),
        ([(ROLE_DECODE, True, 0, 0), (ROLE_PREFILL, False, 0, 0)], 100, 0, (None, 0, "no_prefill_node")),
        ([(ROLE_DECODE, True, 0, 0), (ROLE_PREFILL, True, 0, 0)], 100, 100, (None, 0, "below_threshold")),
        ([(ROLE_DECODE, True, 0, 0), (ROLE_PREFILL, True, 0, 0)], 101, 100, (1, 0, "offloaded")),
        ([(ROLE_DECODE, True, 0, 0), (ROLE_PREFILL, True, 0, 0)], 1, 0, (None, 0, "nothing_to_prefill")),
        ([(ROLE_DECODE, True, 9, 1), (ROLE_DECODE, True, 8, 5)], 1, 0, (None, 1, "nothing_to_prefill")),
        ([(ROLE_DECODE, True, 9, 2), (ROLE_DECODE, True, 9, 1)], 1, 0, (None, 1, "nothing_to_prefill")),
    ],
)
def test_decision(nodes, tokens, threshold, expected):
    """Threshold, then the least-loaded usable node of each role."""
    decision = LeastLoaded(threshold)(request(tokens), cluster(*nodes))
    assert (decision.prefill_node, decision.decode_node, decision.reason) == expected


def test_no_decode_node_is_refused():
    """Without a usable decode node nobody can serve."""
    without = cluster((ROLE_PREFILL, True, 0, 0), (ROLE_DECODE, False, 0, 0))
    assert LeastLoaded()(request(10), without).reason == "no_decode_node"
    assert LeastLoaded()(request(10), cluster()).reason == "no_decode_node"


@given(
    st.lists(
        st.tuples(st.sampled_from([ROLE_PREFILL, ROLE_DECODE]), st.booleans(), st.integers(0, 9), st.integers(0, 9))
    )
)
def test_never_an_unusable_node(nodes):
    """Whatever the cluster, a decision names usable nodes of the right role."""
    snapshot = cluster(*nodes)
    decision = LeastLoaded()(request(50), snapshot)
    if isinstance(decision, Refused):
        assert not any(role == ROLE_DECODE and usable for role, usable, _, _ in nodes)
        return
    assert snapshot.usable[decision.decode_node]
    assert snapshot.role[decision.decode_node] == ROLE_DECODE
    if decision.prefill_node is not None:
        assert snapshot.usable[decision.prefill_node]
        assert snapshot.role[decision.prefill_node] == ROLE_PREFILL
