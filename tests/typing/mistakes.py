"""Wrong uses that mypy must report, each with the code of the error. Nothing here runs; see `test_types.py`."""

from __future__ import annotations

from dataclasses import dataclass

from stageflow_actors import (
    Breaker,
    Client,
    Compensation,
    Config,
    Instance,
    Retry,
    Stage,
    Workflow,
    WorkflowResult,
    WorkflowStatus,
)
from stageflow_actors.testing import run


@dataclass
class Order:
    total: int


orders = Workflow("orders", context=Order)

Workflow("orders", on_failure="ignore")  # error: call-overload
Workflow("orders", context=Order, retries=3)  # error: call-overload
Workflow("orders", context=Order(1))  # error: call-overload
Workflow(5)  # error: call-overload


@orders.stage
def charge(order: Order) -> str:
    return "receipt"


charge(5)  # error: arg-type
charge.compensate(print)  # error: attr-defined


@orders.stage(tiemout=30)  # error: call-overload, untyped-decorator
def ship(order: Order) -> None: ...


@charge.compensation(actors="2")  # error: call-overload, untyped-decorator
def refund(order: Order) -> None: ...


orders.add_stage(charge, timeout="30")  # error: arg-type
orders.add_stage(charge, tiemout=30)  # error: call-arg
orders.add_http_stage("pay", url="https://bank.example", tiemout=3)  # error: call-arg
orders.add_http_stage("pay", url="https://bank.example", retry=3)  # error: arg-type
orders.add_delay("later", "tomorrow")  # error: arg-type
orders.add_map("each", charge, into="parts")  # error: call-arg
orders.add_branch("where", lambda order: "here", [charge])  # error: arg-type
orders.stages.append(Stage(charge))  # error: attr-defined

Stage(charge, actors=1.5)  # error: arg-type
Compensation(refund, retry=3)  # error: arg-type
Breaker(failures="5")  # error: arg-type
Config(durability="maybe")  # error: arg-type
Retry.fixed(max_attempts=3)  # error: call-arg
Retry.fixed(max_attempts=3, delay=1, factor=2)  # error: call-arg

result = run(orders, Order(450))
result.context.totel += 1  # error: attr-defined
result.status = WorkflowStatus.completed  # error: misc
result.stages[0].attempts = 5  # error: misc
WorkflowResult("order-1", b"", None)  # error: call-arg
run(orders, 450)  # error: misc


def listen(order: Order) -> None: ...


def use(client: Client, instance: Instance[Order]) -> None:
    client.execute(orders, {"total": "much"})  # error: misc
    client.execute(orders, Order(1), tiemout=5)  # error: call-arg
    client.map(orders, [1, 2])  # error: misc
    client.submit(orders)  # error: call-arg
    client.on_event(listen)  # error: arg-type
    instance.result().context.totel += 1  # error: attr-defined
