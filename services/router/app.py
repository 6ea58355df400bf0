"""The router process: the OpenAI API in front, nodes behind. Wiring and HTTP handlers; the work is next door."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import aiohttp
import numpy as np
from aiohttp import web
from prfaas.common import log
from prfaas.common.auth import key_matches
from prfaas.common.config import Config, RouterConfig, is_loopback, parse_address
from prfaas.common.errors import (
    AuthenticationError,
    ConfigError,
    ModelNotFoundError,
    QuotaError,
    RequestError,
    UnavailableError,
)
from prfaas.common.metrics import Metrics
from prfaas.common.scheduling.policies import AdaptiveThreshold
from prfaas.common.scheduling.types import ROLE_DECODE, AdmittingPolicy
from prfaas.services import tls as services_tls
from prfaas.services import web as services_web
from prfaas.services.engine.tokenizer import load_tokenizer
from prfaas.services.messages import FormatMessage, Heartbeat, HeartbeatAnswer
from prfaas.services.router import processes, spans
from prfaas.services.router.console import handlers as console
from prfaas.services.router.console.state import Console
from prfaas.services.router.decision import make_policy, read_wishes
from prfaas.services.router.dispatch import Dispatcher, Job
from prfaas.services.router.openai import GenerationRequest, Kind
from prfaas.services.router.planning import Planning
from prfaas.services.router.prefixes import Prefixes, tenant_of
from prfaas.services.router.prompts import Prompts
from prfaas.services.router.quotas import KeyLimits, Quotas, parse_keys
from prfaas.services.router.registry import ROLES, Registry
from prfaas.services.router.roles import RoleCalls
from prfaas.services.router.timeline import Timelines
from prfaas.services.router.upstream import Nodes
from prfaas.services.telemetry.tracing import Trace, Tracing, open_tracing
from prfaas.services.web import REQUEST_ID, Signer, json_response, parse_json, read_body, read_signed
from prfaas.transport.tls import Tls
from yarl import URL

ADAPT_S = 1.0
"""From one look at load and links to the next."""
GARBAGE_THRESHOLD = 10_000
"""Allocations between two searches for cyclic garbage; Python's own choice is 700."""
SIBLING_S = 2.0
"""For another process of this router to say what it knows."""
NODE_STATES = ("usable", "unreachable", "draining", "lost")

logger = log.get_logger("router")


@dataclass(slots=True)
class Router:
    """What a router process holds."""

    config: RouterConfig
    secret: bytes
    api_keys: tuple[str, ...]
    quotas: Quotas
    signer: Signer
    prompts: Prompts
    policy: AdmittingPolicy
    registry: Registry
    prefixes: Prefixes
    planning: Planning
    metrics: Metrics
    tls: Tls | None = None
    tracing: Tracing | None = None
    started_at_s: int = field(default_factory=lambda: int(time.time()))
    refused: dict[str, str] = field(default_factory=dict)
    """Nodes whose heartbeats are refused, and why: logged once, not every two seconds."""

    def why_not_ready(self) -> str | None:
        return self.registry.why_not_ready(time.monotonic())

    def trace(self, http: web.Request, arrived_s: float) -> Trace | None:
        """The request's span; in the client's trace, if it comes with one's context."""
        if self.tracing is None:
            return None
        return self.tracing.begin(spans.NAME, http.headers.get("traceparent", ""), arrived_s)

    @property
    def name(self) -> str:
        return processes.name_of(self.config)

    def process_urls(self) -> list[str]:
        """Of all processes of this router, where each alone is reached."""
        return processes.urls(self.config, "http" if self.tls is None else "https")

    @property
    def served_model(self) -> str:
        """Empty: no node has said yet."""
        return self.config.served_model or self.registry.model

    def authenticate(self, request: web.Request) -> str:
        """The client's key, "" where there are none. Raises AuthenticationError unless it has one of them."""
        if not self.api_keys:
            return ""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise AuthenticationError("no API key: send it as Authorization: Bearer <key>", code="invalid_api_key")
        if not key_matches(key.strip(), self.api_keys):
            raise AuthenticationError("wrong API key", code="invalid_api_key")
        return key.strip()

    def admit(self, api_key: str, tokens: int, now_s: float) -> None:
        """A request of this key's, with so many tokens at most. Raises QuotaError."""
        try:
            self.quotas.admit(api_key, tokens, now_s)
        except QuotaError:
            self.metrics.router.quota_refusals.labels(self.quotas.name(api_key)).inc()
            raise

    def check_model(self, model: str) -> None:
        """Raises ModelNotFoundError, UnavailableError."""
        if not self.served_model:
            raise UnavailableError("no node has registered yet; try again", retry_after_s=2)
        if model != self.served_model and model not in self.registry.adapters:
            raise ModelNotFoundError(
                f"the model {model[:200]!r} does not exist; this cluster serves {self.served_model!r}",
                param="model",
                code="model_not_found",
            )

    def max_output_tokens(self, request: GenerationRequest, prompt_tokens: int) -> int:
        """Raises RequestError when prompt and output don't fit the model."""
        longest = self.registry.max_model_tokens
        if not longest:
            raise UnavailableError("no node has registered yet; try again", retry_after_s=2)
        if prompt_tokens >= longest:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens; this model takes {longest} with at least one of output",
                param=request.prompt_field,
                code="context_length_exceeded",
            )
        if request.max_output_tokens is None:
            most = min(self.config.default_max_output_tokens, longest - prompt_tokens)
            return max(most, min(request.sampling.min_tokens, longest - prompt_tokens))
        if prompt_tokens + request.max_output_tokens > longest:
            raise RequestError(
                f"max_tokens {request.max_output_tokens} and a prompt of {prompt_tokens} tokens are more than "
                f"this model's {longest}; ask for at most {longest - prompt_tokens}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return request.max_output_tokens


ROUTER = web.AppKey("router", Router)
DISPATCHER = web.AppKey("dispatcher", Dispatcher)
TIMELINES = web.AppKey("timelines", Timelines)
SESSION = web.AppKey("session", aiohttp.ClientSession)
VIEWERS = web.AppKey("viewers", console.Viewers)


# -- generation -------------------------------------------------------------------------------------------------------


async def completions(http: web.Request) -> web.StreamResponse:
    return await _generate(http, "completion")


async def chat_completions(http: web.Request) -> web.StreamResponse:
    return await _generate(http, "chat")


async def _generate(http: web.Request, kind: Kind) -> web.StreamResponse:
    arrived_s = time.monotonic()
    router = http.app[ROUTER]
    metrics = router.metrics.router
    status = services_web.CLIENT_LEFT
    metrics.inflight_requests.inc()
    try:
        api_key = router.authenticate(http)
        wishes = read_wishes(http.headers)
        registry = router.registry
        request = await router.prompts.parse(kind, await read_body(http), registry.forwards, registry.adapters)
        router.check_model(request.model)
        router.quotas.check_priority(api_key, request.priority)
        prompt = await router.prompts.tokenize(request)
        metrics.prompt_tokens.inc(prompt.tokens)
        longest = router.max_output_tokens(request, prompt.tokens)
        tenant = tenant_of(router.config.share_prefixes, request.cache_salt, api_key, http[REQUEST_ID])
        adapter = request.model if request.model in registry.adapters else ""
        if adapter:  # its KV is its own
            tenant = f"{tenant}/adapter/{adapter}"
        hasher = router.prefixes.hasher(tenant)
        keys = await router.prompts.keys(hasher, prompt) if hasher is not None else ()
        router.admit(api_key, prompt.tokens + longest, arrived_s)
        job = Job(
            request_id=http[REQUEST_ID],
            request=request,
            prompt=prompt,
            format=_format(request),
            max_output_tokens=longest,
            arrived_s=arrived_s,
            deadline_s=arrived_s + router.config.request_timeout_s,
            wishes=wishes,
            tenant=tenant,
            adapter=adapter,
            keys=keys,
            ended=lambda tokens: router.quotas.give_back(api_key, longest - tokens),
            trace=router.trace(http, arrived_s),
        )
        response = await http.app[DISPATCHER].run(http, job)
        status = response.status
        return response
    except Exception as error:
        if not services_web.client_left(http, error):
            status = services_web.status_of(error)
        raise
    finally:
        metrics.inflight_requests.dec()
        metrics.requests.labels(kind, str(status)).inc()


def _format(request: GenerationRequest) -> FormatMessage:
    prefix = "chatcmpl-" if request.kind == "chat" else "cmpl-"
    return FormatMessage(
        kind=request.kind,
        id=prefix + secrets.token_hex(12),
        created=int(time.time()),
        model=request.model,
        stream=request.stream,
        include_usage=request.include_usage,
        continuous_usage=request.continuous_usage,
        echo=request.echo,
    )


async def tokenize(http: web.Request) -> web.Response:
    """As vLLM's: the prompt's or the messages' token ids."""
    router = http.app[ROUTER]
    router.authenticate(http)
    body = await read_body(http)
    kind: Kind = "chat" if b'"messages"' in body else "completion"
    request = await router.prompts.parse(kind, body, router.registry.forwards, router.registry.adapters)
    router.check_model(request.model)
    prompt = await router.prompts.tokenize(request)
    return json_response(
        {"count": prompt.tokens, "max_model_len": router.registry.max_model_tokens, "tokens": prompt.json}
    )


# -- models and probes ------------------------------------------------------------------------------------------------


def _model_object(router: Router) -> Mapping[str, object]:
    return {
        "id": router.served_model,
        "object": "model",
        "created": router.started_at_s,
        "owned_by": "prfaas",
        "max_model_len": router.registry.max_model_tokens or None,
    }


async def models(http: web.Request) -> web.Response:
    router = http.app[ROUTER]
    router.authenticate(http)
    data = [_model_object(router)] if router.served_model else []
    data += [dict(data[0]) | {"id": name, "parent": router.served_model} for name in sorted(router.registry.adapters)]
    return json_response({"object": "list", "data": data})


async def model(http: web.Request) -> web.Response:
    """A model's name may hold slashes."""
    router = http.app[ROUTER]
    router.authenticate(http)
    router.check_model(http.match_info["model"])
    return json_response(_model_object(router))


async def health(http: web.Request) -> web.Response:
    """vLLM's name for readiness: 200 with an empty body, or 503."""
    return web.Response(status=200 if http.app[ROUTER].why_not_ready() is None else 503)


async def show_version(_http: web.Request) -> web.Response:
    return json_response({"version": version("prfaas")})


async def timeline(http: web.Request) -> web.Response:
    http.app[ROUTER].authenticate(http)
    request_id = http.match_info["request_id"]
    record = http.app[TIMELINES].get(request_id)
    if record is None and (found := await _ask_other_processes(http)) is not None:
        return found
    if record is None:
        raise ModelNotFoundError(
            f"no timeline of request {request_id[:128]!r}: unknown, still running, or too long ago",
            code="timeline_not_found",
        )
    return json_response(record.timeline())


async def _ask_other_processes(http: web.Request) -> web.Response | None:
    """A timeline is kept by the process that served the request, and this call came to any of them."""
    router = http.app[ROUTER]
    if not _came_to_shared_port(http, router.config):
        return None
    tls = router.tls.client(roles=("router",)) if router.tls is not None else True
    headers = {"authorization": given} if (given := http.headers.get("authorization")) else {}
    for number, url in enumerate(router.process_urls(), 1):
        if number == router.config.process:
            continue
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            asked = http.app[SESSION].get(URL(url + http.rel_url.raw_path, encoded=True), headers=headers, ssl=tls)
            async with asyncio.timeout(SIBLING_S), asked as response:
                if response.status == 200:
                    return web.Response(body=await response.read(), content_type="application/json")
    return None


# -- nodes ------------------------------------------------------------------------------------------------------------


async def heartbeat(http: web.Request) -> web.Response:
    received_s = time.monotonic()
    router = http.app[ROUTER]
    outcomes = router.metrics.router.heartbeats
    try:
        message = await parse_json(await read_signed(http, router.signer), Heartbeat)
    except RequestError as error:
        outcomes.labels("refused").inc()
        logger.warning("heartbeat_refused", peer=http.remote, error=str(error))
        raise
    try:
        services_tls.check_caller(http, message.node, (message.role,))
        _check_url(router, message)
        if _came_to_shared_port(http, router.config):
            outcomes.labels("accepted").inc()
            answer = HeartbeatAnswer(router.name, received_s, time.monotonic(), [], routers=router.process_urls())
            return json_response(answer)
        registered = router.registry.heartbeat(message, received_s)
    except RequestError as error:
        outcomes.labels("refused").inc()
        if router.refused.get(message.node) != str(error):
            if len(router.refused) > 1000:
                router.refused.clear()
            router.refused[message.node] = str(error)
            logger.error("node_refused", node=message.node[:128], peer=http.remote, error=str(error))
        raise
    router.refused.pop(message.node, None)
    outcomes.labels("accepted").inc()
    if registered.news is not None:
        logger.info("node", news=registered.news, node=message.node, role=message.role, region=message.region)
    if registered.news == "converted" and registered.node is not None:
        router.planning.converted(registered.node, received_s)
    return json_response(
        HeartbeatAnswer(
            router.name,
            received_s,
            time.monotonic(),
            router.registry.peers_of(message, received_s),
            None if registered.node is None else router.prefixes.heard(registered.node.row, message),
            not message.profile and router.registry.wants_profile(message),
            nodes=len(router.registry),
            planner_bid=router.planning.bid(),
            planner_lease_s=router.planning.config.lease_s,
        )
    )


async def plan(http: web.Request) -> web.Response:
    """PlanReport: what the slow planner would do now, and why."""
    router = http.app[ROUTER]
    router.authenticate(http)
    return json_response(router.planning.report(router.registry.snapshot(time.monotonic()), time.time()))


def _came_to_shared_port(http: web.Request, config: RouterConfig) -> bool:
    """One of several processes took the connection, by chance."""
    if not config.process or http.transport is None:
        return False
    port: int = http.transport.get_extra_info("sockname")[1]
    return port == parse_address(config.bind)[1]


def _check_url(router: Router, message: Heartbeat) -> None:
    """Calls to the node must be as safe as its heartbeats."""
    wanted = "http" if router.tls is None else "https"
    if not message.url.startswith(f"{wanted}://"):
        raise RequestError(
            f"url must be {wanted}://..., as this router has {'no ' if router.tls is None else ''}[tls], "
            f"not {message.url[:200]!r}",
            param="url",
        )


async def console_events(http: web.Request) -> web.StreamResponse:
    http.app[ROUTER].authenticate(http)
    return await http.app[VIEWERS].stream(http)


# -- wiring -----------------------------------------------------------------------------------------------------------


def make_app(config: Config) -> web.Application:
    """Loads the tokenizer; opens nothing until the app starts. Raises ConfigError."""
    if not config.router.model_path:
        raise ConfigError(["router.model_path is not set: the router needs the model's tokenizer"])
    secret = services_web.read_secret(config.cluster)
    prefixes = Prefixes(config.router.prefix_index_blocks)
    policy, metrics = make_policy(config.router), Metrics()
    keys = read_api_keys(config.router)
    registry = Registry(config.router.assumed_link_gbps * 1e9 / 8, np.random.default_rng(), prefixes.forget)
    name = processes.name_of(config.router)
    holder = f"{name}/{secrets.token_hex(4)}"
    router = Router(
        config=config.router,
        secret=secret,
        api_keys=tuple(each.key for each in keys),
        quotas=Quotas(keys),
        signer=Signer.of(secret, config.cluster),
        prompts=Prompts(load_tokenizer(config.router.model_path), config.router.tokenizer_threads),
        policy=policy,
        registry=registry,
        prefixes=prefixes,
        planning=Planning(config.planner, name, holder, registry, policy, metrics.router),
        metrics=metrics,
        tls=services_tls.open_tls(config.tls, "router.name", config.router.name, "router"),
        tracing=open_tracing(config.telemetry, "router", name),
    )
    app = services_web.make_app(
        router.metrics, not_ready=router.why_not_ready, max_body_bytes=config.router.max_body_bytes
    )
    app[ROUTER] = router
    app[TIMELINES] = Timelines(config.router.timelines)
    app.cleanup_ctx.append(_running)
    app.on_shutdown.append(_ending)
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/v1/models/{model:.+}", model)
    app.router.add_get("/health", health)
    app.router.add_get("/version", show_version)
    app.router.add_post("/tokenize", tokenize)
    app.router.add_get("/requests/{request_id}/timeline", timeline)
    app.router.add_get("/plan", plan)
    app.router.add_get("/console", console.page)
    app.router.add_get("/console/events", console_events)
    app.router.add_get("/console/{name}", console.page_file)
    app.router.add_post("/nodes/heartbeat", heartbeat)
    _count_nodes(router)
    return app


async def _running(app: web.Application) -> AsyncIterator[None]:
    router = app[ROUTER]
    async with services_web.client_session() as session:
        app[SESSION] = session
        nodes = Nodes(session, router.signer, router.tls, router.config.node_silent_s)
        roles = RoleCalls(router.planning, nodes, router.metrics.router)
        app[DISPATCHER] = Dispatcher(
            router.name,
            nodes,
            router.registry,
            router.policy,
            router.metrics.router,
            app[TIMELINES],
            router.prefixes,
            router.planning,
            router.config.decode_attempts,
            router.config.continue_wait_s,
        )
        looks = Console(router.name, version("prfaas"), router.registry, router.policy, router.planning, app[TIMELINES])
        app[VIEWERS] = console.Viewers(looks, app[DISPATCHER].inflight)
        adapting = asyncio.create_task(_adapting(router, roles, app[VIEWERS]))
        yield
        adapting.cancel()
        await asyncio.wait([adapting])
        await roles.close()
    router.prompts.close()
    if router.tracing is not None:
        await router.tracing.close()


async def _adapting(router: Router, roles: RoleCalls, viewers: console.Viewers) -> None:
    """Once a second: thresholds follow load and links, roles the plan, and the gauges all of it. Who looks at the
    console sees it twice as often."""
    while True:
        await asyncio.sleep(ADAPT_S / 2)
        viewers.publish(router.registry.snapshot(time.monotonic()), time.time())
        await asyncio.sleep(ADAPT_S / 2)
        now_s = time.monotonic()
        cluster = router.registry.snapshot(now_s)
        policy, metrics = router.policy, router.metrics.router
        for order in router.planning.tick(cluster, time.time()):
            roles.begin(order)
        if isinstance(policy, AdaptiveThreshold):
            policy.adapt(now_s, cluster)
            for region in {pool.region for pool in cluster.pools(ROLE_DECODE)}:
                metrics.threshold_tokens.labels(cluster.region_names[region]).set(policy.threshold_of(region))
        for source, target in itertools.permutations(range(len(cluster.region_names)), 2):
            gauge = metrics.link_bandwidth.labels(cluster.region_names[source], cluster.region_names[target])
            gauge.set(cluster.links.bandwidth_bytes_per_s.item(source, target))
        metrics.prefix_blocks.set(len(router.prefixes.index))
        viewers.console.tick(cluster, time.time())
        viewers.publish(cluster, time.time())


async def _ending(app: web.Application) -> None:
    """No new connections by now. Handlers are cancelled after SHUTDOWN_S: before that, streams end with an error."""
    app[DISPATCHER].close(services_web.SHUTDOWN_S * 0.75)


def _count_nodes(router: Router) -> None:
    """The gauge asks the registry when it is read: leases run out without an event."""
    for role in ROLES:
        for state in NODE_STATES:
            gauge = router.metrics.router.nodes.labels(role, state)
            gauge.set_function(partial(_nodes_in, router.registry, role, state))


def _nodes_in(registry: Registry, role: str, state: str) -> float:
    return registry.count(role, state, time.monotonic())


def read_api_keys(config: RouterConfig) -> list[KeyLimits]:
    """From the settings, without limits, and from the file, with theirs. Raises ConfigError."""
    keys = [KeyLimits(key, f"setting-{number}") for number, key in enumerate(config.api_keys, 1)]
    if config.api_keys_file:
        try:
            lines = Path(config.api_keys_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"router.api_keys_file = {config.api_keys_file!r} can't be read: {error}"]) from error
        found = parse_keys(lines, f"router.api_keys_file = {config.api_keys_file!r}")
        if not found:
            raise ConfigError([f"router.api_keys_file = {config.api_keys_file!r} holds no key"])
        keys += found
    return keys


def listening(app: web.Application, bind: str) -> contextlib.AbstractAsyncContextManager[tuple[str, int]]:
    """Clients and nodes come to one port. Over TLS both use https: nodes must show their certificates, clients need
    none (their API keys say who they are)."""
    router = app[ROUTER]
    return services_web.listening(
        app,
        bind,
        secret=router.secret,
        key="router.bind",
        tls=router.tls,
        client_certificates=False,
        shared=bool(router.config.process),
        also=processes.own_bind(router.config),
    )


async def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT."""
    app = make_app(config)
    router = app[ROUTER]
    host, _ = parse_address(config.router.bind)
    if not router.api_keys and not is_loopback(host):
        logger.warning(
            "api_is_open", bind=config.router.bind, mend="set router.api_keys_file: anyone may send requests"
        )
    services_tls.warn_if_open({"router.bind": config.router.bind}, router.tls)
    async with listening(app, config.router.bind) as (_, port):
        scheme = "http" if router.tls is None else "https"
        logger.info("router_listens", name=config.router.name, url=f"{scheme}://{host}:{port}")
        await services_web.stop_signal()


def serve(config: Config) -> None:
    """The command's body: a router under uvloop."""
    collect_seldom()
    services_web.run(run(config))


def collect_seldom() -> None:
    """For a process that is a router and nothing else: it looks for cyclic garbage less often, and never among what is
    there now. A request leaves next to none, but allocates enough to start several searches, a tenth of its CPU."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD)
