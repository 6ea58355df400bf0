"""TLS of lanes, with real sockets and certificates: who is let in, what each side is told, and new files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
from prfaas.common.config import TlsConfig, TransportConfig, load
from prfaas.common.errors import ConfigError, PeerRefusedError
from prfaas.common.identity import KV_ROLES, PeerIdentity, read_identity
from prfaas.transport.endpoint import KvEndpoint
from prfaas.transport.lanes.api import Lane
from prfaas.transport.lanes.tcp import TcpBackend
from prfaas.transport.tls import Tls

from tests.certificates import files_of, make_certificates
from tests.conformance.kv_harness import FINGERPRINT, SECRET, dense

SOON_S = 10.0


class Recorder:
    """A LaneHandler that keeps what comes; `ended` is done when the lane is lost, with why."""

    def __init__(self) -> None:
        self.lane: Lane | None = None
        self.up = asyncio.Event()
        self.received = bytearray()
        self.came = asyncio.Event()
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._buffer = memoryview(bytearray(1000))

    def connected(self, lane: Lane) -> None:
        self.lane = lane
        self.up.set()

    def next_buffer(self) -> memoryview:
        return self._buffer

    def advance(self, received_bytes: int) -> None:
        self.received += self._buffer[:received_bytes]
        self.came.set()

    def writable(self) -> None:
        pass

    def lost(self, error: Exception | None) -> None:
        self.ended.set_result(error)

    async def until(self, nbytes: int) -> bytes:
        async with asyncio.timeout(SOON_S):
            while len(self.received) < nbytes:
                self.came.clear()
                await self.came.wait()
        return bytes(self.received)


class Server:
    """Accepts lanes with the certificate of `files`; keeps their handlers."""

    def __init__(self, files: TlsConfig | None) -> None:
        self.backend = TcpBackend(TransportConfig(), Tls(files) if files is not None else None)
        self.handlers: list[Recorder] = []

    def accept(self) -> Recorder:
        self.handlers.append(Recorder())
        return self.handlers[-1]

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Server]:
        listener = await self.backend.listen("127.0.0.1", 0, self.accept)
        self.port = listener.address[1]
        try:
            yield self
        finally:
            await listener.aclose()
            for handler in self.handlers:
                assert handler.lane is not None
                handler.lane.abort()
                await handler.ended

    async def accepted(self, lanes: int) -> list[Recorder]:
        """A client of TLS 1.3 is through before its server is."""
        async with asyncio.timeout(SOON_S):
            while len(self.handlers) < lanes:
                await asyncio.sleep(0.002)
        return self.handlers

    async def dialled_by(self, files: TlsConfig | None) -> Recorder:
        handler = Recorder()
        backend = TcpBackend(TransportConfig(), Tls(files) if files is not None else None)
        async with asyncio.timeout(SOON_S):
            await backend.dial("127.0.0.1", self.port, handler)
        return handler


async def refusal(server: Server, files: TlsConfig | None) -> str:
    """Dial, and say something; what the dialling side is told. TLS 1.3 tells a client only after its handshake."""
    try:
        handler = await server.dialled_by(files)
    except PeerRefusedError as error:
        return str(error)
    assert handler.lane is not None
    handler.lane.write([b"hello"])
    async with asyncio.timeout(SOON_S):
        return str(await handler.ended)


async def told(server: Server, context: ssl.SSLContext) -> str:
    """The error that a stock client of the ssl module gets."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
    with pytest.raises(ssl.SSLError) as caught:
        await reader.readexactly(1)
    writer.close()
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        await writer.wait_closed()
    return str(caught.value.reason)


async def warning(logs: list[structlog.typing.EventDict], event: str) -> str:
    async with asyncio.timeout(SOON_S):
        while True:
            for entry in logs:
                if entry["event"] == event:
                    return str(entry["reason"])
            await asyncio.sleep(0.002)


def shown(handler: Recorder) -> PeerIdentity | None:
    assert handler.lane is not None
    return handler.lane.peer_identity


# -- who is let in ----------------------------------------------------------------------------------------------------


async def test_each_side_knows_whom_the_other_ones_certificate_names(tmp_path: Path) -> None:
    """Name and roles are on both lanes, and bytes arrive in order, more of them than one write takes."""
    files = make_certificates(tmp_path, "p1:prefill", "d1:prefill+decode")
    async with Server(files["d1"]).listening() as server:
        near = await server.dialled_by(files["p1"])
        assert near.lane is not None
        assert shown(near) == PeerIdentity("d1", frozenset({"prefill", "decode"}))
        data = os.urandom(3_000_000)
        near.lane.write([memoryview(data)[:10], memoryview(data)[10:]])
        near.lane.close()  # sends what was written first
        [far] = await server.accepted(1)
        assert await far.until(len(data)) == data
        assert shown(far) == PeerIdentity("p1", frozenset({"prefill"}))
        assert await near.ended is None


async def test_another_ca_is_refused_on_both_sides(tmp_path: Path) -> None:
    """A client of another CA: both logs and errors say that the CA is wrong."""
    ours = make_certificates(tmp_path / "ours", "d1:decode")
    theirs = make_certificates(tmp_path / "theirs", "p1:prefill")
    mixed = TlsConfig(str(tmp_path / "both.pem"), theirs["p1"].cert_file, theirs["p1"].key_file)
    (tmp_path / "both.pem").write_bytes(Path(ours["d1"].ca_file).read_bytes() + Path(theirs["p1"].ca_file).read_bytes())
    async with Server(ours["d1"]).listening() as server:
        with structlog.testing.capture_logs() as logs:
            assert "is not signed by this cluster's CA" in await refusal(server, theirs["p1"])
            assert "ended the TLS handshake" in await warning(logs, "connection refused")
        with structlog.testing.capture_logs() as logs:
            # This one trusts us, but not we it.
            assert "not signed by the CA there" in await refusal(server, mixed)
            assert "is not signed by this cluster's CA" in await warning(logs, "connection refused")
        assert server.handlers == []


async def test_a_client_without_certificate_is_refused_on_both_sides(tmp_path: Path) -> None:
    """By the stock client of the ssl module, which trusts our CA."""
    files = make_certificates(tmp_path, "d1:decode")
    context = ssl.create_default_context(cafile=files["d1"].ca_file)
    context.check_hostname = False
    async with Server(files["d1"]).listening() as server:
        with structlog.testing.capture_logs() as logs:
            assert "CERTIFICATE_REQUIRED" in await told(server, context)
            assert "showed no certificate" in await warning(logs, "connection refused")


async def test_one_side_without_tls(tmp_path: Path) -> None:
    """A TLS client at a plain server is told so; a TLS server says it of a plain client."""
    files = make_certificates(tmp_path, "p1:prefill", "d1:decode")
    async with Server(files["d1"]).listening() as server:
        with structlog.testing.capture_logs() as logs:
            await refusal(server, None)
            assert "does not speak TLS" in await warning(logs, "connection refused")

    async def answer_plainly(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"PRFAAS whatever a plain node says")
        writer.close()

    plain = await asyncio.start_server(answer_plainly, "127.0.0.1", 0)
    async with plain:
        server = Server(None)
        server.port = plain.sockets[0].getsockname()[1]
        assert "does not speak TLS" in await refusal(server, files["p1"])


async def test_an_expired_certificate_is_refused_at_start_and_by_peers(tmp_path: Path) -> None:
    """The process itself says so; a peer that shows one all the same is refused, and told."""
    files = make_certificates(tmp_path, "d1:decode", "p1:prefill")
    make_certificates(tmp_path, "p1:prefill", force=True, age_days=400)
    with pytest.raises(ConfigError, match=r"p1.pem' expired on .*prfaas certs init"):
        Tls(files["p1"])
    stale = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stale.check_hostname = False
    stale.load_verify_locations(files["p1"].ca_file)
    stale.load_cert_chain(files["p1"].cert_file, files["p1"].key_file)
    async with Server(files["d1"]).listening() as server:
        with structlog.testing.capture_logs() as logs:
            assert "CERTIFICATE_EXPIRED" in await told(server, stale)
            assert "has expired" in await warning(logs, "connection refused")


async def test_a_router_s_certificate_opens_no_kv_lane(tmp_path: Path) -> None:
    """The dialling side finds it before it has sent a byte."""
    files = make_certificates(tmp_path, "p1:prefill", "r1:router")
    async with Server(files["r1"]).listening() as server:
        assert "allows r1 the role router, not decode or prefill" in await refusal(server, files["p1"])


async def test_strangers_that_say_nothing_hold_nobody_up(tmp_path: Path) -> None:
    """Connections without a handshake are no lanes, and a node gets through beside them."""
    files = make_certificates(tmp_path, "p1:prefill", "d1:decode")
    async with Server(files["d1"]).listening() as server:
        silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(20)]
        near = await server.dialled_by(files["p1"])
        assert len(await server.accepted(1)) == 1
        near.lane.abort()  # type: ignore[union-attr]
        await near.ended
        for _, writer in silent:
            writer.close()


# -- HELLO ------------------------------------------------------------------------------------------------------------


def endpoint(node: str, files: TlsConfig) -> KvEndpoint:
    config = TransportConfig(lanes=1, open_timeout_s=SOON_S)
    return KvEndpoint(
        config,
        node=node,
        layout=dense(),
        model_fingerprint=FINGERPRINT,
        secret=SECRET,
        backend=TcpBackend(config, Tls(files)),
    )


async def test_hello_must_name_the_certificate_s_node(tmp_path: Path) -> None:
    """A node that says another name than its certificate is refused, and told, when it dials and when it is dialled."""
    files = make_certificates(tmp_path, "p1:prefill", "d1:decode", "d2:decode")
    async with contextlib.AsyncExitStack() as stack:

        async def started(node: str, certificate: str) -> KvEndpoint:
            made = await stack.enter_async_context(contextlib.aclosing(endpoint(node, files[certificate])))
            await made.start()
            return made

        good, liar = await started("p1", "p1"), await started("d1", "d2")
        for near, far in ((good, liar), (liar, good)):
            with structlog.testing.capture_logs() as logs:
                near.connect(far.node, far.addresses)
                told = await warning(logs, "kv lane could not be opened; trying again")
                assert told == "HELLO comes from d1, but its certificate is d2's, not d1's"
                if near is liar:
                    assert await warning(logs, "kv lane closed") == told


# -- new files --------------------------------------------------------------------------------------------------------


def replace(source: TlsConfig, target: TlsConfig) -> None:
    for key in ("ca_file", "key_file", "cert_file"):
        shutil.copy(getattr(source, key), getattr(target, key))


async def test_new_files_are_used_by_new_connections(tmp_path: Path) -> None:
    """A new certificate, then a new CA on both sides: new lanes show them; the first lane goes on throughout."""
    server_files = make_certificates(tmp_path / "s", "d1:decode")["d1"]
    client_files = make_certificates(tmp_path / "c", "p1:prefill")["p1"]
    replace(make_certificates(tmp_path / "1", "d1:decode", "p1:prefill")["d1"], server_files)
    replace(files_of(tmp_path / "1", "p1"), client_files)
    async with Server(server_files).listening() as server:
        first = await server.dialled_by(client_files)
        assert shown(first) == PeerIdentity("d1", frozenset({"decode"}))
        make_certificates(tmp_path / "1", "d1:prefill+decode", force=True)
        replace(files_of(tmp_path / "1", "d1"), server_files)
        second = await server.dialled_by(client_files)
        assert shown(second) == PeerIdentity("d1", KV_ROLES)
        replace(make_certificates(tmp_path / "2", "d1:decode", "p1:prefill")["d1"], server_files)
        assert "not signed by" in await refusal(server, client_files)  # it still has the old CA
        replace(files_of(tmp_path / "2", "p1"), client_files)
        third = await server.dialled_by(client_files)
        for near, far in zip((first, second, third), await server.accepted(3), strict=True):
            near.lane.write([b"still here"])  # type: ignore[union-attr]
            assert await far.until(10) == b"still here"
            near.lane.abort()  # type: ignore[union-attr]
            await near.ended


async def test_files_that_make_no_sense_leave_the_old_ones_in_use(tmp_path: Path) -> None:
    """A key that isn't the certificate's, half a file, none, another node's: one warning; good files end it."""
    files = make_certificates(tmp_path, "d1:decode", "d2:decode")
    tls = Tls(files["d1"])
    before = tls.server()
    cert, key = Path(files["d1"].cert_file), Path(files["d1"].key_file)
    good_cert, good_key = cert.read_bytes(), key.read_bytes()
    with structlog.testing.capture_logs() as logs:
        key.write_bytes(Path(files["d2"].key_file).read_bytes())
        assert tls.server() is before
        cert.write_bytes(good_cert[:100])
        assert tls.server() is before
        cert.unlink()
        assert tls.server() is before
        cert.write_bytes(Path(files["d2"].cert_file).read_bytes())  # d2's, and its key is there already
        assert tls.server() is before
        assert tls.identity.name == "d1"
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert "is not the key of" in logs[0]["reason"]
    cert.write_bytes(good_cert)
    key.write_bytes(good_key)
    assert tls.server() is not before


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (lambda f: Path(f.key_file).unlink(), "tls.key_file = .*No such file"),
        (lambda f: Path(f.ca_file).write_text("x"), "tls.ca_file = .* holds no certificate in PEM"),
        (lambda f: Path(f.key_file).write_text("x"), "tls.key_file = .* holds no private key"),
        (lambda f: shutil.copy(Path(f.cert_file).with_name("d2.key"), f.key_file), "is not the key of"),
    ],
)
def test_bad_files_at_the_start_are_one_clear_line(tmp_path: Path, break_it, problem: str) -> None:  # type: ignore[no-untyped-def]
    files = make_certificates(tmp_path, "d1:decode", "d2:decode")["d1"]
    break_it(files)
    with pytest.raises(ConfigError, match=problem):
        Tls(files)


def test_a_certificate_of_another_ca_than_ours_is_found_at_the_start(tmp_path: Path) -> None:
    mine = make_certificates(tmp_path / "1", "d1:decode")["d1"]
    other = make_certificates(tmp_path / "2", "d1:decode")["d1"]
    with pytest.raises(ConfigError, match="is not signed by"):
        Tls(TlsConfig(other.ca_file, mine.cert_file, mine.key_file))


# -- settings and names -----------------------------------------------------------------------------------------------


def test_tls_needs_all_three_files() -> None:
    """One alone is a mistake that names the others; none is no TLS."""
    with pytest.raises(ConfigError, match=r"tls.cert_file and tls.key_file not set"):
        load({"tls": {"ca_file": "ca.pem"}}, {}, {})
    assert not load({}, {}, {}).tls.enabled
    assert load({"tls": {"ca_file": "a", "cert_file": "b", "key_file": "c"}}, {}, {}).tls.enabled


@pytest.mark.parametrize(
    ("uris", "name"),
    [
        (["prfaas://node/a?role=decode", "https://example.com"], "a"),
        (["prfaas://node/a?role=decode", "prfaas://node/b?role=decode"], ""),
        (["prfaas://node/a?role=king"], ""),
        (["prfaas://node/a/b?role=decode"], ""),
        (["prfaas://node/a?role=decode\n"], ""),
        ([], ""),
    ],
)
def test_a_certificate_names_one_node_or_nobody(uris: list[str], name: str) -> None:
    """Two names, an unknown role, or other text are nobody, who is refused everywhere."""
    identity = read_identity(uris)
    assert identity.name == name
    assert (identity.problem() is None) == bool(name)
