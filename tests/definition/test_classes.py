"""Handler classes, compensation classes and workflow classes: their attributes, constructors and methods."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest

from stageflow_actors import Breaker, Compensation, Retry, Runtime, Stage, Workflow, WorkflowDefinitionError
from stageflow_actors.testing import run


class Charge:
    id = "charge-card"
    timeout = 30
    retry = Retry.fixed(3, 0)
    actors = 4
    concurrency = 2
    required = False
    after = ("reserve",)
    ttl = 60
    env = {"OMP_NUM_THREADS": "1"}
    breaker = Breaker(failures=3, reset=1)
    max_memory = 500_000_000
    max_tasks = 100
    currency = "EUR"
    _retries = 3
    MAX_RETRIES = 5

    def execute(self, order: Any) -> str:
        return self.currency


OPTIONS = (
    "id", "timeout", "retry", "actors", "concurrency", "required", "after", "ttl", "env", "breaker", "max_memory",
    "max_tasks",
)  # fmt: skip


@pytest.mark.parametrize("handler", [Charge, Charge()], ids=["class", "object"])
def test_plain_attributes_named_like_options_are_the_options_of_the_stage(handler: Any) -> None:
    stage = Stage(handler)
    assert {name: getattr(stage, name) for name in OPTIONS} == {name: getattr(Charge, name) for name in OPTIONS}


def test_an_option_that_is_given_wins_over_the_attribute_also_where_it_equals_the_default() -> None:
    stage = Stage(Charge, id="pay", timeout=None, actors=1, required=True, after=(), retry=None)
    assert (stage.id, stage.timeout, stage.actors, stage.required, stage.after, stage.retry) == (
        "pay", None, 1, True, (), None,
    )  # fmt: skip
    workflow = Workflow("flow").add_stage(Charge, actors=2, after=())
    assert (workflow.stages[0].actors, workflow.stages[0].timeout) == (2, 30)


@dataclass
class Slow:
    timeout: float = 5

    def execute(self, order: Any) -> None: ...


class Slotted:
    __slots__ = ("timeout",)

    def __init__(self) -> None:
        self.timeout = 7

    def execute(self, order: Any) -> None: ...


def test_attributes_of_the_object_and_inherited_ones_count() -> None:
    class Faster(Charge):
        timeout = 3
        id = None

    assert (Stage(Faster).timeout, Stage(Faster).actors, Stage(Faster).id) == (3, 4, "faster")
    assert (Stage(Slow).timeout, Stage(Slow(9)).timeout, Stage(Slotted()).timeout) == (5, 9, 7)
    assert Stage(Slow).spec.services == ()


class Methods:
    def execute(self, order: Any) -> None: ...

    def retry(self) -> None: ...

    @property
    def timeout(self) -> int:
        raise AssertionError("a property is not read")

    @classmethod
    def actors(cls) -> int:
        return 7

    @functools.cached_property
    def ttl(self) -> int:
        raise AssertionError("a property is not read")

    @staticmethod
    def required() -> bool:
        return False


def pay(order: Any) -> None: ...


pay.timeout = 30  # type: ignore[attr-defined]


class Callme:
    timeout = 30

    def __call__(self, order: Any) -> None: ...


@pytest.mark.parametrize("handler", [Methods, Methods(), pay, Callme(), functools.partial(pay), Charge().execute])
def test_methods_properties_functions_and_other_callables_declare_no_options(handler: Any) -> None:
    stage = Stage(handler)
    assert (stage.timeout, stage.retry, stage.actors, stage.ttl, stage.required) == (None, None, 1, None, True)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("timeout", "30", "the timeout of stage 'bad' must be a number of seconds"),
        ("retry", 3, "the retry of stage 'bad' must be a Retry"),
        ("actors", 2.5, "actors of stage 'bad' must be an integer"),
        ("required", "no", "required of stage 'bad' must be True or False"),
        ("id", 42, "must be a string, not 42"),
        ("max_memory", 500, "max_memory of stage 'bad' is a number of bytes"),
        ("after", "reserve", "after of stage 'bad' takes several stage ids"),
        ("compensation", "refund", "the compensation of stage 'bad' must be a function"),
    ],
)
def test_an_attribute_of_a_wrong_type_is_a_definition_error_that_names_the_class(
    name: str, value: Any, said: str
) -> None:
    bad = type("Bad", (), {name: value, "execute": lambda self, order: None})
    for handler in (bad, bad()):
        with pytest.raises(WorkflowDefinitionError, match=said) as caught:
            Workflow("flow").add_stage(handler)
        assert f"it is the attribute '{name}' of Bad" in str(caught.value)


def test_a_method_that_would_never_undo_the_stage_is_refused() -> None:
    class Pay:
        def execute(self, order: Any) -> None: ...

        def compensation(self, order: Any) -> None: ...

    for handler in (Pay, Pay()):
        with pytest.raises(WorkflowDefinitionError, match=r"Pay has a method 'compensation'.*is compensate\(context\)"):
            Stage(handler)
    assert Stage(Pay, compensation=Undo).compensation is not None


def test_the_error_names_the_attribute_that_is_wrong_and_not_another_one() -> None:
    bad = type("Bad", (), {"id": "valid", "timeout": "30", "execute": lambda self, order: None})
    with pytest.raises(WorkflowDefinitionError, match="it is the attribute 'timeout' of Bad"):
        Stage(bad)


def test_the_decorator_of_stages_takes_a_class_which_may_be_used_again() -> None:
    workflow, other = Workflow("flow"), Workflow("other")

    @workflow.stage(timeout=5)
    class Pay:
        def execute(self, order: Any) -> str:
            return "paid"

    @Pay.compensation
    def refund(order: Any) -> None:
        order["refunded"] = True

    assert run(workflow.add_stage(lambda order: 1 / 0), {}).context == {"refunded": True}
    assert run(other.add_stage(Pay), {}).stages[0].data == "paid"  # type: ignore[arg-type]
    assert other.stages[0].compensation is None


def test_the_annotation_of_a_method_says_what_the_items_of_a_map_are() -> None:
    class Double:
        def execute(self, order: Order) -> float:
            return order.total * 2

        def compensate(self, order: Order) -> None:
            assert isinstance(order, Order)

    flow = Workflow("flow").add_map("double", Double, over=lambda order: [Order(2), Order(3)], into="all")
    assert run(flow, {}).context["all"] == [4, 6]
    assert run(flow.add_stage(lambda order: 1 / 0), {}).status == "compensated"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("retries", "retry"),
        ("time_out", "timeout"),
        ("timeouts", "timeout"),
        ("concurency", "concurrency"),
        ("workers", "actors"),
        ("maxMemory", "max_memory"),
        ("max_task", "max_tasks"),
        ("compensations", "compensation"),
        ("requires", "required"),
    ],
)
def test_an_attribute_that_is_almost_an_option_is_warned_of(name: str, meant: str) -> None:
    bad = type("Bad", (), {name: 3, "execute": lambda self, order: None})
    with pytest.warns(UserWarning, match=f"Bad has the attribute '{name}'.*write '{meant}'") as caught:
        Workflow("flow").add_stage(bad)
    assert caught[0].filename == __file__


class Refund:
    timeout = 10
    actors = 2
    retry = Retry.fixed(2, 0)

    def __init__(self, bank: Any, fee: int = 1) -> None:
        self.bank, self.fee = bank, fee

    def compensate(self, order: Any, ctx: Any) -> None:
        order["refunded"] = self.bank - self.fee


class Undo:
    def execute(self, order: Any) -> None:
        order["refunded"] = "by execute"


class Both:
    def execute(self, order: Any) -> None:
        raise AssertionError("compensate comes first")

    def compensate(self, order: Any) -> None:
        order["refunded"] = "by compensate"


def refund(order: Any) -> None:
    order["refunded"] = "by a function"


@pytest.mark.parametrize(
    ("compensation", "left"),
    [
        (Refund, 99),
        (Refund(50), 49),
        (Undo, "by execute"),
        (Undo(), "by execute"),
        (Both, "by compensate"),
        (Both(), "by compensate"),
        (refund, "by a function"),
        (Compensation(Both), "by compensate"),
        (Compensation(Refund, timeout=5), 99),
        (Both().compensate, "by compensate"),
    ],
)
def test_a_compensation_is_a_function_a_class_or_an_object(compensation: Any, left: Any) -> None:
    workflow = Workflow("flow").add_stage(lambda order: None, id="pay", compensation=compensation)
    workflow.add_stage(lambda order: 1 / 0, id="ship")
    result = run(workflow, {}, services={"bank": lambda: 100})
    assert (result.status, result.context) == ("compensated", {"refunded": left})


def test_the_attributes_of_a_compensation_class_are_its_options() -> None:
    made, changed = Compensation(Refund), Compensation(Refund, 60, actors=1)
    assert (made.timeout, made.actors, made.retry) == (10, 2, Refund.retry)
    assert (changed.timeout, changed.actors, changed.retry) == (60, 1, Refund.retry)


def test_the_decorator_takes_a_class_too() -> None:
    workflow = Workflow("flow")

    @workflow.stage
    def pay(order: Any) -> None: ...

    @pay.compensation
    class GiveBack:
        def compensate(self, order: Any) -> None:
            order["refunded"] = True

    workflow.add_stage(lambda order: 1 / 0, id="ship")
    assert run(workflow, {}).context == {"refunded": True}
    assert GiveBack.__name__ == "GiveBack"


def test_a_class_declares_its_compensation() -> None:
    class Pay:
        compensation = Undo

        def execute(self, order: Any) -> None: ...

    assert run(Workflow("flow").add_stage(Pay).add_stage(lambda order: 1 / 0), {}).context == {"refunded": "by execute"}


@dataclass
class Order:
    total: float = 0


class OrderWorkflow(Workflow[Order]):
    id = "orders"
    context = Order
    version = 3
    name = "Orders"
    timeout = 60
    on_failure = "park"
    retry = Retry.fixed(2, 0)
    stage_timeout = 5
    configured = 0

    def configure(self) -> None:
        type(self).configured += 1
        self.add_stage(self.price).add_stage(Refunded)

    def price(self, order: Order) -> None:
        order.total += 1


class Refunded:
    def execute(self, order: Order) -> None:
        order.total *= 2


def test_a_workflow_class_declares_its_options_and_adds_its_steps() -> None:
    before = OrderWorkflow.configured
    workflow = OrderWorkflow()
    assert (workflow.id, workflow.context, workflow.version, workflow.name) == ("orders", Order, 3, "Orders")
    assert (workflow.timeout, workflow.on_failure, workflow.stage_timeout) == (60, "park", 5)
    assert [stage.id for stage in workflow.stages] == ["price", "refunded"]
    assert workflow.stages[0].retry is OrderWorkflow.retry
    assert OrderWorkflow.configured == before + 1
    assert OrderWorkflow("returns", version=4).version == 4
    assert OrderWorkflow("returns").id == "returns"


def test_a_runtime_and_a_test_take_the_class_or_an_instance() -> None:
    assert run(OrderWorkflow, Order(1)).context.total == 4
    assert run(OrderWorkflow(), Order(1)).context.total == 4
    runtime = Runtime(OrderWorkflow)
    runtime.register(OrderWorkflow)
    assert [(workflow.id, workflow.version) for workflow in runtime.workflows] == [("orders", 3)]


def test_a_workflow_class_without_an_id_is_named_after_itself() -> None:
    class ShipOrders(Workflow[Any]):
        def configure(self) -> None:
            self.add_stage(print, id="show")

    assert ShipOrders().id == "ship-orders"


def test_a_constructor_of_its_own_passes_options_on() -> None:
    class Regional(Workflow[Any]):
        version = 2

        def __init__(self, region: str) -> None:
            self.region = region
            super().__init__(f"orders-{region}")

        def configure(self) -> None:
            self.add_stage(lambda order: None, id=f"ship-{self.region}")

    workflow = Regional("eu")
    assert (workflow.id, workflow.version, workflow.stages[0].id) == ("orders-eu", 2, "ship-eu")


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"version": "2"}, "the version of workflow 'bad' must be an integer"),
        ({"context": Order()}, "the context of workflow 'bad' must be dict"),
        ({"on_failure": "ignore"}, "on_failure of workflow 'bad' must be 'compensate' or 'park'"),
        ({"stages": [pay]}, "sets 'stages', which lists what has been added: write `def configure"),
        ({"id": "no spaces"}, "is malformed"),
    ],
)
def test_a_mistake_in_a_workflow_class_is_a_definition_error(attributes: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkflowDefinitionError, match=said):
        type("Bad", (Workflow,), attributes)()


def test_an_attribute_of_a_workflow_class_that_is_almost_an_option_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="workflow class Bad.*'on_failures'.*write 'on_failure'"):
        type("Bad", (Workflow,), {"on_failures": "park"})()
