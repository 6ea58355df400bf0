"""Records: one a request, columns of many, and memory that is bounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prfaas.loadgen.records import MAX_WORDS, OTHER, STATUSES, Records, RecordsBuilder, RequestRecord, Words

instants = st.none() | st.floats(0, 1e6)
words = st.text(st.characters(codec="ascii", exclude_characters="+"), max_size=5)
gaps = st.lists(st.floats(0, 1e3, width=32), max_size=5)
rows = st.builds(
    RequestRecord,
    index=st.integers(0, 1000),
    scheduled_s=st.floats(0, 1e6),
    status=st.sampled_from(STATUSES),
    prompt_tokens=st.integers(0, 1 << 40),
    first_token_s=instants,
    end_s=instants,
    error=words,
    itl_s=gaps,
    fallbacks=st.lists(words.filter(bool), max_size=3),
    offloaded=st.sampled_from([None, True, False]),
    kv_wire_bytes=st.integers(-1, 1 << 50),
    request_id=words,
    decision=words,
    region=words,
    decode_region=words,
)


@given(st.lists(rows, min_size=1, max_size=8))
def test_columns_give_back_the_records_that_were_added(added: list[RequestRecord]) -> None:
    builder = RecordsBuilder()
    for record in added:
        builder.add(record)
    assert list(builder.records()) == added
    assert [builder.records()[i] for i in range(len(added))] == added


@given(st.lists(rows, min_size=1, max_size=8))
def test_in_order_sorts_by_index_and_takes_every_column_along(added: list[RequestRecord]) -> None:
    builder = RecordsBuilder()
    for record in added:
        builder.add(record)
    assert list(builder.records().in_order()) == sorted(added, key=lambda record: record.index)


@given(st.lists(gaps, min_size=1, max_size=30), st.integers(1, 10))
def test_gaps_above_the_bound_are_thinned_evenly_over_the_run(lists: list[list[float]], most: int) -> None:
    """What is kept is every stride-th gap of the whole run, whoever had it, and each row still has its own."""
    builder = RecordsBuilder(max_itls=most)
    for i, itl_s in enumerate(lists):
        builder.add(RequestRecord(i, 0.0, "ok", itl_s=itl_s))
    records = builder.records()
    flat = [(gap, i) for i, itl_s in enumerate(lists) for gap in itl_s]
    kept = flat[:: records.itl_stride]
    assert records.itl_s.tolist() == [gap for gap, _ in kept]
    assert records.itl_s.size <= most
    for i in range(len(lists)):
        assert records.itls(i).tolist() == [gap for gap, row in kept if row == i]


def test_whole_columns_of_a_simulation_need_only_what_it_knows() -> None:
    """What is left out is unknown; sent when scheduled, answered, and the last token is the end."""
    records = Records.of(np.array([0.0, 1.0]), end_s=np.array([2.0, 4.0]), region=["east", "west"])
    first = records[0]
    assert (first.index, first.sent_s, first.last_token_s, first.status) == (0, 0.0, 2.0, "ok")
    assert first.first_token_s is None
    assert first.offloaded is None
    assert first.kv_wire_bytes == -1
    assert [record.region for record in records] == ["east", "west"]
    assert records.itls(1).size == 0


def test_columns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="sent_s has shape"):
        Records.of(np.zeros(2), sent_s=np.zeros(3))
    with pytest.raises(ValueError, match="error has 1 words for 2"):
        Records.of(np.zeros(2), error=["x"])
    with pytest.raises(ValueError, match="no status 'fine'"):
        Records.of(np.zeros(1), status=["fine"])
    with pytest.raises(ValueError, match="no status 'fine'"):
        RecordsBuilder().add(RequestRecord(0, 0.0, "fine"))
    with pytest.raises(IndexError):
        Records.of(np.zeros(1))[1]


def test_endlessly_many_words_share_one() -> None:
    """A server whose error codes are all different can't fill the memory."""
    builder = RecordsBuilder()
    for i in range(MAX_WORDS + 5):
        builder.add(RequestRecord(i, 0.0, "failed", error=f"e{i}"))
    counts = builder.records().error.counts()
    assert len(counts) <= MAX_WORDS
    assert counts[OTHER] == 6


def test_words_are_counted_the_most_frequent_first() -> None:
    column = Words.of(["b", "", "a", "b"])
    assert column.counts() == {"b": 2, "a": 1}
    assert list(column.counts()) == ["b", "a"]
    assert column.counts(np.array([True, True, True, False])) == {"a": 1, "b": 1}
    assert column.equal("b").tolist() == [True, False, False, True]
    assert not column.equal("c").any()
