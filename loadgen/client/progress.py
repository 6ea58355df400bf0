"""The live line of a run, on stderr, so that stdout stays what was asked for."""

from __future__ import annotations

import asyncio
import statistics
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from prfaas.loadgen.records import OK, RequestRecord
from rich.console import Console
from rich.live import Live
from rich.text import Text

PERIOD_S = 0.5
QUIET_PERIOD_S = 10.0
"""Where nobody sees a line change: a log."""
RECENT = 200


class Progress:
    """`note` each request's end; `line` says how it stands."""

    def __init__(self, total: int, now_s: Callable[[], float], in_flight: Callable[[], int]) -> None:
        self._total = total
        self._now_s = now_s
        self._in_flight = in_flight
        self._ended = self._not_ok = self._tokens = 0
        self._ttft_s: deque[float] = deque(maxlen=RECENT)
        self._late_s: deque[float] = deque(maxlen=RECENT)
        self._last_tokens, self._last_s = 0, 0.0

    def note(self, record: RequestRecord) -> None:
        self._ended += 1
        self._not_ok += record.status != OK
        self._tokens += record.output_tokens
        if record.first_token_s is not None:
            self._ttft_s.append(record.first_token_s - record.scheduled_s)
        if record.client_late_s is not None:
            self._late_s.append(record.client_late_s)

    def line(self) -> str:
        """The rate is that since the last call."""
        now_s = self._now_s()
        passed_s = max(now_s - self._last_s, 1e-9)
        rate = (self._tokens - self._last_tokens) / passed_s
        self._last_tokens, self._last_s = self._tokens, now_s
        said = [
            f"{now_s:6.1f} s",
            f"{self._ended:,}/{self._total:,} ended",
            f"{self._in_flight():,} in flight",
            f"{rate:,.0f} tokens/s",
        ]
        if self._not_ok:
            said.insert(2, f"{self._not_ok:,} not ok")
        if self._ttft_s:
            said.append(f"TTFT p50 {statistics.median(self._ttft_s) * 1e3:,.0f} ms")
        if self._late_s and (late_s := max(self._late_s)) > 0.01:
            said.append(f"client up to {late_s * 1e3:,.0f} ms late")
        return " · ".join(said)


async def show(progress: Progress, console: Console | None = None) -> None:
    """Until it is cancelled. In a terminal one line that changes, else a line now and then."""
    out = console or Console(stderr=True, highlight=False)
    with suppress(asyncio.CancelledError):
        if not out.is_terminal:
            while True:
                await asyncio.sleep(QUIET_PERIOD_S)
                out.print(Text(progress.line()), soft_wrap=True)
        # Drawn here and not by a thread of rich's, which would compete with the requests.
        with Live(Text(progress.line()), console=out, auto_refresh=False, transient=True) as live:
            while True:
                await asyncio.sleep(PERIOD_S)
                live.update(Text(progress.line(), no_wrap=True, overflow="ellipsis"), refresh=True)
