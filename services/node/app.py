"""A node process: one engine, one KV endpoint, one HTTP app that serves either role, heartbeats to every router."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
import signal
import time
from collections.abc import AsyncIterator

import aiohttp
import msgspec
from aiohttp import web
from prfaas.common import log
from prfaas.common.config import Config, EngineConfig, VllmConfig, parse_address
from prfaas.common.errors import ConfigError, UnavailableError
from prfaas.common.metrics import Metrics
from prfaas.common.prefixcache.sizes import CacheSizes
from prfaas.common.scheduling.planner_lease import NodeCount
from prfaas.services import tls as services_tls
from prfaas.services import web as services_web
from prfaas.services.decode.handler import DecodeService
from prfaas.services.engine.api import Engine
from prfaas.services.engine.tokenizer import BYTES, load_tokenizer
from prfaas.services.leases import Leases
from prfaas.services.messages import Heartbeat, HeartbeatAnswer, KvAddressMessage, LinkMessage, LoadMessage
from prfaas.services.node.heartbeat import RouterLink
from prfaas.services.node.news import PoolNews, ProfileNews
from prfaas.services.node.roles import Roles
from prfaas.services.prefill.handler import PrefillService
from prfaas.services.telemetry.tracing import Tracing, open_tracing
from prfaas.transport.api import KvAddress, LinkClock
from prfaas.transport.endpoint import KvEndpoint
from prfaas.transport.lanes.tcp import TcpBackend
from prfaas.transport.tls import Tls

# A body of 262,144 token ids and their JSON, several times over.
MAX_BODY_BYTES = 64 << 20
MAX_ROUTERS = 64
"""Processes of one router; its setting has the same bound."""
# After its leases were freed, a handler needs a layer's time to clean up.
CLEAN_UP_S = 5.0

_log = log.get_logger("node")


class Node:
    """What a node process holds. `start` and `close` are called by the app; `heartbeat` once its URL is known."""

    def __init__(self, config: Config, role: str, engine: Engine) -> None:
        self.config = config
        self.engine = engine
        self._tracing: Tracing | None = None
        self.tls = services_tls.open_tls(config.tls, "node.name", config.node.name, role)
        certified = self.tls.identity.name if self.tls is not None else ""
        self.name = config.node.name or certified or f"{role}-{secrets.token_hex(4)}"
        self.epoch = secrets.token_hex(8)
        self.metrics = Metrics()
        self.leases = Leases(role)
        self.draining = False
        self.leaving = False
        self.url = ""
        self.secret = services_web.read_secret(config.cluster)
        self._signer = services_web.Signer.of(self.secret, config.cluster)
        self.roles = Roles(
            self.name,
            role,
            self.leases,
            self.metrics.node,
            self._signer,
            self.tls,
            self._why_not_change,
            self._beat_now,
        )
        self._nodes = NodeCount()
        self._links: dict[str, RouterLink] = {}
        self._beating: dict[str, asyncio.Task[None]] = {}
        self._shared: dict[str, list[str]] = {}
        """An address that several routers share, and theirs."""
        self._session: aiohttp.ClientSession | None = None
        self._profile = ProfileNews()
        self._pool: PoolNews | None = None
        self._started = False

    @property
    def role(self) -> str:
        return self.roles.role

    def why_not_ready(self) -> str | None:
        if not self._started:
            return "the engine is starting"
        if self.roles.next_role and not self.draining:
            return f"draining to become a {self.roles.next_role} node"
        return "draining" if self.draining else self.engine.failure

    def _why_not_change(self) -> str | None:
        """Its role."""
        if self.draining or self.leaving:
            return "this node is leaving"
        return "the engine of this node has failed" if self.engine.failure is not None else None

    async def start(self) -> None:
        """The engine loads its model, the KV endpoint listens. Raises ConfigError, ModelRefusedError."""
        config = self.config
        self._tracing = open_tracing(config.telemetry, "node", self.name, config.node.region)
        tokenizer = load_tokenizer(BYTES if config.engine.kind == "emulated" else config.engine.model)
        self.engine.on_failure(self._beat_now)  # routers choose others from now on, not from the next beat on
        await self.engine.start()
        info = self.engine.info
        self.endpoint = KvEndpoint(
            config.transport,
            node=self.name,
            layout=info.layout,
            model_fingerprint=info.model_fingerprint,
            secret=self.secret,
            clock_skew_s=config.cluster.clock_skew_s,
            metrics=self.metrics.transport,
            region=config.node.region,
            backend=TcpBackend(config.transport, self.tls) if self.tls is not None else None,
        )
        try:
            await self.endpoint.start()
        except BaseException:
            await self.engine.close()
            raise
        metrics = self.metrics.node
        if (store := self.engine.prefixes) is not None:
            self._pool = PoolNews(store)
            self.endpoint.on_fetch(store.serve_fetch)
            metrics.prefix_capacity_bytes.set(store.capacity_bytes)
            metrics.prefix_used_bytes.set_function(lambda: store.used_bytes)
        elif self.engine.mirror is not None:
            self._pool = PoolNews(self.engine.mirror)
        metrics.arena_bytes.set(info.arena_bytes)
        metrics.running_requests.set_function(lambda: self.engine.load().running_requests)
        metrics.queued_tokens.set_function(lambda: self.engine.load().queued_tokens)
        metrics.free_kv_bytes.set_function(lambda: self.engine.load().free_kv_bytes)
        self._prefill = PrefillService(
            self.engine,
            self.endpoint,
            self.leases,
            metrics,
            config.node,
            self._signer,
            config.engine.prefix_block_tokens,
            self._tracing,
        )
        self._decode = DecodeService(
            self.engine,
            self.endpoint,
            tokenizer,
            self.leases,
            metrics,
            config.node,
            self._signer,
            self.router_clock,
            self._tracing,
        )
        self._started = True
        _log.info("node is up", node=self.name, role=self.role, model=info.model, region=config.node.region)

    async def close(self) -> None:
        self._started = False
        await self.endpoint.aclose()
        await self.engine.close()
        if self._tracing is not None:
            await self._tracing.close()

    async def prefill(self, request: web.Request) -> web.StreamResponse:
        self._refuse_if_failed()
        return await self._prefill.handle(request)

    async def decode(self, request: web.Request) -> web.StreamResponse:
        self._refuse_if_failed()
        return await self._decode.handle(request)

    def _refuse_if_failed(self) -> None:
        """A router that has not heard of it yet goes on with another node, as with one that drains."""
        if self.engine.failure is not None:
            raise UnavailableError("the engine of this node has failed; ask another one")

    # -- routers -----------------------------------------------------------------------------------------------------

    def heartbeat(self, url: str) -> None:
        """Register at every router as reachable under `url`, and keep the registration fresh."""
        self.url = url
        self._session = services_web.client_session()
        for router_url in self.config.node.routers:
            self._register_at(router_url)

    def _register_at(self, router_url: str) -> None:
        if router_url in self._links:
            return
        assert self._session is not None
        config = self.config.node
        link = self._links[router_url] = RouterLink(
            router_url,
            self._session,
            self._signer,
            self.metrics.node,
            config.heartbeat_s,
            config.router_dead_s,
            self._heartbeat,
            self._answered,
            self._router_died,
            self._routers_are,
            self.tls,
        )
        self._beating[router_url] = asyncio.create_task(link.run())

    def _routers_are(self, shared: str, urls: list[str]) -> None:
        """The processes of a router have said where each of them is."""
        if self.leaving or len(urls) > MAX_ROUTERS:
            return
        before, self._shared[shared] = self._shared.get(shared, []), urls
        for gone in set(before) - set(urls) - set(self.config.node.routers):
            if (link := self._links.pop(gone, None)) is not None:
                self._beating.pop(gone).cancel()
                if link.router is not None:
                    self._router_died(link.router)
        for router_url in urls:
            self._register_at(router_url)

    async def leave(self) -> None:
        """The last heartbeats; no more follow."""
        self.leaving = True
        await self.roles.stop()
        for task in self._beating.values():
            task.cancel()
        if self._beating:
            await asyncio.wait(self._beating.values())
        await asyncio.gather(*(link.leave() for link in self._links.values()))
        if self._session is not None:
            await self._session.close()

    async def drain(self, drain_s: float) -> None:
        """Take nothing new, let what runs go on for `drain_s`, then cancel it."""
        self.draining = True
        await self.roles.stop()
        self.leases.refuse_new()
        self._beat_now()
        _log.info("draining", node=self.name, running=len(self.leases), drain_s=drain_s)
        try:
            await asyncio.wait_for(self.leases.none_left(), drain_s)
        except TimeoutError:
            self._free(None, "drain")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.leases.none_left(), CLEAN_UP_S)

    def _beat_now(self) -> None:
        for link in self._links.values():
            link.beat_now()

    def router_clock(self, router: str) -> LinkClock | None:
        """router_monotonic − ours, by the router's name."""
        return next((link.clock for link in self._links.values() if link.router == router), None)

    def _heartbeat(self, link: RouterLink) -> Heartbeat:
        info, load, clock = self.engine.info, self.engine.load(), link.clock
        forwarding = self.engine.forwarding
        now_s = time.monotonic()
        self._profile.take(self.engine.profile)
        heartbeat = Heartbeat(
            node=self.name,
            epoch=self.epoch,
            region=self.config.node.region,
            role=self.role,
            url=self.url,
            kv_addresses=[KvAddressMessage(a.host, a.port, a.rank) for a in self.endpoint.addresses],
            model=info.model,
            model_fingerprint=info.model_fingerprint,
            layout_hash=info.layout.layout_hash,
            max_model_tokens=info.max_model_tokens,
            load=LoadMessage(
                load.queued_requests,
                load.queued_tokens,
                load.running_requests,
                load.context_tokens,
                load.free_kv_bytes,
                load.max_requests,
                load.decoding_requests,
                load.waiting_requests,
            ),
            # To a router it is the same: nothing new here, what runs ends by itself (a failed engine has ended it all).
            draining=self.draining or bool(self.roles.next_role) or self.engine.failure is not None,
            leaving=self.leaving,
            clock_offset_s=clock.offset_s if clock is not None else 0.0,
            clock_error_s=clock.error_s if clock is not None else 1e9,
            model_path=self.config.engine.model,
            links=[LinkMessage.of(peer, estimate) for peer, estimate in self.endpoint.link_estimates().items()],
            routers=max(1, sum(each.answering for each in self._links.values())),
            profile_id=self._profile.id,
            profile=self._profile.file if link.wants_profile else "",
            next_role=self.roles.next_role,
            planner_holder=self.roles.grant.to(now_s),
            planner_bid_s=self.roles.grant.bid_s,
            nodes_counted=self._nodes.most(now_s),
            forwards=forwarding is not None,
            adapters=list(forwarding.adapters) if forwarding is not None else [],
        )
        if self._pool is None or self.leaving:
            return heartbeat
        return msgspec.structs.replace(
            heartbeat,
            prefix_block_tokens=self.config.engine.prefix_block_tokens,
            prefix_exact=CacheSizes.of_layout(info.layout).needs_snapshot,
            prefix_events=self._pool.batch(link, self._links.values()),
        )

    def _answered(self, link: RouterLink, answer: HeartbeatAnswer) -> None:
        """What a router wants to know; and its peers: sessions are opened before they are needed, and kept as long as
        a router lists the peer."""
        if self._pool is not None:
            self._pool.answered(link, answer)
        if answer.wants_profile and not link.wants_profile:
            link.beat_now()
        link.wants_profile = answer.wants_profile
        now_s = time.monotonic()
        self._nodes.told(answer.router, answer.nodes, now_s)
        if answer.planner_bid:
            self.roles.asked(answer, now_s)
        sends = self.role == "prefill"
        if sends != (self.config.transport.dial == "sender"):
            return  # the other side dials
        for peer in answer.peers:
            if peer.node != self.name and peer.kv_addresses:
                self.endpoint.connect(peer.node, [KvAddress(a.host, a.port, a.rank) for a in peer.kv_addresses])

    def _router_died(self, router: str) -> None:
        self._free(router, "router_dead")

    def _free(self, router: str | None, reason: str) -> None:
        freed = self.leases.free(router)
        self.metrics.node.leases_freed.labels(reason).inc(freed)
        _log.warning("leases freed", reason=reason, router=router, requests=freed)


NODE = web.AppKey("node", Node)


def make_app(config: Config, role: str, engine: Engine) -> web.Application:
    """The app; its start-up starts the engine and the KV endpoint. Heartbeats begin with `app[NODE].heartbeat(url)`."""
    node = Node(config, role, engine)
    app = services_web.make_app(node.metrics, not_ready=node.why_not_ready, max_body_bytes=MAX_BODY_BYTES)
    app[NODE] = node
    app.router.add_post("/prefill", node.prefill)
    app.router.add_post("/decode", node.decode)
    app.router.add_post("/role", node.roles.handle)
    app.cleanup_ctx.append(_running)
    return app


async def _running(app: web.Application) -> AsyncIterator[None]:
    node = app[NODE]
    await node.start()
    yield
    await node.close()


def make_engine(config: EngineConfig, vllm: VllmConfig | None = None) -> Engine:
    """Imports the engine's own world (torch) only when it is the one."""
    if config.kind == "vllm":
        from prfaas.services.vllm.engine import VllmEngine

        return VllmEngine(config, vllm or VllmConfig())
    if config.kind == "emulated":
        from prfaas.services.engine.emulated.engine import EmulatedEngine

        return EmulatedEngine(config)
    from prfaas.services.engine.transformers.engine import TransformersEngine

    return TransformersEngine(config)


@contextlib.asynccontextmanager
async def running_node(config: Config, role: str, engine: Engine) -> AsyncIterator[Node]:
    """A whole node, listening and heartbeating, until the block ends; then it leaves, at once."""
    app = make_app(config, role, engine)
    node = app[NODE]
    _check_addresses(config, node.tls)
    services_tls.warn_if_open({"node.bind": config.node.bind, "transport.bind": config.transport.bind}, node.tls)
    async with services_web.listening(app, config.node.bind, secret=node.secret, key="node.bind", tls=node.tls) as (
        host,
        port,
    ):
        node.heartbeat(_url(host, port, config.node.advertise, node.tls))
        try:
            yield node
        finally:
            node.leases.refuse_new()
            node.leases.free()
            await node.leave()


def _check_addresses(config: Config, tls: Tls | None) -> None:
    """Before a model is loaded for nothing. Raises ConfigError."""
    _url(*parse_address(config.node.bind), config.node.advertise, tls)
    urls = {"node.advertise": (config.node.advertise,), "node.routers": config.node.routers}
    problems = services_tls.url_problems(urls, tls is not None)
    if tls is not None and config.transport.backend != "tcp":
        problems.append(f"transport.backend = {config.transport.backend!r} is not encrypted: with [tls] it must be tcp")
    if problems:
        raise ConfigError(problems)


def _url(host: str, port: int, advertise: str, tls: Tls | None) -> str:
    """Where routers reach the node. Raises ConfigError for a wildcard address: nobody can dial it."""
    if advertise:
        return advertise.rstrip("/")
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            raise ConfigError([f"node.bind is {host}: set node.advertise to the URL under which routers reach it"])
        if address.version == 6:
            host = f"[{host}]"
    return f"{'http' if tls is None else 'https'}://{host}:{port}"


async def run(config: Config, role: str) -> None:
    """Until SIGTERM (drains first) or SIGINT (at once)."""
    async with running_node(config, role, make_engine(config.engine, config.vllm)) as node:
        if await services_web.stop_signal() is signal.SIGTERM:
            await node.drain(config.node.drain_s)
    _log.info("node has left", node=node.name)


def serve(config: Config, role: str) -> None:
    """The command's body: a node under uvloop."""
    services_web.run(run(config, role))
