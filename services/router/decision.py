"""From a request to its decision and what that asks of nodes and links. Pure: `now_s` is an argument.

x-prfaas-pin-region: west        decode there
x-prfaas-pin-route: offload      prefill in another region; home: by a prefill node of the one that decodes;
                                 local: by the decode node itself
x-prfaas-deadline-s: 1.5         the first token within so many seconds of the request's arrival, or 429 at once
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from prfaas.common.config import RouterConfig
from prfaas.common.errors import RequestError, TooLateError, UnavailableError
from prfaas.common.scheduling.least_loaded import LeastLoaded
from prfaas.common.scheduling.policies import (
    AdaptiveThreshold,
    Admission,
    HomogeneousPd,
    OffloadAll,
    RoundRobin,
    StaticThreshold,
)
from prfaas.common.scheduling.routes import RouteSettings
from prfaas.common.scheduling.types import (
    AdmittingPolicy,
    ClusterSnapshot,
    Decision,
    PinnedRoute,
    PrefixMatches,
    Refused,
)
from prfaas.services.messages import FetchFrom
from prfaas.services.router.registry import Node
from prfaas.services.router.share import Share

PIN_REGION_HEADER = "x-prfaas-pin-region"
PIN_ROUTE_HEADER = "x-prfaas-pin-route"
DEADLINE_HEADER = "x-prfaas-deadline-s"
MAX_DEADLINE_S = 86_400.0
LEAST_FETCH_S = 1.0
"""Within it a session may have to be dialled first."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request's headers ask of its routing."""

    region: str | None = None
    route: PinnedRoute | None = None
    deadline_s: float | None = None
    """From the arrival to the first token."""


NO_WISHES = Wishes()


def read_wishes(headers: Mapping[str, str]) -> Wishes:
    """Raises RequestError naming the header."""
    region, route, deadline = (headers.get(name) for name in (PIN_REGION_HEADER, PIN_ROUTE_HEADER, DEADLINE_HEADER))
    if region is None and route is None and deadline is None:
        return NO_WISHES
    if region is not None and not 1 <= len(region) <= 128:
        raise RequestError(f"{PIN_REGION_HEADER} must name a region", param=PIN_REGION_HEADER)
    if route is not None and route not in get_args(PinnedRoute):
        raise RequestError(
            f"{PIN_ROUTE_HEADER} must be one of {', '.join(get_args(PinnedRoute))}, not {route[:50]!r}",
            param=PIN_ROUTE_HEADER,
        )
    return Wishes(region, route, None if deadline is None else _seconds(deadline))  # type: ignore[arg-type]


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_DEADLINE_S:
        raise RequestError(
            f"{DEADLINE_HEADER} must be seconds above 0, at most {MAX_DEADLINE_S:g}, not {text[:50]!r}",
            param=DEADLINE_HEADER,
        )
    return value


def region_index(wishes: Wishes, cluster: ClusterSnapshot) -> int | None:
    """Of the pinned region. Raises RequestError when there is none of that name."""
    if wishes.region is None:
        return None
    if wishes.region not in cluster.region_names:
        known = ", ".join(cluster.region_names[:20]) or "none yet"
        raise RequestError(
            f"{PIN_REGION_HEADER}: no region {wishes.region!r}; there are {known}", param=PIN_REGION_HEADER
        )
    return cluster.region_names.index(wishes.region)


def make_policy(config: RouterConfig) -> AdmittingPolicy:
    """`router.policy` with its settings."""
    admission = Admission(by_slo=False)
    if config.slo_ttft_s > 0:
        admission = Admission(config.slo_ttft_s, config.slo_prefill_factor)
    settings = RouteSettings(local_prefill=True, queue_for_memory=True)
    threshold = float(config.offload_threshold_tokens)
    match config.policy:
        case "adaptive":
            return AdaptiveThreshold(admission, settings, planned_tokens=threshold)
        case "static":
            return StaticThreshold(admission, settings, threshold_tokens=threshold)
        case "homogeneous":
            return HomogeneousPd(admission, settings)
        case "offload-all":
            return OffloadAll(admission, settings)
        case "round-robin":
            return RoundRobin(admission, settings)
        case "least-loaded":
            return LeastLoaded(config.offload_threshold_tokens)


def refusal(refused: Refused) -> UnavailableError:
    """As the client sees it."""
    retry_after_s = max(1, math.ceil(refused.retry_after_s))
    match refused.reason:
        case "deadline":
            return TooLateError("the first token would come after the deadline", retry_after_s=retry_after_s)
        case "full":
            return UnavailableError("all decode nodes are full; try again", retry_after_s=retry_after_s)
        case "pinned":
            return UnavailableError(
                f"no node can serve the route that {PIN_ROUTE_HEADER} asks for now", retry_after_s=retry_after_s
            )
        case _:
            return UnavailableError("no decode node can take requests now; try again", retry_after_s=retry_after_s)


def shares(
    decision: Decision, cluster: ClusterSnapshot, prompt_tokens: int, max_output_tokens: int
) -> tuple[Share, Share | None]:
    """What a decision asks of its decode node and of its prefill node, if it has one.

    Memory of the decode node is needed for prompt and output, whatever it holds of them in its pool.
    """
    decode, prefill = decision.decode_node, decision.prefill_node
    profile = cluster.profiles[cluster.profile.item(decode)]
    kv_bytes = int(profile.kv_bytes.at(prompt_tokens + max_output_tokens))
    stay_s = max_output_tokens * profile.step_s(profile.max_batch, prompt_tokens + max_output_tokens)
    if prefill is None:
        return Share(prompt_tokens, prefill_s=decision.prefill_s, kv_bytes=kv_bytes, stay_s=stay_s), None
    pair = cluster.region.item(prefill), cluster.region.item(decode)
    uncached = max(0, prompt_tokens - decision.prefill_start)
    link = pair if decision.wire_bytes else None
    asked = Share(uncached, prefill_s=decision.prefill_s, link=link, wire_bytes=decision.wire_bytes)
    return Share(prompt_tokens, kv_bytes=kv_bytes, stay_s=stay_s), asked


def fetch_from(
    decision: Decision, cluster: ClusterSnapshot, holder: Node, prefixes: PrefixMatches | None, prompt_tokens: int
) -> FetchFrom:
    """What the prefill node is to fetch first. It gives up when that takes twice as long as computing it would."""
    assert decision.prefill_node is not None
    prefill_s = cluster.profiles[cluster.profile.item(decision.prefill_node)].prefill_s
    own = 0 if prefixes is None else prefixes.on_node(decision.prefill_node)
    saved_s = prefill_s.at(prompt_tokens - own) - prefill_s.at(prompt_tokens - decision.prefill_start)
    return FetchFrom(holder.name, holder.kv_addresses, decision.prefill_start, max(LEAST_FETCH_S, 2 * saved_s))


def in_words(decision: Decision, prompt_tokens: int) -> str:
    """For a response header: what it was decided by. ASCII without control characters."""
    parts = [f"uncached={prompt_tokens - decision.prefill_start}"]
    if math.isfinite(decision.threshold_tokens):
        parts.append(f"threshold={decision.threshold_tokens:.0f}")
    if math.isfinite(decision.predicted_ttft_s):
        parts.append(f"ttft={decision.predicted_ttft_s:.3f}s")
    if decision.token_start:
        parts.append(f"held={decision.token_start}")
    if decision.fetch_node is not None:
        parts.append(f"fetch={decision.prefill_start}")
    return "; ".join(parts)
