"""The two ways of an endpoint's lanes: the KV port's, and UCX beside it where `transport.backend` asks for that.

What goes which way is decided in negotiation.py; here are the listeners, the dialling, and what is told when a session
does without UCX: one warning, and prfaas_transport_backend_fallbacks.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from prfaas.common.config import TransportConfig
from prfaas.common.errors import ConfigError
from prfaas.common.log import get_logger
from prfaas.common.metrics import TransportMetrics
from prfaas.transport.api import KvAddress
from prfaas.transport.lanes.api import Backend, LaneHandler, Listener
from prfaas.transport.lanes.ucx import UcxBackend, make_ucx_backend
from prfaas.transport.negotiation import (
    NOT_HERE,
    NOT_OFFERED,
    TCP_LANES,
    fallback_text,
    offered_ucx_port,
    route_lane,
    ucx_feature,
)

log = get_logger("transport")


class Routes:
    """An endpoint's. `features` is for its HELLOs, `of(peer)` for each session that it dials."""

    def __init__(self, config: TransportConfig, first: Backend, secret: bytes, metrics: TransportMetrics) -> None:
        self.first = first
        self.wanted = config.backend
        self.ucx: UcxBackend | None = None
        self.features: tuple[str, ...] = ()
        self._config = config
        self._secret = secret
        self._metrics = metrics
        self._problem = ""
        self._listener: Listener | None = None

    async def start(self, host: str, accept: Callable[[], LaneHandler]) -> None:
        """Accept lanes over UCX too, at transport.ucx_port of `host`; where that can't be had, sessions do without."""
        if self.wanted != "ucx":
            return
        try:
            ucx = make_ucx_backend(self._config, self._secret)
            self._listener = await ucx.listen(host, self._config.ucx_port, accept)
        except (ConfigError, OSError) as error:
            self._problem = str(error)  # told by each session that would have used it
            return
        self.ucx = ucx
        self.features = (ucx_feature(self._listener.address[1]),)

    async def aclose(self) -> None:
        if self._listener is not None:
            await self._listener.aclose()

    def of(self, peer: str) -> SessionRoutes:
        return SessionRoutes(self, peer)

    def accepted(self, peer: str, features: Sequence[str]) -> None:
        """A session was accepted: its dialler decides, we say if it can only decide for TCP."""
        if self.wanted == "ucx" and (self.ucx is None or offered_ucx_port(features) is None):
            self.fell_back(NOT_HERE if self.ucx is None else NOT_OFFERED, peer)

    def fell_back(self, reason: str, peer: str, detail: str = "") -> None:
        """Once a session."""
        self._metrics.backend_fallbacks.labels(reason).inc()
        if reason == NOT_HERE:
            detail = self._problem
        log.warning("kv backend", peer=peer, reason=fallback_text(reason, peer, detail))


class SessionRoutes:
    """How the lanes of one dialled session go. Of its dialler; the endpoint's loop."""

    def __init__(self, routes: Routes, peer: str) -> None:
        self._routes = routes
        self._peer = peer
        self._features: tuple[str, ...] | None = None
        self._answered = asyncio.Event()
        self._over_ucx: set[int] = set()
        """Lanes that were dialled over UCX last."""
        self._failures: Counter[int] = Counter()
        """Of each lane, in a row."""
        self._last_failure = ""
        self._told = False

    def answered(self, lane: int, features: tuple[str, ...]) -> None:
        """The peer's answer to HELLO was good."""
        if lane < TCP_LANES:
            self._features = features
            self._answered.set()
        elif lane in self._over_ucx:
            self._failures.clear()

    def failed(self, lane: int, error: BaseException) -> None:
        """It could not be opened, though another lane is up: the peer lives."""
        if lane in self._over_ucx:
            self._failures[lane] += 1
            self._last_failure = str(error) or type(error).__name__

    def forget(self) -> None:
        """The session ended; the next may be with a new process."""
        self._features = None
        self._answered.clear()
        self._failures.clear()

    async def ready(self, lane: int) -> None:
        """Until it is known which way `lane` goes."""
        if lane >= TCP_LANES and self._routes.ucx is not None:
            await self._answered.wait()

    async def dial(self, lane: int, address: KvAddress, handler: LaneHandler) -> None:
        """Raises as `Backend.dial`."""
        routes = self._routes
        route = route_lane(
            lane,
            wanted=routes.wanted,
            have_ucx=routes.ucx is not None,
            peer_features=self._features,
            ucx_failures=self._failures[lane],
        )
        if route.fallback is not None and not self._told:
            self._told = True
            routes.fell_back(route.fallback, self._peer, self._last_failure)
        if routes.ucx is None or route.port is None:
            self._over_ucx.discard(lane)
            await routes.first.dial(address.host, address.port, handler)
        else:
            self._over_ucx.add(lane)
            await routes.ucx.dial(address.host, route.port, handler)
