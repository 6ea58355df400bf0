"""What became of each request, the same for a live run and a simulated one: records, and columns of them.

All `_s` instants are seconds since the beginning of the workload, so that `scheduled_s` is the workload's own time, and
a latency is an instant minus `scheduled_s`: time that a request waited for a late client, or for a slot, counts.
Durations and instants that are not known are None in a record and NaN in a column; counts that are not known are -1.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError

OK, FAILED, REFUSED, INTERRUPTED = "ok", "failed", "refused", "interrupted"
STATUSES = (OK, FAILED, REFUSED, INTERRUPTED)
"""Refused: the service said at once that it won't (429, or a simulated admission). Interrupted: the run was ended."""

MAX_RECORDS = 100_000_000
MAX_ITLS_A_REQUEST = 65_536
MAX_ITLS = 8_000_000
"""Kept of a whole run, 32 MB: above it every second one is dropped, as often as needed."""
ROWS_AT_ONCE = 65_536
MAX_WORDS = 10_000
"""Different words in a column of words; what comes later is OTHER."""
OTHER = "other"
UNKNOWN = -1

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class RequestRecord(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One request. Only the first three fields are needed; a simulator fills in more than a foreign server tells."""

    index: int
    """Its place in the workload."""
    scheduled_s: float
    status: str
    """One of STATUSES."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    sent_s: float | None = None
    first_token_s: float | None = None
    second_token_s: float | None = None
    last_token_s: float | None = None
    end_s: float | None = None
    """The end of the answer, or the moment in which it failed."""
    itl_s: list[float] = []
    """Gaps between one piece of text and the next; a piece is a token unless the server sends several at once."""
    client_late_s: float | None = None
    """How much later than it could it was sent, because the client itself was busy."""
    error: str = ""
    """A word, such as http_503, connection_refused, stream_broken."""
    request_id: str = ""
    turn: int = 0
    reason: str = ""
    """Why it was routed as it was; PrfaaS' x-prfaas-reason."""
    decision: str = ""
    """What that was decided by, in the router's words; PrfaaS' x-prfaas-decision."""
    fallbacks: list[str] = []
    """What went wrong on the way without the client noticing."""
    offloaded: bool | None = None
    """Prefilled in another region than the one that decodes."""
    region: str = ""
    """That prefilled it, where it is known."""
    decode_region: str = ""
    prefill_node: str = ""
    decode_node: str = ""
    cached_tokens: int = UNKNOWN
    """Prompt tokens that a prefix cache held."""
    router_s: float | None = None
    """The parts of TTFT: to prefill's queue; in it; prefill; the transfer that prefill didn't hide; the first step."""
    queue_s: float | None = None
    prefill_s: float | None = None
    exposed_s: float | None = None
    first_step_s: float | None = None
    transfer_s: float | None = None
    """From prefill's start, as the first pieces leave with its first layer, to the arrival of the last layer."""
    kv_raw_bytes: int = UNKNOWN
    kv_wire_bytes: int = UNKNOWN
    fetched_wire_bytes: int = UNKNOWN
    """Of a prefix that came from another region's cache before prefill."""


FLOAT_COLUMNS = (
    "scheduled_s",
    "sent_s",
    "first_token_s",
    "second_token_s",
    "last_token_s",
    "end_s",
    "client_late_s",
    "router_s",
    "queue_s",
    "prefill_s",
    "exposed_s",
    "first_step_s",
    "transfer_s",
)
BYTES_COLUMNS = ("kv_raw_bytes", "kv_wire_bytes", "fetched_wire_bytes")
INTEGER_COLUMNS = ("index", "turn", "prompt_tokens", "output_tokens", "cached_tokens", *BYTES_COLUMNS)
WORD_COLUMNS = ("status", "error", "reason", "fallbacks", "region", "decode_region", "prefill_node", "decode_node")
OFFLOADED_CODES: Mapping[bool | None, int] = {None: -1, False: 0, True: 1}
FALLBACK_SEPARATOR = "+"


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """A column of few different words: `names[codes[i]]` is row i's, "" where there is none. codes: shape [n]."""

    codes: NDArray[np.int32]
    names: tuple[str, ...]

    @classmethod
    def of(cls, words: Sequence[str]) -> Self:
        seen: dict[str, int] = {}
        codes = np.fromiter((seen.setdefault(word, len(seen)) for word in words), np.int32, len(words))
        return cls(codes, tuple(seen))

    @classmethod
    def all(cls, word: str, n: int) -> Self:
        """`n` times the same."""
        return cls(np.zeros(n, np.int32), (word,))

    def __getitem__(self, row: int) -> str:
        return self.names[int(self.codes[row])]

    def equal(self, word: str) -> NDArray[np.bool_]:
        """Which rows are `word`, shape [n]."""
        if word not in self.names:
            return np.zeros(self.codes.size, np.bool_)
        return np.asarray(self.codes == self.names.index(word))

    def counts(self, among: NDArray[np.bool_] | None = None) -> dict[str, int]:
        """How often each word but "" stands in the rows `among` (all by default), the most frequent first."""
        codes = self.codes if among is None else self.codes[among]
        numbers = np.bincount(codes, minlength=len(self.names)).tolist()
        counted = {name: n for name, n in zip(self.names, numbers, strict=True) if name and n}
        return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Columns over requests, shape [n]; a million of them are some 200 MB. `offloaded`: 1, 0, or -1 for not known.

    `itl_s` float32 holds the gaps of all requests, row i's at itl_offsets[i] : itl_offsets[i + 1]; it is empty where
    nobody measured them. With `itl_stride` above 1 it is every so manieth gap of the run.
    """

    index: Integers
    turn: Integers
    scheduled_s: Floats
    sent_s: Floats
    first_token_s: Floats
    second_token_s: Floats
    last_token_s: Floats
    end_s: Floats
    client_late_s: Floats
    prompt_tokens: Integers
    output_tokens: Integers
    cached_tokens: Integers
    router_s: Floats
    queue_s: Floats
    prefill_s: Floats
    exposed_s: Floats
    first_step_s: Floats
    transfer_s: Floats
    kv_raw_bytes: Integers
    kv_wire_bytes: Integers
    fetched_wire_bytes: Integers
    offloaded: NDArray[np.int8]
    status: Words
    error: Words
    reason: Words
    fallbacks: Words
    """Of one request joined with FALLBACK_SEPARATOR."""
    region: Words
    decode_region: Words
    prefill_node: Words
    decode_node: Words
    itl_s: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    itl_offsets: Integers = field(default_factory=lambda: np.zeros(1, np.int64))
    itl_stride: int = 1
    request_ids: Sequence[str] = ()
    """Empty, or one a row."""
    decisions: Sequence[str] = ()
    """Likewise: no two need be the same."""

    @classmethod
    def of(cls, scheduled_s: Floats, **columns: Any) -> Self:
        """From whole columns, as a simulator has them; those that are left out are unknown (NaN, -1, ""), but `status`
        is "ok", `sent_s` is `scheduled_s`, `last_token_s` is `end_s` and `index` counts from 0.

        Columns of words are `Words` or sequences of str, `offloaded` is anything that becomes int8. Raises ValueError
        for a column of another shape and for a status that there isn't.
        """
        n = int(scheduled_s.size)
        given: dict[str, Any] = {"scheduled_s": scheduled_s, "sent_s": scheduled_s, "index": np.arange(n), **columns}
        if "end_s" in given:
            given.setdefault("last_token_s", given["end_s"])
        made: dict[str, Any] = {}
        for name in FLOAT_COLUMNS:
            made[name] = np.asarray(given.pop(name) if name in given else np.full(n, np.nan), np.float64)
        for name in INTEGER_COLUMNS:
            default = 0 if name in ("turn", "prompt_tokens", "output_tokens") else UNKNOWN
            made[name] = np.asarray(given.pop(name) if name in given else np.full(n, default), np.int64)
        made["offloaded"] = np.asarray(given.pop("offloaded", np.full(n, -1)), np.int8)
        for name in WORD_COLUMNS:
            words = given.pop(name, Words.all(OK if name == "status" else "", n))
            made[name] = words if isinstance(words, Words) else Words.of(words)
        return cls(**made, **given)

    def __post_init__(self) -> None:
        n = self.scheduled_s.size
        for name in (*FLOAT_COLUMNS, *INTEGER_COLUMNS, "offloaded"):
            if getattr(self, name).shape != (n,):
                raise ValueError(f"column {name} has shape {getattr(self, name).shape}; there are {n} requests")
        for name in WORD_COLUMNS:
            if getattr(self, name).codes.shape != (n,):
                raise ValueError(f"column {name} has {getattr(self, name).codes.size} words for {n} requests")
        if unknown := set(self.status.names) - set(STATUSES):
            raise ValueError(f"there is no status {sorted(unknown)[0]!r}; there are {', '.join(STATUSES)}")

    def __len__(self) -> int:
        return int(self.scheduled_s.size)

    def __getitem__(self, row: int) -> RequestRecord:
        """Raises IndexError outside 0 … len − 1."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        return next(self._rows(row, row + 1))

    def __iter__(self) -> Iterator[RequestRecord]:
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield from self._rows(start, min(start + ROWS_AT_ONCE, len(self)))

    def _rows(self, start: int, end: int) -> Iterator[RequestRecord]:
        # Lists of Python numbers: reading numpy scalars one by one costs ten times as much.
        columns: dict[str, list[Any]] = {}
        for name in FLOAT_COLUMNS:
            values = getattr(self, name)[start:end]
            columns[name] = [None if value != value else value for value in values.tolist()]
        for name in INTEGER_COLUMNS:
            columns[name] = getattr(self, name)[start:end].tolist()
        for name in WORD_COLUMNS:
            words = getattr(self, name)
            columns[name] = [words.names[code] for code in words.codes[start:end].tolist()]
        columns["fallbacks"] = [joined.split(FALLBACK_SEPARATOR) if joined else [] for joined in columns["fallbacks"]]
        columns["offloaded"] = [None if code < 0 else bool(code) for code in self.offloaded[start:end].tolist()]
        columns["itl_s"] = [self.itls(row).tolist() for row in range(start, end)]
        for name, texts in (("request_id", self.request_ids), ("decision", self.decisions)):
            columns[name] = list(texts[start:end]) or [""] * (end - start)
        names = tuple(columns)
        for row in zip(*columns.values(), strict=True):
            yield RequestRecord(**dict(zip(names, row, strict=True)))

    @property
    def ok(self) -> NDArray[np.bool_]:
        return self.status.equal(OK)

    def itls(self, row: int) -> NDArray[np.float32]:
        if self.itl_offsets.size != len(self) + 1:
            return np.empty(0, np.float32)
        return self.itl_s[self.itl_offsets[row] : self.itl_offsets[row + 1]]

    def in_order(self) -> Records:
        """The same by `index`; a live run notes requests as they end."""
        order = np.argsort(self.index, kind="stable")
        if np.array_equal(order, np.arange(len(self))):
            return self
        made: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in (*FLOAT_COLUMNS, *INTEGER_COLUMNS, "offloaded"):
            made[name] = made[name][order]
        for name in WORD_COLUMNS:
            made[name] = Words(made[name].codes[order], made[name].names)
        if self.itl_offsets.size == len(self) + 1:
            counts = np.diff(self.itl_offsets)[order]
            offsets = np.concatenate(([0], np.cumsum(counts)))
            source = np.repeat(self.itl_offsets[:-1][order] - offsets[:-1], counts) + np.arange(offsets[-1])
            made["itl_s"], made["itl_offsets"] = self.itl_s[source], offsets
        for name in ("request_ids", "decisions"):
            if texts := made[name]:
                made[name] = [texts[i] for i in order.tolist()]
        return Records(**made)


class RecordsBuilder:
    """Collects records one by one in typed arrays. Memory is bounded: MAX_RECORDS, MAX_ITLS, MAX_WORDS."""

    def __init__(self, max_itls: int = MAX_ITLS) -> None:
        self._floats = {name: array("d") for name in FLOAT_COLUMNS}
        self._integers = {name: array("q") for name in INTEGER_COLUMNS}
        self._words: dict[str, tuple[array[int], dict[str, int]]] = {
            name: (array("i"), {"": 0}) for name in WORD_COLUMNS
        }
        self._offloaded = array("b")
        self._request_ids: list[str] = []
        self._decisions: list[str] = []
        self._max_itls = max_itls
        self._itls = array("f")
        self._itl_offsets = array("q", [0])
        self._itl_seen = 0
        self._itl_stride = 1

    def __len__(self) -> int:
        return len(self._offloaded)

    def add(self, record: RequestRecord) -> None:
        """Raises ConfigError above MAX_RECORDS, ValueError for a status that there isn't."""
        if len(self) >= MAX_RECORDS:
            raise ConfigError([f"there are more than {MAX_RECORDS:,} requests"])
        if record.status not in STATUSES:
            raise ValueError(f"there is no status {record.status!r}; there are {', '.join(STATUSES)}")
        for name, column in self._floats.items():
            value = getattr(record, name)
            column.append(np.nan if value is None else value)
        for name, whole in self._integers.items():
            whole.append(getattr(record, name))
        for name, (codes, seen) in self._words.items():
            word = getattr(record, name)
            codes.append(_code(seen, FALLBACK_SEPARATOR.join(word) if name == "fallbacks" else word))
        self._offloaded.append(OFFLOADED_CODES[record.offloaded])
        self._request_ids.append(record.request_id)
        self._decisions.append(record.decision)
        self._add_itls(record.itl_s)

    def records(self) -> Records:
        """What was added so far; later `add`s don't change it."""
        columns: dict[str, Any] = {name: np.array(column, np.float64) for name, column in self._floats.items()}
        columns |= {name: np.array(column, np.int64) for name, column in self._integers.items()}
        columns |= {name: Words(np.array(codes, np.int32), tuple(seen)) for name, (codes, seen) in self._words.items()}
        columns["status"] = _without_unused(columns["status"])
        return Records(
            **columns,
            offloaded=np.array(self._offloaded, np.int8),
            itl_s=np.array(self._itls, np.float32),
            itl_offsets=np.array(self._itl_offsets, np.int64),
            itl_stride=self._itl_stride,
            request_ids=list(self._request_ids) if any(self._request_ids) else (),
            decisions=list(self._decisions) if any(self._decisions) else (),
        )

    def _add_itls(self, gaps_s: Sequence[float]) -> None:
        # Every stride-th gap of the run, counted over all requests: which ones are kept has nothing to do with them.
        first = -self._itl_seen % self._itl_stride
        self._itls.extend(gaps_s[first :: self._itl_stride])
        self._itl_seen += len(gaps_s)
        self._itl_offsets.append(len(self._itls))
        while len(self._itls) > self._max_itls:
            self._itls = self._itls[::2]
            self._itl_offsets = array("q", ((np.array(self._itl_offsets) + 1) // 2).tolist())
            self._itl_stride *= 2


def _code(seen: dict[str, int], word: str) -> int:
    if word not in seen and len(seen) >= MAX_WORDS:
        word = OTHER
    return seen.setdefault(word, len(seen))


def _without_unused(words: Words) -> Words:
    """Without names that no row has, such as the builder's ""."""
    used, codes = np.unique(words.codes, return_inverse=True)
    return Words(codes.astype(np.int32), tuple(words.names[i] for i in used.tolist()))
