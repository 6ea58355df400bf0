"""A node changes its role while it runs: for the one router that plans, and without losing what it has begun."""

from __future__ import annotations

from typing import Any

import msgspec
from prfaas.services.messages import Heartbeat, PrefillCall, RoleAnswer, RoleCall, to_json
from prfaas.services.web import signed_post
from yarl import URL

PLANNER = "router/1"
SLOW = {"decode_step_s": 0.2, "time_scale": 1.0}
"""A stream that lasts."""


def role_call(role: str, **changes: Any) -> RoleCall:
    return msgspec.structs.replace(RoleCall("router", PLANNER, role, "a test", 20.0), **changes)


async def change(cluster: Any, node: Any, call: RoleCall) -> tuple[int, Any]:
    response = await signed_post(cluster.session, URL(node.url) / "role", to_json(call), cluster.signer)
    async with response:
        data = await response.read()
        if response.status == 200:
            return 200, msgspec.json.decode(data, type=RoleAnswer)
        return response.status, msgspec.json.decode(data)["error"]


async def granted(cluster: Any, *nodes: Any) -> None:
    """The router asks for the lease, and the nodes have granted it."""
    cluster.router.planner_bid = PLANNER
    for node in nodes:
        await cluster.router.saw(lambda beat, node=node: beat.node == node.name and beat.planner_holder == PLANNER)


def role_of(name: str, role: str) -> Any:
    def check(beat: Heartbeat) -> bool:
        return beat.node == name and beat.role == role and not beat.draining

    return check


async def test_an_idle_node_changes_at_once(cluster: Any, make_call: Any) -> None:
    """Its next heartbeats come in the new role, in the same epoch, and it does the new work and not the old."""
    first, other = await cluster.node("decode", "n1"), await cluster.node("prefill", "n2")
    await granted(cluster, first, other)
    epoch = first.epoch
    assert await change(cluster, first, role_call("prefill")) == (200, RoleAnswer("draining", "prefill", 0))
    beat = await cluster.router.saw(role_of("n1", "prefill"))
    assert beat.epoch == epoch
    assert await change(cluster, other, role_call("decode")) == (200, RoleAnswer("draining", "decode", 0))
    await cluster.router.saw(role_of("n2", "decode"))

    call = make_call()
    stream, ticket = await cluster.decode(other, call)
    prefill = await cluster.prefill(first, other, call, ticket)
    assert prefill.status == 200
    assert (await prefill.rest())[-1].name == "done"
    assert (await stream.rest())[-1].data == "[DONE]"

    refused = await cluster.post(first.url, "decode", call)
    assert refused.status == 503
    assert "role is prefill now" in await refused.response.text()


async def test_what_runs_ends_first(cluster: Any, make_call: Any) -> None:
    """A stream goes on to its end; nothing new is taken meanwhile, in either role; heartbeats say so."""
    node = await cluster.node("decode", "n1", **SLOW)
    await granted(cluster, node)
    call = make_call(local_prefill=True)
    stream, _ = await cluster.decode(node, call)
    assert await change(cluster, node, role_call("prefill")) == (200, RoleAnswer("draining", "prefill", 1))
    beat = await cluster.router.saw(lambda beat: beat.draining)
    assert (beat.role, beat.next_role) == ("decode", "prefill")
    assert await change(cluster, node, role_call("prefill")) == (200, RoleAnswer("draining", "prefill", 1))
    status, error = await change(cluster, node, role_call("decode"))
    assert (status, error["code"]) == (409, "changing_role")
    prefill = PrefillCall("request-2", "router", list(call.prompt_token_ids), "n2", "no ticket", [])
    for path, body in (("decode", call), ("prefill", prefill)):
        refused = await cluster.post(node.url, path, body)
        assert refused.status == 503
        assert "draining" in await refused.response.text()
    events = await stream.rest()
    assert events[-1].data == "[DONE]"
    assert sum(len(event.ids) for event in events) == call.max_output_tokens
    await cluster.router.saw(role_of("n1", "prefill"))
    assert node.metrics.node.role_changes.labels("prefill", "done")._value.get() == 1


async def test_a_node_that_does_not_get_empty_keeps_its_role(cluster: Any, make_call: Any) -> None:
    """After drain_s it goes on as before, with its stream and with new ones."""
    node = await cluster.node("decode", "n1", **SLOW)
    await granted(cluster, node)
    call = make_call(local_prefill=True)
    stream, _ = await cluster.decode(node, call)
    await change(cluster, node, role_call("prefill", drain_s=0.05))
    await cluster.router.saw(lambda beat: beat.next_role == "prefill")
    cluster.router.seen.clear()
    await cluster.router.saw(role_of("n1", "decode"))
    second, _ = await cluster.decode(node, make_call(local_prefill=True, request_id="request-2"))
    assert (await stream.rest())[-1].data == "[DONE]"
    assert (await second.rest())[-1].data == "[DONE]"
    assert node.metrics.node.role_changes.labels("prefill", "given_up")._value.get() == 1


async def test_only_the_router_that_holds_the_lease_is_obeyed(cluster: Any) -> None:
    """Not before it is granted, not another router, not another process of the same one."""
    node = await cluster.node("decode", "n1")
    status, error = await change(cluster, node, role_call("prefill"))
    assert (status, error["code"]) == (409, "not_the_planner")
    assert "nobody has it" in error["message"]
    await granted(cluster, node)
    for call in (
        role_call("prefill", router="other", planner="other/1"),
        role_call("prefill", planner="router/2"),
        role_call("prefill", router="other"),
    ):
        status, error = await change(cluster, node, call)
        assert (status, error["code"]) == (409, "not_the_planner")
        assert "router router has it" in error["message"]
    assert node.role == "decode"


async def test_a_bid_in_another_routers_name_counts_for_nothing(cluster: Any) -> None:
    node = await cluster.node("decode", "n1")
    cluster.router.planner_bid = "other/1"
    beats = len(cluster.router.seen)
    await cluster.router.saw(lambda beat: len(cluster.router.seen) > beats + 15)
    assert not any(beat.planner_holder for beat in cluster.router.seen)
    assert node.roles.grant.holder == ""


async def test_bad_calls(cluster: Any) -> None:
    """A role that is none, a time that is none; its own role is no change."""
    node = await cluster.node("decode", "n1")
    await granted(cluster, node)
    for changes in ({"role": "router"}, {"role": "prefill", "drain_s": -1.0}, {"role": "prefill", "drain_s": 1e9}):
        status, error = await change(cluster, node, role_call(**{"role": "prefill", **changes}))
        assert (status, error["type"]) == (400, "invalid_request_error"), error
    assert await change(cluster, node, role_call("decode")) == (200, RoleAnswer("serving", "decode", 0))
    assert node.role == "decode"


async def test_a_node_that_leaves_changes_nothing(cluster: Any, make_call: Any) -> None:
    """SIGTERM in the middle of a change: it leaves as any other, in its old role."""
    node = await cluster.node("decode", "n1", **SLOW)
    await granted(cluster, node)
    stream, _ = await cluster.decode(node, make_call(local_prefill=True))
    await change(cluster, node, role_call("prefill"))
    await node.drain(10.0)
    assert (await stream.rest())[-1].data == "[DONE]"
    status, error = await change(cluster, node, role_call("prefill"))
    assert (status, error["message"].split(";")[0]) == (503, "this node is leaving")
    assert (node.role, node.roles.next_role) == ("decode", "")
    beats = len(cluster.router.seen)
    await cluster.router.saw(lambda beat: len(cluster.router.seen) > beats)
    assert cluster.router.seen[-1].draining


async def test_heartbeats_carry_the_largest_count_of_nodes(cluster: Any) -> None:
    """So that a router which sees fewer nodes knows that it has no majority."""
    cluster.router.nodes = 7
    await cluster.node("decode", "n1")
    await cluster.router.saw(lambda beat: beat.nodes_counted == 7)
    cluster.router.nodes = 9
    await cluster.router.saw(lambda beat: beat.nodes_counted == 9)
