"""A second implementation of the protocol, written from transport/PROTOCOL.md alone, against a real endpoint.

It shares no code with ours: Python's struct, hmac and base64, msgpack and xxh3. If the page is wrong or leaves out what
one must know, these tests don't pass.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import secrets
import struct
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import pytest
import xxhash
from prfaas.transport.api import KvAddress

from tests.conformance.kv_harness import (
    FINGERPRINT,
    SECRET,
    SOON_S,
    MakeBackend,
    Transfer,
    content,
    dense,
    pair,
    spec_of,
)

HELLO, OPEN, OPENED, CHUNK, CREDIT, ACK, FINISH, CANCEL, PING, PONG, ERROR = range(1, 12)
RESUME = 14
HEADER = struct.Struct("<HBBHBBIIHHIQIIQQ")

Body = dict[str, Any]
Place = tuple[int, int, int, int]


@pytest.fixture
def kind() -> str:
    """Sockets of our own need a port."""
    return "tcp"


class Header(NamedTuple):
    magic: int
    version: int
    type: int
    flags: int
    codec: int
    copy: int
    body_bytes: int
    transfer: int
    layer: int
    tensor: int
    row: int
    offset_bytes: int
    raw_bytes: int
    sequence: int
    checksum: int
    header_check: int

    @property
    def place(self) -> Place:
        return self.layer, self.tensor, self.row, self.offset_bytes


def header(*fields: int) -> bytes:
    head = struct.pack("<HBBHBBIIHHIQIIQ", 0x4B50, 1, *fields)
    return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head))


def checksum(data: bytes, transfer: int, sequence: int) -> int:
    return xxhash.xxh3_64_intdigest(data, (transfer << 32) + sequence)


def frame(type: int, body: Body, transfer: int = 0, flags: int = 0) -> bytes:
    data = msgspec.msgpack.encode(body)
    check = checksum(data, transfer, 0)
    return header(type, flags, 0, 0, len(data), transfer, 0, 0, 0, 0, 0, 0, check) + data


def chunk(transfer: int, sequence: int, place: Place, data: bytes, *, copy: int = 0, damage: int = 0) -> bytes:
    size = len(data)
    check = checksum(data, transfer, sequence) ^ damage
    return header(CHUNK, 0, 0, copy, size, transfer, *place, size, sequence, check) + data


def mac(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(struct.pack("<Q", len(part)) + part for part in parts), "sha256")


def signed(body: Body, dialler_nonce: str = "") -> Body:
    data = msgspec.msgpack.encode(body)
    return {"hello": data, "mac": mac(SECRET, b"prfaas hello", data, dialler_nonce.encode())}


def checked(body: Body, dialler_nonce: str = "") -> Body:
    assert body["mac"] == mac(SECRET, b"prfaas hello", body["hello"], dialler_nonce.encode())
    return msgspec.msgpack.decode(body["hello"])


def hello(session: str, lane: int, lanes: int, **more: Any) -> Body:
    return {
        "versions": [1],
        "node": "page",
        "session": session,
        "lane": lane,
        "lanes": lanes,
        "model_fingerprint": FINGERPRINT,
        "time_s": time.time(),
        "nonce": secrets.token_hex(16),
        "codecs": ["raw"],
        **more,
    }


class PageLane:
    """Answers PING and RESUME by itself, and keeps what was acknowledged and granted."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.acknowledged: set[int] = set()
        self.damaged: set[int] = set()
        self.granted_bytes = 0
        self.finished = False

    @staticmethod
    async def dial(address: KvAddress, session: str, lane: int, lanes: int, *, resume: bool = False) -> PageLane:
        made = PageLane(*await asyncio.open_connection(address.host, address.port))
        body = hello(session, lane, lanes, resume=resume)
        made.writer.write(frame(HELLO, signed(body)))
        answer = checked((await made.until(HELLO))[1], body["nonce"])
        assert answer["answer"]
        assert answer["session"] == session
        return made

    async def read(self) -> tuple[Header, bytes]:
        data = await self.reader.readexactly(HEADER.size)
        header = Header._make(HEADER.unpack(data))
        assert (header.magic, header.version, header.header_check) == (0x4B50, 1, xxhash.xxh3_64_intdigest(data[:48]))
        body = await self.reader.readexactly(header.body_bytes)
        assert header.codec == 0
        assert header.checksum == checksum(body, header.transfer, header.sequence)
        return header, body

    async def until(self, type: int) -> tuple[Header, Body]:
        async with asyncio.timeout(SOON_S):
            while True:
                header, data = await self.read()
                body = msgspec.msgpack.decode(data)
                self._note(header.type, body)
                if header.type == type:
                    return header, body

    def _note(self, type: int, body: Body) -> None:
        assert type not in (ERROR, CANCEL), body
        if type == PING:
            self.writer.write(frame(PONG, {"ping_sent_s": body["sent_s"], "answered_s": time.monotonic()}))
        elif type == RESUME and not body.get("answer"):
            self.writer.write(frame(RESUME, {"sending": [1], "last": 1, "answer": True}))
        elif type == OPENED:
            self.granted_bytes = body["credit_bytes"]
        elif type == CREDIT:
            self.granted_bytes = max(self.granted_bytes, body["granted_bytes"])
        elif type == ACK:
            self.acknowledged.update(body.get("chunks", ()))
            self.damaged.update(body.get("damaged", ()))
            self.finished |= body.get("finished", False)

    async def until_acknowledged(self, sequence: int) -> None:
        while sequence not in self.acknowledged:
            await self.until(ACK)

    def lose(self) -> None:
        self.writer.transport.abort()

    async def aclose(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


def open_from_ticket(ticket: str, dtypes: dict[str, str]) -> Body:
    claims = msgspec.msgpack.decode(base64.urlsafe_b64decode(ticket.partition(".")[0]))
    index, count, head_start, head_end = claims.get("shard", (0, 1, 0, None))
    return {
        "ticket": ticket,
        "attempt": 1,
        **{key: claims[key] for key in ("transfer_id", "token_start", "token_end", "model_fingerprint", "layout_hash")},
        "shard_index": index,
        "shard_count": count,
        "head_start": head_start,
        "head_end": head_end,
        "dtypes": dtypes,
    }


def cuts(transfer: Transfer, size: int) -> Iterator[tuple[Place, bytes]]:
    for (layer, tensor, row), data in transfer.source.items():
        for offset in range(0, len(data), size):
            yield (layer, tensor, row, offset), data[offset : offset + size]


async def test_a_sender_from_the_page_sends_a_transfer_through_every_accident(backend: MakeBackend) -> None:
    """A lane lost in the middle of a chunk, a damaged chunk, a needless copy, all lanes lost: the same bytes arrive."""
    layout = dense(2)
    async with pair(backend, layout) as both:
        (address,) = both.far.addresses
        transfer = both.offer(spec_of(layout))
        session = secrets.token_hex(16)
        lane = await PageLane.dial(address, session, 0, 2)
        second = await PageLane.dial(address, session, 1, 2)
        opening = frame(OPEN, open_from_ticket(transfer.ticket, layout.dtypes), 1)
        lane.writer.write(opening)
        header, _ = await lane.until(OPENED)
        assert (header.transfer, header.flags) == (1, 1)
        second.writer.write(opening)  # on every lane; it is answered once
        chunks = cuts(transfer, 8192)

        place, data = next(chunks)
        second.writer.write(chunk(1, 1, place, data)[:4096])
        await second.writer.drain()
        second.lose()
        lane.writer.write(chunk(1, 1, place, data, copy=1))
        await lane.until_acknowledged(1)

        place, data = next(chunks)
        lane.writer.write(chunk(1, 2, place, data, damage=1))
        while 2 not in lane.damaged:
            await lane.until(ACK)
        lane.writer.write(chunk(1, 3, place, data))
        await lane.until_acknowledged(3)
        lane.writer.write(chunk(1, 4, place, data, copy=1))
        await lane.until_acknowledged(4)

        lane.lose()
        lane = await PageLane.dial(address, session, 0, 2, resume=True)
        lane.writer.write(frame(RESUME, {"sending": [1], "last": 1}))
        while not (await lane.until(RESUME))[1].get("answer"):
            pass
        sent_bytes = 2 * 8192
        for sequence, (place, data) in enumerate(chunks, 5):
            while sent_bytes + len(data) > lane.granted_bytes:
                await lane.until(CREDIT)
            sent_bytes += len(data)
            lane.writer.write(chunk(1, sequence, place, data))
        for _ in range(2):  # the second as if the answer had been lost
            lane.finished = False
            lane.writer.write(frame(FINISH, {}, 1))
            while not lane.finished:
                await lane.until(ACK)
        report = await transfer.receiver.finished()
        assert transfer.destination is not None
        assert transfer.destination.rows == transfer.source
        assert report.duplicate_chunks >= 1
        await transfer.receiver.aclose()
        await lane.aclose()
        await second.aclose()


class PageReceiver:
    """Accepts one session and receives one transfer, with credit for two chunks."""

    def __init__(self, layout_hash: str, dtypes: dict[str, str], sizes: dict[tuple[int, int, int], int]) -> None:
        self.key = secrets.token_bytes(32)
        self.rows = {place: bytearray(size) for place, size in sizes.items()}
        self.missing_bytes = sum(sizes.values())
        self.granted_bytes = 32768
        self.claims: Body = {
            "transfer_id": secrets.token_hex(16),
            "request_id": "r",
            "token_start": 0,
            "token_end": 700,
            "prompt_tokens": 701,
            "max_output_tokens": 1,
            "model_fingerprint": FINGERPRINT,
            "layout_hash": layout_hash,
            "issuer": "page",
            "expires_s": time.monotonic() + 60,
        }
        self.dtypes = dtypes
        self.opened = 0
        self.finish: Header | None = None
        self.problems: list[Exception] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ticket(self) -> str:
        claims = msgspec.msgpack.encode(self.claims)
        return ".".join(base64.urlsafe_b64encode(part).decode() for part in (claims, mac(self.key, claims)))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lane = PageLane(reader, writer)
        try:
            body = checked((await lane.until(HELLO))[1])
            answer = hello(body["session"], body["lane"], body["lanes"], answer=True)
            writer.write(frame(HELLO, signed(answer, body["nonce"])))
            while True:
                header, data = await lane.read()
                if header.type == CHUNK:
                    self._chunk(lane, header, data)
                else:
                    self._control(lane, header, msgspec.msgpack.decode(data))
                self._end(lane, header)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except AssertionError as error:
            self.problems.append(error)
            self._over()
        finally:
            writer.close()

    def _over(self) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def _chunk(self, lane: PageLane, header: Header, data: bytes) -> None:
        row = self.rows[header.place[:3]]
        row[header.offset_bytes : header.offset_bytes + header.raw_bytes] = data
        self.missing_bytes -= len(data)
        self.granted_bytes += len(data)
        lane.writer.write(frame(ACK, {"chunks": [header.sequence]}, header.transfer, 1))
        lane.writer.write(frame(CREDIT, {"granted_bytes": self.granted_bytes}, header.transfer, 1))

    def _control(self, lane: PageLane, header: Header, body: Body) -> None:
        if header.type == OPEN and not self.opened:
            self.opened = header.transfer
            claims, _, signature = body["ticket"].partition(".")
            assert mac(self.key, base64.urlsafe_b64decode(claims)) == base64.urlsafe_b64decode(signature)
            assert all(body[key] == self.claims[key] for key in ("transfer_id", "token_end", "layout_hash"))
            assert body["dtypes"] == self.dtypes
            opened = {"attempt": body["attempt"], "credit_bytes": self.granted_bytes}
            lane.writer.write(frame(OPENED, opened, header.transfer, 1))
        elif header.type == FINISH:
            self.finish = header
        elif header.type == PING:
            lane.writer.write(frame(PONG, {"ping_sent_s": body["sent_s"], "answered_s": time.monotonic()}))

    def _end(self, lane: PageLane, header: Header) -> None:
        if self.finish is not None and not self.missing_bytes and header.type in (CHUNK, FINISH):
            lane.writer.write(frame(ACK, {"finished": True}, header.transfer, 1))
            self._over()


async def test_a_receiver_from_the_page_receives_a_transfer(backend: MakeBackend) -> None:
    """It accepts the session, issues the ticket, grants credit and acknowledges; three lanes, chunks as they come."""
    layout = dense(2)
    spec = spec_of(layout)
    source = content(layout, spec)
    async with pair(backend, layout) as both:
        receiver = PageReceiver(layout.layout_hash, layout.dtypes, {place: len(data) for place, data in source.items()})
        server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
        address = KvAddress(*server.sockets[0].getsockname()[:2])
        sender = both.near.sender(receiver.ticket(), "page", [address])
        transfer = Transfer(layout, spec, "", None, source, sender=sender)  # type: ignore[arg-type]
        sender.on_failed(receiver.problems.append)
        try:
            async with asyncio.timeout(SOON_S):
                await sender.open()
                transfer.put_all()
                await receiver.over
                assert receiver.problems == []
                report = await sender.done()
        finally:
            server.close()
            await sender.aclose()
        assert (report.resent_chunks, report.moved_chunks) == (0, 0)
        assert receiver.rows == source
