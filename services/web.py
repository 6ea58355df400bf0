"""What the HTTP apps of all services share: listening, errors, request ids, probes, signed calls, bounded bodies.

A service makes its app with `make_app`, adds its routes, and runs it inside `listening`:

    app = make_app(metrics, not_ready=registry.why_not_ready, max_body_bytes=...)
    app.router.add_post("/decode", ...)
    async with listening(app, bind, secret=secret) as (host, port):
        await stop_signal()

Handlers are cancelled when their client goes away: an open call is a lease (ARCHITECTURE.md, "What always holds").
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import resource
import secrets
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import msgspec
import uvloop
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prfaas.common import auth, log
from prfaas.common.config import ClusterConfig, is_loopback, parse_address
from prfaas.common.errors import (
    ConfigError,
    OutOfMemoryError,
    PayloadTooLargeError,
    PrfaasError,
    QuotaError,
    RequestError,
    TooLateError,
    TransferError,
    UnavailableError,
    UnsupportedError,
)
from prfaas.common.metrics import CONTENT_TYPE, Metrics
from prfaas.services.messages import ErrorBody, ErrorDetail, to_json
from prfaas.transport.lanes.tls_listener import TlsListener
from prfaas.transport.tls import Tls, tls_problem
from yarl import URL

REQUEST_ID = web.RequestKey("request_id", str)
REQUEST_ID_HEADER = "x-request-id"

LARGE_BODY_BYTES = 64 * 1024
"""Bodies from here on are hashed, parsed and encoded in a thread: 64 KiB of JSON take about 0.3 ms."""

BODY_TIMEOUT_S = 60.0
"""A client may take so long to send its body; while it does, what has come is kept."""
SLICE_BYTES = 256 * 1024
"""Larger bodies are sent in pieces of this size, so that other streams get their turn between them."""

DEAD_PEER_S = 10.0
"""TCP_USER_TIMEOUT of every connection: unacknowledged data for so long means that the peer is gone."""
CONNECT_TIMEOUT_S = 3.0
"""A lost SYN is sent again after one second; whoever takes longer than two of them is as good as gone."""
CLIENT_LEFT = 499
"""The status of a request whose client left, as nginx counts it."""
SHUTDOWN_S = 2.0
"""How long connections may finish after the app has been told to stop; a service that drains does so before."""

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

logger = log.get_logger("web")

T = TypeVar("T")


# -- listening --------------------------------------------------------------------------------------------------------


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a service's main coroutine under uvloop until it returns."""
    # A stream takes a router three sockets, and many systems begin at 1,024.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    result: T = uvloop.run(main)
    return result


async def stop_signal() -> signal.Signals:
    """Wait for SIGTERM or SIGINT. A second one has the default effect: it kills."""
    loop = asyncio.get_running_loop()
    received: asyncio.Future[signal.Signals] = loop.create_future()

    def stop(number: signal.Signals) -> None:
        for handled in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(handled)
        if not received.done():
            received.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    return await received


@contextlib.asynccontextmanager
async def listening(
    app: web.Application,
    bind: str,
    *,
    secret: bytes,
    key: str = "bind",
    shutdown_s: float = SHUTDOWN_S,
    tls: Tls | None = None,
    client_certificates: bool = True,
    shared: bool = False,
    also: str = "",
) -> AsyncIterator[tuple[str, int]]:
    """Serve `app` at `bind` while the block runs; yields the host and the port that was bound.

    `secret`: the cluster secret; without one only loopback may be bound. `key`: the setting's name, for messages.
    `tls`: with it, https only; without `client_certificates` a client may come without one, and
    `services.tls.check_caller` keeps it from what is for the cluster's own processes. `shared`: other processes may
    bind the same address, and the kernel spreads connections over them. `also`: a second address.
    Raises ConfigError when the address can't be bound. On leaving, running handlers get `shutdown_s` and then are
    cancelled.
    """
    host, _ = parse_address(bind)
    if not secret and not is_loopback(host):
        raise ConfigError(
            [f"{key} = {bind!r} is open to other machines: set a cluster secret first (cluster.secret_file)"]
        )
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=shutdown_s)
    await runner.setup()
    server, loop, logger = runner.server, asyncio.get_running_loop(), _http_logger()
    assert server is not None

    def connection() -> Connection:
        return Connection(server, loop=loop, logger=logger, **CONNECTION)

    async def accept(listener: socket.socket) -> asyncio.Server | TlsListener:
        if tls is None:
            return await loop.create_server(connection, sock=listener, backlog=BACKLOG)
        return TlsListener(
            listener, lambda: tls.server(client_required=client_certificates), connection, backlog=BACKLOG
        )

    try:
        with contextlib.ExitStack() as accepting:
            listener = _listener(bind, key, shared=shared)
            port = listener.getsockname()[1]
            accepting.callback((await accept(listener)).close)
            if also:
                accepting.callback((await accept(_listener(also, key))).close)
            yield host, port
    finally:
        await runner.cleanup()


BACKLOG = 1024
"""Connections that the kernel keeps until they are accepted: a burst of clients is no refusal."""
CONNECTION: Mapping[str, Any] = {
    "access_log": None,
    # A message holds the prompt's ids or text: read it in large pieces.
    "read_bufsize": 256 * 1024,
    # `read_body` refuses what is compressed.
    "auto_decompress": False,
}


class Connection(web.RequestHandler):
    """One client's connection. What aiohttp answers by itself, in plain text and past the app's middleware, is an
    OpenAI error body here too: malformed HTTP, and what routing raises before the handler (417)."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, UnicodeEncodeError):
            # aiohttp wanted to repeat an Expect header that is no UTF-8.
            status, message = 400, "a header is no UTF-8"
            exc = HttpProcessingError(code=status, message=message)
        # Logs, and raises when a response has begun.
        super().handle_error(request, status, exc, message)
        if status == 400:
            # The rest of aiohttp's message shows the malformed bytes as Python would.
            what = (message or "bad request").partition("\n")[0].partition(":")[0]
            detail = ErrorDetail(f"malformed HTTP: {what}", "invalid_request_error", None, "malformed_http")
        else:
            detail = ErrorDetail("internal error", "server_error", None, "internal_error")
        response = _past_the_app(request, status, ErrorBody(detail))
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if isinstance(resp, web.HTTPException) and isinstance(request, web.Request) and resp.status >= 400:
            resp = _past_the_app(request, *_http_error(resp, request))
        return await super().finish_response(request, resp, start_time)


def _past_the_app(
    request: web.BaseRequest, status: int, body: ErrorBody, headers: Mapping[str, str] | None = None
) -> web.Response:
    """With the request id, which `guard` gives to the others."""
    return error_response(status, body, {**(headers or {}), REQUEST_ID_HEADER: request_id_of(request.headers)})


def _http_logger() -> logging.Logger:
    """aiohttp's, but what is no HTTP gets a line instead of a traceback: strangers could fill the log with them."""
    logger = logging.getLogger("prfaas.http")
    logger.addFilter(_one_line)
    return logger


def _one_line(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        record.msg, record.exc_info = f"malformed HTTP ({type(error).__name__}); {record.msg}", None
    return True


def _listener(bind: str, key: str, *, shared: bool = False) -> socket.socket:
    host, port = parse_address(bind)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError([f"{key} = {bind!r} is no address of this machine: {error.strerror}"]) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Accepted connections inherit it.
        _find_dead_peers(listener)
        listener.setblocking(False)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError([f"{key} = {bind!r} can't be bound: {error.strerror}"]) from error
    return listener


def _find_dead_peers(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(DEAD_PEER_S * 1000))


def read_secret(cluster: ClusterConfig) -> bytes:
    """The cluster secret from the settings or its file; b"" = none. Raises ConfigError."""
    if cluster.secret and cluster.secret_file:
        raise ConfigError(["cluster.secret and cluster.secret_file are both set; keep one"])
    if not cluster.secret_file:
        return cluster.secret.encode()
    try:
        secret = Path(cluster.secret_file).read_bytes().strip()
    except OSError as error:
        raise ConfigError([f"cluster.secret_file = {cluster.secret_file!r}: {error.strerror}"]) from error
    if not secret:
        raise ConfigError([f"cluster.secret_file = {cluster.secret_file!r} is empty"])
    return secret


# -- the app ----------------------------------------------------------------------------------------------------------


def make_app(
    metrics: Metrics, *, not_ready: Callable[[], str | None], max_body_bytes: int = 16 << 20
) -> web.Application:
    """An app with the error middleware and /metrics, /healthz, /readyz. `not_ready` says why it isn't; None = it is."""

    async def show_metrics(_request: web.Request) -> web.Response:
        return web.Response(body=metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def healthz(_request: web.Request) -> web.Response:
        return json_response({"status": "ok"})

    async def readyz(_request: web.Request) -> web.Response:
        reason = not_ready()
        if reason is None:
            return json_response({"status": "ready"})
        return json_response({"status": "not ready", "reason": reason}, status=503, headers={"retry-after": "1"})

    app = web.Application(middlewares=[guard], client_max_size=max_body_bytes)
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    return app


@web.middleware
async def guard(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    """The request id in and out, and every error as OpenAI's body. What a handler raises after its response has
    begun can't be answered any more: it is logged and the connection closed."""
    request_id = request_id_of(request.headers)
    request[REQUEST_ID] = request_id
    log.bind_request(request_id)
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        response = error_response(*_http_error(error, request))
    except Exception as error:
        if client_left(request, error):
            return web.Response(status=CLIENT_LEFT)  # which reaches nobody
        response = error_response(*describe_error(error, request_id))
        if request.writer.output_size:
            # A second response inside the first one would be taken for its text.
            _cut(request)
    if not response.prepared:
        response.headers[REQUEST_ID_HEADER] = request_id
    return response


def _cut(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def client_left(request: web.Request, error: Exception) -> bool:
    """`error` came from writing to a client that is gone, of which the handler will be told by its cancellation."""
    return isinstance(error, ConnectionError) and (request.transport is None or request.transport.is_closing())


def _http_error(error: web.HTTPException, request: web.Request) -> tuple[int, ErrorBody, dict[str, str]]:
    """aiohttp's own: no such route, wrong method, body too large."""
    headers = {"allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    messages = {
        404: f"no such route: {request.method} {request.path}",
        405: f"{request.path} does not take {request.method}; it takes {error.headers.get('Allow', 'nothing')}",
        413: f"the body is larger than {request.client_max_size} bytes",
        417: f"Expect: {request.headers.get('expect', '')[:50]} is not supported; 100-continue is",
    }
    kind = "not_found_error" if error.status == 404 else "invalid_request_error"
    message = messages.get(error.status, error.reason or "bad request")
    return error.status, ErrorBody(ErrorDetail(message, kind)), headers


def describe_error(error: Exception, request_id: str) -> tuple[int, ErrorBody, dict[str, str]]:
    """HTTP status, OpenAI's error body and extra headers for an exception. What we don't know is logged in full and
    told to the client only as a request id."""
    status, headers = status_of(error), {}
    detail = ErrorDetail(str(error), "service_unavailable_error", None, "unavailable")
    if isinstance(error, RequestError):
        detail = ErrorDetail(str(error), error.kind, error.param, error.code)
    elif isinstance(error, UnavailableError):
        if isinstance(error, TooLateError | QuotaError):
            detail = ErrorDetail(str(error), "rate_limit_error", None, error.code)
        headers = {"retry-after": str(error.retry_after_s)}
    elif isinstance(error, OutOfMemoryError):
        detail = ErrorDetail(str(error), RequestError.kind, None, "context_length_exceeded")
    elif isinstance(error, TransferError):
        detail = ErrorDetail(str(error), "service_unavailable_error", None, error.reason)
    elif isinstance(error, TimeoutError):
        detail = ErrorDetail("the request took too long", "timeout_error", None, "timeout")
    else:
        logger.error("request_failed", exc_info=error)
        message = f"{error} (request {request_id})" if isinstance(error, PrfaasError) else ""
        message = message or f"internal error; the log names request {request_id}"
        detail = ErrorDetail(message, "server_error", None, "internal_error")
    return status, ErrorBody(detail), headers


def status_of(error: Exception) -> int:
    """The HTTP status that `describe_error` gives, without its log line."""
    if isinstance(error, web.HTTPException | RequestError):
        return error.status
    if isinstance(error, OutOfMemoryError):
        return 400
    if isinstance(error, TimeoutError):
        return 504
    if isinstance(error, TooLateError | QuotaError):
        return 429
    return 503 if isinstance(error, UnavailableError | TransferError) else 500


def error_response(status: int, body: ErrorBody, headers: Mapping[str, str] | None = None) -> web.Response:
    return json_response(body, status=status, headers=headers)


def json_response(message: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """`message`: anything that msgspec encodes."""
    return web.Response(
        body=to_json(message), status=status, headers={"content-type": "application/json", **(headers or {})}
    )


def request_id_of(headers: Mapping[str, str]) -> str:
    """The client's own x-request-id if it is short and plain, else a new one."""
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _SANE_REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


# -- bodies -----------------------------------------------------------------------------------------------------------


async def read_body(request: web.Request) -> bytes:
    """The whole body, at most the app's max_body_bytes, else PayloadTooLargeError, before more of it is kept."""
    limit = request.client_max_size
    too_large = PayloadTooLargeError(f"the body is larger than {limit} bytes", code="body_too_large")
    if request.content_length is not None and request.content_length > limit:
        raise too_large
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        # A few bytes could unfold into the limit, over and over.
        raise UnsupportedError(
            f"content-encoding {encoding[:50]!r} is not supported; send the body as it is", code="unsupported_encoding"
        )
    try:
        if request.content.is_eof():  # as a short body is that came with its headers: there is nothing to wait for
            return await request.read()
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except web.RequestPayloadError:
        raise RequestError("the body broke off, or its chunks are malformed", code="invalid_body") from None
    except TimeoutError:
        raise RequestError(f"the body did not come within {BODY_TIMEOUT_S:g} s", code="body_timeout") from None


async def in_thread_if(large: bool, executor: Executor | None, function: Callable[..., T], *args: Any) -> T:
    """Call now when it is cheap, else in a thread, so that no stream waits for it."""
    if not large:
        return function(*args)
    return await asyncio.get_running_loop().run_in_executor(executor, function, *args)


async def parse_json(body: bytes, kind: type[T], executor: Executor | None = None) -> T:
    """`body` as `kind` (a msgspec type, or `Any`-like `object`). Raises RequestError that says what is wrong where."""
    try:
        return await in_thread_if(len(body) > LARGE_BODY_BYTES, executor, _decode_json, body, kind)
    except msgspec.ValidationError as error:
        raise RequestError(f"the body is not valid: {error}") from None
    except msgspec.DecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except UnicodeDecodeError:
        raise RequestError(f"the body is not valid UTF-8 {_where_not_utf8(body)}", code="invalid_json") from None
    except RecursionError:
        raise RequestError("the body is not valid: it is nested too deeply", code="invalid_json") from None


def _where_not_utf8(body: bytes) -> str:
    """msgspec counts from the string's beginning."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return f"at byte {error.start}"
    return "in an escaped character"


def _decode_json(body: bytes, kind: type[T]) -> T:
    return msgspec.json.decode(body, type=kind)


# -- signed calls between services ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Signer:
    """Signs and verifies calls with the cluster secret. An empty secret (loopback only) does neither."""

    secret: bytes
    skew_s: float
    nonces: auth.NonceWindow

    @staticmethod
    def of(secret: bytes, cluster: ClusterConfig) -> Signer:
        return Signer(secret, cluster.clock_skew_s, auth.NonceWindow(2 * cluster.clock_skew_s))

    async def headers(self, method: str, path: str, body: bytes) -> dict[str, str]:
        if not self.secret:
            return {}
        return await in_thread_if(
            len(body) > LARGE_BODY_BYTES,
            None,
            auth.sign_http,
            self.secret,
            method,
            path,
            body,
            time.time(),
            secrets.token_hex(12),
        )

    def verify(self, request: web.Request, body: bytes) -> None:
        """Raises AuthenticationError."""
        if not self.secret:
            return
        # On the loop: the nonce window is not made for threads, and SHA-256 takes 0.7 ms for a 128K-token prompt.
        auth.verify_http(
            self.secret,
            request.method,
            request.path,
            body,
            request.headers,
            time.time(),
            time.monotonic(),
            self.skew_s,
            self.nonces,
        )


async def read_signed(request: web.Request, signer: Signer) -> bytes:
    """The body of a call from another service, verified. Raises AuthenticationError, PayloadTooLargeError."""
    body = await read_body(request)
    signer.verify(request, body)
    return body


def why_not_connected(error: Exception) -> str:
    """Words for an error of `signed_post`."""
    if (problem := tls_problem(error)) is not None:
        return problem
    return str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)


def client_session() -> aiohttp.ClientSession:
    """For calls between services: many, long, without cookies, redirects or compression."""

    def make_socket(info: Any) -> socket.socket:
        family, kind, protocol, _, _ = info
        sock = socket.socket(family, kind, protocol)
        _find_dead_peers(sock)
        return sock

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30, socket_factory=make_socket),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("user-agent", "accept", "accept-encoding"),
        raise_for_status=False,
        read_bufsize=256 * 1024,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
    )


async def signed_post(
    session: aiohttp.ClientSession,
    url: URL,
    body: bytes,
    signer: Signer,
    *,
    request_id: str | None = None,
    limits: aiohttp.ClientTimeout | None = None,
    tls: ssl.SSLContext | None = None,
) -> aiohttp.ClientResponse:
    """POST JSON, signed; to https with `tls` (Tls.client: who must answer). The caller closes the response (closing it
    early closes the connection: the cancel).

    Raises aiohttp.ClientError, TimeoutError.
    """
    headers = await signer.headers("POST", url.path, body)
    headers["content-type"] = "application/json"
    if request_id is not None:
        headers[REQUEST_ID_HEADER] = request_id
    data: bytes | AsyncIterator[bytes] = body
    if len(body) > SLICE_BYTES:
        headers["content-length"] = str(len(body))
        data = _slices(body)
    return await session.post(
        url,
        data=data,
        headers=headers,
        allow_redirects=False,
        timeout=limits or session.timeout,
        ssl=tls if tls is not None else True,
    )


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), SLICE_BYTES):
        yield body[start : start + SLICE_BYTES]
