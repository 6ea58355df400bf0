"""The codec of a session's link and each tensor kind, as the link is measured and the peer's HELLO allows."""

from __future__ import annotations

import pytest
from prfaas.common.config import TransportConfig
from prfaas.common.kv_layout import TensorKind
from prfaas.common.metrics import TransportMetrics
from prfaas.transport.codec_choice import PROBE_EVERY_S, PROBE_S, CodecChoice
from prfaas.transport.codecs.choice import CodecSpeed, CodecSpeeds
from prfaas.transport.codecs.registry import CODEC_NAMES
from prometheus_client import CollectorRegistry

MB = 1e6
SPEEDS = {
    "lz4": CodecSpeed(1.2, 500 * MB, 2000 * MB),
    "zstd": CodecSpeed(1.5, 800 * MB, 1400 * MB),
    "int8": CodecSpeed(2.0, 400 * MB, 900 * MB),
    "int4": CodecSpeed(4.3, 380 * MB, 600 * MB),
}
KEY, VALUE, RECURRENT = TensorKind.KEY, TensorKind.VALUE, TensorKind.RECURRENT
ALL_LOSSY = tuple(f"{kind}={codec}" for kind in TensorKind for codec in ("int8", "int4"))
SLOW, FAST = 25 * MB, 5000 * MB


class Choosing:
    """A CodecChoice and its gauge."""

    def __init__(self, *, codec: str = "auto", lossy: tuple[str, ...] = ()) -> None:
        self.registry = CollectorRegistry()
        speeds = CodecSpeeds({(name, kind): speed for name, speed in SPEEDS.items() for kind in TensorKind})
        config = TransportConfig(codec=codec, lossy=lossy, codec_threads=1)  # type: ignore[arg-type]
        self.choice = CodecChoice(config, "far", speeds, TransportMetrics(self.registry))

    def at(self, link_bytes_per_s: float, now_s: float = 0.0, *, limited: bool = False) -> dict[TensorKind, str]:
        self.choice.choose(link_bytes_per_s, codec_limited=limited, now_s=now_s)
        for kind, name in self.choice.names().items():
            codec = self.choice.of(kind)
            assert (codec.name if codec else "raw") == name
        return dict(self.choice.names())

    def shown(self, kind: TensorKind) -> set[str]:
        """The codecs that the metrics say are in use."""
        labels = {"peer": "far", "kind": str(kind)}
        names = (*CODEC_NAMES, "raw")
        return {
            name
            for name in names
            if self.registry.get_sample_value("prfaas_transport_codec", {**labels, "codec": name})
        }


def test_raw_over_a_fast_link_zstd_over_a_slow_one_and_back() -> None:
    """Raw too as long as nothing is known of the link; the metrics say the same."""
    choosing = Choosing()
    choosing.choice.agreed(CODEC_NAMES, ())
    assert set(choosing.at(0.0).values()) == {"raw"}
    assert set(choosing.at(FAST).values()) == {"raw"}
    assert set(choosing.at(SLOW).values()) == {"zstd"}
    assert choosing.shown(KEY) == {"zstd"}
    assert set(choosing.at(FAST).values()) == {"raw"}
    assert choosing.shown(KEY) == {"raw"}


def test_only_what_the_peer_decodes() -> None:
    """Its HELLO names no zstd, or none at all."""
    choosing = Choosing()
    assert set(choosing.at(SLOW).values()) == {"raw"}  # before HELLO
    choosing.choice.agreed(("raw", "lz4"), ())
    assert set(choosing.at(SLOW).values()) == {"lz4"}
    choosing.choice.agreed((), ())
    assert set(choosing.at(SLOW).values()) == {"raw"}


@pytest.mark.parametrize(
    ("ours", "theirs", "key", "value"),
    [
        ((), ALL_LOSSY, "zstd", "zstd"),
        (ALL_LOSSY, (), "zstd", "zstd"),
        (("value=int4",), ALL_LOSSY, "zstd", "int4"),
        (ALL_LOSSY, ("key=int8",), "int8", "zstd"),
        (("key=int8",), ("key=int4",), "zstd", "zstd"),
        (ALL_LOSSY, (*ALL_LOSSY, "key=of-a-newer-peer"), "int4", "int4"),
    ],
)
def test_lossy_only_where_both_sides_allow_it(
    ours: tuple[str, ...], theirs: tuple[str, ...], key: str, value: str
) -> None:
    """For that kind of tensor and that codec."""
    choosing = Choosing(lossy=ours)
    choosing.choice.agreed(CODEC_NAMES, theirs)
    names = choosing.at(SLOW)
    assert (names[KEY], names[VALUE]) == (key, value)


def test_recurrent_state_is_exact_unless_it_is_named() -> None:
    """Keys and values in int4 say nothing of it, nor do the defaults."""
    for lossy in ((), ("key=int4", "value=int4")):
        choosing = Choosing(lossy=lossy)
        choosing.choice.agreed(CODEC_NAMES, ALL_LOSSY)
        assert choosing.at(SLOW)[RECURRENT] == "zstd"


def test_what_the_peer_allows_no_longer_stops_at_its_hello() -> None:
    """Started anew with other settings: the next chunk would be refused, so no tick is waited for."""
    choosing = Choosing(lossy=ALL_LOSSY)
    choosing.choice.agreed(CODEC_NAMES, ALL_LOSSY)
    assert choosing.at(SLOW)[KEY] == "int4"
    choosing.choice.agreed(CODEC_NAMES, ())
    assert choosing.choice.of(KEY) is None
    assert choosing.shown(KEY) == {"raw"}


@pytest.mark.parametrize("name", ["raw", "lz4", "zstd"])
def test_a_codec_that_is_set_stays(name: str) -> None:
    """Whatever the link does, and in the metrics again when the session is up again."""
    choosing = Choosing(codec=name)
    choosing.choice.agreed(CODEC_NAMES, ())
    assert set(choosing.at(FAST).values()) == set(choosing.at(SLOW, limited=True).values()) == {name}
    choosing.choice.forget()
    assert choosing.shown(KEY) == set()
    choosing.choice.agreed(CODEC_NAMES, ())
    assert choosing.shown(KEY) == {name}


def test_while_the_codec_is_the_limit_the_link_is_given_raw_chunks_to_show_itself() -> None:
    """For PROBE_S, once in PROBE_EVERY_S; then what they have shown counts."""
    choosing = Choosing()
    choosing.choice.agreed(CODEC_NAMES, ())
    assert choosing.at(SLOW, 0.0)[KEY] == "zstd"
    assert choosing.at(SLOW, 1.0, limited=True)[KEY] == "raw"
    assert choosing.at(SLOW, 1.0 + PROBE_S / 2, limited=True)[KEY] == "raw"
    assert choosing.at(SLOW, 1.0 + PROBE_S)[KEY] == "zstd"
    assert choosing.at(SLOW, 1.0 + PROBE_EVERY_S / 2, limited=True)[KEY] == "zstd"
    assert choosing.at(SLOW, 1.0 + PROBE_EVERY_S, limited=True)[KEY] == "raw"
    assert choosing.at(FAST, 1.0 + PROBE_EVERY_S + PROBE_S)[KEY] == "raw"


def test_a_link_that_is_the_limit_is_not_probed() -> None:
    """Raw chunks would only be slower there."""
    choosing = Choosing()
    choosing.choice.agreed(CODEC_NAMES, ())
    assert {choosing.at(SLOW, float(second))[KEY] for second in range(60)} == {"zstd"}
