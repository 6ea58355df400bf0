"""`prfaas demo`: a real model answers a question across two regions, on this machine, and shows what happened."""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from prfaas.common.command_line import Parser
from prfaas.common.errors import SetupError
from prfaas.common.kv_layout import MAX_TOKENS
from prfaas.services.commands.demo import report, show
from prfaas.services.commands.demo.client import Answer, ask
from prfaas.services.commands.demo.cluster import Cluster, Plan, get_json, running
from prfaas.services.commands.demo.prompt import QUESTION, build_prompt
from prfaas.services.commands.demo.report import Run
from prfaas.services.commands.demo.timeline import read_run
from prfaas.services.commands.flags import new_parser, number, whole
from prfaas.services.commands.progress import progress_bar
from prfaas.services.model_store import ensure_model
from rich.console import Console

MOST = 1e6
"""Mbit/s, or ms: of the emulated WAN."""
EXIT_TERMINATED = 128 + signal.SIGTERM
WARM_PROMPT = "Say hello."
WARM_TOKENS = 4
# The baselines are asked for the times of the first two tokens only.
BASELINE_TOKENS = 4
# Room for prompts of some 20,000 tokens of the demo's model, in each of the two nodes.
SETTINGS = {"PRFAAS_ENGINE_ARENA_BYTES": "512M"}


def parser() -> Parser:
    flags = new_parser(
        "prfaas demo",
        "A real model answers across two regions: router and decode node at home, the prefill node behind an\n"
        "emulated WAN. Then the run is drawn, beside two baselines. Nothing is left running.",
        "prfaas demo --rate-mbit 200 --delay-ms 40",
    )
    flags.add_argument("--model", default="smollm2", metavar="NAME", help="smollm2, a directory or Hugging Face id")
    flags.add_argument("--question", default=QUESTION, metavar="TEXT", help=f"about the story [{QUESTION}]")
    flags.add_argument(
        "--prompt-tokens", type=whole(64, MAX_TOKENS), metavar="N", help="repeat or cut the story to N tokens"
    )
    flags.add_argument("--max-tokens", type=whole(2, MAX_TOKENS), default=64, metavar="N", help="longest answer [64]")
    flags.add_argument("--rate-mbit", type=number(0.1, MOST), default=500.0, metavar="N", help="the WAN's rate [500]")
    flags.add_argument("--delay-ms", type=number(0, MOST), default=20.0, metavar="N", help="its one-way delay [20]")
    flags.add_argument("--engine", choices=("transformers", "emulated"), default="transformers")
    flags.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    flags.add_argument("--no-baselines", action="store_true", help="leave the two baselines out")
    flags.add_argument("--keep", action="store_true", help="leave the services up until Ctrl-C, print a curl line")
    flags.add_argument("--json", action="store_true", help="print one object instead")
    return flags


def main(argv: Sequence[str]) -> int:
    given = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminated)
    console = Console(stderr=given.json, highlight=False)
    model_path = _model_path(given)
    folder = Path(tempfile.mkdtemp(prefix="prfaas-demo-"))
    try:
        with running(_plan(given, model_path, folder)) as cluster:
            Demo(given, console, cluster).run()
    except SetupError as error:
        raise SetupError(f"{error}\nthe logs of all processes are in {folder}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM ends like Ctrl-C: what was started is stopped on the way out."""
    raise SystemExit(EXIT_TERMINATED)


def _model_path(given: argparse.Namespace) -> str:
    if given.engine == "emulated":
        return "bytes"
    with progress_bar() as progress:
        return str(ensure_model(given.model, progress))


def _plan(given: argparse.Namespace, model_path: str, folder: Path) -> Plan:
    return Plan(
        engine=given.engine,
        model_path=model_path,
        dtype=given.dtype,
        rate_mbit=given.rate_mbit,
        delay_ms=given.delay_ms,
        secret=secrets.token_hex(32),
        folder=folder,
        settings=SETTINGS,
    )


class Demo:
    """The course of events on a running cluster."""

    def __init__(self, given: argparse.Namespace, console: Console, cluster: Cluster) -> None:
        self.given = given
        self.console = console
        self.cluster = cluster
        self.port = cluster.ports.router
        self.model = _model_name(cluster)
        self.prompt = _prompt(given, cluster.plan.model_path)

    def run(self) -> None:
        given, console = self.given, self.console
        self._warm_up()
        link = f"{given.rate_mbit:g} Mbit/s, {given.delay_ms:g} ms one way"
        console.print(f"{self.model}, prefill in another region behind {link}", style="dim", soft_wrap=True)
        console.print(f"{given.question}\n", style="bold")
        run = self.answer(given.max_tokens, stream=not given.json)
        if not given.json:
            show.show_layers(console, run)
            show.show_figures(console, run, given.rate_mbit, given.delay_ms)
        baselines = {} if given.no_baselines else self._baselines()
        if baselines and not given.json:
            show.show_baselines(console, run, baselines)
        if given.json:
            print(json.dumps(report.as_json(run, baselines, given.rate_mbit, given.delay_ms)), flush=True)
        if given.keep:
            self._keep()

    def _baselines(self) -> dict[str, Run]:
        """The same prompt on nodes with other settings, one at a time; ends with the first cluster's settings, but
        for a decode node that --keep puts back."""
        cluster = self.cluster
        self.console.print("\nnow the same prompt under two baselines ...", style="dim")
        cluster.stop("prefill")
        cluster.start_prefill(send="after_prefill")
        after_prefill = self._ask_again()
        cluster.stop("prefill", "decode")
        cluster.start_decode(join="when_complete")
        cluster.start_prefill()
        when_complete = self._ask_again()
        if self.given.keep:
            cluster.stop("decode")
            cluster.start_decode()
            self.settle()
        return dict(zip(report.BASELINES, (after_prefill, when_complete), strict=True))

    def _ask_again(self) -> Run:
        self.settle()
        return self.answer(BASELINE_TOKENS, stream=False)

    def settle(self) -> None:
        self.cluster.wait_ready()
        self._warm_up()

    def answer(self, max_tokens: int, *, stream: bool) -> Run:
        def on_text(text: str) -> None:
            if stream:
                self.console.print(text, end="", markup=False, soft_wrap=True)

        answer = ask(self.port, self.model, self.prompt, max_tokens, on_text)
        if stream:
            self.console.print()
        run = self._run_of(answer)
        if run is None:
            raise SetupError("the prefill node took no part in the answer; is something else busy on this machine?")
        return run

    def _warm_up(self) -> None:
        """Short prompts until one was prefilled in the other region: the nodes have found one another."""

        def went_over() -> bool:
            answer = ask(self.port, self.model, WARM_PROMPT, WARM_TOKENS, lambda text: None)
            return self._run_of(answer) is not None

        self.cluster.wait_for(went_over, "no request reached the prefill node")

    def _run_of(self, answer: Answer) -> Run | None:
        """The answer with its timeline; None = prefilled by the decode node."""
        found: list[Any] = []

        def is_there() -> bool:
            found[:] = [get_json(self.port, f"/requests/{answer.request_id}/timeline")]
            return found[0] is not None

        self.cluster.wait_for(is_there, f"the router has no timeline of request {answer.request_id}")
        return read_run(answer, found[0])

    def _keep(self) -> None:
        body = json.dumps(
            {"model": self.model, "messages": [{"role": "user", "content": "What is a bell?"}], "max_tokens": 40}
        )
        line = f"curl -N {self.cluster.router_url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"
        try:
            self.console.print("\nThe services stay up; Ctrl-C ends them. Try:", style="bold")
            self.console.print(line, markup=False, soft_wrap=True)
            while True:
                self.cluster.check()
                time.sleep(1.0)
        except KeyboardInterrupt:
            self.console.print("stopping ...", style="dim")


def _model_name(cluster: Cluster) -> str:
    listed: Any = get_json(cluster.ports.router, "/v1/models")
    try:
        return str(listed["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise SetupError("the router lists no model") from None


def _prompt(given: argparse.Namespace, model_path: str) -> str:
    from prfaas.services.engine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model_path)

    def count_tokens(message: str) -> int:
        chat = tokenizer.render_chat([{"role": "user", "content": message}])
        return len(tokenizer.encode(chat, special_tokens=False))

    return build_prompt(given.question, count_tokens, given.prompt_tokens)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
