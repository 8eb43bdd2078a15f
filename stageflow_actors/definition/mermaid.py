"""A workflow as a Mermaid flowchart, which Markdown viewers draw.

Solid arrows are the path of an instance. Dotted arrows lead to the compensation of a stage, or to the endpoint or
server that a stage sends a request to.
"""

from __future__ import annotations

from typing import Any

from stageflow_actors.definition.http import HttpCall
from stageflow_actors.definition.remote import RemoteCall
from stageflow_actors.definition.stage import Stage
from stageflow_actors.definition.steps import Branch, Delay, MapStage, Parallel, Signal, Step
from stageflow_actors.definition.workflow import Workflow

__all__ = ["mermaid"]

Ends = list[tuple[str, str]]
"""The open ends of the path: nodes, each with the label of the arrow that leaves it."""


def mermaid(workflow: Workflow[Any]) -> str:
    """Return the flowchart, one line for each node and each arrow."""
    chart = _Chart()
    ends: Ends = [
        (chart.node("([{}])", workflow.id if workflow.version == 1 else f"{workflow.id} v{workflow.version}"), "")
    ]
    for step in workflow.steps:
        ends = chart.step(step, ends)
    chart.join(ends, chart.node("([{}])", "end"))
    return chart.text()


class _Chart:
    """The lines so far. Nodes are numbered, because the id of a stage may be a reserved word of Mermaid."""

    def __init__(self) -> None:
        self._nodes: list[str] = []
        self._arrows: list[str] = []
        self._endpoints: dict[str, str] = {}
        self._styles: dict[str, list[str]] = {"optional": [], "undo": []}

    def node(self, shape: str, label: str) -> str:
        """Add a node and return its name; `shape` is Mermaid's brackets around `{}`."""
        name = f"n{len(self._nodes)}"
        self._nodes.append(name + shape.replace("{}", f'"{_escaped(label)}"'))
        return name

    def join(self, ends: Ends, to: str) -> None:
        """Add arrows from all ends to a node."""
        for end, label in ends:
            self._arrows.append(f'{end} -->|"{_escaped(label)}"| {to}' if label else f"{end} --> {to}")

    def step(self, step: Step, ends: Ends) -> Ends:
        """Draw a step after `ends` and return the ends after it."""
        if isinstance(step, Stage):
            return self._stage(step, ends)
        if isinstance(step, Parallel):
            fork = self.node("[/{}\\]", step.id)
            self.join(ends, fork)
            join = self.node("[\\{}/]", "merged" if step.merge is not None else "joined")
            for branch in step.branches:
                self.join(self._stage(branch, [(fork, "")]), join)
            return [(join, "")]
        if isinstance(step, Branch):
            return self._branch(step, ends)
        if isinstance(step, MapStage):
            return self._stage(step.item, ends, shape="[[{}]]", label=f"{step.id} (for each item)")
        if isinstance(step, Delay):
            node = self.node(">{}]", f"{step.id}: wait {step.seconds:g} s")
        else:
            assert isinstance(step, Signal)
            limit = "" if step.timeout is None else f", {step.timeout:g} s at most"
            node = self.node("{{{}}}", f"{step.id}: signal {step.name}{limit}")
        self.join(ends, node)
        return [(node, "")]

    def _branch(self, step: Branch, ends: Ends) -> Ends:
        choice = self.node("{{}}", f"{step.id}?")
        self.join(ends, choice)
        behind: Ends = []
        for key, stages in step.arms.items():
            way: Ends = [(choice, f"{key} (default)" if key == step.default else key)]
            for stage in stages:
                way = self._stage(stage, way)
            behind += way
        return behind

    def _stage(self, stage: Stage, ends: Ends, shape: str = "[{}]", label: str = "") -> Ends:
        past: Ends = []
        if stage.when is not None:
            question = self.node("{{}}", f"{stage.id} needed?")
            self.join(ends, question)
            ends, past = [(question, "yes")], [(question, "no")]
        node = self.node(shape, label or stage.id)
        self.join(ends, node)
        if not stage.required:
            self._styles["optional"].append(node)
        if isinstance(stage.handler, RemoteCall):
            self._request_arrow(node, stage.handler.endpoint)
        elif isinstance(stage.handler, HttpCall):
            self._request_arrow(node, f"HTTP {stage.handler.method}")
        if stage.compensation is not None:
            undo = self.node("[{}]", getattr(stage.compensation.function, "__name__", f"undo {stage.id}"))
            self._styles["undo"].append(undo)
            self._arrows.append(f"{node} -.->|undone by| {undo}")
        return [(node, ""), *past]

    def _request_arrow(self, node: str, endpoint: str) -> None:
        if endpoint not in self._endpoints:
            self._endpoints[endpoint] = self.node("[({})]", endpoint)
        self._arrows.append(f"{node} -.->|asks| {self._endpoints[endpoint]}")

    def text(self) -> str:
        """Return the whole text."""
        lines = ["flowchart TD", *(f"    {line}" for line in (*self._nodes, *self._arrows))]
        looks = {"optional": "stroke-dasharray: 4", "undo": "stroke-dasharray: 2,fill:none"}
        for name, nodes in self._styles.items():
            if nodes:
                lines += [f"    classDef {name} {looks[name]}", f"    class {','.join(nodes)} {name}"]
        return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return (
        label.replace("&", "#amp;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;").replace("\n", " ")
    )
