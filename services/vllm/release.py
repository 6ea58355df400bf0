"""When vLLM is given a decode request whose KV is still arriving: early release. Pure.

From the moment that vLLM takes the request, its next step waits for each layer that is not there yet, and all other
streams wait along. Given too late, the new request waits for nothing. So it is given as soon as what is missing will
be there at most `stall_s` after the step needs it. The rate is what this transfer has shown: it tells of the link and
of prefill's own pace alike, whichever is the slower.
"""

from __future__ import annotations

from collections.abc import Sequence

RATE_LAYERS = 2
"""Arrivals that say a rate."""


def may_release(
    layer_bytes: Sequence[int],
    arrived_s: Sequence[float | None],
    needed_first: frozenset[int],
    now_s: float,
    lead_s: float,
    stall_s: float,
) -> bool:
    """layer_bytes, arrived_s: of each layer; None: it is on its way. needed_first: layers with a recurrent state, which
    a step reads before anything else. lead_s: from now until a step would use its last layer.
    """
    missing = [layer for layer, at_s in enumerate(arrived_s) if at_s is None]
    if not missing:
        return True
    if needed_first.intersection(missing):
        return False
    rate = _rate(layer_bytes, arrived_s)
    if rate <= 0:
        return False
    since_s = now_s - max(at_s for at_s in arrived_s if at_s is not None)
    expected_s = sum(layer_bytes[layer] for layer in missing) / rate - since_s
    return expected_s <= lead_s + stall_s


def _rate(layer_bytes: Sequence[int], arrived_s: Sequence[float | None]) -> float:
    """Bytes/s of the layers that have arrived; 0.0: too few, or all at once."""
    arrivals = sorted((at_s, layer) for layer, at_s in enumerate(arrived_s) if at_s is not None)
    if len(arrivals) < RATE_LAYERS:
        return 0.0
    took_s = arrivals[-1][0] - arrivals[0][0]
    # The first one's own bytes came before the time that is counted.
    return sum(layer_bytes[layer] for _, layer in arrivals[1:]) / took_s if took_s > 0 else 0.0
