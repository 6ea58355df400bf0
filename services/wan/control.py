"""The socket over which a running line is asked and changed: one Change a connection, one State or Refused back."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
from prfaas.common.errors import SetupError
from prfaas.services.wan.settings import Change, Refused, State

MAX_MESSAGE_BYTES = 4096
TIMEOUT_S = 5.0
CLIENT_TIMEOUT_S = 0.1
"""The line stands still while it waits for one."""


def listen(path: Path) -> socket.socket:
    """A listener at `path`, in the place of one that a dead process left. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        # Who can reach the folder may change the line: the process gives up being root, and who asks need not be it.
        path.chmod(0o666)
        listener.listen(16)
    except OSError:
        listener.close()
        raise
    return listener


def answer(listener: socket.socket, apply: Callable[[Change], State]) -> None:
    """Serve the next client of `listener`; whatever it sends or leaves out, it can't do more than be refused."""
    with contextlib.suppress(OSError), listener.accept()[0] as client:
        client.settimeout(CLIENT_TIMEOUT_S)
        asked = client.recv(MAX_MESSAGE_BYTES)
        try:
            told: State | Refused = apply(msgspec.json.decode(asked, type=Change))
        except msgspec.DecodeError as error:
            told = Refused(error=str(error))
        client.send(msgspec.json.encode(told))


def ask(path: Path, change: Change) -> State:
    """Raises SetupError: nothing answers there, or the change was refused."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.settimeout(TIMEOUT_S)
            client.connect(str(path))
            client.send(msgspec.json.encode(change))
            told = client.recv(MAX_MESSAGE_BYTES)
        answered = msgspec.json.decode(told)
        if "error" in answered:
            raise SetupError(f"the line stays as it is: {answered['error']}")
        return msgspec.convert(answered, State)
    except (OSError, msgspec.MsgspecError) as error:
        raise SetupError(
            f"no line answers at {path} ({error}); the mend: run this where it runs, as in "
            "`docker compose exec wan prfaas wan show`, or name its --control"
        ) from error
