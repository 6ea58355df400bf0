"""A line as a person sets it, and how the running one is asked and changed. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType
from prfaas.services.wan.line import Conditions, Counters

LEAST_QUEUE_BYTES = 256 << 10
MAX_DELAY_MS = 60_000.0

RateMbit = Annotated[float, Meta(gt=0, le=1e6)]
DelayMs = Annotated[float, Meta(ge=0, le=MAX_DELAY_MS)]
LossPercent = Annotated[float, Meta(ge=0, le=100)]
QueueBytes = Annotated[int, Meta(ge=0, le=1 << 40)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    rate_mbit: RateMbit = 500.0
    """Each way, of whole IP packets."""
    delay_ms: DelayMs = 20.0
    """One way."""
    jitter_ms: DelayMs = 0.0
    loss_percent: LossPercent = 0.0
    queue_bytes: QueueBytes = 0
    """0: one bandwidth-delay product."""
    down: bool = False

    def conditions(self) -> Conditions:
        bits_per_s = self.rate_mbit * 1e6
        round_trip_bytes = int(bits_per_s / 8 * 2 * self.delay_ms / 1e3)
        return Conditions(
            rate_bits_per_s=bits_per_s,
            delay_s=self.delay_ms / 1e3,
            jitter_s=self.jitter_ms / 1e3,
            loss=self.loss_percent / 100,
            queue_bytes=self.queue_bytes or max(LEAST_QUEUE_BYTES, round_trip_bytes),
            down=self.down,
        )


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is unset stays as it is; with nothing set it is a question."""

    rate_mbit: RateMbit | UnsetType = UNSET
    delay_ms: DelayMs | UnsetType = UNSET
    jitter_ms: DelayMs | UnsetType = UNSET
    loss_percent: LossPercent | UnsetType = UNSET
    queue_bytes: QueueBytes | UnsetType = UNSET
    down: bool | UnsetType = UNSET


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a Change."""

    settings: Settings
    there: Counters
    """From the first side to the second."""
    back: Counters


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    error: str


def changed(settings: Settings, change: Change) -> Settings:
    given = {name: value for name in change.__struct_fields__ if (value := getattr(change, name)) is not UNSET}
    return msgspec.structs.replace(settings, **given)
