"""`prfaas certs init`: a private CA, and a certificate for each node of a cluster.

    ca.pem, ca.key              the CA; ca.key stays with the operator, no process of the cluster needs it
    <name>.pem, <name>.key      a node's: they and ca.pem go to its machine

A certificate names its node and roles as URIs (common/identity.py); hosts are for foreign clients of the router's API,
which compare host names. Keys are EC P-256: a handshake takes a fraction of a millisecond.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from prfaas.common.errors import UsageError
from prfaas.common.identity import NAME_PATTERN, ROLES, identity_uri
from prfaas.services.commands.flags import new_parser, whole

MAX_DAYS = 36500
"""A hundred years: more is a typing error."""
CA_DAYS = 3650
NODE_DAYS = 365
SKEW = datetime.timedelta(minutes=10)
"""Certificates begin a little earlier than they are made: clocks differ."""
MAX_HOST_CHARS = 253
"""Of a DNS name."""

Key = ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class NodeSpec:
    name: str
    roles: tuple[str, ...]
    hosts: tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    parser = new_parser(
        "prfaas certs init",
        "Makes a private CA in DIR, or uses the one that is there, and a certificate for each node.",
        "prfaas certs init --dir certs --nodes r1:router:api.example.com p1:prefill d1:decode",
    )
    parser.add_argument("--dir", required=True, metavar="DIR", help="where the files are; made when it isn't there")
    parser.add_argument(
        "--nodes",
        nargs="+",
        required=True,
        metavar="NAME:ROLE[:HOST,...]",
        help="node.name or router.name; prefill, decode, router or several with +; names or addresses that it has",
    )
    parser.add_argument(
        "--days", type=whole(1, MAX_DAYS), default=NODE_DAYS, metavar="N", help=f"how long they hold [{NODE_DAYS}]"
    )
    parser.add_argument(
        "--ca-days", type=whole(1, MAX_DAYS), default=CA_DAYS, metavar="N", help=f"the same of a new CA [{CA_DAYS}]"
    )
    parser.add_argument("--force", action="store_true", help="replace certificates and keys of these nodes, not the CA")
    given = parser.parse_args(argv)
    for line in init(
        Path(given.dir),
        [parse_node(text) for text in given.nodes],
        now=datetime.datetime.now(datetime.UTC),
        days=given.days,
        ca_days=given.ca_days,
        force=given.force,
    ):
        print(line)
    return 0


def parse_node(text: str) -> NodeSpec:
    """`name:role[:host,...]`; several roles with `+`. Raises UsageError."""
    name, _, rest = text.partition(":")
    role_text, _, host_text = rest.partition(":")
    roles = tuple(dict.fromkeys(role_text.split("+")))
    hosts = tuple(host.strip("[]") for host in host_text.split(",") if host)
    if not re.fullmatch(NAME_PATTERN, name) or name == "ca":
        raise UsageError(f"--nodes {text}: a name has 1 to 128 letters, digits and ._- and is not ca")
    if not all(role in ROLES for role in roles):
        raise UsageError(f"--nodes {text}: after the name comes its role, {', '.join(ROLES)}, or several with +")
    for host in hosts:
        _general_name(host, text)
    return NodeSpec(name, roles, hosts)


def _general_name(host: str, text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if len(host) > MAX_HOST_CHARS or not re.fullmatch(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", host):
        raise UsageError(f"--nodes {text}: {host!r} is neither a host's name nor an address")
    return x509.DNSName(host)


def init(
    directory: Path,
    nodes: Sequence[NodeSpec],
    *,
    now: datetime.datetime,
    days: int = NODE_DAYS,
    ca_days: int = CA_DAYS,
    force: bool = False,
) -> list[str]:
    """Makes what isn't there; returns a line for each thing made. Raises UsageError, and then has changed nothing."""
    _check_free(directory, nodes, force)
    ca_file, ca_key_file = directory / "ca.pem", directory / "ca.key"
    made = []
    if ca_file.exists() or ca_key_file.exists():
        ca, ca_key = _load_ca(ca_file, ca_key_file)
    else:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        ca, ca_key = _make_ca(now, ca_days)
        _write_key(ca_key_file, ca_key)
        _write(ca_file, _pem(ca), 0o644)
        made.append(f"{ca_file}: a new CA, good until {ca.not_valid_after_utc:%Y-%m-%d}; keep {ca_key_file} away")
    if ca.not_valid_after_utc <= now:
        raise UsageError(f"{ca_file} expired on {ca.not_valid_after_utc:%Y-%m-%d}; begin anew in another directory")
    for node in nodes:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _make_certificate(node, key, ca, ca_key, now, days)
        # The key first: between the two a process that reads them keeps what it has.
        _write_key(directory / f"{node.name}.key", key)
        _write(directory / f"{node.name}.pem", _pem(certificate), 0o644)
        until = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
        made.append(f"{directory / node.name}.pem: {node.name} ({', '.join(node.roles)}), good until {until}")
    return made


def _check_free(directory: Path, nodes: Sequence[NodeSpec], force: bool) -> None:
    names = [node.name for node in nodes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--nodes names {twice} twice; a node with several roles is {twice}:prefill+decode")
    there = [path for name in names for path in (directory / f"{name}.pem", directory / f"{name}.key") if path.exists()]
    if there and not force:
        raise UsageError(f"{there[0]} is there already; --force replaces it")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"--dir {directory} is no directory")


def _load_ca(ca_file: Path, ca_key_file: Path) -> tuple[x509.Certificate, Key]:
    try:
        ca = x509.load_pem_x509_certificate(ca_file.read_bytes())
        key: Any = serialization.load_pem_private_key(ca_key_file.read_bytes(), password=None)
    except OSError as error:
        raise UsageError(f"the CA is not complete: {error.filename}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise UsageError(f"{ca_file} and {ca_key_file} are no certificate and key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != ca.public_key():
        raise UsageError(f"{ca_key_file} is not the key of {ca_file}")
    return ca, key


def _make_ca(now: datetime.datetime, days: int) -> tuple[x509.Certificate, Key]:
    key = ec.generate_private_key(ec.SECP256R1())
    # Different names for different CAs, or OpenSSL takes one for the other and speaks of a bad signature.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"PrfaaS cluster CA {os.urandom(4).hex()}")])
    certificate = (
        _builder(name, name, key, now, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def _make_certificate(
    node: NodeSpec, key: Key, ca: x509.Certificate, ca_key: Key, now: datetime.datetime, days: int
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node.name[:64])])
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(identity_uri(node.name, role)) for role in node.roles
    ]
    names += [_general_name(host, host) for host in node.hosts]
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return (
        _builder(subject, ca.subject, key, now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Key, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


# -- files ------------------------------------------------------------------------------------------------------------


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_key(path: Path, key: Key) -> None:
    _write(
        path,
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        0o600,
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all, and never readable by others before it has its mode."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UsageError(f"{path} can't be written: {error.strerror}") from None
