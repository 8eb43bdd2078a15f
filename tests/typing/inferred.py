"""What mypy infers for a user's program. Nothing here runs: `test_types.py` checks each `assert_type`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, assert_type

from stageflow_actors import (
    Client,
    Compensation,
    Instance,
    QueueInfo,
    Replace,
    Retry,
    RetryPolicy,
    Runtime,
    Stage,
    StageContext,
    StageResult,
    TimelineEntry,
    Workflow,
    WorkflowFailed,
    WorkflowResult,
    WorkflowStatus,
)
from stageflow_actors.events import Event, StageCompleted, WorkflowCompleted
from stageflow_actors.testing import run


@dataclass
class Order:
    total: int
    paid: bool = False


@dataclass
class Parcel:
    weight: float


# A workflow is generic in its context; without `context` it is a dict.

orders = Workflow("orders", context=Order, timeout=timedelta(hours=1), retry=Retry.fixed(max_attempts=3, delay=1))
assert_type(orders, Workflow[Order])
parcels = Workflow("parcels", context=Parcel, on_failure="park")
assert_type(parcels, Workflow[Parcel])
plain = Workflow("plain")
assert_type(plain, Workflow[dict[str, Any]])


# The decorators leave a function as it is: its parameters and its result.


@orders.stage
def charge(order: Order) -> str:
    return "receipt"


@orders.stage(timeout=30, actors=4, after=["charge"])
async def ship(order: Order, ctx: StageContext) -> None:
    ctx.logger.info("shipping %s", ctx.instance_id)


@charge.compensation
def refund(order: Order) -> None: ...


@ship.compensation(timeout=timedelta(seconds=5), retry=Retry.linear(max_attempts=2, initial=1, maximum=5))
def unship(order: Order, ctx: StageContext) -> bool:
    return True


assert_type(charge(Order(1)), str)
assert_type(refund(Order(1)), None)
assert_type(unship(Order(1), StageContext.__new__(StageContext)), bool)


async def call_the_async_stage(ctx: StageContext) -> None:
    assert_type(await ship(Order(1), ctx), None)


# The methods that append a step return the workflow.

assert_type(orders.add_stage(charge, id="again", actors=2), Workflow[Order])
assert_type(orders.add_stage(Stage(charge, id="thrice")), Workflow[Order])
assert_type(orders.add_parallel("both", [charge, Stage(ship, id="sent")]), Workflow[Order])
assert_type(orders.add_conditional(charge, when=lambda order: order.total > 5), Workflow[Order])
assert_type(orders.add_branch("where", lambda order: "here", {"here": [charge]}, default="here"), Workflow[Order])
assert_type(orders.add_map("each", charge, over=lambda order: [order], into="parts"), Workflow[Order])
assert_type(orders.add_delay("later", timedelta(days=1)).add_signal("approval", timeout=5), Workflow[Order])
assert_type(orders.add_stage(charge, compensation=Compensation(refund, timeout=None)), Workflow[Order])
assert_type(orders.add_http_stage("pay", url="https://bank.example", headers={"A": "b"}, actors=2), Workflow[Order])
assert_type(orders.stages, tuple[Stage, ...])
assert_type(Replace(Order(2)).value, Any)


# A policy of one's own.


class OnceMore:
    def next_delay(self, attempt: int, error: Exception, /) -> float | None:
        return 0.5 if attempt == 1 else None


policy: RetryPolicy = OnceMore()
assert_type(Workflow("once", retry=policy), Workflow[dict[str, Any]])
assert_type(Retry.exponential(max_attempts=3, initial=1, maximum=9), Retry)


# Results and instances have the type of the context.

result = run(orders, Order(450))
assert_type(result, WorkflowResult[Order])
assert_type(result.context, Order)
assert_type(result.stages, list[StageResult])
assert_type(result.status, WorkflowStatus)
assert_type(run(orders, {"total": 450}).context, Order)
assert_type(run(plain, {"total": 450}).context, dict[str, Any])


def use_a_runtime() -> None:
    with Runtime(orders, parcels, data_dir="data", services={"bank": dict}) as runtime:
        assert_type(runtime, Runtime)
        assert_type(runtime.execute(orders, Order(1), timeout=30), WorkflowResult[Order])
        assert_type(runtime.submit(parcels, Parcel(0.5), instance_id="p-1"), Instance[Parcel])
        assert_type(runtime.submit_many(orders, [Order(1), Order(2)]), list[Instance[Order]])
        assert_type(runtime.map(orders, (Order(n) for n in range(9)), key="total"), Iterator[WorkflowResult[Order]])
        for done in runtime.map_unordered(orders, [Order(1)], key=lambda order: order.total):
            assert_type(done.context.paid, bool)
        for instance in runtime.as_completed(runtime.submit_many(orders, [Order(1)]), timeout=5):
            assert_type(instance.result(), WorkflowResult[Order])


def use_a_client() -> None:
    client = Runtime.connect("data")
    assert_type(client, Client)
    assert_type(client.instance("order-1"), Instance[Any])
    assert_type(client.instances(status="parked", limit=5), list[Instance[Any]])
    assert_type(client.queues(), list[QueueInfo])
    instance = client.submit(orders, Order(1))
    assert_type(instance.history(), list[TimelineEntry])
    assert_type(instance.status(), WorkflowStatus)
    assert_type(instance.restart(), Instance[Order])


async def wait_for_an_instance(instance: Instance[Order]) -> None:
    assert_type(await instance, WorkflowResult[Order])


def listen(client: Client) -> None:
    def on_event(event: Event) -> None:
        if isinstance(event, StageCompleted):
            assert_type(event.stage_id, str)
        elif isinstance(event, WorkflowCompleted):
            assert_type(event.result, WorkflowResult[Any])

    assert_type(client.on_event(on_event), Callable[[], None])


def fail() -> None:
    try:
        result.raise_for_status()
    except WorkflowFailed as error:
        assert_type(error.failed_stage, str | None)
