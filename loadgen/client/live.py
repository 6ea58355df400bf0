"""A whole live run: session, clock, runner, watch, progress, SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import aiohttp
import msgspec
from prfaas.common.errors import ConfigError, SetupError
from prfaas.loadgen.client.bodies import Bodies
from prfaas.loadgen.client.endpoint import Endpoint
from prfaas.loadgen.client.exchange import MAX_ERROR_BODY_BYTES, Exchange, open_session, said_of
from prfaas.loadgen.client.progress import Progress, show
from prfaas.loadgen.client.runner import Clock, Runner
from prfaas.loadgen.client.stream import error_text
from prfaas.loadgen.client.timelines import Timelines
from prfaas.loadgen.client.verdict import ClientHealth, judge
from prfaas.loadgen.client.watch import LoopWatch
from prfaas.loadgen.records import OK, Records, RequestRecord
from prfaas.loadgen.workloads.rngs import MAX_SEED
from prfaas.loadgen.workloads.workload import Workload

MODELS_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class LiveRun:
    """`errors`: what was said the first time that each word came up. `unsent`: requests that have no record."""

    model: str
    records: Records | None
    """None: nothing was sent."""
    health: ClientHealth
    errors: dict[str, str]
    unsent: int
    interrupted: bool


async def run_live(
    workload: Workload,
    endpoint: Endpoint,
    *,
    timeout_s: float,
    ca_file: str | None = None,
    warmups: int = 0,
    timelines: bool = True,
    quiet: bool = False,
) -> LiveRun:
    """Send the workload. SIGINT ends it early. Raises ConfigError when `ca_file` holds no certificates, SetupError when
    `endpoint.model` is "" and the server names none.

    `warmups`: so many requests of the workload are sent before, one by one, with other prompts of the same lengths.
    `timelines`: ask a PrfaaS router for what it knows of each request. `quiet`: no live line.
    """
    raise_file_limit()
    try:
        session = open_session(ca_file)
    except ssl.SSLError:
        raise ConfigError([f"--cacert {ca_file} holds no certificates (PEM)"]) from None
    except OSError as error:
        raise ConfigError([f"--cacert {ca_file} can't be read: {error.strerror or error}"]) from None
    async with session:
        if not endpoint.model:
            endpoint = replace(endpoint, model=await first_model(session, endpoint))
        await _warm_up(session, endpoint, workload, warmups, timeout_s)
        clock, watch = Clock(), LoopWatch()
        clock.start()
        exchange = Exchange(session, endpoint, clock.now_s, timeout_s)
        asked = Timelines(session, endpoint) if timelines else None
        runner = Runner(workload, clock, exchange, Bodies(workload, endpoint), asked)
        progress = Progress(len(workload), clock.now_s, lambda: runner.in_flight)
        runner.on_end = progress.note
        watch.start()
        shown = None if quiet else asyncio.create_task(show(progress))
        with _interruptible(runner):
            try:
                await runner.run()
            finally:
                watch.stop()
                if shown is not None:
                    shown.cancel()
                    await asyncio.wait([shown])
        records = runner.builder.records() if len(runner.builder) else None
        health = judge(records, watch.lags_s(), watch.cpu_cores, asked.missed if asked else 0)
        return LiveRun(endpoint.model, records, health, exchange.errors, runner.unsent, runner.stopped)


async def _warm_up(
    session: aiohttp.ClientSession, endpoint: Endpoint, workload: Workload, count: int, timeout_s: float
) -> None:
    """Raises SetupError at the first that isn't answered."""
    # Other words: the run's own prompts must not be found in a prefix cache.
    other = replace(endpoint.prompts, content_seed=(endpoint.prompts.content_seed + 1) % MAX_SEED)
    warm = replace(endpoint, prompts=other)
    exchange = Exchange(session, warm, time.perf_counter, timeout_s)
    for i in range(count):
        request = workload[i % len(workload)]
        record = RequestRecord(i, 0.0, OK)
        await exchange.ask(warm.body(workload, request), record)
        if record.status != OK:
            raise SetupError(f"the server doesn't answer a warm-up request: {exchange.errors[record.error]}")


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def first_model(session: aiohttp.ClientSession, endpoint: Endpoint) -> str:
    """The first that GET /v1/models names. Raises SetupError, with the mend."""
    url = f"{endpoint.url}/v1/models"
    mend = "start the server, correct --url, or name the model by --model"
    try:
        async with asyncio.timeout(MODELS_TIMEOUT_S), session.get(url, headers=endpoint.headers) as response:
            body = await response.content.read(MAX_ERROR_BODY_BYTES)
            if response.status != 200:
                raise SetupError(f"{url} answers {response.status}: {error_text(body)}; {mend}")
            models = msgspec.json.decode(body, type=_Models).data
    except msgspec.DecodeError:
        raise SetupError(f"{url} answers with something that is no list of models; {mend}") from None
    except TimeoutError:
        raise SetupError(f"{url} doesn't answer within {MODELS_TIMEOUT_S:g} s; {mend}") from None
    except aiohttp.ClientConnectorCertificateError as error:
        mend = "name the file of its CA by --cacert, or call it by a name that the certificate has"
        raise SetupError(f"{url}: {said_of(error)}; {mend}") from None
    except (aiohttp.ClientError, OSError) as error:
        raise SetupError(f"{url} can't be reached: {said_of(error)}; {mend}") from None
    if not models:
        raise SetupError(f"{url} lists no model yet; {mend}")
    return models[0].id


def raise_file_limit() -> None:
    """To what this user may have: every request in flight is a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def _interruptible(runner: Runner) -> Iterator[None]:
    """The first SIGINT stops the runner, so that there is a report; a second one ends the process as ever."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        runner.stop()

    try:
        loop.add_signal_handler(signal.SIGINT, stop)
    except (RuntimeError, ValueError):
        # Not the main thread, which alone hears signals.
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
