"""What a PrfaaS router says of a request afterwards: the parts of its TTFT, the KV that travelled, the fallbacks.

The router keeps the last few hundred requests, so each is asked for soon after its end. Where requests end faster than
answers come, some stay unasked, and the figures are a sample.
"""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec
from prfaas.loadgen.client.endpoint import Endpoint
from prfaas.loadgen.records import RequestRecord

MAX_PENDING = 128
"""Half of what a router keeps."""
CALLS = 4
MAX_BODY_BYTES = 16 << 20
TIMEOUT_S = 5.0
WAITS_S = (0.02, 0.1, 0.5)
"""The router writes a request down just after its answer has ended."""


class TtftParts(msgspec.Struct):
    router_s: float
    queue_s: float
    prefill_s: float
    exposed_s: float
    first_step_s: float


class Timeline(msgspec.Struct):
    """The fields of GET /requests/{id}/timeline that are of use here."""

    decision: str
    fallbacks: list[str]
    prefill_node: str | None
    decode_node: str
    ttft_parts: TtftParts | None = None
    kv_raw_bytes: int = 0
    kv_wire_bytes: int = 0
    local_prefill: bool = False
    clock_error_s: float | None = None


_TIMELINES = msgspec.json.Decoder(Timeline)


def note(record: RequestRecord, timeline: Timeline) -> None:
    """Put into `record` what the router said."""
    record.reason = timeline.decision
    record.fallbacks = timeline.fallbacks
    record.prefill_node, record.decode_node = timeline.prefill_node or "", timeline.decode_node
    if timeline.prefill_node is None or timeline.local_prefill:
        record.region, record.offloaded = record.decode_region, False
    elif not (record.region and record.decode_region):
        # A router that names no regions is one whose prefill nodes are all elsewhere.
        record.offloaded = True
    record.kv_raw_bytes, record.kv_wire_bytes = timeline.kv_raw_bytes, timeline.kv_wire_bytes
    # Without a measured clock the nodes' instants are left out, and the parts would all be 0.
    if timeline.ttft_parts is not None and timeline.clock_error_s is not None:
        parts = timeline.ttft_parts
        record.router_s, record.queue_s, record.prefill_s = parts.router_s, parts.queue_s, parts.prefill_s
        record.exposed_s, record.first_step_s = parts.exposed_s, parts.first_step_s
        if timeline.kv_wire_bytes > 0:
            record.transfer_s = parts.prefill_s + parts.exposed_s


class Timelines:
    """`ask` for a record's timeline; at most CALLS at a time, MAX_PENDING waiting."""

    def __init__(self, session: aiohttp.ClientSession, endpoint: Endpoint) -> None:
        self._session = session
        self._endpoint = endpoint
        self._calls = asyncio.Semaphore(CALLS)
        self._pending = 0
        self.missed = 0
        """Not asked for, or not answered."""

    async def ask(self, record: RequestRecord) -> None:
        """Returns when `record` is complete, or stays as it is."""
        if self._pending >= MAX_PENDING:
            self.missed += 1
            return
        self._pending += 1
        try:
            timeline = await self._get(record.request_id)
        finally:
            self._pending -= 1
        if timeline is None:
            self.missed += 1
        else:
            note(record, timeline)

    async def _get(self, request_id: str) -> Timeline | None:
        url = f"{self._endpoint.url}/requests/{request_id}/timeline"
        for wait_s in WAITS_S:
            await asyncio.sleep(wait_s)
            try:
                async with (
                    self._calls,
                    asyncio.timeout(TIMEOUT_S),
                    self._session.get(url, headers=self._endpoint.headers) as response,
                ):
                    if response.status == 200:
                        body = await _read(response)
                        return None if body is None else _TIMELINES.decode(body)
                    if response.status != 404:
                        return None
            except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError):
                return None
        return None


async def _read(response: aiohttp.ClientResponse) -> bytes | None:
    """None: longer than MAX_BODY_BYTES."""
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            return None
    return bytes(body)
