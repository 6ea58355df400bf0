"""`prfaas-loadgen plan`: the paper's case, plans of one's own, budgets, mistakes."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from prfaas.common.perfmodel import profiles
from prfaas.loadgen.__main__ import main as prfaas_loadgen
from prfaas.loadgen.report import svg

FIGURES = {
    "threshold",
    "n_prfaas",
    "n_p",
    "n_d",
    "lambda_max",
    "theta_prfaas",
    "theta_pd_p",
    "theta_pd_d",
    "egress_gbps",
}


def main(flags: Sequence[str]) -> int:
    return prfaas_loadgen(["plan", *flags])


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main([*flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What a command line that can't be carried out says; its status is 2."""
    try:
        status = main(flags)
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err


# -- the paper --------------------------------------------------------------------------------------------------------


def test_the_papers_case_has_its_keys_and_lands_in_its_bands(capsys: pytest.CaptureFixture[str]) -> None:
    made = planned(capsys, "--case", "paper")
    assert all(set(made[name]) == FIGURES for name in ("prfaas", "homogeneous", "naive"))
    prfaas, homogeneous, naive = made["prfaas"], made["homogeneous"], made["naive"]
    assert 19_000 <= prfaas["threshold"] <= 19_800
    assert (prfaas["n_prfaas"], prfaas["n_p"], prfaas["n_d"]) == (4, 3, 5)
    assert prfaas["lambda_max"] == pytest.approx(3.24, rel=0.02)
    assert 12 <= prfaas["egress_gbps"] <= 13.5
    assert (homogeneous["n_p"], homogeneous["n_d"], homogeneous["threshold"]) == (9, 3, None)
    assert homogeneous["lambda_max"] == pytest.approx(2.11, rel=0.01)
    assert (naive["n_prfaas"], naive["n_p"], naive["n_d"], naive["threshold"]) == (4, 0, 8, None)
    assert naive["lambda_max"] == pytest.approx(2.45, rel=0.015)
    assert made["ratio_homogeneous"] == pytest.approx(prfaas["lambda_max"] / homogeneous["lambda_max"])
    assert made["ratio_naive"] == pytest.approx(prfaas["lambda_max"] / naive["lambda_max"])
    assert made["ratio_homogeneous"] == pytest.approx(1.54, rel=0.02)


def test_each_figure_has_the_papers_beside_it_and_the_kind_of_its_input(capsys: pytest.CaptureFixture[str]) -> None:
    """What rests on the H20 profile is marked as fitted, since it was fitted to these very figures: also what prefills
    the lengths above a threshold that was found with it."""
    made = planned(capsys, "--case", "paper")
    assert all(set(made["paper"][name]) == FIGURES for name in ("prfaas", "homogeneous", "naive"))
    kinds = {name: {k: v["kind"] for k, v in made["inputs"][name].items()} for name in ("prfaas", "naive")}
    assert set(kinds["prfaas"].values()) == {"fitted"}
    assert kinds["naive"]["theta_prfaas"] == kinds["naive"]["lambda_max"] == "measured"
    assert kinds["prfaas"]["lambda_max"] == kinds["prfaas"]["theta_pd_p"] == kinds["prfaas"]["threshold"] == "fitted"
    assert made["inputs"]["homogeneous"]["lambda_max"]["kind"] == made["inputs"]["ratio_naive"]["kind"] == "fitted"
    for name in ("prfaas", "homogeneous", "naive"):
        compared = {k for k, v in made["paper"][name].items() if v is not None} - {"n_prfaas"}
        assert compared - {"n_d"} <= set(made["inputs"][name])


def test_prefill_alone_takes_what_the_papers_ttfts_say(capsys: pytest.CaptureFixture[str]) -> None:
    """Within five percent, mean and P90 of all three systems: the paper's TTFTs hold no queue."""
    for bare in planned(capsys, "--case", "paper")["bare_prefill_s"].values():
        assert bare["mean"] == pytest.approx(bare["paper_mean_ttft"], rel=0.05)
        assert bare["p90"] == pytest.approx(bare["paper_p90_ttft"], rel=0.05)


def test_people_see_both_figures_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--case", "paper"]) == 0
    told = capsys.readouterr().out
    assert "19,500 / 19,400 f" in told
    assert "2.11 / 2.11 f" in told
    assert "no prediction" in told


def test_the_public_models_egress(capsys: pytest.CaptureFixture[str]) -> None:
    """512 H200 at 32K: 3.8 Tbps for MiniMax, 170 Gbps for Ring."""
    made = planned(capsys, "--case", "public", "--gpus", "512")
    egress = {model["name"]: model["egress_gbps"] for model in made["models"]}
    assert egress["minimax-m2.5"] == pytest.approx(3800, rel=0.02)
    assert egress["ring-2.5-1t"] == pytest.approx(170, rel=0.03)
    assert main(["--case", "public", "--gpus", "512"]) == 0
    assert "3,836" in capsys.readouterr().out


# -- plans of one's own -----------------------------------------------------------------------------------------------


def test_without_flags_the_papers_deployment_is_planned_as_queues_find_it(capsys: pytest.CaptureFixture[str]) -> None:
    """E[T(L)] promises a little less than the paper's arithmetic, which `--mode` gives again."""
    made, papers = planned(capsys), planned(capsys, "--mode", "time_of_mean", "--link-share", "1")
    assert made["inputs"]["mode"] == "mean_time"
    assert papers["plan"]["lambda_max"] == planned(capsys, "--case", "paper")["prfaas"]["lambda_max"]
    assert made["plan"]["lambda_max"] < papers["plan"]["lambda_max"]
    assert made["plan"]["bottleneck"] == "prfaas_prefill"
    assert any("fitted" in note for note in made["notes"])


def test_the_table_says_what_each_change_does(capsys: pytest.CaptureFixture[str]) -> None:
    """No bandwidth leaves the home region alone; another threshold or split is never better; more nodes help."""
    made = planned(capsys)
    changes = {(row["what"], row["value"]): row["change"] for row in made["sensitivity"]}
    assert {what for what, _ in changes} == {
        "link", "threshold", "split", "home nodes", "prefill nodes", "input", "output"
    }  # fmt: skip
    assert all(change <= 1e-12 for (what, _), change in changes.items() if what in ("threshold", "split"))
    assert changes["link", "0 Gbps"] == changes["threshold", "none offloaded"] < -0.5
    assert changes["home nodes", "9"] > 0 > changes["home nodes", "7"]
    assert changes["input", "13,743 tokens"] > 0 > changes["input", "54,971 tokens"]


def test_a_narrow_link_is_the_bottleneck(capsys: pytest.CaptureFixture[str]) -> None:
    made = planned(capsys, "--link-gbps", "4")
    assert made["plan"]["bottleneck"] in ("link", "pd_prefill")
    assert made["plan"]["link_utilisation"] <= 0.9 + 1e-9
    assert made["plan"]["threshold"] > planned(capsys)["plan"]["threshold"]


def test_one_profile_for_both_regions_and_lengths_from_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A measured histogram; the profile's own file."""
    profiles.save(profiles.shipped("paper-h20"), tmp_path / "lab.json")
    (tmp_path / "lengths.json").write_text('{"lengths": [1000, 50000], "weights": [3, 1]}')
    files = ("--profile", str(tmp_path / "lab.json"), "--histogram", str(tmp_path / "lengths.json"))
    made = planned(capsys, *files, "--prefill-gpus", "64")
    assert made["inputs"]["mean_input_tokens"] == 13_250
    assert made["inputs"]["prefill_region"]["profile"] == made["inputs"]["home_region"]["profile"] == "paper-h20"
    assert 1000 <= made["plan"]["threshold"] < 50_000
    assert made["plan"]["share_offloaded"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("flags", "mean"),
    [
        (("--isl", "777"), 777),
        (("--random-input-len", "uniform:100:300"), 200),
        (("--input-len", "lognormal:5:0.5:10:900"), 167),
        (("--isl", "paper"), 27486),
    ],
)
def test_other_lengths(capsys: pytest.CaptureFixture[str], flags: tuple[str, str], mean: float) -> None:
    assert planned(capsys, *flags)["inputs"]["mean_input_tokens"] == pytest.approx(mean, rel=0.01)


MOONCAKE = """\
{"timestamp": 0, "input_length": 1500, "output_length": 100, "hash_ids": [1, 2, 3]}
{"timestamp": 1, "input_length": 2000, "output_length": 200, "hash_ids": [1, 2, 4, 5]}
{"timestamp": 2, "input_length": 1500, "output_length": 300, "hash_ids": [1, 2, 3]}
{"timestamp": 3, "input_length": 40000, "output_length": 200, "hash_ids": []}
"""


def test_a_trace_is_planned_with_and_without_its_prefix_hits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of the second request two blocks of 512 were seen, of the third all; the fourth shares nothing."""
    file = tmp_path / "trace.jsonl"
    file.write_text(MOONCAKE)
    flags = ("--dataset-name", "mooncake_trace", "--dataset-path", str(file))
    cold, warm = planned(capsys, *flags), planned(capsys, *flags, "--prefix-hits", "all")
    assert cold["inputs"]["mean_input_tokens"] == (1500 + 2000 + 1500 + 40000) / 4
    assert warm["inputs"]["mean_input_tokens"] == (1500 + 976 + 1 + 40000) / 4
    assert cold["inputs"]["output_tokens"] == 200
    assert "4 requests, prefix hits: all" in warm["inputs"]["workload"]


def test_a_trace_with_a_broken_line_says_which(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(MOONCAKE + '{"timestamp": 4, "input_length": -5, "output_length": 1}\n')
    said = refused(capsys, "--dataset-name", "mooncake_trace", "--dataset-path", str(file))
    assert f"{file} line 5: the input length is -5" in said


def test_lengths_beyond_the_profile_are_remarked(capsys: pytest.CaptureFixture[str]) -> None:
    notes = planned(capsys, "--isl", "300000")["notes"]
    assert any("measured up to 130,000" in note for note in notes)


def test_a_single_home_region_offloads_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    made = planned(capsys, "--prefill-gpus", "0", "--decode-gpus", "96", "--mode", "time_of_mean")
    assert (made["plan"]["threshold"], made["plan"]["egress_gbps"]) == (None, 0)
    assert made["plan"]["lambda_max"] == pytest.approx(2.11, rel=0.01)


# -- numbers of GPUs, dollars -----------------------------------------------------------------------------------------


def test_gpus_are_shared_between_the_regions_as_well_as_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    """No other division of 96 GPUs carries more."""
    best = planned(capsys, "--gpus", "96")
    assert best["inputs"]["prefill_region"]["gpus"] + best["inputs"]["home_region"]["gpus"] == 96
    for far in range(0, 96, 8):
        other = planned(capsys, "--prefill-gpus", str(far), "--decode-gpus", str(96 - far))
        assert other["plan"]["lambda_max"] <= best["plan"]["lambda_max"]


def test_a_budget_buys_what_carries_the_most(capsys: pytest.CaptureFixture[str]) -> None:
    """And is not exceeded, egress included."""
    prices = ("--prefill-gpu-cost", "3", "--decode-gpu-cost", "2")
    made = planned(capsys, "--budget", "250", *prices)
    assert made["cost"]["gpus_per_hour"] <= 250
    dear = planned(capsys, "--budget", "250", *prices, "--egress-cost", "0.05")
    assert dear["cost"]["gpus_per_hour"] + dear["cost"]["egress_per_hour"] <= 250 * (1 + 1e-9)
    assert dear["cost"]["rate_per_s"] < made["cost"]["rate_per_s"]
    more = planned(capsys, "--budget", "300", *prices)
    assert more["plan"]["lambda_max"] > made["plan"]["lambda_max"]


def test_egress_is_priced_by_the_gigabyte(capsys: pytest.CaptureFixture[str]) -> None:
    """12 Gbit/s are 5,400 GB an hour; half the bytes on the wire cost half."""
    flags = ("--prefill-gpu-cost", "3", "--decode-gpu-cost", "1", "--egress-cost", "0.01")
    made, coded = planned(capsys, *flags), planned(capsys, *flags, "--wire-ratio", "0.5")
    gigabytes = made["plan"]["egress_gbps"] / 8 * 3600
    assert made["cost"]["egress_gb_per_hour"] == pytest.approx(gigabytes)
    assert made["cost"]["egress_per_hour"] == pytest.approx(gigabytes * 0.01)
    assert made["cost"]["gpus_per_hour"] == 32 * 3 + 64
    assert coded["cost"]["egress_per_hour"] == pytest.approx(made["cost"]["egress_per_hour"] / 2)
    whole = made["cost"]["gpus_per_hour"] + made["cost"]["egress_per_hour"]
    assert made["cost"]["per_million_requests"] == pytest.approx(whole / made["plan"]["lambda_max"] / 3600 * 1e6)
    assert main(list(flags)) == 0
    assert "160.00 for GPUs" in capsys.readouterr().out


# -- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would fetch, and the text in <pre>."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.mark.parametrize("flags", [(), ("--case", "paper"), ("--prefill-gpus", "0"), ("--isl", "500")])
def test_the_page_stands_alone_and_its_plots_are_sound(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Nothing is loaded, no script runs, every SVG is well-formed and every point lies inside it."""
    file = tmp_path / "plan.html"
    assert main([*flags, "--html", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.fetched == []
    assert "script" not in page.tags
    drawings = text.split("<svg")[1:]
    assert len(drawings) == (1 if "--prefill-gpus" in flags else 3)
    for drawing in drawings:
        root = ElementTree.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")
        lines = [e for e in root.iter() if e.tag.endswith("polyline")]
        assert lines
        for line in lines:
            for point in line.attrib["points"].split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= svg.WIDTH
                assert 0 <= y <= svg.HEIGHT
    assert "nan" not in text.lower()
    assert capsys.readouterr().out.splitlines()[0] in text.replace("&#x27;", "'")


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--request-rate", "5"), "missing: 10 more home nodes (paper-h20) or 4 more nodes in the prefill region"),
        (("--request-rate", "3", "--link-gbps", "2"), "or a link of 11 Gbps"),
        (("--request-rate", "3", "--threshold", "90000"), "missing: another --threshold"),
        (("--decode-gpus", "8", "--link-gbps", "0"), "missing: bandwidth to the prefill region or a home node"),
        (("--decode-gpus", "8", "--prefill-gpus", "0"), "missing: nodes in a prefill region or a home node"),
        (("--tpot", "20"), "a decode step takes 25 ms"),
        (("--tpot", "0.001"), "the limit is 0.001 ms; missing: a faster node, or a limit of 25 ms"),
        (("--gpus", "4"), "--gpus 4 has no home node; missing: 8 GPUs"),
        (("--gpus", "8"), "missing: nodes in a prefill region or a home node"),
        (
            ("--budget", "1", "--prefill-gpu-cost", "3", "--decode-gpu-cost", "1"),
            "--budget 1 has no home node; missing: 8 GPUs of paper-h20, 8 dollars an hour",
        ),
    ],
)
def test_an_infeasible_plan_says_what_is_missing(
    flags: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *flags)
    assert told in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--case", "paper", "--link-gbps", "8"), "--case paper fixes what --link-gbps sets"),
        (("--case", "public", "--budget", "8"), "--case public fixes what --budget sets"),
        (("--profile", "paper-b300"), "no shipped profile 'paper-b300'; there are paper-h20"),
        (("--decode-profile", "paper-h200"), "paper-h200 has no decode_step_s"),
        (("--profile", "a.json", "--prefill-profile", "b.json"), "a.json: No such file"),
        (("--prefill-gpus", "33"), "--prefill-gpus 33 are not whole nodes of 8 GPUs"),
        (("--gpus", "96", "--decode-gpus", "8"), "--gpus and --budget search for"),
        (("--budget", "100"), "--budget needs the prices"),
        (("--budget", "100", "--prefill-gpu-cost", "0", "--decode-gpu-cost", "1"), "cost nothing"),
        (("--budget", "-5"), "must be a number above 0 and at most 1e+12"),
        (("--link-gbps", "1e300"), "--link-gbps: '1e300' must be a number of at least 0 and at most 1e+12"),
        (("--isl", "-5"), "--random-input-len (--isl) -5: lengths from -5 to -5 tokens"),
        (("--osl", "0"), "--random-output-len (--osl) 0: lengths from 0 to 0 tokens"),
        (("--case", "public", "--isl", "0"), "--random-input-len (--isl) 0: lengths from 0 to 0 tokens"),
        (("--link-loss", "1"), "loss = 1.0 must be at least 0 and below 1"),
        (("--link-share", "2"), "link_share = 2.0 must be at most 1"),
        (("--isl", "lognormal:9:1"), "is no distribution of lengths"),
        (("--isl", "lognormal:9:-1:5:10"), "sigma above 0"),
        (("--isl", "lognormal:9:0.5:1:200"), "nothing between 1 and 200"),
        (("--isl", "0"), "lengths from 0 to 0 tokens"),
        (("--isl", "5", "--histogram", "a.json"), "--histogram and --random-input-len both"),
        (("--prefix-hits", "all"), "--prefix-hits is for --dataset-name mooncake_trace"),
        (("--dataset-name", "azure_trace"), "needs the file: --dataset-path"),
        (("--dataset-name", "azure_trace", "--isl", "5"), "--random-input-len is for --dataset-name random"),
        (("--dataset-name", "azure_trace", "--dataset-path", "/no/trace.csv"), "/no/trace.csv: No such file"),
        (("--html", "/no/such/folder/a.html"), "--html /no/such/folder/a.html: No such file"),
    ],
)
def test_a_mistake_is_one_line_with_what_is_wrong(
    flags: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *flags)
    assert told in said
    assert len(said.splitlines()) == (2 if "--prefill-profile" in flags else 1)  # two files, two mistakes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1, 2", "not JSON"),
        ("[]", "there must be 1 to"),
        ("[5, -3]", "length 2 is -3"),
        ('[5, "x"]', "lengths: item 2 is 'x'"),
        ('{"lengths": [5], "weights": [1, 2]}', "one weight a length"),
        ('{"lengths": [5], "bogus": 1}', "unknown key 'bogus'"),
        ("7", "must be a list"),
        ("[1e400]", "length 1 is inf"),
    ],
)
def test_a_wrong_file_of_lengths_is_refused(
    text: str, told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "l.json").write_text(text)
    said = refused(capsys, "--histogram", str(tmp_path / "l.json"))
    assert f"{tmp_path}/l.json: " in said
    assert told in said


def test_a_profile_that_falls_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    document = json.loads(profiles.dumps(profiles.shipped("paper-h20")))
    document["prefill_s"] |= {"lengths": [100, 200], "values": [2.0, 1.0]}
    (tmp_path / "p.json").write_text(json.dumps(document))
    said = refused(capsys, "--profile", str(tmp_path / "p.json"))
    assert "p.json: prefill_s: values must not fall: 1 at length 200 after 2 at length 100" in said


def test_a_profile_is_any_file_that_is_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is called. A name that ships goes before a file of that name; a name that can't be a file's is one
    line, too."""
    monkeypatch.chdir(tmp_path)
    profiles.save(profiles.shipped("paper-h20"), tmp_path / "lab")
    assert planned(capsys, "--prefill-profile", "lab")["inputs"]["prefill_region"]["profile"] == "paper-h20"
    (tmp_path / "paper-h200").write_text("no profile")
    assert planned(capsys)["inputs"]["prefill_region"]["profile"] == "paper-h200"
    assert "paper-h200: not a profile" in refused(capsys, "--profile", "./paper-h200")
    assert "no shipped profile 'xxx" in refused(capsys, "--profile", "x" * 300)


def test_help_fits_a_screen_and_has_an_example(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert len(told.splitlines()) <= 40
    assert "prfaas-loadgen plan --case paper" in told


def test_no_inf_or_nan_reaches_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    """A reader that isn't Python's would not take them."""

    def finite(value: Any) -> None:
        if isinstance(value, float):
            assert math.isfinite(value)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            finite(part)

    for flags in (("--case", "paper"), (), ("--prefill-gpus", "0"), ("--threshold", "0"), ("--isl", "9")):
        finite(planned(capsys, *flags))
