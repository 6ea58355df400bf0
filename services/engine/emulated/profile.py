"""What an emulated engine does, as the profile that routers reckon with. Pure."""

from __future__ import annotations

from prfaas.common.config import EngineConfig
from prfaas.common.perfmodel.curves import Curve, Surface
from prfaas.common.perfmodel.profiles import NodeProfile
from prfaas.services.engine.api import EngineInfo

LEAST_S = 1e-9
"""With time_scale 0 nothing takes time, but a profile's times are above 0."""


def profile_of(config: EngineConfig, info: EngineInfo) -> NodeProfile:
    """Times as they pass here, `time_scale` included."""
    token_s = max(LEAST_S, config.time_scale / config.prefill_tokens_per_s)
    step_s = max(LEAST_S, config.decode_step_s * config.time_scale)
    fixed, token = float(info.layout.fixed_bytes), float(info.layout.bytes_per_token)
    return NodeProfile(
        "emulated",
        info.model,
        "emulated",
        1,
        Curve((1.0, 1000.0), (token_s, 1000 * token_s), "linear"),
        Curve((0.0, 1000.0), (fixed, fixed + 1000 * token), "linear"),
        Surface((1.0,), (0.0,), ((step_s,),)),
        config.max_batch,
        config.arena_bytes,
    )
