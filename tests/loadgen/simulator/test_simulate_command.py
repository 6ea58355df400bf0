"""`prfaas-loadgen simulate`: what it prints, and how mistakes end."""

import gzip
import json
import subprocess
import sys

import pytest
from prfaas.loadgen.__main__ import main


def test_the_papers_case(capsys):
    """Saturated throughput against the others, latencies at two loads; PrfaaS well ahead, on one small seed too."""
    assert main(["simulate", "--case", "paper", "--seeds", "2", "--requests", "1500", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    for system in ("prfaas", "homogeneous", "naive"):
        assert made[system]["lambda_max"]["ci95_low"] <= made[system]["lambda_max"]["mean"]
        for load in ("at_own_0.8", "at_homogeneous_0.9"):
            figures = made[system][load]
            for key in ("ttft_mean_s", "ttft_p90_s", "ttft_p99_s", "second_token_mean_s", "tpot_mean_s", "share_good"):
                assert figures[key]["mean"] >= 0
    assert made["ratio_homogeneous"]["mean"] >= 1.5
    assert made["ratio_naive"]["mean"] >= 1.28
    assert made["ttft_reduction"]["mean"] >= 0.45


def test_what_is_not_known_is_null(capsys):
    """One seed has no interval; strict JSON has no infinity."""

    def refuse(word):
        raise AssertionError(word)

    assert main(["simulate", "--case", "paper", "--seeds", "1", "--requests", "10", "--json"]) == 0
    made = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert made["prfaas"]["lambda_max"]["ci95_low"] is None
    assert made["prfaas"]["lambda_max"]["mean"] > 0


def test_text(capsys):
    """A table for people."""
    assert main(["simulate", "--case", "paper", "--seeds", "1", "--requests", "300"]) == 0
    words = capsys.readouterr().out
    assert "saturated, requests/s" in words
    assert "-0.0" not in words


@pytest.mark.parametrize("policy", ["adaptive", "static", "homogeneous", "offload-all", "round-robin"])
def test_a_workload_on_a_deployment(capsys, policy):
    """Every policy serves the same requests."""
    flags = ["--num-prompts", "200", "--isl", "paper", "--osl", "64", "--request-rate", "1", "--policy", policy]
    assert main(["simulate", *flags, "--admit-all", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    run = made["runs"][0]
    assert (run["requests"], run["ok"], run["refused"]) == (200, 200, 0)
    assert made["deployment"]["policy"] == policy
    assert (run["offload"]["offloaded"] > 0) == (policy != "homogeneous")


def test_roles_follow_the_requests(capsys):
    """With --replan-every nodes change their role, each is said with its reason, and more is good than without."""
    flags = ["simulate", "--num-prompts", "3000", "--isl", "paper", "--osl", "2048", "--request-rate", "2.5", "--json"]
    good = []
    for more in ([], ["--replan-every", "60"]):
        assert main([*flags, "--home-prefill-nodes", "3", *more]) == 0
        made = json.loads(capsys.readouterr().out)
        good.append(made["runs"][0]["goodput_per_s"])
        conversions = made["deployment"]["conversions"]
    assert conversions[0].startswith("121 s, pd: 3 : 5 becomes 2 : 6: it carries +")
    assert good[1] > good[0]


def test_a_trace_with_caches(capsys, tmp_path):
    """Prefixes of a trace are found in the regions' pools."""
    lines = []
    for turn in range(1, 20):
        ids = [*range(turn), 1000 + turn]
        row = {"timestamp": turn * 5000, "input_length": 512 * turn + 9, "output_length": 5, "hash_ids": ids}
        lines.append(json.dumps(row))
    file = tmp_path / "trace.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    flags = ["--dataset-name", "mooncake_trace", "--dataset-path", str(file), "--json"]
    cached = {}
    for gib in ("0", "100"):
        assert main(["simulate", *flags, "--cache-gib", gib]) == 0
        cached[gib] = json.loads(capsys.readouterr().out)["runs"][0]["ttft_s"]["mean"]
    assert cached["100"] < cached["0"]


def test_what_happens_is_said_by_flags(capsys):
    """Half the home nodes die and come back, and the link narrows: some are routed again, and it takes longer."""
    flags = ["simulate", "--num-prompts", "300", "--isl", "paper", "--osl", "512", "--request-rate", "2", "--json"]
    flags += ["--admit-all"]
    events = ["--lose-nodes", "30:pd:0.5", "--nodes-back", "60:pd", "--link-change", "20:4", "--link-change", "90:100"]
    made = []
    for more in ([], events):
        assert main([*flags, *more]) == 0
        made.append(json.loads(capsys.readouterr().out)["runs"][0])
    assert made[1]["ok"] == 300
    assert made[1]["offload"]["fallbacks"].get("node_lost", 0) > 0
    assert made[1]["ttft_s"]["mean"] > made[0]["ttft_s"]["mean"]


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        (["--num-prompts", "20", "--request-rate", "2", "--lose-nodes", "0:pd:1"], "refused"),
        (["--isl", "paper", "--request-rate", "3", "--num-prompts", "200", "--link-change", "20:0"], "failed"),
    ],
)
def test_a_run_ends_though_some_are_stuck(capsys, flags, status):
    """All home nodes dead, or the link: who is stuck is refused or has failed, and the report says how many."""
    assert main(["simulate", *flags, "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["runs"][0]
    assert run[status] > 0
    assert run["ok"] + run["refused"] + run["failed"] == run["requests"]


def test_the_same_report_as_a_live_run(capsys, tmp_path):
    """Tables, every request as JSONL, figures as CSV, and a page; `report` reads what was saved."""
    saved, page = tmp_path / "r.jsonl", tmp_path / "r.html"
    flags = ["--num-prompts", "50", "--isl", "paper", "--osl", "64", "--request-rate", "2"]
    assert main(["simulate", *flags, "--jsonl", str(saved), "--html", str(page), "--csv", str(tmp_path / "r.csv")]) == 0
    words = capsys.readouterr().out
    assert "what left home" in words
    assert "threshold" in words
    assert "<svg" in page.read_text()
    assert main(["report", str(saved)]) == 0
    assert "50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--case", "paper", "--seeds", "0"], "--seeds 0 must be a whole number from 1"),
        (["--case", "paper", "--results", "x.md"], "--results does --case paper as well"),
        (["--traces", "x"], "--traces is for --results"),
        (["--case", "paper", "--html", "x.html"], "leave out --html"),
        (["--case", "paper", "--link-gbps", "8", "--request-rate", "2"], "leave out --link-gbps, --request-rate"),
        (
            ["--results", "x.md", "--seed", "3"],
            "--results has its own workload, deployment and output; leave out --seed",
        ),
        (["--results", "/nowhere/x.md"], "--results /nowhere/x.md: No such file"),
        (["--case", "paper", "--requests", "9"], "--requests 9 must be a whole number from 10"),
        (["--html", "/nowhere/x.html"], "--html /nowhere/x.html: No such file"),
        (["--seeds", "3"], "--seeds and --requests belong to --case paper"),
        (["--results", "x.md", "--traces", "nowhere"], "--traces nowhere: no such folder"),
        (["--link-gbps", "-1"], "--link-gbps -1 must be a number from 0 on"),
        (["--link-loss", "1"], "--link-loss 1 must be below 1"),
        (["--link-change", "8"], "--link-change 8 must be like S:GBPS"),
        (["--lose-nodes", "9:mars:0.5"], "no region 'mars'; there are pd and prfaas"),
        (["--lose-nodes", "9:pd:2"], "the share must be at most 1"),
        (["--nodes-back", "x:pd"], "--nodes-back x:pd: x must be a number"),
        (["--prfaas-nodes", "0", "--link-change", "9:1"], "there is no link to change"),
        (["--home-nodes", "0"], "--home-nodes 0 must be a whole number from 1"),
        (["--home-nodes", "3", "--home-prefill-nodes", "3"], "a node that decodes"),
        (["--isl", "-5"], "-5"),
        (["--prefill-profile", "nothing"], "no shipped profile 'nothing'"),
        (["--case", "nothing"], "invalid choice"),
    ],
)
def test_mistakes(capsys, flags, words):
    """Exit status 2 and one clear line that names the flag."""
    try:
        status = main(["simulate", *flags])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}\n{"timestamp": ', "line 2"),
        ('{"timestamp": 0, "input_length": -5, "output_length": 1, "hash_ids": []}', "line 1: the input length is -5"),
        ('{"timestamp": 0, "input": 5, "output_length": 1, "hash_ids": []}', "line 1"),
    ],
)
def test_broken_traces(capsys, tmp_path, broken, words):
    """Say which line, for a workload and for the page of results."""
    (tmp_path / "conversation_trace.jsonl").write_text(broken)
    trace = str(tmp_path / "conversation_trace.jsonl")
    assert main(["simulate", "--dataset-name", "mooncake_trace", "--dataset-path", trace]) == 2
    assert words in capsys.readouterr().err
    assert main(["simulate", "--results", str(tmp_path / "r.md"), "--traces", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_a_profile_that_is_not_monotone(capsys, tmp_path):
    """Exit status 2; the file, the curve and the place."""
    curve = {"lengths": [1, 2], "values": [2.0, 1.0], "provenance": "measured"}
    profile = {"format": 1, "name": "n", "model": "m", "hardware": "h", "gpus": 1, "prefill_s": curve}
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(profile | {"kv_bytes": curve}))
    assert main(["simulate", "--prefill-profile", str(file)]) == 2
    assert "prefill_s: values must not fall" in capsys.readouterr().err


def test_as_a_process():
    """The installed module, with --help on one screen."""
    made = subprocess.run(
        [sys.executable, "-m", "prfaas.loadgen", "simulate", "--help"], capture_output=True, text=True, check=True
    )
    assert "--case" in made.stdout
    assert "examples:" in made.stdout
