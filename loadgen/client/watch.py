"""How late the event loop runs, measured while it does: a timer that notes how much after its time it was called."""

from __future__ import annotations

import asyncio
import time
from array import array

import numpy as np
from numpy.typing import NDArray

PERIOD_S = 0.02
MAX_SAMPLES = 65_536
"""When there are more, every second one is dropped and the period doubles."""


class LoopWatch:
    """From `start` to `stop`, on the running loop."""

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lags_s = array("d")
        self._period_s = PERIOD_S
        self._cpu_s = time.process_time()
        self._begun_s = time.perf_counter()
        self._wait()

    def stop(self) -> None:
        self._timer.cancel()
        wall_s = time.perf_counter() - self._begun_s
        self.cpu_cores = (time.process_time() - self._cpu_s) / wall_s if wall_s > 0 else 0.0

    def lags_s(self) -> NDArray[np.float64]:
        return np.array(self._lags_s, np.float64)

    def _tick(self) -> None:
        self._lags_s.append(max(time.perf_counter() - self._next_s, 0.0))
        if len(self._lags_s) > MAX_SAMPLES:
            self._lags_s = self._lags_s[::2]
            self._period_s *= 2
        self._wait()

    def _wait(self) -> None:
        self._next_s = time.perf_counter() + self._period_s
        self._timer = self._loop.call_later(self._period_s, self._tick)
