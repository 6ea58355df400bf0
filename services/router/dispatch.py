"""One request from its decision to its last byte (ARCHITECTURE.md, "Between the services").

    decide ─▶ open /decode ─▶ ticket ─▶ open /prefill beside it ─▶ relay /decode to the client ─▶ end
       ▲            │                        │                             │
       │   unreachable, refused         failed: the decode call       lost before a token:
       └── another decode node ◀────── is cancelled too ─────────────▶ again; after one: an error event

Both calls live inside one attempt: whatever ends the attempt (the client left, the deadline, a failure on either side)
closes both, at once. Nothing reaches the client before the first token, so that an attempt can be repeated unseen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field

import msgspec
from aiohttp import web
from prfaas.common import log
from prfaas.common.errors import PrfaasError, ProtocolError, UnavailableError
from prfaas.common.metrics import RouterMetrics
from prfaas.common.prefixcache.hashes import BlockKey
from prfaas.common.scheduling.types import AdmittingPolicy, ClusterSnapshot, Decision, Refused, RequestSnapshot
from prfaas.services.messages import (
    DecodeCall,
    ErrorBody,
    ErrorDetail,
    FetchFrom,
    FormatMessage,
    PrefillCall,
    PrefillResult,
    TicketEvent,
    to_json,
)
from prfaas.services.router import spans
from prfaas.services.router.decision import NO_WISHES, Wishes, fetch_from, in_words, refusal, region_index, shares
from prfaas.services.router.node_stream import DONE, Batch, response_body, usage_event
from prfaas.services.router.openai import GenerationRequest
from prfaas.services.router.planning import Planning
from prfaas.services.router.prefixes import Prefixes
from prfaas.services.router.prompts import Prompt
from prfaas.services.router.registry import Node, Registry
from prfaas.services.router.share import Share
from prfaas.services.router.timeline import Record, RequestFacts, RouterInstants, Timelines
from prfaas.services.router.upstream import (
    CLIENT_ERRORS,
    NodeCall,
    NodeCallError,
    NodeRefusedError,
    Nodes,
    NodeUnreachableError,
    decode_event,
)
from prfaas.services.telemetry.tracing import Trace
from prfaas.services.web import REQUEST_ID_HEADER, describe_error, error_response

REASON_HEADER = "x-prfaas-reason"
PREFILL_HEADER = "x-prfaas-prefill"
DECODE_HEADER = "x-prfaas-decode"
PREFILL_REGION_HEADER = "x-prfaas-prefill-region"
DECODE_REGION_HEADER = "x-prfaas-decode-region"
DECISION_HEADER = "x-prfaas-decision"
HELD_HEADER = "x-prfaas-held-tokens"

NO_NODE = "no_decode_node"
"""The reason of a request that came to no node."""
ENGINE_FAILURES = 2
"""Decode engines that may fail in the middle of one request's output."""
CONTINUE_LOOK_S = 0.25
"""Between two looks for a decode node that could go on with a stream."""
LAST_WRITE_S = 1.0
"""For the error event at the end of a stream."""
RETRY_AFTER_S = 2
"""A node's next heartbeat is at most so far away."""

logger = log.get_logger("router")


def _nothing(_output_tokens: int) -> None:
    """Nobody asks."""


@dataclass(frozen=True, slots=True)
class Job:
    """A checked and tokenized request."""

    request_id: str
    request: GenerationRequest
    prompt: Prompt
    format: FormatMessage
    max_output_tokens: int
    arrived_s: float
    deadline_s: float
    """In the loop's clock, which is the monotonic one."""
    wishes: Wishes = NO_WISHES
    tenant: str = ""
    """Whose cached prefixes it may use."""
    adapter: str = ""
    """The model's variant that is asked for; "": the model itself."""
    keys: Sequence[BlockKey] = ()
    """Of the prompt's blocks."""
    ended: Callable[[int], None] = _nothing
    """Called once, with the tokens of output that it has had."""
    trace: Trace | None = None
    """Ended with the request."""

    @property
    def traceparent(self) -> str:
        return "" if self.trace is None else self.trace.traceparent


@dataclass(slots=True)
class Attempt:
    """Where a request is being tried, and why."""

    reason: str
    decode: Node
    prefill: Node | None
    decision: Decision | None = None
    decode_share: Share | None = None
    prefill_share: Share | None = None
    """What it asks of the two nodes, as predicted."""
    fetch: FetchFrom | None = None
    prompt_tokens: int = 0
    held_tokens: int = 0
    """Prefix that the decode node had itself; from its ticket on, what it really had."""
    answered: bool = False
    """A token has come: all KV had arrived."""

    @property
    def offloaded(self) -> bool:
        """Prefill is in another region than decode."""
        return self.prefill is not None and self.prefill.region != self.decode.region


@dataclass(slots=True)
class Progress:
    """What has happened to a request so far, over all attempts."""

    instants: RouterInstants
    attempt: Attempt | None = None
    fallbacks: list[str] = field(default_factory=list)
    decode_attempts: int = 0
    prefill_refused: bool = False
    prefill_gave_up: bool = False
    response: web.StreamResponse | None = None
    """Set when the first byte is about to leave: from here on the output can only be continued."""
    continuations: int = 0
    engine_failures: int = 0
    text_ahead: int = 0
    """Characters that the client has beyond the text of `token_ids`."""
    finished: bool = False
    usage: bool = False
    """The client has the chunk with the finish reason, and the one with the usage."""
    output_tokens: int = 0
    token_ids: list[bytes] = field(default_factory=list)
    """As the node wrote them: decimal numbers with commas between."""
    timeline: bytes | None = None
    outcome: str = "failed"

    def start_over(self) -> None:
        """Forget what a lost attempt brought: nobody has seen it."""
        self.output_tokens = 0
        self.token_ids = []
        self.timeline = None
        self.instants.ticket_s = None

    @property
    def delivered_ids(self) -> bytes:
        """Of the tokens that the client has, with commas between."""
        return b",".join(self.token_ids) if self.response is not None else b""


class Dispatcher:
    """Shared by all requests of a router."""

    def __init__(
        self,
        name: str,
        nodes: Nodes,
        registry: Registry,
        policy: AdmittingPolicy,
        metrics: RouterMetrics,
        timelines: Timelines,
        prefixes: Prefixes,
        planning: Planning,
        decode_attempts: int = 5,
        continue_wait_s: float = 20.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.nodes = nodes
        self.registry = registry
        self.policy = policy
        self.metrics = metrics
        self.timelines = timelines
        self.prefixes = prefixes
        self.planning = planning
        self.decode_attempts = decode_attempts
        """Decode nodes that a request may try, those included that it has lost in the middle of its output."""
        self.continue_wait_s = continue_wait_s
        """For a decode node to go on with a stream that has lost its own."""
        self.now_s = now_s
        self._deadlines: set[asyncio.Timeout] = set()
        self._closing = False

    def close(self, grace_s: float) -> None:
        """The router is ending: what is not done in `grace_s` fails with an answer instead of a cut connection."""
        self._closing = True
        for deadline in self._deadlines:
            self._bring_forward(deadline, grace_s)

    def inflight(self) -> int:
        """Requests that are running."""
        return len(self._deadlines)

    def _bring_forward(self, deadline: asyncio.Timeout, grace_s: float) -> None:
        at_s, when_s = asyncio.get_running_loop().time() + grace_s, deadline.when()
        if not deadline.expired() and (when_s is None or at_s < when_s):
            deadline.reschedule(at_s)

    async def run(self, http: web.Request, job: Job) -> web.StreamResponse:
        """Answer `http`. Raises PrfaasError while nothing has been sent; later failures are an event in the stream.

        Cancelled (the client left): both calls to nodes are closed when this raises.
        """
        progress = Progress(RouterInstants(job.arrived_s))
        try:
            async with self._deadline(job):
                response = await self._until_done(http, job, progress)
            progress.outcome = "done"
            self.planning.ended(job.max_output_tokens, progress.output_tokens)
            return response
        except (asyncio.CancelledError, ConnectionError):  # nodes' broken connections are NodeCallErrors by now
            progress.outcome = "cancelled"
            self.metrics.cancels.labels("shutdown" if self._closing else "client").inc()
            raise
        except (PrfaasError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                self.metrics.cancels.labels("shutdown" if self._closing else "timeout").inc()
                if self._closing:
                    error = UnavailableError("this router is shutting down; ask another one, or try again")
            if progress.response is None:
                if isinstance(error, NodeCallError):
                    return _refused(error, job.request_id)
                raise error
            await _end_with_error(http, progress.response, error, job.request_id)
            return progress.response
        finally:
            self._account(job, progress)

    @asynccontextmanager
    async def _deadline(self, job: Job) -> AsyncIterator[None]:
        """Raises TimeoutError at the job's deadline, or at the router's end."""
        if self._closing:
            raise UnavailableError("this router is shutting down; ask another one, or try again")
        async with asyncio.timeout_at(job.deadline_s) as deadline:
            self._deadlines.add(deadline)
            try:
                yield
            finally:
                self._deadlines.discard(deadline)

    async def _until_done(self, http: web.Request, job: Job, progress: Progress) -> web.StreamResponse:
        """Attempt after attempt; which failure allows another one is decided in `_may_repeat`."""
        lost: NodeCallError | None = None
        while True:
            attempt = progress.attempt = await self._next_attempt(job, progress, lost)
            if progress.instants.decided_s is None:
                progress.instants.decided_s = self.now_s()
            try:
                return await self._attempt(http, job, progress, attempt)
            except NodeCallError as error:
                if isinstance(error, NodeUnreachableError):
                    self.registry.unreachable(error.node, self.now_s())
                if progress.finished and progress.response is not None:
                    return await self._close_finished(job, progress, progress.response, error)
                if not self._may_repeat(job, attempt, progress, error):
                    raise
                self._note_fallback(progress, error)
                lost = error

    async def _next_attempt(self, job: Job, progress: Progress, lost: NodeCallError | None) -> Attempt:
        """As `_decide`. A stream that has lost its node waits a little for one that is back or has room, and then ends
        with what was lost."""
        until_s = self.now_s() + self.continue_wait_s
        while True:
            try:
                return self._decide(job, progress)
            except UnavailableError:
                if progress.response is None or lost is None:
                    raise
                if self.now_s() >= until_s:
                    raise lost from None
                await asyncio.sleep(CONTINUE_LOOK_S)

    def _note_fallback(self, progress: Progress, error: NodeCallError) -> None:
        """Another attempt follows: unseen by the client, or behind the tokens that it has."""
        fallback = f"{error.node.role}_{error.reason}"
        if progress.response is None:
            progress.start_over()
            self.metrics.fallbacks.labels(fallback).inc()
        else:
            self.metrics.continuations.labels(fallback).inc()
            fallback = f"continued_{fallback}"
            progress.continuations += 1
        progress.fallbacks.append(fallback)
        logger.warning(
            "fallback", reason=fallback, node=error.node.name, error=str(error), delivered=progress.output_tokens
        )

    async def _close_finished(
        self, job: Job, progress: Progress, response: web.StreamResponse, error: NodeCallError
    ) -> web.StreamResponse:
        """The node was lost between the last chunk of text and the end of its stream: nothing is missing but that."""
        logger.warning("ended_for_node", node=error.node.name, error=str(error))
        last = b""
        if job.format.include_usage and not progress.usage:
            last = usage_event(job.format, job.prompt.tokens, progress.output_tokens)
        await response.write_eof(last + DONE)
        return response

    def _decide(self, job: Job, progress: Progress) -> Attempt:
        """Raises UnavailableError when no node can serve it (TooLateError: not in time), RequestError when it is pinned
        to a region that isn't there."""
        now_s = self.now_s()
        cluster = self.registry.snapshot(now_s)
        began_s = time.perf_counter()
        request = self._request(job, progress, cluster, now_s)
        answer = self.policy(request, cluster)
        self.metrics.decision_seconds.observe(time.perf_counter() - began_s)
        if progress.attempt is None:
            self.planning.arrived(request, answer, cluster)
        if isinstance(answer, Refused):
            self.metrics.decisions.labels(f"refused_{answer.reason}").inc()
            logger.info(
                "refused",
                reason=answer.reason,
                retry_after_s=round(answer.retry_after_s, 1),
                prompt_tokens=job.prompt.tokens,
                deadline_s=job.wishes.deadline_s,
            )
            raise refusal(answer)
        decode = self.registry.node(answer.decode_node)
        mine, theirs = shares(answer, cluster, request.prompt_tokens, request.max_output_tokens)
        attempt = Attempt(answer.reason, decode, None, answer, mine, theirs)
        attempt.prompt_tokens, attempt.held_tokens = request.prompt_tokens, answer.token_start
        if progress.prefill_gave_up:
            attempt.reason = "prefill_failed"
        elif answer.prefill_node is not None:
            attempt.prefill = self.registry.node(answer.prefill_node)
            if answer.fetch_node is not None:
                holder = self.registry.node(answer.fetch_node)
                attempt.fetch = fetch_from(answer, cluster, holder, request.prefixes, job.prompt.tokens)
        return attempt

    def _request(self, job: Job, progress: Progress, cluster: ClusterSnapshot, now_s: float) -> RequestSnapshot:
        """What the policy sees of it. A request that was tried before has been admitted."""
        wishes = job.wishes
        waited_s = now_s - job.arrived_s
        prefixes = self.prefixes.matches(job.keys, cluster)
        # Delivered output is part of what must be prefilled now.
        delivered = progress.output_tokens if progress.response is not None else 0
        tokens = job.prompt.tokens + delivered
        return RequestSnapshot(
            job.request_id,
            tokens,
            max(1, job.max_output_tokens - delivered),
            tokens,
            None if wishes.deadline_s is None else wishes.deadline_s - waited_s,
            region_index(wishes, cluster),
            prefixes,
            waited_s,
            bool(progress.fallbacks),
            wishes.route,
        )

    def _may_repeat(self, job: Job, attempt: Attempt, progress: Progress, error: NodeCallError) -> bool:
        """Prefill's failures, and the decode node's with prefill elsewhere: once more, prefilled locally. A node that
        is gone or refuses, but a prefill node that is gone: once more on another one. A mistake of the client's is
        everywhere the same."""
        if error.is_clients_fault and error.node is attempt.decode:
            return False
        if job.request.forward is not None and progress.response is not None:
            return False  # only the engine that wrote its beginning knows how this response goes on
        if error.node is attempt.prefill:
            if isinstance(error, NodeRefusedError) and not error.is_clients_fault and not progress.prefill_refused:
                # It drains, to leave or to take another role, and nothing is lost yet.
                self.registry.unreachable(error.node, self.now_s())
                progress.prefill_refused = True
                return True
            progress.prefill_gave_up = True
            return True
        progress.decode_attempts += 1
        if isinstance(error, NodeUnreachableError | NodeRefusedError):
            # A node that refuses now (draining) would be asked again: it is no better than one that is gone.
            self.registry.unreachable(error.node, self.now_s())
            return progress.decode_attempts < self.decode_attempts
        # Its engine failed: because of this request, perhaps, so that it isn't given to all others as well.
        progress.engine_failures += 1
        if progress.response is not None:
            self.registry.unreachable(error.node, self.now_s())
            return progress.engine_failures < ENGINE_FAILURES
        if attempt.prefill is not None and not progress.prefill_gave_up:
            progress.prefill_gave_up = True
            return True
        return False

    # -- one attempt -------------------------------------------------------------------------------------------------

    async def _attempt(self, http: web.Request, job: Job, progress: Progress, attempt: Attempt) -> web.StreamResponse:
        """Raises NodeCallError of either node, ProtocolError. Both calls are closed when it ends."""
        self.metrics.decisions.labels(attempt.reason).inc()
        body = self._decode_body(job, attempt, progress)
        prefill: asyncio.Task[PrefillResult] | None = None
        tokens = attempt.prompt_tokens
        with self.registry.dispatched(attempt.decode, tokens, attempt.decode_share), ExitStack() as prefilling:
            if attempt.prefill is not None:
                prefilling.enter_context(self.registry.dispatched(attempt.prefill, tokens, attempt.prefill_share))
            try:
                with closing(await self.nodes.call(attempt.decode, "/decode", body, job.request_id)) as call:
                    ticket, batch = await _read_ticket(call)
                    self.registry.reached(attempt.decode)
                    if attempt.prefill is not None and ticket.ticket:
                        progress.instants.ticket_s = self.now_s()
                        prefill = self._start_prefill(job, attempt, ticket, call, progress)
                        # From its end on, the request is no load on the prefill node.
                        prefill.add_done_callback(lambda _: prefilling.close())
                    if job.request.stream:
                        return await self._relay(http, job, progress, attempt, call, batch)
                    return await self._collect(job, progress, attempt, call, batch)
            finally:
                if prefill is not None:
                    await _stop(prefill)

    def _start_prefill(
        self, job: Job, attempt: Attempt, ticket: TicketEvent, call: NodeCall, progress: Progress
    ) -> asyncio.Task[PrefillResult]:
        assert attempt.prefill is not None
        prefill_call = PrefillCall(
            job.request_id,
            self.name,
            ticket.prompt_token_ids or _context_json(job, progress),  # type: ignore[arg-type]  # JSON already
            attempt.decode.name,
            ticket.ticket,
            ticket.kv_addresses,
            max(0.0, job.deadline_s - self.now_s()),
            job.tenant,
            attempt.fetch,
            job.traceparent,
            job.request.priority,
            job.adapter,
        )

        prefill = attempt.prefill
        attempt.held_tokens = ticket.token_start

        def ended(task: asyncio.Task[PrefillResult]) -> None:
            if not task.cancelled() and task.exception() is None:
                self.registry.reached(prefill)
                self._prefilled(attempt, task.result())
            # After the first token all KV has arrived: what happens to the call then changes nothing.
            if not task.cancelled() and (error := task.exception()) is not None and not attempt.answered:
                call.fail(error if isinstance(error, Exception) else RuntimeError("prefill was interrupted"))

        task = asyncio.create_task(self.nodes.prefill(attempt.prefill, prefill_call))
        task.add_done_callback(ended)
        return task

    def _prefilled(self, attempt: Attempt, result: PrefillResult) -> None:
        """What a prefill that has ended tells of links and caches."""
        self.registry.links.compressed(result.raw_bytes, result.wire_bytes)
        self.metrics.held_tokens.labels("prefill").inc(result.held_tokens)
        self.metrics.held_tokens.labels("decode").inc(attempt.held_tokens)
        if attempt.fetch is not None:
            self.metrics.fetches.labels(result.fetch_failed or "done").inc()
            self.metrics.fetched_tokens.inc(result.fetched_tokens)

    async def _relay(
        self, http: web.Request, job: Job, progress: Progress, attempt: Attempt, call: NodeCall, batch: Batch | None
    ) -> web.StreamResponse:
        """Every event as it comes; those that come together in one write, the last ones with the end of the body."""
        held = b""
        response = progress.response
        while batch is not None:
            self._note(progress, attempt, batch)
            if batch.output_tokens:
                progress.instants.token_came(self.now_s())
            if batch.relay:
                held += batch.relay
                if response is None and (batch.done or progress.output_tokens):
                    response = progress.response = _stream_response(job.request_id, attempt)
                    await response.prepare(http)
                if response is not None:
                    data, held = held, b""
                    if batch.done:
                        await response.write_eof(data)
                        await call.read_to_end()
                        return response
                    await response.write(data)
            batch = await call.read()
        raise NodeUnreachableError(attempt.decode, "it ended its stream before the output was complete")

    async def _collect(
        self, job: Job, progress: Progress, attempt: Attempt, call: NodeCall, batch: Batch | None
    ) -> web.Response:
        """The one `data:` line as the JSON body."""
        relay: list[bytes] = []
        while batch is not None:
            self._note(progress, attempt, batch)
            relay.append(batch.relay)
            batch = await call.read()
        if not any(relay):
            raise NodeUnreachableError(attempt.decode, "it ended its stream before the output was complete")
        headers = _headers(job.request_id, attempt) | {"content-type": "application/json"}
        return web.Response(body=response_body(b"".join(relay)), headers=headers)

    def _note(self, progress: Progress, attempt: Attempt, batch: Batch) -> None:
        if batch.output_tokens:
            attempt.answered = True
            progress.output_tokens += batch.output_tokens
            progress.token_ids.append(batch.token_ids)
            progress.text_ahead = batch.text_ahead
        elif batch.text_ahead:
            progress.text_ahead += batch.text_ahead
        if batch.finished or batch.usage:
            progress.finished, progress.usage = True, batch.usage or progress.usage
        if batch.timeline is not None:
            progress.timeline = batch.timeline

    def _decode_body(self, job: Job, attempt: Attempt, progress: Progress) -> bytes:
        delivered = progress.delivered_ids
        return msgspec.json.encode(
            DecodeCall(
                job.request_id,
                self.name,
                job.prompt.json,  # type: ignore[arg-type]  # already JSON, written out as it is
                job.max_output_tokens,
                job.request.sampling,
                job.format,
                local_prefill=attempt.prefill is None,
                prefill_node=attempt.prefill.name if attempt.prefill is not None else "",
                timeout_s=max(0.0, job.deadline_s - self.now_s()),
                tenant=job.tenant,
                output_token_ids=msgspec.Raw(b"[%b]" % delivered),  # type: ignore[arg-type]
                text_ahead=progress.text_ahead if delivered else 0,
                traceparent=job.traceparent,
                priority=job.request.priority,
                forward=None if job.request.forward is None else dict(job.request.forward),
            )
        )

    # -- afterwards --------------------------------------------------------------------------------------------------

    def _account(self, job: Job, progress: Progress) -> None:
        instants, attempt = progress.instants, progress.attempt
        instants.ended_s = self.now_s()
        job.ended(progress.output_tokens)
        self.metrics.output_tokens.inc(progress.output_tokens)
        self.metrics.e2e_seconds.observe(instants.ended_s - instants.arrived_s)
        if instants.first_token_s is not None:
            self.metrics.ttft_seconds.observe(instants.first_token_s - instants.arrived_s)
        logger.info(
            "request",
            outcome=progress.outcome,
            reason=attempt.reason if attempt else NO_NODE,
            decode=attempt.decode.name if attempt else None,
            prefill=attempt.prefill.name if attempt and attempt.prefill else None,
            fallbacks=progress.fallbacks or None,
            prompt_tokens=job.prompt.tokens,
            output_tokens=progress.output_tokens,
            e2e_s=round(instants.ended_s - instants.arrived_s, 4),
            **_logged(job, attempt, instants),
        )
        facts = _facts(job, progress)
        if job.trace is not None and job.trace.recorded:
            job.trace.end(spans.request_span(facts, instants, model=job.request.model))
        if attempt is not None:
            self.metrics.offloads.inc(attempt.offloaded)
            self.timelines.add(Record(facts, instants, progress.timeline, b",".join(progress.token_ids)))


def _facts(job: Job, progress: Progress) -> RequestFacts:
    attempt = progress.attempt
    decision = attempt.decision if attempt is not None else None
    return RequestFacts(
        job.request_id,
        progress.outcome,
        attempt.reason if attempt else NO_NODE,
        progress.fallbacks,
        attempt.prefill.name if attempt and attempt.prefill else None,
        attempt.decode.name if attempt else "",
        job.prompt.tokens,
        progress.output_tokens,
        in_words(decision, job.prompt.tokens) if decision is not None else "",
        attempt.offloaded if attempt else False,
        time.time(),
    )


def _context_json(job: Job, progress: Progress) -> msgspec.Raw:
    """The prompt's ids, and behind them those of the tokens that the client has."""
    delivered = progress.delivered_ids
    if not delivered:
        return job.prompt.json
    return msgspec.Raw(b"%b,%b]" % (bytes(job.prompt.json).rstrip()[:-1], delivered))


async def _read_ticket(call: NodeCall) -> tuple[TicketEvent, Batch]:
    """The first event, and the batch it came in, which may hold more. Raises NodeCallError."""
    while (batch := await call.read()) is not None:
        for name, data in batch.events:
            if name == "ticket":
                return decode_event(call.node, data, TicketEvent), batch
        if batch.relay:
            break
    raise NodeUnreachableError(call.node, "it gave no ticket")


async def _stop(task: asyncio.Task[PrefillResult]) -> None:
    """Close the prefill call if it is still open; its failure, if any, has been seen."""
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.exception()


def _headers(request_id: str, attempt: Attempt) -> dict[str, str]:
    headers = {REQUEST_ID_HEADER: request_id, REASON_HEADER: attempt.reason, DECODE_HEADER: attempt.decode.name}
    headers[DECODE_REGION_HEADER] = attempt.decode.region
    headers[HELD_HEADER] = str(attempt.held_tokens)
    if attempt.decision is not None:
        headers[DECISION_HEADER] = in_words(attempt.decision, attempt.prompt_tokens)
    if attempt.prefill is not None:
        headers[PREFILL_HEADER] = attempt.prefill.name
        headers[PREFILL_REGION_HEADER] = attempt.prefill.region
    return headers


def _logged(job: Job, attempt: Attempt | None, instants: RouterInstants) -> dict[str, object]:
    """Of the decision, for the request's line in the log."""
    first_s = instants.first_token_s
    logged: dict[str, object] = {} if first_s is None else {"ttft_s": round(first_s - instants.arrived_s, 4)}
    if attempt is not None and attempt.decision is not None:
        logged["decision"] = in_words(attempt.decision, job.prompt.tokens)
        if attempt.fetch is not None:
            logged["fetch_from"] = attempt.fetch.node
    return logged


def _stream_response(request_id: str, attempt: Attempt) -> web.StreamResponse:
    headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
    return web.StreamResponse(headers=headers | _headers(request_id, attempt))


def _refused(error: NodeCallError, request_id: str) -> web.Response:
    """What a node said of the client's mistake goes to the client as it is; its other troubles are ours: 503."""
    if error.is_clients_fault and error.detail is not None:
        status = error.status if 400 <= error.status < 500 else CLIENT_ERRORS[error.detail.type]
        return error_response(status, ErrorBody(error.detail))
    logger.error("no_node_could_serve", error=str(error), reason=error.reason)
    message = "the request could not be served; try again"
    if error.detail is not None and error.detail.type == "server_error":
        return error_response(500, ErrorBody(ErrorDetail(f"{message} (request {request_id})", "server_error")))
    return error_response(*describe_error(UnavailableError(message, retry_after_s=RETRY_AFTER_S), request_id))


async def _end_with_error(http: web.Request, response: web.StreamResponse, error: Exception, request_id: str) -> None:
    """As OpenAI ends a stream that failed: an error object instead of a chunk, and no [DONE]. A client that reads
    nothing is cut off."""
    if isinstance(error, NodeCallError | ProtocolError):
        logger.error("stream_broken", error=str(error))
        detail = ErrorDetail("the stream broke off; the output is incomplete", "server_error", None, "stream_broken")
        body = ErrorBody(detail)
    else:
        body = describe_error(error, request_id)[1]
    try:
        async with asyncio.timeout(LAST_WRITE_S):
            await response.write(b"data: %b\n\n" % to_json(body))
            await response.write_eof()
    except TimeoutError:
        if http.transport is not None:
            http.transport.abort()
