"""Orders of the slow planner become calls to nodes, and GET /plan says what it thinks."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from prfaas.common.config import PlannerConfig
from prfaas.services.messages import PlanReport
from prfaas.services.router.app import ROUTER
from prfaas.services.router.planning import Order
from prfaas.services.router.roles import RoleCalls
from prfaas.services.router.upstream import Nodes


def refusal(code: str) -> tuple[int, Any]:
    return 409, {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": code}}


async def carry_out(cluster: Any, *nodes: Any, count: int = 1) -> None:
    """An order to these nodes, to its end."""
    router = cluster.app[ROUTER]
    calls = RoleCalls(router.planning, Nodes(cluster.session, router.signer), router.metrics.router)
    known = [router.registry._by_name[node.name] for node in nodes]
    router.planning._ordered.add("home")
    calls.begin(Order("home", "prefill", count, known, "1 : 2 becomes 2 : 1"))
    async with asyncio.timeout(10):
        await asyncio.gather(*calls._tasks)
    assert "home" not in router.planning._ordered


async def test_a_node_is_told_and_is_out_at_once(cluster: Any) -> None:
    """By whom, to become what, and why; those behind it in the order are not asked."""
    first, second = await cluster.add("d1"), await cluster.add("d2")
    await carry_out(cluster, first, second)
    (call,) = first.role_calls
    assert (call.router, call.role, call.reason, call.drain_s) == ("router", "prefill", "1 : 2 becomes 2 : 1", 300.0)
    assert call.planner == cluster.app[ROUTER].planning.holder
    assert second.role_calls == []
    node = cluster.app[ROUTER].registry._by_name["d1"]
    assert (node.draining, node.next_role) == (True, "prefill")
    assert cluster.metric("prfaas_router_role_calls_total", role="prefill", outcome="draining") == 1


async def test_nodes_that_refuse_or_are_gone_are_passed_over(cluster: Any) -> None:
    """And where nobody is left, that is told and the region is free for the next plan."""
    gone, refusing, good = await cluster.add("d1"), await cluster.add("d2"), await cluster.add("d3")
    await cluster.beat(gone, url="http://127.0.0.1:1")
    refusing.role_answer = refusal("not_the_planner")
    await carry_out(cluster, gone, refusing, good, count=2)
    assert len(good.role_calls) == len(refusing.role_calls) == 1
    for outcome in ("unreachable", "refused", "draining"):
        assert cluster.metric("prfaas_router_role_calls_total", role="prefill", outcome=outcome) == 1


async def test_a_node_that_cannot_take_the_role_is_remembered(cluster: Any) -> None:
    node = await cluster.add("d1")
    planning = cluster.app[ROUTER].planning
    node.role_answer = refusal("not_the_planner")
    await carry_out(cluster, node)
    assert planning._unfit == {}
    node.role_answer = refusal("certificate_role")
    await carry_out(cluster, node)
    assert planning._unfit == {"d1": "1"}


async def test_plan(make_cluster: Any) -> None:
    """For those who may send requests; JSON that the command reads."""
    cluster = await make_cluster(api_keys=("key",))
    await cluster.add("d1")
    status, _ = await cluster.get("/plan")
    assert status == 401
    status, body = await cluster.get("/plan", authorization="Bearer key")
    assert status == 200
    report = msgspec.convert(body, PlanReport)
    assert (report.router, report.mode, report.why_off, report.lease.mine) == ("router", "convert", "", False)


@pytest.mark.parametrize("mode", ["convert", "threshold"])
async def test_heartbeats_are_asked_for_the_lease(make_cluster: Any, mode: str) -> None:
    """Once a look has found most nodes alive; by a router that converts."""
    cluster = await make_cluster(planner=PlannerConfig(mode=mode, lease_s=3.0))
    node = await cluster.add("d1")
    router = cluster.app[ROUTER]
    assert (await cluster.beat(node)).planner_bid == ""
    loop = asyncio.get_running_loop()
    router.planning.tick(router.registry.snapshot(loop.time()), 0.0)
    answer = await cluster.beat(node)
    assert answer.nodes == 1
    assert answer.planner_bid == (router.planning.holder if mode == "convert" else "")
    assert answer.planner_lease_s == 3.0


async def test_votes_that_make_no_sense_are_refused(cluster: Any) -> None:
    node = await cluster.add("d1")
    for changes in ({"next_role": "router"}, {"nodes_counted": -1}, {"planner_holder": "x" * 1000}):
        status, _ = await cluster.post_heartbeat(node.heartbeat(**changes))
        assert status == 400, changes
    assert cluster.metric("prfaas_router_heartbeats_total", outcome="refused") == 3
