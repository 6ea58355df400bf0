"""Calls to nodes, with what can go wrong mapped to three words: the node is not there, it refused, or it failed.

An open call is a lease on the node: `NodeCall.close` closes its connection unless the answer was read to its end, and
the node frees what it held.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import closing, suppress
from typing import TypeVar

import aiohttp
import msgspec
from prfaas.common.errors import PrfaasError, ProtocolError
from prfaas.services.messages import ErrorBody, ErrorDetail, PrefillCall, PrefillResult, RoleAnswer, RoleCall
from prfaas.services.router.node_stream import Batch, NodeStream
from prfaas.services.router.registry import Node
from prfaas.services.web import CONNECT_TIMEOUT_S, Signer, signed_post, why_not_connected
from prfaas.transport.tls import Tls
from yarl import URL

SILENT_S = 10.0
"""Nodes write a ping comment every 2 s: one that is silent for so long is dead, if `router.node_silent_s` says nothing
else."""
LOOK_S = 1.0
"""From one look for silent nodes to the next: a timer for each read would cost a twelfth of a relayed token."""
SLOWEST_UPLOAD_BYTES_S = 1 << 20
"""A body that takes longer on its way counts as silence too."""
END_S = 1.0
"""From a node's last event to the end of its body."""
MAX_ERROR_BYTES = 1 << 20

T = TypeVar("T")

LIMITS = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)

CLIENT_ERRORS = {
    "invalid_request_error": 400,
    "not_found_error": 404,
}
"""Error types of a node that are the client's fault, with their status."""


class NodeCallError(PrfaasError):
    """A call to a node failed. `reason`: a word for metrics and headers; `detail`: what the node said, if it did."""

    reason = "node_failed"

    def __init__(self, node: Node, message: str, detail: ErrorDetail | None = None, status: int = 503) -> None:
        super().__init__(f"{node.role} node {node.name}: {message}")
        self.node = node
        self.detail = detail
        self.status = status

    @property
    def is_clients_fault(self) -> bool:
        """Another node would say the same."""
        return self.detail is not None and self.detail.type in CLIENT_ERRORS


class NodeUnreachableError(NodeCallError):
    """No connection, or it broke, or nothing came for SILENT_S."""

    reason = "unreachable"


class NodeRefusedError(NodeCallError):
    """It answered with an HTTP error before any work."""

    reason = "refused"


class NodeFailedError(NodeCallError):
    """Its stream held an `error` event, or made no sense."""

    reason = "failed"


class NodeCall:
    """An answered call (status 200): its stream, batch by batch. Whoever has it closes it."""

    def __init__(self, node: Node, response: aiohttp.ClientResponse, unclosed: set[NodeCall]) -> None:
        self.node = node
        self._unclosed = unclosed
        unclosed.add(self)
        self._response = response
        self._content = response.content
        self._stream = NodeStream()
        self._failure: Exception | None = None
        self._waits_since_s: float | None = None

    async def read(self) -> Batch | None:
        """What has come since; None at the end. Raises NodeUnreachableError, NodeFailedError, or what `fail` set."""
        self._waits_since_s = time.monotonic()
        try:
            data = await self._content.readany()
            self._waits_since_s = None
            if self._failure is not None:
                raise self._failure
            if not data:
                return None
            batch = self._stream.feed(data)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise NodeUnreachableError(self.node, why_not_connected(error)) from error
        except ProtocolError as error:
            raise NodeFailedError(self.node, str(error)) from error
        for name, event in batch.events:
            if name == "error":
                detail = _error_detail(event)
                raise NodeFailedError(self.node, detail.message, detail)
        return batch

    async def read_to_end(self) -> None:
        """After the last event that counts, so that the connection can be used again; if it breaks now, no matter."""
        if self._content.at_eof():
            return
        with suppress(NodeCallError, TimeoutError):
            async with asyncio.timeout(END_S):
                while await self.read() is not None:
                    pass

    def fail(self, error: Exception) -> None:
        """Make the reader, who may be waiting, raise `error`."""
        self._failure = error
        self._content.set_exception(error)

    def fail_if_silent(self, now_s: float, silent_s: float) -> None:
        """While nobody reads, because the client is slow, the node is not to blame."""
        if self._waits_since_s is not None and now_s - self._waits_since_s > silent_s:
            self.fail(NodeUnreachableError(self.node, f"nothing came from it for {silent_s:g} s"))

    def close(self) -> None:
        """Gives the connection back if the answer was read to its end, else closes it: the cancel."""
        self._unclosed.discard(self)
        self._response.close()


class Nodes:
    """The shell that calls nodes."""

    def __init__(
        self, session: aiohttp.ClientSession, signer: Signer, tls: Tls | None = None, silent_s: float = SILENT_S
    ) -> None:
        self._silent_s = silent_s
        self._session = session
        self._signer = signer
        self._tls = tls
        self._urls: dict[tuple[URL, str], URL] = {}
        self._unclosed: set[NodeCall] = set()
        self._next_look: asyncio.TimerHandle | None = None
        """None while no call is open."""

    async def call(self, node: Node, path: str, body: bytes, request_id: str) -> NodeCall:
        """Raises NodeUnreachableError, NodeRefusedError."""
        response = await self._post(node, path, body, request_id)
        if self._next_look is None:
            self._look_later()
        return NodeCall(node, response, self._unclosed)

    async def _post(self, node: Node, path: str, body: bytes, request_id: str) -> aiohttp.ClientResponse:
        """Answered with 200. Raises NodeUnreachableError, NodeRefusedError."""
        try:
            async with asyncio.timeout(self._silent_s + len(body) / SLOWEST_UPLOAD_BYTES_S):
                response = await signed_post(
                    self._session,
                    self._url(node, path),
                    body,
                    self._signer,
                    request_id=request_id,
                    limits=LIMITS,
                    tls=self._tls.client(name=node.name, roles=(node.role,)) if self._tls is not None else None,
                )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise NodeUnreachableError(node, why_not_connected(error)) from error
        if response.status != 200:
            with closing(response):
                raise await _refusal(node, response)
        return response

    def _look_later(self) -> None:
        self._next_look = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._next_look = None
        now_s = time.monotonic()
        for call in self._unclosed:
            call.fail_if_silent(now_s, self._silent_s)
        if self._unclosed:
            self._look_later()

    async def prefill(self, node: Node, call: PrefillCall) -> PrefillResult:
        """Until prefill is done. Raises NodeCallError. Cancelling it stops the node's work."""
        body = msgspec.json.encode(call)
        result: PrefillResult | None = None
        with closing(await self.call(node, "/prefill", body, call.request_id)) as stream:
            # Read to its end: then the connection is used again, and the next call over the WAN saves a round trip.
            while (batch := await stream.read()) is not None:
                for name, data in batch.events:
                    if name == "done":
                        result = decode_event(node, data, PrefillResult)
        if result is None:
            raise NodeUnreachableError(node, "it ended its stream before it was done")
        return result

    async def change_role(self, node: Node, call: RoleCall) -> RoleAnswer:
        """Raises NodeCallError. Cancelled: the node may have begun to change."""
        body = msgspec.json.encode(call)
        with closing(await self._post(node, "/role", body, "")) as response:
            try:
                async with asyncio.timeout(self._silent_s):
                    data = await response.content.read(MAX_ERROR_BYTES)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                raise NodeUnreachableError(node, why_not_connected(error)) from error
        return decode_event(node, data, RoleAnswer)

    def _url(self, node: Node, path: str) -> URL:
        """Parsed once a node: yarl takes 10 µs to join."""
        url = self._urls.get((node.url, path))
        if url is None:
            if len(self._urls) > 10_000:
                self._urls.clear()
            url = self._urls[node.url, path] = node.url.joinpath(path.lstrip("/"))
        return url


def decode_event(node: Node, data: bytes, kind: type[T]) -> T:
    """Raises NodeFailedError."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise NodeFailedError(node, f"its answer is not understood: {error}") from error


async def _refusal(node: Node, response: aiohttp.ClientResponse) -> NodeRefusedError:
    data = b""
    with suppress(aiohttp.ClientError, OSError, TimeoutError):
        async with asyncio.timeout(SILENT_S):
            data = await response.content.read(MAX_ERROR_BYTES)
    detail = _error_detail(data)
    return NodeRefusedError(node, f"status {response.status}: {detail.message}", detail, response.status)


def _error_detail(data: bytes) -> ErrorDetail:
    try:
        return msgspec.json.decode(data, type=ErrorBody).error
    except msgspec.DecodeError:
        return ErrorDetail("the node gave no reason", "server_error")
