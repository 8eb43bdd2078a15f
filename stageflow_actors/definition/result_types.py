"""`result_types`: the annotated types of a workflow's results, by stage id.

Workers and clients decode results by them. An annotation that cannot be resolved counts as none.
"""

from __future__ import annotations

from typing import Any

from stageflow_actors.definition.pickling import export_types
from stageflow_actors.definition.remote import RemoteCall
from stageflow_actors.definition.steps import MapStage, Signal
from stageflow_actors.definition.type_hints import classes_in, element_type, first_parameter_type, return_type
from stageflow_actors.definition.workflow import Workflow
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["item_result_type", "payload_type", "resolvable", "result_types"]


def result_types(workflow: Workflow[Any]) -> dict[str, Any]:
    """Return the type of the result of each stage that has an annotation."""
    found: dict[str, Any] = {}
    for stage in workflow.stages:
        handler = stage.handler
        if isinstance(handler, RemoteCall):
            found[stage.id] = Any if handler.on_reply is None else return_type(handler.on_reply)
        else:
            found[stage.id] = return_type(stage.spec.function)
    for step in workflow.steps:
        if isinstance(step, MapStage):
            item = item_result_type(step, workflow.context)
            found[step.id] = Any if item is Any or step.into is not None else list[item]  # type: ignore[valid-type]
        elif isinstance(step, Signal):
            found[step.id] = Any if step.on_signal is None else return_type(step.on_signal)
    checked = {stage_id: resolvable(hint) for stage_id, hint in found.items()}
    return {stage_id: hint for stage_id, hint in checked.items() if hint is not Any}


def item_result_type(step: MapStage, context: type[Any]) -> Any:
    """Return the type of the result of one item: the element type of the field `into`, or the annotated type."""
    hint = Any if step.into is None else element_type(context, step.into)
    return resolvable(return_type(step.item.spec.function)) if hint is Any else hint


def payload_type(step: Signal) -> Any:
    """Return the type of the payload that `on_signal` takes."""
    return Any if step.on_signal is None else resolvable(first_parameter_type(step.on_signal, 1, needed=False))


def resolvable(hint: Any) -> Any:
    """Return `hint`, or `Any` if the annotations of a class in it cannot be resolved."""
    try:
        for kind in classes_in(hint):
            export_types(kind)
    except (WorkflowDefinitionError, TypeError):
        return Any
    return hint
