"""What all requests of a vLLM engine share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from prfaas.common.config import EngineConfig, VllmConfig
from prfaas.common.errors import RequestError
from prfaas.services.engine.api import EngineInfo
from prfaas.services.engine.measured_profile import MeasuredProfile
from prfaas.services.engine.prefill_line import PrefillLine
from prfaas.services.vllm.client import VllmClient
from prfaas.services.vllm.prefix_mirror import PrefixMirror, salt_of
from prfaas.services.vllm.workers import Workers

STEP_WEIGHT = 0.1
"""How much each gap between two tokens counts in the mean."""


@dataclass(slots=True)
class StepTime:
    """What a decode step of this vLLM takes, from the gaps between a stream's tokens."""

    seconds: float = 0.02

    def add(self, gap_s: float) -> None:
        self.seconds += (gap_s - self.seconds) * STEP_WEIGHT


@dataclass(frozen=True, slots=True)
class Desk:
    config: EngineConfig
    vllm: VllmConfig
    info: EngineInfo
    served_model: str
    """As vLLM calls it."""
    client: VllmClient
    workers: Workers
    line: PrefillLine
    measured: MeasuredProfile
    mirror: PrefixMirror | None
    adapters: Sequence[str]
    """As they were when this node started."""
    step: StepTime = field(default_factory=StepTime)

    def salt(self, tenant: str) -> str | None:
        """`cache_salt` for a request of this tenant's."""
        if self.mirror is not None:
            self.mirror.learn(tenant)
        return salt_of(tenant)

    def check_length(self, tokens: int) -> None:
        """Raises RequestError."""
        if tokens > self.info.max_model_tokens:
            raise RequestError(
                f"prompt and output have {tokens} tokens, this model takes {self.info.max_model_tokens}",
                param="max_tokens",
                code="context_length_exceeded",
            )
