"""Profiles of nodes: their file, and those that ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prfaas.common.errors import ConfigError
from prfaas.common.perfmodel import profiles
from prfaas.common.perfmodel.throughput import kv_throughput


def document(**changes: Any) -> dict[str, Any]:
    """A good file, changed by `section__field=value` or `field=value`."""
    made = json.loads(profiles.dumps(profiles.shipped("paper-h20")))
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (made[section] if section else made)[key] = value
    return made  # type: ignore[no-any-return]


def test_every_shipped_profile_says_what_was_measured_and_where_it_is_from() -> None:
    assert profiles.shipped_names() == ["paper-h20", "paper-h200", "paper-h200-fit"]
    for name in profiles.shipped_names():
        profile = profiles.shipped(name)
        curves = {"prefill_s", "kv_bytes"} | ({"decode_step_s"} if profile.decode_step_s else set())
        assert set(profile.provenance) == set(profile.sources) == curves
        assert all(profile.sources.values())


def test_the_papers_h200_gives_the_kv_throughput_that_the_paper_prints() -> None:
    """Equation 1 at its four lengths: 3.61, 3.59, 3.19 and 2.62 Gbit/s, from rounded times."""
    profile = profiles.shipped("paper-h200")
    for length, gbps in ((1024, 3.61), (8192, 3.59), (32000, 3.19), (130000, 2.62)):
        rate = kv_throughput(profile.kv_bytes.at(length), profile.prefill_s.at(length))
        assert rate * 8e-9 == pytest.approx(gbps, rel=0.01)
    assert profile.provenance["prefill_s"] == "measured"
    assert profiles.shipped("paper-h20").provenance["prefill_s"] == "fitted"


def test_the_fit_lies_near_the_measured_points() -> None:
    measured, fit = profiles.shipped("paper-h200"), profiles.shipped("paper-h200-fit")
    for length in measured.prefill_s.lengths:
        assert fit.prefill_s(length) == pytest.approx(measured.prefill_s(length), abs=0.02)
        assert fit.kv_bytes(length) == pytest.approx(measured.kv_bytes(length), abs=0.06 * 2**20)


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    profile = profiles.shipped("paper-h20")
    profiles.save(profile, tmp_path / "p.json")
    assert profiles.named(str(tmp_path / "p.json")) == profile


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prefill_s__values": [1, 2]}, "prefill_s: 24 lengths have 2 values"),
        ({"kv_bytes__lengths": [1, 2, 3, 4], "kv_bytes__values": [4, 3, 5, 6]}, "kv_bytes: values must not fall: 3 at"),
        ({"kv_bytes__lengths": [-1, 2, 3, 4]}, "kv_bytes: lengths must be at least 0, not -1"),
        ({"prefill_s__lengths": [5], "prefill_s__values": [0]}, "prefill_s: values must be above 0"),
        ({"decode_step_s__values": [[-0.1]]}, "decode_step_s: values must be finite and at least 0"),
        ({"decode_step_s__values": [[0.1, 0.2]]}, "decode_step_s: values must be 1 rows"),
        ({"gpus": 0}, "gpus = 0 must be a whole number from 1"),
        ({"name": ""}, "name must have 1 to 1000 characters"),
        ({"prefill_s__provenance": "guessed"}, "not a profile: Invalid enum value 'guessed'"),
        ({"bogus": 1}, "not a profile: Object contains unknown field `bogus`"),
        ({"format": 9}, "format 9; this version reads format 1"),
    ],
)
def test_a_wrong_profile_is_refused_with_the_place(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        profiles.parse(json.dumps(document(**changes)).encode(), "my.json")
    assert str(refused.value).startswith("my.json: ")
    assert told in str(refused.value)


def test_all_problems_are_told_together() -> None:
    wrong = document(gpus=0, prefill_s__values=[1], kv_bytes__lengths=[-1, 2, 3, 4])
    with pytest.raises(ConfigError) as refused:
        profiles.parse(json.dumps(wrong).encode(), "my.json")
    assert len(refused.value.problems) == 3


def test_a_file_that_is_not_there_or_no_json_or_not_shipped_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        profiles.named(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_bytes(b"\xff{")
    with pytest.raises(ConfigError, match="not a profile"):
        profiles.named(str(tmp_path / "bad.json"))
    with pytest.raises(ConfigError, match="there are paper-h20, paper-h200"):
        profiles.named("paper-b300")


def test_a_node_without_a_decode_step_says_that_it_cant_decode() -> None:
    with pytest.raises(ConfigError, match="paper-h200 has no decode_step_s"):
        profiles.shipped("paper-h200").step_s(1, 0)


def test_memory_bounds_the_batch() -> None:
    """kv_capacity_bytes over what one request of that length holds."""
    made = profiles.parse(json.dumps(document(kv_capacity_bytes=10 * 2**30)).encode(), "x")
    assert made.fits(32000) == 14  # 701.3 MiB each
    assert profiles.shipped("paper-h20").fits(32000) == 20
