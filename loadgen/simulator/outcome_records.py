"""A simulation's outcome as records, so that its report is that of a live run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from prfaas.loadgen.records import FAILED, OK, REFUSED, Records, Words
from prfaas.loadgen.simulator import columns
from prfaas.loadgen.simulator.columns import DONE, Outcome


def records(outcome: Outcome, node_names: Sequence[str] = (), region_names: Sequence[str] = ()) -> Records:
    """Every request's instants, parts of TTFT, places and bytes. node_names, region_names: of the snapshot's rows."""
    served, failed = outcome.status == DONE, outcome.status == columns.FAILED
    waits = outcome.prefill_start_s - outcome.arrival_s
    wire = np.where(served, outcome.wire_bytes, -1).astype(np.int64)
    names = tuple(node_names)
    known = {}
    if names:
        known["prefill_node"] = Words(np.where(served, outcome.prefill_node, len(names)).astype(np.int32), (*names, ""))
        known["decode_node"] = Words(np.where(served, outcome.decode_node, len(names)).astype(np.int32), (*names, ""))
    if region_names:
        of_node = np.array([*(region_names.index(_region(name, region_names)) for name in names), len(region_names)])
        for column, nodes in (("region", outcome.prefill_node), ("decode_region", outcome.decode_node)):
            rows = np.where(served, nodes, len(names))
            known[column] = Words(of_node[rows].astype(np.int32), (*region_names, ""))
    return Records.of(
        outcome.arrival_s,
        index=outcome.index,
        prompt_tokens=outcome.prompt_tokens,
        output_tokens=np.where(served, outcome.output_tokens, 0),
        status=Words(np.where(served, 0, np.where(failed, 2, 1)).astype(np.int32), (OK, REFUSED, FAILED)),
        reason=Words(outcome.reason, tuple(outcome.reasons)),
        fallbacks=Words((outcome.retries > 0).astype(np.int32), ("", "node_lost")),
        first_token_s=np.where(served, outcome.first_token_s, np.nan),
        second_token_s=np.where(served & (outcome.output_tokens > 1), outcome.second_token_s, np.nan),
        end_s=outcome.end_s,
        offloaded=np.where(served, outcome.offloaded, -1),
        cached_tokens=outcome.cached_tokens,
        router_s=np.where(served, 0.0, np.nan),
        queue_s=np.where(served, waits, np.nan),
        prefill_s=np.where(served, outcome.prefill_s, np.nan),
        exposed_s=np.where(served, outcome.kv_ready_s - outcome.prefill_start_s - outcome.prefill_s, np.nan),
        first_step_s=np.where(served, outcome.first_token_s - outcome.kv_ready_s, np.nan),
        transfer_s=np.where(served & (outcome.offloaded > 0), outcome.kv_ready_s - outcome.prefill_start_s, np.nan),
        kv_raw_bytes=np.where(wire > 0, wire / outcome.wire_ratio, wire).astype(np.int64),
        kv_wire_bytes=wire,
        fetched_wire_bytes=np.where(served, outcome.fetched_bytes, -1).astype(np.int64),
        **known,
    )


def _region(name: str, region_names: Sequence[str]) -> str:
    """Nodes of a cluster are named after their regions (`cluster.Cluster.snapshot`)."""
    return next(region for region in region_names if name.startswith(f"{region}-"))
