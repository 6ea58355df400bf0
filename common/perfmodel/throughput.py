"""The paper's equations 1 to 8 ("Prefill-as-a-Service", arXiv 2604.15039), as functions of numbers or arrays.

    Φ_kv      KV throughput of one instance          l        uncached input length, tokens
    S_kv      KV bytes of one request                t        threshold: l > t is offloaded
    Θ         requests/s that a stage can carry      p        share offloaded, P(L > t)
    Λ_max     requests/s that the system can carry   N        instances (nodes)

Times are seconds, sizes bytes, rates a second. The paper puts in the mean length of each side, T(E[L]); a queue that
runs full finds the mean time, E[T(L)]. Both are the caller's choice of arguments (`scheduling.planner`).
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
F = TypeVar("F", float, Floats)


def kv_throughput(kv_bytes: F, prefill_s: F) -> F:
    """Equation 1: Φ_kv(l) = S_kv(l) / T_prefill(l), bytes/s that one instance makes."""
    return kv_bytes / prefill_s


def egress_needed(gpus: float, gpus_per_instance: float, kv_throughput_bytes_per_s: F) -> F:
    """Equation 2: B_out ≈ (N/P) · Φ_kv(L_avg), bytes/s that a region of `gpus` busy GPUs sends."""
    return gpus / gpus_per_instance * kv_throughput_bytes_per_s


def theta_prfaas(nodes: ArrayLike, prefill_s: ArrayLike, egress_bytes_per_s: float, kv_bytes: ArrayLike) -> Floats:
    """Equation 3: Θ_prfaas = min(N_prfaas / T_prefill(l_long), B_out / S_kv(l_long)).

    B_out here is what the link can carry. KV of no bytes is carried at any rate, if there is a link at all.
    """
    size = np.asarray(kv_bytes, np.float64)
    with np.errstate(over="ignore"):
        carried = np.divide(egress_bytes_per_s, size, out=np.full(size.shape, np.inf), where=size > 0)
    if egress_bytes_per_s <= 0:
        carried = np.zeros(size.shape)
    rate: Floats = np.minimum(np.divide(nodes, prefill_s), carried)
    return rate


def theta_pd_prefill(nodes: F, prefill_s: F) -> F:
    """Equation 4: Θ_pd-p = N_p / T_prefill(l_short)."""
    return nodes / prefill_s


def theta_pd_decode(nodes: F, max_batch: float, step_s: float, output_tokens: float) -> F:
    """Equation 5: Θ_pd-d = N_d · BS_max / (T_decode · L_out)."""
    return nodes * (max_batch / (step_s * output_tokens))


def lambda_max(prfaas: ArrayLike, share_offloaded: ArrayLike, pd_prefill: ArrayLike, pd_decode: ArrayLike) -> Floats:
    """Equation 6: Λ_max = min(Θ_prfaas / p, Θ_pd-p / (1 − p), Θ_pd-d). A side that gets no requests limits nothing."""
    p = np.asarray(share_offloaded, np.float64)
    return np.minimum(np.minimum(full_at(prfaas, p), full_at(pd_prefill, 1.0 - p)), pd_decode)


def threshold_imbalance(prfaas: ArrayLike, share_offloaded: ArrayLike, pd_prefill: ArrayLike) -> Floats:
    """Equation 7 holds where this is 0: Θ_prfaas / p − Θ_pd-p / (1 − p), requests/s, for 0 < p < 1. A higher t
    takes work from the PrfaaS region and gives it to the other, so this rises with t: below 0, t is too low."""
    p = np.asarray(share_offloaded, np.float64)
    return full_at(prfaas, p) - full_at(pd_prefill, 1.0 - p)


def role_imbalance(prfaas: F, pd_prefill: F, pd_decode: F) -> F:
    """Equation 8 holds where this is 0: Θ_prfaas + Θ_pd-p − Θ_pd-d, requests/s. Below 0 the system is short of prefill,
    above 0 of decode."""
    return prfaas + pd_prefill - pd_decode


def full_at(theta: ArrayLike, share: ArrayLike) -> Floats:
    """The rate of all requests at which a stage that gets `share` of them is full: Θ / share; infinite for share 0."""
    shares = np.asarray(share, np.float64)
    capacity = np.broadcast_to(np.asarray(theta, np.float64), np.broadcast_shapes(np.shape(theta), shares.shape))
    rate: Floats = np.divide(capacity, shares, out=np.full(capacity.shape, np.inf), where=shares > 0)
    return rate
