"""Equations 1 to 8 by hand, links, and the KV rates of public models."""

from __future__ import annotations

import math

import numpy as np
import pytest
from prfaas.common.errors import ConfigError
from prfaas.common.perfmodel import throughput
from prfaas.common.perfmodel.kv_rates import parse, public_models
from prfaas.common.perfmodel.links import LinkProfile


@pytest.mark.parametrize(
    ("mebibytes", "prefill_s", "gbps"),
    [(190.8, 0.44, 3.61), (308.9, 0.72, 3.59), (701.3, 1.84, 3.19), (2316.3, 7.40, 2.62)],
)
def test_equation_1_gives_the_papers_kv_throughput(mebibytes: float, prefill_s: float, gbps: float) -> None:
    """Of the internal model at 1K, 8K, 32K and 128K; the paper's times are rounded to 10 ms."""
    rate = throughput.kv_throughput(mebibytes * 2**20, prefill_s)
    assert rate * 8e-9 == pytest.approx(gbps, rel=0.01)
    both = throughput.kv_throughput(np.array([mebibytes, 1.0]), np.array([prefill_s, 0.5]))
    assert both.tolist() == [mebibytes / prefill_s, 2.0]


def test_equation_3_takes_the_narrower_of_compute_and_link() -> None:
    """4 nodes at 2.5 s give 1.6 requests/s; 1 GB each over 1 GB/s gives 1."""
    assert float(throughput.theta_prfaas(4, 2.5, 12.5e9, 1e9)) == 1.6
    assert float(throughput.theta_prfaas(4, 2.5, 1e9, 1e9)) == 1.0
    assert float(throughput.theta_prfaas(4, 2.5, 0, 1e9)) == 0.0
    assert float(throughput.theta_prfaas(4, 2.5, 0, 0)) == 0.0
    assert float(throughput.theta_prfaas(4, 2.5, 1, 0)) == 1.6


def test_equations_4_5_and_6_give_table_6() -> None:
    """1.61 / 0.496 and 1.64 / 0.504 and 3.91: the smallest is Λ."""
    assert throughput.theta_pd_prefill(3.0, 1.83) == pytest.approx(1.64, abs=0.005)
    assert throughput.theta_pd_decode(5.0, 20, 0.025, 1024) == pytest.approx(3.91, abs=0.005)
    assert float(throughput.lambda_max(1.61, 0.496, 1.64, 3.91)) == pytest.approx(3.246, abs=0.001)
    assert float(throughput.lambda_max(1.61, 0.496, 1.64, 3.0)) == 3.0


def test_a_side_without_requests_limits_nothing() -> None:
    assert float(throughput.lambda_max(0.0, 0.0, 2.0, 9.0)) == 2.0
    assert float(throughput.lambda_max(2.0, 1.0, 0.0, 9.0)) == 2.0
    assert throughput.full_at(np.nan, 0.0) == math.inf


def test_equations_7_and_8_are_zero_in_balance_and_signed_beside_it() -> None:
    assert float(throughput.threshold_imbalance(1.0, 0.5, 1.0)) == 0
    assert float(throughput.threshold_imbalance(1.0, 0.6, 1.0)) < 0  # too much is offloaded
    assert throughput.role_imbalance(1.0, 1.0, 2.0) == 0
    assert throughput.role_imbalance(1.0, 0.5, 2.0) < 0  # short of prefill


def test_the_papers_optimum_is_in_balance_as_far_as_whole_nodes_allow() -> None:
    """Table 6 at p = 49.6 %: equation 7 holds within the rounding of its rates. Equation 8 doesn't: of 8 home nodes,
    3 : 5 is the nearest split that is short of prefill, and 4 : 4 would be short of decode."""
    assert float(throughput.threshold_imbalance(1.61, 0.496, 1.64)) == pytest.approx(0, abs=0.02)
    assert throughput.role_imbalance(1.61, 1.64, 3.91) == pytest.approx(-0.66)
    other_split = throughput.role_imbalance(1.61, 1.64 * 4 / 3, 3.91 * 4 / 5)
    assert other_split == pytest.approx(0.669, abs=0.001)
    # Homogeneous, 9 : 3.
    assert throughput.role_imbalance(0.0, 2.11, 2.35) == pytest.approx(-0.24)


@pytest.mark.parametrize(("name", "terabits"), [("minimax-m2.5", 3.8), ("ring-2.5-1t", 0.17)])
def test_512_gpus_send_what_the_paper_says(name: str, terabits: float) -> None:
    """Equations 1 and 2 at 32K."""
    rate = next(rate for rate in public_models() if rate.name == name)
    assert rate.egress_bytes_per_s(512, 32768) * 8e-12 == pytest.approx(terabits, rel=0.03)
    assert rate.provenance == "measured"


def test_kv_rates_are_interpolated_and_hold_at_the_ends() -> None:
    """Six models, four lengths; one falls with length, so this is no monotone curve."""
    rates = {rate.name: rate for rate in public_models()}
    assert len(rates) == 6
    ring = rates["ring-2.5-1t"]
    assert [ring.gbps_at(x) for x in (1, 1024, 131072, 1 << 20)] == pytest.approx([7.27, 7.27, 1.46, 1.46])
    assert ring.gbps_at(16384) == pytest.approx((4.47 + 2.59) / 2)  # halfway in log length


@pytest.mark.parametrize(
    ("document", "told"),
    [
        (b"{", "x.json: "),
        (
            b'{"format":1,"hardware":"h","gpus":8,"provenance":"measured","source":"s","lengths":[2,1],"models":[]}',
            "lengths must rise",
        ),
        (
            b'{"format":1,"hardware":"h","gpus":8,"provenance":"measured","source":"s","lengths":[1,2],'
            b'"models":[{"name":"m","title":"M","layers":"","gbps":[1]}]}',
            "m: gbps must be 2 numbers",
        ),
    ],
)
def test_a_wrong_table_is_refused(document: bytes, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(document, "x.json")


def test_a_link_counts_what_is_sent_again() -> None:
    link = LinkProfile.of_gbps(100, rtt_s=0.08, loss=0.02)
    assert link.gbps == pytest.approx(100)
    assert link.goodput_bytes_per_s == pytest.approx(12.25e9)


@pytest.mark.parametrize("given", [(-1.0, 0.0, 0.0), (1.0, -1.0, 0.0), (1.0, 0.0, 1.0), (math.nan, 0.0, 0.0)])
def test_an_impossible_link_is_refused(given: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        LinkProfile(*given)
