"""The choice of codecs: which wins at which rate of the link, when it changes, what is known of codecs and when."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.common.kv_layout import TensorKind
from prfaas.transport.codecs.calibration import ZstdOnPlanes, calibrate, calibrate_all, kv_like, measure
from prfaas.transport.codecs.choice import MARGIN, CodecSpeed, CodecSpeeds, allowed_codecs, choose, payload_bytes_per_s
from prfaas.transport.codecs.lossless import ZSTD
from prfaas.transport.codecs.registry import CODEC_NAMES, CODECS

MB = 1e6
SPEEDS = {
    "lz4": CodecSpeed(1.2, 500 * MB, 2000 * MB),
    "zstd": CodecSpeed(1.5, 800 * MB, 1400 * MB),
    "int8": CodecSpeed(2.0, 400 * MB, 900 * MB),
    "int4": CodecSpeed(4.3, 380 * MB, 600 * MB),
}
LOSSLESS = ("raw", "lz4", "zstd")
KEY, VALUE = TensorKind.KEY, TensorKind.VALUE

rates = st.floats(1e3, 1e11)


def chosen(mb_per_s: float | None, candidates: tuple[str, ...] = LOSSLESS, threads: int = 1, now: str = "raw") -> str:
    return choose(candidates, mb_per_s and mb_per_s * MB, SPEEDS, threads, now)


def test_raw_wins_over_fast_links_zstd_over_slower_ones_and_lossy_below_where_it_is_allowed() -> None:
    """The crossovers: zstd's encoder gives 800 MB/s, int8's 400 and int4's 380."""
    assert [chosen(r) for r in (25, 200, 700, 790, 1200, 6000)] == ["zstd", "zstd", "zstd", "raw", "raw", "raw"]
    allowed = (*LOSSLESS, "int8")
    assert [chosen(r, allowed) for r in (25, 150, 240, 300, 700, 6000)] == ["int8"] * 3 + ["zstd"] * 2 + ["raw"]
    allowed = (*LOSSLESS, "int8", "int4")
    assert [chosen(r, allowed) for r in (25, 80, 150, 300, 6000)] == ["int4", "int4", "int4", "zstd", "raw"]


def test_lossy_codecs_are_candidates_only_for_the_kinds_that_the_operator_names() -> None:
    """And nothing that the peer lacks; the most exact come first."""
    lossy = [(VALUE, "int4"), (VALUE, "int8"), (KEY, "fp8")]
    assert allowed_codecs(VALUE, lossy, CODEC_NAMES) == (*LOSSLESS, "int8", "int4")
    assert allowed_codecs(KEY, lossy, CODEC_NAMES) == (*LOSSLESS, "fp8")
    assert allowed_codecs(TensorKind.RECURRENT, lossy, CODEC_NAMES) == LOSSLESS
    assert allowed_codecs(VALUE, lossy, ["zstd", "int4"]) == ("raw", "zstd", "int4")
    assert allowed_codecs(VALUE, lossy, []) == ("raw",)


def test_more_threads_move_the_crossover() -> None:
    """The encoder is what holds zstd back at 1 GB/s."""
    assert chosen(1000, threads=1) == "raw"
    assert chosen(1000, threads=4) == "zstd"


def test_a_slow_decoder_counts_like_a_slow_encoder() -> None:
    """The receiver must keep up as well."""
    slow = {"zstd": CodecSpeed(1.5, 800 * MB, 90 * MB)}
    assert choose(LOSSLESS, 100 * MB, slow, 1, "raw") == "raw"
    assert choose(LOSSLESS, 50 * MB, slow, 1, "raw") == "zstd"


@pytest.mark.parametrize("now", ["raw", "zstd", "int4"])
def test_a_link_that_was_not_measured_gets_raw(now: str) -> None:
    """Nothing says that a codec would pay."""
    assert chosen(None, now=now) == chosen(0, now=now) == "raw"


def test_a_codec_that_was_not_measured_is_not_chosen() -> None:
    """Nor one that isn't allowed, even if it is in use."""
    assert choose(("lz4", "fp8"), 10 * MB, SPEEDS, 1, "fp8") == "lz4"
    assert choose(LOSSLESS, 10 * MB, {}, 1, "zstd") == "raw"
    assert chosen(10, now="int4") == "zstd"


def test_a_choice_holds_while_the_rate_wanders_near_a_crossover() -> None:
    """zstd's 800 MB/s against raw: it is taken up at 5 % more than raw, and kept until it is not faster."""
    now, seen = "raw", []
    for rate in (790, 770, 755, 770, 790, 799, 801, 790, 770):
        now = chosen(rate, now=now)
        seen.append(now)
    assert seen == ["raw", "raw", "zstd", "zstd", "zstd", "zstd", "raw", "raw", "raw"]


def test_what_loses_precision_must_pay_for_it() -> None:
    """Where int8's encoder is no faster than the link with zstd, zstd takes its place again."""
    both = {"zstd": CodecSpeed(1.5, 800 * MB, 800 * MB), "int8": CodecSpeed(2.0, 300 * MB, 300 * MB)}
    assert choose(("zstd", "int8"), 200 * MB, both, 1, "int8") == "zstd"
    assert choose(("zstd", "int8"), 195 * MB, both, 1, "zstd") == "zstd"
    assert choose(("zstd", "int8"), 195 * MB, both, 1, "int8") == "int8"


@given(
    rates,
    st.dictionaries(
        st.sampled_from(["lz4", "zstd", "int8", "int4"]), st.builds(CodecSpeed, st.floats(0.9, 8), rates, rates)
    ),
    st.integers(1, 16),
    st.sampled_from(["raw", "lz4", "zstd", "int8", "int4"]),
)
def test_the_choice_is_near_the_best_and_steady(
    link: float, speeds: dict[str, CodecSpeed], threads: int, now: str
) -> None:
    """Within the margin a step of preference at most, and the same figures again change nothing."""
    allowed = ("raw", "lz4", "zstd", "int8", "int4")
    name = choose(allowed, link, speeds, threads, now)
    rate = {"raw": link} | {n: payload_bytes_per_s(link, speed, threads) for n, speed in speeds.items()}
    assert max(rate.values()) <= rate[name] * (1 + MARGIN) * (1 + 1e-9)
    assert choose(allowed, link, speeds, threads, name) == name


def test_what_chunks_show_outweighs_the_calibration() -> None:
    """And only of their kind of tensor."""
    speeds = CodecSpeeds({("zstd", kind): CodecSpeed(1.5, 800 * MB, 1400 * MB) for kind in TensorKind})
    for _ in range(64):
        speeds.encoded("zstd", KEY, 1 << 20, 1 << 20, (1 << 20) / (100 * MB))
        speeds.decoded("zstd", KEY, 1 << 20, (1 << 20) / (200 * MB))
    seen = speeds.of_kind(KEY)["zstd"]
    assert seen.ratio == pytest.approx(1.0, rel=0.02)
    assert seen.encode_bytes_per_s == pytest.approx(100 * MB, rel=0.02)
    assert seen.decode_bytes_per_s == pytest.approx(200 * MB, rel=0.02)
    assert speeds.of_kind(VALUE)["zstd"] == pytest.approx((1.5, 800 * MB, 1400 * MB))


def test_what_was_seen_fades_while_others_are_used() -> None:
    """So a codec that was slow for a while is tried again."""
    speeds = CodecSpeeds({("zstd", KEY): CodecSpeed(1.5, 800 * MB, 1400 * MB)})
    for _ in range(64):
        speeds.encoded("zstd", KEY, 1 << 20, 1 << 20, (1 << 20) / (100 * MB))
    assert choose(("zstd",), 300 * MB, speeds.of_kind(KEY), 1, "zstd") == "raw"
    for _ in range(4096):
        speeds.encoded("raw", KEY, 1 << 20, 1 << 20, 0.0)
    assert speeds.of_kind(KEY)["zstd"].encode_bytes_per_s > 750 * MB
    assert choose(("zstd",), 300 * MB, speeds.of_kind(KEY), 1, "raw") == "zstd"


def test_without_a_calibration_a_codec_counts_once_it_was_seen_to_encode_and_to_decode() -> None:
    """A late calibration is taken up."""
    speeds = CodecSpeeds()
    assert speeds.of_kind(KEY) == {}
    speeds.encoded("zstd", KEY, 3000, 2000, 1e-3)
    assert speeds.of_kind(KEY) == {}
    speeds.decoded("zstd", KEY, 3000, 5e-4)
    assert speeds.of_kind(KEY)["zstd"] == pytest.approx((1.5, 3e6, 6e6))
    speeds.calibrated({("int8", KEY): SPEEDS["int8"]})
    assert set(speeds.of_kind(KEY)) == {"zstd", "int8"}


def test_a_calibration_finds_each_codecs_ratio() -> None:
    """The sample is like KV: what it gives is near what chunks of a real model give."""
    found = calibrate_all()
    assert found.keys() == {(codec.name, kind) for codec in CODECS.values() for kind in TensorKind}
    for name, low, high in (("lz4", 1.1, 1.3), ("zstd", 1.45, 1.55), ("int8", 1.9, 2.2), ("int4", 3.9, 4.8)):
        for kind in TensorKind:
            assert low < found[name, kind].ratio < high
            assert 0 < found[name, kind].encode_bytes_per_s < math.inf


@pytest.mark.parametrize("dtype", ["float32", "float16", "float8_e4m3", "int8"])
def test_every_type_can_be_calibrated(dtype: str) -> None:
    """What a codec doesn't take counts as raw: ratio 1."""
    assert calibrate(ZSTD, KEY, dtype).ratio > 1
    if dtype in ("float8_e4m3", "int8"):
        assert calibrate(CODECS[3], KEY, dtype).ratio == 1


def test_zstd_saves_more_than_plain_zstd_on_the_same_planes() -> None:
    """What the references and the entropy coder are for."""
    chunks = [kv_like(KEY, "bfloat16"), kv_like(VALUE, "bfloat16")]
    assert measure(ZSTD, chunks, 1).ratio > measure(ZstdOnPlanes(), chunks, 1).ratio > 1.4
