"""What one request asks of one node and of the link between, as predicted when it was dispatched. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prfaas.common.perfmodel.profiles import NodeProfile
from prfaas.services.messages import LoadMessage


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """tokens: uncached ones of a prefill, or the context of a decode. prefill_s: of the node's time. kv_bytes: of its
    memory. stay_s: how long it would decode there in a full batch, with the longest output that it may have.
    wire_bytes: KV that crosses `link`, [from, to] region indices."""

    tokens: int
    prefill_s: float = 0.0
    kv_bytes: int = 0
    stay_s: float = 0.0
    link: tuple[int, int] | None = None
    wire_bytes: float = 0.0


def busy_s(profile: NodeProfile, load: LoadMessage, own: Sequence[Share], running_for_s: float) -> float:
    """How long a prefill node will be busy with what it has reported, and with those of this router's requests (`own`,
    oldest first) that had not reached it when it did.

    Of its own requests a router knows each one's time. Of others the node reports tokens and how many they are: T of
    their mean length, so often, which is too little where lengths differ, since T of a long prompt is more than its
    share. What of the first one is done is known by how long it has run.
    """
    reported = load.queued_requests + load.running_requests
    seconds = sum(_alone_s(profile, share) for share in own)
    first_s = _alone_s(profile, own[0]) if own else 0.0
    others = reported - len(own)
    if others > 0:
        tokens = max(0, load.queued_tokens - sum(share.tokens for share in own))
        each_s = profile.prefill_s.at(tokens / others) if tokens else 0.0
        seconds += others * each_s
        first_s = max(first_s, each_s)
    return seconds - min(running_for_s, first_s) if reported and load.queued_tokens else seconds


def _alone_s(profile: NodeProfile, share: Share) -> float:
    return share.prefill_s or (profile.prefill_s.at(share.tokens) if share.tokens > 0 else 0.0)
