"""The calls that change nodes' roles: one order at a time a region, node after node until enough have said yes."""

from __future__ import annotations

import asyncio

from prfaas.common import log
from prfaas.common.metrics import RouterMetrics
from prfaas.services.messages import RoleCall
from prfaas.services.router.planning import Order, Planning
from prfaas.services.router.registry import Node
from prfaas.services.router.upstream import NodeCallError, NodeRefusedError, Nodes, NodeUnreachableError

UNFIT = "certificate_role"
"""A node that refuses with this code would refuse again."""

logger = log.get_logger("router")


class RoleCalls:
    """Carries orders out in tasks of its own, which `close` cancels. A node that has said yes changes in any case."""

    def __init__(self, planning: Planning, nodes: Nodes, metrics: RouterMetrics) -> None:
        self._planning = planning
        self._nodes = nodes
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, order: Order) -> None:
        task = asyncio.create_task(self._carry_out(order))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _carry_out(self, order: Order) -> None:
        told = 0
        try:
            for node in order.nodes:
                if told == order.count:
                    break
                told += await self._tell(node, order)
            if told < order.count:
                logger.error("too_few_converted", region=order.region, role=order.role, wanted=order.count, told=told)
        finally:
            self._planning.carried_out(order)

    async def _tell(self, node: Node, order: Order) -> bool:
        planning = self._planning
        call = RoleCall(planning.router, planning.holder, order.role, order.reason, planning.config.drain_s)
        try:
            answer = await self._nodes.change_role(node, call)
        except NodeCallError as error:
            outcome = "unreachable" if isinstance(error, NodeUnreachableError) else "refused"
            self._metrics.role_calls.labels(order.role, outcome).inc()
            logger.warning("role_refused", node=node.name, role=order.role, error=str(error))
            if isinstance(error, NodeRefusedError) and error.detail is not None and error.detail.code == UNFIT:
                planning.is_unfit(node)
            return False
        self._metrics.role_calls.labels(order.role, answer.state).inc()
        logger.info(
            "role", node=node.name, role=order.role, state=answer.state, running=answer.running_requests,
            why=order.reason,
        )  # fmt: skip
        if answer.state == "draining":
            planning.registry.changes_role(node, order.role)
        return True
