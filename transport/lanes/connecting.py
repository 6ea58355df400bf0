"""Dialling a name that has several addresses, some of which may lead nowhere."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from typing import Any

import aiohappyeyeballs
from aiohappyeyeballs import AddrInfoType

NEXT_ADDRESS_S = 0.25
"""After so long without an answer the next address is tried beside it (RFC 8305): one that is blackholed, as IPv6 often
is, would use up all the time there is for a lane."""


async def way_to(host: str, port: int) -> dict[str, Any]:
    """For `create_connection`: a connected `sock` where there was a choice, else `host` and `port`. uvloop has no happy
    eyeballs of its own. Raises OSError."""
    if _is_address(host):  # threads that wait for a resolver must not keep it waiting too
        return {"host": host, "port": port}
    addresses = await resolve(host, port)
    if len(addresses) == 1:
        # uvloop's `sock_connect` loses the interface of a link-local address, its `create_connection` does not.
        return {"host": host, "port": port}
    try:
        sock = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_S)
    except RuntimeError as error:  # uvloop's word for some of them
        raise OSError(f"{host}:{port}: {error}") from error
    return {"sock": sock}


async def resolve(host: str, port: int) -> Sequence[AddrInfoType]:
    """Raises OSError."""
    return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
