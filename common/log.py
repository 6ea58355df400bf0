"""structlog, set up once per process: JSON lines or text, with the request id bound to everything a request does.

A line that can't be written (the disk is full, whoever read the pipe is gone) costs the line and nothing else: lost
ones are counted, and told of as soon as one can be written again.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from functools import lru_cache
from typing import Any, TextIO

import msgspec
import structlog

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# Values under these keys never reach a log line, whatever code passes them.
SECRET_WORDS = ("secret", "api_key", "authorization", "ticket", "mac")


class LogLines:
    """A file for structlog and for the standard library, on the descriptor of `stream`; never raises. Not buffered:
    what could not be written would be tried again before every later line, and torn."""

    def __init__(self, stream: TextIO | None, format: str) -> None:
        """None: the process was started without it, as Python says; its number may be a socket's by now."""
        self.lost = 0
        """Lines, in all."""
        self._descriptor = stream.fileno() if stream is not None else os.open(os.devnull, os.O_WRONLY)
        self._format = format
        self._lost_now = 0
        self._reason = ""
        self._torn = False

    def write(self, text: str) -> int:
        told = self._lost_now
        try:
            if told:
                self._put(self._notice())
                self._lost_now -= told
            self._put(text)
        except (OSError, ValueError) as error:
            self.lost += 1
            self._lost_now += 1
            self._reason = getattr(error, "strerror", None) or str(error)
        return len(text)

    def flush(self) -> None:
        pass

    def _put(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        if self._torn:
            data = b"\n" + data
        while data:
            written = os.write(self._descriptor, data)
            data = data[written:]
            self._torn = bool(data)

    def _notice(self) -> str:
        event = {"event": "log lines were lost", "level": "error", "part": "log", "lines": self._lost_now}
        event["reason"] = self._reason
        if self._format == "json":
            return _json(event, default=str) + "\n"
        return f"[error    ] {event['event']}            part=log lines={self._lost_now} reason={self._reason!r}\n"


_lines: LogLines | None = None
"""Logging is the process's, in structlog as in the standard library."""


def lost_lines() -> int:
    """Since the start; for the metrics."""
    return _lines.lost if _lines is not None else 0


def configure(level: str = "info", format: str = "json") -> None:
    """Send structlog and the standard library's warnings to stderr. Called from `__main__` only."""
    global _lines
    _lines = LogLines(sys.stderr, format)
    renderer: Any = (
        structlog.processors.JSONRenderer(serializer=_json)
        if format == "json"
        else structlog.dev.ConsoleRenderer(colors=False)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            hide_secrets,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        # Unlike PrintLogger it hands over the line and its end in one write.
        logger_factory=structlog.WriteLoggerFactory(file=_lines),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
    # Libraries (aiohttp, asyncio) speak through the standard library: warnings and worse, in one plain line.
    logging.basicConfig(level=logging.WARNING, stream=_lines, format="%(levelname)s %(name)s %(message)s")


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
