"""Envelopes as bytes: the trail grows without being decoded, and formats may grow at their end."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    CompensationRecord,
    CompensationTask,
    Envelope,
    Outcome,
    StageRecord,
    append_record,
    decode_envelope,
    decode_outcome,
    decode_trail,
    encode,
    raw,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | TEXT | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
SECONDS = st.floats(min_value=0, max_value=1e10)
RECORDS = st.builds(
    StageRecord,
    TEXT,
    st.sampled_from(["completed", "failed", "skipped"]),
    st.integers(0, 2**31),
    SECONDS,
    SECONDS,
    st.none() | TEXT,
    VALUES.map(raw),
)
TRAILS = st.lists(RECORDS, max_size=6)
COMPENSATIONS = st.lists(st.builds(CompensationRecord, TEXT, TEXT, st.none() | TEXT, SECONDS), max_size=3)


def make_trail(records: list[StageRecord]) -> bytes:
    trail = EMPTY_TRAIL
    for record in records:
        trail = append_record(trail, record)
    return trail


def plain(value: Any) -> Any:
    """Structs compare their raw parts by identity of bytes; this compares what they say."""
    return msgspec.msgpack.decode(encode(value))


@given(TRAILS)
def test_a_trail_returns_the_records_in_the_order_they_were_appended(records: list[StageRecord]) -> None:
    assert [plain(record) for record in decode_trail(make_trail(records))] == [plain(record) for record in records]


@given(TRAILS, RECORDS)
def test_appending_leaves_the_records_before_as_bytes(records: list[StageRecord], record: StageRecord) -> None:
    before = make_trail(records)
    after = append_record(before, record)
    assert after[5:].startswith(before[5:])
    assert after[5 + len(before[5:]) :] == encode(record)
    assert make_trail(records) == before


def test_a_trail_may_be_longer_than_one_byte_can_count() -> None:
    names = [f"stage-{number}" for number in range(300)]
    trail = make_trail([StageRecord(name, "completed") for name in names])
    assert [record.stage_id for record in decode_trail(trail)] == names


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_trail_that_is_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_trail(make_trail([StageRecord("pay", "completed")])[:-cut])


ENVELOPES = st.builds(
    Envelope,
    TEXT,
    st.integers(1, 2**31),
    TEXT,
    VALUES.map(raw),
    TRAILS.map(make_trail),
    SECONDS,
    VALUES.map(raw),
    st.none() | TEXT,
    st.none() | TEXT,
    st.none() | st.builds(CompensationTask, st.lists(TEXT, max_size=3), COMPENSATIONS, TEXT),
    st.none() | st.binary(min_size=16, max_size=16),
)
OUTCOMES = st.builds(
    Outcome,
    TEXT,
    st.integers(1, 2**31),
    TEXT,
    VALUES.map(raw),
    TRAILS.map(make_trail),
    SECONDS,
    SECONDS,
    st.none() | TEXT,
    st.none() | TEXT,
    COMPENSATIONS,
    st.none() | st.binary(min_size=16, max_size=16),
)


@given(ENVELOPES)
def test_an_envelope_comes_back_as_the_same_bytes(envelope: Envelope) -> None:
    assert encode(decode_envelope(encode(envelope))) == encode(envelope)


@given(OUTCOMES)
def test_an_outcome_comes_back_as_the_same_bytes(outcome: Outcome) -> None:
    assert encode(decode_outcome(encode(outcome))) == encode(outcome)


def test_a_field_that_a_later_release_adds_at_the_end_is_passed_over() -> None:
    envelope = Envelope("orders", 1, "pay", raw({"a": 1}), EMPTY_TRAIL, 5.0)
    later = encode([*plain(envelope), "of a later release"])
    assert plain(decode_envelope(later)) == plain(envelope)


def test_fields_that_an_earlier_release_did_not_know_have_their_defaults() -> None:
    earlier = encode(["orders", 1, "pay", {"a": 1}, EMPTY_TRAIL, 5.0])
    envelope = decode_envelope(earlier)
    assert (envelope.error, envelope.failed_stage, envelope.compensation, envelope.digest) == (None, None, None, None)
    assert bytes(envelope.payload) == encode(None)
    assert bytes(envelope.context) == encode({"a": 1})


@pytest.mark.parametrize(
    "damaged",
    [b"", b"\xc0", encode({"workflow_id": "orders"}), encode(["orders", "1", "pay", {}, EMPTY_TRAIL, 5.0]), encode([])],
)
def test_what_is_no_envelope_is_refused(damaged: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_envelope(damaged)


def test_the_context_of_an_envelope_is_not_read() -> None:
    envelope = Envelope("orders", 1, "pay", Raw(encode(msgspec.msgpack.Ext(99, b"of the user's"))), EMPTY_TRAIL, 5.0)
    assert bytes(decode_envelope(encode(envelope)).context) == bytes(envelope.context)
