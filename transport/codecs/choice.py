"""Which codec a link uses for a kind of tensor: computed from what the link and the codecs were measured to do.

A codec pays while the link is slower than the codec is fast: with r the rate of the link, q the ratio, e and d the
rates at which one thread encodes and decodes raw bytes, and t the threads of each side, raw bytes arrive at

    raw       r
    a codec   min(r · q, t · e, t · d)

Over a fast link raw wins, over a slow one the smallest; each codec in between has a range of rates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prfaas.common.config import LOSSY_CODECS
from prfaas.common.kv_layout import TensorKind
from prfaas.transport.codecs.registry import LOSSLESS_NAMES

RAW_NAME = "raw"
MARGIN = 0.05

_PRIOR_BYTES = 1 << 20
_HALF_LIFE_BYTES = 256 << 20


class CodecSpeed(NamedTuple):
    ratio: float
    """Raw bytes over bytes on the wire, those that did not shrink included."""
    encode_bytes_per_s: float
    """Raw bytes, in one thread; so too of decode."""
    decode_bytes_per_s: float


def payload_bytes_per_s(link_bytes_per_s: float, speed: CodecSpeed, threads: int) -> float:
    """Raw bytes that arrive in a second with a codec."""
    return min(link_bytes_per_s * speed.ratio, threads * speed.encode_bytes_per_s, threads * speed.decode_bytes_per_s)


def allowed_codecs(
    kind: TensorKind, lossy: Collection[tuple[TensorKind, str]], peer_codecs: Collection[str]
) -> tuple[str, ...]:
    """Candidates for `choose`, the most exact first: lossless ones, and those that the operator allows for the kind
    (`lossy`, as `config.parse_lossy` gives it), as far as the peer (its HELLO) has them."""
    names = (*LOSSLESS_NAMES, *(name for name in LOSSY_CODECS if (kind, name) in lossy))
    return tuple(name for name in names if name == RAW_NAME or name in peer_codecs)


def choose(
    candidates: Sequence[str],
    link_bytes_per_s: float | None,
    speeds: Mapping[str, CodecSpeed],
    threads: int,
    current: str,
) -> str:
    """The codec to use from now on.

    candidates: what is allowed for the tensor's kind, preferred ones first (lossless before lossy); raw is always
    allowed and before all. link_bytes_per_s: what the lanes carry; None = not known yet, which gives raw. speeds: of
    the tensor's kind; a codec without one is not chosen. current: what is used now.

    A later codec takes the place of an earlier one if it is faster by MARGIN, an earlier one that of a later one as
    soon as it is not slower; so noise doesn't make the choice swing, and what costs work or precision must pay.
    """
    if link_bytes_per_s is None or link_bytes_per_s <= 0:
        return RAW_NAME
    rates = {RAW_NAME: link_bytes_per_s}
    for name in candidates:
        if name != RAW_NAME and name in speeds:
            rates[name] = payload_bytes_per_s(link_bytes_per_s, speeds[name], threads)
    order = list(rates)
    best = current if current in rates else RAW_NAME
    for name in order:
        needed = rates[best] * (1 + MARGIN if order.index(name) > order.index(best) else 1)
        if name != best and rates[name] >= needed:
            best = name
    return best


@dataclass
class _Work:
    """Sums of what was observed, older ones worth less."""

    raw_bytes: float = 0.0
    wire_bytes: float = 0.0
    encode_s: float = 0.0
    decoded_bytes: float = 0.0
    decode_s: float = 0.0

    def fade(self, factor: float) -> None:
        self.raw_bytes *= factor
        self.wire_bytes *= factor
        self.encode_s *= factor
        self.decoded_bytes *= factor
        self.decode_s *= factor


class CodecSpeeds:
    """What codecs are known to do with each kind of tensor: a calibration made at start, outweighed by what chunks of
    this process show.

    Observations fade as bytes of their kind pass with any codec, raw too: a codec that was slow for a while, or met
    KV that did not shrink, drifts back to its calibration, and so is tried again, at the cost of a few MiB in some
    hundred. Not thread-safe.
    """

    def __init__(self, calibrated: Mapping[tuple[str, TensorKind], CodecSpeed] | None = None) -> None:
        self._calibrated = dict(calibrated or {})
        self._work: dict[TensorKind, dict[str, _Work]] = {}

    def calibrated(self, speeds: Mapping[tuple[str, TensorKind], CodecSpeed]) -> None:
        """When a calibration is done, which takes a thread some time; observations stay."""
        self._calibrated.update(speeds)

    def encoded(self, codec: str, kind: TensorKind, raw_bytes: int, wire_bytes: int, seconds: float) -> None:
        """Of each chunk. wire_bytes = raw_bytes where the codec declined; raw chunks with codec `raw`, 0 seconds."""
        works = self._work.setdefault(kind, {})
        if not works and codec == RAW_NAME:
            return  # of each raw chunk on a fast lane
        factor = 0.5 ** (raw_bytes / _HALF_LIFE_BYTES)
        for other in works.values():
            other.fade(factor)
        if codec != RAW_NAME:
            work = works.setdefault(codec, _Work())
            work.raw_bytes += raw_bytes
            work.wire_bytes += wire_bytes
            work.encode_s += seconds

    def decoded(self, codec: str, kind: TensorKind, raw_bytes: int, seconds: float) -> None:
        """What this process decoded, or what a peer reports."""
        work = self._work.setdefault(kind, {}).setdefault(codec, _Work())
        work.decoded_bytes += raw_bytes
        work.decode_s += seconds

    def of_kind(self, kind: TensorKind) -> dict[str, CodecSpeed]:
        """For `choose`. A codec is in it once it is calibrated, or was seen to encode and to decode."""
        works = self._work.get(kind, {})
        names = dict.fromkeys((*(name for name, _ in self._calibrated), *works))
        speeds = {name: _speed(works.get(name, _Work()), self._calibrated.get((name, kind))) for name in names}
        return {name: speed for name, speed in speeds.items() if speed is not None}


def _speed(work: _Work, prior: CodecSpeed | None) -> CodecSpeed | None:
    raw_bytes, wire_bytes, encode_s = work.raw_bytes, work.wire_bytes, work.encode_s
    decoded_bytes, decode_s = work.decoded_bytes, work.decode_s
    if prior is not None:
        raw_bytes += _PRIOR_BYTES
        wire_bytes += _PRIOR_BYTES / prior.ratio
        encode_s += _PRIOR_BYTES / prior.encode_bytes_per_s
        decoded_bytes += _PRIOR_BYTES
        decode_s += _PRIOR_BYTES / prior.decode_bytes_per_s
    if min(wire_bytes, encode_s, decode_s) <= 0:
        return None
    return CodecSpeed(raw_bytes / wire_bytes, raw_bytes / encode_s, decoded_bytes / decode_s)
