"""The slow planner in a router: it plans from what requests and heartbeats say, and acts only with the nodes' lease."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import numpy as np
import pytest
from prfaas.common.config import PlannerConfig
from prfaas.common.metrics import Metrics
from prfaas.common.perfmodel.profiles import dumps, profile_id, shipped
from prfaas.common.scheduling.policies import AdaptiveThreshold, StaticThreshold
from prfaas.common.scheduling.types import Decision, RequestSnapshot
from prfaas.loadgen.workloads.lengths import PAPER_INPUT_LENGTHS
from prfaas.services.messages import Heartbeat, KvAddressMessage, LoadMessage, PlanReport
from prfaas.services.router.planning import Planning
from prfaas.services.router.registry import Registry

PROFILES = {region: dumps(shipped(name)) for region, name in (("home", "paper-h20"), ("away", "paper-h200"))}
SETTINGS: dict[str, Any] = {"confirmations": 1, "cool_down_s": 30.0, "period_s": 10.0, "min_requests": 100}
BUSY, IDLE = LoadMessage(queued_requests=50, queued_tokens=1_000_000), LoadMessage()
DECODING = LoadMessage(running_requests=2, decoding_requests=2)


class World:
    """A router's registry and planner on a clock of their own, and the heartbeats of nodes that obey."""

    def __init__(self, name: str = "router", policy: Any = None, **settings: Any) -> None:
        self.now_s = 1000.0
        self.metrics = Metrics()
        self.registry = Registry()
        self.policy = policy or AdaptiveThreshold(planned_tokens=1000.0)
        config = PlannerConfig(**{**SETTINGS, **settings})
        self.planning = Planning(config, name, f"{name}/1", self.registry, self.policy, self.metrics.router)
        self.beats: dict[str, Heartbeat] = {}
        self.grants = True
        self.orders: list[Any] = []
        self.told = 0

    def node(self, name: str, role: str, region: str = "home", load: LoadMessage = IDLE) -> None:
        data = PROFILES[region]
        self.beats[name] = Heartbeat(
            name, "1", region, role, f"http://{name}:1", [KvAddressMessage("h", 1)], "m", "f", "l", 1 << 20, load,
            profile_id=profile_id(data), profile=data.decode(),
        )  # fmt: skip

    def set(self, name: str, **changes: Any) -> None:
        self.beats[name] = msgspec.structs.replace(self.beats[name], **changes)

    def cluster(self, prefill: int, decode: int, away: int = 4, load: LoadMessage = BUSY) -> World:
        for i in range(prefill):
            self.node(f"p{i}", "prefill", load=load)
        for i in range(decode):
            self.node(f"d{i}", "decode", load=DECODING)
        for i in range(away):
            self.node(f"a{i}", "prefill", "away")
        return self

    def requests(self, count: int = 400, output: int = 1024, really: int | None = None) -> None:
        """The paper's prompts, in the last seconds."""
        lengths = np.sort(PAPER_INPUT_LENGTHS.sample(count * 20, np.random.default_rng(0)))[10::20]
        cluster = self.registry.snapshot(self.now_s)
        (row,) = [cluster.names.index("d0")]
        for tokens in lengths.tolist():
            decision = Decision(None, row, 0, "below_threshold")
            self.planning.arrived(RequestSnapshot("r", tokens, output, tokens), decision, cluster)
            self.planning.ended(output, output if really is None else really)

    def run(self, seconds: float) -> None:
        """Seconds pass: each brings a heartbeat of every node, and a tick."""
        for _ in range(round(seconds)):
            self.now_s += 1.0
            for name, beat in self.beats.items():
                registered = self.registry.heartbeat(beat, self.now_s)
                if registered.news == "converted":
                    assert registered.node is not None
                    self.planning.converted(registered.node, self.now_s)
                if self.grants and (bid := self.planning.bid()):
                    self.set(name, planner_holder=bid, planner_bid_s=self.now_s)
            self.orders += self.planning.tick(self.registry.snapshot(self.now_s), self.now_s)

    def obey(self) -> None:
        """What has been ordered happens: nodes drain for a heartbeat, and have their new role."""
        while self.told < len(self.orders):
            order = self.orders[self.told]
            self.told += 1
            for node in order.nodes[: order.count]:
                self.set(node.name, role=order.role, load=DECODING)
            self.planning.carried_out(order)

    def report(self) -> PlanReport:
        return self.planning.report(self.registry.snapshot(self.now_s), self.now_s)

    def region(self) -> Any:
        (region,) = self.report().regions
        return region


def planned(world: World) -> World:
    """With requests, and past the cool-down that follows the router's start."""
    world.run(1)
    world.requests()
    world.run(45)
    return world


def test_a_stage_that_is_short_is_given_a_node() -> None:
    """From 1 : 7 one decode node is to prefill; the least loaded is asked first; the threshold is the new split's."""
    world = World().cluster(1, 7)
    world.set("d5", load=LoadMessage(running_requests=1, decoding_requests=1))
    planned(world)
    (order,) = world.orders
    assert (order.region, order.role, order.count) == ("home", "prefill", 1)
    assert order.nodes[0].name == "d5"
    assert sorted(node.name for node in order.nodes) == [f"d{i}" for i in range(7)]
    assert order.reason.startswith("1 : 7 becomes 2 : 6")
    region = world.region()
    assert world.policy.controller(0).planned_tokens == region.planned_threshold_tokens != 1000.0
    assert world.metrics.registry.get_sample_value("prfaas_router_plans_total", {"region": "home", "reason": "convert"})


def test_after_the_start_nothing_is_converted_for_a_cool_down() -> None:
    """Who knows what another router, or this one before, has just converted."""
    world = World().cluster(1, 7)
    world.run(1)
    world.requests()
    world.run(25)
    assert not world.orders
    assert world.region().reason == "cooling_down"
    assert 0 < world.region().cool_down_left_s <= 30
    world.run(10)
    assert len(world.orders) == 1


def test_without_the_lease_nothing_is_converted() -> None:
    """The threshold is planned all the same, and the report says what would be better."""
    world = World().cluster(1, 7)
    world.grants = False
    planned(world)
    region = world.region()
    assert not world.orders
    assert (region.to_prefill, region.wanted_to_prefill, region.reason) == (0, 1, "not_the_planner")
    assert "1 : 7 stays (2 : 6 would carry +" in region.why
    assert region.planned_threshold_tokens != 1000.0
    assert world.metrics.registry.get_sample_value("prfaas_router_planner_lease") == 0
    assert (world.report().lease.mine, world.report().lease.needed) == (False, 7)


def test_the_lease_of_a_majority_is_enough_and_is_told() -> None:
    world = planned(World().cluster(1, 7))
    lease = world.report().lease
    assert (lease.router, lease.mine, lease.grants, lease.needed) == ("router", True, 12, 7)
    assert world.metrics.registry.get_sample_value("prfaas_router_planner_lease") == 1


def test_one_order_at_a_time_and_then_a_cool_down() -> None:
    """While nodes are told, while one drains, and a cool-down from its first heartbeat in the new role."""
    world = planned(World().cluster(1, 7))
    (order,) = world.orders
    node = order.nodes[0]
    world.run(40)
    assert len(world.orders) == 1
    assert world.region().reason == "converting"
    world.registry.changes_role(node, "prefill")
    world.planning.carried_out(order)
    world.set(node.name, next_role="prefill", draining=True)
    world.run(40)
    assert len(world.orders) == 1
    assert [(c.node, c.role, c.next_role) for c in world.region().changing] == [(node.name, "decode", "prefill")]
    world.set(node.name, next_role="", draining=False, role="prefill", load=BUSY)
    world.requests()
    world.run(25)
    assert world.region().cool_down_left_s > 0
    assert len(world.orders) == 1
    assert (world.region().prefill_nodes, world.region().decode_nodes) == (2, 6)
    world.run(20)
    assert [order.reason.split(":")[0] for order in world.orders] == ["1 ", "2 "]


def test_a_node_that_changes_is_out_at_once() -> None:
    """Before its next heartbeat says that it drains."""
    world = planned(World().cluster(1, 7))
    node = world.orders[0].nodes[0]
    world.registry.changes_role(node, "prefill")
    assert not world.registry.snapshot(world.now_s).usable[node.row]


def test_a_node_that_cannot_change_is_not_asked_again_until_it_restarts() -> None:
    world = planned(World().cluster(1, 7))
    (order,) = world.orders
    unfit = order.nodes[0]
    world.planning.is_unfit(unfit)
    world.planning.carried_out(order)
    world.run(60)
    assert unfit.name not in [node.name for node in world.orders[1].nodes]
    world.planning.carried_out(world.orders[1])
    world.set(unfit.name, epoch="2")
    world.run(60)
    assert unfit.name in [node.name for node in world.orders[2].nodes]


def test_roles_stay_where_only_thresholds_are_planned() -> None:
    """And it does not even ask for the lease."""
    world = planned(World(mode="threshold").cluster(1, 7))
    assert not world.orders
    assert world.region().reason == "roles_fixed"
    assert world.region().wanted_to_prefill == 1
    assert world.region().planned_threshold_tokens != 1000.0
    assert world.planning.bid() == ""


@pytest.mark.parametrize(
    ("policy", "mode", "why"),
    [
        (StaticThreshold(threshold_tokens=500.0), "convert", "router.policy is not adaptive"),
        (AdaptiveThreshold(), "off", "planner.mode is off"),
    ],
)
def test_a_router_that_plans_nothing_says_why(policy: Any, mode: str, why: str) -> None:
    world = planned(World(policy=policy, mode=mode).cluster(1, 7))
    report = world.report()
    assert (report.why_off, report.regions, world.orders) == (why, [], [])
    assert world.planning.bid() == ""


def test_decode_nodes_that_prefill_keep_their_threshold() -> None:
    """The plan has no word for them: it would send every prompt away."""
    world = planned(World().cluster(0, 2))
    assert world.region().plan is not None
    assert world.policy.controller(0).planned_tokens == 1000.0


def test_outputs_count_as_long_as_they_get() -> None:
    """Clients ask for 4,096 tokens and get 1,024: the plan is that of 1,024."""
    short, long = (planned(World().cluster(3, 5)) for _ in range(2))
    expected = short.region().plan.requests_per_s
    long.run(700)
    for _ in range(2):
        long.requests(output=4096, really=1024)
        long.run(1)
    long.run(700)
    long.requests(output=4096, really=1024)
    long.run(15)
    assert long.region().plan.requests_per_s == pytest.approx(expected, rel=0.02)


def test_a_region_that_takes_anothers_place_begins_anew() -> None:
    """An index is used again: what was converted there was elsewhere."""
    world = planned(World().cluster(1, 7))
    world.planning.carried_out(world.orders[0])
    world.run(31)
    for beat in list(world.beats.values()):
        if beat.region == "home":
            world.registry.heartbeat(msgspec.structs.replace(beat, leaving=True), world.now_s)
            world.beats[beat.node] = msgspec.structs.replace(beat, region="new")
    count = len(world.orders)
    world.run(5)
    assert world.region().region == "new"
    assert world.region().cool_down_left_s > 20
    assert len(world.orders) == count


@pytest.mark.parametrize(("swing_s", "hours", "most"), [(30, 0.5, 1), (240, 1, 1), (500, 2, 6)])
def test_a_load_that_swings_does_not_send_nodes_to_and_fro(swing_s: int, hours: float, most: int) -> None:
    """Hours of long prompts and long answers in turn, each half with the queue that goes with it; as the planner is
    set by default. A split for the mean of both is found, and kept; a swing that is longer than what the mean is taken
    of is followed less and less often."""
    world = World(**{name: getattr(PlannerConfig(), name) for name in SETTINGS}).cluster(3, 5)
    world.run(1)
    full = LoadMessage(running_requests=20, decoding_requests=20, waiting_requests=20)
    for half in range(round(hours * 3600) // swing_s):
        prefill_short = half % 2 == 0
        for name, beat in list(world.beats.items()):
            if beat.region == "home":
                loads = (BUSY, DECODING) if prefill_short else (IDLE, full)
                world.set(name, load=loads[0] if beat.role == "prefill" else loads[1])
        for _ in range(swing_s // 10):
            world.requests(count=20, output=256 if prefill_short else 2048)
            world.run(10)
            world.obey()
    assert len(world.orders) <= most


def test_a_load_that_changes_for_long_is_followed() -> None:
    """The same planner, the same load, but it stays: nodes go over, as many as it takes, and no more."""
    world = World(**{name: getattr(PlannerConfig(), name) for name in SETTINGS}).cluster(3, 5)
    world.run(1)
    for _ in range(360):
        for name, beat in list(world.beats.items()):
            if beat.region == "home":
                world.set(name, load=BUSY if beat.role == "prefill" else DECODING)
        world.requests(count=20, output=256)
        world.run(10)
        world.obey()
    splits = [order.reason.split(" becomes ")[0] for order in world.orders]
    assert splits == ["3 : 5", "4 : 4", "5 : 3", "6 : 2"]
    assert world.region().reason == "balanced"


def test_the_report_is_json_and_remembers() -> None:
    """News only: a decision that is as the one before is not told again."""
    world = planned(World().cluster(1, 7))
    world.planning.carried_out(world.orders[0])
    world.run(100)
    report = world.report()
    assert msgspec.json.decode(msgspec.json.encode(report), type=PlanReport) == report
    reasons = [past.reason for past in report.history]
    assert "convert" in reasons
    assert all(a != b or b == "convert" for a, b in itertools.pairwise(reasons))
