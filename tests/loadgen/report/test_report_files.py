"""Saved runs come back as they were; pages are whole, standalone and of bounded size; several runs are compared."""

from __future__ import annotations

import csv
import gzip
import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from prfaas.common.errors import ConfigError
from prfaas.loadgen.__main__ import main
from prfaas.loadgen.records import Records, RecordsBuilder, RequestRecord
from prfaas.loadgen.report.files import jsonl_lines, read_jsonl
from prfaas.loadgen.report.objective import Objective
from prfaas.loadgen.report.page import page
from prfaas.loadgen.report.plots import Run, plots, thinned, throughput
from prfaas.loadgen.report.summary import summarise
from prfaas.loadgen.report.svg import Bars, Plot, ticks

VOID = {"meta", "br", "link", "img", "hr", "input"}


def some(n: int = 40, **columns: object) -> Records:
    """A simulated run: one request a second, TTFT 0.5 s and growing."""
    at = np.arange(n, dtype=np.float64)
    first = at + 0.5 + at / 100
    known: dict[str, object] = {
        "first_token_s": first,
        "second_token_s": first + 0.1,
        "end_s": first + 1.0,
        "prompt_tokens": 100 + np.arange(n),
        "output_tokens": np.full(n, 11),
    }
    return Records.of(at, **(known | columns))


def saved(path: Path, records: Records) -> Path:
    path.write_bytes(b"".join(jsonl_lines(records)))
    return path


def test_saved_requests_come_back(tmp_path: Path) -> None:
    """To the microsecond, in the order of the workload, plain or gzip."""
    builder = RecordsBuilder()
    builder.add(RequestRecord(1, 0.25, "failed", error="http_500", end_s=1.5))
    builder.add(
        RequestRecord(0, 0.1234567, "ok", itl_s=[0.25, 0.5], fallbacks=["a", "b"], offloaded=True, request_id="r")
    )
    path = saved(tmp_path / "run.jsonl", builder.records())
    back = list(read_jsonl(str(path)))
    assert back[0] == RequestRecord(
        0, 0.123457, "ok", itl_s=[0.25, 0.5], fallbacks=["a", "b"], offloaded=True, request_id="r"
    )
    assert back[1] == RequestRecord(1, 0.25, "failed", error="http_500", end_s=1.5)
    packed = tmp_path / "run.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_jsonl(str(packed))) == back


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{nonsense", "line 2 is no request"),
        ('{"index": 1, "scheduled_s": 0.5}', "missing required field `status`"),
        ('{"index": 1, "scheduled_s": "soon", "status": "ok"}', "line 2 is no request"),
        ('{"index": 1, "scheduled_s": 0.5, "status": "fine"}', "line 2: status is 'fine'"),
        ('{"index": -1, "scheduled_s": 0.5, "status": "ok"}', "line 2: index is -1"),
        ('{"index": 1, "scheduled_s": 0.5, "status": "ok", "prompt_tokens": -5}', "line 2: prompt_tokens is -5"),
        ('{"index": 1, "scheduled_s": -0.5, "status": "ok"}', "line 2: scheduled_s is -0.5; it is from 0"),
        ('{"index": 1, "scheduled_s": 1, "status": "ok", "end_s": -2}', "line 2: end_s is -2; it is from 0"),
        ('{"index": 1, "scheduled_s": 1, "status": "ok", "queue_s": 1e300}', "line 2: queue_s is 1e+300"),
        ('{"index": 1, "scheduled_s": 1, "status": "ok", "itl_s": [0.1, -0.2]}', "line 2: itl_s, gap 2, is -0.2"),
        ('{"index": 1, "scheduled_s": 1, "status": "ok", "ttft_s": 2}', "contains unknown field `ttft_s`"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, told: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"index": 0, "scheduled_s": 0.0, "status": "ok"}\n' + line + "\n")
    assert main(["report", str(path)]) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""


def test_an_empty_file_and_a_missing_one_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("empty.jsonl", "none.jsonl"):
        assert main(["report", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err


def test_several_runs_are_compared_in_every_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables, JSON, CSV and page of two files, with names and an objective that are given."""
    one = saved(tmp_path / "one.jsonl", some())
    two = saved(tmp_path / "two.jsonl", some(20, offloaded=np.ones(20)))
    flags = ["report", str(one), str(two), "--names", "home", "prfaas", "--goodput", "ttft:600"]
    assert main([*flags, "--csv", str(tmp_path / "x.csv"), "--html", str(tmp_path / "x.html")]) == 0
    told = capsys.readouterr().out
    assert "TTFT: home" in told
    assert "TTFT: prfaas" in told
    assert "what left home" in told
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert {row["run"] for row in rows} == {"home", "prfaas"}
    (ttft,) = (row for row in rows if row["run"] == "home" and row["figure"] == "ttft")
    assert float(ttft["max"]) == pytest.approx(0.5 + 39 / 100)
    assert "prfaas" in (tmp_path / "x.html").read_text()
    assert main([*flags, "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["name"] for run in runs] == ["home", "prfaas"]
    assert runs[0]["share_good"] == pytest.approx(11 / 40)


def test_names_must_fit_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "one.jsonl", some())
    assert main(["report", str(path), "--names", "a", "b"]) == 2
    assert "2 names for 1 files" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["same", "dotted", "link", "hard link"])
@pytest.mark.parametrize("output", ["--csv", "--html"])
def test_a_report_never_overwrites_what_it_reads(
    output: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under whichever name: the measured requests are all there is of a run."""
    path = saved(tmp_path / "run.jsonl", some())
    before = path.read_bytes()
    target = tmp_path / "target"
    if how == "link":
        target.symlink_to(path)
    elif how == "hard link":
        target.hardlink_to(path)
    else:
        (tmp_path / "x").mkdir()
        target = path if how == "same" else tmp_path / "x" / ".." / "run.jsonl"
    assert main(["report", str(path), output, str(target)]) == 2
    said = capsys.readouterr()
    assert said.err == (
        f"prfaas-loadgen report: {output} {target} is the file of FILE, which it would overwrite; name another\n"
    )
    assert said.out == ""
    assert path.read_bytes() == before


@pytest.mark.parametrize("exists", [False, True])
def test_two_outputs_are_two_files(exists: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether or not they are there yet; what is no file, /dev/null, takes both."""
    path = saved(tmp_path / "run.jsonl", some())
    (tmp_path / "link").symlink_to(tmp_path / "x")
    if exists:
        (tmp_path / "x").touch()
    assert main(["report", str(path), "--csv", str(tmp_path / "x"), "--html", str(tmp_path / "link")]) == 2
    assert f"--html {tmp_path / 'link'} is the file of --csv" in capsys.readouterr().err
    assert (tmp_path / "x").exists() is exists
    assert main(["report", str(path), "--csv", "/dev/null", "--html", "/dev/null"]) == 0


class Checker(HTMLParser):
    """Every tag is closed in its order; nothing is loaded; no script."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.problems += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "onload", "onclick")]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}>")


def made_page(*all_records: Records, name: str = "run") -> str:
    runs = [Run(name, records) for records in all_records]
    summaries = [summarise(run.records, Objective(ttft_s=1.0), run.name) for run in runs]
    return page("A <title> & more", summaries, runs, ["n<o>te"])


@pytest.mark.parametrize("runs", [1, 2, 16])
def test_a_page_is_well_formed_and_needs_nothing_from_elsewhere(runs: int) -> None:
    """Names from outside are escaped, in tables and legends; each SVG parses as XML by itself; the only URL is SVG's
    namespace."""
    html = made_page(*[some(200)] * runs, name="<b>bold</b>")
    checker = Checker()
    checker.feed(html)
    assert checker.problems == []
    assert checker.open == []
    assert {"script", "b", "o"}.isdisjoint(checker.tags)
    assert html.replace("http://www.w3.org/2000/svg", "").count("://") == 0
    svgs = html.split("<svg")[1:]
    assert len(svgs) == (8 if runs == 1 else 6)
    for svg in svgs:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")


def test_a_page_of_a_big_run_is_small() -> None:
    """200,000 requests are thinned: the page stays below a megabyte."""
    assert len(made_page(some(200_000))) < 1_000_000


def test_a_run_without_an_answer_still_has_a_page() -> None:
    failed = Records.of(np.zeros(3), end_s=np.ones(3), status=["failed"] * 3, error=["timeout"] * 3)
    checker = Checker()
    checker.feed(made_page(failed))
    assert checker.problems == []


def test_every_plot_names_its_axes_with_units() -> None:
    records = some(300, offloaded=np.arange(300) % 2)
    for plot in plots([Run("run", records)]):
        assert plot.title
        names = [plot.x_name] if isinstance(plot, Bars) else [plot.x_name, plot.y_name]
        assert all(any(unit in name for unit in (", s", ", ms", "tokens", "%", "requests")) for name in names), names


def test_throughput_over_time_holds_every_token() -> None:
    """The area under the curve is the number of output tokens, whichever way requests overlap."""
    records = some(50)
    plot = throughput([Run("run", records)])
    assert isinstance(plot, Plot)
    (series,) = plot.series
    step = series.x[1] - series.x[0]
    # All but the very last instant, at which the last bin ends.
    assert sum(series.y) * step == pytest.approx(50 * 11, rel=1e-6)


def test_thinning_keeps_both_ends_and_is_even() -> None:
    assert thinned(5, 10).tolist() == [0, 1, 2, 3, 4]
    few = thinned(1_000_000, 11)
    assert few[0] == 0
    assert few[-1] == 999_999
    assert np.ptp(np.diff(few)) <= 1


@pytest.mark.parametrize("high", [1e-9, 0.003, 1.0, 7.3, 100.0, 123456.0])
def test_ticks_are_few_round_and_within(high: float) -> None:
    made = ticks(high)
    assert 4 <= len(made) - 1 <= 10
    assert made[0] == 0
    assert made[-1] <= high * (1 + 1e-9)


def test_columns_written_by_others_are_refused(tmp_path: Path) -> None:
    """A trace is no saved run."""
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 6, "hash_ids": [1]}\n')
    with pytest.raises(ConfigError, match="line 1 is no request of prfaas-loadgen's"):
        read_jsonl(str(path))
