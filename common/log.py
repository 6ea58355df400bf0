"""structlog, set up once per process: JSON lines or text, with the request id bound to everything a request does."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol, TextIO, cast

import msgspec
import structlog

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# Values under these keys never reach a log line, whatever code passes them.
SECRET_WORDS = ("secret", "api_key", "authorization", "ticket", "mac")


class LineFile(Protocol):
    """A text stream that counts what it could not take."""

    lines_dropped: int

    def write(self, line: str, /) -> int: ...

    def flush(self) -> None: ...


_file: LineFile | None = None


def configure(
    level: str = "info", format: str = "json", open_file: Callable[[Callable[[int, str], str]], LineFile] | None = None
) -> None:
    """Send structlog and the standard library's warnings to stderr. Called from `__main__` only.

    `open_file`: makes the stream to write to instead, from a function that makes the line that tells of dropped ones
    (how many, why). Services give one that neither raises nor blocks (`services/log_file.py`).
    """
    global _file
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    renderer: Any = (
        structlog.processors.JSONRenderer(serializer=_json)
        if format == "json"
        else structlog.dev.ConsoleRenderer(colors=False)
    )

    def say_dropped(lines: int, reason: str) -> str:
        event = {"event": "log lines were lost", "level": "error", "part": "log", "lines": lines, "reason": reason}
        return f"{renderer(None, 'error', stamp(None, 'error', event))}\n"

    _file = open_file(say_dropped) if open_file is not None else None
    stream = cast(TextIO, _file) if _file is not None else sys.stderr
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            stamp,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            hide_secrets,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        # Unlike PrintLogger it hands over the line and its end in one write.
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=True,
    )
    # Libraries (aiohttp, asyncio) speak through the standard library: warnings and worse, in one plain line.
    logging.basicConfig(level=logging.WARNING, stream=stream, format="%(levelname)s %(name)s %(message)s")


def lines_dropped() -> int:
    """Lines that this process's log could not take since its start; 0 where nobody counts."""
    return _file.lines_dropped if _file is not None else 0


def hide_secrets(_logger: Any, _method: str, event: Any) -> Any:
    """A structlog processor: replaces the values of keys that name a secret."""
    for key in event:
        if _names_a_secret(key):
            event[key] = "<hidden>"
    return event


@lru_cache(maxsize=1024)  # keys are words in the source: few
def _names_a_secret(key: str) -> bool:
    return any(word == key or key.endswith(f"_{word}") for word in SECRET_WORDS)


def _json(event: Any, **options: Any) -> str:
    """A third of json.dumps' time, for a line a request; what msgspec won't write (lone surrogates) json.dumps does."""
    try:
        return msgspec.json.encode(event, enc_hook=options["default"]).decode()
    except (TypeError, ValueError):
        return json.dumps(event, **options)


def get_logger(name: str) -> Any:
    """A structlog logger; `name` is the part that speaks (router, decode, transport, ...)."""
    return structlog.get_logger(part=name)


def bind_request(request_id: str) -> None:
    """Put the request id on every later line of this task."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=request_id)
