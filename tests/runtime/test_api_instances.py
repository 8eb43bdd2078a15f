"""Starting, awaiting and finding instances."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import (
    Config,
    Instance,
    InstanceConflict,
    InstanceNotFound,
    InvalidContext,
    QueueFull,
    Runtime,
    StageContext,
    StageFlowError,
    Workflow,
    WorkflowStatus,
)
from stageflow_actors.runtime.client.completion import Completion


@dataclass
class Order:
    order_id: str
    total: float = 0.0


def ship(order: Order, ctx: StageContext) -> str:
    note("shipped", order.order_id, ctx.instance_id)
    if order.total < 0:
        raise ValueError("nothing to pay")
    return order.order_id


def wait_for_file(context: dict[str, Any], ctx: StageContext) -> None:
    """Waits until the test lets it go on."""
    note("waits", ctx.instance_id)
    while not os.path.exists(context["gate"]):
        time.sleep(0.005)


orders = Workflow("orders", context=Order).add_stage(ship)
gated = Workflow("gated").add_stage(wait_for_file).add_stage(lambda context: "through", id="after")
priorities = Workflow("priorities").add_stage(lambda context, ctx: note("ran", context["n"]), id="only")


@pytest.fixture(scope="module")
def runtime(serve: Any) -> Runtime:
    return serve(orders, gated, priorities)


def counts(runtime: Runtime, prefix: str = "") -> int:
    return sum(q.ready + q.leased + q.delayed + q.dead for q in runtime.queues(prefix))


def test_submit_gives_an_instance_that_can_be_waited_for(runtime: Runtime) -> None:
    instance = runtime.submit(orders, Order("a"))
    assert isinstance(instance, Instance)
    result = instance.result(timeout=20)
    assert (result.instance_id, result.workflow_id, result.status) == (instance.id, "orders", "completed")
    assert result.started_at <= result.stages[0].started_at <= result.finished_at <= time.time()
    assert 0 < result.duration < 20
    assert instance.done()
    assert instance.status() == WorkflowStatus.completed
    assert instance.result() == result
    assert result.raise_for_status() is None
    assert "completed" in repr(result)
    assert instance.id in repr(instance)


def test_a_workflow_may_be_given_by_its_id(runtime: Runtime) -> None:
    assert runtime.execute("orders", Order("b"), timeout=20).context == Order("b")
    assert runtime.execute("orders", {"order_id": "c"}, timeout=20).context == Order("c")
    with pytest.raises(StageFlowError, match=r"no workflow 'ordres'.*'orders'"):
        runtime.submit("ordres", Order("b"))


def test_a_workflow_of_another_program_part_must_be_registered(runtime: Runtime) -> None:
    stranger = Workflow("stranger").add_stage(lambda context: None)
    with pytest.raises(StageFlowError, match=r"'stranger'.*register"):
        runtime.submit(stranger, {})


def test_the_same_id_with_the_same_input_gives_the_live_instance_and_starts_nothing(
    runtime: Runtime, gate: Path, eventually: Any
) -> None:
    first = runtime.submit(gated, {"gate": str(gate), "n": 1}, instance_id="live")
    eventually(lambda: noted("waits", "live"), "the stage to begin")
    again = runtime.submit(gated, {"n": 1, "gate": str(gate)}, instance_id="live")
    assert again == first
    assert again.status() == "running"
    with pytest.raises(InstanceConflict, match="'live'"):
        runtime.submit(gated, {"gate": str(gate), "n": 2}, instance_id="live")
    with pytest.raises(InstanceConflict, match="'live'"):
        runtime.submit(orders, Order("x"), instance_id="live")
    gate.touch()
    assert first.result(timeout=20) == again.result(timeout=20)
    assert noted("waits", "live") == [()]


def test_the_same_id_with_the_same_input_gives_the_finished_instance_and_starts_nothing(
    runtime: Runtime, eventually: Any
) -> None:
    first = runtime.execute(orders, Order("d", 2.5), instance_id="done", timeout=20)
    # Until then the broker itself knows the id; from then on only the history does.
    eventually(lambda: not runtime._session.lookup(["done"]), "the id to have left the broker")
    assert runtime.execute(orders, Order("d", 2.5), instance_id="done", timeout=20) == first
    assert runtime.submit(orders, {"order_id": "d", "total": 2.5}, instance_id="done").result(0) == first
    with pytest.raises(InstanceConflict):
        runtime.submit(orders, Order("d", 2.6), instance_id="done")
    assert len(noted("shipped", "d")) == 1


def test_a_failed_instance_is_not_started_again_by_its_id(runtime: Runtime, eventually: Any) -> None:
    first = runtime.execute(orders, Order("e", -1), instance_id="lost", timeout=20)
    assert first.status == "failed"
    eventually(lambda: not runtime._session.lookup(["lost"]), "the id to have left the broker")
    assert runtime.execute(orders, Order("e", -1), instance_id="lost", timeout=20) == first
    assert len(noted("shipped", "e")) == 1


def test_an_id_submitted_by_many_threads_at_once_starts_one_instance(runtime: Runtime) -> None:
    barrier = threading.Barrier(8)
    results: list[Any] = []

    def go() -> None:
        barrier.wait()
        for n in range(20):
            results.append(runtime.execute(orders, Order(f"race-{n}"), instance_id=f"race-{n}", timeout=20))

    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 160
    assert all(result.success for result in results)
    assert [len(noted("shipped", f"race-{n}")) for n in range(20)] == [1] * 20


def test_execute_runs_out_of_time_and_the_instance_goes_on(runtime: Runtime, gate: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"'slow'.*goes on"):
        runtime.execute(gated, {"gate": str(gate)}, instance_id="slow", timeout=0.05)
    with pytest.raises(TimeoutError):
        runtime.instance("slow").result(timeout=timedelta(milliseconds=20))
    with pytest.raises(TimeoutError):
        runtime.instance("slow").result(timeout=0)
    assert time.monotonic() - began < 5
    gate.touch()
    assert runtime.instance("slow").result(timeout=20).success


@pytest.mark.parametrize("timeout", [-1, "5", float("nan"), True])
def test_a_timeout_that_is_none_is_refused_before_anything_starts(runtime: Runtime, timeout: Any) -> None:
    with pytest.raises((ValueError, StageFlowError), match="timeout"):
        runtime.execute(orders, Order("bad-timeout"), timeout=timeout)
    assert not noted("shipped", "bad-timeout")


def test_submit_many_starts_all(runtime: Runtime) -> None:
    instances = runtime.submit_many(orders, [Order(f"m{n}") for n in range(300)])
    assert len({instance.id for instance in instances}) == 300
    assert [instance.result(timeout=20).context.order_id for instance in instances] == [f"m{n}" for n in range(300)]
    assert runtime.submit_many(orders, []) == []


def test_submit_many_with_ids_gives_what_exists_and_starts_the_rest(runtime: Runtime) -> None:
    old = runtime.execute(orders, Order("i1"), instance_id="i1", timeout=20)
    instances = runtime.submit_many(orders, [Order(f"i{n}") for n in range(3)], instance_ids=["i0", "i1", "i2"])
    assert [i.id for i in instances] == ["i0", "i1", "i2"]
    assert instances[1].result(timeout=20) == old
    assert all(i.result(timeout=20).success for i in instances)
    assert [len(noted("shipped", f"i{n}")) for n in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("live", [True, False])
def test_submit_many_is_all_or_nothing_when_an_id_is_taken(
    runtime: Runtime, gate: Path, live: bool, eventually: Any
) -> None:
    taken = f"taken-{live}"
    blocker = runtime.submit(gated, {"gate": str(gate)}, instance_id=taken)
    if not live:
        gate.touch()
        blocker.result(timeout=20)
    ids = [f"free-{live}-{n}" for n in range(3)] + [taken]
    with pytest.raises(InstanceConflict, match=taken):
        runtime.submit_many(orders, [Order(id) for id in ids], instance_ids=ids)
    for id in ids[:3]:
        with pytest.raises(InstanceNotFound):
            runtime.instance(id)
        assert not noted("shipped", id)
    gate.touch()
    runtime.drain(timeout=20)
    assert all(
        i.result(timeout=20).success for i in runtime.submit_many(orders, map(Order, ids[:3]), instance_ids=ids[:3])
    )


def test_an_id_given_twice_in_one_call_is_one_instance_or_a_conflict(runtime: Runtime) -> None:
    twins = runtime.submit_many(orders, [Order("t"), Order("t")], instance_ids=["twin", "twin"])
    assert twins[0] == twins[1]
    assert twins[0].result(timeout=20) == twins[1].result(timeout=20)
    assert len(noted("shipped", "t")) == 1
    with pytest.raises(InstanceConflict, match="'odd'"):
        runtime.submit_many(orders, [Order("t1"), Order("t2")], instance_ids=["odd", "odd"])
    assert not noted("shipped", "t1")
    assert not noted("shipped", "t2")


def test_submit_many_names_the_wrong_argument(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match="10000"):
        runtime.submit_many(orders, [Order("x")] * 10_001)
    with pytest.raises(ValueError, match="there are 2 contexts and 1 instance_ids"):
        runtime.submit_many(orders, [Order("x")] * 2, instance_ids=["a"])
    with pytest.raises((ValueError, InvalidContext), match="instance_ids"):
        runtime.submit_many(orders, [Order("x")], instance_ids="a")


def test_as_completed_gives_each_once_as_it_ends(runtime: Runtime, gate: Path) -> None:
    slow = runtime.submit(gated, {"gate": str(gate)})
    quick = runtime.submit_many(orders, [Order(f"q{n}") for n in range(20)])
    seen = []
    for instance in runtime.as_completed([slow, *quick, quick[0]], timeout=20):
        seen.append(instance)
        if len(seen) == 20:
            gate.touch()
    assert seen[-1] == slow
    assert set(seen) == {slow, *quick}
    assert len(seen) == 21
    assert list(runtime.as_completed([])) == []


def test_as_completed_runs_out_of_time(runtime: Runtime, gate: Path) -> None:
    slow = runtime.submit(gated, {"gate": str(gate)})
    with pytest.raises(TimeoutError, match="1 instance"):
        list(runtime.as_completed([slow], timeout=timedelta(milliseconds=30)))


def test_as_completed_takes_handles_of_finished_and_foreign_instances(runtime: Runtime) -> None:
    runtime.execute(orders, Order("h"), instance_id="handle", timeout=20)
    found = runtime.instance("handle")
    fresh = Instance(Completion(runtime._session, "handle", None))
    assert list(runtime.as_completed([found], timeout=20)) == [found]
    assert list(runtime.as_completed([fresh], timeout=20)) == [found]


def test_an_instance_can_be_awaited(runtime: Runtime, gate: Path) -> None:
    open_gate = gate.touch

    async def main() -> list[Any]:
        slow = runtime.submit(gated, {"gate": str(gate)})
        many = [runtime.submit(orders, Order(f"w{n}")) for n in range(10)]
        results = list(await asyncio.gather(*many))
        open_gate()
        results.append(await slow)
        results.append(await slow)
        results.append(await runtime.instance(slow.id))
        return results

    results = asyncio.run(asyncio.wait_for(main(), 20))
    assert all(result.success for result in results)
    assert [r.context.order_id for r in results[:10]] == [f"w{n}" for n in range(10)]


def test_awaiting_can_be_given_up(runtime: Runtime, gate: Path) -> None:
    instance = runtime.submit(gated, {"gate": str(gate)})

    async def main() -> None:
        await asyncio.wait_for(instance, 0.05)

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    gate.touch()
    assert instance.result(timeout=20).success


def test_several_handles_of_one_instance_all_receive_its_end(runtime: Runtime, gate: Path) -> None:
    first = runtime.submit(gated, {"gate": str(gate)}, instance_id="shared")
    handles = [first, runtime.instance("shared"), runtime.submit(gated, {"gate": str(gate)}, instance_id="shared")]
    results: list[Any] = []
    threads = [threading.Thread(target=lambda h=h: results.append(h.result(timeout=20))) for h in handles]
    for thread in threads:
        thread.start()
    gate.touch()
    for thread in threads:
        thread.join(20)
    assert len(results) == 3
    assert results[0] == results[1] == results[2]


def test_an_instance_is_found_again_live_and_finished(runtime: Runtime, gate: Path, eventually: Any) -> None:
    runtime.submit(gated, {"gate": str(gate)}, instance_id="found")
    eventually(lambda: noted("waits", "found"), "the stage to begin")
    assert runtime.instance("found").status() == "running"
    queued = runtime.submit(gated, {"gate": str(gate)}, instance_id="behind")
    eventually(lambda: queued.status() == "pending", "what was handed out early to be called back")
    gate.touch()
    result = runtime.instance("found").result(timeout=20)
    assert result.success
    assert result.stages[-1].data == "through"
    assert runtime.instance("found").status() == "completed"
    with pytest.raises(InstanceNotFound, match="'nowhere'"):
        runtime.instance("nowhere")


def test_instances_are_listed_by_status_and_workflow(runtime: Runtime, gate: Path, eventually: Any) -> None:
    runtime.execute(orders, Order("l", -1), instance_id="list-failed", timeout=20)
    runtime.execute(orders, Order("l", 1), instance_id="list-done", timeout=20)
    runtime.submit(gated, {"gate": str(gate)}, instance_id="list-live")
    eventually(lambda: noted("waits", "list-live"), "the stage to begin")
    assert "list-failed" in [i.id for i in runtime.instances("failed", limit=1000)]
    assert "list-done" not in [i.id for i in runtime.instances("failed", limit=1000)]
    assert [i.id for i in runtime.instances(WorkflowStatus.running)] == ["list-live"]
    assert {i.status() for i in runtime.instances("completed", orders, limit=1000)} == {WorkflowStatus.completed}
    assert next(iter(runtime.instances(workflow="gated"))).id == "list-live", "live ones come first"
    assert "list-live" not in [i.id for i in runtime.instances(workflow=orders, limit=1000)]
    assert len(runtime.instances(limit=3)) == 3
    assert len({i.id for i in runtime.instances(limit=1000)}) == len(runtime.instances(limit=1000))
    with pytest.raises(ValueError, match="finished"):
        runtime.instances("finished")


def test_what_has_ended_is_listed_at_once(runtime: Runtime) -> None:
    for n in range(10):
        runtime.execute(orders, Order("at-once"), instance_id=f"at-once-{n}", timeout=20)
        assert f"at-once-{n}" in [i.id for i in runtime.instances("completed", limit=10_000)]
        assert runtime.instance(f"at-once-{n}").status() == "completed"


def test_queues_show_what_waits_and_what_is_in_work(runtime: Runtime, gate: Path, eventually: Any) -> None:
    eventually(lambda: counts(runtime) == 0, "empty queues")
    instances = runtime.submit_many(gated, [{"gate": str(gate)}] * 5)

    def figures() -> tuple[int, ...]:
        [queue] = runtime.queues("stageflow.gated.stage0")
        return queue.ready + queue.leased, queue.busy, queue.actors, queue.delayed, queue.dead

    eventually(lambda: figures() == (5, 1, 1, 0, 0), "five in one queue, one of them in work")
    [queue] = runtime.queues("stageflow.gated.stage0")
    assert queue.state == "open"
    assert {q.name for q in runtime.queues("stageflow.gated")} == {"stageflow.gated.stage0", "stageflow.gated.stage1"}
    gate.touch()
    assert all(i.result(timeout=20).success for i in instances)
    eventually(lambda: counts(runtime) == 0, "empty queues")


def test_a_completed_message_is_settled_while_its_neighbour_in_the_same_worker_takes_long(
    runtime: Runtime, gate: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.touch()
    assert all(r.success for r in runtime.map(gated, [{"gate": str(there)}] * 500)), "now the worker holds many at once"
    quick, slow, behind = runtime.submit_many(gated, [{"gate": str(g)} for g in (there, gate, there)])
    assert quick.result(timeout=10).success
    assert not slow.done()
    gate.touch()
    assert slow.result(timeout=20).success
    assert behind.result(timeout=20).success


def test_prefixes_name_the_queues(serve: Any) -> None:
    runtime = serve(
        orders, config=Config(stage_queue_prefix="shop.", compensation_queue_prefix="undo.shop.", durability="memory")
    )
    assert runtime.execute(orders, Order("prefixed"), timeout=20).success
    assert [q.name for q in runtime.queues("shop.")] == ["shop.orders.stage0"]


def test_a_paused_queue_delivers_nothing_until_it_is_resumed(runtime: Runtime) -> None:
    name = "stageflow.priorities.stage0"
    runtime.pause(name)
    instances = [runtime.submit(priorities, {"n": n}, priority=n % 3) for n in range(9)]
    [queue] = runtime.queues(name)
    assert (queue.state, queue.ready, queue.leased) == ("paused", 9, 0)
    assert {str(i.status()) for i in instances} == {"pending"}
    runtime.resume(name)
    for instance in instances:
        instance.result(timeout=20)
    assert [int(n) for (n,) in noted("ran")] == [2, 5, 8, 1, 4, 7, 0, 3, 6], "by priority, then first in, first out"
    with pytest.raises(StageFlowError, match="no queue"):
        runtime.pause("stageflow.prioritees.stage0")


@pytest.mark.parametrize("priority", ["high", 1.5, True, 100_000, None])
def test_a_priority_is_a_whole_number(runtime: Runtime, priority: Any) -> None:
    with pytest.raises(ValueError, match="priority"):
        runtime.submit(priorities, {"n": -1}, priority=priority)


def test_a_full_first_queue_refuses_new_starts_and_takes_them_again_later(serve: Any, gate: Path) -> None:
    runtime = serve(gated, config=Config(max_queue_length=5))
    with pytest.raises(QueueFull, match="gated"):
        for _ in range(20):
            runtime.submit(gated, {"gate": str(gate)})
    with pytest.raises(QueueFull):
        runtime.submit_many(gated, [{"gate": str(gate)}] * 3)
    gate.touch()
    runtime.drain(timeout=20)
    assert runtime.execute(gated, {"gate": str(gate)}, timeout=20).success
    assert sum(1 for r in runtime.map(gated, [{"gate": str(gate)}] * 30) if r.success) == 30


def test_stats_cover_broker_and_history(runtime: Runtime) -> None:
    runtime.execute(orders, Order("s"), timeout=20)
    stats = runtime.stats()
    assert stats["finished"]["completed"] >= 1
    assert stats["messages"] >= 0
