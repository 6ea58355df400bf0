"""The few calls of UCX that lanes need, over whichever Python binding is installed: ucxx, else ucx-py.

Both are used at their lowest layer, without their asyncio: that one needs a progress thread and a thread that wakes
futures, neither of which ends while a peer hangs. Here one thread of ours (ucx_thread.py) makes every call.

The ucxx side is tested. **The ucx-py side is written from its source (0.45) and has not been run**: ucx-py can't be
installed from PyPI alone, and is in its final release.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any, Protocol

Tag = int

DEFAULTS = {
    # Over TCP the default segments make UCX half as fast.
    "UCX_TCP_TX_SEG_SIZE": "256k",
    "UCX_TCP_RX_SEG_SIZE": "256k",
    # The binding sets variables that a build without CUDA doesn't know, and UCX would complain on standard output.
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}
"""Set where the operator has not. Which networks UCX uses is the operator's: UCX_TLS, UCX_NET_DEVICES,
UCX_TCP_PORT_RANGE."""

INSTALL = (
    "pip install --no-deps libucx-cu12==1.21.0 libucxx-cu12==0.52.0 ucxx-cu12==0.52.0 (for RDMA the system's UCX, 1.19 "
    "or newer, with RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true)"
)


class Request(Protocol):
    def done(self) -> bool: ...

    def check(self) -> None:
        """Of one that is done. Raises OSError."""
        ...


class Endpoint(Protocol):
    """One peer. Its buffers belong to UCX until their request is done."""

    @property
    def alive(self) -> bool: ...

    def send(self, buffer: memoryview, tag: Tag) -> Request: ...

    def receive(self, buffer: memoryview, tag: Tag) -> Request:
        """A message may be shorter than the buffer, which says nothing of how long it was."""
        ...

    def close(self) -> None:
        """At once; requests in flight are cancelled, and are done after some more progress."""
        ...


class Worker(Protocol):
    """Not thread-safe: made and used in one thread."""

    version: tuple[int, int]
    address: bytes
    event_fd: int
    """Readable when there is something to progress, once `arm` has returned True."""

    def progress(self) -> None: ...

    def arm(self) -> bool:
        """False: something happened meanwhile; progress first."""
        ...

    def connect(self, address: bytes) -> Endpoint:
        """Returns at once. Raises OSError. A malformed address ends the process: verify where it comes from."""
        ...


def ucx_problem() -> str | None:
    """Why UCX can't be had here, with the mend, or None. Cheap: nothing is loaded."""
    for name in ("ucxx", "ucp"):
        if importlib.util.find_spec(name) is not None:
            return None
    return f"no Python binding of UCX is installed; {INSTALL}"


def open_worker() -> Worker:
    """Loads UCX. Raises OSError or ImportError, also when a library of it is missing."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("ucxx") is not None:
        return _UcxxWorker()
    return _UcpWorker()


# -- ucxx -------------------------------------------------------------------------------------------------------------


class _UcxxWorker:
    def __init__(self) -> None:
        if importlib.util.find_spec("libucx") is not None:  # from a wheel; else the loader finds the system's
            importlib.import_module("libucx").load_library()
        ucxx = importlib.import_module("ucxx")
        self._api = api = ucxx.libucxx
        self._array = importlib.import_module("ucxx._lib.arr").Array
        self._types = importlib.import_module("ucxx.types")
        self._error: type[Exception] = api.UCXError
        try:
            self._worker = api.UCXWorker(
                api.UCXContext({}), enable_delayed_submission=False, enable_python_future=False
            )
            self._worker.init_blocking_progress_mode()
        except self._error as error:
            raise OSError(f"UCX does not start: {error}") from error
        self.version: tuple[int, int] = ucxx.get_ucx_version()[:2]
        self.address = bytes(memoryview(self._worker.address))
        self.event_fd: int = self._worker.epoll_file_descriptor
        self.progress = self._worker.progress
        self.arm = self._worker.arm

    def connect(self, address: bytes) -> Endpoint:
        try:
            remote = self._api.UCXAddress.create_from_buffer(address)
            endpoint = self._api.UCXEndpoint.create_from_worker_address(self._worker, remote, True)
        except self._error as error:
            raise OSError(f"UCX can't reach the peer: {error}") from error
        return _UcxxEndpoint(endpoint, self._array, self._types.Tag, self._types.TagMaskFull, self._error)


class _UcxxEndpoint:
    def __init__(self, endpoint: Any, array: Any, tag: Any, mask: Any, error: type[Exception]) -> None:
        self._endpoint = endpoint
        self._array = array
        self._tag = tag
        self._mask = mask
        self._error = error

    @property
    def alive(self) -> bool:
        return bool(self._endpoint.alive)

    def send(self, buffer: memoryview, tag: Tag) -> Request:
        return _UcxxRequest(self._endpoint.tag_send(self._array(buffer), self._tag(tag)), self._error)

    def receive(self, buffer: memoryview, tag: Tag) -> Request:
        request = self._endpoint.tag_recv(self._array(buffer), self._tag(tag), self._mask)
        return _UcxxRequest(request, self._error)

    def close(self) -> None:
        # Forced, since it was made with error handling: no word to the peer, so nothing to wait for.
        self._endpoint.close_blocking(10**8, 1)


class _UcxxRequest:
    def __init__(self, request: Any, error: type[Exception]) -> None:
        self._request = request
        self._error = error

    def done(self) -> bool:
        return bool(self._request.completed)

    def check(self) -> None:
        try:
            self._request.check_error()
        except self._error as error:
            raise OSError(f"UCX: {error}") from error


# -- ucx-py -----------------------------------------------------------------------------------------------------------


class _UcpWorker:
    def __init__(self) -> None:
        self._ucp = importlib.import_module("ucp")
        self._api = api = importlib.import_module("ucp._libs.ucx_api")
        self._array = importlib.import_module("ucp._libs.arr").Array
        self._errors = importlib.import_module("ucp.exceptions")
        try:
            features = (api.Feature.TAG, api.Feature.WAKEUP)
            self._worker = api.UCXWorker(api.UCXContext(feature_flags=features))
            self.event_fd: int = self._worker.init_blocking_progress_mode()
        except self._errors.UCXError as error:
            raise OSError(f"UCX does not start: {error}") from error
        self.version: tuple[int, int] = api.get_ucx_version()[:2]
        self.address = bytes(memoryview(self._worker.get_address()))
        self.progress = self._worker.progress
        self.arm = self._worker.arm

    def connect(self, address: bytes) -> Endpoint:
        try:
            remote = self._api.UCXAddress.from_buffer(address)
            endpoint = self._api.UCXEndpoint.create_from_worker_address(self._worker, remote, True)
        except self._errors.UCXError as error:
            raise OSError(f"UCX can't reach the peer: {error}") from error
        return _UcpEndpoint(self._worker, endpoint, self._api, self._array, self._errors)


class _UcpEndpoint:
    def __init__(self, worker: Any, endpoint: Any, api: Any, array: Any, errors: Any) -> None:
        self._worker = worker
        self._endpoint = endpoint
        self._api = api
        self._array = array
        self._errors = errors

    @property
    def alive(self) -> bool:
        return bool(self._endpoint.is_alive())

    def send(self, buffer: memoryview, tag: Tag) -> Request:
        request = _UcpRequest(self._errors)
        args = (self._endpoint, self._array(buffer), len(buffer), tag, request.called_back)
        if self._api.tag_send_nb(*args) is None:
            request.called_back(None, None)
        return request

    def receive(self, buffer: memoryview, tag: Tag) -> Request:
        request = _UcpRequest(self._errors)
        args = (self._worker, self._array(buffer), len(buffer), tag, request.called_back)
        if self._api.tag_recv_nb(*args, ep=self._endpoint) is None:
            request.called_back(None, None)
        return request

    def close(self) -> None:
        self._endpoint.close()


class _UcpRequest:
    def __init__(self, errors: Any) -> None:
        self._errors = errors
        self._done = False
        self._problem: Exception | None = None

    def called_back(self, _request: object, exception: Exception | None) -> None:
        self._done = True
        # ucx-py calls a message that is shorter than its buffer truncated; ours hold their length.
        if not isinstance(exception, self._errors.UCXMsgTruncated):
            self._problem = exception

    def done(self) -> bool:
        return self._done

    def check(self) -> None:
        if self._problem is not None:
            raise OSError(f"UCX: {self._problem}")
