"""The changes of branches are merged into one context by encoded field."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from stageflow_actors.core.envelope import raw
from stageflow_actors.core.merge import merge_fields


def merged(base: Any, **branches: Any) -> tuple[Any, Any]:
    context, clash = merge_fields(raw(base), {name: raw(branch) for name, branch in branches.items()})
    return msgspec.msgpack.decode(context), clash


def test_each_branch_changes_adds_and_removes_fields_of_its_own() -> None:
    base = {"a": 1, "b": 2, "c": 3}
    assert merged(base, x={"a": 9, "b": 2, "c": 3}, y={"a": 1, "c": 3}, z={**base, "d": 4}) == (
        {"a": 9, "c": 3, "d": 4},
        None,
    )


def test_the_first_of_two_that_change_a_field_differently_counts_and_both_are_named() -> None:
    assert merged({"a": 1, "b": 1}, x={"a": 2, "b": 1}, y={"a": 3, "b": 4}) == ({"a": 2, "b": 4}, ("a", "x", "y"))
    assert merged({"a": 1}, x={}, y={"a": 3}) == ({}, ("a", "x", "y"))
    assert merged({"a": 1}, x={"a": 3}, y={}) == ({"a": 3}, ("a", "x", "y"))


def test_the_same_change_by_several_is_no_contradiction() -> None:
    assert merged({"a": 1, "b": 1}, x={"a": 2}, y={"a": 2}, z={"a": 1, "b": 1}) == ({"a": 2}, None)


def test_the_places_of_an_array_are_its_fields() -> None:
    assert merged(["tag", 0, 0], x=["tag", 1, 0], y=["tag", 0, 2]) == (["tag", 1, 2], None)
    assert merged([0] * 20, x=[1] + [0] * 19, y=[2] + [0] * 19) == ([1] + [0] * 19, (0, "x", "y"))


def test_nan_is_no_change() -> None:
    context, clash = merged({"a": float("nan")}, x={"a": float("nan")}, y={"a": 1.0})
    assert (context, clash) == ({"a": 1.0}, None)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
CONTEXTS = st.dictionaries(st.text(max_size=2) | st.integers(0, 5), VALUES, max_size=5)


@given(CONTEXTS, st.dictionaries(st.sampled_from("xyz"), CONTEXTS, max_size=3))
def test_merging_never_raises_and_one_branch_alone_has_its_way(base: Any, branches: dict[str, Any]) -> None:
    context, clash = merge_fields(raw(base), {name: raw(branch) for name, branch in branches.items()})
    msgspec.msgpack.decode(context)
    if len(branches) < 2:
        (only,) = branches.values() or (base,)
        assert clash is None
        assert fields(context) == fields(raw(only))


def fields(context: Raw) -> dict[Any, bytes]:
    return {key: bytes(value) for key, value in msgspec.msgpack.decode(context, type=dict[Any, Raw]).items()}
