"""A value larger than the message limit fails the stage that made it, which then has not completed."""

from __future__ import annotations

from typing import Any

import pytest
from constructs_fixtures import does, note, noted, statuses, undoes, undone

from stageflow_actors import Config, Retry, Runtime, Stage, StageContext, Workflow, WorkflowResult
from stageflow_actors.runtime.worker.executors.base import ExecutorEnvironment

LIMIT = 100_000


@pytest.fixture(scope="module")
def runtime(serve: Any) -> Runtime:
    flows = [value for value in globals().values() if isinstance(value, Workflow)]
    config = Config(durability="write", max_message_bytes=LIMIT)
    served: Runtime = serve(*flows, endpoints=ENDPOINTS, config=config)
    return served


@pytest.fixture(autouse=True)
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limit in this process."""
    monkeypatch.setitem(ExecutorEnvironment.__init__.__kwdefaults__, "max_message_bytes", LIMIT)


def much(share: float) -> str:
    return "x" * int(LIMIT * share)


ENDPOINTS = {"much": lambda command: much(0.99), "echo": lambda command: command}


def stage(name: str, **options: Any) -> Stage:
    return Stage(does(name), id=name, compensation=undoes(name), **options)


def too_large(result: WorkflowResult[Any], failed: str) -> bool:
    error = result.error or ""
    assert result.failed_stage == failed
    assert error.startswith(f"PayloadTooLarge: stage {failed!r}: ")
    assert f"max_message_bytes={LIMIT}" in error
    return True


# replies


def remote(name: str, **options: Any) -> Workflow[Any]:
    flow = Workflow(name).add_stage(stage("before"))
    return flow.add_remote_stage("ask", endpoint="much", command=lambda context: 1, **options)


filling = remote("filling", compensation=undoes("ask"))
filling_optional = remote("filling-optional", compensation=undoes("ask"), required=False).add_stage(
    stage("after", after=["ask"])
)
asking = Workflow("asking").add_stage(lambda context, ctx: ctx.request("much", 1), id="ask").add_stage(stage("after"))


def test_a_reply_that_is_too_large_fails_its_stage_which_is_not_compensated(execute: Any) -> None:
    result = execute(filling, {"pad": much(0.1)})
    assert too_large(result, "ask")
    assert (result.status, undone(result.instance_id)) == ("compensated", ["before"])
    assert statuses(result) == {"before": "compensated", "ask": "failed"}


def test_an_optional_stage_whose_reply_is_too_large_has_not_completed_for_those_after_it(execute: Any) -> None:
    result = execute(filling_optional, {"pad": much(0.1)})
    assert (result.status, result.failed_stage) == ("compensated", "after")
    assert statuses(result) == {"before": "compensated", "ask": "failed", "after": "failed"}


def test_a_reply_that_is_too_large_to_be_handed_on_fails_the_stage_that_asked(execute: Any) -> None:
    assert too_large(execute(asking, {"pad": much(0.1)}), "ask")


# requests


def asks(endpoint: str) -> Any:
    def handle(context: dict[str, Any], ctx: StageContext) -> Any:
        note(ctx.instance_id, "asks", ctx.attempt)
        context["pad"] = much(context.get("grow", 0))
        return ctx.request(endpoint, much(context.get("ask", 0)))

    return handle


next_one = Workflow("next-one").add_stage(stage("before")).add_stage(asks("next"), id="ask").add_stage(stage("after"))
endpoint_one = Workflow("endpoint-one").add_stage(stage("before")).add_stage(asks("echo"), id="ask")
retried = Workflow("retried").add_stage(asks("echo"), id="ask", retry=Retry.fixed(2, 0))


@pytest.mark.parametrize("flow", [next_one, endpoint_one], ids=lambda flow: flow.id)
@pytest.mark.parametrize("how", ["ask", "grow"])
def test_a_request_that_is_too_large_fails_its_stage_and_what_it_did_to_the_context_is_gone(
    execute: Any, flow: Workflow[Any], how: str
) -> None:
    result = execute(flow, {how: 1.1})
    assert too_large(result, "ask")
    assert (result.status, undone(result.instance_id)) == ("compensated", ["before"])
    assert result.context == {how: 1.1, "undone": ["before"]}


def test_a_policy_is_asked_about_a_request_that_is_too_large(execute: Any) -> None:
    result = execute(retried, {"ask": 1.1})
    assert too_large(result, "ask")
    assert len(noted(result.instance_id, "asks")) == 2


def test_a_context_of_more_than_half_the_limit_may_ask(execute: Any) -> None:
    assert execute(endpoint_one, {"grow": 0.7, "first": much(0.2)}).status == "completed"


# signals, joins, maps


def take_much(context: dict[str, Any], payload: Any) -> None:
    context["much"] = much(1.1)


signalled = Workflow("signalled").add_stage(stage("before")).add_signal("s", on_signal=take_much)


def test_what_on_signal_makes_too_large_fails_its_stage_and_is_gone(execute: Any) -> None:
    result = execute(signalled, {}, signals={"s": 1})
    assert too_large(result, "s")
    assert (result.status, result.context) == ("compensated", {"undone": ["before"]})


def fill(name: str) -> Any:
    def handle(context: dict[str, Any]) -> None:
        context[name] = much(0.6)

    return handle


joined = Workflow("joined").add_parallel(
    "p", [Stage(fill(name), id=name, compensation=undoes(name)) for name in ("a", "b")]
)


def test_branches_that_are_too_large_together_fail_their_join_and_are_undone(execute: Any) -> None:
    result = execute(joined, {})
    assert too_large(result, "p")
    assert (result.status, sorted(undone(result.instance_id))) == ("compensated", ["a", "b"])
    assert statuses(result) == {"p": "failed", "a": "compensated", "b": "compensated"}


def put_back(item: float, ctx: StageContext) -> None:
    note(ctx.instance_id, "put back", item)


def mapped(name: str, handler: Any) -> Workflow[Any]:
    return Workflow(name).add_map("m", handler, over=lambda context: context["items"], compensation=put_back)


summed = mapped("summed", much)
itemised = Workflow("itemised").add_map("m", len, over=lambda context: [much(0.1), much(1.1)])


def test_results_that_are_too_large_together_fail_their_map_whose_items_are_undone(execute: Any) -> None:
    result = execute(summed, {"items": [0.4, 0.4, 0.4]})
    assert too_large(result, "m")
    assert (result.status, len(noted(result.instance_id, "put back"))) == ("compensated", 3)
    assert statuses(result) == {"m": "failed"}


def test_one_result_that_is_too_large_is_that_items_failure(execute: Any) -> None:
    result = execute(summed, {"items": [0.1, 1.1]})
    assert (result.status, result.failed_stage) == ("compensated", "m")
    assert "1 of 2 items of 'm' failed" in result.error
    assert f"the result of item 1 is 110005 bytes, over max_message_bytes={LIMIT}" in result.error
    assert noted(result.instance_id, "put back") == [("0.1",)]


def test_an_item_that_is_too_large_is_named(execute: Any) -> None:
    result = execute(itemised, {})
    assert too_large(result, "m")
    assert "item 1 is 110005 bytes" in result.error
