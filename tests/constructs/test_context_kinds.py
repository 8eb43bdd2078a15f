"""Contexts of every kind are merged field by field and take the results of maps, even frozen ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from constructs_fixtures import note, undone

from stageflow_actors import Stage, StageContext, Workflow

pydantic = pytest.importorskip("pydantic")


class Pair(msgspec.Struct, array_like=True):
    a: int = 0
    b: int = 0
    seen: list[str] = []


class Tagged(msgspec.Struct, array_like=True, tag="of-this-kind"):
    a: int = 0
    b: int = 0
    seen: list[str] = []


def sets(name: str, value: int) -> Any:
    def handle(context: Any) -> None:
        setattr(context, name, value)

    return handle


def undoes(name: str) -> Any:
    def handle(context: Any, ctx: StageContext) -> None:
        note(ctx.instance_id, "undid", name)
        context.seen.append(f"{name}: {context.a} {context.b}")

    return handle


def raises(context: Any) -> None:
    raise ValueError("boom failed")


def both(name: str, kind: type[Any], *more: Any, b: str = "b") -> Workflow[Any]:
    branches = [Stage(sets("a", 1), id="x", compensation=undoes("x")), Stage(sets(b, 2), id="y"), *more]
    return Workflow(name, context=kind).add_parallel("p", branches)


pair, tagged = both("pair", Pair), both("tagged", Tagged)
pair_clash, tagged_clash = both("pair-clash", Pair, b="a"), both("tagged-clash", Tagged, b="a")
pair_lost = both("pair-lost", Pair, Stage(raises, id="z"))
pair_merged = Workflow("pair-merged", context=Pair).add_parallel(
    "p",
    [Stage(sets("a", 1), id="x", compensation=undoes("x")), Stage(raises, id="z")],
    merge=lambda base, branches: base,
)


@pytest.mark.parametrize("flow", [pair, tagged], ids=lambda flow: flow.id)
def test_branches_of_a_struct_that_travels_as_an_array_are_joined_by_field(execute: Any, flow: Workflow[Any]) -> None:
    result = execute(flow, flow.context())
    assert (result.status, result.context) == ("completed", flow.context(1, 2))


@pytest.mark.parametrize("flow", [pair_clash, tagged_clash], ids=lambda flow: flow.id)
def test_branches_that_conflict_about_such_a_struct_are_reported_by_field_name(
    execute: Any, flow: Workflow[Any]
) -> None:
    result = execute(flow, flow.context())
    assert (result.status, result.failed_stage) == ("compensated", "p")
    assert "changed the field 'a' differently" in result.error
    assert undone(result.instance_id) == ["x"]


@pytest.mark.parametrize("flow", [pair_lost, pair_merged], ids=lambda flow: flow.id)
def test_a_branch_of_such_a_struct_that_fails_has_the_others_undone(execute: Any, flow: Workflow[Any]) -> None:
    result = execute(flow, Pair())
    assert (result.status, result.failed_stage) == ("compensated", "z")
    assert result.context.seen == [f"x: 1 {result.context.b}"]


@dataclass
class Bag:
    marks: set[int] = field(default_factory=set)
    name: str = ""


def add_mark(bag: Bag) -> None:
    bag.marks.add(7)


bags = Workflow("bags", context=Bag).add_parallel("p", [Stage(add_mark, id="add"), Stage(sets("name", "n"), id="name")])


def test_a_set_that_comes_back_in_another_order_has_not_been_changed(execute: Any) -> None:
    unstable = next(s for s in map(build, range(10_000)) if order(s) != order(set(order(s))))
    result = execute(bags, Bag(unstable))
    assert (result.status, result.error) == ("completed", None)
    assert result.context == Bag(unstable | {7}, "n")


def build(seed: int) -> set[int]:
    """A set with a history: how it is iterated depends on what was in it before."""
    found = {(seed * 31 + n * 17) % 199 + 8 for n in range(20)}
    for gone in list(found)[::3]:
        found.discard(gone)
    return found


def order(of: set[int]) -> list[int]:
    return list(of)


@dataclass(frozen=True)
class Frozen:
    a: int = 0
    got: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FrozenSlots:
    got: list[int] = field(default_factory=list, init=False)
    a: int = 0


class FrozenStruct(msgspec.Struct, frozen=True):
    a: int = 0
    got: list[int] = []


class FrozenModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True)
    a: int = 0
    got: list[int] = []


class FrozenField(pydantic.BaseModel):
    a: int = 0
    got: list[int] = pydantic.Field(default=[], frozen=True)


def mapped(name: str, kind: type[Any]) -> Workflow[Any]:
    return Workflow(name, context=kind).add_map("m", lambda item: item * 2, over=lambda context: [1, 2], into="got")


frozen, frozen_slots = mapped("frozen", Frozen), mapped("frozen-slots", FrozenSlots)
frozen_struct, frozen_model = mapped("frozen-struct", FrozenStruct), mapped("frozen-model", FrozenModel)
frozen_field = mapped("frozen-field", FrozenField)


@pytest.mark.parametrize(
    "flow", [frozen, frozen_slots, frozen_struct, frozen_model, frozen_field], ids=lambda flow: flow.id
)
def test_a_context_that_cannot_be_changed_is_replaced_by_one_with_the_results_of_a_map(
    execute: Any, flow: Workflow[Any]
) -> None:
    result = execute(flow, flow.context(a=5))
    assert (result.status, result.error) == ("completed", None)
    assert type(result.context) is flow.context
    assert (result.context.a, result.context.got) == (5, [2, 4])
