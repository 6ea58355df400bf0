"""TLS between services: the settings of a process at its start, and who calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from aiohttp import web
from prfaas.common import log
from prfaas.common.config import TlsConfig, is_loopback, parse_address
from prfaas.common.errors import AuthenticationError, ConfigError
from prfaas.transport.tls import Tls, peer_identity

PROCESS_MARK = "#"
"""Between a router's name and the number of one of its processes; no node has it in its name."""

logger = log.get_logger("tls")


def open_tls(config: TlsConfig, key: str, name: str, role: str) -> Tls | None:
    """None without [tls]. Raises ConfigError when the files are not good, or the certificate isn't that of `name`
    (empty: any) in `role`. `key`: the name's setting."""
    if not config.enabled:
        return None
    tls = Tls(config)
    problem = tls.identity.problem(name=name or None, roles=(role,))
    if problem is not None:
        raise ConfigError(
            [f"tls.cert_file = {config.cert_file!r} does not fit {key} = {name!r} as a {role}: {problem}"]
        )
    return tls


def warn_if_open(binds: Mapping[str, str], tls: Tls | None) -> None:
    """One warning when anything is reached from outside in plain text. `binds`: host:port by the setting's name."""
    exposed = [f"{key} = {bind}" for key, bind in binds.items() if not is_loopback(parse_address(bind)[0])]
    if exposed and tls is None:
        logger.warning(
            "not_encrypted", open_to_others=", ".join(exposed), mend="set [tls]: prfaas certs init makes certificates"
        )


def url_problems(urls: Mapping[str, Iterable[str]], encrypted: bool) -> list[str]:
    """Of URLs by their setting's name: https with [tls], else http."""
    wanted = "https" if encrypted else "http"
    reason = "with [tls] it must be" if encrypted else "without [tls] it must be"
    return [
        f"{key} = {url!r}: {reason} {wanted}://..."
        for key, given in urls.items()
        for url in given
        if url and not url.startswith(f"{wanted}://")
    ]


def check_caller(request: web.Request, name: str, roles: Iterable[str]) -> None:
    """Over TLS: the caller's certificate must be that of `name`, who it says it is, in one of `roles`. The processes of
    one router have one certificate (`name` is router#2). Without TLS nothing is known. Raises AuthenticationError."""
    transport = request.transport
    if transport is None or transport.get_extra_info("ssl_object") is None:
        return
    identity = peer_identity(transport.get_extra_info("peercert"))
    if identity is None:
        raise AuthenticationError("this call is for the cluster's own processes: it needs a certificate of its CA")
    problem = identity.problem(name=name.partition(PROCESS_MARK)[0], roles=roles)
    if problem is not None:
        raise AuthenticationError(f"the caller says that it is {name[:128]}, but {problem}")
