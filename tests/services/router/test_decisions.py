"""What a client can ask of its request's routing, what it hears of it, and prefixes that nodes hold."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from prfaas.common.errors import RequestError
from prfaas.common.perfmodel.curves import Curve, Surface
from prfaas.common.perfmodel.profiles import NodeProfile, dumps, profile_id
from prfaas.common.prefixcache.events import RESTART, EventBatch, Reset, SnapshotsAdded, added
from prfaas.common.prefixcache.hashes import BlockHasher
from prfaas.services.messages import Heartbeat, LoadMessage
from prfaas.services.router.app import ROUTER
from prfaas.services.router.decision import read_wishes
from prfaas.services.router.prefixes import Prefixes, tenant_of
from prfaas.services.router.registry import Registry

PATH = "/v1/completions"
BLOCK = 64
IDS = [(7 * i) % 251 for i in range(400)]
SLOW = NodeProfile(
    "slow",
    "m",
    "h",
    1,
    Curve((1.0, 1000.0), (0.01, 10.0), "linear"),
    Curve((0.0, 1000.0), (0.0, 1e6), "linear"),
    Surface((1.0,), (0.0,), ((0.01,),)),
    max_batch=8,
)
"""A hundred tokens a second."""


def body(ids: list[int] = IDS, **more: Any) -> dict[str, Any]:
    return {"model": "stub-model", "prompt": ids, "max_tokens": 8} | more


def profile(made: NodeProfile = SLOW) -> dict[str, str]:
    data = dumps(made)
    return {"profile_id": profile_id(data), "profile": data.decode()}


def holds(ids: list[int], sequence: int = 0, tenant: str = "", epoch: int = 1, exact: bool = False) -> dict[str, Any]:
    """Fields of a heartbeat of a node that holds these tokens' blocks."""
    keys = BlockHasher("f" * 32, tenant, BLOCK).keys(ids)
    events = (Reset(), *added(None, keys), *([SnapshotsAdded((keys[-2],))] if exact else []))
    return {
        "prefix_block_tokens": BLOCK,
        "prefix_exact": exact,
        "prefix_events": EventBatch(epoch, sequence, events),
    }


# -- wishes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-prfaas-pin-route", "sideways"),
        ("x-prfaas-pin-route", ""),
        ("x-prfaas-pin-region", ""),
        ("x-prfaas-pin-region", "r" * 200),
        ("x-prfaas-deadline-s", "soon"),
        ("x-prfaas-deadline-s", "0"),
        ("x-prfaas-deadline-s", "-1"),
        ("x-prfaas-deadline-s", "nan"),
        ("x-prfaas-deadline-s", "inf"),
    ],
)
def test_nonsense_in_a_header_is_refused_by_its_name(name: str, value: str) -> None:
    """Nothing that a client asks for is ignored."""
    with pytest.raises(RequestError) as raised:
        read_wishes({name: value})
    assert raised.value.param == name


async def test_a_region_that_is_not_there_is_a_400(cluster: Any) -> None:
    """And the answer names those that are."""
    await cluster.add("d")
    status, answer, _ = await cluster.post(PATH, body(), **{"x-prfaas-pin-region": "atlantis"})
    assert status == 400
    assert "home" in answer["error"]["message"]


async def test_a_pinned_region_decodes(cluster: Any) -> None:
    """Though another region's node is idler."""
    for name, region, running in (("east-d", "east", 5), ("west-d", "west", 0)):
        node = await cluster.add(name)
        await cluster.beat(node, region=region, load=LoadMessage(running_requests=running), epoch="2")
    for region in ("east", "west"):
        status, _, headers = await cluster.post(PATH, body(), **{"x-prfaas-pin-region": region})
        assert (status, headers["x-prfaas-decode-region"]) == (200, region)


async def test_a_pinned_route_is_taken_or_refused(cluster: Any) -> None:
    """Local though a prefill node is there; offloaded though the threshold says no; 503 where there is none of that
    kind."""
    await cluster.add("d")
    pin = "x-prfaas-pin-route"
    status, answer, _ = await cluster.post(PATH, body(), **{pin: "offload"})
    assert (status, "route" in answer["error"]["message"]) == (503, True)
    assert cluster.metric("prfaas_router_decisions_total", reason="refused_pinned") == 1
    await cluster.add("p", "prefill")
    _, _, headers = await cluster.post(PATH, body(), **{pin: "local"})
    assert (headers["x-prfaas-reason"], headers.get("x-prfaas-prefill")) == ("pinned", None)
    _, _, headers = await cluster.post(PATH, body(), **{pin: "offload"})
    assert (headers["x-prfaas-reason"], headers["x-prfaas-prefill"]) == ("pinned", "p")
    assert headers["x-prfaas-prefill-region"] == "away"
    status, _, _ = await cluster.post(PATH, body(), **{pin: "home"})
    assert status == 503


async def test_a_deadline_that_nobody_can_meet_is_a_429_at_once(cluster: Any) -> None:
    """With Retry-After and OpenAI's error body; the same request without a deadline is served."""
    node = await cluster.add("d")
    await cluster.beat(node, **profile())
    status, answer, headers = await cluster.post(PATH, body(), **{"x-prfaas-deadline-s": "1.0"})
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (429, "rate_limit_error", "deadline")
    assert int(headers["retry-after"]) >= 1
    assert not node.calls
    assert cluster.metric("prfaas_router_decisions_total", reason="refused_deadline") == 1
    assert (await cluster.post(PATH, body()))[0] == 200
    assert (await cluster.post(PATH, body(), **{"x-prfaas-deadline-s": "60"}))[0] == 200


async def test_an_slo_refuses_what_would_miss_it(make_cluster: Any) -> None:
    """router.slo_ttft_s: a queue of 30 s is longer than 5 s and twice the prompt's own 4 s."""
    cluster = await make_cluster(slo_ttft_s=5.0)
    node = await cluster.add("d")
    await cluster.beat(node, **profile())
    assert (await cluster.post(PATH, body()))[0] == 200
    await cluster.beat(node, load=LoadMessage(queued_requests=1, queued_tokens=3000), **profile())
    status, _, headers = await cluster.post(PATH, body())
    assert (status, int(headers["retry-after"]) > 10) == (429, True)


async def test_full_nodes_are_a_503(cluster: Any) -> None:
    """A node says how many requests it takes."""
    node = await cluster.add("d")
    await cluster.beat(node, load=LoadMessage(running_requests=2, max_requests=2))
    status, answer, headers = await cluster.post(PATH, body())
    assert (status, "full" in answer["error"]["message"]) == (503, True)
    assert headers["retry-after"]


async def test_headers_tell_the_decision(make_cluster: Any) -> None:
    """Reason, nodes, regions, what was held, and what it was decided by."""
    cluster = await make_cluster(offload_threshold_tokens=300)
    await cluster.add("d")
    await cluster.add("p", "prefill")
    _, _, headers = await cluster.post(PATH, body())
    assert headers["x-prfaas-reason"] == "offloaded"
    assert (headers["x-prfaas-prefill-region"], headers["x-prfaas-decode-region"]) == ("away", "home")
    assert headers["x-prfaas-held-tokens"] == "0"
    assert headers["x-prfaas-decision"].startswith("uncached=400; threshold=")
    assert "ttft=" in headers["x-prfaas-decision"]
    _, _, headers = await cluster.post(PATH, body(IDS[:300]))
    assert (headers["x-prfaas-reason"], headers.get("x-prfaas-prefill")) == ("below_threshold", None)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("adaptive", "offloaded"),
        ("static", "offloaded"),
        ("homogeneous", "no_home_prefill_node"),
        ("offload-all", "offloaded"),
        ("round-robin", "round_robin"),
        ("least-loaded", "offloaded"),
    ],
)
async def test_each_policy_can_be_chosen(make_cluster: Any, policy: str, reason: str) -> None:
    """router.policy."""
    cluster = await make_cluster(policy=policy)
    await cluster.add("d")
    await cluster.add("p", "prefill")
    status, _, headers = await cluster.post(PATH, body())
    assert (status, headers["x-prfaas-reason"]) == (200, reason)


# -- prefixes ---------------------------------------------------------------------------------------------------------


async def test_the_decode_node_that_holds_the_prefix_is_chosen(cluster: Any) -> None:
    """Though another one is idler; decode and prefill node hear whose prefix it is."""
    for name in ("d1", "d2", "p"):
        node = await cluster.add(name, "prefill" if name == "p" else "decode")
        news = holds(IDS) if name == "d2" else {}
        answer = await cluster.beat(node, load=LoadMessage(running_requests=int(name == "d2")), **profile(), **news)
        assert answer.prefix_next == (2 if news else None)
    _, _, headers = await cluster.post(PATH, body())
    assert headers["x-prfaas-decode"] == "d2"
    assert "held=384" in headers["x-prfaas-decision"]


async def test_a_prefix_in_another_region_is_fetched(cluster: Any, scripts: Any) -> None:
    """The prefill node hears from whom, how much, and how long it is worth."""
    p = await cluster.add("p", "prefill")

    async def after_prefill(node: Any, call: Any, out: Any) -> None:
        await scripts.ticket(call, out)
        await scripts.within(p.prefilled)
        await scripts.words(call, out, 0.0)

    d = await cluster.add("d", decode=after_prefill)
    other = await cluster.add("q", "prefill")
    busy = LoadMessage(queued_requests=1, queued_tokens=100_000)
    await cluster.beat(d, **profile())
    await cluster.beat(p, **profile())
    await cluster.beat(other, region="third", load=busy, epoch="2", **profile(), **holds(IDS))
    status, _, headers = await cluster.post(PATH, body())
    assert status == 200
    assert "fetch=384" in headers["x-prfaas-decision"]
    (call,) = p.calls
    assert (call.fetch.node, call.fetch.tokens) == ("q", 384)
    assert call.fetch.timeout_s == pytest.approx(2 * 3.84, rel=0.01)


async def test_only_the_same_tenant_finds_a_prefix(cluster: Any) -> None:
    """cache_salt, as vLLM has it; a wrong one is a 400."""
    d1, d2 = await cluster.add("d1"), await cluster.add("d2")
    await cluster.beat(d1, **profile())
    await cluster.beat(d2, load=LoadMessage(running_requests=1), **profile(), **holds(IDS, tenant="/salt"))
    for salt, node in (("salt", "d2"), ("other", "d1"), (None, "d1")):
        _, _, headers = await cluster.post(PATH, body(cache_salt=salt))
        assert headers["x-prfaas-decode"] == node
    assert [call.tenant for call in d2.calls] == ["/salt"]
    assert (await cluster.post(PATH, body(cache_salt="")))[0] == 400
    assert (await cluster.post(PATH, body(cache_salt=5)))[0] == 400


async def test_a_restarted_node_holds_nothing(cluster: Any) -> None:
    """Until its own stream says so."""
    d1, d2 = await cluster.add("d1"), await cluster.add("d2")
    await cluster.beat(d1, **profile())
    await cluster.beat(d2, load=LoadMessage(running_requests=1), **profile(), **holds(IDS))
    d2.epoch = "2"
    again = EventBatch(2, 5, ())
    beaten = {"load": LoadMessage(running_requests=1), "prefix_block_tokens": BLOCK, "prefix_events": again}
    assert (await cluster.beat(d2, **profile(), **beaten)).prefix_next == RESTART
    assert (await cluster.post(PATH, body()))[2]["x-prfaas-decode"] == "d1"
    assert len(cluster.app[ROUTER].prefixes.index) >= 0


def test_who_shares_with_whom() -> None:
    """all: everybody without a salt; key: within a key; none: only a salt joins. No key is readable in a tenant."""
    assert tenant_of("all", "", "k1", "r1") == tenant_of("all", "", "k2", "r2") == ""
    assert tenant_of("all", "s", "k1", "r1") == tenant_of("all", "s", "k2", "r2") != ""
    assert tenant_of("key", "", "k1", "r1") == tenant_of("key", "", "k1", "r2") != tenant_of("key", "", "k2", "r1")
    assert tenant_of("key", "s", "k1", "r1") != tenant_of("key", "s", "k2", "r1")
    assert tenant_of("none", "", "k1", "r1") != tenant_of("none", "", "k1", "r2")
    assert tenant_of("none", "s", "k1", "r1") == tenant_of("none", "s", "k2", "r2")
    assert "k1" not in tenant_of("key", "", "k1", "r1")


def beat(name: str, role: str = "decode", **more: Any) -> Heartbeat:
    message = Heartbeat(name, "1", "home", role, "http://h:1", [], "m", "f" * 32, "l", 1 << 20, LoadMessage())
    return msgspec.structs.replace(message, **more)


def test_nodes_of_one_region_have_pools_of_their_own() -> None:
    """The region's best node is named, each node has what it holds itself, and who isn't usable is left out."""
    prefixes = Prefixes(10_000)
    registry = Registry(on_row_free=prefixes.forget)
    for name, tokens in (("a", 128), ("b", 320), ("c", 384)):
        message = beat(name, draining=name == "c", **holds(IDS[:tokens]))
        node = registry.heartbeat(message, 0.0).node
        assert node is not None
        prefixes.heard(node.row, message)
    keys = BlockHasher("f" * 32, "", BLOCK).keys(IDS)
    matches = prefixes.matches(keys, registry.snapshot(0.0))
    assert matches is not None
    assert (matches.region_tokens.tolist(), matches.region_nodes.tolist()) == ([320], [1])
    assert [matches.on_node(row) for row in range(3)] == [128, 320, 384]
    assert matches.nodes.tolist() == [1, 0]
    registry.heartbeat(beat("b", leaving=True), 1.0)
    matches = prefixes.matches(keys, registry.snapshot(1.0))
    assert matches is not None
    assert matches.nodes.tolist() == [0]


def test_a_model_with_state_is_matched_at_snapshots_alone() -> None:
    """And not at the end of the blocks that its node has."""
    prefixes, registry = Prefixes(10_000), Registry()
    message = beat("a", **holds(IDS, exact=True))
    registry.heartbeat(message, 0.0)
    prefixes.heard(0, message)
    matches = prefixes.matches(BlockHasher("f" * 32, "", BLOCK).keys(IDS), registry.snapshot(0.0))
    assert matches is not None
    assert matches.on_node(0) == 5 * BLOCK


def test_blocks_of_another_size_are_not_believed() -> None:
    """Their keys mean something else; when the first size is gone the next one counts."""
    prefixes = Prefixes(10_000)
    assert prefixes.heard(0, beat("a", **holds(IDS))) is not None
    other = beat("b", **holds(IDS) | {"prefix_block_tokens": 128})
    assert prefixes.heard(1, other) is None
    prefixes.forget(0)
    assert prefixes.heard(1, other) is not None
    assert prefixes.block_tokens == 128
