"""Stages as users write them: all kinds of handlers, options, services."""

from __future__ import annotations

import asyncio
import os
import types
from dataclasses import dataclass
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import (
    Compensation,
    Retry,
    Runtime,
    Stage,
    StageContext,
    StageStatus,
    Workflow,
    WorkflowDefinitionError,
)


@dataclass
class Order:
    order_id: str
    total: float = 0.0
    reserved: bool = False
    payment: str | None = None


orders = Workflow("orders", context=Order)


@orders.stage
def reserve_inventory(order: Order) -> None:
    order.reserved = True


@reserve_inventory.compensation
def release_inventory(order: Order) -> None:
    order.reserved = False


@orders.stage(id="pay", timeout=20, actors=2)
def process_payment(order: Order, ctx: StageContext, *, payments: Payments) -> dict[str, str]:
    order.payment = payments.charge(order.total, ctx.idempotency_key)
    return {"receipt": order.payment}


class Payments:
    """A service: made once per worker process."""

    def __init__(self) -> None:
        note("payments-made", os.getpid())

    def charge(self, total: float, key: str) -> str:
        note("charged", key, os.getpid())
        return f"R-{total:g}"


class Doubling:
    """An object handler, with what it was given when it was made."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def execute(self, context: dict[str, Any], ctx: StageContext) -> None:
        context["n"] *= self.factor

    def compensate(self, context: dict[str, Any]) -> None:
        context["n"] //= self.factor


class CountingStage:
    """A class handler: constructed in the worker."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    def execute(self, context: dict[str, Any]) -> dict[str, Any]:
        return {"made_here": self.pid == os.getpid()}

    def compensate(self, context: dict[str, Any]) -> None:
        context["uncounted"] = True


class Refusing:
    def execute(self, context: dict[str, Any]) -> None:
        if context.get("refuse"):
            raise ValueError("refused")


def local_workflow() -> Workflow[dict[str, Any]]:
    """Handlers without an importable name."""
    step = 10

    def add(context: dict[str, Any]) -> None:
        context["n"] += step

    return (
        Workflow("local")
        .add_stage(add)
        .add_stage(lambda context: context.update(n=context["n"] + step))
        .add_stage(lambda context: {"n": context["n"]}, id="last")
    )


async def fetch(context: dict[str, Any]) -> str:
    await asyncio.sleep(0)
    context["loop"] = id(asyncio.get_running_loop())
    return "fetched"


async def unfetch(context: dict[str, Any]) -> None:
    await asyncio.sleep(0)
    context["unfetched"] = True


def environment(context: dict[str, Any]) -> dict[str, Any]:
    return {name: os.environ.get(name) for name in ("STAGE_ONLY", "INHERITED")} | {"cwd": os.getcwd()}


def plain_environment(context: dict[str, Any]) -> str | None:
    return os.environ.get("STAGE_ONLY")


def keyword_ctx(context: dict[str, Any], *, ctx: StageContext, flag: bool = True) -> list[Any]:
    return [ctx.stage_id, flag]


objects = Workflow("objects").add_stage(Doubling(3)).add_stage(CountingStage).add_stage(Stage(Refusing(), id="gate"))
asynchronous = Workflow("asynchronous").add_stage(fetch, compensation=unfetch).add_stage(Refusing())
settings = (
    Workflow("settings")
    .add_stage(environment, env={"STAGE_ONLY": "yes"})
    .add_stage(plain_environment)
    .add_stage(keyword_ctx)
)


@pytest.fixture(scope="module")
def runtime(serve: Any) -> Runtime:
    os.environ["INHERITED"] = "too"
    try:
        return serve(orders, objects, asynchronous, settings, local_workflow(), services={"payments": Payments})
    finally:
        del os.environ["INHERITED"]


def test_a_decorated_function_stays_callable() -> None:
    order = Order("A")
    reserve_inventory(order)
    assert order.reserved
    release_inventory(order)
    assert not order.reserved


def test_a_saga_of_decorated_functions_completes_with_results_by_stage(runtime: Runtime) -> None:
    result = runtime.execute(orders, Order("A", 99.5), timeout=20)
    assert result.success
    assert result.context == Order("A", 99.5, True, "R-99.5")
    assert [(s.stage_id, s.status, s.data) for s in result.stages] == [
        ("reserve-inventory", StageStatus.completed, None),
        ("pay", StageStatus.completed, {"receipt": "R-99.5"}),
    ]


def test_a_service_is_made_once_in_each_worker_that_needs_it(runtime: Runtime, eventually: Any) -> None:
    for result in runtime.map(orders, [Order(str(n)) for n in range(50)]):
        result.raise_for_status()
    eventually(lambda: len(noted("payments-made")) == 2, "both actors to have made theirs")
    makers = [pid for (pid,) in noted("payments-made")]
    users = {pid for _, pid in noted("charged")}
    assert len(makers) == len(set(makers)) == 2, "two actors need the service, and the stage before does not"
    assert users <= set(makers)


def test_objects_and_classes_are_handlers_with_their_own_compensations(runtime: Runtime) -> None:
    result = runtime.execute(objects, {"n": 5}, timeout=20)
    assert result.context == {"n": 15}
    assert [s.stage_id for s in result.stages] == ["doubling", "counting-stage", "gate"]
    assert result.stages[1].data == {"made_here": True}

    undone = runtime.execute(objects, {"n": 5, "refuse": True}, timeout=20)
    assert undone.status == "compensated"
    assert undone.context == {"n": 5, "refuse": True, "uncounted": True}
    assert [c.stage_id for c in undone.compensations] == ["counting-stage", "doubling"]


def test_lambdas_and_local_functions_travel_with_what_they_close_over(runtime: Runtime) -> None:
    result = runtime.execute("local", {"n": 1}, timeout=20)
    assert result.success
    assert result.context == {"n": 21}
    assert [s.stage_id for s in result.stages] == ["add", "stage-2", "last"]
    assert result.stages[-1].data == {"n": 21}


def test_async_handlers_and_compensations_run_on_one_loop(runtime: Runtime) -> None:
    first, second = (runtime.execute(asynchronous, {}, timeout=20) for _ in range(2))
    assert first.stages[0].data == "fetched"
    assert first.context["loop"] == second.context["loop"]
    undone = runtime.execute(asynchronous, {"refuse": True}, timeout=20)
    assert undone.status == "compensated"
    assert undone.context["unfetched"] is True


def test_workers_inherit_environment_and_directory_and_a_stage_may_add_to_it(runtime: Runtime) -> None:
    result = runtime.execute(settings, {}, timeout=20)
    assert result.stages[0].data == {"STAGE_ONLY": "yes", "INHERITED": "too", "cwd": os.getcwd()}
    assert result.stages[1].data is None


def test_ctx_may_be_taken_by_keyword_beside_defaults(runtime: Runtime) -> None:
    assert runtime.execute(settings, {}, timeout=20).stages[2].data == ["keyword-ctx", True]


def test_each_actor_of_a_stage_is_a_process_that_consumes_its_queue(runtime: Runtime, eventually: Any) -> None:
    def actors() -> dict[str, int]:
        return {queue.name: queue.actors for queue in runtime.queues("stageflow.orders.")}

    expected = {"stageflow.orders.stage0": 1, "stageflow.orders.stage1": 2}
    assert eventually(lambda: actors() == expected, "the number of actors")


def test_a_workflow_registered_late_runs_beside_the_others(runtime: Runtime) -> None:
    late = Workflow("late").add_stage(lambda context: "late", id="only")
    runtime.register(late)
    assert runtime.execute(late, {}, timeout=20).stages[0].data == "late"


def never_runs(context: Any) -> None:
    note("never")


@pytest.mark.parametrize(
    ("workflow", "services", "words"),
    [
        (lambda: Workflow("empty"), {}, ["'empty'", "no stages"]),
        (lambda: Workflow("w").add_stage(never_runs, after=["gone"]), {}, ["'never-runs'", "'gone'"]),
        (lambda: Workflow("w").add_stage(lambda context, *, mailer: None), {}, ["'stage-1'", "'mailer'"]),
        (
            lambda: Workflow("w").add_stage(never_runs, compensation=lambda context, *, undoer: None),
            {"mailer": dict},
            ["'never-runs'", "'undoer'"],
        ),
    ],
)
def test_what_only_the_whole_can_show_is_refused_by_start_before_any_process(
    workflow: Any, services: Any, words: list[str], tmp_path: Any
) -> None:
    runtime = Runtime(workflow(), data_dir=tmp_path / "data", services=services)
    with pytest.raises(WorkflowDefinitionError) as refused:
        runtime.start()
    assert all(word in str(refused.value) for word in words)
    assert not (tmp_path / "data").exists()
    runtime.stop()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Workflow("w").add_stage(never_runs).add_stage(never_runs), ["'never-runs'", "already"]),
        (lambda: Stage(never_runs, id=""), ["empty"]),
        (lambda: Stage(never_runs, id="a b"), ["'a b'", "malformed"]),
        (lambda: Workflow("a/b"), ["'a/b'", "malformed"]),
        (lambda: Stage(never_runs, actors=0), ["actors", "never-runs"]),
        (lambda: Stage(never_runs, timeout=-1), ["timeout", "never-runs"]),
        (lambda: Stage(lambda: None), ["no context"]),
        (lambda: Stage(lambda ctx: None), ["ctx"]),
        (lambda: Compensation(lambda: None), ["no context"]),
        (lambda: Retry.fixed(0, 1), ["max_attempts"]),
        (lambda: Workflow("w", context=list), ["list"]),  # type: ignore[call-overload]
        (lambda: Runtime("orders"), ["'orders'"]),  # type: ignore[arg-type]
        (lambda: Runtime(Workflow("w"), services={"a": lambda ctx: 1}), ["'a'", "ctx"]),
        (lambda: Runtime(Workflow("w"), services={1: dict}), ["string", "1"]),  # type: ignore[dict-item]
        (lambda: Runtime(Workflow("w"), initializer=5), ["initializer", "5"]),  # type: ignore[arg-type]
    ],
)
def test_definition_mistakes_are_refused_where_they_are_made(make: Any, words: list[str]) -> None:
    with pytest.raises(WorkflowDefinitionError) as refused:
        make()
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_a_handler_that_cannot_travel_is_refused_with_advice(tmp_path: Any) -> None:
    lock = __import__("threading").Lock()
    runtime = Runtime(Workflow("w").add_stage(lambda context: lock.locked()), data_dir=tmp_path / "data")
    with pytest.raises(WorkflowDefinitionError, match="services"):
        runtime.start()


def test_functions_of_a_module_that_cannot_be_imported_by_name_travel_whole(serve: Any) -> None:
    module = types.ModuleType("made_up_on_the_spot")
    source = "def helper(n):\n    return n + 1\n\ndef work(context):\n    return helper(context['n'])\n"
    exec(compile(source, "<made up>", "exec"), module.__dict__)
    import sys

    sys.modules[module.__name__] = module
    try:
        runtime = serve(Workflow("made-up").add_stage(module.work))
        assert runtime.execute("made-up", {"n": 1}, timeout=20).stages[0].data == 2
    finally:
        del sys.modules[module.__name__]
