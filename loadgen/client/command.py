"""`prfaas-loadgen run`: a workload against a live server, and the report of it."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from prfaas.common.command_line import EXIT_FAILURE, EXIT_INTERRUPTED
from prfaas.common.errors import ConfigError
from prfaas.loadgen.client.endpoint import Endpoint, Kind, base_url
from prfaas.loadgen.client.live import LiveRun, run_live
from prfaas.loadgen.records import OK, Records
from prfaas.loadgen.report.objective import Objective
from prfaas.loadgen.report.outputs import add_output_arguments, check_writable, objective_from, put_out
from prfaas.loadgen.report.plots import Run
from prfaas.loadgen.workloads.flags import add_workload_arguments
from prfaas.loadgen.workloads.from_flags import workload_from
from prfaas.loadgen.workloads.prompt_flags import TEXT, TOKEN_IDS, add_prompt_arguments, prompts_from
from prfaas.loadgen.workloads.workload import Workload

DESCRIPTION = "Sends a workload to an OpenAI-compatible server and measures every answer from its scheduled send."
EXAMPLE = """\
examples:
  prfaas-loadgen run --url http://127.0.0.1:8000 --request-rate 2 --num-prompts 100
  prfaas-loadgen run --dataset-name mooncake_trace --dataset-path t.jsonl --speedup 4 --html run.html"""
SHOWS_ALL = True
DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 600.0
MAX_TIMEOUT_S = 7 * 86_400.0
MAX_WARMUPS = 100_000.0
KEY_VARIABLE = "OPENAI_API_KEY"
ENDPOINTS = {
    "completions": "completions",
    "chat": "chat",
    "openai": "completions",
    "openai-chat": "chat",
    "vllm": "completions",
}
SAME_FLAG = {
    "--base-url": "--url",
    "--model-names": "--model",
    "--backend": "--endpoint-type",
    "--request-timeout-seconds": "--request-timeout",
    "--warmup-request-count": "--num-warmups",
    "--num-warmup-requests": "--num-warmups",
    "--disable-tqdm": "--no-progress",
}
"""Names that `vllm bench serve` or aiperf have for a flag: taken, not listed."""


def add_arguments(parser: argparse.ArgumentParser, *, show_all: bool = False) -> None:
    """The subcommand's flags; the rarer ones are listed with `show_all`."""

    def rare(words: str) -> str:
        return words if show_all else argparse.SUPPRESS

    group = parser.add_argument_group("where")
    group.add_argument("--url", metavar="URL", default=DEFAULT_URL, help=f"the server [{DEFAULT_URL}]")
    group.add_argument("--model", metavar="NAME", default="", help="[the first that the server lists]")
    group.add_argument("--endpoint-type", metavar="NAME", default="completions", help="completions, chat [completions]")
    group.add_argument(
        "--request-timeout", metavar="S", default=str(DEFAULT_TIMEOUT_S), help=rare("for a whole answer [600]")
    )
    group.add_argument("--api-key-file", metavar="FILE", help=rare(f"a key for the server [{KEY_VARIABLE}]"))
    group.add_argument(
        "--header",
        metavar="NAME:VALUE",
        nargs="+",
        action="extend",
        default=[],
        help=rare("go with each request; or NAME=VALUE"),
    )
    group.add_argument("--cacert", metavar="FILE", help=rare("certificates that the server's is checked by"))
    words = "requests before the run, which count for nothing [0]"
    group.add_argument("--num-warmups", metavar="N", default="0", help=rare(words))
    group.add_argument("--ignore-eos", action="store_true", help="each answer has all its output tokens (vLLM, PrfaaS)")
    group.add_argument("--temperature", metavar="X", default="0", help=rare("or none: leave it out [0]"))
    group.add_argument("--extra-body", metavar="JSON", help=rare("fields that every request has besides"))
    group.add_argument("--extra-inputs", metavar="NAME:VALUE", nargs="+", action="extend", help=argparse.SUPPRESS)
    group.add_argument("--no-timelines", action="store_true", help=rare("don't ask a PrfaaS router what it knows"))
    group.add_argument("--no-progress", action="store_true", help=rare("no live line"))
    _add_other_names(group)
    add_workload_arguments(parser, show_all=show_all)
    add_prompt_arguments(parser)
    add_output_arguments(parser)


def _add_other_names(group: argparse._ArgumentGroup) -> None:
    for name, ours in SAME_FLAG.items():
        dest = ours.removeprefix("--").replace("-", "_")
        if ours == "--no-progress":
            group.add_argument(name, dest=dest, action="store_true", help=argparse.SUPPRESS)
        else:
            group.add_argument(name, dest=dest, metavar="X", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    # aiperf streams only when it is told to; answers are always streamed here.
    group.add_argument("--streaming", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 some request was answered, 1 none was, 130 interrupted. Raises ConfigError, UsageError and
    SetupError."""
    given = _read(args)
    workload, endpoint = given.workload, given.endpoint
    check_writable(args)
    live = _run_loop(given, args)
    if live.records is None:
        sys.stderr.write("prfaas-loadgen run: interrupted before anything was sent\n")
        return EXIT_INTERRUPTED
    notes = _notes(workload, endpoint, live)
    warnings = _warnings(live.records, live)
    more: dict[str, Any] = {
        "client": live.health,
        "unsent": live.unsent,
        "interrupted": live.interrupted,
        "errors": live.errors,
        "setup": {"url": endpoint.url, "model": live.model, "endpoint": endpoint.kind, "workload": workload.name},
    }
    put_out(
        args,
        [Run(workload.name, live.records)],
        given.objective,
        f"{workload.name} against {endpoint.url}",
        notes=notes,
        warnings=warnings,
        **more,
    )
    for line in [*([] if args.json else notes), *warnings]:
        sys.stderr.write(f"prfaas-loadgen run: {line}\n")
    if live.interrupted:
        return EXIT_INTERRUPTED
    return 0 if live.records.ok.any() else EXIT_FAILURE


@dataclass(frozen=True, slots=True)
class _Given:
    """What the flags say."""

    workload: Workload
    endpoint: Endpoint
    objective: Objective
    timeout_s: float
    warmups: int


def _run_loop(given: _Given, args: argparse.Namespace) -> LiveRun:
    try:
        from uvloop import new_event_loop
    except ImportError:
        from asyncio import new_event_loop
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(
            run_live(
                given.workload,
                given.endpoint,
                timeout_s=given.timeout_s,
                ca_file=args.cacert,
                warmups=given.warmups,
                timelines=not args.no_timelines,
                quiet=args.no_progress,
            )
        )


def _read(args: argparse.Namespace) -> _Given:
    """All mistakes of all flags together. Raises ConfigError."""
    problems: list[str] = []

    def made(make: Callable[..., Any], *given: Any) -> Any:
        try:
            return make(*given)
        except ConfigError as error:
            problems.extend(error.problems)
            return None

    kind = ENDPOINTS.get(args.endpoint_type)
    if kind is None:
        problems.append(f"--endpoint-type {args.endpoint_type}: there are completions, chat")
    url = made(base_url, args.url)
    timeout_s = made(_number, "--request-timeout", args.request_timeout, MAX_TIMEOUT_S)
    warmups = made(_number, "--num-warmups", args.num_warmups, MAX_WARMUPS)
    temperature = None if args.temperature == "none" else made(_number, "--temperature", args.temperature, 100.0)
    if timeout_s == 0:
        problems.append("--request-timeout 0: it is above 0")
    headers = made(_headers, args)
    extra = (made(_extra_inputs, args.extra_inputs or []) or {}) | (made(_extra_body, args.extra_body) or {})
    objective = made(objective_from, args)
    workload = made(workload_from, args)
    prompts = made(prompts_from, args, workload.content_seed if workload is not None else 0)
    if kind == "chat" and (args.prompt_format or TEXT) == TOKEN_IDS:
        problems.append(f"--prompt-format {TOKEN_IDS} is for completions; a chat has text")
    if problems:
        raise ConfigError(problems)
    chosen: Kind = "chat" if kind == "chat" else "completions"
    endpoint = Endpoint(url, chosen, args.model, prompts, temperature, args.ignore_eos, extra, headers)
    return _Given(workload, endpoint, objective, timeout_s, int(warmups))


def _number(flag: str, text: str, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise ConfigError([f"{flag} {text}: it is a number from 0 to {most:g}"])
    return value


def _headers(args: argparse.Namespace) -> dict[str, str]:
    headers = {}
    for given in args.header:
        name, value = _named(given)
        if not name or not (name + value).isprintable():
            raise ConfigError(["--header: it is like 'x-team: blue' or x-team=blue"])
        headers[name] = value
    key = os.environ.get(KEY_VARIABLE, "")
    if args.api_key_file is not None:
        try:
            key = Path(args.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"--api-key-file {args.api_key_file} can't be read: {error}"]) from None
    if key and not (key.isascii() and key.isprintable()):
        raise ConfigError([f"the API key (--api-key-file or {KEY_VARIABLE}) has characters that no key has"])
    return ({"authorization": f"Bearer {key}"} if key else {}) | headers


def _named(text: str) -> tuple[str, str]:
    """NAME:VALUE as aiperf has it, or NAME=VALUE as vLLM has it; "" as the name where it is neither."""
    ends = [place for sign in ":=" if (place := text.find(sign)) >= 0]
    if not ends:
        return "", text
    return text[: min(ends)].strip(), text[min(ends) + 1 :].strip()


def _extra_body(text: str | None) -> dict[str, Any]:
    return {} if text is None else _json_object("--extra-body", text)


def _extra_inputs(words: Sequence[str]) -> dict[str, Any]:
    """aiperf's way to say the same: NAME:VALUE or a JSON object each."""
    fields: dict[str, Any] = {}
    for word in words:
        if word.lstrip().startswith("{"):
            fields |= _json_object("--extra-inputs", word)
            continue
        name, colon, value = word.partition(":")
        if not colon or not name:
            raise ConfigError([f"--extra-inputs {word[:100]}: it is like top_p:0.9, or a JSON object"])
        try:
            fields[name] = msgspec.json.decode(value)
        except msgspec.DecodeError:
            fields[name] = value
    return fields


def _json_object(flag: str, text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError([f"{flag} is no JSON object: {error}"]) from None


def _notes(workload: Workload, endpoint: Endpoint, live: LiveRun) -> list[str]:
    health = live.health
    said = [
        f"model {live.model}, {endpoint.kind}, workload {workload.name}",
        f"this client: sent {health.late_p99_s * 1e3:.1f} ms late (p99), its loop {health.loop_lag_p99_s * 1e3:.1f} ms "
        f"(p99), {health.cpu_cores:.0%} of a core",
    ]
    if live.unsent:
        said.append(f"{live.unsent:,} requests were never sent")
    if health.timelines_missed:
        said.append(f"the router was not asked, or did not know, what became of {health.timelines_missed:,} requests")
    said += [f"{word}: {text}" for word, text in live.errors.items()]
    return said


def _warnings(records: Records, live: LiveRun) -> list[str]:
    warnings = list(live.health.warnings)
    if live.interrupted:
        warnings.insert(0, "interrupted: these are the figures up to then")
    elif not records.status.equal(OK).any():
        warnings.insert(0, f"no request was answered: {', '.join(records.error.counts()) or 'none ended'}")
    return warnings
