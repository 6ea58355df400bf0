"""What each API key may ask for: requests and tokens a minute. Pure: `now_s` is an argument.

A file of keys has one a line, with what it may have behind it:

    sk-team-a  name=team-a requests_per_min=600 tokens_per_min=2000000
    sk-batch   name=batch  tokens_per_min=500000 first_priority=10
    sk-admin

Two buckets a key, which hold a minute's worth. A request is let in while each has one left, and takes its prompt and
the longest output that it may have; what it doesn't use of that comes back when it ends. It may overdraw, so that none
is too long to ever be let in, and those behind it wait until that is paid. Several routers share nothing: each grants
all of it. first_priority: the least number, which is the soonest, that its requests may have as `priority`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from prfaas.common.errors import ConfigError, QuotaError, RequestError
from prfaas.services.messages import FIRST_PRIORITY, LAST_PRIORITY

MINUTE_S = 60.0
NUMBERS = ("requests_per_min", "tokens_per_min")
MAX_NAME = 64


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """name: for logs and metrics, where the key must not be."""

    key: str
    name: str
    requests_per_min: float = math.inf
    tokens_per_min: float = math.inf
    first_priority: int = FIRST_PRIORITY


def parse_keys(lines: Iterable[str], where: str) -> list[KeyLimits]:
    """Of a file's lines; # begins a comment. where: the file, for its mistakes. Raises ConfigError with all of them."""
    found: list[KeyLimits] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].split() if not line.lstrip().startswith("#") else []
        if not words:
            continue
        try:
            found.append(_parse(words, f"key-{len(found) + 1}"))
        except ValueError as error:
            problems.append(f"{where} line {number}: {error}")
    names = [each.name for each in found]
    problems += [f"{where}: two keys are called {name}" for name in sorted(set(names)) if names.count(name) > 1]
    if problems:
        raise ConfigError(problems)
    return found


def _parse(words: list[str], name: str) -> KeyLimits:
    key, limits, first_priority = words[0], {}, FIRST_PRIORITY
    for word in words[1:]:
        what, equals, value = word.partition("=")
        if what == "name" and 0 < len(value) <= MAX_NAME:
            name = value
        elif what == "first_priority" and value.removeprefix("-").isdecimal() and abs(int(value)) <= LAST_PRIORITY:
            first_priority = int(value)
        elif what in NUMBERS and equals and _is_number(value):
            limits[what] = float(value)
        else:
            raise ValueError(
                f"{word[:40]!r} must be name=..., requests_per_min=N or tokens_per_min=N, with N above 0, "
                f"or first_priority=N from {FIRST_PRIORITY} to {LAST_PRIORITY}"
            )
    return KeyLimits(key, name, **limits, first_priority=first_priority)


def _is_number(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


class _Bucket:
    def __init__(self, per_min: float) -> None:
        self._per_min = per_min
        self._most = max(1.0, per_min)
        self._level = self._most
        self._filled_s = -math.inf

    def wait_s(self, now_s: float) -> float:
        """Until something may be taken; 0.0: now."""
        if math.isinf(self._per_min):
            return 0.0
        passed_s = now_s - self._filled_s if self._filled_s > -math.inf else 0.0
        self._level = min(self._most, self._level + passed_s * self._per_min / MINUTE_S)
        self._filled_s = now_s
        return 0.0 if self._level >= 1 else max(1e-3, (1 - self._level) * MINUTE_S / self._per_min)

    def take(self, amount: float) -> None:
        if not math.isinf(self._per_min):
            self._level = min(self._most, self._level - amount)


class Quotas:
    """Of all keys that a router knows."""

    def __init__(self, keys: Iterable[KeyLimits]) -> None:
        self._of = {each.key: (each, _Bucket(each.requests_per_min), _Bucket(each.tokens_per_min)) for each in keys}

    def name(self, key: str) -> str:
        """Of a key, for logs and metrics; "": it has none."""
        return self._of[key][0].name if key in self._of else ""

    def check_priority(self, key: str, priority: int) -> None:
        """Raises RequestError: it is sooner than this key may ask for."""
        if key in self._of and priority < (first := self._of[key][0].first_priority):
            raise RequestError(
                f"this API key may ask for priority {first} or a higher number (later), not {priority}",
                param="priority",
            )

    def admit(self, key: str, tokens: int, now_s: float) -> None:
        """A request with so many tokens of prompt and output at most. Raises QuotaError, and then takes nothing."""
        if key not in self._of:
            return
        limits, requests, amount = self._of[key]
        for bucket, most, what in (
            (requests, limits.requests_per_min, "requests"),
            (amount, limits.tokens_per_min, "tokens"),
        ):
            wait_s = bucket.wait_s(now_s)
            if wait_s > 0:
                raise QuotaError(
                    f"this API key may have {most:,.0f} {what} a minute; try again in {math.ceil(wait_s)} s",
                    retry_after_s=math.ceil(wait_s),
                )
        requests.take(1)
        amount.take(tokens)

    def give_back(self, key: str, tokens: int) -> None:
        """Output that an admitted request did not have."""
        if key in self._of:
            self._of[key][2].take(-tokens)
