"""Who gets a place in the decode batch first."""

from __future__ import annotations

from typing import Any, cast

from prfaas.services.engine.api import SamplingParams
from prfaas.services.engine.transformers.decode import DecodeRow, SlipstreamBatch


def row(rank_s: float) -> DecodeRow:
    made = DecodeRow(1, 5, 0, 8, SamplingParams(), 0, (), 2, lambda event: None, rank_s=rank_s)
    made.have_all()
    return made


def test_places_go_by_rank_and_running_rows_keep_theirs() -> None:
    """Two places, one of them taken: of those that wait the one with the least rank may join, whoever came first;
    one that has begun is not interrupted."""
    batch = SlipstreamBatch(cast(Any, None), 2)
    late, soon, same_as_soon = row(9.0), row(1.0), row(1.0)
    batch.running.append(row(99.0))
    for each in (late, soon, same_as_soon):
        batch.join(each)
    assert batch.joining == [soon, same_as_soon, late]
    assert batch._eligible() == [soon]
    late.next_layer = 1  # has begun
    assert batch._eligible() == [late]
    assert len(batch.running) == 1
