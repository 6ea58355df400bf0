"""Certificates for tests, as `prfaas certs init` makes them."""

from __future__ import annotations

import datetime
from pathlib import Path

from prfaas.common.config import TlsConfig
from prfaas.services.commands.certs import init, parse_node


def make_certificates(directory: Path, *nodes: str, force: bool = False, age_days: int = 0) -> dict[str, TlsConfig]:
    """`name:role[:host]` each, by the CA in `directory`, which is made if need be; good for a year less `age_days`."""
    specs = [parse_node(node) for node in nodes]
    now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=age_days)
    init(directory, specs, now=now, force=force)
    return {spec.name: files_of(directory, spec.name) for spec in specs}


def files_of(directory: Path, name: str) -> TlsConfig:
    return TlsConfig(str(directory / "ca.pem"), str(directory / f"{name}.pem"), str(directory / f"{name}.key"))
