"""One request over HTTP, from the first byte sent to the last one read, and everything that can go wrong with it."""

from __future__ import annotations

import asyncio
import errno
import io
from collections.abc import Callable, Mapping
from itertools import pairwise

import aiohttp
from prfaas.loadgen.client.endpoint import Endpoint
from prfaas.loadgen.client.stream import Answer, BadStreamError, SseParser, error_text
from prfaas.loadgen.records import FAILED, MAX_ITLS_A_REQUEST, REFUSED, UNKNOWN, RequestRecord

MAX_ERROR_BODY_BYTES = 64 * 1024
LARGE_BODY_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 30.0
KEEPALIVE_S = 4.0
"""An idle connection is used again so long; servers of this kind close theirs after 5 s or later, and a request that
meets the close would fail by the client's fault."""
REQUEST_ID, REASON = "x-request-id", "x-prfaas-reason"
DECISION = "x-prfaas-decision"
PREFILL_NODE, DECODE_NODE = "x-prfaas-prefill", "x-prfaas-decode"
PREFILL_REGION, DECODE_REGION = "x-prfaas-prefill-region", "x-prfaas-decode-region"
HEADERS = {
    "content-type": "application/json",
    "accept": "text/event-stream",
    # What is compressed on the way comes in lumps.
    "accept-encoding": "identity",
}
MAX_HEADER_CHARS = 200
CONNECT_WORDS: Mapping[int, str] = {
    errno.ECONNREFUSED: "connection_refused",
    errno.EMFILE: "no_file_descriptors",
    errno.ENFILE: "no_file_descriptors",
    errno.EADDRNOTAVAIL: "no_local_ports",
}


def open_session(ca_file: str | None = None) -> aiohttp.ClientSession:
    """Without a limit of its own on connections: what waits here would look like a slow server.

    Raises OSError when `ca_file` can't be read.
    """
    import ssl

    context: ssl.SSLContext | bool = True
    if ca_file is not None:
        context = ssl.create_default_context(cafile=ca_file)
    connector = aiohttp.TCPConnector(
        limit=0, limit_per_host=0, ttl_dns_cache=600, keepalive_timeout=KEEPALIVE_S, ssl=context
    )
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar())


class Exchange:
    """Asks an endpoint. `now_s`: seconds since the beginning of the workload."""

    def __init__(
        self, session: aiohttp.ClientSession, endpoint: Endpoint, now_s: Callable[[], float], timeout_s: float
    ) -> None:
        self._session = session
        self._endpoint = endpoint
        self._now_s = now_s
        self._timeout_s = timeout_s
        self.errors: dict[str, str] = {}
        """What was said the first time that each word came up."""

    async def ask(self, body: bytes, record: RequestRecord, *, keep_text: bool = False) -> str:
        """Send `body` now and note in `record` what comes; returns the text with `keep_text`, else "".

        Raises nothing but CancelledError, after which `record` holds what had come by then.
        """
        answer = Answer(keep_text=keep_text)
        record.sent_s = self._now_s()
        try:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._ask(body, record, answer)
            finally:
                record.end_s = self._now_s()
                _note(record, answer)
        except BadStreamError as error:
            self._failed(record, error.word, error.text)
        except TimeoutError:
            self._failed(record, "timeout", f"no complete answer within {self._timeout_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            word = _connection_word(error, begun=bool(answer.times_s))
            self._failed(record, word, said_of(error))
        return answer.text

    async def _ask(self, body: bytes, record: RequestRecord, answer: Answer) -> None:
        # aiohttp writes a large body of bytes in one piece, which would hold up everybody else's events.
        data = io.BytesIO(body) if len(body) > LARGE_BODY_BYTES else body
        headers = {**HEADERS, **self._endpoint.headers}
        async with self._session.post(
            self._endpoint.path, data=data, headers=headers, allow_redirects=False
        ) as response:
            _note_route(record, response.headers)
            if response.status != 200:
                said = error_text(await response.content.read(MAX_ERROR_BODY_BYTES))
                raise BadStreamError(f"http_{response.status}", said or response.reason or "")
            if response.content_type != "text/event-stream":
                said = error_text(await response.content.read(MAX_ERROR_BODY_BYTES))
                raise BadStreamError("not_sse", f"the answer is {response.content_type}, no event stream: {said}")
            parser = SseParser()
            async for piece in response.content.iter_any():
                now_s = self._now_s()
                for data_of_event in parser.feed(piece):
                    answer.take(data_of_event, now_s)
        if not answer.finished:
            raise BadStreamError("stream_broken", "the stream ended before the answer was complete")
        if not answer.times_s:
            raise BadStreamError("no_tokens", "the answer is complete and has no token")

    def _failed(self, record: RequestRecord, word: str, text: str) -> None:
        record.status = REFUSED if word == "http_429" else FAILED
        record.error = word
        self.errors.setdefault(word, text)


def _note_route(record: RequestRecord, headers: Mapping[str, str]) -> None:
    """What a PrfaaS router says of the way that a request took; other servers say at most its id."""

    def said(name: str) -> str:
        return headers.get(name, "")[:MAX_HEADER_CHARS]

    record.request_id, record.reason, record.decision = said(REQUEST_ID), said(REASON), said(DECISION)
    record.prefill_node, record.decode_node = said(PREFILL_NODE), said(DECODE_NODE)
    record.decode_region = said(DECODE_REGION)
    if record.decode_region and not record.prefill_node:
        # Without a prefill node the decode node computes the prompt itself.
        record.region, record.offloaded = record.decode_region, False
    elif prefill_region := said(PREFILL_REGION):
        record.region = prefill_region
        record.offloaded = prefill_region != record.decode_region if record.decode_region else None


def _note(record: RequestRecord, answer: Answer) -> None:
    """What of the answer has come."""
    times_s = answer.times_s
    record.output_tokens = len(times_s) if answer.output_tokens is None else answer.output_tokens
    if answer.prompt_tokens is not None:
        record.prompt_tokens = answer.prompt_tokens
    record.cached_tokens = UNKNOWN if answer.cached_tokens is None else answer.cached_tokens
    if times_s:
        record.first_token_s, record.last_token_s = times_s[0], times_s[-1]
        record.second_token_s = times_s[1] if len(times_s) > 1 else None
        some_s = times_s[: MAX_ITLS_A_REQUEST + 1]
        record.itl_s = [later - earlier for earlier, later in pairwise(some_s)]


def said_of(error: Exception) -> str:
    """In one line."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        # The rest of it is OpenSSL's source files and line numbers.
        refused = getattr(error.certificate_error, "verify_message", "") or error.certificate_error
        return f"the server's certificate is refused: {refused}".rstrip(".")
    return " ".join(str(error).split()) or type(error).__name__


def _connection_word(error: Exception, *, begun: bool) -> str:
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "name_not_resolved"
    if isinstance(error, aiohttp.ClientSSLError | aiohttp.ClientConnectorCertificateError):
        return "tls"
    if isinstance(error, aiohttp.ClientConnectorError):
        return CONNECT_WORDS.get(error.errno or 0, "not_connected")
    if isinstance(error, aiohttp.ClientPayloadError) or begun:
        return "stream_broken"
    if isinstance(error, aiohttp.ClientConnectionError | OSError):
        return CONNECT_WORDS.get(getattr(error, "errno", None) or 0, "connection_lost")
    return "malformed_http"
