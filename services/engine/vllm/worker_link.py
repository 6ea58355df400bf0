"""The worker's end of the control socket: two threads, so that vLLM's model thread never waits for our node."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from pathlib import Path

import msgspec
from prfaas.common import log
from prfaas.common.errors import ConfigError, ProtocolError
from prfaas.common.kv_layout import KvLayout, TokenRange
from prfaas.services.engine.vllm.control import (
    VERSION,
    Abort,
    Arrived,
    Attach,
    Begin,
    Begun,
    Close,
    Closed,
    Frames,
    Ready,
    ToNode,
    frame,
    to_worker_decoder,
)
from prfaas.services.engine.vllm.shared_kv import SharedKv, TransferMemory, map_memory

READ_BYTES = 1 << 16
MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket's path, as Linux has it."""

_log = log.get_logger("vllm-connector")


def socket_path(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank-{rank}.sock"


class WorkerLink:
    """Listens at `path` until `close`. One node at a time: a new one is served when the last one has left."""

    def __init__(self, path: Path, ready: Ready, layout: KvLayout) -> None:
        """Raises ConfigError when nothing can listen there."""
        self._ready = ready
        self._layout = layout
        self._shared: SharedKv | None = None
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = False
        self._path = path
        self._listener = _listen(path)
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, name="prfaas-control", daemon=True)
        self._thread.start()

    def find(self, transfer_id: str) -> TransferMemory | None:
        """Thread-safe."""
        shared = self._shared
        return None if shared is None else shared.find(transfer_id)

    @property
    def layer_wait_s(self) -> float:
        shared = self._shared
        return 0.0 if shared is None else shared.layer_wait_s

    def send(self, message: ToNode) -> None:
        """Thread-safe; returns at once. Without a node it goes nowhere."""
        if self._shared is not None:
            self._outbox.put(frame(message))

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        if (connection := self._connection) is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(5.0)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connection = connection
            with connection:
                try:
                    self._serve_node(connection)
                except (OSError, ValueError, msgspec.DecodeError, ProtocolError) as error:
                    _log.warning("control connection lost", error=str(error))
                finally:
                    self._connection = None
                    if self._shared is not None:
                        self._shared.close_all()
                        self._shared = None

    def _serve_node(self, connection: socket.socket) -> None:
        frames = Frames()
        data, descriptors, _, _ = socket.recv_fds(connection, READ_BYTES, 1)
        try:
            bodies = list(frames.feed(data))
            while data and not bodies:
                data = connection.recv(READ_BYTES)
                bodies = list(frames.feed(data))
            if not bodies or not descriptors:
                raise ProtocolError("the first message must be Attach, with a descriptor")
            self._attach(bodies.pop(0), descriptors[0])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._outbox = queue.SimpleQueue()
        self.send(self._ready)
        writer = threading.Thread(
            target=_write, args=(connection, self._outbox), name="prfaas-control-out", daemon=True
        )
        writer.start()
        try:
            while True:
                for body in bodies:
                    self._take(body)
                data = connection.recv(READ_BYTES)
                if not data:
                    return
                bodies = list(frames.feed(data))
        finally:
            self._outbox.put(None)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            writer.join()

    def _attach(self, body: bytes, descriptor: int) -> None:
        message = to_worker_decoder.decode(body)
        if not isinstance(message, Attach):
            raise ProtocolError(f"the first message must be Attach, not {type(message).__name__}")
        if message.version != VERSION:
            raise ProtocolError(f"the node speaks version {message.version} of the control protocol, this is {VERSION}")
        if message.memory_bytes > os.fstat(descriptor).st_size:
            raise ProtocolError("the shared memory is smaller than the node says")
        memory = map_memory(descriptor, message.memory_bytes)
        self._shared = SharedKv(self._layout, memory, message.layer_wait_s)

    def _take(self, body: bytes) -> None:
        shared, message = self._shared, to_worker_decoder.decode(body)
        assert shared is not None
        if isinstance(message, Begin):
            shared.begin(
                message.transfer_id, message.kind, TokenRange(message.start, message.end), message.offset_bytes
            )
            self.send(Begun(message.transfer_id))
        elif isinstance(message, Close):
            shared.close(message.transfer_id)
            self.send(Closed(message.transfer_id))
        elif isinstance(message, Arrived | Abort):
            transfer = shared.find(message.transfer_id)
            if transfer is None:
                return
            if isinstance(message, Arrived):
                transfer.arrived(message.layers)
            else:
                transfer.fail(message.reason)
        else:
            raise ProtocolError(f"{type(message).__name__} is out of place")


def _write(connection: socket.socket, outbox: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(OSError):
        while (data := outbox.get()) is not None:
            connection.sendall(data)


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ConfigError([f"{path} is too long for a Unix socket ({MAX_SOCKET_PATH} bytes): name a shorter folder"])
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of a process that was killed
        listener.bind(str(path))
        # Whoever can connect can read and change KV: nobody but this user, and nobody before this line.
        path.chmod(0o600)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise ConfigError([f"the control socket {path} can't be made: {error.strerror or error}"]) from error
    return listener
