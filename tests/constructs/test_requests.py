"""Requests, replies, endpoints, and remote stages."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from constructs_fixtures import does, done, note, noted, stage_of, statuses, undoes, undone, wait_for_file

from stageflow_actors import (
    InstanceParked,
    Replace,
    Retry,
    Runtime,
    Stage,
    StageContext,
    StageError,
    Workflow,
    WorkflowDefinitionError,
)
from stageflow_actors.testing import run


def stock(command: dict[str, Any], ctx: StageContext) -> Any:
    """An endpoint that acts as its command asks."""
    note("asked", command.get("who", ""), ctx.attempt, os.getpid())
    asked = len(noted("asked", command.get("who", "")))
    what = command.get("do", "answer")
    if what == "raise" or (what == "raise twice" and asked <= 2):
        raise LookupError("no such item")
    if what == "die" or (what == "die once" and asked == 1):
        os._exit(3)
    if what == "hang" or (what == "hang once" and asked == 1):
        time.sleep(60)
    if what.startswith("/"):
        wait_for_file(what)
    if what == "nothing":
        return None
    if what == "odd":
        return object()
    return {"left": command.get("n", 0) - 1}


@dataclass
class Offer:
    sku: str
    price: Decimal


def offer(command: dict[str, Any]) -> Offer:
    return Offer(command["sku"], Decimal("9.90"))


ENDPOINTS = {
    "offer": offer,
    "stock": (stock, {"actors": 3}),
    "patient": (stock, {"retry": Retry.fixed(3, 0)}),
    "quick": (stock, {"timeout": 0.3}),
    "echo": lambda command: command,
}


def ask(context: dict[str, Any], ctx: StageContext) -> Any:
    note(ctx.instance_id, "did", "ask", ctx.attempt, type(ctx.previous_failure).__name__)
    context["asked"] = ctx.attempt
    return ctx.request(context.get("endpoint", "stock"), context.get("command", {}), timeout=context.get("timeout", 20))


def use(context: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "did", "use", ctx.attempt)
    context["got"] = ctx.payload
    if context.get("use") == "raise" or (context.get("use") == "raise once" and ctx.attempt == 1):
        raise ValueError("useless")


def look(context: dict[str, Any], ctx: StageContext) -> None:
    context["payload later"] = ctx.payload


asking = (
    Workflow("asking")
    .add_stage(does("before"), id="before", compensation=undoes("before"))
    .add_stage(ask, compensation=undoes("ask"), retry=Retry.fixed(3, 0))
    .add_stage(use, retry=Retry.fixed(2, 0))
    .add_stage(look)
)
asking_once = Workflow("asking-once").add_stage(ask).add_stage(use)


def test_the_reply_to_a_request_is_given_to_the_next_stage_and_to_no_later_one(execute: Any) -> None:
    result = execute(asking, {"command": {"n": 5}})
    assert result.status == "completed"
    assert (result.context["got"], result.context["payload later"]) == ({"left": 4}, None)
    assert result.context["asked"] == 1, "what the stage did to the context counts"
    assert (statuses(result)["ask"], stage_of(result, "ask").attempts) == ("completed", 1)


@pytest.mark.parametrize("command", [None, 5, "text", [1, b"\xff"], {"a": None}], ids=str)
def test_any_value_may_be_asked_and_answered(execute: Any, command: Any) -> None:
    result = execute(asking, {"endpoint": "echo", "command": command})
    assert (result.status, result.context["got"]) == ("completed", command)


def test_every_attempt_of_the_next_stage_has_the_reply(execute: Any) -> None:
    result = execute(asking, {"command": {"n": 5}, "use": "raise once"})
    assert (result.status, result.context["got"]) == ("completed", {"left": 4})
    assert done(result.instance_id) == ["before", "ask", "use", "use"]


def test_a_reply_is_of_the_type_that_its_endpoint_is_annotated_with_in_every_attempt(execute: Any) -> None:
    result = execute(typed, {"endpoint": "offer", "command": {"sku": "TEA"}})
    assert (result.status, result.error) == ("completed", None)
    assert stage_of(result, "haggle").data == "Offer(sku='TEA', price=Decimal('9.90'))"


def haggle(context: dict[str, Any], ctx: StageContext) -> str:
    if ctx.attempt == 1:
        raise ValueError("too much")
    return repr(ctx.payload)


typed = Workflow("typed").add_stage(ask).add_delay("rest", 0.01).add_stage(haggle, retry=Retry.fixed(2, 0))


def test_next_hands_a_message_straight_on(execute: Any) -> None:
    result = execute(asking, {"endpoint": "next", "command": {"hello": 1}})
    assert (result.status, result.context["got"]) == ("completed", {"hello": 1})
    assert noted("asked", "next") == []


def test_an_endpoint_that_answers_with_an_error_fails_the_attempt_and_the_policy_sees_it(execute: Any) -> None:
    who = f"twice {uuid4()}"
    result = execute(asking, {"command": {"who": who, "n": 3, "do": "raise twice"}})
    assert (result.status, result.context["got"]) == ("completed", {"left": 2})
    assert (result.context["asked"], stage_of(result, "ask").attempts) == (3, 3)
    assert [words[1] for words in noted(result.instance_id, "did", "ask")] == ["NoneType"] + ["StageError"] * 2


def ask_again(context: dict[str, Any], ctx: StageContext) -> Any:
    """Was given a reply, keeps a step, and asks itself."""
    note(ctx.instance_id, "asks again", ctx.attempt, ctx.payload)
    ctx.step("once", note, ctx.instance_id, "stepped", ctx.attempt)
    return ctx.request("stock", {**context["second"], "n": ctx.payload})


chained = (
    Workflow("chained")
    .add_stage(lambda context, ctx: ctx.request("echo", 7), id="first")
    .add_stage(ask_again, id="second", retry=Retry.fixed(3, 0))
    .add_stage(use)
)


def test_each_attempt_to_ask_has_the_steps_and_the_reply_that_the_first_had(execute: Any) -> None:
    result = execute(chained, {"second": {"who": f"chained {uuid4()}", "do": "raise twice"}})
    assert (result.status, result.context["got"]) == ("completed", {"left": 6})
    assert noted(result.instance_id, "asks again") == [("1", "7"), ("2", "7"), ("3", "7")]
    assert noted(result.instance_id, "stepped") == [("1",)]


def test_an_endpoint_that_never_answers_well_fails_the_stage(execute: Any) -> None:
    result = execute(asking, {"command": {"do": "raise"}})
    assert (result.status, result.failed_stage) == ("compensated", "ask")
    assert result.error == "StageError: endpoint 'stock' answered with an error: LookupError: no such item"
    assert (done(result.instance_id), undone(result.instance_id)) == (["before", "ask", "ask", "ask"], ["before"])
    assert "asked" not in result.context, "what failed attempts did to the context is gone"
    assert stage_of(result, "ask").attempts == 3


def test_without_a_policy_the_first_error_is_final(execute: Any) -> None:
    result = execute(asking_once, {"command": {"do": "raise"}})
    assert (result.status, result.failed_stage, stage_of(result, "ask").attempts) == ("failed", "ask", 1)


def test_an_endpoint_may_answer_nothing(execute: Any) -> None:
    result = execute(asking, {"command": {"do": "nothing"}})
    assert (result.status, result.context["got"]) == ("completed", None)


def test_a_reply_that_cannot_be_encoded_is_an_error_with_that_reason(execute: Any) -> None:
    result = execute(asking_once, {"command": {"do": "odd"}})
    assert result.failed_stage == "ask"
    assert "the reply of 'stock'" in result.error


def test_a_command_that_cannot_travel_fails_the_stage(execute: Any) -> None:
    result = execute(odd, {})
    assert (result.status, result.failed_stage) == ("failed", "ask-oddly")
    assert "the command of stage 'ask-oddly'" in result.error


def ask_oddly(context: dict[str, Any], ctx: StageContext) -> Any:
    return ctx.request("echo", {1, 2})


odd = Workflow("odd").add_stage(ask_oddly).add_stage(use)


def test_an_endpoint_retries_by_its_own_policy(execute: Any) -> None:
    who = f"own {uuid4()}"
    result = execute(asking_once, {"endpoint": "patient", "command": {"who": who, "n": 3, "do": "raise twice"}})
    assert (result.status, result.context["got"]) == ("completed", {"left": 2})
    assert stage_of(result, "ask").attempts == 1
    assert [words[0] for words in noted("asked", who)] == ["1", "2", "3"]


def test_an_endpoint_that_is_not_served_does_not_answer_in_time(execute: Any) -> None:
    result = execute(asking, {"endpoint": "nobody", "timeout": 0.05})
    assert (result.status, result.failed_stage) == ("compensated", "ask")
    assert result.error == "StageTimeout: endpoint 'nobody' did not answer within 0.05 s"
    assert stage_of(result, "ask").attempts == 3


def shelf(id: str, endpoint: str = "stock", **options: Any) -> Stage:
    return Stage.remote(
        id,
        endpoint=endpoint,
        command=lambda context: {"who": f"{context['who']} {id}", "n": 5},
        on_reply=lambda context, reply: context.update({id: reply["left"]}),
        **options,
    )


widely = (
    Workflow("widely")
    .add_parallel("both", [shelf("left"), shelf("right", "patient", compensation=undoes("right"))])
    .add_branch("which", lambda context: "asks", {"asks": [shelf("arm")], "does not": []})
    .add_stage(does("last"), id="last")
)


def test_remote_stages_may_be_branches_and_arms(execute: Any) -> None:
    result = execute(widely, {"who": uuid4().hex})
    assert (result.status, [result.context[id] for id in ("left", "right", "arm")]) == ("completed", [4, 4, 4])
    result = execute(widely, {"who": uuid4().hex, "fail": {"last": "raise"}})
    assert (result.status, undone(result.instance_id)) == ("compensated", ["right"])
    with pytest.raises(WorkflowDefinitionError, match="the id of the endpoint of remote stage 'r' is empty"):
        Stage.remote("r", endpoint="", command=len)


def test_an_endpoint_that_is_slow_is_asked_again(runtime: Runtime) -> None:
    result = runtime.execute(
        asking, {"command": {"who": "slow", "do": "hang once", "n": 2}, "timeout": 2.0}, timeout=30
    )
    assert (result.status, result.context["got"], result.context["asked"]) == ("completed", {"left": 1}, 2)


def test_a_late_reply_changes_nothing(runtime: Runtime, gate: Path, eventually: Any) -> None:
    instance = runtime.submit(asking, {"command": {"who": "late", "do": str(gate)}, "timeout": 0.1})
    result = instance.result(timeout=20)
    assert result.status == "compensated"
    gate.touch()
    eventually(lambda: all(q.ready + q.leased == 0 for q in runtime.queues("stageflow.endpoint.stock")), "all answered")
    assert runtime.instance(instance.id).status() == "compensated"


def test_a_handler_over_the_timeout_of_its_endpoint_is_killed_and_that_is_the_answer(runtime: Runtime) -> None:
    result = runtime.execute(asking_once, {"endpoint": "quick", "command": {"do": "hang"}}, timeout=30)
    assert result.status == "failed"
    assert "answered with an error: StageTimeout: " in result.error


def test_a_worker_of_an_endpoint_may_die_and_the_request_goes_to_another(runtime: Runtime) -> None:
    context = {"command": {"who": "dies once", "do": "die once", "n": 9}}
    result = runtime.execute(asking_once, context, timeout=30)
    assert (result.status, result.context["got"]) == ("completed", {"left": 8})
    assert len({words[1] for words in noted("asked", "dies once")}) == 2


def test_a_request_that_kills_each_worker_is_answered_with_that(runtime: Runtime) -> None:
    result = runtime.execute(asking_once, {"command": {"who": "deadly", "do": "die"}}, timeout=30)
    assert (result.status, result.failed_stage) == ("failed", "ask")
    assert "answered with an error: WorkerDied: " in result.error
    assert len(noted("asked", "deadly")) == 3


def test_a_stage_that_asks_holds_no_actor_while_it_waits(runtime: Runtime, gate: Path, eventually: Any) -> None:
    slow = runtime.submit(asking, {"command": {"who": "held", "do": str(gate), "n": 1}})
    eventually(lambda: noted("asked", "held"), "it has been asked")
    assert runtime.execute(asking, {"command": {"n": 5}}, timeout=20).context["got"] == {"left": 4}
    gate.touch()
    assert slow.result(timeout=20).success


def test_an_endpoint_may_be_served_later(serve: Any, eventually: Any) -> None:
    late = serve(asking_once)
    instance = late.submit(asking_once, {"endpoint": "later", "command": 7, "timeout": 60})
    eventually(lambda: late.queues("stageflow.endpoint.later"), "it has been asked")
    late.endpoint("later", lambda command: command + 1)
    assert instance.result(timeout=20).context["got"] == 8


def test_an_endpoint_is_served_once(runtime: Runtime) -> None:
    with pytest.raises(WorkflowDefinitionError, match="'stock' exists already"):
        runtime.endpoint("stock", stock)


@pytest.mark.parametrize(
    ("option", "given"), [("required", False), ("after", ["a"]), ("when", lambda command: True), ("ttl", 5)]
)
def test_an_endpoint_takes_no_options_that_only_stages_of_a_workflow_have(option: str, given: Any) -> None:
    with pytest.raises(WorkflowDefinitionError, match=f"endpoint 'stock' cannot have {option}, which only stages"):
        Runtime(parking).endpoint("stock", stock, **{option: given})


# remote stages


def take_in(context: dict[str, Any], reply: Any) -> Any:
    if context.get("take") == "raise":
        raise ValueError("cannot be taken in")
    context["left"] = reply["left"]
    return {"replace": Replace({"only": reply["left"]}), "result": "kept"}.get(context.get("take", ""))


remote = (
    Workflow("remote")
    .add_stage(does("before"), id="before", compensation=undoes("before"))
    .add_remote_stage(
        "reserve",
        endpoint="stock",
        command=lambda context: context["command"],
        on_reply=take_in,
        timeout=5,
        retry=Retry.fixed(3, 0),
        compensation=undoes("reserve"),
    )
    .add_remote_stage("again", endpoint="echo", command=lambda context: "hello")
    .add_stage(does("after"), id="after")
)
unserved = Workflow("unserved").add_remote_stage(
    "nobody", endpoint="nobody", command=lambda context: 1, timeout=0.05, retry=Retry.fixed(2, 0)
)
optional = (
    Workflow("optional")
    .add_remote_stage("maybe", endpoint="stock", command=lambda context: context["command"], required=False)
    .add_stage(does("after"), id="after")
)


def test_a_remote_stage_asks_and_takes_the_reply_in(execute: Any) -> None:
    result = execute(remote, {"command": {"n": 4}})
    assert (result.status, result.context["left"]) == ("completed", 3)
    assert stage_of(result, "reserve").data is None
    assert stage_of(result, "again").data == "hello", "without on_reply the reply is the result"
    result = execute(remote, {"command": {"n": 4}, "take": "result"})
    assert stage_of(result, "reserve").data == "kept"
    result = execute(remote, {"command": {"n": 4}, "take": "replace"})
    assert result.context == {"only": 3}


def test_a_remote_stage_is_retried_and_undone_as_any_other(execute: Any) -> None:
    who = f"remote {uuid4()}"
    context = {"command": {"who": who, "n": 3, "do": "raise twice"}, "fail": {"after": "raise"}}
    result = execute(remote, context)
    assert (result.status, stage_of(result, "reserve").attempts) == ("compensated", 3)
    assert undone(result.instance_id) == ["reserve", "before"]


def test_a_reply_that_cannot_be_taken_in_is_a_failure_that_the_policy_sees(execute: Any) -> None:
    result = execute(remote, {"command": {"n": 4}, "take": "raise"})
    assert (result.status, result.failed_stage) == ("compensated", "reserve")
    assert (result.error, stage_of(result, "reserve").attempts) == ("ValueError: cannot be taken in", 3)
    assert "left" not in result.context


def test_a_remote_stage_without_a_worker_has_its_own_timeout(execute: Any) -> None:
    result = execute(unserved, {})
    assert (result.status, result.failed_stage, stage_of(result, "nobody").attempts) == ("failed", "nobody", 2)
    assert result.error == "StageTimeout: endpoint 'nobody' did not answer within 0.05 s"


def test_an_optional_remote_stage_may_fail(execute: Any) -> None:
    result = execute(optional, {"command": {"do": "raise"}})
    assert (result.status, statuses(result)) == ("completed", {"maybe": "failed", "after": "completed"})


def test_a_command_that_raises_fails_the_stage(execute: Any) -> None:
    result = execute(remote, {})
    assert (result.status, result.failed_stage, result.error) == ("compensated", "reserve", "KeyError: 'command'")


# requests elsewhere

together = Workflow("together").add_parallel(
    "both",
    [
        Stage(lambda context, ctx: ctx.request("echo", 1), id="left"),
        Stage(lambda context, ctx: ctx.request("stock", {"n": 5}), id="right"),
    ],
)


def test_branches_may_ask_and_the_reply_is_their_result(execute: Any) -> None:
    result = execute(together, {})
    assert (result.status, statuses(result)) == (
        "completed",
        {"both": "completed", "left": "completed", "right": "completed"},
    )
    assert (stage_of(result, "left").data, stage_of(result, "right").data) == (1, {"left": 4})


def asks(name: str, endpoint: str = "echo") -> Stage:
    return Stage(lambda context, ctx: ctx.request(endpoint, f"for {name}"), id=name)


def takes(name: str) -> Stage:
    def handle(context: dict[str, Any], ctx: StageContext) -> None:
        context[name] = [ctx.payload, ctx.results.get("ask")]

    return Stage(handle, id=name)


def take_item(item: int, ctx: StageContext) -> Any:
    return [item, ctx.payload]


def nobody_next(endpoint: str) -> dict[str, Workflow[Any]]:
    ask = asks("ask", endpoint)
    return {
        "the last stage": Workflow(f"last-{endpoint}").add_stage(ask),
        "the last before a delay": Workflow(f"last-delay-{endpoint}").add_stage(ask).add_delay("d", 0.01),
        "a branch": Workflow(f"branch-{endpoint}").add_parallel("p", [ask]).add_stage(takes("later")),
        "before a map": Workflow(f"before-map-{endpoint}")
        .add_stage(ask)
        .add_map("m", take_item, over=lambda context: [5], into="items")
        .add_stage(takes("later")),
        "before a signal": Workflow(f"before-signal-{endpoint}")
        .add_stage(ask)
        .add_signal("go")
        .add_stage(takes("later")),
        "before a signal that is taken in": Workflow(f"before-on-signal-{endpoint}")
        .add_stage(ask)
        .add_signal("go", on_signal=lambda context, payload: None)
        .add_stage(takes("later")),
        "the last of the last arm": Workflow(f"arm-{endpoint}").add_branch("b", lambda context: "k", {"k": [ask]}),
    }


NOBODY_NEXT = {endpoint: nobody_next(endpoint) for endpoint in ("echo", "next")}
globals().update({f"nobody_{f.id}": f for flows in NOBODY_NEXT.values() for f in flows.values()})


@pytest.mark.parametrize("where", NOBODY_NEXT["echo"])
@pytest.mark.parametrize("endpoint", NOBODY_NEXT)
def test_a_reply_that_no_stage_comes_next_for_is_the_result_of_the_stage_that_asked(
    execute: Any, endpoint: str, where: str
) -> None:
    flow = NOBODY_NEXT[endpoint][where]
    result = execute(flow, {}, signals={"go": 1} if "signal" in where else None)
    assert (result.status, stage_of(result, "ask").data) == ("completed", "for ask")
    if "later" in result.context:
        assert result.context["later"] == [None, "for ask"]
    if "items" in result.context:
        assert result.context["items"] == [[5, None]], "an item has no payload; its number is in ctx.item"


SOMEBODY_NEXT = {
    "a stage": Workflow("next-stage").add_stage(asks("ask")).add_stage(takes("taken")),
    "behind a delay": Workflow("next-delay").add_stage(asks("ask")).add_delay("d", 0.01).add_stage(takes("taken")),
    "behind none": Workflow("next-none").add_stage(asks("ask")).add_delay("d", 0).add_stage(takes("taken")),
    "an arm": Workflow("next-arm").add_stage(asks("ask")).add_branch("b", lambda context: "k", {"k": [takes("taken")]}),
    "behind an arm": Workflow("next-behind-arm")
    .add_branch("b", lambda context: "k", {"k": [asks("ask")]})
    .add_stage(takes("taken")),
    "branches": Workflow("next-branches").add_stage(asks("ask")).add_parallel("p", [takes("taken"), takes("also")]),
    "behind one that is skipped": Workflow("next-skipped")
    .add_stage(asks("ask"))
    .add_conditional(takes("skipped"), when=lambda context: False)
    .add_stage(takes("taken")),
}
globals().update({f"somebody_{f.id}": f for f in SOMEBODY_NEXT.values()})


@pytest.mark.parametrize("who", SOMEBODY_NEXT)
def test_a_reply_is_the_payload_of_the_next_stage(execute: Any, who: str) -> None:
    result = execute(SOMEBODY_NEXT[who], {})
    assert (result.status, stage_of(result, "ask").data) == ("completed", None)
    assert result.context["taken"] == ["for ask", None]
    assert result.context.get("also", ["for ask", None]) == ["for ask", None]


parking = Workflow("parking", on_failure="park").add_stage(ask).add_stage(use)


@pytest.mark.parametrize("priority", [0, 5])
def test_a_request_that_fails_may_be_parked_and_is_asked_again_when_it_is_requeued(
    runtime: Runtime, priority: int
) -> None:
    who = f"parked {priority}"
    instance = runtime.submit(parking, {"command": {"who": who, "n": 3, "do": "raise twice"}}, priority=priority)
    for attempt in (1, 2):
        with pytest.raises(InstanceParked, match=r"dlq\.stageflow\.parking\.stage0.*LookupError: no such item"):
            instance.result(timeout=20)
        assert len(noted("asked", who)) == attempt
        instance.retry()
    result = instance.result(timeout=20)
    assert (result.status, result.context["got"]) == ("completed", {"left": 2})


def test_a_request_that_fails_is_a_parked_result_in_this_process() -> None:
    result = run(parking, {"command": {"do": "raise"}}, endpoints={"stock": stock})
    assert (result.status, result.failed_stage) == ("parked", "ask")
    assert "no such item" in str(result.error)


def test_what_no_request_can_be_is_refused(execute: Any) -> None:
    with pytest.raises(WorkflowDefinitionError, match="command of remote stage 'r'"):
        Workflow("w").add_remote_stage("r", endpoint="e", command={})  # type: ignore[arg-type]
    with pytest.raises(WorkflowDefinitionError, match="endpoint of remote stage 'r'"):
        Workflow("w").add_remote_stage("r", endpoint="a b", command=lambda context: 1)
    result = execute(no_request, {})
    assert (result.status, result.failed_stage) == ("failed", "r")


no_request = Workflow("no-request").add_stage(lambda context, ctx: ctx.request("", 1), id="r")


def test_a_stage_error_of_an_endpoint_keeps_its_words(execute: Any) -> None:
    result = execute(words, {})
    assert result.error == "StageError: endpoint 'refuses' answered with an error: StageError: closed on Sundays"


def refuse(command: Any) -> None:
    raise StageError("closed on Sundays")


ENDPOINTS["refuses"] = refuse


words = Workflow("words").add_stage(lambda context, ctx: ctx.request("refuses", 1), id="r")
