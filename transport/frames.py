"""The frames of a lane: one fixed binary header, then a body. Pure; nothing here reads a socket or a clock.

    | magic 2 | version 1 | type 1 | flags 2 | codec 1 | copy 1 | body_bytes 4 |  every frame
    | transfer 4 |                                                           every frame of a transfer
    | layer 2 | tensor 2 | row 4 | offset_bytes 8 | raw_bytes 4 | sequence 4 | checksum 8 |   CHUNK, else zero

All integers are little-endian. The body of a CHUNK is `body_bytes` of KV as the codec left it, that of every other
frame a msgpack map (the Structs below; unknown keys are ignored, so that version N and N−1 can talk).

A transfer's number is given by its sender and unique within a session and a direction. `FROM_RECEIVER` in the flags
says that the number is one of the *other* side's: OPENED, CREDIT, ACK, and a CANCEL by the receiving side.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec
import xxhash
from prfaas.common.errors import ProtocolError

MAGIC = 0x4B50  # "PK" on the wire
VERSION = 1
SUPPORTED_VERSIONS = (VERSION,)
"""Versions N and N−1; the first version has no predecessor."""

HEADER = struct.Struct("<HBBHBBIIHHIQIIQ")
HEADER_BYTES = HEADER.size

# Every length is held against one of these before anything is allocated for it.
MAX_HELLO_BYTES = 4096
"""Before authentication a stranger may make us hold so much, and no more."""
MAX_CONTROL_BYTES = 64 << 10
"""FINISH is the largest: a few lists of one instant a layer, 9 bytes each, at most 1,024 layers."""
MAX_CHUNK_BYTES = 16 << 20
"""The bound on `chunk_bytes` in the settings; also on what one chunk may decode to."""
MAX_TICKET_CHARS = 4096
MAX_REASON_CHARS = 1000
"""Of every text for people in a frame: fits ERROR's limit even when each character takes four bytes."""

FROM_RECEIVER = 1
RAW = 0
"""The codec number of bytes that lie in their destination as they come; the others are in codecs/registry.py."""


class FrameType(enum.IntEnum):
    HELLO = 1
    OPEN = 2
    OPENED = 3
    CHUNK = 4
    CREDIT = 5
    ACK = 6
    FINISH = 7
    CANCEL = 8
    PING = 9
    PONG = 10
    ERROR = 11
    FETCH = 12
    FETCHED = 13
    RESUME = 14
    # Reserved: link estimates.
    LINK = 15


class FrameHeader(NamedTuple):
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


# -- control bodies ---------------------------------------------------------------------------------------------------


class Body(msgspec.Struct, frozen=True, omit_defaults=True):
    """What follows the header of a control frame."""


class Hello(Body, frozen=True, omit_defaults=True):
    """First on every lane, from the dialling side and then from the other. `mac` signs all other fields and, in the
    answer, the dialler's nonce."""

    versions: tuple[int, ...]
    node: str
    session: str
    lane: int
    lanes: int
    model_fingerprint: str
    time_s: float
    """Wall clock: a recorded HELLO is good for the allowed skew only, and once."""
    nonce: str
    codecs: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    region: str = ""
    resume: bool = False
    """The session has had lanes: an acceptor that doesn't know it must say so."""
    lossy: tuple[str, ...] = ()
    """`kind=codec`: what this side lets come to it, of tensors of that kind."""
    answer: bool = False
    mac: bytes = b""


class Open(Body, frozen=True, omit_defaults=True):
    """Sent on every lane; the same attempt is answered once."""

    ticket: str
    attempt: int
    transfer_id: str
    token_start: int
    token_end: int
    shard_index: int
    shard_count: int
    head_start: int
    head_end: int | None
    model_fingerprint: str
    layout_hash: str
    dtypes: dict[str, str]
    remaining_s: float | None = None
    """Until the request's deadline; not an instant, since clocks differ."""
    repeat: int = 0
    """Of the same attempt, when lanes were lost and perhaps the answer with them: the answer is given again."""
    reserved: dict[str, int] = {}


class Opened(Body, frozen=True, omit_defaults=True):
    """The answer to OPEN: credit_bytes > 0, or no_room, or refused with its reason."""

    attempt: int
    credit_bytes: int = 0
    no_room: bool = False
    retry_after_s: float = 0.0
    refused: str = ""
    kind: str = ""
    """Which error a refusal is: ticket | engine | mismatch."""


class Credit(Body, frozen=True, omit_defaults=True):
    """granted_bytes counts from the transfer's start, so a lost or late CREDIT does no harm."""

    granted_bytes: int


class Ack(Body, frozen=True, omit_defaults=True):
    """chunks: sequence numbers that are safe in their place; damaged: those whose checksum did not match."""

    chunks: list[int] = []
    damaged: list[int] = []
    finished: bool = False


class Finish(Body, frozen=True, omit_defaults=True):
    """Every chunk has been handed to the sockets. Timings are of the sender's clock."""

    timings: dict[str, float | list[float]] = {}


class Cancel(Body, frozen=True, omit_defaults=True):
    """reason: a TransferError's word. detail: for people."""

    reason: str
    detail: str = ""


class Fetch(Body, frozen=True, omit_defaults=True):
    """Send me the KV of these tokens of a prefix: the ticket permits a transfer of [token_start, token_end). Its number
    is the asking side's, and only FETCHED refers to it."""

    ticket: str
    prefix_hash: bytes
    """Of all tokens up to token_end; whoever has them knows them by it."""
    token_start: int
    token_end: int
    remaining_s: float | None = None


class Fetched(Body, frozen=True, omit_defaults=True):
    """The answer to FETCH: OPEN follows, or `refused` says why not."""

    refused: str = ""


class Resume(Body, frozen=True, omit_defaults=True):
    """After a lane was lost, on another (the first that comes, if all were), and the answer to it: the numbers of the
    transfers that this side sends and that have not ended for it. What the other side receives and this one does not
    name, up to `last`, has ended; what is above `last` was begun later, and overtook this frame on another lane."""

    sending: list[int] = []
    last: int = 0
    answer: bool = False


class Ping(Body, frozen=True, omit_defaults=True):
    sent_s: float


class Pong(Body, frozen=True, omit_defaults=True):
    ping_sent_s: float
    answered_s: float


class Error(Body, frozen=True, omit_defaults=True):
    """The last frame on a lane: why it is closed. code: hello_refused | unknown_session | protocol | closing."""

    code: str
    detail: str = ""


ControlBody = Hello | Open | Opened | Credit | Ack | Finish | Cancel | Fetch | Fetched | Resume | Ping | Pong | Error

BODY_TYPES: Mapping[FrameType, type[ControlBody]] = MappingProxyType(
    {
        FrameType.HELLO: Hello,
        FrameType.OPEN: Open,
        FrameType.OPENED: Opened,
        FrameType.CREDIT: Credit,
        FrameType.ACK: Ack,
        FrameType.FINISH: Finish,
        FrameType.CANCEL: Cancel,
        FrameType.PING: Ping,
        FrameType.PONG: Pong,
        FrameType.ERROR: Error,
        FrameType.FETCH: Fetch,
        FrameType.FETCHED: Fetched,
        FrameType.RESUME: Resume,
    }
)
_TYPE_OF_BODY = {body: type for type, body in BODY_TYPES.items()}
_DECODERS = {type: msgspec.msgpack.Decoder(body) for type, body in BODY_TYPES.items()}
_ENCODER = msgspec.msgpack.Encoder()


def encode_control(body: ControlBody, transfer: int = 0, flags: int = 0) -> bytes:
    """A whole control frame. Raises ValueError when the body is over its limit (a FINISH with too many timings)."""
    data = _ENCODER.encode(body)
    type = _TYPE_OF_BODY[body.__class__]
    if len(data) > body_limit(type):
        raise ValueError(f"{type.name} has {len(data)} bytes; at most {body_limit(type)} fit into a frame")
    return HEADER.pack(MAGIC, VERSION, type, flags, 0, 0, len(data), transfer, 0, 0, 0, 0, 0, 0, 0) + data


def encode_chunk_header(
    transfer: int,
    sequence: int,
    place: tuple[int, int, int, int],
    raw_bytes: int,
    wire_bytes: int,
    codec: int,
    checksum: int,
    copy: int = 0,
) -> bytes:
    """The header of a CHUNK; its `wire_bytes` of payload follow. `place` = (layer, tensor, row, offset_bytes). `copy`:
    how many lanes have been lost with this chunk, so that the receiver knows which of two copies is the newer."""
    layer, tensor, row, offset_bytes = place
    return HEADER.pack(
        MAGIC,
        VERSION,
        FrameType.CHUNK,
        0,
        codec,
        copy,
        wire_bytes,
        transfer,
        layer,
        tensor,
        row,
        offset_bytes,
        raw_bytes,
        sequence,
        checksum,
    )


def chunk_checksum(data: memoryview, layer: int, tensor: int, row: int, offset_bytes: int) -> int:
    """xxh3-64 of a chunk's decoded bytes, seeded with its place: a header that was damaged on its way fails as well."""
    return xxhash.xxh3_64_intdigest(data, _seed(layer, tensor, row, offset_bytes))


def chunk_hasher(layer: int, tensor: int, row: int, offset_bytes: int) -> xxhash.xxh3_64:
    """The same checksum, for bytes that come in parts: `update` each, then `intdigest`."""
    return xxhash.xxh3_64(seed=_seed(layer, tensor, row, offset_bytes))


def _seed(layer: int, tensor: int, row: int, offset_bytes: int) -> int:
    return ((layer << 48) ^ (tensor << 44) ^ (row << 24) ^ offset_bytes) & 0xFFFF_FFFF_FFFF_FFFF


def body_limit(type: int) -> int:
    if type == FrameType.CHUNK:
        return MAX_CHUNK_BYTES
    return MAX_HELLO_BYTES if type in (FrameType.HELLO, FrameType.ERROR) else MAX_CONTROL_BYTES


def parse_header(data: bytes | bytearray | memoryview) -> FrameHeader:
    """Check what can be checked without knowing the lane's state. Raises ProtocolError that names field and value."""
    header = FrameHeader._make(HEADER.unpack_from(data))
    if header.magic != MAGIC:
        raise ProtocolError(f"not a PrfaaS frame: it starts with {bytes(data[:4])!r}")
    if header.version not in SUPPORTED_VERSIONS:
        raise ProtocolError(f"frame version {header.version}; this side speaks {SUPPORTED_VERSIONS}")
    if header.type != FrameType.CHUNK and header.type not in _DECODERS:
        raise ProtocolError(f"frame type {header.type} is unknown or reserved in version {VERSION}")
    if header.body_bytes > body_limit(header.type):
        name = FrameType(header.type).name
        raise ProtocolError(f"{name} announces {header.body_bytes} bytes; the limit is {body_limit(header.type)}")
    if header.type == FrameType.CHUNK:
        if not 1 <= header.raw_bytes <= MAX_CHUNK_BYTES:
            raise ProtocolError(f"CHUNK of {header.raw_bytes} decoded bytes; 1 to {MAX_CHUNK_BYTES} are allowed")
        if not 1 <= header.body_bytes <= header.raw_bytes:
            raise ProtocolError(f"CHUNK of {header.body_bytes} bytes on the wire for {header.raw_bytes} decoded")
        if header.codec == RAW and header.body_bytes != header.raw_bytes:
            raise ProtocolError(f"raw CHUNK of {header.body_bytes} bytes says it decodes to {header.raw_bytes}")
    return header


def parse_body(type: int, data: bytes | bytearray | memoryview) -> ControlBody:
    """Raises ProtocolError when the bytes are not what the type's Struct says."""
    frame_type = FrameType(type)
    try:
        return _DECODERS[frame_type].decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # RecursionError: a few KiB of nested arrays under a key that nobody knows.
        raise ProtocolError(f"{frame_type.name}: {error}") from None
