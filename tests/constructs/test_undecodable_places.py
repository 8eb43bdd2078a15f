"""Each place where a message holds data: data of another definition parks it there, and it goes on there.

The workers of one definition are replaced by those of another, over one broker in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from effect_log import note, noted
from memory_cluster import MemoryCluster

from stageflow_actors import Compensation, InstanceParked, Retry, Stage, StageContext, Workflow
from stageflow_actors.runtime.client.client import Client


@dataclass
class Old:
    id: str
    amount: int = 0


@dataclass
class New:
    id: str
    total_cents: int


@dataclass
class Holder:
    id: str
    done: list[Old] | None = None


def does(word: str, result: Any = None) -> Callable[[Any, StageContext], Any]:
    def handle(context: Any, ctx: StageContext) -> Any:
        note(ctx.workflow_id, word)
        return result

    return handle


def fails(context: Any) -> None:
    raise ValueError("no")


def undo(context: Any, ctx: StageContext) -> None:
    note(ctx.workflow_id, "undo")


def seen(ctx: StageContext, value: Any) -> Any:
    note(ctx.workflow_id, type(value).__name__)
    return value


def branch(kind: Any) -> Workflow[Any]:
    def choose(context: Any) -> str:
        return "only"

    return Workflow("branch", context=kind).add_branch("way", choose, {"only": [Stage(does("ran"), id="a")]})


def stage(kind: Any) -> Workflow[Any]:
    return (
        Workflow("stage", context=kind)
        .add_stage(does("before"), id="a", compensation=undo)
        .add_stage(does("ran"), id="b", required=False)
    )


def parallel(kind: Any) -> Workflow[Any]:
    return Workflow("parallel", context=kind).add_parallel("both", [Stage(does("ran"), id="a")])


def join(kind: Any) -> Workflow[Any]:
    def merge(context: Any, branches: Any) -> Any:
        return context

    return Workflow("join", context=kind, on_failure="park").add_parallel(
        "both", [Stage(does("ran"), id="a"), Stage(does("ran"), id="b")], merge=merge
    )


def plain_join(kind: Any) -> Workflow[Any]:
    return Workflow("plain-join", context=kind).add_parallel(
        "both", [Stage(does("ran"), id="a"), Stage(does("ran"), id="b")]
    )


def over(kind: Any) -> Workflow[Any]:
    return Workflow("over", context=kind).add_map("m", does("ran"), over=lambda context: [1, 2])


def typed_item(kind: Any) -> Callable[..., Any]:
    def one(item: Any, ctx: StageContext) -> Any:
        seen(ctx, item)

    one.__annotations__ = {"item": kind, "ctx": StageContext}
    return one


def item(kind: Any) -> Workflow[Any]:
    return Workflow("item").add_map("m", typed_item(kind), over=lambda context: [Old("A", 1), Old("B", 2)])


def into(kind: Any) -> Workflow[Any]:
    def one(item: Any, ctx: StageContext) -> Any:
        note(ctx.workflow_id, "ran")
        return Old(item)

    one.__annotations__ = {"item": str, "ctx": StageContext, "return": kind}
    return Workflow("into", context=Holder).add_map("m", one, over=lambda context: ["A"], into="done")


def signal(kind: Any) -> Workflow[Any]:
    return Workflow("signal", context=kind).add_signal("s", on_signal=lambda context, payload, ctx: seen(ctx, payload))


def expiry(kind: Any) -> Workflow[Any]:
    return Workflow("expiry", context=kind).add_signal("s", timeout=0.05, on_timeout=does("ran"))


def reply(kind: Any) -> Workflow[Any]:
    def take(context: Any, answer: Any, ctx: StageContext) -> None:
        seen(ctx, answer)

    take.__annotations__ = {"context": dict, "answer": kind, "ctx": StageContext}
    return Workflow("reply").add_remote_stage(
        "ask", endpoint="answers", command=lambda context: {"id": "A"}, on_reply=take
    )


def command(kind: Any) -> Workflow[Any]:
    return Workflow("command").add_remote_stage(
        "ask",
        endpoint="stock",
        command=lambda context, ctx: seen(ctx, Old("A", 1)),
        on_reply=lambda context, answer: None,
    )


def result(kind: Any) -> Workflow[Any]:
    def first(context: dict[str, Any]) -> Any:
        return Old("A", 1)

    def second(context: dict[str, Any], ctx: StageContext) -> None:
        assert ctx.results.get("other") is None
        seen(ctx, dict(ctx.results)["a"])

    first.__annotations__["return"] = kind
    return Workflow("result").add_stage(first, id="a").add_stage(second, id="b")


def step(kind: Any) -> Workflow[Any]:
    def charge(ctx: StageContext) -> Any:
        note(ctx.workflow_id, "charged")
        return Old("A", 1)

    def pay(context: dict[str, Any], ctx: StageContext) -> None:
        try:
            charged = ctx.step("charge", charge, ctx)
        except Exception as error:
            raise RuntimeError("the charge cannot be read") from error
        if ctx.attempt == 1 and kind is Old and not noted("step", "again"):
            note(ctx.workflow_id, "again")
            raise OSError("try again")
        seen(ctx, charged)

    charge.__annotations__["return"] = kind
    return Workflow("step").add_stage(pay, id="a", retry=Retry.fixed(5, 0.2))


def compensation(kind: Any) -> Workflow[Any]:
    return Workflow("compensation", context=kind).add_stage(does("ran"), id="a", compensation=undo).add_stage(fails)


def undone_result(kind: Any) -> Workflow[Any]:
    def first(context: dict[str, Any]) -> Any:
        return Old("A", 1)

    def refund(context: Any, ctx: StageContext) -> None:
        seen(ctx, ctx.results["a"])

    first.__annotations__["return"] = kind
    return Workflow("undone-result").add_stage(first, id="a", compensation=refund).add_stage(fails)


def undone_items(kind: Any) -> Workflow[Any]:
    def one(item: Any, ctx: StageContext) -> None:
        note(ctx.workflow_id, "ran")

    def refund(item: Any, ctx: StageContext) -> None:
        seen(ctx, item)

    one.__annotations__ = {"item": kind, "ctx": StageContext}
    refund.__annotations__ = {"item": kind, "ctx": StageContext}
    given = [Old("A", 1), Old("B", 2)]
    return (
        Workflow("undone-items")
        .add_map("m", one, over=lambda context: given, compensation=Compensation(refund))
        .add_stage(fails)
    )


PLACES: dict[str, tuple[Callable[[Any], Workflow[Any]], str, str, list[str], list[str], str]] = {
    # the definition, the queue at which it is held, the words of the reason, effects before, effects after, its end
    "stage": (stage, ".stage1", "stage 'b'", ["before"], ["ran"], "completed"),
    "branch": (branch, ".stage0", "stage 'way'", [], ["ran"], "completed"),
    "parallel": (parallel, ".stage0.a", "stage 'a'", [], ["ran"], "completed"),
    "join": (join, ".stage0", "stage 'both'", ["ran", "ran"], [], "completed"),
    "plain-join": (plain_join, ".stage0", "stage 'both'", ["ran", "ran"], [], "completed"),
    "over": (over, ".stage0", "stage 'm'", [], ["ran", "ran"], "completed"),
    "item": (item, ".stage0.m", "item ", [], ["Old", "Old"], "completed"),
    "into": (into, ".stage0", "the result of item 0", ["ran"], [], "completed"),
    "signal": (signal, ".stage0", "stage 's'", [], ["str"], "completed"),
    "expiry": (expiry, ".stage0", "stage 's'", [], ["ran"], "completed"),
    "reply": (reply, ".stage0", "the reply of endpoint 'answers'", [], ["Old"], "completed"),
    "command": (command, "endpoint.stock", "endpoint 'stock'", ["Old"], ["served Old"], "completed"),
    "result": (result, ".stage1", "the result of stage 'a'", [], ["Old"], "completed"),
    "step": (step, ".stage0", "the result of step 'charge'", ["charged", "again"], ["Old"], "completed"),
    "compensation": (compensation, "compensation", "compensation of stage 'a'", ["ran"], ["undo"], "compensated"),
    "undone-result": (undone_result, "compensation", "the result of stage 'a'", [], ["Old"], "compensated"),
    "undone-items": (undone_items, "compensation", "item 1 of 'm'", ["ran", "ran"], ["Old", "Old"], "compensated"),
}


def endpoints(kind: Any) -> list[Stage]:
    def stock(command: Any) -> None:
        note("command", f"served {type(command).__name__}")

    def answers(command: dict[str, Any]) -> Old:
        return Old("A", 1)

    stock.__annotations__ = {"command": kind}
    return [Stage(stock), Stage(answers)]


@contextmanager
def held(kinds: list[str], eventually: Any) -> Iterator[tuple[MemoryCluster, Client]]:
    """Instances of the old definition, each with one message at its place, whose queue is paused."""
    cluster = MemoryCluster([PLACES[kind][0](Old) for kind in kinds], endpoints(Old))
    with cluster as client:
        queues = {kind: queue_of(kind) for kind in kinds}
        for kind, queue in queues.items():
            if kind in ("into", "reply", "step"):
                continue
            client.pause(queue)
        for kind in kinds:
            if kind == "into":
                client.pause(f"{queues[kind]}.m")
            if kind == "reply":
                client.pause("stageflow.endpoint.answers")
            context: Any = {"id": "A"} if kind != "step" else {}
            instance = client.submit(PLACES[kind][0](Old), context, instance_id=kind)
            if kind == "signal":
                instance.signal("s", "payload")
            if kind in ("into", "reply"):
                first = f"{queues[kind]}.m" if kind == "into" else "stageflow.endpoint.answers"
                eventually(lambda first=first: client.queues(first)[0].ready, "a message on the way")
                client.pause(queues[kind])
                client.resume(first)
            if kind == "step":
                eventually(lambda: client.queues(queue_of("step"))[0].delayed, "the second attempt to wait")
                client.pause(queues[kind])
        for kind, queue in queues.items():
            eventually(lambda queue=queue: client.queues(queue)[0].ready, f"a message of {kind} in {queue}")
        yield cluster, client


def queue_of(kind: str) -> str:
    place = PLACES[kind][1]
    if place == "compensation":
        return f"stageflow.compensation.{kind}"
    return f"stageflow.{place}" if place.startswith("endpoint") else f"stageflow.{kind}{place}"


def test_undecodable_data_parks_each_kind_of_message_where_it_is(eventually: Any) -> None:
    kinds = list(PLACES)
    with held(kinds, eventually) as (cluster, client):
        assert cluster.deploy([PLACES[kind][0](New) for kind in kinds], endpoints(New)) == {}
        for kind in kinds:
            client.resume(queue_of(kind))
        for kind in kinds:
            _, _, words, before, _, _ = PLACES[kind]
            with pytest.raises(InstanceParked, match="cannot decode its data") as parked:
                client.instance(kind).result(timeout=20)
            assert words in str(parked.value)
            assert "total_cents is missing: New requires it" in str(parked.value)
            assert noted(kind) == [(word,) for word in before], "no user code has run on it"
        tried = cluster.deploy([PLACES[kind][0](New) for kind in kinds], endpoints(New))
        assert tried == dict.fromkeys(kinds, 1)
        for kind in kinds:
            with pytest.raises(InstanceParked, match="cannot decode its data"):
                client.instance(kind).result(timeout=20)
            assert noted(kind) == [(word,) for word in PLACES[kind][3]], "and once more, with the same end"
        assert cluster.deploy([PLACES[kind][0](Old) for kind in kinds], endpoints(Old)) == dict.fromkeys(kinds, 1)
        for kind in kinds:
            _, _, _, before, after, end = PLACES[kind]
            ended = client.instance(kind).result(timeout=20)
            assert str(ended.status) == end, f"{kind}: {ended.error}"
            assert noted(kind) == [(word,) for word in before + after]
