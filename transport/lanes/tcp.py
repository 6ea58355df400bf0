"""Lanes over TCP, plain or with TLS. Fastest under uvloop; plain asyncio works too."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from prfaas.common.config import TransportConfig
from prfaas.common.identity import PeerIdentity
from prfaas.common.log import get_logger
from prfaas.transport.lanes import tcp_info
from prfaas.transport.lanes.api import Buffer, LaneHandler, LaneSample, Listener
from prfaas.transport.lanes.congestion import WAN_RTT_S, LossWatch
from prfaas.transport.lanes.connecting import way_to

if TYPE_CHECKING:
    from prfaas.transport.tls import Tls

USER_TIMEOUT_S = 10.0
"""The kernel gives up on a peer that acknowledges nothing for so long (a partition)."""
BACKLOG = 256
UNSENT_BYTES = 1 << 20
TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)

log = get_logger("transport")


class TcpBackend:
    """With `tls`, lanes are encrypted and both ends show certificates; who they name is on the lane
    (`peer_identity`), for HELLO to be checked against."""

    def __init__(self, config: TransportConfig, tls: Tls | None = None) -> None:
        self._tuning = Tuning(config)
        self._tls = tls

    async def listen(self, host: str, port: int, handler: Callable[[], LaneHandler]) -> Listener:
        if self._tls is not None:
            from prfaas.transport.lanes.tls_lane import listen_tls

            return await listen_tls(self._tls, self._tuning, host, port, handler, BACKLOG)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: TcpLane(handler, self._tuning), host, port, reuse_address=True, backlog=BACKLOG
        )
        return _TcpListener(server)

    async def dial(self, host: str, port: int, handler: LaneHandler) -> None:
        if self._tls is not None:
            from prfaas.transport.lanes.tls_lane import dial_tls

            await dial_tls(self._tls, self._tuning, host, port, handler)
            return
        way = await way_to(host, port)
        await asyncio.get_running_loop().create_connection(lambda: TcpLane(lambda: handler, self._tuning), **way)


class _TcpListener:
    def __init__(self, server: asyncio.Server) -> None:
        self._server = server
        host, port, *scope = server.sockets[0].getsockname()
        if scope and scope[1]:  # link-local: without its interface nobody could dial it
            host = f"{host}%{socket.if_indextoname(scope[1])}"
        self.address: tuple[str, int] = (host, port)

    async def aclose(self) -> None:
        # Not wait_closed(): from Python 3.12 on it waits for every open lane.
        self._server.close()


class Tuning:
    """Socket options of every lane. What the kernel refuses is said once and done without."""

    def __init__(self, config: TransportConfig) -> None:
        self._congestion_control = config.congestion_control
        self.watches = config.congestion_control == "auto"
        """Lanes choose by themselves."""
        self._buffer_bytes = config.socket_buffer_bytes
        self._warned = False

    def apply(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(USER_TIMEOUT_S * 1000))
        if self._buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer_bytes)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer_bytes)
        sample = tcp_info.read(sock)
        if sample is not None and sample.rtt_s >= WAN_RTT_S:
            # What the kernel holds unsent can't be overtaken by a transfer that starts now, nor moved when a lane dies.
            sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        if self.watches:
            self.control(sock, "cubic")
        elif self._congestion_control:
            self.control(sock, self._congestion_control)

    def control(self, sock: socket.socket, wanted: str) -> None:
        """Set TCP_CONGESTION."""
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, wanted.encode())
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.warning(
                    "congestion control not available; using the kernel's default",
                    wanted=wanted,
                    error=str(error),
                    mend=f"modprobe tcp_{wanted} and allow it in net.ipv4.tcp_allowed_congestion_control, or set "
                    "transport.congestion_control",
                )


class TcpLane(asyncio.BufferedProtocol):
    """A `Lane`; the loop reads straight into the handler's buffers. `handler()` is called once it is connected."""

    peer_identity: PeerIdentity | None = None
    _handler: LaneHandler

    def __init__(self, handler: Callable[[], LaneHandler], tuning: Tuning) -> None:
        self._make_handler = handler
        self._tuning = tuning
        self._transport: asyncio.Transport | None = None
        self._socket: socket.socket | None = None
        self._watch = LossWatch() if tuning.watches else None
        self._lost = False
        self._closing = False

    # -- asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._pause_at_once(self._transport)
        self._socket = transport.get_extra_info("socket")
        self._tuning.apply(transport.get_extra_info("socket"))
        self._handler = self._make_handler()
        self._handler.connected(self)

    def _pause_at_once(self, transport: asyncio.Transport) -> None:
        # Any unsent byte pauses, and only an empty buffer resumes: `writable` means that all was handed over.
        transport.set_write_buffer_limits(high=0, low=0)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._handler.next_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self._handler.advance(nbytes)

    def pause_writing(self) -> None:
        pass

    def resume_writing(self) -> None:
        self._handler.writable()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._transport = self._socket = None
        self._handler.lost(exc)

    # -- Lane

    @property
    def closing(self) -> bool:
        return self._closing or self._transport is None or self._transport.is_closing()

    def write(self, buffers: Sequence[Buffer]) -> None:
        if self._transport is not None and not self.closing:
            self._transport.writelines(buffers)

    @property
    def unsent_bytes(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def sample(self) -> LaneSample | None:
        sample = tcp_info.read(self._socket) if self._socket is not None else None
        if sample is not None and self._watch is not None:
            self._look_at_losses(self._watch, sample)
        return sample

    def _look_at_losses(self, watch: LossWatch, sample: LaneSample) -> None:
        if sample.min_rtt_s >= WAN_RTT_S and watch.lossy(sample) and self._socket is not None:
            self._watch = None
            self._tuning.control(self._socket, "bbr")
            log.info("kv lane loses packets for other reasons than full queues: bbr", rtt_s=round(sample.rtt_s, 4))

    def close(self) -> None:
        # Not the transport's: with bytes that came and were not read the kernel resets the connection, and the other
        # side, in the middle of writing, never reads what we wrote last.
        if self._transport is not None and not self.closing:
            self._closing = True
            self._transport.write_eof()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
