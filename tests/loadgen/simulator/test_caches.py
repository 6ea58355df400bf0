"""Prefix pools of the regions, and routing that doesn't see them."""

from dataclasses import dataclass

import numpy as np
import pytest
from prfaas.common.prefixcache.sizes import CacheSizes
from prfaas.common.scheduling.policies import ADMIT_ALL, HomogeneousPd, OffloadAll
from prfaas.loadgen.simulator.caches import CacheBlind, RegionCaches
from prfaas.loadgen.simulator.outcome_records import records
from prfaas.loadgen.simulator.simulation import Simulation
from prfaas.loadgen.workloads.prefixes import TracePrefixes

from tests.loadgen.simulator.nodes import load, two_regions

ROOM = 1 << 40


def caches(prompts, ids, capacity, sizes=None):
    """Blocks of 100 tokens; ids: one list a request."""
    offsets = np.concatenate(([0], np.cumsum([len(each) for each in ids])))
    prefixes = TracePrefixes(100, np.array(prompts), offsets, np.concatenate([np.array(each) for each in ids]))
    return RegionCaches(prefixes, np.array(prompts), sizes or CacheSizes(1000, 100), capacity)


TURNS = ([250, 450], [[0, 1, 2], [0, 1, 3, 4, 5]])


def run(policy, held, arrivals=(0.0, 5.0), **more):
    return Simulation(two_regions(**more), load(arrivals, TURNS[0]), policy, caches=held).run()


def test_a_second_turn_computes_what_is_new():
    """Of its first 449 tokens, four whole blocks, two were there."""
    held = caches(*TURNS, {0: ROOM})
    made = run(HomogeneousPd(ADMIT_ALL), held)
    assert made.cached_tokens.tolist() == [0, 200]
    assert made.prefill_s == pytest.approx([0.25, 0.25])
    assert (held.hit_tokens, held.seen_tokens) == (200, 700)


def test_the_last_token_is_never_cached():
    """Of a prompt of two whole blocks the first is reused when it comes again, since n − 1 tokens fill only that."""
    held = caches([200, 200], [[0, 1], [0, 1]], {0: ROOM})
    made = Simulation(two_regions(), load([0.0, 5.0], 200), HomogeneousPd(ADMIT_ALL), caches=held).run()
    assert made.cached_tokens.tolist() == [0, 100]


def test_only_the_increment_crosses():
    """The home region holds the first turn's prefix after its transfer, so that only what is new is sent."""
    made = run(OffloadAll(ADMIT_ALL), caches(*TURNS, {0: ROOM, 1: ROOM}))
    assert made.wire_bytes == pytest.approx([250e3, 250e3])
    assert made.cached_tokens.tolist() == [0, 200]
    stateless = run(OffloadAll(ADMIT_ALL), caches(*TURNS, {0: ROOM}))
    assert stateless.wire_bytes == pytest.approx([250e3, 250e3])
    assert stateless.cached_tokens.tolist() == [0, 0]


@dataclass
class Fetching(OffloadAll):
    """Away, with the prefix that only the home region holds."""

    def choose(self, request, cluster, found):
        route, reason = super().choose(request, cluster, found)
        if request.prefixes is None:
            return route, reason
        return route._replace(prefill_start=request.prefixes.in_region(0), fetch_region=0), reason


def test_bytes_of_a_fetched_prefix_count():
    """The first prompt's prefix goes from home to away and counts there, beside the increment's bytes on the way back;
    what the away region holds already isn't moved."""
    for capacity, moved in (({0: ROOM}, 200e3), ({0: ROOM, 1: ROOM}, 0.0)):
        cluster = two_regions()
        cluster.links["home", "away"] = cluster.links["away", "home"]
        requests = load([0.0, 5.0], TURNS[0])
        simulation = Simulation(cluster, requests, Fetching(ADMIT_ALL), caches=caches(*TURNS, capacity))
        made = simulation.run()
        assert made.fetched_bytes == pytest.approx([0.0, moved])
        assert made.link_bytes["home", "away"] == pytest.approx(moved)
        assert made.link_bytes["away", "home"] == pytest.approx(made.wire_bytes.sum())
        assert made.prefill_start_s[1] == pytest.approx(5.0 + moved / 1e9)
        assert records(made).fetched_wire_bytes.tolist() == pytest.approx([0, moved])
        assert not simulation._links[1].remaining_bytes(1e3)


def test_cache_blind():
    """The policy sees no prefixes, but where it sends the request they are used."""
    made = run(CacheBlind(HomogeneousPd(ADMIT_ALL)), caches(*TURNS, {0: ROOM}))
    assert made.cached_tokens.tolist() == [0, 200]
    seen = []

    def policy(request, cluster):
        seen.append((request.prefixes, request.uncached_tokens))
        return HomogeneousPd(ADMIT_ALL)(request, cluster)

    run(CacheBlind(policy), caches(*TURNS, {0: ROOM}))
    assert seen == [(None, 250), (None, 450)]


def test_capacity_and_own_blocks():
    """A pool that is too small holds nothing of use; negative ids are nobody else's."""
    assert run(HomogeneousPd(ADMIT_ALL), caches(*TURNS, {0: 1999})).cached_tokens.tolist() == [0, 0]
    own = caches(TURNS[0], [[-1, -2, -3], [-4, -5, -6, -7, -8]], {0: ROOM})
    assert run(HomogeneousPd(ADMIT_ALL), own).cached_tokens.tolist() == [0, 0]


def test_a_hybrid_model_reuses_exact_lengths_only():
    """A third prompt that leaves the others in the middle finds no state there the first time."""
    ids = [[0, 1, 2, 3], [0, 1, 7, 8], [0, 1, 9, 10]]
    sizes = CacheSizes(1000, 100, fixed_bytes=500)
    held = caches([400, 400, 400], ids, {0: ROOM}, sizes)
    requests = load([0.0, 5.0, 10.0], 400)
    made = Simulation(two_regions(), requests, HomogeneousPd(ADMIT_ALL), caches=held).run()
    assert made.cached_tokens.tolist() == [0, 0, 200]
