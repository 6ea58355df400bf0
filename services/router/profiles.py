"""The profiles of the nodes that heartbeats name: each is sent once, and known by the hash of its file's bytes. Pure.

Nodes that measure themselves have each a profile of their own. Policies look at pools of nodes with one profile, so
those that are alike (`ALIKE`) count as one, the first that came: what a node is slower than that shows in its queue.

A node that has none, or whose profile isn't here yet, gets a nominal one. It is no measurement: queues then weigh by
their tokens, and KV has no size, so that neither links nor memory count.
"""

from __future__ import annotations

import dataclasses
import math

from prfaas.common import log
from prfaas.common.errors import ConfigError
from prfaas.common.perfmodel.curves import Curve, Surface
from prfaas.common.perfmodel.profiles import NodeProfile, parse, profile_id

MAX_PROFILES = 64
"""Kinds of nodes; slots that no node uses are used again."""
ALIKE = 0.15
"""Profiles whose times differ by less, relatively, are one."""
ALIKE_LENGTHS = (256.0, 2048.0, 16384.0, 131072.0)
"""At which they are compared, in tokens."""
MAX_PROFILE_BYTES = 256 << 10
"""In a heartbeat. A profile of a hundred measured points has 8 KiB."""
MAX_BAD = 256
MAX_NAMES = 1 << 14
"""Ids that are known: some for each node, since a node that measures itself has a new one from time to time."""
NOMINAL_TOKENS_PER_S = 10_000.0
NOMINAL_STEP_S = 0.02
NOMINAL_BATCH = 64

logger = log.get_logger("router")


class Profiles:
    """`table` is the snapshot's `profiles`: the same list always, and a slot's content changes only while no node has
    its index."""

    def __init__(self) -> None:
        self.table: list[NodeProfile] = []
        self._slots: dict[str, int] = {}
        self._users: list[int] = []
        self._bad: set[str] = set()
        """Ids whose files were refused: they are not asked for again."""

    def wants(self, given_id: str) -> bool:
        """Whether the next heartbeat should bring the file."""
        return bool(given_id) and given_id not in self._slots and given_id not in self._bad and self._has_room()

    def take(self, node: str, given_id: str, text: str) -> None:
        """A file that a heartbeat brought. One that can't be used is logged, once, and its nodes stay nominal."""
        if not self.wants(given_id):
            return
        try:
            data = text.encode()
            if len(data) > MAX_PROFILE_BYTES:
                raise ConfigError(
                    [f"it has {len(data)} bytes; in a heartbeat a profile has at most {MAX_PROFILE_BYTES}"]
                )
            if profile_id(data) != given_id:
                raise ConfigError(["its id is not the hash of its bytes"])
            profile = parse(data, "profile")
        except ConfigError as error:
            if len(self._bad) < MAX_BAD:
                self._bad.add(given_id)
            logger.warning("profile_refused", node=node, profile=given_id[:64], error=str(error)[:500])
            return
        profile = _that_decodes(profile)
        like = self._like(profile)
        if like is None:
            self._put(given_id, profile)
        else:
            self._slots[given_id] = like
            while len(self._slots) > MAX_NAMES:
                del self._slots[next(iter(self._slots))]
        logger.info("profile", node=node, profile=given_id, name=profile.name, hardware=profile.hardware)

    def use(self, node: str, given_id: str, max_requests: int) -> int:
        """The slot for a node: of its profile, else a nominal one. `leave` it when the node goes or has another."""
        slot = self.slot(given_id)
        if slot is None:
            batch = max_requests or NOMINAL_BATCH
            name = f"nominal-{batch}"
            slot = self._slots.get(name)
            if slot is None and self._has_room():
                slot = self._put(name, nominal(batch))
                logger.warning(
                    "no_profile", node=node, mend="set engine.profile: until then a nominal speed is reckoned with"
                )
            if slot is None:  # more kinds than slots: whatever is there is as wrong as another
                slot = 0
        self._users[slot] += 1
        return slot

    def slot(self, given_id: str) -> int | None:
        """Of a profile that is here; None: it isn't."""
        return self._slots.get(given_id) if given_id else None

    def leave(self, slot: int) -> None:
        self._users[slot] -= 1

    def _like(self, profile: NodeProfile) -> int | None:
        """A slot in use whose profile is nearly this one."""
        for slot, other in enumerate(self.table):
            if self._users[slot] and alike(profile, other):
                return slot
        return None

    def _has_room(self) -> bool:
        return len(self.table) < MAX_PROFILES or 0 in self._users

    def _put(self, given_id: str, profile: NodeProfile) -> int:
        if len(self.table) < MAX_PROFILES:
            self.table.append(profile)
            self._users.append(0)
            slot = len(self.table) - 1
        else:
            slot = self._users.index(0)
            for old in [name for name, taken in self._slots.items() if taken == slot]:
                del self._slots[old]
            self.table[slot] = profile
        self._slots[given_id] = slot
        return slot


def alike(one: NodeProfile, other: NodeProfile) -> bool:
    """Of one model, with KV of the same size and as large a batch, and nearly as fast."""
    if (one.model, one.max_batch) != (other.model, other.max_batch):
        return False
    near = all(
        math.isclose(one.prefill_s.at(length), other.prefill_s.at(length), rel_tol=ALIKE)
        and math.isclose(one.kv_bytes.at(length), other.kv_bytes.at(length), rel_tol=0.01)
        for length in ALIKE_LENGTHS
    )
    return near and all(
        math.isclose(one.step_s(batch, length), other.step_s(batch, length), rel_tol=ALIKE)
        for batch in (1, one.max_batch)
        for length in ALIKE_LENGTHS[:2]
    )


def nominal(max_batch: int) -> NodeProfile:
    """10,000 tokens/s of prefill and 20 ms a step: the emulated engine's defaults. KV of no size."""
    return NodeProfile(
        "nominal",
        "unknown",
        "unknown",
        1,
        Curve((0.0, NOMINAL_TOKENS_PER_S), (0.0, 1.0), "linear"),
        Curve((0.0,), (0.0,)),
        Surface((1.0,), (0.0,), ((NOMINAL_STEP_S,),)),
        max_batch,
    )


def _that_decodes(profile: NodeProfile) -> NodeProfile:
    """A node takes either role, whatever its profile was measured in."""
    if profile.decode_step_s is not None:
        return profile
    steps = Surface((1.0,), (0.0,), ((NOMINAL_STEP_S,),))
    return dataclasses.replace(profile, decode_step_s=steps, max_batch=NOMINAL_BATCH)
