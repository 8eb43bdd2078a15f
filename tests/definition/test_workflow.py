"""Building workflows, and the mistakes that are refused at build time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import cloudpickle
import msgspec
import pytest

from stageflow_actors.definition.retry import Retry
from stageflow_actors.definition.stage import Compensation, Replace, Stage
from stageflow_actors.definition.workflow import Workflow
from stageflow_actors.errors import WorkflowDefinitionError


@dataclass
class Order:
    order_id: str
    reserved: bool = False


class Parcel(msgspec.Struct):
    weight: float


def reserve_inventory(order: Any) -> str:
    return f"reserved {order}"


def release_inventory(order: Any) -> None: ...


def ship(order: Any) -> None: ...


class Charge:
    def execute(self, order: Any) -> None: ...

    def compensate(self, order: Any, *, ledger: Any) -> None: ...


def ids(workflow: Workflow[Any]) -> list[str]:
    return [stage.id for stage in workflow.stages]


def test_the_decorator_returns_the_same_function() -> None:
    workflow = Workflow("orders", context=Order)
    assert workflow.stage(ship) is ship
    assert workflow.stage(timeout=30, actors=4)(reserve_inventory) is reserve_inventory
    assert reserve_inventory("A") == "reserved A"
    assert ids(workflow) == ["ship", "reserve-inventory"]
    assert (workflow.stages[1].timeout, workflow.stages[1].actors) == (30.0, 4)


def test_a_decorated_function_registers_its_compensation() -> None:
    workflow = Workflow("orders")

    @workflow.stage
    def pay(order: Any) -> None: ...

    @pay.compensation
    def refund(order: Any) -> str:
        return "refunded"

    compensation = workflow.stages[0].compensation
    assert compensation is not None
    assert compensation.function is refund
    assert (compensation.timeout, compensation.retry, compensation.actors) == (60.0, None, 1)
    assert refund({}) == "refunded"


def test_the_decorator_of_a_compensation_takes_its_options() -> None:
    workflow = Workflow("orders")
    policy = Retry.fixed(3, 1)

    @workflow.stage()
    def pay(order: Any) -> None: ...

    @pay.compensation(timeout=timedelta(minutes=2), retry=policy, actors=2)
    def refund(order: Any) -> None: ...

    compensation = workflow.stages[0].compensation
    assert compensation is not None
    assert (compensation.function, compensation.timeout, compensation.retry, compensation.actors) == (
        refund,
        120.0,
        policy,
        2,
    )


def test_a_function_that_serves_two_workflows_has_its_compensation_in_both() -> None:
    one, two = Workflow("one"), Workflow("two")

    @one.stage
    @two.stage(id="other")
    def pay(order: Any) -> None: ...

    @pay.compensation
    def refund(order: Any) -> None: ...

    for workflow in (one, two):
        compensation = workflow.stages[0].compensation
        assert compensation is not None
        assert compensation.function is refund


def test_stages_are_added_step_by_step() -> None:
    workflow = (
        Workflow("orders", context=Order)
        .add_stage(reserve_inventory, compensation=release_inventory)
        .add_stage(lambda order: None)
        .add_stage(Stage(ship, id="ship-it", timeout=5, after=["reserve-inventory"]))
        .add_stage(Charge())
        .add_stage(lambda order: None)
    )
    assert ids(workflow) == ["reserve-inventory", "stage-2", "ship-it", "charge", "stage-5"]
    workflow.validate(services=["ledger"])


def test_an_object_with_compensate_compensates_its_stage() -> None:
    stage = Workflow("orders").add_stage(Charge()).stages[0]
    assert stage.compensation is not None
    assert stage.compensation.timeout == 60.0
    assert stage.compensation_services == {"ledger"}


def test_a_compensation_given_outright_wins_over_the_objects_own() -> None:
    stage = Stage(Charge(), compensation=Compensation(release_inventory, timeout=None))
    assert stage.compensation is not None
    assert stage.compensation.function is release_inventory
    assert stage.compensation.timeout is None


def test_defaults_of_the_workflow_fill_what_stages_leave_open() -> None:
    policy, own = Retry.fixed(2, 1), Retry.fixed(5, 1)
    workflow = Workflow("orders", retry=policy, stage_timeout=9).add_stage(ship)
    workflow.add_stage(reserve_inventory, retry=own, timeout=timedelta(seconds=3))
    assert [(s.retry, s.timeout) for s in workflow.stages] == [(policy, 9.0), (own, 3.0)]


def test_one_stage_object_can_serve_two_workflows_with_other_defaults() -> None:
    stage = Stage(ship)
    one = Workflow("one", stage_timeout=1).add_stage(stage)
    two = Workflow("two", stage_timeout=2).add_stage(stage)
    assert (one.stages[0].timeout, two.stages[0].timeout, stage.timeout) == (1.0, 2.0, None)


def test_a_workflow_knows_its_defaults() -> None:
    workflow = Workflow("orders")
    assert (workflow.name, workflow.context, workflow.version) == ("orders", dict, 1)
    assert (workflow.timeout, workflow.on_failure, workflow.stages) == (None, "compensate", ())
    assert repr(workflow.add_stage(ship)) == "Workflow('orders', stages=[ship])"


@pytest.mark.parametrize("context", [dict, Order, Parcel])
def test_contexts_are_dicts_dataclasses_and_structs(context: type[Any]) -> None:
    assert Workflow("orders", context=context).context is context


def test_replace_holds_the_new_context() -> None:
    assert Replace({"a": 1}).value == {"a": 1}
    assert repr(Replace({"a": 1})) == "Replace({'a': 1})"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Workflow(""), "the id of the workflow is empty"),
        (lambda: Workflow("a b"), "the id 'a b' of the workflow is malformed"),
        (lambda: Workflow("tür"), "the id 'tür' of the workflow is malformed"),
        (lambda: Workflow("a\n"), "malformed"),
        (lambda: Workflow(5), "the id of the workflow must be a string, not 5"),
        (lambda: Workflow("w", version=0), "the version of workflow 'w' must be an integer from 1"),
        (lambda: Workflow("w", timeout=0), "the timeout of workflow 'w' must be more than 0"),
        (lambda: Workflow("w", stage_timeout="5"), "the stage_timeout of workflow 'w' must be a number of seconds"),
        (lambda: Workflow("w", on_failure="ignore"), "on_failure of workflow 'w' must be 'compensate' or 'park'"),
        (lambda: Workflow("w", retry=3), "the retry of workflow 'w' must be a Retry"),
        (
            lambda: Workflow("w", context=int),
            "the context of workflow 'w' must be dict, a dataclass, a msgspec Struct or a pydantic",
        ),
        (lambda: Workflow("w", context=Order("a")), "use the type, not an instance"),
        (lambda: Workflow("w", name=5), "the name of workflow 'w' must be a string"),
        (lambda: Stage(ship, id=""), "is empty"),
        (lambda: Stage(ship, id="a/b"), "the id 'a/b' .* is malformed"),
        (lambda: Stage(ship, actors=0), "actors of stage 'ship' must be an integer from 1 to 1,000, not 0"),
        (lambda: Stage(ship, actors=1.5), "actors of stage 'ship'"),
        (lambda: Stage(ship, actors=1_001), "actors of stage 'ship' must be an integer from 1 to 1,000, not 1001"),
        (lambda: Stage(ship, actors=10**6), "from 1 to 1,000, not 1000000"),
        (lambda: Compensation(ship, actors=1_001), "actors of compensation 'ship' must be an integer from 1 to 1,000"),
        (lambda: Stage(ship, actors=True), "actors of stage 'ship'"),
        (lambda: Stage(ship, concurrency=-1), "concurrency of stage 'ship'"),
        (lambda: Stage(ship, timeout=-1), "the timeout of stage 'ship' must be more than 0"),
        (lambda: Stage(ship, timeout=float("nan")), "the timeout of stage 'ship' must be finite"),
        (lambda: Stage(ship, timeout=10**400), "the timeout of stage 'ship' must be finite"),
        (lambda: Stage(ship, ttl=0), "the ttl of stage 'ship'"),
        (lambda: Stage(ship, max_tasks=0), "max_tasks of stage 'ship'"),
        (lambda: Stage(ship, required="no"), "required of stage 'ship' must be True or False"),
        (lambda: Stage(ship, after="pay"), r"after of stage 'ship' takes several stage ids: write after=\['pay'\]"),
        (lambda: Stage(ship, after=5), "after of stage 'ship' takes a list of stage ids"),
        (lambda: Stage(ship, after=[""]), "a stage in after of stage 'ship' is empty"),
        (lambda: Stage(ship, when=True), "when of stage 'ship' must be a function"),
        (lambda: Stage(ship, retry=3), "the retry of stage 'ship' must be a Retry"),
        (lambda: Stage(ship, compensation="undo"), "the compensation of stage 'ship' must be a function"),
        (lambda: Stage(ship, compensation=lambda: None), "takes no context"),
        (lambda: Stage(ship, env={"A": 1}), "env of stage 'ship' takes strings only"),
        (lambda: Stage(ship, env={"A=B": "1"}), "env of stage 'ship' has 'A=B'"),
        (lambda: Stage(ship, env=["A"]), "env of stage 'ship' must be a dict"),
        (lambda: Stage(Stage(ship)), "Stage.* got the stage 'ship'"),
        (lambda: Compensation(ship, timeout=0), "the timeout of compensation 'ship'"),
        (lambda: Compensation(ship, actors=0), "actors of compensation 'ship'"),
        (lambda: Workflow("w").add_stage(ship).add_stage(ship), "workflow 'w' already has a stage 'ship'"),
        (lambda: Workflow("w").add_stage(Stage(ship), timeout=5), r"'ship' .* pass them to Stage\(\.\.\.\)"),
        (lambda: Workflow("w").add_stage(ship, tiemout=5), "unknown option 'tiemout'"),
        (lambda: Workflow("w").add_stage(lambda: 1), "stage of a lambda takes no context"),
        (
            lambda: Workflow("w").add_stage(ship, compensation=ship).set_compensation("ship", ship),
            "stage 'ship' of workflow 'w' already has a compensation",
        ),
    ],
)
def test_a_mistake_is_refused_at_once_with_the_place_and_the_fix(make: Any, message: str) -> None:
    with pytest.raises(WorkflowDefinitionError, match=message):
        make()


def needs_db(order: Any, *, db: Any) -> None: ...


@pytest.mark.parametrize(
    ("workflow", "message"),
    [
        (Workflow("w"), "workflow 'w' has no stages"),
        (Workflow("w").add_stage(ship, after=["pay"]), "names 'pay' in after, which is not a stage of it: .* ship"),
        (Workflow("w").add_stage(ship, after=["ship"]), "names itself in after"),
        (
            Workflow("w").add_stage(ship, after=["later"]).add_stage(ship, id="later"),
            "stage 'ship' of workflow 'w' names 'later' in after, which runs later",
        ),
        (Workflow("w").add_stage(needs_db), "stage 'needs-db' of workflow 'w' needs the service 'db'"),
        (
            Workflow("w").add_stage(ship, compensation=needs_db),
            "the compensation of stage 'ship' of workflow 'w' needs the service 'db'",
        ),
    ],
)
def test_validation_refuses_what_only_the_whole_can_show(workflow: Workflow[Any], message: str) -> None:
    with pytest.raises(WorkflowDefinitionError, match=message):
        workflow.validate(services=["mail"])


def test_a_sound_workflow_validates() -> None:
    Workflow("w").add_stage(ship).add_stage(needs_db, after=["ship"], compensation=needs_db).validate(
        services={"db": 1}
    )


def test_the_fingerprint_changes_with_what_messages_in_flight_depend_on() -> None:
    def make(**changes: Any) -> str:
        return Workflow("w").add_stage(ship).add_stage(reserve_inventory, **changes).fingerprint()

    same = {make(), make(timeout=5), make(actors=3), make(retry=Retry.fixed(2, 1))}
    assert len(same) == 1
    others = {
        make(id="x"),
        make(required=False),
        make(after=["ship"]),
        make(compensation=ship),
        Workflow("w").add_stage(reserve_inventory).add_stage(ship).fingerprint(),
        Workflow("w", context=Order).add_stage(ship).add_stage(reserve_inventory).fingerprint(),
    }
    assert len(others) == 6
    assert not same & others


def test_the_fingerprint_knows_the_fields_of_the_context() -> None:
    def make(*fields: str) -> str:
        made = dataclasses.make_dataclass("Made", fields)
        return Workflow("w", context=made).add_stage(ship).fingerprint()

    assert make("a", "b") == make("a", "b")
    assert make("a", "b") != make("a", "c")


def test_a_workflow_survives_cloudpickle_with_lambdas_and_local_functions() -> None:
    factor = 3
    workflow = Workflow("w", context=Order)

    @workflow.stage(retry=Retry.exponential(3, 1, 5, retry_on=lambda e: True))
    def local(order: Any) -> int:
        return factor * len(order.order_id)

    @local.compensation
    def undo(order: Any) -> None: ...

    workflow.add_stage(lambda order, ctx: (order, ctx)).add_stage(Charge())
    copy = cloudpickle.loads(cloudpickle.dumps(workflow))
    assert ids(copy) == ["local", "stage-2", "charge"]
    assert copy.stages[0].spec.bind({})(Order("ab"), None) == 6
    assert copy.stages[0].compensation.function(Order("a")) is None
    assert copy.fingerprint() == workflow.fingerprint()
