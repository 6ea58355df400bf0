"""Small profiles and clusters with round numbers."""

import numpy as np
from prfaas.common.perfmodel.curves import Curve, Surface
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.perfmodel.profiles import NodeProfile
from prfaas.common.scheduling.policies import ADMIT_ALL, AdaptiveThreshold
from prfaas.loadgen.simulator.cluster import Cluster, Group
from prfaas.loadgen.simulator.columns import Load
from prfaas.loadgen.simulator.simulation import Simulation


def profile(prefill_s_per_token=0.001, bytes_per_token=1000.0, step_s=0.02, max_batch=4, kv_capacity_bytes=0):
    """Everything proportional to the length; the decode step constant."""
    return NodeProfile(
        "test",
        "model",
        "hardware",
        1,
        Curve((0.0, 1000.0), (0.0, 1000 * prefill_s_per_token)),
        Curve((0.0, 1000.0), (0.0, 1000 * bytes_per_token)),
        Surface((1.0,), (0.0,), ((step_s,),)),
        max_batch,
        kv_capacity_bytes,
    )


def two_regions(prefill=1, decode=1, away=1, bandwidth=1e9, **more):
    """Home with both roles, a prefill region twice as fast, one link."""
    groups = [
        Group("home", "prefill", profile(), prefill),
        Group("home", "decode", profile(**more), decode),
        Group("away", "prefill", profile(prefill_s_per_token=0.0005), away),
    ]
    return Cluster(groups, {("away", "home"): LinkProfile(bandwidth)} if bandwidth else {})


def load(arrivals, prompts=1000, outputs=10):
    count = len(arrivals)
    return Load(
        np.array(arrivals, np.float64),
        np.broadcast_to(np.asarray(prompts, np.int64), count).copy(),
        np.broadcast_to(np.asarray(outputs, np.int64), count).copy(),
    )


def random_load(seed, count, rate):
    rng = np.random.default_rng(seed)
    return Load(
        np.cumsum(rng.exponential(1 / rate, count)),
        rng.integers(1, 3000, count),
        rng.integers(1, 60, count),
    )


def adaptive_run(cluster, requests, changes=(), admission=ADMIT_ALL, **more):
    policy = AdaptiveThreshold(admission, planned_tokens=1000)
    return Simulation(cluster, requests, policy, changes, on_tick=policy.adapt, **more).run()
