"""Versions of a workflow: an instance finishes on the version it started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import InstanceParked, Runtime, Stage, Workflow, WorkflowDefinitionError


def mark(name: str) -> Any:
    def handler(context: dict[str, Any]) -> None:
        context.setdefault("did", []).append(name)

    return handler


def undo(context: dict[str, Any], ctx: Any) -> None:
    note("undone", ctx.instance_id, ctx.stage_id)


def fail(context: dict[str, Any]) -> None:
    raise ValueError("no")


def old(**options: Any) -> Workflow[dict[str, Any]]:
    return (
        Workflow("flow", **options)
        .add_stage(mark("old-a"), id="a")
        .add_stage(mark("old-b"), id="b")
        .add_stage(mark("old-c"), id="c")
    )


def new() -> Workflow[dict[str, Any]]:
    """Shorter, and with another kind of place at the second queue."""
    return (
        Workflow("flow", version=2)
        .add_stage(mark("new-a"), id="a")
        .add_parallel("both", [Stage(sets("x"), id="x"), Stage(sets("y"), id="y")])
    )


def sets(name: str) -> Any:
    def handler(context: dict[str, Any]) -> None:
        context[name] = True

    return handler


def dead_letter(runtime: Runtime, instance_id: str) -> tuple[str, str]:
    with pytest.raises(InstanceParked) as parked:
        runtime.instance(instance_id).result(timeout=20)
    return parked.value.queue or "", parked.value.reason or ""


def held_at(runtime: Runtime, queue: str, instance_id: str, eventually: Any) -> None:
    """An instance of the old version that waits at `queue`, which is paused for that."""
    runtime.pause(queue)
    runtime.submit("flow", {}, instance_id=instance_id)
    eventually(lambda: runtime.queues(queue)[0].ready, f"a message in {queue}")


def test_two_versions_run_side_by_side_in_the_same_queues(serve: Any) -> None:
    first, second = old(), new()
    runtime = serve(first, second)
    one = runtime.submit(first, {"n": 1}, instance_id="one")
    two = runtime.submit(second, {"n": 2}, instance_id="two")
    latest = runtime.submit("flow", {"n": 3})
    assert one.result(timeout=20).context == {"n": 1, "did": ["old-a", "old-b", "old-c"]}
    assert two.result(timeout=20).context == {"n": 2, "did": ["new-a"], "x": True, "y": True}
    assert latest.result(timeout=20).context == {"n": 3, "did": ["new-a"], "x": True, "y": True}
    assert all(result.context["did"][-1] == "old-c" for result in runtime.map(first, [{"n": n} for n in range(100)]))
    with Runtime.connect(runtime.data_dir) as client:
        assert [s.stage_id for s in client.execute(old(), {}, timeout=20).stages] == ["a", "b", "c"]
        assert [s.stage_id for s in client.instance("two").result(timeout=20).stages] == ["a", "both", "x", "y"]


def test_an_instance_whose_version_is_gone_is_parked_and_resumes_when_it_is_back(
    serve: Any, tmp_path: Path, eventually: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    shared, beyond = "stageflow.flow.stage1", "stageflow.flow.stage2"
    first = serve(old(), data_dir=tmp_path)
    held_at(first, beyond, "at-c", eventually)
    held_at(first, shared, "at-b", eventually)
    first.stop()
    second = serve(new(), data_dir=tmp_path)
    second.resume(shared)
    second.resume(beyond)
    eventually(lambda: len(second.instances(status="parked")) == 2, "both to be parked")
    for instance_id, queue, stage in (("at-b", shared, "b"), ("at-c", beyond, "c")):
        letter, reason = dead_letter(second, instance_id)
        assert letter == f"dlq.{queue}"
        assert f"version 1 of workflow 'flow' is not registered with a stage {stage!r}" in reason
    assert second.execute("flow", {}, timeout=20).success, "the others are not disturbed"
    second.stop()
    third = serve(new(), old(), data_dir=tmp_path)
    for instance_id in ("at-b", "at-c"):
        assert third.instance(instance_id).result(timeout=20).context == {"did": ["old-a", "old-b", "old-c"]}
    assert "has changed" not in capfd.readouterr().err, "what came back is what it was"


def test_what_is_registered_while_running_is_served_at_once_and_resumes_what_waited(
    serve: Any, tmp_path: Path, eventually: Any
) -> None:
    first = serve(old(), data_dir=tmp_path)
    held_at(first, "stageflow.flow.stage1", "lost", eventually)
    first.stop()
    runtime = serve(Workflow("other").add_stage(mark("other"), id="only"), data_dir=tmp_path)
    runtime.resume("stageflow.flow.stage1")
    eventually(lambda: runtime.instances(status="parked"), "a parked instance of a workflow that is not there at all")
    assert "version 1 of workflow 'flow'" in dead_letter(runtime, "lost")[1]
    runtime.register(new())
    assert runtime.execute("flow", {}, timeout=20).context["did"] == ["new-a"]
    assert str(runtime.instance("lost").status()) == "parked"
    again = old()
    runtime.register(again)
    assert runtime.instance("lost").result(timeout=20).context["did"] == ["old-a", "old-b", "old-c"]
    results = list(runtime.map(again, [{"n": n} for n in range(50)]))
    assert all(result.success and result.context["did"][-1] == "old-c" for result in results)
    assert runtime.execute("flow", {}, timeout=20).context["did"] == ["new-a"]


async def slow_old(context: dict[str, Any]) -> None:
    context["by"] = "old"


async def slow_new(context: dict[str, Any]) -> None:
    context["by"] = "new"


def blocking(context: dict[str, Any]) -> None:
    context["by"] = "blocking"


@pytest.mark.parametrize(
    ("handlers", "by"),
    [
        ((slow_old, slow_new), ["old", "new"]),
        ((blocking, blocking), ["blocking", "blocking"]),
        ((blocking, slow_new), ["blocking", "new"]),
    ],
)
def test_versions_may_be_async_blocking_or_one_of_each(mixed: Runtime, handlers: Any, by: list[str]) -> None:
    name = f"mixed-{handlers[0].__name__}-{handlers[1].__name__}".replace("_", "-")
    versions = [
        Workflow(name, version=number).add_stage(handler, id="s", concurrency=8)
        for number, handler in enumerate(handlers, 1)
    ]
    for version in versions:
        mixed.register(version)
    runs = [mixed.submit(version, {"n": n}) for n in range(40) for version in versions]
    assert [run.result(timeout=20).context["by"] for run in runs] == by * 40


def hold(context: dict[str, Any]) -> None:
    import time

    note("held", context["switch"])
    while not Path(context["switch"]).exists():
        time.sleep(0.005)
    context["by"] = "old"


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_worker_that_is_busy_while_a_version_comes_parks_nothing_of_it(
    mixed: Runtime, tmp_path: Path, eventually: Any, concurrency: int
) -> None:
    name = f"busy-{concurrency}"
    first = Workflow(name).add_stage(hold, id="s", concurrency=concurrency)
    second = Workflow(name, version=2).add_stage(blocking, id="s", concurrency=concurrency)
    mixed.register(first)
    switch = tmp_path / "on"
    busy = mixed.submit(first, {"switch": str(switch)})
    eventually(lambda: noted("held", switch), "the stage to be in work")
    mixed.register(second)
    later = mixed.submit_many(second, [{"n": n} for n in range(5)])
    switch.touch()
    assert busy.result(timeout=20).context["by"] == "old"
    assert [one.result(timeout=20).context["by"] for one in later] == ["blocking"] * 5
    assert len(noted("held", switch)) == 1


@pytest.fixture(scope="module")
def mixed(serve: Any) -> Runtime:
    return serve(Workflow("other").add_stage(mark("other"), id="only"))


def test_compensations_and_waits_of_a_version_that_is_gone_are_parked_and_resume(
    serve: Any, tmp_path: Path, eventually: Any
) -> None:
    def undone(version: int) -> Workflow[dict[str, Any]]:
        flow = Workflow("flow", version=version).add_stage(mark("a"), id="a", compensation=undo)
        return flow.add_signal("go").add_stage(fail)

    first = serve(undone(1), data_dir=tmp_path)
    waiting = first.submit("flow", {}, instance_id="waiting")
    undoing = first.submit("flow", {}, instance_id="undoing")
    first.pause("stageflow.compensation.flow")
    eventually(lambda: waiting.status() == undoing.status() == "waiting", "both to wait")
    undoing.signal("go")
    eventually(lambda: undoing.status() == "compensating", "the compensation to be due")
    first.stop()
    second = serve(undone(2), data_dir=tmp_path)
    second.resume("stageflow.compensation.flow")
    second.instance("waiting").signal("go")
    eventually(lambda: len(second.instances(status="parked")) == 2, "both to be parked")
    assert dead_letter(second, "waiting")[0] == "dlq.stageflow.coordinator"
    assert "compensation of stage 'a'" in dead_letter(second, "undoing")[1]
    second.stop()
    third = serve(undone(1), undone(2), data_dir=tmp_path)
    assert [str(third.instance(i).result(timeout=20).status) for i in ("waiting", "undoing")] == ["compensated"] * 2
    assert noted("undone", "undoing") == noted("undone", "waiting") == [("a",)]


def test_a_changed_definition_under_the_same_version_is_warned_of(
    serve: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    serve(old(), data_dir=tmp_path).stop()
    assert "has changed" not in capfd.readouterr().err
    serve(old().add_stage(mark("d"), id="d"), data_dir=tmp_path).stop()
    said = capfd.readouterr().err
    assert "stageflow: workflow 'flow' version 1 has changed since it last ran here" in said
    assert "version=2" in said


def test_two_workflows_of_one_version_are_refused() -> None:
    with pytest.raises(WorkflowDefinitionError, match="two workflows have the id 'flow' and version 1"):
        Runtime(old(), old())


def lasting(**options: Any) -> Workflow[dict[str, Any]]:
    return (
        Workflow("lasting", **options)
        .add_stage(mark("a"), id="a", compensation=undo)
        .add_stage(mark("b"), id="b")
        .add_signal("s")
    )


def test_what_is_cancelled_while_its_version_is_gone_is_parked_once_and_cancelled_when_it_is_back(
    serve: Any, tmp_path: Path, eventually: Any
) -> None:
    shared = "stageflow.lasting.stage1"
    first = serve(lasting(), data_dir=tmp_path)
    first.submit("lasting", {}, instance_id="at-s")
    eventually(lambda: first.instance("at-s").status() == "waiting", "it waits")
    first.pause(shared)
    first.submit("lasting", {}, instance_id="at-b")
    eventually(lambda: first.queues(shared)[0].ready, f"a message in {shared}")
    first.stop()
    second = serve(new(), data_dir=tmp_path)
    second.resume(shared)
    eventually(lambda: second.instance("at-b").status() == "parked", "its version is gone")
    for instance_id in ("at-b", "at-s"):
        assert second.instance(instance_id).cancel("enough") == "parked"
        assert second.instance(instance_id).cancel("once more") == "parked"
    for _ in range(20):
        assert second.execute("flow", {}, timeout=20).success
    for instance_id, attempts in (("at-b", 2), ("at-s", 1)):
        assert second.instance(instance_id).status() == "parked"
        (letter,) = second._session.lookup([instance_id])[instance_id]["messages"]
        assert letter["attempts"] == attempts, "it is delivered for the cancel, and not again"
        assert "is not registered" in dead_letter(second, instance_id)[1]
    second.stop()
    third = serve(new(), lasting(), data_dir=tmp_path)
    for instance_id in ("at-b", "at-s"):
        result = third.instance(instance_id).result(timeout=20)
        assert (result.status, result.error) == ("cancelled", "cancelled: enough")
        assert ("a",) in noted("undone", instance_id)
        assert third.instance(instance_id).cancel() == "cancelled"
