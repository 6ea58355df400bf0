"""Dialling a name that has several addresses, some of which may lead nowhere."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import aiohappyeyeballs
from aiohappyeyeballs import AddrInfoType

NEXT_ADDRESS_S = 0.25
"""After so long without an answer the next address is tried beside it (RFC 8305): one that is blackholed, as IPv6 often
is, would use up all the time there is for a lane."""


async def connect(host: str, port: int) -> socket.socket:
    """Not blocking, connected. uvloop has no happy eyeballs of its own. Raises OSError."""
    addresses = await resolve(host, port)
    try:
        return await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_S)
    except RuntimeError as error:  # uvloop's word for some of them
        raise OSError(f"{host}:{port}: {error}") from error


async def resolve(host: str, port: int) -> Sequence[AddrInfoType]:
    """Raises OSError."""
    return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
