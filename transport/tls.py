"""TLS between the processes of a cluster: contexts from three PEM files, made anew when the files change.

Both sides show a certificate of the cluster's private CA, and no other CA counts. Host names are not compared: what a
certificate vouches for is a node's name and roles (common/identity.py), and those are checked, by KV lanes against
HELLO, by HTTP against the node that was meant.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from prfaas.common.config import TlsConfig
from prfaas.common.errors import ConfigError
from prfaas.common.identity import NOBODY, ROLES, PeerIdentity, read_identity
from prfaas.common.log import get_logger
from prfaas.transport.certificates import read_credentials

MAX_EXPECTATIONS = 10_000
"""Client contexts that are kept, one for each peer that was dialled."""
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2. TLS 1.3's own order begins with AES-256-GCM, which costs a few per cent more than AES-128-GCM; Python
before 3.15 can't change it."""

log = get_logger("tls")


def peer_identity(peercert: Mapping[str, Any] | None) -> PeerIdentity | None:
    """Of a connection's `peercert` (ssl.SSLSocket.getpeercert); None: the peer showed no certificate."""
    if not peercert:
        return None
    return read_identity(value for kind, value in peercert.get("subjectAltName", ()) if kind == "URI")


# -- the contexts -----------------------------------------------------------------------------------------------------


class Tls:
    """What this process shows and whom it trusts. Each method looks whether the files have changed (three `stat`s):
    new connections get what is in them now, connections that are open go on. While the files make no sense together,
    as when they are being replaced, what was read last stays in use, with one warning.

    Raises ConfigError when the files are not good at the start."""

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._seen = self._signature()
        self._credentials = read_credentials(config, time.time())
        self._contexts: dict[object, ssl.SSLContext] = {}
        self._warned = False

    @property
    def identity(self) -> PeerIdentity:
        """Of our own certificate; the name stays what it was at the start."""
        return self._credentials.identity

    @property
    def not_after_s(self) -> float:
        """When our certificate ends, wall clock."""
        return self._credentials.not_after_s

    def server(self, *, client_required: bool = True) -> ssl.SSLContext:
        """Without `client_required` a client may show no certificate; one that it shows must be good."""
        self._refresh()
        key = ("server", client_required)
        context = self._contexts.get(key)
        if context is None:
            context = self._make(ssl.PROTOCOL_TLS_SERVER, ServerContext)
            context.sslobject_class = ServerSSLObject
            context.verify_mode = ssl.CERT_REQUIRED if client_required else ssl.CERT_OPTIONAL
            # A resumed session would outlive its certificates, and Python's clients don't resume any.
            context.num_tickets = 0
            context.options |= ssl.OP_NO_TICKET | ssl.OP_CIPHER_SERVER_PREFERENCE
            self._contexts[key] = context
        return context

    def client(self, *, name: str | None = None, roles: Iterable[str] = ROLES) -> ssl.SSLContext:
        """The handshake fails unless the server is `name` (None: any) in one of `roles`: nothing is sent to another.
        The same object while the files don't change, so that it can be a key of a connection pool."""
        self._refresh()
        key = ("client", name, tuple(roles))
        context = self._contexts.get(key)
        if context is None:
            if len(self._contexts) >= MAX_EXPECTATIONS:
                self._contexts.clear()
            context = self._make(ssl.PROTOCOL_TLS_CLIENT)
            context.sslobject_class = _checking(name, tuple(roles))
            self._contexts[key] = context
        return context

    def _make(self, protocol: int, kind: type[ssl.SSLContext] = ssl.SSLContext) -> ssl.SSLContext:
        credentials = self._credentials
        context = kind(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        context.set_ciphers(CIPHERS)
        context.check_hostname = False  # our own check: see above
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=credentials.ca_pem)
        # What was checked is what is used, though the files may be changing: they are not read again.
        file = os.memfd_create("prfaas-tls", os.MFD_CLOEXEC)
        try:
            os.write(file, credentials.key_pem + b"\n" + credentials.chain_pem)
            context.load_cert_chain(f"/proc/self/fd/{file}")
        finally:
            os.close(file)
        return context

    def _signature(self) -> tuple[object, ...]:
        config = self._config
        return tuple(_stat(path) for path in (config.ca_file, config.cert_file, config.key_file))

    def _refresh(self) -> None:
        now = self._signature()
        if now == self._seen:
            return
        self._seen = now
        before = self._credentials
        try:
            fresh = read_credentials(self._config, time.time())
            if fresh.identity.name != before.identity.name:
                raise ConfigError([f"the new certificate is {fresh.identity.name}'s, this is {before.identity.name}"])
            self._credentials, old_contexts, self._contexts = fresh, self._contexts, {}
            try:
                self._make(ssl.PROTOCOL_TLS_SERVER)
            except (ssl.SSLError, OSError) as error:
                self._credentials, self._contexts = before, old_contexts
                raise ConfigError([f"the new certificate can't be used: {error}"]) from error
        except ConfigError as error:
            if not self._warned:
                self._warned = True
                log.warning("tls files can't be used; the old ones stay in use", reason=str(error))
            return
        self._warned = False
        log.info("tls files have changed; new connections use them", name=fresh.identity.name)


def _stat(path: str) -> tuple[int, ...] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns


accepted_socket: ContextVar[socket.socket | None] = ContextVar("accepted_socket", default=None)
"""In whose context a server's TLS begins. asyncio and uvloop drop what a failed handshake would still say to the other
side (the alert), so it is written to the socket here: or a client would only see that it was hung up on."""


class ServerContext(ssl.SSLContext):
    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **more: Any) -> ssl.SSLObject:
        made = super().wrap_bio(incoming, outgoing, *args, **more)
        if isinstance(made, ServerSSLObject):
            made.outgoing, made.socket = outgoing, accepted_socket.get()
        return made


class ServerSSLObject(ssl.SSLObject):
    outgoing: ssl.MemoryBIO | None = None
    socket: socket.socket | None = None

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError:
            if self.outgoing is not None and self.socket is not None:
                with contextlib.suppress(OSError):
                    self.socket.send(self.outgoing.read())
            raise
        self.socket = None


def _checking(name: str | None, roles: tuple[str, ...]) -> type[ssl.SSLObject]:
    class CheckedSSLObject(ssl.SSLObject):
        """A client's; its handshake ends in an error when the server is not whom we meant."""

        def do_handshake(self) -> None:
            super().do_handshake()
            identity = peer_identity(self.getpeercert()) or NOBODY
            problem = identity.problem(name=name, roles=roles)
            if problem is not None:
                raise WrongPeerError(problem)

    return CheckedSSLObject


class WrongPeerError(ssl.SSLCertVerificationError):
    """A good certificate, but not that of whom we meant to reach."""

    def __str__(self) -> str:
        return str(self.args[0])


# -- words ------------------------------------------------------------------------------------------------------------

_PEER_EXPIRED = "the other side's certificate has expired; renew it with prfaas certs init --force"
_VERIFY = {
    9: "the other side's certificate is not valid yet: are both clocks right?",
    10: _PEER_EXPIRED,
    26: "the other side's certificate is not made for this (its extended key usage)",
}
_UNKNOWN_CA = "the other side's certificate is not signed by this cluster's CA (tls.ca_file)"
_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the other side showed no certificate; set [tls] there",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the other side wants a certificate; set [tls] here",
    "TLSV1_ALERT_UNKNOWN_CA": "the other side does not trust our certificate: it is not signed by the CA there",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the other side says that our certificate has expired; renew it with "
    "prfaas certs init --force, or set its clock right",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the other side does not take our certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the other side does not take our certificate",
    "TLSV1_ALERT_DECRYPT_ERROR": "the other side does not trust our certificate: it is not signed by the CA there",
    "WRONG_VERSION_NUMBER": "the other side does not speak TLS; set [tls] on both",
    "HTTP_REQUEST": "the other side does not speak TLS; set [tls] on both",
    "HTTPS_PROXY_REQUEST": "the other side does not speak TLS; set [tls] on both",
    "RECORD_LAYER_FAILURE": "the other side does not speak TLS; set [tls] on both",
    "PACKET_LENGTH_TOO_LONG": "the other side does not speak TLS; set [tls] on both",
    "UNSUPPORTED_PROTOCOL": "the other side speaks no TLS 1.2 or later",
}


def tls_problem(error: BaseException | None) -> str | None:
    """What a TLS error, or one that wraps it, means and its mend; None: it is no TLS error."""
    found = _tls_error(error)
    if found is None:
        return None
    if isinstance(found, WrongPeerError):
        return f"not whom we meant: {found}"
    if isinstance(found, ssl.SSLCertVerificationError):
        code = getattr(found, "verify_code", None)
        return _VERIFY.get(code, _UNKNOWN_CA) if code is not None else str(found)
    reason = found.reason or ""
    return _REASONS.get(reason) or f"TLS failed: {reason.lower().replace('_', ' ') or found}"


def _tls_error(error: BaseException | None) -> ssl.SSLError | None:
    for _ in range(5):
        if isinstance(error, ssl.SSLError) and not _is_wrapper(error):
            return error
        if error is None:
            return None
        error = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error.__cause__
    return None


def _is_wrapper(error: ssl.SSLError) -> bool:
    """aiohttp's connector errors are TLS errors by name only."""
    return hasattr(error, "os_error") or hasattr(error, "certificate_error")
