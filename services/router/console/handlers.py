"""The console over HTTP: the page and its two files, and a stream of states for those who look at it.

    GET /console, /console/console.css, /console/console.js      for everybody: they hold nothing of the cluster
    GET /console/events                                          for who may send requests; SSE, two states a second

A state is made once for all viewers, and only while there are any.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from importlib.resources import files

import msgspec
from aiohttp import web
from prfaas.common.errors import UnavailableError
from prfaas.common.scheduling.types import ClusterSnapshot
from prfaas.services.router.console.state import Console

FILES = {"console.css": "text/css", "console.js": "text/javascript"}
MAX_VIEWERS = 64
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Viewers:
    """Who looks on. `publish` after each tick of the console."""

    def __init__(self, console: Console, inflight: Callable[[], int]) -> None:
        self.console = console
        self._inflight = inflight
        self._viewers = 0
        self._latest: bytes = b""
        self._news = asyncio.Event()

    def publish(self, cluster: ClusterSnapshot, unix_s: float) -> None:
        """What has changed, for those who are there."""
        if self._viewers:
            self._latest = self._message(cluster, unix_s, whole=False)
            self._news.set()
            self._news = asyncio.Event()

    def _message(self, cluster: ClusterSnapshot, unix_s: float, *, whole: bool) -> bytes:
        state = self.console.state(cluster, unix_s, self._inflight(), whole=whole)
        return b"data: %b\n\n" % msgspec.json.encode(state)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Until the viewer leaves. Raises UnavailableError when there are too many."""
        if self._viewers >= MAX_VIEWERS:
            raise UnavailableError(f"{MAX_VIEWERS} viewers are connected already; close one", retry_after_s=10)
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-store"})
        self._viewers += 1
        try:
            await response.prepare(request)
            snapshot = self.console.registry.snapshot(time.monotonic())
            await response.write(self._message(snapshot, time.time(), whole=True))
            while True:
                await self._news.wait()
                await response.write(self._latest)
        except ConnectionError:
            return response
        finally:
            self._viewers -= 1


async def page(_request: web.Request) -> web.Response:
    return web.Response(body=_read("index.html"), content_type="text/html", charset="utf-8", headers=HEADERS)


async def page_file(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    if name not in FILES:
        raise web.HTTPNotFound
    return web.Response(body=_read(name), content_type=FILES[name], charset="utf-8", headers=HEADERS)


def _read(name: str) -> bytes:
    return (files(__package__) / "page" / name).read_bytes()
