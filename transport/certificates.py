"""The PEM files of a process: read, and checked to fit one another before they are used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from prfaas.common.config import TlsConfig
from prfaas.common.errors import ConfigError
from prfaas.common.identity import NOBODY, PeerIdentity, read_identity

MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Credentials:
    """The three files' contents, checked: they fit one another and are valid now."""

    ca_pem: str
    chain_pem: bytes
    key_pem: bytes
    identity: PeerIdentity
    not_after_s: float
    """Wall clock."""


def read_credentials(config: TlsConfig, now_s: float) -> Credentials:
    """Raises ConfigError with every problem of the files, each with its mend. now_s: wall clock."""
    problems: list[str] = []
    ca_pem, chain_pem, key_pem = (
        _read(key, getattr(config, key), problems) for key in ("ca_file", "cert_file", "key_file")
    )
    if problems:
        raise ConfigError(problems)
    ca = _certificates("ca_file", config.ca_file, ca_pem, problems)
    chain = _certificates("cert_file", config.cert_file, chain_pem, problems)
    try:
        key: Any = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        problems.append(f"tls.key_file = {config.key_file!r} holds no private key in PEM without a password")
    if problems:
        raise ConfigError(problems)
    own = chain[0]
    if _public(own.public_key()) != _public(key.public_key()):
        problems.append(f"tls.key_file = {config.key_file!r} is not the key of tls.cert_file = {config.cert_file!r}")
    if not _signed_by(chain, ca):
        problems.append(f"tls.cert_file = {config.cert_file!r} is not signed by tls.ca_file = {config.ca_file!r}")
    identity = certificate_identity(own)
    problems += [f"tls.cert_file = {config.cert_file!r} {problem}" for problem in _own_problems(own, identity, now_s)]
    if problems:
        raise ConfigError(problems)
    not_after_s = own.not_valid_after_utc.timestamp()
    return Credentials(ca_pem.decode("ascii", "replace"), chain_pem, key_pem, identity, not_after_s)


def _own_problems(own: x509.Certificate, identity: PeerIdentity, now_s: float) -> Iterator[str]:
    if now_s >= own.not_valid_after_utc.timestamp():
        yield f"expired on {own.not_valid_after_utc:%Y-%m-%d}; make a new one: prfaas certs init --force"
    if now_s < own.not_valid_before_utc.timestamp():
        yield f"is valid from {own.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on: is this machine's clock right?"
    if not identity.name:
        yield "names no node: make it with prfaas certs init"


def _read(key: str, path: str, problems: list[str]) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        problems.append(f"tls.{key} = {path!r}: {error.strerror}")
        return b""
    if len(data) > MAX_FILE_BYTES:
        problems.append(f"tls.{key} = {path!r} is larger than {MAX_FILE_BYTES} bytes")
    return data


def _certificates(key: str, path: str, pem: bytes, problems: list[str]) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        problems.append(f"tls.{key} = {path!r} holds no certificate in PEM")
        return []


def _public(key: Any) -> bytes:
    encoded: bytes = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return encoded


def _signed_by(chain: list[x509.Certificate], ca: list[x509.Certificate]) -> bool:
    """The first one, by way of the others or directly."""
    current, between = chain[0], chain[1:]
    while True:
        if any(_issued(current, issuer) for issuer in ca):
            return True
        if not between or not _issued(current, between[0]):
            return False
        current, between = between[0], between[1:]


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def certificate_identity(certificate: x509.Certificate) -> PeerIdentity:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return NOBODY
    return read_identity(names.get_values_for_type(x509.UniformResourceIdentifier))
