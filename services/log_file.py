"""A service's log goes to standard error: a disk that may be full, or a pipe whose reader may be gone or stopped.

None of that is a reason to fail a request or to stop the event loop. A line that can't be written is dropped and
counted (`prfaas_log_lines_dropped_total`), nothing is kept, and the first line that can be written again is preceded
by one that says how many are missing and why.
"""

from __future__ import annotations

import io
import os
import select
import threading
from collections.abc import Callable

STDERR = 2
"""Its descriptor."""
PIECE_BYTES = select.PIPE_BUF
"""A pipe that poll calls writable takes so much at once."""
PATIENCE_MS = 20
"""How long a line waits for a reader that is a little late. Once: while lines are being dropped they don't wait."""
NOT_READ = "nobody read it in time"


class LogFile(io.TextIOBase):
    """A text stream onto a descriptor (which stays the caller's) that never raises and never blocks for long.

    A file on a disk that hangs still blocks: the kernel knows no other way. Safe to use from threads. `say_dropped`
    makes the line, with its end, that tells of dropped ones from their number and the reason.
    """

    def __init__(self, descriptor: int, say_dropped: Callable[[int, str], str]) -> None:
        self.lines_dropped = 0
        """Since the start; each `write` is a line."""
        self._descriptor = descriptor
        self._say_dropped = say_dropped
        self._untold = 0
        self._reason = ""
        self._torn = False
        # The garbage collector may log, too, in the midst of a line.
        self._lock = threading.RLock()
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def writable(self) -> bool:
        return True

    def write(self, line: str, /) -> int:
        """One line with its end, or several that belong together. Returns its length, written or not."""
        with self._lock:
            try:
                if self._untold:
                    self._write(self._say_dropped(self._untold, self._reason))
                    self._untold = 0
                self._write(line)
            except OSError as error:
                self._reason = error.strerror or str(error)
                self._untold += 1
                self.lines_dropped += 1
        return len(line)

    def _write(self, line: str) -> None:
        """Raises OSError."""
        data = line.encode(errors="backslashreplace")
        if self._torn:
            data = b"\n" + data  # ends what a full disk left of a line
        rest = memoryview(data)
        while rest:
            if not self._poll.poll(0 if self._untold else PATIENCE_MS):
                raise TimeoutError(NOT_READ)
            written = os.write(self._descriptor, rest[:PIECE_BYTES])
            rest = rest[written:]
            self._torn = bool(rest)
