"""The codec of one session's link and each tensor kind: chosen again as the link and the codecs are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType

from prfaas.common.config import TransportConfig, parse_lossy
from prfaas.common.kv_layout import TensorKind
from prfaas.common.metrics import TransportMetrics
from prfaas.transport.codecs.api import Codec
from prfaas.transport.codecs.choice import RAW_NAME, CodecSpeeds, allowed_codecs, choose
from prfaas.transport.codecs.registry import codec_by_name

AUTO = "auto"
PROBE_EVERY_S = 5.0
PROBE_S = 0.2
"""While a codec is the limit, nothing shows what the link could carry: so long it is given raw chunks to show it."""


class CodecChoice:
    """`of(kind)` is what chunks of that kind leave in now. Time is an argument."""

    def __init__(self, config: TransportConfig, peer: str, speeds: CodecSpeeds, metrics: TransportMetrics) -> None:
        self._fixed = config.codec if config.codec != AUTO else None
        self._allowed = _allowed(config.lossy)
        self._threads = config.codec_threads
        self._peer = peer
        self._speeds = speeds
        self._gauge = metrics.codec
        self._candidates: dict[TensorKind, tuple[str, ...]] = dict.fromkeys(TensorKind, ())
        self._names: dict[TensorKind, str] = dict.fromkeys(TensorKind, self._fixed or RAW_NAME)
        self._codecs: dict[TensorKind, Codec | None] = {}
        self._shown: dict[TensorKind, str] = {}
        """In the gauge; nothing of a peer that has not answered yet."""
        self._probe_until_s = 0.0
        self._next_probe_s = 0.0
        self._look_up()

    def of(self, kind: TensorKind) -> Codec | None:
        """None = raw."""
        return self._codecs[kind]

    def names(self) -> Mapping[TensorKind, str]:
        return MappingProxyType(self._names)

    def agreed(self, peer_codecs: Sequence[str], peer_lossy: Sequence[str]) -> None:
        """What the peer's HELLO says that it decodes, and which lossy codecs it lets come to it."""
        both = self._allowed & _allowed(peer_lossy)
        for kind in TensorKind:
            self._candidates[kind] = allowed_codecs(kind, both, peer_codecs)
            if self._fixed is None and self._names[kind] not in self._candidates[kind]:
                self._names[kind] = RAW_NAME  # at once: a new process of the peer may refuse what the old one took
        self._look_up()
        self._show()

    def choose(self, link_bytes_per_s: float, *, codec_limited: bool, now_s: float) -> None:
        """Each tick while there are transfers. codec_limited: lanes were short of chunks though KV was waiting."""
        if self._fixed is not None:
            return
        probing = self._probe(codec_limited, now_s)
        for kind in TensorKind:
            current = self._names[kind]
            chosen = RAW_NAME
            if not probing:
                speeds = self._speeds.of_kind(kind)
                chosen = choose(self._candidates[kind], link_bytes_per_s or None, speeds, self._threads, current)
            self._names[kind] = chosen
        self._look_up()
        self._show()

    def _probe(self, codec_limited: bool, now_s: float) -> bool:
        if codec_limited and now_s >= self._next_probe_s:
            self._probe_until_s = now_s + PROBE_S
            self._next_probe_s = now_s + PROBE_EVERY_S
        return now_s < self._probe_until_s

    def _look_up(self) -> None:
        self._codecs = {kind: codec_by_name(name) for kind, name in self._names.items()}

    def _show(self) -> None:
        for kind, name in self._names.items():
            before = self._shown.get(kind)
            if name == before:
                continue
            self._gauge.hold(self._peer, str(kind), name)
            self._gauge.set(1, self._peer, str(kind), name)
            if before is not None:
                self._gauge.let_go(self._peer, str(kind), before)
            self._shown[kind] = name

    def forget(self) -> None:
        """The session is gone, and its series, unless another to the peer has the same."""
        for kind, name in self._shown.items():
            self._gauge.let_go(self._peer, str(kind), name)
        self._shown.clear()


def _allowed(lossy: Sequence[str]) -> frozenset[tuple[TensorKind, str]]:
    pairs = set()
    for entry in lossy:
        with suppress(ValueError):  # of a newer peer
            pairs.add(parse_lossy(entry))
    return frozenset(pairs)
