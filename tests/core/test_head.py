"""The head of a message is decoded without the rest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stageflow_actors.core.envelope import EMPTY_TRAIL, NIL, Envelope, ItemEnd, Outcome, Reply, encode, head_of

names = st.text(min_size=1, max_size=300)


@given(names, st.integers(1, 2**40), names, st.binary(max_size=50))
def test_the_head_of_an_envelope_is_read_whatever_follows(workflow: str, version: int, stage: str, rest: bytes) -> None:
    body = encode(Envelope(workflow, version, stage, NIL, EMPTY_TRAIL, 1.0))
    assert head_of(body + rest) == (workflow, version, stage)


def test_the_head_of_an_outcome_ends_with_its_status() -> None:
    assert head_of(encode(Outcome("flow", 3, "failed", NIL, EMPTY_TRAIL, 1.0, 2.0))) == ("flow", 3, "failed")


@pytest.mark.parametrize("body", [b"", b"\x9c", encode(Reply()), encode(ItemEnd()), b"\x9c\xd9", b"\x9c\xa1\xff"])
def test_other_bodies_have_no_head(body: bytes) -> None:
    assert head_of(body) is None


@given(st.binary(max_size=40))
def test_nothing_makes_it_raise(body: bytes) -> None:
    head_of(b"\x9c" + body)
