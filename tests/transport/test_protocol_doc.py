"""transport/PROTOCOL.md is what another implementation is written from, so what it says is compared with the code: its
tables with the structs and constants, its test vectors with what this implementation makes and reads."""

from __future__ import annotations

import hashlib
import importlib
import re
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from struct import Struct, calcsize
from typing import Any, Union, get_args, get_origin

import msgspec
import pytest
from prfaas.common import kv_layout
from prfaas.common.config import ClusterConfig, TransportConfig
from prfaas.common.errors import NoRoomError, ProtocolError, TransferError
from prfaas.common.kv_layout import KvLayout, LayerLayout, TensorKind, TensorLayout, TokenRange
from prfaas.transport import fetching, frames, handshake, negotiation, transfer
from prfaas.transport.api import TransferSpec
from prfaas.transport.codecs.api import ChunkForm
from prfaas.transport.codecs.registry import CODECS, codec_by_name
from prfaas.transport.connection import TRANSITIONS, LaneConnection
from prfaas.transport.frames import (
    BODY_TYPES,
    FROM_RECEIVER,
    HEADER,
    Ack,
    FrameHeader,
    FrameType,
    Hello,
    Ping,
    body_limit,
    checksum,
    encode_chunk_header,
    encode_control,
)
from prfaas.transport.handshake import signed
from prfaas.transport.lanes import ucx_wire
from prfaas.transport.ticket import Claims, TicketBook

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "transport" / "PROTOCOL.md").read_text()
SECRET = b"secret"

Row = list[str]


def sections() -> dict[str, str]:
    """heading → the text up to the next heading of any level."""
    parts = re.split(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)
    assert len(set(parts[1::2])) == len(parts[1::2]), "two sections have the same heading"
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(heading: str) -> list[list[Row]]:
    """The tables under a heading: rows of cells, without the head, without backticks."""
    found: list[list[Row]] = [[]]
    for line in sections()[heading].splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            found[-1].append([cell.strip().replace("`", "").replace("\\|", "|") for cell in cells])
        elif found[-1]:
            found.append([])
    return [rows[2:] for rows in found if rows]


def table(heading: str) -> list[Row]:
    (found,) = tables(heading)
    return found


def constant(name: str) -> Any:
    """`module.NAME`, the module in any of the folders that the page is about."""
    module, _, attribute = name.partition(".")
    for package in ("prfaas.transport", "prfaas.transport.lanes", "prfaas.common"):
        try:
            return getattr(importlib.import_module(f"{package}.{module}"), attribute)
        except ModuleNotFoundError:
            continue
    raise LookupError(name)


# -- frames -----------------------------------------------------------------------------------------------------------


def test_the_header_has_the_fields_at_the_offsets_that_the_page_says() -> None:
    """Name, offset and width of each field, and the struct's format in the text."""
    codes = HEADER.format.lstrip("<")
    offsets = [calcsize(f"<{codes[:i]}") for i in range(len(codes))]
    expected = [
        [str(offset), str(calcsize(f"<{code}")), name]
        for offset, code, name in zip(offsets, codes, FrameHeader._fields, strict=True)
    ]
    assert [row[:3] for row in table("The header")] == expected
    assert f"the same {HEADER.size} bytes, `{HEADER.format}`" in sections()["The header"]
    assert f"{frames.MAGIC:#x}" in table("The header")[0][3].lower()
    assert (frames.VERSION,) == frames.SUPPORTED_VERSIONS == (int(table("The header")[1][3]),)


def test_every_frame_is_listed_with_its_number_and_the_limit_of_its_body() -> None:
    """LINK is reserved: it has a number and no body."""
    rows = {row[1]: row for row in table("The frames")}
    assert {name: int(row[0]) for name, row in rows.items()} == {frame.name: frame.value for frame in FrameType}
    for frame in FrameType:
        reserved = frame not in BODY_TYPES and frame is not FrameType.CHUNK
        assert rows[frame.name][4] == ("" if reserved else str(body_limit(frame)))


def test_the_direction_bit_is_what_lanes_check() -> None:
    """The frames that the page says need the bit are refused without it, and the other way round."""
    said = re.search(
        r"wrong direction bit on (.+?) \(must be 0\) and on (.+?) \(must be 1\)",
        sections()["The frames"].replace("\n", " "),
    )
    assert said is not None
    must_be = [set(re.findall("[A-Z]+", names)) for names in said.groups()]
    column = {row[1]: row[3] for row in table("The frames")}
    for frame in set(FrameType) - {FrameType.LINK, FrameType.HELLO}:
        taken = [is_taken(frame, flags) for flags in (0, FROM_RECEIVER)]
        assert taken == [frame.name not in must_be[1], frame.name not in must_be[0]], frame.name
        assert all(column[frame.name] == str(flags) for flags in (0, 1) if frame.name in must_be[flags])


def is_taken(frame: FrameType, flags: int) -> bool:
    """Whether an open lane takes the frame's header."""
    fields = FrameHeader(frames.MAGIC, frames.VERSION, frame, flags, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0)
    header = frames.encode_header(fields)
    connection = LaneConnection(lambda _chunk: None)
    connection.accept()
    connection.next_buffer()[:] = header
    try:
        connection.advance(len(header))
    except ProtocolError:
        return False
    return True


def test_the_states_of_a_lane_take_the_frames_that_the_page_says() -> None:
    expected = {
        state.value: {FrameType(frame).name: after.value for frame, after in legal.items()}
        for state, legal in TRANSITIONS.items()
    }
    said: dict[str, dict[str, str]] = {}
    for state, transitions in table("States of a lane"):
        said[state] = {}
        for part in transitions.split(";") if transitions != "nothing" else ():
            names, _, after = part.partition("→")
            said[state].update(dict.fromkeys(re.findall("[A-Z]+", names), after.strip()))
    assert said == expected


# -- bodies -----------------------------------------------------------------------------------------------------------


def in_words(annotation: Any) -> str:
    """A field's type as the page writes it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join("nil" if a is type(None) else in_words(a) for a in arguments)
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return f"[{in_words(arguments[0])}]"
    if origin is tuple:
        return f"[{', '.join(map(in_words, arguments))}]"
    if origin is dict:
        return f"{{{in_words(arguments[0])}: {in_words(arguments[1])}}}"
    return str(annotation.__name__)


def default_in_words(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()  # type: ignore[operator, misc]
    if value == b"":
        return "empty"
    return "nil" if value is None else msgspec.json.encode(value).decode().replace(",", ", ").replace("null", "nil")


@pytest.mark.parametrize(
    ("heading", "body"),
    [*((frame.name, body) for frame, body in BODY_TYPES.items()), ("Tickets", Claims)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_key_of_a_body_is_listed_with_its_type_and_default(heading: str, body: type[msgspec.Struct]) -> None:
    assert [row[:3] for row in tables(heading)[0]] == keys_of(body)


def test_every_key_that_a_hello_signs_is_listed_with_its_type_and_default() -> None:
    assert [row[:3] for row in tables("HELLO")[1]] == keys_of(Hello)


def keys_of(body: type[msgspec.Struct]) -> list[Row]:
    return [[f.encode_name, in_words(f.type), default_in_words(f)] for f in msgspec.structs.fields(body)]


# -- words and numbers ------------------------------------------------------------------------------------------------


def test_every_codec_is_listed() -> None:
    """raw is number 0, and no codec to the registry."""
    expected = [["0", "raw", "yes"]]
    expected += [[str(n), codec.name, "yes" if codec.lossless else "no"] for n, codec in sorted(CODECS.items())]
    assert table("Codecs") == expected


def test_the_reasons_of_cancel_are_those_of_the_transfers_errors() -> None:
    """All but "no room", which is an answer to OPEN."""

    def reasons(error: type[TransferError]) -> Iterator[str]:
        yield error.reason
        for below in error.__subclasses__():
            yield from reasons(below)

    _, cancel = tables("Errors")
    assert {row[0] for row in cancel} == set(reasons(TransferError)) - {NoRoomError.reason}


def test_the_codes_of_error_are_those_that_the_code_sends() -> None:
    """A word is listed if and only if some call that closes a lane gives it, or has it as its default."""
    source = "".join(path.read_text() for path in sorted((ROOT / "transport").glob("*.py")))
    sent = set(re.findall(r"\.(?:close|fail)\([^\n]*, \"([a-z_]+)\"\)", source))
    sent |= set(re.findall(r"code: str = \"([a-z_]+)\"", source))
    error, _ = tables("Errors")
    assert {row[0] for row in error} == sent


def test_every_limit_has_the_value_that_the_page_says() -> None:
    limits, _ = tables("Limits")
    said = {name: int(value) for name, value, _ in limits}
    assert said == {name: constant(name) for name in said}


def test_every_limit_of_the_pure_modules_is_listed() -> None:
    """A new bound on what a peer may send is a part of the protocol."""
    said = {row[0] for row in tables("Limits")[0]}
    for module in (frames, handshake, transfer, fetching, negotiation, ucx_wire, kv_layout):
        assert module.__file__ is not None
        names = re.findall(r"^((?:MAX|MIN)_\w+)", Path(module.__file__).read_text(), flags=re.MULTILINE)
        assert {f"{module.__name__.rpartition('.')[2]}.{name}" for name in names} <= said


def test_every_setting_has_the_default_that_the_page_says() -> None:
    """And a setting that the prose names is one."""
    defaults: dict[str, Any] = {}
    for section, config in (("transport", TransportConfig()), ("cluster", ClusterConfig())):
        assert is_dataclass(config)
        defaults |= {f"{section}.{f.name}": getattr(config, f.name) for f in fields(config)}
    _, settings = tables("Limits")
    assert {name: float(value) for name, value, _ in settings} == {row[0]: defaults[row[0]] for row in settings}
    assert {row[0] for row in settings} >= set(re.findall(r"`((?:transport|cluster)\.\w+)`", TEXT))


def test_every_element_type_and_kind_is_named() -> None:
    text = sections()["What a transfer carries"]
    assert {name for name in re.findall(r"`(\w+)`", text) if name in kv_layout.DTYPE_BYTES} == set(
        kv_layout.DTYPE_BYTES
    )
    said = {kind for row in table("What a transfer carries") for kind in re.findall(r"(\w+)", row[0])}
    assert set(TensorKind) <= said


def test_links_inside_the_page_lead_somewhere() -> None:
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in sections()}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


# -- test vectors -----------------------------------------------------------------------------------------------------

BYTES, TEXTS, DECODED = tables("Test vectors")
LAYOUT = KvLayout(
    (
        LayerLayout(
            (
                TensorLayout(TensorKind.KEY, "bfloat16", 2, (64,)),
                TensorLayout(TensorKind.VALUE, "bfloat16", 2, (64,), 128),
            )
        ),
        LayerLayout(()),
        LayerLayout((TensorLayout(TensorKind.CONV, "float32", 1, (4, 8)),)),
    )
)
HELLO = Hello(
    versions=(1,),
    node="a",
    session="0123456789abcdef" * 2,
    lane=0,
    lanes=2,
    model_fingerprint="f" * 32,
    time_s=1000.0,
    nonce="n1",
    codecs=("raw", "zstd"),
)
ANSWER = msgspec.structs.replace(HELLO, node="b", nonce="n2", time_s=1000.5, answer=True)


def test_the_vectors_of_frames_are_what_this_side_sends() -> None:
    data = bytes(range(8))
    place = (3, 1, 0, 256)
    chunk = encode_chunk_header(1, 2, place, 8, 8, frames.RAW, checksum(data, 1, 2)) + data
    greeting = ucx_wire.Greeting((1, 20), b"addr", 0x0102030405060708, b"D" * 16)
    expected = [
        encode_control(Ping(1.5)),
        encode_control(Ack(chunks=[1, 300]), 7, FROM_RECEIVER),
        chunk,
        msgspec.msgpack.encode(HELLO),
        signed(HELLO, SECRET).mac,
        msgspec.msgpack.encode(ANSWER),
        signed(ANSWER, SECRET, HELLO.nonce).mac,
        ucx_wire.encode_greeting(greeting, SECRET, "dialler", b"A" * 16),
    ]
    assert [row[1] for row in BYTES] == [value.hex() for value in expected]


def test_the_vectors_of_hash_and_ticket_are_what_this_side_makes() -> None:
    spec = TransferSpec("0" * 32, "r", TokenRange(0, 9), 10, 4, "f" * 32, LAYOUT.layout_hash)
    hashed, source, ticket = (row[1] for row in TEXTS)
    assert hashed == LAYOUT.layout_hash == hashlib.blake2b(source.encode(), digest_size=16).hexdigest()
    assert ticket == TicketBook(bytes(range(32)), "d").issue(spec, 100.0)


def test_the_vectors_of_codecs_decode_to_what_the_page_says() -> None:
    for name, kind, body, decoded in DECODED:
        codec = codec_by_name(name.partition(",")[0])
        assert codec is not None
        out = bytearray(len(decoded) // 2)
        form = ChunkForm(TensorKind(kind.partition(" ")[0]), "bfloat16", 2)
        codec.decode(memoryview(bytes.fromhex(body)), memoryview(out), form)
        assert out.hex() == decoded
    assert {row[0].partition(",")[0] for row in DECODED} == {codec.name for codec in CODECS.values()}


def test_the_messages_of_a_ucx_lane_have_the_layout_that_the_page_says() -> None:
    """Packed by the page's formats they are byte for byte what this side sends."""
    (rows,) = tables("Lanes over UCX")
    formats = {name: Struct(layout) for name, layout, _ in rows}
    assert formats["CHALLENGE"].pack(b"PUC1", b"N" * 16) == ucx_wire.encode_challenge(b"N" * 16)
    assert formats["END"].pack(b"PUE1", 5) == ucx_wire.encode_end(5)
    message = bytearray(formats["message"].size)
    ucx_wire.put_header(message, 9, ucx_wire.DATA, 3)
    assert formats["message"].pack(9, 0, 3) == message
    greeting = ucx_wire.encode_greeting(ucx_wire.Greeting((1, 20), b"addr", 7, b"n" * 16), SECRET, "dialler", b"c")
    packed = formats["GREETING"].unpack_from(greeting)
    assert packed[:-1] == (b"PUG1", 1, 20, 4, 7, b"n" * 16)
    assert len(greeting) == formats["GREETING"].size + 4
    assert f"at most {ucx_wire.MESSAGE_BYTES} bytes each" in sections()["Lanes over UCX"].replace("\n", " ")
