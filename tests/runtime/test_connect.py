"""`Runtime.connect`: the same calls from another process, through the data directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import (
    BrokerUnavailable,
    Client,
    Config,
    InstanceConflict,
    InstanceNotFound,
    InvalidContext,
    PayloadTooLarge,
    Runtime,
    StageFlowError,
    Workflow,
)


@dataclass
class Order:
    order_id: str
    total: float = 1.0
    paid: bool = False

    def validate(self) -> None:
        if self.total < 0:
            raise ValueError("total is negative")


def pay(order: Order) -> dict[str, str]:
    order.paid = True
    return {"receipt": order.order_id}


def ship(order: Order) -> None:
    note("shipped", order.order_id)


def count(context: dict[str, Any]) -> int:
    context["pid"] = os.getpid()
    return 1


orders = Workflow("orders", context=Order).add_stage(pay).add_stage(ship)
counts = Workflow("counts").add_stage(count)
waits = (
    Workflow("waits").add_signal("approval", name="go").add_delay("pause", 0).add_map("each", count, over=lambda c: [])
)
late = Workflow("late").add_stage(count)


@pytest.fixture(scope="module")
def runtime(serve: Any) -> Runtime:
    return serve(orders, counts, waits, config=Config(stage_queue_prefix="shop.", max_message_bytes=100_000))


@pytest.fixture
def client(runtime: Runtime) -> Iterator[Client]:
    with Runtime.connect(runtime.data_dir) as client:
        yield client


def test_a_client_runs_a_workflow_given_as_object_in_its_own_type(client: Client) -> None:
    result = client.execute(orders, Order("A-1", 5.0), timeout=20)
    assert result.context == Order("A-1", 5.0, True)
    assert [stage.data for stage in result.stages] == [{"receipt": "A-1"}, None]
    with pytest.raises(InvalidContext, match="total is negative"):
        client.submit(orders, Order("A-2", -1.0))


def test_a_workflow_given_by_id_takes_dicts_that_fit_its_context(client: Client) -> None:
    result = client.execute("orders", {"order_id": "B-1", "total": 1.0}, timeout=20)
    assert result.context == {"order_id": "B-1", "total": 1.0, "paid": True}
    for context, said in (
        ({"total": 3.0}, "order_id is missing: Order requires it"),
        ({"order_id": "B-2", "total": "3"}, "context.total must be float, not str"),
        ({"order_id": "B-2", "totals": 3}, "Order has no such field"),
    ):
        with pytest.raises(InvalidContext, match=said):
            client.submit("orders", context)
    assert noted("shipped", "B-1") == [()]


def test_what_is_not_served_is_refused_at_the_door_with_what_is(client: Client) -> None:
    with pytest.raises(StageFlowError, match=r"workflow 'nothing' is not served in .*orders \(version 1\)"):
        client.submit("nothing", {})
    with pytest.raises(StageFlowError, match="'orders' version 7 is not served"):
        client.submit(Workflow("orders", version=7).add_stage(count), {})
    with pytest.raises(PayloadTooLarge, match="100000"):
        client.submit("counts", {"blob": "x" * 100_000})


def test_both_sides_see_the_same_instances(runtime: Runtime, client: Client) -> None:
    here = client.submit(orders, Order("C-1"), instance_id="shared")
    assert runtime.instance("shared").result(timeout=20).context == here.result(timeout=20).context
    assert client.submit(orders, Order("C-1"), instance_id="shared").id == "shared"
    with pytest.raises(InstanceConflict):
        client.submit(orders, Order("C-2"), instance_id="shared")
    assert client.instance("shared").result(timeout=20).success
    assert "shared" in [i.id for i in client.instances(status="completed", workflow="orders")]
    with pytest.raises(InstanceNotFound):
        client.instance("unheard-of")


def test_map_and_submit_many_work_from_outside(client: Client, eventually: Any) -> None:
    results = list(client.map("counts", [{"n": n} for n in range(300)]))
    assert [r.context["n"] for r in results] == list(range(300))
    many = client.submit_many(counts, [{"n": n} for n in range(5)])
    client.drain(timeout=20)
    assert all(instance.done() for instance in many)
    eventually(lambda: client.stats()["finished"]["completed"] >= 305, "all in the history")


def test_queues_are_paused_and_resumed_from_outside(runtime: Runtime, client: Client, eventually: Any) -> None:
    client.pause("shop.counts.stage0")
    held = runtime.submit(counts, {})
    [queue] = client.queues("shop.counts.stage0")
    assert (queue.state, queue.ready) == ("paused", 1)
    assert str(held.status()) == "pending"
    client.resume("shop.counts.stage0")
    assert held.result(timeout=20).success


def test_signals_reach_an_instance_from_outside(runtime: Runtime, client: Client) -> None:
    instance = runtime.submit(waits, {})
    client.instance(instance.id).signal("go", {"by": "me"})
    assert instance.result(timeout=20).stages[0].data == {"by": "me"}


def test_instances_are_cancelled_and_run_again_from_outside(runtime: Runtime, client: Client) -> None:
    instance = runtime.submit(waits, {}, instance_id="cancelled")
    assert client.instance("cancelled").cancel("by me") == "cancelled"
    assert str(instance.result(timeout=20).status) == "cancelled"
    again = client.instance("cancelled").restart()
    again.signal("go")
    assert again.result(timeout=20).success


def test_stages_are_scaled_from_outside(runtime: Runtime, client: Client, eventually: Any) -> None:
    def actors() -> int:
        return client.queues("shop.counts.stage0")[0].actors

    client.scale("counts", "count", 3)
    eventually(lambda: actors() == 3, "three actors")
    os.kill(runtime.node_pid, signal.SIGKILL)
    assert client.execute("counts", {}, timeout=20).success, "a client outlives the node it is connected to"
    eventually(lambda: actors() == 3, "three actors of the next node")
    client.scale(counts, "count", 1)
    eventually(lambda: actors() == 1, "one actor")
    client.scale(waits, "each", 2)
    eventually(lambda: client.queues("shop.waits.stage2.each")[0].actors == 2, "two actors for the items of a map")
    with pytest.raises(StageFlowError, match="has no stage 'pay': its stages with workers are count"):
        client.scale("counts", "pay", 2)
    with pytest.raises(StageFlowError, match="has no workers at 'pause'"):
        client.scale("waits", "pause", 2)
    with pytest.raises(ValueError, match="whole number"):
        client.scale("counts", "count", -1)


def test_what_is_registered_later_is_served_at_once(runtime: Runtime, client: Client) -> None:
    with pytest.raises(StageFlowError, match="'late' is not served"):
        client.submit("late", {})
    runtime.register(late)
    assert client.execute("late", {}, timeout=20).success


def test_the_environment_of_workers_is_not_sent_to_clients(serve: Any) -> None:
    secret = Workflow("secret").add_stage(count, env={"TOKEN": "do-not-tell"})
    runtime = serve(secret)
    assert "do-not-tell" not in runtime._session.ask(lambda admin: admin.get_fact("served"))


def test_an_unknown_or_idle_directory_has_no_cluster(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(
            BrokerUnavailable, match=r"no cluster runs on .*`stageflow up MODULE:RUNTIME --data "
        ) as error:
            Runtime.connect(path)
        assert str(path) in str(error.value)


def test_a_client_is_notified_when_its_cluster_stops_and_finds_the_next_one(serve: Any, tmp_path: Path) -> None:
    first = serve(counts, data_dir=tmp_path)
    with Runtime.connect(tmp_path) as client:
        assert client.execute("counts", {}, timeout=20).success
        first.stop()
        client._session._checked_at = 0.0
        with pytest.raises(BrokerUnavailable, match="no cluster runs on"):
            client.submit("counts", {})
        serve(orders, late, data_dir=tmp_path, config=Config(stage_queue_prefix="other."))
        client._session._checked_at = 0.0
        assert client.execute("late", {}, timeout=20).success
        with pytest.raises(StageFlowError, match="'counts' is not served"):
            client.submit("counts", {})


def test_a_waiting_caller_is_notified_when_the_cluster_is_gone(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stageflow_actors.runtime.client.remote_client.GRACE_SECONDS", 0.1)
    runtime = serve(waits, data_dir=tmp_path)
    with Runtime.connect(tmp_path) as client:
        waiting = client.submit("waits", {})
        runtime.stop()
        with pytest.raises(BrokerUnavailable, match="no cluster runs on"):
            waiting.result()


def test_a_closed_client_raises_an_error_that_names_it(runtime: Runtime) -> None:
    client = Runtime.connect(runtime.data_dir)
    client.close()
    client.close()
    with pytest.raises(BrokerUnavailable):
        client.submit("counts", {})


PROGRAM = """
import sys
from stageflow_actors import Runtime
with Runtime.connect(sys.argv[1]) as client:
    instances = [client.submit("counts", {"n": n}) for n in range(3)]
    print([instance.result(timeout=20).context["n"] for instance in instances])
    print(client.execute("orders", {"order_id": "Z"}, timeout=20).status)
"""


def test_another_program_needs_nothing_but_the_directory(runtime: Runtime) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(runtime.data_dir)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1, 2]\ncompleted\n", "")
