"""The frames of a lane: one fixed binary header, then a body. Pure; nothing here reads a socket or a clock.

    | magic 2 | version 1 | type 1 | flags 2 | codec 1 | copy 1 | body_bytes 4 |  every frame
    | transfer 4 |                                                           every frame of a transfer
    | layer 2 | tensor 2 | row 4 | offset_bytes 8 | raw_bytes 4 | sequence 4 |   CHUNK, else zero
    | checksum 8 |     of the body        | header_check 8 |   of the 48 bytes before

All integers are little-endian. The body of a CHUNK is `body_bytes` of KV as the codec left it, that of every other
frame a msgpack map (the Structs below; unknown keys are ignored, so that version N and N−1 can talk).

Both checks are needed: TCP's own lets one damaged packet in 65,536 pass. A header that is not what was sent would make
the lane lose its place, or put a good chunk into another transfer; it costs the lane, and what was on that comes again.

A transfer's number is given by its sender and unique within a session and a direction. `FROM_RECEIVER` in the flags
says that the number is one of the *other* side's: OPENED, CREDIT, ACK, and a CANCEL by the receiving side.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec
import xxhash
from prfaas.common.errors import ProtocolError

if TYPE_CHECKING:
    from prfaas.transport.lanes.api import Buffer

MAGIC = 0x4B50  # "PK" on the wire
VERSION = 1
SUPPORTED_VERSIONS = (VERSION,)
"""Versions N and N−1; the first version has no predecessor."""

HEADER = struct.Struct("<HBBHBBIIHHIQIIQQ")
HEADER_BYTES = HEADER.size
_CHECKED = struct.Struct(HEADER.format[:-1])
_CHECKED_BYTES = _CHECKED.size

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

MAX_TRACEPARENT_CHARS = 64

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


CHUNK = int(FrameType.CHUNK)
"""Compared for each chunk; an enum's member is an attribute away."""

B = TypeVar("B", bound="Body")


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
    header_check: int


# -- control bodies ---------------------------------------------------------------------------------------------------


class Body(msgspec.Struct, frozen=True, omit_defaults=True):
    """What follows the header of a control frame."""


class SignedHello(Body, frozen=True, omit_defaults=True):
    """First on every lane, from the dialling side and then from the other. `mac` signs the bytes of `hello` and, in the
    answer, the dialler's nonce; nothing in them is read before it was found good, and keys that only a later version
    knows are under it too."""

    hello: bytes
    """A `Hello`, as msgpack."""
    mac: bytes = b""


class Hello(Body, frozen=True, omit_defaults=True):
    """Who a lane's other side is; in `SignedHello`."""

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
    epoch: str = ""
    """Which process it is of those that have the node's name, one after another or at once; tickets name it too."""


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
    traceparent: str = ""
    """W3C Trace Context of the sender's work, for the receiver's spans; passed over with more than
    MAX_TRACEPARENT_CHARS."""


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
    """The last frame on a lane: why it is closed. code: hello_refused | unknown_session | protocol |
    closing (the whole session) | lane (this one only)."""

    code: str
    detail: str = ""


ControlBody = (
    SignedHello | Open | Opened | Credit | Ack | Finish | Cancel | Fetch | Fetched | Resume | Ping | Pong | Error
)

BODY_TYPES: Mapping[FrameType, type[ControlBody]] = MappingProxyType(
    {
        FrameType.HELLO: SignedHello,
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
_HELLO = msgspec.msgpack.Decoder(Hello)
_ENCODER = msgspec.msgpack.Encoder()


def encode_control(body: ControlBody, transfer: int = 0, flags: int = 0) -> bytes:
    """A whole control frame. Raises ValueError when the body is over its limit (a FINISH with too many timings)."""
    data = _ENCODER.encode(body)
    type = _TYPE_OF_BODY[body.__class__]
    if len(data) > body_limit(type):
        raise ValueError(f"{type.name} has {len(data)} bytes; at most {body_limit(type)} fit into a frame")
    check = checksum(data, transfer, 0)
    return _checked(MAGIC, VERSION, type, flags, 0, 0, len(data), transfer, 0, 0, 0, 0, 0, 0, check) + data


def encode_hello(hello: Hello) -> bytes:
    """What `SignedHello.hello` holds."""
    return _ENCODER.encode(hello)


def parse_hello(data: bytes) -> Hello:
    """Raises ProtocolError."""
    return _decode("HELLO", _HELLO, data)


def encode_chunk_header(
    transfer: int,
    sequence: int,
    place: tuple[int, int, int, int],
    raw_bytes: int,
    wire_bytes: int,
    codec: int,
    check: int,
    copy: int = 0,
) -> bytes:
    """The header of a CHUNK; its `wire_bytes` of payload follow. `place` = (layer, tensor, row, offset_bytes). `check`:
    `checksum` of it. `copy`: how many lanes have been lost with this chunk, so that the receiver knows which of two
    copies is the newer."""
    return _checked(
        MAGIC, VERSION, CHUNK, 0, codec, copy, wire_bytes, transfer, *place, raw_bytes, sequence, check
    )  # fmt: skip


def encode_header(header: FrameHeader) -> bytes:
    """With the `header_check` that its other fields have, whatever it says."""
    return _checked(*header[:-1])


def _checked(*fields: int) -> bytes:
    head = _CHECKED.pack(*fields)
    return head + xxhash.xxh3_64_intdigest(head).to_bytes(8, "little")


def checksum(data: Buffer, transfer: int, sequence: int) -> int:
    """xxh3-64 of a control frame's body (sequence 0) or a chunk's decoded bytes, those of a lossy chunk as they travel.
    Seeded with whose they are: good bytes behind another frame's header fail as well."""
    return xxhash.xxh3_64_intdigest(data, transfer << 32 | sequence)


def chunk_hasher(transfer: int, sequence: int) -> xxhash.xxh3_64:
    """The same checksum, for bytes that come in parts: `update` each, then `intdigest`."""
    return xxhash.xxh3_64(seed=transfer << 32 | sequence)


def body_limit(type: int) -> int:
    if type == FrameType.CHUNK:
        return MAX_CHUNK_BYTES
    return MAX_HELLO_BYTES if type in (FrameType.HELLO, FrameType.ERROR) else MAX_CONTROL_BYTES


def parse_header(data: Buffer) -> FrameHeader:
    """Check what can be checked without knowing the lane's state. Raises ProtocolError that names field and value."""
    header = FrameHeader._make(HEADER.unpack_from(data))
    if header.magic != MAGIC:
        raise ProtocolError(f"not a PrfaaS frame: it starts with {bytes(data[:4])!r}")
    if header.version not in SUPPORTED_VERSIONS:
        speaks = ", ".join(map(str, SUPPORTED_VERSIONS))
        raise ProtocolError(
            f"frame version {header.version}, and this side speaks {speaks}; replace the older of the two by a "
            "version in between first"
        )
    if xxhash.xxh3_64_intdigest(data[:_CHECKED_BYTES]) != header.header_check:
        raise ProtocolError(f"a frame's header was damaged on its way (its type reads {header.type})")
    if header.type == CHUNK:
        _check_chunk(header)
    elif header.type not in _DECODERS:
        raise ProtocolError(f"frame type {header.type} is unknown or reserved in version {VERSION}")
    elif header.body_bytes > body_limit(header.type):
        raise _too_long(header)
    return header


def _check_chunk(header: FrameHeader) -> None:
    if header.body_bytes > MAX_CHUNK_BYTES:
        raise _too_long(header)
    if not 1 <= header.raw_bytes <= MAX_CHUNK_BYTES:
        raise ProtocolError(f"CHUNK of {header.raw_bytes} decoded bytes; 1 to {MAX_CHUNK_BYTES} are allowed")
    if not 1 <= header.body_bytes <= header.raw_bytes:
        raise ProtocolError(f"CHUNK of {header.body_bytes} bytes on the wire for {header.raw_bytes} decoded")
    if header.codec == RAW and header.body_bytes != header.raw_bytes:
        raise ProtocolError(f"raw CHUNK of {header.body_bytes} bytes says it decodes to {header.raw_bytes}")


def _too_long(header: FrameHeader) -> ProtocolError:
    name, limit = FrameType(header.type).name, body_limit(header.type)
    return ProtocolError(f"{name} announces {header.body_bytes} bytes; the limit is {limit}")


def parse_body(header: FrameHeader, data: Buffer) -> ControlBody:
    """Of a control frame. Raises ProtocolError when the bytes are not those that were sent, or not what the type's
    Struct says."""
    frame_type = FrameType(header.type)
    if checksum(data, header.transfer, 0) != header.checksum:
        raise ProtocolError(f"{frame_type.name} was damaged on its way")
    return _decode(frame_type.name, _DECODERS[frame_type], data)


def _decode(name: str, decoder: msgspec.msgpack.Decoder[B], data: Buffer) -> B:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # RecursionError: a few KiB of nested arrays under a key that nobody knows.
        raise ProtocolError(f"{name}: {error}") from None
