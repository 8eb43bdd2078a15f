"""A request returned where it cannot be sent is an error, not a step that seems to have worked."""

from __future__ import annotations

from typing import Any

import pytest
from constructs_fixtures import note, noted

from stageflow_actors import StageContext, Workflow
from stageflow_actors.runtime.worker.stage_context import Request


def refund(command: Any) -> None:
    note("asked to refund")


def relay(command: Any, ctx: StageContext) -> Any:
    return ctx.request("refund", command)


ENDPOINTS = {"refund": refund, "relay": relay}


def ask(context: Any, ctx: StageContext) -> Any:
    return ctx.request("refund", 1)


def make(*given: Any) -> Request:
    """For what is given no `ctx`."""
    return Request("refund", 1, 60.0, {})


def fail(context: dict[str, Any]) -> None:
    raise ValueError("boom failed")


undone = Workflow("undone").add_stage(lambda context: 1, id="a", compensation=ask).add_stage(fail)
undone_items = (
    Workflow("undone-items").add_map("a", lambda item: 1, over=lambda context: [1, 2], compensation=ask).add_stage(fail)
)
mapped = Workflow("mapped").add_map("a", ask, over=lambda context: [1])
signalled = Workflow("signalled").add_signal("a", on_signal=make)
late = Workflow("late").add_signal("a", timeout=0.01, on_timeout=make)
replied = Workflow("replied").add_remote_stage("a", endpoint="refund", command=lambda context: 1, on_reply=make)
relayed = Workflow("relayed").add_remote_stage("a", endpoint="relay", command=lambda context: 1)


@pytest.mark.parametrize(("workflow", "what"), [(undone, "stage 'a'"), (undone_items, "item of 'a'")])
def test_a_compensation_that_returns_a_request_has_failed(execute: Any, workflow: Any, what: str) -> None:
    result = execute(workflow, {})
    assert result.status == "compensation_failed"
    error = result.compensations[0].error
    assert f"{what} made ctx.request('refund', ...), and the request is not sent" in error
    assert noted("asked to refund") == []


@pytest.mark.parametrize(
    ("workflow", "what"),
    [
        (mapped, "an item of 'a'"),
        (signalled, "on_signal of 'a'"),
        (late, "on_timeout of 'a'"),
        (replied, "on_reply of 'a'"),
        (relayed, "endpoint 'relay'"),
    ],
    ids=lambda value: getattr(value, "id", ""),
)
def test_a_request_from_where_none_is_sent_fails_the_stage(execute: Any, workflow: Any, what: str) -> None:
    result = execute(workflow, {}, signals={"a": 1} if workflow is signalled else None)
    assert (result.status, result.failed_stage) == ("failed", "a")
    assert f"{what} made ctx.request('refund', ...), and the request is not sent" in result.error
