"""What an emulated engine emulates: times, sizes, and the profile that routers reckon with. Pure.

With `engine.profile` it is that profile: prefill takes T(uncached length), a decode step what the surface says of
batch and context, and KV has the profile's bytes, `bytes_scale` of them. Without, it is `engine.prefill_tokens_per_s`,
`decode_step_s` and the sizes of `engine.layers`, `kv_heads`, `head_dim` and `state_bytes`. `time_scale` multiplies
every time. What is *reported* is in real seconds and real bytes: what a router will see.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from prfaas.common.config import EngineConfig
from prfaas.common.errors import ConfigError
from prfaas.common.kv_layout import MAX_DIM, KvLayout
from prfaas.common.perfmodel.curves import Curve, Surface
from prfaas.common.perfmodel.profiles import NodeProfile, named
from prfaas.services.engine.emulated.content import emulated_layout

LEAST_S = 1e-9
"""With time_scale 0 nothing takes time, but a profile's times are above 0."""
ELEMENT_BYTES = 2


@dataclass(frozen=True, slots=True)
class Emulation:
    """times: before `time_scale`. layout: of the KV that is really made."""

    times: NodeProfile
    layout: KvLayout
    max_batch: int

    def prefill_s(self, uncached_tokens: int) -> float:
        return self.times.prefill_s.at(float(uncached_tokens))

    def step_s(self, batch: int, context_tokens: float) -> float:
        return self.times.step_s(batch, context_tokens)


def emulation(config: EngineConfig) -> Emulation:
    """Raises ConfigError: the profile isn't there, isn't good, or can't be emulated."""
    if not config.profile:
        layout = emulated_layout(config.layers, config.kv_heads, config.head_dim, config.state_bytes)
        return Emulation(_of_settings(config), layout, config.max_batch)
    profile = named(config.profile)
    if profile.decode_step_s is None:
        # A node of the prefill region: it may never decode, but the engine can.
        profile = replace(profile, decode_step_s=Surface((1.0,), (0.0,), ((config.decode_step_s,),)))
    return Emulation(profile, layout_of(profile, config.layers, config.bytes_scale), profile.max_batch)


def layout_of(profile: NodeProfile, layers: int, bytes_scale: float) -> KvLayout:
    """Layers of keys, values and a state whose bytes grow with the length as the profile's KV does, times the scale:
    the curve's slope is the bytes a token, what is left at length 0 the state. Sizes are whole elements of 2 bytes in
    each of `layers` layers, so that a token has a multiple of 4 · layers bytes, at least one."""
    curve = profile.kv_bytes
    fixed = curve.at(0.0)
    token = (curve.at(curve.longest) - fixed) / curve.longest
    dim = max(1, round(token * bytes_scale / (layers * 2 * ELEMENT_BYTES)))
    if dim > MAX_DIM:
        raise ConfigError(
            [f"engine.profile = {profile.name}: {token:.0f} bytes a token are too many for {layers} layers"]
        )
    return emulated_layout(layers, 1, dim, round(fixed * bytes_scale / layers))


def reported(config: EngineConfig, made: Emulation, model: str) -> NodeProfile:
    """The profile for routers: `time_scale` and the bytes of the layout are in it."""
    scale, times, layout = config.time_scale, made.times, made.layout
    fixed, token = float(layout.fixed_bytes), float(layout.bytes_per_token)
    assert times.decode_step_s is not None
    steps = times.decode_step_s
    return NodeProfile(
        times.name,
        model,
        times.hardware,
        times.gpus,
        Curve(
            times.prefill_s.lengths,
            tuple(max(LEAST_S, value * scale) for value in times.prefill_s.values),
            times.prefill_s.interpolation,
        ),
        Curve((0.0, 1000.0), (fixed, fixed + 1000 * token), "linear"),
        Surface(
            steps.batches,
            steps.contexts,
            tuple(tuple(max(LEAST_S, value * scale) for value in row) for row in steps.values),
        ),
        made.max_batch,
        config.arena_bytes,
        dict(times.provenance),
        dict(times.sources),
    )


def _of_settings(config: EngineConfig) -> NodeProfile:
    token_s = 1.0 / config.prefill_tokens_per_s
    provenance = dict.fromkeys(("prefill_s", "kv_bytes", "decode_step_s"), "fitted")
    return NodeProfile(
        "emulated",
        config.served_model or config.model or "emulated",
        "emulated",
        1,
        Curve((1.0, 1000.0), (token_s, 1000 * token_s), "linear"),
        Curve((0.0, 1.0), (0.0, 0.0), "linear"),
        Surface((1.0,), (0.0,), ((config.decode_step_s,),)),
        config.max_batch,
        0,
        provenance,  # type: ignore[arg-type]
    )
