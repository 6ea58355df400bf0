"""The router's pure parts: the node stream, the registry, timelines."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.common.errors import ProtocolError, RequestError
from prfaas.common.scheduling.least_loaded import LeastLoaded
from prfaas.common.scheduling.types import Refused, RequestSnapshot
from prfaas.services.messages import DecodeNodeTimeline, Heartbeat, KvAddressMessage, LoadMessage
from prfaas.services.router import node_stream
from prfaas.services.router.node_stream import NodeStream, response_body
from prfaas.services.router.registry import LEASE_S, Node, Registry
from prfaas.services.router.timeline import Record, RequestFacts, RouterInstants, Timelines, build_timeline

STREAM = (
    b'event: ticket\ndata: {"ticket":"t"}\n\n'
    b": ping\n\n"
    b': ids 1,22\ndata: {"a":": ids 9"}\n\n'
    b": ids 3\n: ping\ndata: {}\n\n"
    b': timeline {"x":1}\n\n'
    b"data: [DONE]\n\n"
)

# -- the node stream --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_a_stream_may_be_cut_anywhere(cuts: list[int]) -> None:
    """The client's bytes, the ids and the events are the same however the socket splits the stream."""
    stream, relay, ids, tokens, events, timeline, done = NodeStream(), b"", [], 0, [], None, []
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(edges):
        batch = stream.feed(STREAM[start:end])
        relay += batch.relay
        ids += batch.token_ids.split(b",") if batch.output_tokens else []
        tokens += batch.output_tokens
        events += batch.events
        timeline = batch.timeline or timeline
        done += [relay] if batch.done else []
    assert relay == b'data: {"a":": ids 9"}\n\ndata: {}\n\ndata: [DONE]\n\n'
    assert (ids, tokens, timeline) == ([b"1", b"22", b"3"], 3, b'{"x":1}')
    assert events == [("ticket", b'{"ticket":"t"}')]
    assert done == [relay]


def test_an_event_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that never ends an event doesn't fill the router's memory."""
    monkeypatch.setattr(node_stream, "MAX_EVENT_BYTES", 100)
    stream = NodeStream()
    stream.feed(b"x" * 100)
    with pytest.raises(ProtocolError):
        stream.feed(b"x")


def test_a_whole_response_is_one_data_line() -> None:
    """None or two are the node's mistake."""
    assert response_body(b'data: {"a":1}\n\n') == b'{"a":1}'
    for lines in (b"", b"data: 1\n\ndata: 2\n\n"):
        with pytest.raises(ProtocolError):
            response_body(lines)


# -- the registry -----------------------------------------------------------------------------------------------------


def beat(node: str, role: str = "decode", *, epoch: str = "1", load: LoadMessage | None = None) -> Heartbeat:
    return Heartbeat(
        node=node,
        epoch=epoch,
        region="r",
        role=role,
        url="http://127.0.0.1:1",
        kv_addresses=[KvAddressMessage("h", 1)],
        model="m",
        model_fingerprint="f",
        layout_hash="l",
        max_model_tokens=100,
        load=load or LoadMessage(),
    )


def choose(registry: Registry, now_s: float, prompt_tokens: int = 10) -> tuple[str | None, str | None]:
    """(prefill, decode) by the least-loaded policy."""
    decision = LeastLoaded(0)(RequestSnapshot("r", prompt_tokens, 5, prompt_tokens), registry.snapshot(now_s))
    if isinstance(decision, Refused):
        return None, None
    prefill = None if decision.prefill_node is None else registry.node(decision.prefill_node).name
    return prefill, registry.node(decision.decode_node).name


def register(registry: Registry, message: Heartbeat, now_s: float = 0.0) -> Node:
    node = registry.heartbeat(message, now_s).node
    assert node is not None
    return node


def test_a_lease_ends_without_heartbeats() -> None:
    """And the node is back with the next one."""
    registry = Registry()
    node = register(registry, beat("d"))
    assert choose(registry, LEASE_S - 0.1) == (None, "d")
    assert choose(registry, LEASE_S + 0.1) == (None, None)
    assert node.state(LEASE_S + 0.1) == "lost"
    assert registry.heartbeat(beat("d"), LEASE_S + 1).news == "back"
    assert choose(registry, LEASE_S + 1.1) == (None, "d")


def test_own_dispatches_count_until_they_are_done() -> None:
    """Between two heartbeats the requests of one router spread over idle nodes."""
    registry = Registry()
    first, second = register(registry, beat("a")), register(registry, beat("b"))
    with registry.dispatched(first, 10):
        assert choose(registry, 1) == (None, "b")
        with registry.dispatched(second, 20):
            assert choose(registry, 1) == (None, "a")
    assert choose(registry, 1) == (None, "a")


def test_a_heartbeat_does_not_count_a_dispatch_twice() -> None:
    """The reported load holds what was dispatched before it; what ends afterwards is taken off again."""
    registry = Registry()
    node = register(registry, beat("a"))
    with registry.dispatched(node, 10):
        registry.heartbeat(beat("a", load=LoadMessage(running_requests=1, context_tokens=10)), 1)
        assert registry.snapshot(1).inflight_tokens[0] == 10
    assert registry.snapshot(1).inflight_tokens[0] == 0


def test_a_new_epoch_forgets_what_was_in_flight() -> None:
    """A restarted process holds nothing; the end of an old request doesn't touch its row."""
    registry = Registry()
    node = register(registry, beat("a"))
    with registry.dispatched(node, 10):
        assert registry.heartbeat(beat("a", epoch="2"), 1).news == "restarted"
        assert registry.snapshot(1).inflight_tokens[0] == 0
    assert registry.snapshot(1).inflight_tokens[0] == 0


def test_draining_unreachable_and_leaving_nodes_are_not_chosen() -> None:
    """Each for its own reason, and a heartbeat mends the second."""
    registry = Registry()
    node = register(registry, beat("a"))
    registry.heartbeat(msgspec.structs.replace(beat("a"), draining=True), 0)
    assert choose(registry, 1) == (None, None)
    registry.heartbeat(beat("a"), 1)
    registry.unreachable(node, 1)
    assert choose(registry, 1) == (None, None)
    registry.heartbeat(beat("a"), 2)
    assert choose(registry, 2) == (None, "a")
    registry.heartbeat(msgspec.structs.replace(beat("a"), leaving=True), 3)
    assert choose(registry, 3) == (None, None)


def test_a_node_that_beats_but_never_answers_is_left_alone_longer_each_time() -> None:
    """Its heartbeats don't send it request after request; many calls that fail together count once, and an answer
    forgets it all."""
    registry = Registry()
    node = register(registry, beat("a"))

    def usable_after(failed_s: float) -> float:
        """Seconds until a heartbeat made it usable again."""
        for _ in range(5):
            registry.unreachable(node, failed_s)
        for waited_s in range(60):
            news = registry.heartbeat(beat("a"), failed_s + waited_s).news
            assert (news == "back") == (choose(registry, failed_s + waited_s)[1] is not None)
            if news:
                return waited_s
        return 60

    assert [usable_after(100.0 * i) for i in range(8)] == [0, 2, 4, 8, 16, 30, 30, 30]
    registry.reached(node)
    assert usable_after(1000) == 0
    register(registry, beat("a", epoch="2"), 1001)
    assert choose(registry, 1001) == (None, "a")


def test_a_row_is_used_again() -> None:
    """Nodes that come and go under new names don't grow the columns for ever."""
    registry = Registry()
    for i in range(50):
        register(registry, beat(f"n{i}"))
        registry.heartbeat(msgspec.structs.replace(beat(f"n{i}"), leaving=True), 0)
    assert len(registry.snapshot(0).names) == 1


def test_another_model_is_refused_until_the_old_one_is_gone() -> None:
    """A cluster changes its model by stopping the old nodes first."""
    registry = Registry()
    register(registry, beat("a"))
    other = msgspec.structs.replace(beat("b"), layout_hash="other")
    with pytest.raises(RequestError, match="another KV layout than node a"):
        registry.heartbeat(other, 1)
    register(registry, other, LEASE_S + 1)
    assert choose(registry, LEASE_S + 1) == (None, "b")


@pytest.mark.parametrize(
    "changes",
    [
        {"node": "a b"},
        {"node": "a\r\nx: y"},
        {"role": "router"},
        {"url": "ftp://x"},
        {"url": ""},
        {"max_model_tokens": 0},
        {"max_model_tokens": 1 << 70},
        {"load": LoadMessage(queued_tokens=10**30)},
        {"load": LoadMessage(free_kv_bytes=-1)},
        {"kv_addresses": [KvAddressMessage("h" * 1000, 1)]},
        {"kv_addresses": [KvAddressMessage("h", -5)]},
    ],
    ids=str,
)
def test_a_malformed_heartbeat_is_refused(changes: dict[str, object]) -> None:
    """Names go into headers and logs, URLs are dialled."""
    with pytest.raises(RequestError):
        Registry().heartbeat(msgspec.structs.replace(beat("a"), **changes), 0)


# -- timelines --------------------------------------------------------------------------------------------------------

FACTS = RequestFacts("r", "done", "offloaded", [], "p", "d", 10, 5)
ROUTER = RouterInstants(arrived_s=100.0, decided_s=100.1, ticket_s=100.2, first_token_s=103.0, last_token_s=104.0)
# The decode node's clock is 1,000 s behind the router's minus arrival: its 0 is the request's arrival.
NODE = DecodeNodeTimeline(
    received_s=-899.9,
    first_token_s=-897.1,
    second_token_s=-897.0,
    queued_s=-899.5,
    started_s=-899.4,
    ended_s=-898.0,
    computed_s=[-899.0, -898.0],
    sent_s=[-898.9, -897.9],
    arrived_s=[-898.5, -897.5],
    used_s=[-898.4, -897.4],
    clock_error_s=0.001,
    clock_offset_s=1000.0,
    router_clock_error_s=0.002,
)


def test_a_timeline_counts_from_arrival() -> None:
    """The node's clock is mapped, the error is the sum of both."""
    timeline = build_timeline(FACTS, ROUTER, NODE)
    assert timeline.ttft_s == pytest.approx(3.0)
    assert timeline.time_to_second_token_s == pytest.approx(3.0)
    assert timeline.decode_received_s == pytest.approx(0.1)
    assert [layer.arrived_s for layer in timeline.layers] == pytest.approx([1.5, 2.5])
    assert timeline.clock_error_s == pytest.approx(0.003)
    parts = timeline.ttft_parts
    assert parts is not None
    assert [parts.router_s, parts.queue_s, parts.prefill_s, parts.exposed_s, parts.first_step_s] == pytest.approx(
        [0.5, 0.1, 1.4, 0.5, 0.5]
    )


@given(st.lists(st.floats(-1000, 1000), min_size=5, max_size=5))
def test_the_parts_sum_to_the_ttft_whatever_the_clocks_say(instants: list[float]) -> None:
    """Never negative, always summing."""
    received, queued, started, ended, arrived = instants
    node = msgspec.structs.replace(
        NODE, received_s=received, queued_s=queued, started_s=started, ended_s=ended, arrived_s=[arrived]
    )
    timeline = build_timeline(FACTS, ROUTER, node)
    assert timeline.ttft_parts is not None
    parts = msgspec.structs.astuple(timeline.ttft_parts)
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(timeline.ttft_s)


def test_an_unknown_clock_places_nothing() -> None:
    """The router's own instants stay."""
    timeline = build_timeline(FACTS, ROUTER, msgspec.structs.replace(NODE, router_clock_error_s=0.0))
    assert (timeline.ttft_parts, timeline.layers, timeline.clock_error_s) == (None, [], None)
    assert timeline.ttft_s == pytest.approx(3.0)


def test_only_the_last_timelines_are_kept() -> None:
    """A repeated request id replaces the older one."""
    timelines = Timelines(2)
    for request_id in ("a", "b", "a", "c"):
        facts = RequestFacts(request_id, "done", "x", [], None, "d", 1, 1)
        timelines.add(Record(facts, ROUTER, None))
    assert [timelines.get(i) is not None for i in "abc"] == [True, False, True]
