"""What the conformance suite builds on: two endpoints over a backend, layouts with every kind of KV, random content,
a backend whose received bytes can be damaged, and a peer that is driven frame by frame and so can break the protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import secrets
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from prfaas.common.config import TransportConfig
from prfaas.common.kv_layout import WHOLE, KvLayout, LayerLayout, Shard, TensorKind, TensorLayout, TokenRange
from prfaas.transport.api import KvAddress, KvPiece, KvReceiver, KvSender, TransferSpec
from prfaas.transport.codecs.registry import CODEC_NAMES
from prfaas.transport.endpoint import KvEndpoint
from prfaas.transport.frames import (
    HEADER,
    MAGIC,
    VERSION,
    Finish,
    FrameHeader,
    FrameType,
    Hello,
    Open,
    SignedHello,
    checksum,
    encode_control,
    encode_header,
    parse_body,
    parse_hello,
)
from prfaas.transport.handshake import signed
from prfaas.transport.lanes.api import Backend, LaneHandler, Listener

FINGERPRINT = "f" * 32
SECRET = b"a secret of the test cluster"
MakeBackend = Callable[[TransportConfig], Backend]
SOON_S = 10.0
"""How long anything that must happen may take; nothing waits so long when it works."""


def of_node(backend: Backend, node: str) -> Backend:
    """What `node` has of it: its own certificate, over TLS."""
    return backend.of(node) if hasattr(backend, "of") else backend


def dense(layers: int = 4, heads: int = 2, dtype: str = "bfloat16") -> KvLayout:
    kv = (TensorLayout(TensorKind.KEY, dtype, heads, (64,)), TensorLayout(TensorKind.VALUE, dtype, heads, (64,)))
    return KvLayout((LayerLayout(kv),) * layers)


def hybrid() -> KvLayout:
    """Every kind: full and sliding attention, a latent, states, and a layer that keeps nothing."""
    full = dense(1).layers[0]
    window = LayerLayout(tuple(dataclasses.replace(t, window_tokens=50) for t in full.tensors))
    state = LayerLayout(
        (
            TensorLayout(TensorKind.CONV, "bfloat16", 1, (96, 3)),
            TensorLayout(TensorKind.RECURRENT, "float32", 1, (4, 16, 33)),
        )
    )
    latent = LayerLayout((TensorLayout(TensorKind.LATENT, "float16", 1, (72,)),))
    return KvLayout((full, window, LayerLayout(()), state, latent, full))


class Destination:
    """One bytearray a row, filled with a pattern that no test content has by chance."""

    def __init__(self, layout: KvLayout, spec: TransferSpec) -> None:
        self.rows = {
            (layer, tensor, row): bytearray(b"\xa5" * extent.row_bytes)
            for layer, tensors in enumerate(layout.extents(spec.tokens, spec.shard))
            for tensor, extent in enumerate(tensors)
            for row in range(extent.rows)
        }

    def row(self, layer: int, tensor: int, row: int) -> memoryview:
        return memoryview(self.rows[layer, tensor, row])


def content(layout: KvLayout, spec: TransferSpec, seed: int = 0) -> dict[tuple[int, int, int], bytes]:
    """Half random, half repeating, so that some chunks shrink and some don't."""
    rng = random.Random(seed)
    made = {}
    for layer, tensors in enumerate(layout.extents(spec.tokens, spec.shard)):
        for tensor, extent in enumerate(tensors):
            for row in range(extent.rows):
                made[layer, tensor, row] = (
                    rng.randbytes(extent.row_bytes)
                    if (layer + row) % 2
                    else (rng.randbytes(64) * (extent.row_bytes // 64 + 1))[: extent.row_bytes]
                )
    return made


def spec_of(
    layout: KvLayout, tokens: tuple[int, int] = (0, 700), shard: Shard = WHOLE, fingerprint: str = FINGERPRINT
) -> TransferSpec:
    return TransferSpec(
        transfer_id=secrets.token_hex(16),
        request_id="request",
        tokens=TokenRange(*tokens),
        prompt_tokens=tokens[1] + 1,
        max_output_tokens=16,
        model_fingerprint=fingerprint,
        layout_hash=layout.layout_hash,
        shard=shard,
    )


@dataclass
class Transfer:
    """One transfer with both its halves and what they were given."""

    layout: KvLayout
    spec: TransferSpec
    ticket: str
    receiver: KvReceiver
    source: dict[tuple[int, int, int], bytes]
    sender: KvSender | None = None
    destination: Destination | None = None
    layers: list[int] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    room: bool = True
    layer_event: asyncio.Event = field(default_factory=asyncio.Event)

    def reserve(self, spec: TransferSpec) -> Destination | None:
        if not self.room:
            return None
        self.destination = Destination(self.layout, spec)
        return self.destination

    def on_layer(self, layer: int) -> None:
        self.layers.append(layer)
        self.layer_event.set()

    async def until_layer(self, layer: int) -> None:
        async with asyncio.timeout(SOON_S):
            while layer not in self.layers:
                self.layer_event.clear()
                await self.layer_event.wait()

    def pieces(self, layer: int, step_bytes: int | None = None) -> list[KvPiece]:
        return [
            KvPiece(at, tensor, row, offset, memoryview(data)[offset : offset + (step_bytes or len(data))])
            for (at, tensor, row), data in self.source.items()
            if at == layer
            for offset in range(0, len(data), step_bytes or len(data))
        ]

    def put_all(self) -> None:
        assert self.sender is not None
        for layer in range(len(self.layout.layers)):
            self.sender.put(self.pieces(layer))
        self.sender.finish({"ended_s": 1.0})

    async def complete(self) -> None:
        """Wait for both sides, compare every byte, close both."""
        assert self.sender is not None
        async with asyncio.timeout(SOON_S):
            await self.sender.done()
            await self.receiver.finished()
        assert self.destination is not None
        assert self.destination.rows == self.source
        assert sorted(self.layers) == list(range(len(self.layout.layers)))
        assert self.errors == []
        await self.sender.aclose()
        await self.receiver.aclose()


@dataclass
class Pair:
    """Two endpoints, `near` (prefill) dials `far` (decode)."""

    near: KvEndpoint
    far: KvEndpoint
    layout: KvLayout
    backend: Backend
    config: TransportConfig

    def endpoint(
        self, node: str, *, secret: bytes = SECRET, fingerprint: str = FINGERPRINT, **settings: object
    ) -> KvEndpoint:
        """A third one on the same network; the caller closes it."""
        return KvEndpoint(
            dataclasses.replace(self.config, **settings),  # type: ignore[arg-type]
            node=node,
            layout=self.layout,
            model_fingerprint=fingerprint,
            secret=secret,
            backend=of_node(self.backend, node),
        )

    def offer(
        self, spec: TransferSpec, *, seed: int = 0, sender: KvEndpoint | None = None, room: bool = True
    ) -> Transfer:
        sending = sender or self.near
        receiving = self.far if sending is self.near else self.near
        ticket, receiver = receiving.receiver(spec)
        transfer = Transfer(self.layout, spec, ticket, receiver, content(self.layout, spec, seed), room=room)
        receiver.bind(transfer.reserve, transfer.on_layer, transfer.errors.append)
        transfer.sender = sending.sender(ticket, receiving.node, receiving.addresses)
        return transfer

    async def send(self, spec: TransferSpec | None = None, *, seed: int = 0) -> Transfer:
        """A whole transfer from near to far, checked."""
        transfer = self.offer(spec or spec_of(self.layout), seed=seed)
        assert transfer.sender is not None
        await transfer.sender.open()
        transfer.put_all()
        await transfer.complete()
        return transfer

    async def send_back(self, *, seed: int = 0) -> Transfer:
        """The same from far to near, over the session that near dialled."""
        transfer = self.offer(spec_of(self.layout), seed=seed, sender=self.far)
        assert transfer.sender is not None
        await transfer.sender.open()
        transfer.put_all()
        await transfer.complete()
        return transfer


@asynccontextmanager
async def pair(backend: MakeBackend, layout: KvLayout | None = None, /, **settings: object):
    layout = layout or hybrid()
    config = TransportConfig(**{"lanes": 3, "chunk_bytes": 16384, "credit_bytes": 65536, **settings})  # type: ignore[arg-type]
    made = backend(config)

    def endpoint(node: str) -> KvEndpoint:
        mine = of_node(made, node)
        return KvEndpoint(config, node=node, layout=layout, model_fingerprint=FINGERPRINT, secret=SECRET, backend=mine)

    near, far = endpoint("near"), endpoint("far")
    await near.start()
    await far.start()
    near.connect("far", far.addresses)
    both = Pair(near, far, layout, made, config)
    try:
        yield both
    finally:
        async with asyncio.timeout(SOON_S):
            await both.near.aclose()
            await both.far.aclose()


# -- a network that misbehaves ----------------------------------------------------------------------------------------


class FaultyBackend:
    """Around any backend. `damage(header) -> bool` sees each CHUNK header that arrives; True flips a bit of its
    payload. `garble(header) -> bool` sees every header that arrives in one piece; True makes its type unknown."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.damage: Callable[[FrameHeader], bool] = lambda _header: False
        self.garble: Callable[[FrameHeader], bool] = lambda _header: False
        self.on_chunk: Callable[[FrameHeader], None] = lambda _header: None
        self.on_connected: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None
        self.lanes: list[FaultyHandler] = []

    async def listen(self, host: str, port: int, handler: Callable[[], LaneHandler]) -> Listener:
        return await self.inner.listen(host, port, lambda: self.wrap(handler()))

    async def dial(self, host: str, port: int, handler: LaneHandler) -> None:
        await self.inner.dial(host, port, self.wrap(handler))

    def of(self, node: str) -> Backend:
        return FaultyOfNode(self, of_node(self.inner, node))

    def wrap(self, handler: LaneHandler) -> FaultyHandler:
        wrapped = FaultyHandler(self, handler)
        self.lanes.append(wrapped)
        return wrapped

    async def until_lost(self, lanes: int, *, after: int = 0) -> None:
        """Of the lanes that were made as number `after` and later, that many have been open and none is any more; each
        counts twice, once an end."""
        changed = asyncio.Event()
        self.on_lost = changed.set
        async with asyncio.timeout(SOON_S):
            while len(self.lanes) < after + lanes or any(h.open or h.lane is None for h in self.lanes[after:]):
                changed.clear()
                await changed.wait()


class FaultyOfNode:
    """One node's part of a FaultyBackend."""

    def __init__(self, faults: FaultyBackend, inner: Backend) -> None:
        self._faults = faults
        self._inner = inner

    async def listen(self, host: str, port: int, handler: Callable[[], LaneHandler]) -> Listener:
        return await self._inner.listen(host, port, lambda: self._faults.wrap(handler()))

    async def dial(self, host: str, port: int, handler: LaneHandler) -> None:
        await self._inner.dial(host, port, self._faults.wrap(handler))


class FaultyHandler:
    """Follows the frames as they arrive, by the buffers that the real handler hands out."""

    def __init__(self, faults: FaultyBackend, inner: LaneHandler) -> None:
        self._faults = faults
        self._inner = inner
        self._header = bytearray()
        self._body_left = 0
        self._damage = False
        self._buffer = memoryview(b"")
        self.lane = None
        self.open = False
        self.at_header: FrameHeader | None = None
        self.received_chunks = 0

    def connected(self, lane) -> None:  # type: ignore[no-untyped-def]
        self.lane = lane
        self.open = True
        self._inner.connected(lane)
        self._faults.on_connected()

    def next_buffer(self) -> memoryview:
        self._buffer = self._inner.next_buffer()
        return self._buffer

    def advance(self, received_bytes: int) -> None:
        data = self._buffer[:received_bytes]
        if self._body_left:
            if self._damage:
                data[0] ^= 1
                self._damage = False
            self._body_left -= received_bytes
        else:
            self._header += data
            if len(self._header) == HEADER.size:
                header = FrameHeader._make(HEADER.unpack(self._header))
                self._header.clear()
                self._body_left = header.body_bytes
                self.at_header = header
                if received_bytes == HEADER.size and self._faults.garble(header):
                    data[3] = 99
                if header.type == FrameType.CHUNK:
                    self.received_chunks += 1
                    self._damage = self._faults.damage(header)
                    self._faults.on_chunk(header)
        self._inner.advance(received_bytes)

    def writable(self) -> None:
        self._inner.writable()

    def lost(self, error: Exception | None) -> None:
        self._inner.lost(error)
        self.open = False
        self._faults.on_lost()


# -- a peer that is driven frame by frame -----------------------------------------------------------------------------


def control_frame(type: int, body: object, **changes: int) -> bytes:
    """Any control frame, right or wrong: `body` as msgpack (bytes: as they are), `changes` to header fields."""
    data = body if isinstance(body, bytes) else msgspec.msgpack.encode(body)
    header = FrameHeader(MAGIC, VERSION, type, 0, 0, 0, len(data), 0, 0, 0, 0, 0, 0, 0, 0, 0)
    check = checksum(data, changes.get("transfer", 0), 0)
    return encode_header(header._replace(**{"checksum": check, **changes})) + data


def chunk_frame(data: bytes, place: tuple[int, int, int, int] = (0, 0, 0, 0), **changes: int) -> bytes:
    """A CHUNK with the right checksum."""
    size = len(data)
    header = FrameHeader(MAGIC, VERSION, FrameType.CHUNK, 0, 0, 0, size, 1, *place, size, 1, 0, 0)._replace(**changes)
    check = changes.get("checksum", checksum(data, header.transfer, header.sequence))
    return encode_header(header._replace(checksum=check)) + data


def open_body(transfer: Transfer, *, attempt: int = 1, **changes: object) -> Open:
    spec = transfer.spec
    body = Open(
        ticket=transfer.ticket,
        attempt=attempt,
        transfer_id=spec.transfer_id,
        token_start=spec.tokens.start,
        token_end=spec.tokens.end,
        shard_index=spec.shard.index,
        shard_count=spec.shard.count,
        head_start=spec.shard.head_start,
        head_end=spec.shard.head_end,
        model_fingerprint=spec.model_fingerprint,
        layout_hash=spec.layout_hash,
        dtypes=transfer.layout.dtypes,
    )
    return msgspec.structs.replace(body, **changes)


class RawLane:
    """One TCP lane whose other end is a real endpoint; every frame is written and read by the test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.hello = b""

    @staticmethod
    async def connect(address: KvAddress) -> RawLane:
        return RawLane(*await asyncio.open_connection(address.host, address.port))

    @staticmethod
    async def dial(
        address: KvAddress, *, session: str = "", lane: int = 0, lanes: int = 2, node: str = "raw"
    ) -> RawLane:
        """With a good HELLO, and the answer to it read."""
        raw = await RawLane.connect(address)
        hello = hello_body(session or secrets.token_hex(16), lane, lanes)
        raw.hello = encode_control(signed(msgspec.structs.replace(hello, node=node), SECRET))
        raw.writer.write(raw.hello)
        await raw.until(FrameType.HELLO)
        return raw

    async def header(self) -> FrameHeader:
        return FrameHeader._make(HEADER.unpack(await self.reader.readexactly(HEADER.size)))

    async def until(self, type: FrameType) -> Any:
        """The body of the next control frame of that type (of HELLO: what is signed); others are read and forgotten."""
        async with asyncio.timeout(SOON_S):
            while True:
                header = await self.header()
                data = await self.reader.readexactly(header.body_bytes)
                if header.type == type:
                    body = parse_body(header, data)
                    return parse_hello(body.hello) if isinstance(body, SignedHello) else body

    async def until_closed(self) -> None:
        """The other end has closed the lane (with what we sent unread it is reset)."""
        async with asyncio.timeout(SOON_S):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(1 << 16):
                    pass

    async def flood(self, frame: bytes) -> None:
        """Write until the other end has had enough (ConnectionError); read nothing."""
        while True:
            self.writer.write(frame)
            await self.writer.drain()
            await asyncio.sleep(0)

    async def send_all(self, transfer: Transfer, number: int = 1) -> None:
        """Every byte of an open transfer and FINISH, and the receiver's word that it has them."""
        for sequence, ((layer, tensor, row), data) in enumerate(transfer.source.items()):
            self.writer.write(chunk_frame(data, (layer, tensor, row, 0), transfer=number, sequence=100 + sequence))
        self.writer.write(control_frame(FrameType.FINISH, Finish(), transfer=number))
        while not (await self.until(FrameType.ACK)).finished:
            pass

    async def aclose(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


def hello_body(session: str, lane: int = 0, lanes: int = 1, *, answer: bool = False) -> Hello:
    return Hello(
        versions=(VERSION,),
        node="raw",
        session=session,
        lane=lane,
        lanes=lanes,
        model_fingerprint=FINGERPRINT,
        time_s=time.time(),
        nonce=secrets.token_hex(16),
        codecs=CODEC_NAMES,
        answer=answer,
    )
