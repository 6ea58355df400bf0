"""What a child process does between fork and exec."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, number: signal.Signals) -> None:
    """For `preexec_fn`: when `parent` dies, however, the kernel sends the child this signal. A parent that has died
    already (interrupted just after the fork) would never be heard of."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)
