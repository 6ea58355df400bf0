"""`prfaas profile`: an engine's prefill time, KV size and decode step in a file that planner and simulator read."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prfaas.common.command_line import Parser
from prfaas.common.config import FLAG_ALIASES, EngineConfig
from prfaas.common.errors import UsageError
from prfaas.common.kv_layout import MAX_TOKENS
from prfaas.services.commands.capture_kv import check_writable
from prfaas.services.commands.flags import add_config_flags, load_config, new_parser, whole
from prfaas.services.commands.progress import progress_bar
from prfaas.services.commands.serve import with_engine_model

if TYPE_CHECKING:
    from prfaas.common.perfmodel.profiles import NodeProfile
    from prfaas.services.commands.profile_engine import Points
    from prfaas.services.engine.api import EngineInfo

LENGTHS, BATCHES, CONTEXTS = (128, 512, 2048, 8192), (1, 2, 4, 8), (256, 2048)
MAX_LIST = 64
ALIASES = {flag: FLAG_ALIASES[flag] for flag in ("--engine", "--model", "--dtype")}


def main(argv: Sequence[str]) -> int:
    show_all = "--help-all" in argv
    made = parser(show_all=show_all)
    if show_all:
        made.print_help()
        return 0
    options = made.parse_args(argv)
    out = Path(options.out)
    check_writable(out)
    config = with_engine_model(load_config(options)).engine
    from prfaas.common.perfmodel import profiles

    profile = asyncio.run(measured(config, options))
    profiles.save(profile, out)
    print(json.dumps(report(profile, out)) if options.json else as_text(profile, out))
    return 0


def parser(*, show_all: bool) -> Parser:
    made = new_parser(
        "prfaas profile",
        "Measures this machine's engine: prefill over the length, a decode step over batch and context.\n"
        "Stop other load first. The file is for prfaas-loadgen plan and simulate.",
        "prfaas profile --model smollm2 --out node.json",
    )
    made.add_argument("--out", metavar="FILE", required=not show_all, help="where to write it; replaced if it is there")
    made.add_argument("--lengths", type=_tokens, metavar="N,...", help=f"prompt lengths [{_listed(LENGTHS)}]")
    made.add_argument("--batches", type=_tokens, metavar="N,...", help=f"decode batches [{_listed(BATCHES)}]")
    made.add_argument("--contexts", type=_tokens, metavar="N,...", help=f"their contexts [{_listed(CONTEXTS)}]")
    made.add_argument("--repetitions", type=whole(1, 1000), default=3, metavar="N", help="of each prefill [3]")
    made.add_argument("--steps", type=whole(2, 10000), default=20, metavar="N", help="decode steps of each batch [20]")
    made.add_argument("--profile-name", metavar="TEXT", help="its name [the model's]")
    made.add_argument("--hardware", metavar="TEXT", help=f"in words [{platform.machine()}]")
    made.add_argument("--gpus", type=whole(1, 1 << 20), default=1, metavar="N", help="that this node counts as [1]")
    made.add_argument("--json", action="store_true", help="print one object instead")
    add_config_flags(made, ALIASES, show_all=show_all)
    return made


async def measured(config: EngineConfig, options: argparse.Namespace) -> NodeProfile:
    """Start an engine as a node would, measure it, close it."""
    from prfaas.services.commands import profile_engine
    from prfaas.services.node.app import make_engine

    # Full prefill steps beside running streams: else filling a batch takes longer than running it.
    config = dataclasses.replace(config, local_prefill_step_tokens=config.prefill_step_tokens)
    engine = make_engine(config)
    with progress_bar(counts=True) as progress:
        progress("starting the engine", 0, 0)
        await engine.start()
        try:
            points = chosen(options, engine.info, config)
            found = await profile_engine.measure(engine, config, points, progress)
            name, hardware = options.profile_name or engine.info.model, options.hardware or platform.machine()
            source = (
                f"prfaas profile: engine {config.kind}, device {config.device}, {config.threads} threads, dtype"
                f" {config.dtype}, medians of {points.repetitions} prefills and of {points.steps} decode steps"
            )
            return profile_engine.as_profile(engine, points, found, name, hardware, options.gpus, source)
        finally:
            await engine.close()


def chosen(options: argparse.Namespace, info: EngineInfo, config: EngineConfig) -> Points:
    """What was asked for; of the defaults, what the engine can do."""
    from prfaas.common.kv_layout import TokenRange
    from prfaas.services.commands.profile_engine import Points

    def holds(tokens: int, requests: int) -> bool:
        room = info.layout.total_bytes(TokenRange(0, tokens)) * requests <= info.arena_bytes
        return room and tokens < info.max_model_tokens

    batches = options.batches or [b for b in BATCHES if b <= config.max_batch]
    points = Points(
        options.lengths or [n for n in LENGTHS if holds(n, 1)],
        batches,
        options.contexts or [n for n in CONTEXTS if holds(n + 512, batches[-1])],
        options.repetitions,
        options.steps,
    )
    for flag, values in (("--lengths", points.lengths), ("--contexts", points.contexts)):
        if not values:
            raise UsageError(f"this engine holds none of the usual lengths; name some with {flag}")
    return points


def report(profile: NodeProfile, out: Path) -> dict[str, Any]:
    from prfaas.common.perfmodel import profiles

    return {"file": str(out), "profile": json.loads(profiles.dumps(profile))}


def as_text(profile: NodeProfile, out: Path) -> str:
    steps = profile.decode_step_s
    assert steps is not None
    lines = [f"{out}: {profile.name} on {profile.hardware}", "", f"{'tokens':>8} {'prefill, s':>12} {'KV, MB':>10}"]
    lines += [
        f"{length:>8,.0f} {seconds:>12.4f} {profile.kv_bytes(length) / 1e6:>10.2f}"
        for length, seconds in zip(profile.prefill_s.lengths, profile.prefill_s.values, strict=True)
    ]
    lines += ["", "decode step, ms, by batch and context"]
    lines.append(f"{'':>8} " + " ".join(f"{context:>9,.0f}" for context in steps.contexts))
    lines += [
        f"{batch:>8,.0f} " + " ".join(f"{1e3 * value:>9.2f}" for value in row)
        for batch, row in zip(steps.batches, steps.values, strict=True)
    ]
    return "\n".join(lines)


def _tokens(text: str) -> list[int]:
    """Whole numbers with commas between, rising."""
    check: Callable[[str], int] = whole(1, MAX_TOKENS)
    numbers = [check(part.strip()) for part in text.split(",")]
    if len(numbers) > MAX_LIST or sorted(set(numbers)) != numbers:
        raise argparse.ArgumentTypeError(f"{text!r} must be at most {MAX_LIST} rising numbers with commas between")
    return numbers


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
