"""`prfaas profile`: the emulated engine through the command, the arithmetic, mistakes, the real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prfaas.common.config import EngineConfig
from prfaas.common.errors import SetupError
from prfaas.common.kv_layout import TokenRange
from prfaas.common.perfmodel import profiles
from prfaas.common.perfmodel.lengths import uniform
from prfaas.common.perfmodel.links import LinkProfile
from prfaas.common.scheduling.planner import Demand, HomePool, OffloadPool, PlannerSettings, plan
from prfaas.services.__main__ import main
from prfaas.services.commands.profile_engine import Measured, Points, as_profile, together
from prfaas.services.engine.emulated.engine import EmulatedEngine

QUICK = ("--lengths", "64,512", "--batches", "1,3", "--contexts", "64", "--repetitions", "1", "--steps", "4")
EMULATED = ("--engine", "emulated", "--engine-decode-step-s", "0.004", "--engine-arena-bytes", "64M")


def test_a_measured_file_is_one_that_the_planner_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes are the layout's, times at least what the emulated engine takes, and a plan comes of it."""
    file = tmp_path / "node.json"
    status = main(["profile", "--out", str(file), *EMULATED, *QUICK, "--hardware", "a desk", "--gpus", "2", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert status == 0
    assert told == {"file": str(file), "profile": json.loads(file.read_bytes())}
    profile = profiles.load(file)
    assert (profile.name, profile.hardware, profile.gpus, profile.max_batch) == ("emulated", "a desk", 2, 3)
    assert set(profile.provenance.values()) == {"measured"}
    layout = EmulatedEngine(EngineConfig(kind="emulated")).info.layout
    assert profile.kv_bytes(512) == layout.total_bytes(TokenRange(0, 511))
    assert profile.kv_capacity_bytes == 64 << 20
    # 10,000 tokens/s: timers are late, never early.
    assert profile.prefill_s(64) >= 0.0063
    assert profile.prefill_s(512) >= 0.0511
    assert profile.decode_step_s is not None
    assert (profile.decode_step_s.batches, profile.decode_step_s.contexts) == ((1, 3), (64,))
    settings = PlannerSettings(tpot_limit_s=1.0)
    far = OffloadPool(profile, 2, LinkProfile.of_gbps(1))
    made = plan(Demand(uniform(64, 512), 16), HomePool(profile, 3), [far], settings)
    assert made.decode_batch == 3
    assert made.lambda_max > 0


def test_people_see_the_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--out", str(tmp_path / "n.json"), *EMULATED, *QUICK]) == 0
    told = capsys.readouterr().out
    assert "emulated on" in told
    assert "decode step, ms, by batch and context" in told


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_only_gaps_while_all_run_count() -> None:
    """The first request's early steps, alone or beside prefills of the others, don't."""
    alone, late = [0.0, 0.9, 1.0, 1.3, 1.6], [1.0, 1.3, 1.7]
    assert together([alone, late]) == pytest.approx(0.3)


@pytest.mark.parametrize("times", [[[], [1.0]], [[1.0, 2.0], [3.0]], [[]]])
def test_requests_that_never_ran_together_are_an_error(times: list[list[float]]) -> None:
    with pytest.raises(SetupError, match="never ran together"):
        together(times)


def test_what_fell_by_noise_is_raised_and_no_profile_falls() -> None:
    """In length, batch and context."""
    points = Points((100, 200, 300), (1, 2), (10, 20), 1, 1)
    found = Measured([2.0, 1.9, 3.0], [[0.02, 0.019], [0.018, 0.03]])
    made = as_profile(EmulatedEngine(EngineConfig(kind="emulated")), points, found, "n", "h", 1, "s")
    assert made.prefill_s.values == (2.0, 2.0, 3.0)
    assert made.decode_step_s is not None
    assert made.decode_step_s.values == ((0.02, 0.02), (0.02, 0.03))


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--lengths", "5,3"), "'5,3' must be at most 64 rising numbers"),
        (("--lengths", "0"), "'0' must be a whole number from 1"),
        (("--lengths", "300000"), "--lengths 300000: emulated takes 262144 tokens in all"),
        (("--batches", "65", "--contexts", "64"), "--batches 65: the engine's engine.max_batch is 64"),
        (("--contexts", "262144"), "--contexts 262144: with"),
        (("--contexts", "100000", "--batches", "8"), "lower --contexts or --batches, or raise --engine-arena-bytes"),
        (("--engine-max-model-tokens", "16"), "holds none of the usual lengths; name some with --lengths"),
        (("--bogus",), "unrecognized arguments: --bogus"),
    ],
)
def test_points_that_dont_fit_the_engine_are_refused_before_the_work(
    flags: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "n.json"
    try:
        status: Any = main(["profile", "--out", str(file), *EMULATED, *flags])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert told in capsys.readouterr().err
    assert not file.exists()


def test_a_file_that_cant_be_written_is_refused_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--out", "/no/such/folder/n.json", *EMULATED]) == 2
    assert "no folder /no/such/folder" in capsys.readouterr().err


def test_help_fits_a_screen_and_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["profile", "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert len(told.splitlines()) <= 40
    assert "example:\n  prfaas profile" in told


# -- the real model ---------------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_is_profiled(tmp_path: Path, smollm2_dir: Path) -> None:
    """KV grows with the length and a batch of two is one point of the surface."""
    file = tmp_path / "smollm2.json"
    quick = ("--lengths", "16,64", "--batches", "1,2", "--contexts", "24", "--repetitions", "1", "--steps", "3")
    assert main(["profile", "--model", str(smollm2_dir), "--out", str(file), *quick]) == 0
    profile = profiles.load(file)
    assert profile.kv_bytes(64) == 63 * 30 * 3 * 64 * 2 * 2  # layers, KV heads, dims, key and value, bfloat16
    assert 0 < profile.prefill_s(16) <= profile.prefill_s(64)
    assert profile.step_s(2, 24) > 0
