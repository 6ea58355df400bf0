"""The quick version of the fuzzer: what a hostile peer may send is a ProtocolError, a refusal, or harmless."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.fuzz_frames import run
from tests.fuzz.hostile_frames import HostileFrames


@pytest.mark.parametrize("first", range(0, 20_000, 5_000))
def test_no_input_breaks_what_reads_it(first: int) -> None:
    """20,000 inputs: no exception that isn't ours, the same events however the bytes are cut, and no more memory than
    the bounds. A million, by hand: fuzz_frames.py."""
    counts, peak = run(0, range(first, first + 5_000))
    assert len(counts) == 6
    assert peak > 0


def test_an_input_is_the_same_each_time() -> None:
    """So that a finding can be looked at again."""
    streams = [[HostileFrames(random.Random(seed)).stream() for seed in range(50)] for _ in range(2)]
    assert streams[0] == streams[1]
