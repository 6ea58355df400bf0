"""A node's role, and its change while the node runs.

    serving ── POST /role ──▶ draining: nothing new in either role, what runs ends by itself
       ▲                          │ the last request has ended          │ drain_s has passed
       └── heartbeat at once ◀────┴── serving in the other role         └── serving in the old one

The process, its engine, KV endpoint and prefix pool stay. Heartbeats say `draining` and the role to come; a call that
comes before a router has heard of it is answered with 503, which routers repeat elsewhere. Only the router that this
node has granted the planner's lease to is obeyed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from aiohttp import web
from prfaas.common import log
from prfaas.common.errors import ConflictError, RequestError, UnavailableError
from prfaas.common.metrics import NodeMetrics
from prfaas.common.scheduling.planner_lease import MAX_HOLDER, Grant
from prfaas.services.leases import Leases
from prfaas.services.messages import HeartbeatAnswer, RoleAnswer, RoleCall
from prfaas.services.tls import check_caller
from prfaas.services.web import Signer, json_response, parse_json, read_signed
from prfaas.transport.tls import Tls

ROLES = ("prefill", "decode")
MAX_DRAIN_S = 86_400.0
MAX_LEASE_S = 600.0
MAX_REASON = 500

_log = log.get_logger("node")


class Roles:
    """`why_not()`: why the role can't be changed now, None: it can. `on_change()`: heartbeats have news."""

    def __init__(
        self,
        node: str,
        role: str,
        leases: Leases,
        metrics: NodeMetrics,
        signer: Signer,
        tls: Tls | None,
        why_not: Callable[[], str | None],
        on_change: Callable[[], None],
    ) -> None:
        self.role = role
        self.next_role = ""
        """It is draining to take this one."""
        self.grant = Grant(time.monotonic())
        self._node = node
        self._leases = leases
        self._metrics = metrics
        self._signer = signer
        self._tls = tls
        self._why_not = why_not
        self._on_change = on_change
        self._changing: asyncio.Task[None] | None = None

    def asked(self, answer: HeartbeatAnswer, now_s: float) -> None:
        """A router bids for the planner's lease, in its own name."""
        bid = answer.planner_bid
        if len(bid) <= MAX_HOLDER and _router_of(bid) == answer.router and 0 < answer.planner_lease_s <= MAX_LEASE_S:
            self.grant.asked(bid, answer.answered_s, answer.planner_lease_s, now_s)

    async def handle(self, request: web.Request) -> web.Response:
        """POST /role: RoleCall → RoleAnswer, at once. Raises RequestError (ConflictError), UnavailableError."""
        call = await parse_json(await read_signed(request, self._signer), RoleCall)
        check_caller(request, call.router, ("router",))
        self._check(call)
        if call.role == self.role:
            return json_response(RoleAnswer("serving", call.role))
        if not self.next_role:
            self._begin(call)
        return json_response(RoleAnswer("draining", call.role, len(self._leases)))

    def _check(self, call: RoleCall) -> None:
        """Asked for the role that it has or is draining for, it says so; anything else that can't be raises."""
        if call.role not in ROLES:
            raise RequestError(f"role must be prefill or decode, not {call.role[:50]!r}", param="role")
        if not 0 <= call.drain_s <= MAX_DRAIN_S:
            raise RequestError(f"drain_s must be from 0 to {MAX_DRAIN_S:.0f}", param="drain_s")
        holder = self.grant.to(time.monotonic())
        if not holder or holder != call.planner or _router_of(holder) != call.router:
            has = f"router {_router_of(holder)} has it" if holder else "nobody has it"
            raise ConflictError(
                f"router {call.router[:128]} does not hold the planner's lease of node {self._node}: {has}",
                code="not_the_planner",
            )
        if (why := self._why_not()) is not None:
            raise UnavailableError(f"{why}; it takes no other role")
        if self.next_role and call.role != self.next_role:
            raise ConflictError(f"this node is draining to become a {self.next_role} node", code="changing_role")
        if self._tls is None:
            return
        problem = self._tls.identity.problem(roles=(call.role,))
        if problem is not None:
            raise ConflictError(
                f"node {self._node} can't become a {call.role} node: {problem}; make one for both roles: "
                f"prfaas certs init --nodes {self._node}:prefill+decode",
                code="certificate_role",
            )

    def _begin(self, call: RoleCall) -> None:
        self.next_role = call.role
        self._leases.refuse_new()
        _log.info(
            "changing role",
            node=self._node,
            role=self.role,
            to=call.role,
            router=call.router,
            reason=call.reason[:MAX_REASON],
            running=len(self._leases),
            drain_s=call.drain_s,
        )
        self._changing = asyncio.create_task(self._change(call.role, call.drain_s))
        self._on_change()

    async def _change(self, role: str, drain_s: float) -> None:
        began_s = time.monotonic()
        outcome = "done"
        try:
            async with asyncio.timeout(drain_s):
                await self._leases.none_left()
            self.role = role
        except TimeoutError:
            outcome = "given_up"
        drained_s = time.monotonic() - began_s
        self.next_role = ""
        self._leases.take_new(self.role)
        self._metrics.role_changes.labels(role, outcome).inc()
        self._metrics.drain_seconds.observe(drained_s)
        _log.info(
            "changed role" if outcome == "done" else "kept role", node=self._node, role=self.role, drained_s=drained_s
        )
        self._on_change()

    async def stop(self) -> None:
        """The node leaves: a change that is under way ends here, and nothing new is taken. Idempotent."""
        if self._changing is not None:
            self._changing.cancel()
            await asyncio.wait([self._changing])
        self.next_role = ""


def _router_of(holder: str) -> str:
    """A holder is called <router>/<what makes its process unique>."""
    return holder.rpartition("/")[0]
