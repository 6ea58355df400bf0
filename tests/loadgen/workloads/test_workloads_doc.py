"""docs/workloads.md against the code: every command line gives a workload, and the Python runs."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
from prfaas.loadgen.workloads.flags import WHAT, WHEN, add_workload_arguments
from prfaas.loadgen.workloads.from_flags import recipe_from
from prfaas.loadgen.workloads.lengths import PAPER_INPUT_LENGTHS, PAPER_OUTPUT_LENGTHS

from tests.loadgen.workloads.test_traces import MOONCAKE

PAGE = (Path(__file__).parents[3] / "docs" / "workloads.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^prfaas-loadgen (?:run|simulate) (.*)$", PAGE, re.MULTILINE)
HOUR = "2023-11-16 18:{minute:02}:00,100,10"
FILES = {
    "lengths.txt": "100\n2000\n",
    "conversation_trace.jsonl.gz": MOONCAKE * 250,
    "AzureLLMInferenceTrace_conv.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    + "".join(HOUR.format(minute=minute) + "\n" for minute in range(60)),
    "rates.csv": "category,window_start_s,total_rate_req_per_s\nlanguage/m-large,0,3\nlanguage/m-large,600,5\n",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_on_the_page_gives_a_workload(tmp_path, monkeypatch, line):
    """The flags are taken and make requests, with files of the kinds that they name."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_workload_arguments(parser)
    assert len(recipe_from(parser.parse_args(shlex.split(line))).workload()) > 0


def test_the_page_names_only_flags_that_there_are():
    """Every --flag on the page is one of the workload's or of the prompts'."""
    known = {name for flag in (*WHAT, *WHEN) for name in flag.names}
    known |= {"--prompt-format", "--tokens-per-word", "--vocab-size"}
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    assert named - known == set()
    assert len(COMMANDS) == PAGE.count("\nprfaas-loadgen ")


def test_the_python_on_the_page_runs():
    """The example runs to its end and leaves nothing unsent."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["schedule"].unsent == 0
    assert names["busier"].prompt_tokens.tolist() == names["workload"].prompt_tokens.tolist()


def test_the_papers_figures_on_the_page():
    """The mean that the page gives is the distribution's."""
    assert f"mean\n{PAPER_INPUT_LENGTHS.mean():,.0f}; output {PAPER_OUTPUT_LENGTHS.tokens:,}" in PAGE
