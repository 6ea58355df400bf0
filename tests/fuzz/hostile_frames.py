"""Bytes that a hostile or broken peer may send: valid frames of every type, and what mutations make of them.

All of it follows from the `random.Random` that is given.
"""

from __future__ import annotations

import base64
import math
import random
from typing import Any

import msgspec
from prfaas.transport import frames
from prfaas.transport.frames import HEADER, HEADER_BYTES, FrameType

MAX_DEPTH = 3000
NUMBERS = (
    *(0, 1, 2, 3, 47, 48, 127, 128, 255, 256, 4095, 4096, 4097, 65535, 65536, 65537, 1 << 18, 1 << 24, (1 << 24) + 1),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
)
VALUES: tuple[Any, ...] = (
    *NUMBERS, -1, -(1 << 63), 0.0, 1e308, math.nan, math.inf, -math.inf, "", "x", "x" * 1001, "é" * 300, "0" * 32, b"",
    b"\x00" * 32, None, True, False, [], {}, [1], [[]], {"x": [1.5]}, [0] * 500,
)  # fmt: skip
FIELD_BITS = (16, 8, 8, 16, 8, 8, 32, 32, 16, 16, 32, 64, 32, 32, 64, 64)  # as frames.HEADER
HELLO_FIELDS = frames.Hello((1,), "near", "0" * 32, 0, 4, "f" * 32, 1000.0, "nonce", ("raw", "lz4"), ("a",), "here")
BODIES = (
    frames.SignedHello(frames.encode_hello(HELLO_FIELDS), b"m" * 32),
    frames.Open("ticket", 1, "0" * 32, 0, 700, 0, 1, 0, None, "f" * 32, "h" * 32, {"key": "bfloat16"}, 30.0, 1),
    frames.Opened(1, 65536),
    frames.Opened(2, no_room=True, retry_after_s=0.05),
    frames.Opened(3, refused="no", kind="ticket"),
    frames.Credit(1 << 20),
    frames.Ack([1, 2, 3], [4], False),
    frames.Ack(finished=True),
    frames.Finish({"queued_s": 1.0, "computed_s": [1.0, 2.0, 3.0]}),
    frames.Cancel("cancelled", "the client left"),
    frames.Fetch("ticket", b"h" * 16, 0, 700, 30.0),
    frames.Fetched("not held"),
    frames.Resume([1, 2], 3, answer=True),
    frames.Ping(12.5),
    frames.Pong(12.5, 13.0),
    frames.Error("protocol", "why"),
)  # fmt: skip
_RECEIVERS = (frames.Opened, frames.Credit, frames.Ack)
HELLO = frames.encode_control(BODIES[0])


def header_for(type: FrameType, data: bytes, flags: int = 0) -> bytes:
    """That of a control frame whose body is `data`, good or not."""
    check = frames.checksum(data, 1, 0)
    header = frames.FrameHeader(frames.MAGIC, 1, type, flags, 0, 0, len(data), 1, 0, 0, 0, 0, 0, 0, check, 0)
    return frames.encode_header(header)


class HostileFrames:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def stream(self) -> bytes:
        """What one lane sends: up to six frames, most of them after a good HELLO, most of them damaged somehow."""
        rng = self.rng
        parts = [HELLO] if rng.random() < 0.8 else []
        parts += [self.frame() for _ in range(rng.randrange(6))]
        data = b"".join(parts)
        return self.damaged(data) if rng.random() < 0.3 else data

    def frame(self) -> bytes:
        rng, kind = self.rng, self.rng.random()
        if kind < 0.3:
            frame = self.chunk()
        elif kind < 0.7:
            body = rng.choice(BODIES)
            flags = frames.FROM_RECEIVER if isinstance(body, _RECEIVERS) else 0
            frame = frames.encode_control(body, rng.choice((0, 1, 2)), flags)
        else:
            type = rng.choice(tuple(frames.BODY_TYPES))
            flags = frames.FROM_RECEIVER if type in (FrameType.OPENED, FrameType.CREDIT, FrameType.ACK) else 0
            data = self.body(type)[: frames.body_limit(type)]
            frame = header_for(type, data, flags) + data
        return self.header_changed(frame) if rng.random() < 0.25 else frame

    def chunk(self) -> bytes:
        """Most of them where a small transfer has room; see `targets.SPEC`."""
        rng = self.rng
        size, codec = rng.choice((1, 2, 8, 40, 296, 300)), rng.choice((0, 0, 0, 1, 2, 9))
        wire = size if codec == 0 else rng.randint(1, size)
        data = rng.randbytes(wire)
        place = (
            rng.choice((0, 0, 1, 2, 9)),
            rng.randrange(3),
            rng.randrange(3),
            rng.choice((0, 0, 8, 80, 295, 1 << 40)),
        )
        sequence = rng.getrandbits(8)
        check = frames.checksum(data, 1, sequence) if rng.random() < 0.7 else rng.getrandbits(64)
        return frames.encode_chunk_header(1, sequence, place, size, wire, codec, check) + data

    def header_changed(self, frame: bytes) -> bytes:
        """One or two fields of the header have another value; mostly the sender's fault, so that the checks fit."""
        rng = self.rng
        fields = list(HEADER.unpack_from(frame))
        for _ in range(rng.choice((1, 1, 2))):
            field = rng.randrange(len(fields))
            value = rng.choice(NUMBERS) if rng.random() < 0.6 else fields[field] + rng.choice((-1, 1))
            fields[field] = value % (1 << FIELD_BITS[field])
        header, body = frames.FrameHeader._make(fields), frame[HEADER_BYTES:]
        kind = rng.random()
        if kind < 0.1:
            return HEADER.pack(*header) + body
        if kind < 0.9 and header.type != FrameType.CHUNK:
            header = header._replace(checksum=frames.checksum(body, header.transfer, header.sequence))
        return frames.encode_header(header) + body

    def damaged(self, data: bytes) -> bytes:
        """Bits flipped, bytes dropped, doubled or put in, the end cut off."""
        rng, damaged = self.rng, bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(damaged) + 1)
            match rng.randrange(5):
                case 0 if damaged:
                    damaged[at % len(damaged)] ^= 1 << rng.randrange(8)
                case 1:
                    del damaged[at : at + rng.choice((1, 2, 48, 100))]
                case 2:
                    damaged[at:at] = damaged[at : at + rng.choice((1, 8, 48, 200))]
                case 3:
                    damaged[at:at] = rng.randbytes(rng.choice((1, 4, 48, 300)))
                case _:
                    del damaged[at:]
        return bytes(damaged)

    def body(self, type: FrameType) -> bytes:
        """A msgpack map of that type with some fields wrong, or nested too deeply, or no msgpack at all."""
        rng = self.rng
        if rng.random() < 0.1:
            return self.deep()
        if rng.random() < 0.02:
            return self.large(type)
        if rng.random() < 0.1:
            return rng.randbytes(rng.randrange(1, 100))
        return self._changed(rng.choice([body for body in BODIES if isinstance(body, frames.BODY_TYPES[type])]))

    def hello(self) -> bytes:
        """What a HELLO's `hello` may hold."""
        return self.deep() if self.rng.random() < 0.1 else self._changed(HELLO_FIELDS)

    def _changed(self, body: frames.Body) -> bytes:
        rng = self.rng
        fields: dict[Any, Any] = msgspec.to_builtins(body, builtin_types=(bytes,))
        for _ in range(rng.choice((0, 1, 1, 2))):
            name = rng.choice((*fields, "unknown"))
            if rng.random() < 0.2:
                fields.pop(name, None)
            else:
                fields[name] = self.value()
        data = msgspec.msgpack.encode(fields)
        return self.damaged(data) or b"\xc0" if rng.random() < 0.3 else data

    def value(self) -> Any:
        rng = self.rng
        if rng.random() < 0.1:
            return {str(i): rng.choice(NUMBERS) for i in range(rng.choice((1, 30)))}
        if rng.random() < 0.1:
            return [rng.choice(VALUES) for _ in range(rng.choice((1, 30)))]
        return rng.choice(VALUES)

    def deep(self) -> bytes:
        """Nested lists or maps, under a key that is known, one that is not, or none."""
        rng = self.rng
        prefix = rng.choice((b"", b"\x81\xa1x", b"\x81\xa7timings", b"\x81\xa6chunks", b"\x81\xa8versions"))
        nested = rng.choice((b"\x91", b"\x81\xa1x", b"\x81", b"\xdc\xff\xff", b"\xdf\xff\xff\xff\xff"))
        return prefix + nested * rng.choice((1, 30, 400, MAX_DEPTH // len(nested)))

    def large(self, type: FrameType) -> bytes:
        """About as many objects as fit."""
        rng, room = self.rng, frames.body_limit(type)
        many: Any = rng.choice(
            (
                lambda: {"chunks": list(range(room // 3 - 10))},
                lambda: {"chunks": [1 << 40] * (room // 9 - 10)},
                lambda: {"timings": {"computed_s": [1.5] * (room // 9 - 10)}},
                lambda: {"timings": {f"{i:x}": 1.5 for i in range(room // 16)}},
                lambda: {"dtypes": {f"{i:x}": "" for i in range(room // 9)}},
                lambda: {"versions": [1] * (room - 100)},
            )
        )()
        body = next(body for body in BODIES if isinstance(body, frames.BODY_TYPES[type]))
        return msgspec.msgpack.encode(msgspec.to_builtins(body, builtin_types=(bytes,)) | many)[:room]

    def ticket(self, genuine: str) -> str:
        """Text that is presented as a ticket."""
        rng, kind = self.rng, self.rng.random()
        if kind < 0.2:
            return genuine
        claims, _, mac = genuine.partition(".")
        if kind < 0.5:
            fields = msgspec.msgpack.decode(base64.urlsafe_b64decode(claims))
            for _ in range(rng.choice((1, 2))):
                fields[rng.choice((*fields, "unknown"))] = self.value()
            return f"{base64.urlsafe_b64encode(msgspec.msgpack.encode(fields)).decode()}.{mac}"
        if kind < 0.6:
            return f"{base64.urlsafe_b64encode(self.deep()).decode()}.{mac}"
        if kind < 0.9:
            return self.damaged(genuine.encode()).decode("latin-1")
        return rng.choice(
            ("", ".", "é", "\x00", "A" * 5000, f"{mac}.{mac}", f"{claims}.", f".{mac}", f"{genuine}.{mac}")
        )
