"""Measuring an engine for `prfaas profile`, through the interface that nodes use: what it gets here it gives there.

    prefill     a prompt of n tokens alone on the engine, from the start of its computing to the end: its first n − 1
                tokens, since decode recomputes the last. Median of the repetitions.
    decode      `batch` requests of the same context run together; the time between two tokens of one of them, while all
                run. Median over tokens and requests. Their contexts grow by some tokens meanwhile.

KV bytes are the layout's, exactly. Values that fall from one point to the next, which is noise, are raised to the one
before: a profile never falls.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from prfaas.common.config import EngineConfig
from prfaas.common.errors import SetupError, UsageError
from prfaas.common.kv_layout import TokenRange
from prfaas.common.perfmodel.curves import Curve, Surface
from prfaas.common.perfmodel.profiles import NodeProfile
from prfaas.services.engine.api import (
    DecodeDone,
    DecodeEvent,
    DecodeRequest,
    DecodeTimeline,
    Engine,
    EventStream,
    SamplingParams,
    TokenEvent,
)
from prfaas.services.model_store import Progress

_SAMPLING = SamplingParams(temperature=0, ignore_eos=True)
_ID_STEP = 7919
"""Prompts are an arithmetic sequence of ids: as good as any text for the time it takes."""
_REST_S = 0.05
"""Before each prefill: the emulated device takes a shorter pause for its own lateness, and makes up for it."""


@dataclass(frozen=True, slots=True)
class Points:
    """What to measure; tokens, ascending. steps: decode steps of each batch."""

    lengths: Sequence[int]
    batches: Sequence[int]
    contexts: Sequence[int]
    repetitions: int
    steps: int


@dataclass(slots=True)
class Measured:
    """Seconds: prefill_s [lengths], step_s [batches][contexts], as they were measured."""

    prefill_s: list[float] = field(default_factory=list)
    step_s: list[list[float]] = field(default_factory=list)


async def measure(engine: Engine, config: EngineConfig, points: Points, progress: Progress) -> Measured:
    """Of a started engine that does nothing else. Raises UsageError for points that don't fit it, EngineError."""
    check(engine, config, points)
    rounds = len(points.lengths) * points.repetitions + len(points.batches) * len(points.contexts)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress("measuring", done, rounds)

    progress("measuring", 0, rounds)
    await _prefill_s(engine, points.lengths[0])  # warm-up
    found = Measured()
    for length in points.lengths:
        times = []
        for _ in range(points.repetitions):
            times.append(await _prefill_s(engine, length))
            tick()
        found.prefill_s.append(statistics.median(times))
    for batch in points.batches:
        row = []
        for context in points.contexts:
            row.append(await _step_s(engine, batch, context, most_output(config, points, batch, context), points.steps))
            tick()
        found.step_s.append(row)
    return found


def check(engine: Engine, config: EngineConfig, points: Points) -> None:
    """Raises UsageError, before the minutes of work."""
    info = engine.info
    if points.lengths[-1] + 1 > info.max_model_tokens:
        raise UsageError(f"--lengths {points.lengths[-1]}: {info.model} takes {info.max_model_tokens} tokens in all")
    if points.batches[-1] > config.max_batch:
        raise UsageError(f"--batches {points.batches[-1]}: the engine's engine.max_batch is {config.max_batch}")
    batch, context = points.batches[-1], points.contexts[-1]
    most = context + most_output(config, points, batch, context)
    if most > info.max_model_tokens:
        raise UsageError(
            f"--contexts {context}: with {most - context} output tokens it exceeds {info.max_model_tokens}"
        )
    needed = max(
        info.layout.total_bytes(TokenRange(0, points.lengths[-1] + 1)),
        batch * info.layout.total_bytes(TokenRange(0, most)),
    )
    if needed > info.arena_bytes:
        raise UsageError(
            f"{batch} requests of {most} tokens hold {needed} bytes of KV, the engine has {info.arena_bytes};"
            " lower --contexts or --batches, or raise --engine-arena-bytes"
        )


def most_output(config: EngineConfig, points: Points, batch: int, context: int) -> int:
    """Tokens that the first request of a batch may make until the last has run `steps` with it. A running batch steps
    about once between two prefill steps; twice that, to be sure."""
    prefill_steps = math.ceil(context / config.prefill_step_tokens) + 1
    return 2 * (batch * prefill_steps + points.steps) + 16


def prompt(length: int, vocabulary: int, seed: int) -> list[int]:
    return [(seed + 1 + i * _ID_STEP) % vocabulary for i in range(length)]


async def _prefill_s(engine: Engine, length: int) -> float:
    await asyncio.sleep(_REST_S)
    request = DecodeRequest("profile", prompt(length, engine.info.vocabulary, length), 1, _SAMPLING)
    async with aclosing(engine.decode(request, [])) as events:
        async for event in events:
            if isinstance(event, DecodeTimeline):
                if event.started_s is None or event.ended_s is None:
                    break
                return event.ended_s - event.started_s
    raise SetupError("the engine didn't say when it prefilled")


async def _step_s(engine: Engine, batch: int, context: int, most_output_tokens: int, steps: int) -> float:
    """The median time between two tokens while all of the batch run."""
    gathered: list[list[float]] = [[] for _ in range(batch)]
    enough = asyncio.Event()

    def note(index: int, at_s: float) -> None:
        gathered[index].append(at_s)
        if all(gathered):
            begin_s = max(times[0] for times in gathered)
            if min(sum(t >= begin_s for t in times) for times in gathered) > steps:
                enough.set()

    async def follow(index: int, events: EventStream[DecodeEvent]) -> None:
        async for event in events:
            if isinstance(event, TokenEvent):
                note(index, event.at_s)
            elif isinstance(event, DecodeDone):
                enough.set()

    async with AsyncExitStack() as stack:
        followers = []
        for index in range(batch):
            ids = prompt(context, engine.info.vocabulary, index)
            request = DecodeRequest(f"profile-{index}", ids, most_output_tokens, _SAMPLING)
            events = await stack.enter_async_context(aclosing(engine.decode(request, [])))
            followers.append(asyncio.ensure_future(follow(index, events)))
        waiting = asyncio.ensure_future(enough.wait())
        try:
            await asyncio.wait([waiting, *followers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (waiting, *followers):
                task.cancel()
            ended = await asyncio.gather(*followers, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error
    return together(gathered)


def together(times_s: Sequence[Sequence[float]]) -> float:
    """The median gap between tokens from when the last request had its first one. Raises SetupError without any."""
    begin_s = max((times[0] for times in times_s if times), default=math.inf)
    gaps = [later - earlier for times in times_s for earlier, later in pairwise(times) if earlier >= begin_s]
    if not gaps or not all(times_s):
        raise SetupError(f"the {len(times_s)} requests of a batch never ran together; try smaller --batches")
    return statistics.median(gaps)


def as_profile(
    engine: Engine, points: Points, found: Measured, name: str, hardware: str, gpus: int, source: str
) -> NodeProfile:
    """The profile of what was measured, its curves never falling."""
    layout = engine.info.layout
    lengths = tuple(float(n) for n in points.lengths)
    sizes = tuple(float(layout.total_bytes(TokenRange(0, n - 1))) for n in points.lengths)
    steps = np.maximum.accumulate(np.maximum.accumulate(np.array(found.step_s), axis=0), axis=1)
    return NodeProfile(
        name=name,
        model=engine.info.model,
        hardware=hardware,
        gpus=gpus,
        prefill_s=Curve(lengths, tuple(np.maximum.accumulate(found.prefill_s).tolist())),
        kv_bytes=Curve(lengths, sizes, "linear"),
        decode_step_s=Surface(
            tuple(map(float, points.batches)), tuple(map(float, points.contexts)), tuple(map(tuple, steps.tolist()))
        ),
        max_batch=points.batches[-1],
        kv_capacity_bytes=engine.info.arena_bytes,
        provenance={"prefill_s": "measured", "kv_bytes": "measured", "decode_step_s": "measured"},
        sources={"prefill_s": source, "kv_bytes": "the model's KV layout, exactly", "decode_step_s": source},
    )
