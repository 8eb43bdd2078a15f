"""A workflow as Mermaid text: a shape for each construct, and an arrow for each transition."""

from __future__ import annotations

import re
from typing import Any

import pytest

from stageflow_actors import Stage, Workflow
from stageflow_actors.definition.mermaid import mermaid


def one(context: dict[str, Any]) -> None: ...
def two(context: dict[str, Any]) -> None: ...
def three(context: dict[str, Any]) -> None: ...
def undo(context: dict[str, Any]) -> None: ...


def drawn(workflow: Workflow[Any]) -> tuple[dict[str, str], set[tuple[str, str, str]]]:
    """Nodes by label, as their shape, and arrows as (from, label, to) by the labels of their ends."""
    lines = mermaid(workflow).splitlines()
    assert lines[0] == "flowchart TD"
    names: dict[str, str] = {}
    shapes: dict[str, str] = {}
    arrows = set()
    for line in lines[1:]:
        node = re.fullmatch(r'    (n\d+)(\W+?)"(.*)"(\W+)', line)
        arrow = re.fullmatch(r'    (n\d+) (?:-->|-\.->)(?:\|"?(.*?)"?\|)? (n\d+)', line)
        if node is not None:
            names[node[1]] = node[3]
            shapes[node[3]] = node[2] + node[4]
        elif arrow is not None:
            arrows.add((names[arrow[1]], arrow[2] or "", names[arrow[3]]))
        else:
            assert line.startswith(("    classDef ", "    class ")), line
    return shapes, arrows


def test_stages_follow_one_another() -> None:
    shapes, arrows = drawn(Workflow("flow", version=2).add_stage(one).add_stage(two, compensation=undo, required=False))
    assert arrows == {
        ("flow v2", "", "one"),
        ("one", "", "two"),
        ("two", "undone by", "undo"),
        ("two", "", "end"),
    }
    assert shapes["flow v2"] == shapes["end"] == "([])"


def test_branches_of_a_parallel_stage_meet_again() -> None:
    _, arrows = drawn(Workflow("flow").add_parallel("both", [one, two]).add_stage(three))
    assert {("both", "", "one"), ("both", "", "two"), ("one", "", "joined"), ("two", "", "joined")} < arrows
    assert ("joined", "", "three") in arrows


def test_arms_of_a_branch_are_named_and_an_empty_one_goes_past() -> None:
    shapes, arrows = drawn(
        Workflow("flow").add_branch("way", lambda c: "a", {"a": [one, two], "b": []}, default="b").add_stage(three)
    )
    assert arrows - {("flow", "", "way?"), ("three", "", "end")} == {
        ("way?", "a", "one"),
        ("one", "", "two"),
        ("two", "", "three"),
        ("way?", "b (default)", "three"),
    }
    assert shapes["way?"] == "{}"


def test_a_condition_has_a_way_past() -> None:
    _, arrows = drawn(Workflow("flow").add_conditional(one, when=lambda c: True).add_stage(two))
    assert {("one needed?", "yes", "one"), ("one needed?", "no", "two"), ("one", "", "two")} < arrows


def test_maps_delays_signals_and_requests_have_shapes_of_their_own() -> None:
    workflow = (
        Workflow("flow")
        .add_map("each", one, over=lambda c: [])
        .add_delay("pause", 60)
        .add_signal("approval", name="go", timeout=5)
        .add_remote_stage("ask", endpoint="stock", command=lambda c: c)
        .add_remote_stage("again", endpoint="stock", command=lambda c: c)
    )
    shapes, arrows = drawn(workflow)
    assert shapes["each (for each item)"] == "[[]]"
    assert shapes["pause: wait 60 s"] == ">]"
    assert shapes["approval: signal go, 5 s at most"] == "{{}}"
    assert shapes["stock"] == "[()]"
    assert {("ask", "asks", "stock"), ("again", "asks", "stock")} < arrows


def test_labels_cannot_break_out_of_their_quotes() -> None:
    workflow = Workflow("flow").add_branch("way", lambda c: "", {'a"|<b>': [Stage(lambda c: None, id="x")]})
    assert '|"a#quot;|#lt;b#gt;"|' in mermaid(workflow)


@pytest.mark.parametrize("word", ["end", "graph", "class"])
def test_ids_that_are_words_of_mermaid_are_only_labels(word: str) -> None:
    assert f'["{word}"]' in mermaid(Workflow("flow").add_stage(Stage(one, id=word)))
