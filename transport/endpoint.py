"""A node's KV endpoint: accepts lanes, keeps sessions to peers open, makes the two halves of transfers.

One endpoint a process and worker rank. All methods are the event loop's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import os
import secrets
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prfaas.common.auth import NonceWindow
from prfaas.common.config import TransportConfig, is_loopback, parse_address, parse_lossy
from prfaas.common.errors import (
    ConfigError,
    LaneLostError,
    PeerRefusedError,
    ProtocolError,
    TicketError,
    TransferCancelledError,
    TransferError,
)
from prfaas.common.identity import PeerIdentity
from prfaas.common.kv_layout import MAX_TENSORS_PER_LAYER, KvLayout
from prfaas.common.log import get_logger
from prfaas.common.metrics import TransportMetrics
from prfaas.transport.api import KvAddress, KvReceiver, KvSender, LinkClock, LinkEstimate, TransferSpec
from prfaas.transport.channel import Channel, Outgoing
from prfaas.transport.codec_choice import AUTO
from prfaas.transport.codecs.calibration import calibrate_all
from prfaas.transport.codecs.choice import CodecSpeeds
from prfaas.transport.codecs.registry import CODEC_NAMES
from prfaas.transport.connection import Control, Event
from prfaas.transport.dialling import Dialler
from prfaas.transport.egress import EgressCap
from prfaas.transport.fetching import MAX_PREFIX_HASH_BYTES, FetchRequest, ServeFetch
from prfaas.transport.frames import (
    MAX_REASON_CHARS,
    SUPPORTED_VERSIONS,
    Fetch,
    Fetched,
    FrameHeader,
    Hello,
    Open,
    Opened,
    SignedHello,
)
from prfaas.transport.handshake import MAX_LANES, check_hello, signed
from prfaas.transport.lanes.api import Backend, LaneHandler, Listener
from prfaas.transport.lanes.tcp import TcpBackend
from prfaas.transport.receiving import TransferReceiver
from prfaas.transport.routes import Routes
from prfaas.transport.sending import Link, TransferSender
from prfaas.transport.session import Session
from prfaas.transport.ticket import KEY_BYTES, TicketBook, read_claims
from prometheus_client import CollectorRegistry

MAX_GREETING_LANES = 256
"""Lanes that have connected but not said HELLO yet, so that strangers can't fill our memory. One more closes the
oldest: strangers that say nothing must not keep out a node, whose HELLO follows at once."""
MAX_SPARE_SESSIONS = 4
"""To one node, at different addresses and without transfers: one that starts anew again and again is somewhere else
each time. The one told longest ago makes room."""
MAX_ACCEPTED_SESSIONS = 64
"""Of one node; one that has lost its lanes stays for `resume_s`, so that a node could fill our memory with them."""
MAX_CODEC_THREADS = 8
CLOSE_S = 1.0
"""How long lanes may take to say why they close."""

log = get_logger("transport")

Authorize = Callable[[Hello], str | None]
"""A reason to refuse this (authenticated) peer, or None."""


def computed(config: TransportConfig) -> TransportConfig:
    """With what 0 stands for in settings that this machine decides."""
    threads = config.codec_threads or max(1, min(MAX_CODEC_THREADS, (os.cpu_count() or 1) // 2))
    return dataclasses.replace(config, codec_threads=threads)


def allow_all(_hello: Hello) -> str | None:
    return None


class KvEndpoint:
    """Made anywhere, used after `start`. `backend`: where lanes come from; TCP unless a test says otherwise."""

    def __init__(
        self,
        config: TransportConfig,
        *,
        node: str,
        layout: KvLayout,
        model_fingerprint: str,
        secret: bytes,
        authorize: Authorize = allow_all,
        backend: Backend | None = None,
        clock_skew_s: float = 60.0,
        metrics: TransportMetrics | None = None,
        region: str = "",
    ) -> None:
        self.node = node
        self.layout = layout
        self.metrics = metrics or TransportMetrics(CollectorRegistry())
        self._config = config = computed(config)
        self._fingerprint = model_fingerprint
        self._secret = secret
        self._authorize = authorize
        self._backend: Backend = backend or TcpBackend(config)
        self._routes = Routes(config, self._backend, secret, self.metrics)
        self._skew_s = clock_skew_s
        self._region = region
        self._nonces = NonceWindow(2 * clock_skew_s)
        self._epoch = secrets.token_hex(8)
        self._book = TicketBook(secrets.token_bytes(KEY_BYTES), node, self._epoch)
        self._executor = ThreadPoolExecutor(config.codec_threads, thread_name_prefix="kv-codec")
        self._egress = EgressCap(config.egress_bytes_per_s)
        self._speeds = CodecSpeeds()
        self._lossy = frozenset(parse_lossy(entry) for entry in config.lossy)
        self._listener: Listener | None = None
        self._dialled: dict[tuple[str, KvAddress], Dialler] = {}
        self._accepted: dict[tuple[str, str], Session] = {}
        self._receivers: dict[str, TransferReceiver] = {}
        self._greeting: dict[Greeter, None] = {}
        """In order of arrival."""
        self._background: set[asyncio.Task[None]] = set()
        self._on_fetch: ServeFetch | None = None
        self._fetched: weakref.WeakSet[TransferSender] = weakref.WeakSet()
        """Made for other nodes' FETCHes."""
        self._accepted_lane = asyncio.Event()
        self._closed = False

    # -- life

    async def start(self) -> None:
        """Bind and listen. Raises ConfigError when the address can't be bound or may not be without a secret."""
        host, port = parse_address(self._config.bind)
        if not self._secret and not is_loopback(host):
            raise ConfigError(
                [f"transport.bind = {self._config.bind}: outside loopback a cluster secret is needed "
                 "(cluster.secret_file)"]
            )  # fmt: skip
        # First: a node that dials at once must be told of it.
        await self._routes.start(host, self._accept)
        try:
            self._listener = await self._backend.listen(host, port, self._accept)
        except OSError as error:
            await self._routes.aclose()
            raise ConfigError([f"transport.bind = {self._config.bind}: {error.strerror or error}"]) from error
        if self._config.codec == AUTO:
            self._run(self._calibrate())
        # Where it really listens: a name, or 0, may stand for a wildcard.
        if not self._config.advertise and _is_wildcard(self._listener.address[0]):
            await self._listener.aclose()
            await self._routes.aclose()
            raise ConfigError(
                [f"transport.bind = {self._config.bind}: set transport.advertise to where other nodes dial"]
            )

    async def _calibrate(self) -> None:
        loop = asyncio.get_running_loop()
        self._speeds.calibrated(await loop.run_in_executor(self._executor, calibrate_all))

    @property
    def addresses(self) -> list[KvAddress]:
        """As advertised to peers. Valid after `start`."""
        if self._listener is None:
            raise ConfigError(["the KV endpoint has not been started"])
        host, port = self._listener.address
        if self._config.advertise:
            host, advertised_port = parse_address(self._config.advertise)
            port = advertised_port or port
        return [KvAddress(host, port)]

    async def aclose(self) -> None:
        """Close all sessions; their transfers fail with LaneLostError. Pieces and destinations are not touched after
        their own `aclose` alone has returned. Idempotent; nothing can be connected afterwards."""
        self._closed = True
        if self._listener is not None:
            await self._listener.aclose()
        await self._routes.aclose()
        diallers, self._dialled = list(self._dialled.values()), {}
        for dialler in diallers:
            await dialler.aclose()
        sessions = [d.session for d in diallers] + list(self._accepted.values())
        channels = [channel for session in sessions for channel in session.channels()]
        channels += [greeter.channel for greeter in self._greeting]
        for session in sessions:
            session.close("the node is shutting down")
        await _close_channels(channels, "the node is shutting down")
        for receiver in list(self._receivers.values()):
            await receiver.aclose("the node is shutting down")
        if self._background:
            await asyncio.wait(self._background)
        # Jobs in progress read and write engine memory: their transfers' aclose waits for them, and so do we.
        await asyncio.get_running_loop().run_in_executor(None, self._executor.shutdown)

    # -- peers

    def connect(self, node: str, addresses: Sequence[KvAddress]) -> None:
        """Open a session to `node` at these addresses in the background, and keep it open for `transport.idle_s` from
        now: called at each heartbeat, it is a lease. Without it a session lives as long as it has transfers, or senders
        that will open one, and is closed when there were none for `idle_s`.

        A session belongs to an address, since another address is another process: routers that tell different ones
        make two sessions, and neither disturbs the other. So a node that has moved is dialled at once, and what an old
        process that lives on still has under way ends in peace; each ticket goes to the process that issued it.

        Raises TransferCancelledError on an endpoint that is closed."""
        self._dial(node, addresses)

    def _dial(self, node: str, addresses: Sequence[KvAddress]) -> Dialler:
        if self._closed:
            raise TransferCancelledError("the node is shutting down")
        if not addresses:
            raise ConfigError([f"node {node!r} advertises no KV address"])
        address = min(addresses, key=lambda a: a.rank)  # in whatever order they were told
        dialler = self._dialled.pop((node, address), None)
        if dialler is None:
            self._make_room(node)
            dialler = Dialler(
                self._new_session(secrets.token_hex(16), node, self._dialled_ended),
                address,
                self._routes.of(node),
                self._config,
                self._make_hello,
                self._check_answer,
                lambda: secrets.token_hex(16),
                self._hang_up,
                time.monotonic,
            )
        dialler.wanted()
        self._dialled[node, address] = dialler  # last: the newest
        return dialler

    def _make_room(self, node: str) -> None:
        spare = [d for (peer, _), d in self._dialled.items() if peer == node and not d.in_use]
        if len(spare) >= MAX_SPARE_SESSIONS:
            self._hang_up(spare[0])

    def _hang_up(self, dialler: Dialler) -> None:
        """Close a session that nobody needs; the other side sees its lanes close."""
        key = (dialler.session.peer, dialler.address)
        if self._dialled.get(key) is dialler:  # not while the endpoint closes all of them
            del self._dialled[key]
            log.info("kv session closed", peer=dialler.session.peer, reason="no longer needed")
            self._run(self._close_dialler(dialler))

    def clock(self, node: str) -> LinkClock | None:
        """Of the session to `node`, or None: no session, or no PONG yet."""
        clocks = (session.link_clock() for session in self._sessions() if session.peer == node and session.usable)
        return next((clock for clock in clocks if clock is not None), None)

    # -- transfers

    def receiver(self, spec: TransferSpec, sender: str = "") -> tuple[str, KvReceiver]:
        """A ticket to give to the prefill node, and the receiving half. `bind` it before the ticket goes out. `sender`:
        the only node that may present the ticket; empty: any of the cluster."""
        now = time.monotonic()
        ticket = self._book.issue(spec, now + self._config.ticket_s, sender)
        receiver = TransferReceiver(
            spec,
            self.layout,
            self._config.credit_bytes,
            self._executor,
            self._speeds,
            self._lossy,
            self._receiver_ended,
        )
        self._receivers[spec.transfer_id] = receiver
        timer = asyncio.get_running_loop().call_later(self._config.ticket_s, self._expire, receiver)
        receiver.expiry = timer
        return ticket, receiver

    def sender(self, ticket: str, node: str, addresses: Sequence[KvAddress], traceparent: str = "") -> KvSender:
        """The sending half for `ticket`, to `node`. The claims are read, not verified: only the receiver can.
        `traceparent`: the context (W3C) that the receiver's spans of the transfer are to belong to.

        Raises TicketError when the text is no ticket or its model or layout is not this node's.
        """
        claims = read_claims(ticket)
        spec = claims.spec()
        if spec.model_fingerprint != self._fingerprint or spec.layout_hash != self.layout.layout_hash:
            raise TicketError(f"the ticket is for another model or KV layout than this node's ({node})")
        link = self._link_to_receiver(node, claims.epoch) or self._link_to(node, addresses, claims.epoch)
        sender = TransferSender(
            spec, ticket, self.layout, link, self._config.chunk_bytes, self._config.open_timeout_s, traceparent
        )
        if isinstance(link, Dialler):
            link.senders.add(sender)
        return sender

    async def fetch(
        self,
        ticket: str,
        prefix_hash: bytes,
        node: str,
        addresses: Sequence[KvAddress],
        remaining_s: float | None = None,
    ) -> None:
        """Ask `node` to send the KV that `ticket` (of this endpoint's `receiver`, bound already) permits, of the prefix
        whose tokens up to the range's end have this hash. Returns when it has agreed; layers then arrive as in every
        transfer. remaining_s: until the request's deadline.

        Raises PeerRefusedError with its reason (it doesn't hold that prefix, for one), LaneLostError when it does not
        answer within `transport.open_timeout_s`. After an error or a cancel the receiver is still to be closed.
        """
        spec = read_claims(ticket).spec()
        body = Fetch(ticket, prefix_hash, spec.tokens.start, spec.tokens.end, remaining_s)
        timeout_s = self._config.open_timeout_s
        if remaining_s is not None:
            timeout_s = min(timeout_s, max(0.0, remaining_s))
        try:
            async with asyncio.timeout(timeout_s):
                session = await self._link_to(node, addresses).usable()
                await session.fetching.ask(body)
        except TimeoutError:
            raise LaneLostError(f"{node} did not answer FETCH within {timeout_s:g} s") from None

    def on_fetch(self, serve: ServeFetch) -> None:
        """Who answers other nodes' FETCH; until it is set all are refused."""
        self._on_fetch = serve

    def _serve_fetch(self, session: Session, body: Fetch) -> Fetched:
        problem = self._fetch_problem(body)
        if problem is None and self._on_fetch is not None:
            spec = read_claims(body.ticket).spec()
            link = SessionLink(session)
            config = self._config
            sender = TransferSender(spec, body.ticket, self.layout, link, config.chunk_bytes, config.open_timeout_s)
            self._fetched.add(sender)
            try:
                problem = self._on_fetch(FetchRequest(spec, body.prefix_hash, session.peer, body.remaining_s), sender)
            except Exception:
                log.exception("the engine's on_fetch raised", peer=session.peer, request_id=spec.request_id)
                problem = "its engine failed; its log says more"
            if problem is not None:  # whoever still has it: it can't be opened, and waits for nothing
                sender.fail(TransferCancelledError("FETCH was refused"))
        if problem is not None:
            self.metrics.refusals.labels("fetch").inc()
        return Fetched(refused="" if problem is None else problem[:MAX_REASON_CHARS])

    def _fetch_problem(self, body: Fetch) -> str | None:
        if self._on_fetch is None:
            return "this node holds no prefixes for others"
        if sum(sender.waits_to_open for sender in self._fetched) >= self._config.max_transfers:
            return "too many fetches wait for their turn; transport.max_transfers"
        if not 1 <= len(body.prefix_hash) <= MAX_PREFIX_HASH_BYTES:
            return f"a prefix hash of {len(body.prefix_hash)} bytes"
        try:
            spec = read_claims(body.ticket).spec()
        except TicketError as error:
            return str(error)
        if spec.model_fingerprint != self._fingerprint or spec.layout_hash != self.layout.layout_hash:
            return "the ticket is for another model or KV layout"
        if (spec.tokens.start, spec.tokens.end) != (body.token_start, body.token_end):
            return "FETCH does not say the same as its ticket"
        return None

    def link_estimates(self) -> dict[str, LinkEstimate]:
        """What the sessions that are up have measured of the way to each peer, by node: the newest that has carried
        enough to know a bandwidth, else the newest."""
        found: dict[str, LinkEstimate] = {}
        for session in self._sessions():
            if not session.usable:
                continue
            estimate = session.link_estimate()
            known = found.get(session.peer)
            if known is None or (estimate.bandwidth_bytes_per_s and not known.bandwidth_bytes_per_s):
                found[session.peer] = estimate
        return found

    # -- inside

    def _sessions(self) -> list[Session]:
        """The newest first, those that we dialled before those that peers did."""
        dialled = [dialler.session for dialler in self._dialled.values()]
        return [*reversed(dialled), *reversed(self._accepted.values())]

    def _link_to_receiver(self, node: str, epoch: str) -> Link | None:
        """Where receivers dial: what `node` has dialled or will, since it may be out of reach from here. None: the
        usual way."""
        if self._config.dial == "sender":
            return None
        accepted = self.accepted_from(node, epoch)
        dialler = self._dialled_to(node, epoch)
        if dialler is None or (accepted is not None and accepted.usable):
            return AcceptedLink(self, node, epoch)
        return dialler if dialler.session.usable else FirstLink(self, dialler, epoch)

    def _link_to(self, node: str, addresses: Sequence[KvAddress], epoch: str = "") -> Link:
        accepted = self.accepted_from(node, epoch)
        dialler = self._dialled_to(node, epoch)
        if dialler is None and accepted is not None and (accepted.usable or not addresses):
            return AcceptedLink(self, node, epoch)
        if addresses:
            # Told by the process that issued the ticket: an older session of the name may lead to its predecessor.
            return self._dial(node, addresses)
        if dialler is None:
            raise TicketError(f"no session to {node} and no address to dial")
        return dialler

    def _dialled_to(self, node: str, epoch: str = "") -> Dialler | None:
        """The one told last among those that are up, or among all when none is; not those that are known to lead to
        another process than `epoch`."""
        diallers = [
            dialler
            for (peer, _), dialler in reversed(self._dialled.items())
            if peer == node and leads_to(epoch, dialler.session)
        ]
        return next((d for d in diallers if d.session.usable), diallers[0] if diallers else None)

    def accepted_from(self, node: str, epoch: str = "") -> Session | None:
        """The session that `node` has dialled: that process of it, if `epoch` says one."""
        # The newest: the lanes of an older one may be dead without our having noticed.
        sessions = [
            session
            for (peer, _), session in reversed(self._accepted.items())
            if peer == node and leads_to(epoch, session)
        ]
        return next((session for session in sessions if session.usable), sessions[0] if sessions else None)

    def _new_session(self, session_id: str, peer: str, on_ended: Callable[[Session], None]) -> Session:
        return Session(
            session_id,
            peer,
            self._config,
            self._executor,
            self._egress,
            self._speeds,
            self._admit,
            self._serve_fetch,
            self.metrics,
            on_ended,
        )

    def _dialled_ended(self, session: Session) -> None:
        for dialler in self._dialled.values():
            if dialler.session is session:
                dialler.session_ended()

    def _accepted_ended(self, session: Session) -> None:
        self._accepted.pop((session.peer, session.id), None)

    async def _close_dialler(self, dialler: Dialler) -> None:
        await dialler.aclose()
        await _close_channels(dialler.session.channels(), "no longer needed")
        dialler.session.close("no longer needed")

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _receiver_ended(self, receiver: TransferReceiver, outcome: str) -> None:
        self._book.void(receiver.spec.transfer_id)
        self._receivers.pop(receiver.spec.transfer_id, None)
        if receiver.expiry is not None:
            receiver.expiry.cancel()
        self.metrics.transfers.labels("received", outcome).inc()

    def _expire(self, receiver: TransferReceiver) -> None:
        if not self._book.presented(receiver.spec.transfer_id):
            receiver.fail(TicketError(f"nobody opened the transfer within {self._config.ticket_s:g} s"))

    def _admit(self, session: Session, number: int, body: Open) -> Opened:
        try:
            # With the name, which the secret vouches for: a session's id is whatever its dialler says.
            spec = self._book.present(body.ticket, f"{session.peer} {session.id}", time.monotonic(), session.peer)
            receiver = self._receivers.get(spec.transfer_id)
            if receiver is None:
                raise TicketError("the ticket is void: its transfer has finished or was cancelled")
            problem = self._mismatch(spec, body)
        except TicketError as error:
            return Opened(body.attempt, refused=str(error)[:MAX_REASON_CHARS], kind="ticket")
        if problem is None:
            return receiver.admit(session, number, body)
        problem = problem[:MAX_REASON_CHARS]
        if not receiver.open:
            # Its ticket is with the one sender that there is, which can't send it: nobody else ever will.
            receiver.fail(TransferError(f"{session.peer} can't send this transfer: {problem}"), tell_peer=False)
        return Opened(body.attempt, refused=problem, kind="mismatch")

    def _mismatch(self, spec: TransferSpec, body: Open) -> str | None:
        claimed = (spec.transfer_id, spec.tokens.start, spec.tokens.end, spec.model_fingerprint, spec.layout_hash)
        opened = (body.transfer_id, body.token_start, body.token_end, body.model_fingerprint, body.layout_hash)
        shard = spec.shard
        claimed_shard = (shard.index, shard.count, shard.head_start, shard.head_end)
        if claimed != opened or claimed_shard != (
            body.shard_index, body.shard_count, body.head_start, body.head_end
        ):  # fmt: skip
            return "OPEN does not say the same as its ticket"
        if body.dtypes != self.layout.dtypes:
            theirs = dict(list(body.dtypes.items())[:MAX_TENSORS_PER_LAYER])
            return f"the sender's KV is {theirs}, this node's {self.layout.dtypes}; set engine.dtype alike"
        return None

    # -- HELLO

    def _make_hello(self, session: Session, lane: int, resume: bool) -> tuple[SignedHello, str]:
        hello = self._hello(session.id, lane, self._config.lanes or MAX_LANES, resume=resume)
        return signed(hello, self._secret), hello.nonce

    def _hello(self, session: str, lane: int, lanes: int, *, resume: bool = False, answer: bool = False) -> Hello:
        return Hello(
            versions=SUPPORTED_VERSIONS,
            node=self.node,
            session=session,
            lane=lane,
            lanes=lanes,
            model_fingerprint=self._fingerprint,
            time_s=time.time(),
            nonce=secrets.token_hex(16),
            codecs=CODEC_NAMES,
            features=self._routes.features,
            lossy=self._config.lossy,
            region=self._region,
            resume=resume,
            answer=answer,
            epoch=self._epoch,
        )

    def _check_answer(self, body: SignedHello, nonce: str, session: Session, identity: PeerIdentity | None) -> Hello:
        answer = self._check(body, identity, expect_answer_to=nonce, expect_node=session.peer)
        if session.established:
            self._check_same_process(session, answer)
        session.codecs.agreed(answer.codecs, answer.lossy)
        session.peer_epoch = answer.epoch
        return answer

    def _check(
        self,
        body: SignedHello,
        identity: PeerIdentity | None,
        expect_answer_to: str | None = None,
        expect_node: str | None = None,
    ) -> Hello:
        hello = check_hello(
            body,
            secret=self._secret,
            model_fingerprint=self._fingerprint,
            now_s=time.time(),
            monotonic_s=time.monotonic(),
            skew_s=self._skew_s,
            nonces=self._nonces,
            expect_answer_to=expect_answer_to,
            expect_node=expect_node,
            identity=identity,
        )
        if self._config.codec not in (AUTO, *hello.codecs):
            raise PeerRefusedError(f"{hello.node} does not have codec {self._config.codec!r}")
        refusal = self._authorize(hello)
        if refusal:
            raise PeerRefusedError(refusal)
        return hello

    def _check_same_process(self, session: Session, hello: Hello) -> None:
        """Each process knows the transfers of its own lanes only."""
        if hello.epoch != session.peer_epoch:
            raise PeerRefusedError(
                f"this lane leads to another process than the session's other lanes; is there more than one "
                f"{hello.node}, perhaps behind one address?"
            )

    def _accept(self) -> LaneHandler:
        if len(self._greeting) >= MAX_GREETING_LANES:
            next(iter(self._greeting)).give_up("too many lanes have not said HELLO yet")
        return Greeter(self).channel

    def greeted(self, greeter: Greeter, body: SignedHello) -> None:
        """HELLO came on an accepted lane. Raises PeerRefusedError."""
        hello = self._check(body, greeter.channel.peer_identity)
        session = self._accepted.get((hello.node, hello.session))
        if session is None:
            if hello.resume:
                greeter.channel.close("this node does not know the session; begin a new one", "unknown_session")
                return
            self._make_room_for_session_of(hello.node)
            session = self._new_session(hello.session, hello.node, self._accepted_ended)
            session.peer_epoch = hello.epoch
            self._accepted[hello.node, hello.session] = session
            self._routes.accepted(hello.node, hello.features)
        else:
            self._check_same_process(session, hello)
        answer = self._hello(hello.session, hello.lane, hello.lanes, answer=True)
        channel = greeter.channel
        channel.peer = hello.node
        channel.send(signed(answer, self._secret, hello.nonce))
        session.codecs.agreed(hello.codecs, hello.lossy)
        session.add_channel(channel, hello.lane)
        self._accepted_lane.set()
        self._accepted_lane = asyncio.Event()

    def _make_room_for_session_of(self, node: str) -> None:
        """Those without lanes go first, the oldest of them. Raises PeerRefusedError."""
        sessions = [session for (peer, _), session in self._accepted.items() if peer == node]
        if len(sessions) < MAX_ACCEPTED_SESSIONS:
            return
        without_lanes = next((session for session in sessions if not session.channels()), None)
        if without_lanes is None:
            raise PeerRefusedError(f"{node} has {len(sessions)} sessions here, each with lanes; use or close those")
        without_lanes.end(f"{node} has begun {len(sessions)} other sessions since")

    async def accepted_session(self, node: str, epoch: str = "") -> Session:
        """Wait until `node` has dialled us."""
        while True:
            session = self.accepted_from(node, epoch)
            if session is not None and session.usable:
                return session
            await self._accepted_lane.wait()

    def greeting(self, greeter: Greeter) -> None:
        self._greeting[greeter] = None

    def greeting_over(self, greeter: Greeter) -> None:
        self._greeting.pop(greeter, None)

    @property
    def open_timeout_s(self) -> float:
        return self._config.open_timeout_s


class SessionLink:
    """A `Link` to the one session on which the peer asked."""

    def __init__(self, session: Session) -> None:
        self.session: Session | None = session
        self.peer = session.peer

    async def usable(self) -> Session:
        assert self.session is not None
        if not self.session.established:
            raise LaneLostError(f"the session on which {self.peer} asked has ended")
        await self.session.wait_usable()
        return self.session


def leads_to(epoch: str, session: Session) -> bool:
    """To that process, or nobody knows which."""
    return session.peer_epoch in ("", epoch) or not epoch


class AcceptedLink:
    """A `Link` to a node that dials us."""

    def __init__(self, endpoint: KvEndpoint, node: str, epoch: str) -> None:
        self._endpoint = endpoint
        self._epoch = epoch
        self.peer = node

    @property
    def session(self) -> Session | None:
        return self._endpoint.accepted_from(self.peer, self._epoch)

    async def usable(self) -> Session:
        return await self._endpoint.accepted_session(self.peer, self._epoch)


class FirstLink(AcceptedLink):
    """A `Link` to a node that dials us, and that we are dialling: whichever comes first."""

    def __init__(self, endpoint: KvEndpoint, dialler: Dialler, epoch: str) -> None:
        super().__init__(endpoint, dialler.peer, epoch)
        self._dialler = dialler

    async def usable(self) -> Session:
        accepted = asyncio.create_task(super().usable())
        dialled = asyncio.create_task(self._dialler.usable())
        try:
            await asyncio.wait((accepted, dialled), return_when=asyncio.FIRST_COMPLETED)
            # Where our dialling is refused, or finds another process of the name, the node's may come yet.
            if dialled.done() and dialled.exception() is None and leads_to(self._epoch, dialled.result()):
                return dialled.result()
            return await accepted
        finally:
            accepted.cancel()
            dialled.cancel()


class Greeter:
    """The owner of an accepted channel until its HELLO was found good."""

    def __init__(self, endpoint: KvEndpoint) -> None:
        self._endpoint = endpoint
        self.channel = Channel(self, time.monotonic, "a stranger")
        endpoint.greeting(self)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(endpoint.open_timeout_s, self.give_up, "no HELLO in time")

    def give_up(self, reason: str) -> None:
        log.warning("kv lane closed", reason=reason)
        self._over()
        self.channel.abort(reason)

    def lane_event(self, channel: Channel, event: Event) -> None:
        if not isinstance(event, Control) or not isinstance(event.body, SignedHello):
            channel.abort("closed before HELLO")
            return
        self._timer.cancel()
        try:
            self._endpoint.greeted(self, event.body)
        except PeerRefusedError as error:
            self._endpoint.metrics.refusals.labels("hello").inc()
            channel.fail(error, "hello_refused")
        if channel.owner is not self:  # else it counts until it is closed
            self._over()

    def destination(self, channel: Channel, chunk: FrameHeader) -> memoryview | None:
        raise ProtocolError("CHUNK before HELLO")

    def next_outgoing(self, channel: Channel) -> Sequence[Outgoing]:
        return ()

    def chunks_sent(self, chunks: Sequence[Outgoing]) -> None:
        pass

    def lane_lost(self, channel: Channel, reason: str) -> None:
        self._over()

    def _over(self) -> None:
        self._timer.cancel()
        self._endpoint.greeting_over(self)


async def _close_channels(channels: Sequence[Channel], reason: str) -> None:
    """Tell the other side why, and close; abort those that can't be told in time."""
    for channel in channels:
        channel.close(reason)
    if channels:
        await asyncio.wait([channel.closed for channel in channels], timeout=CLOSE_S)
    for channel in channels:
        channel.abort(reason)


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
