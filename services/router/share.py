"""What one request asks of one node and of the link between, as predicted when it was dispatched. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prfaas.common.perfmodel.profiles import NodeProfile
from prfaas.services.messages import LoadMessage


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """tokens: uncached ones of a prefill, or the context of a decode. prefill_s: of the node's time. kv_bytes: of its
    memory. wire_bytes: KV that crosses `link`, [from, to] region indices."""

    tokens: int
    prefill_s: float = 0.0
    kv_bytes: int = 0
    link: tuple[int, int] | None = None
    wire_bytes: float = 0.0


def busy_s(profile: NodeProfile, load: LoadMessage, own: Sequence[Share], running_for_s: float) -> float:
    """How long a prefill node will be busy with what it has reported, and with those of this router's requests (`own`,
    oldest first) that had not reached it when it did.

    It reports tokens and requests, not each length: T of the mean length, so often. What of the first one is done is
    known by how long it has run.
    """
    reported = load.queued_requests + load.running_requests
    seconds = 0.0
    if load.queued_tokens and reported:
        each_s = profile.prefill_s.at(load.queued_tokens / reported)
        seconds = max(0.0, reported * each_s - min(running_for_s, each_s))
    unheard = len(own) - reported
    if unheard > 0:
        seconds += sum(share.prefill_s for share in own[-unheard:])
    return seconds
