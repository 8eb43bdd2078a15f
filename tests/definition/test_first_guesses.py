"""First guesses at the API work where their meaning is plain; otherwise the error shows the call to write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from stageflow_actors import Breaker, Compensation, Config, Retry, Runtime, Stage, Workflow, WorkflowDefinitionError
from stageflow_actors.testing import run


@dataclass
class Order:
    total: float = 0.0


def pay(order: Any) -> None: ...


def ship(order: Any) -> None: ...


async def fetch(order: Any) -> None: ...


class Till:
    def pay(self, order: Any) -> None: ...

    def refund(self, order: Any, bnak: Any) -> None: ...


class Worker:
    def run(self, order: Any) -> None: ...


class Unnamed(Workflow[Any]):
    id = ""


class Unready(Workflow[Any]):
    def __init__(self) -> None:
        self.add_stage(pay)


class Regional(Workflow[Any]):
    def __init__(self, region: str) -> None:
        super().__init__(f"orders-{region}")


def flow() -> Any:
    return Workflow("flow")


def steps(workflow: Any) -> list[str]:
    return [step.id for step in workflow.steps]


@pytest.mark.parametrize(
    ("guess", "ids"),
    [
        (lambda: flow().add_stage("charge", pay), ["charge"]),
        (lambda: flow().add_stage(pay, "charge", timeout=5), ["charge"]),
        (lambda: flow().add_stage(Stage("charge", pay)), ["charge"]),
        (lambda: flow().add_parallel([pay, ship]), ["parallel-1"]),
        (lambda: flow().add_stage(fetch).add_parallel(pay, ship), ["fetch", "parallel-2"]),
        (lambda: flow().add_parallel("both", pay, ship), ["both"]),
        (lambda: flow().add_parallel("both", pay, Stage(ship, id="send")), ["both"]),
        (lambda: flow().add_parallel([pay, ship], id="both"), ["both"]),
        (lambda: flow().add_branch(lambda order: "a", {"a": [pay]}), ["branch-1"]),
        (lambda: flow().add_branch("kind", lambda order: "a", {"a": pay, "b": Stage(ship)}), ["kind"]),
        (lambda: flow().add_conditional(pay, lambda order: True), ["pay"]),
        (lambda: flow().add_map(pay, over=lambda order: []), ["pay"]),
        (lambda: flow().add_map(lambda item: item, over=lambda order: []), ["map-1"]),
        (lambda: flow().add_map("each", pay, lambda order: []), ["each"]),
        (lambda: flow().add_http_stage("charge", "http://bank/"), ["charge"]),
        (lambda: flow().add_parallel("both", [Stage.http("charge", "http://bank/"), pay]), ["both"]),
        (lambda: flow().add_remote_stage("stock", "inventory", lambda order: 1), ["stock"]),
        (lambda: flow().add_parallel("both", [Stage.remote("stock", "inventory", lambda order: 1), pay]), ["both"]),
        (lambda: flow().add_delay(60), ["delay-1"]),
        (lambda: Workflow("flow", Order).add_stage(pay), ["pay"]),
    ],
)
def test_a_guess_with_a_plain_meaning_works(guess: Callable[[], Any], ids: list[str]) -> None:
    assert steps(guess()) == ids


def test_the_decorator_takes_an_id_alone() -> None:
    workflow = flow()

    @workflow.stage("charge")
    def pay(order: Any) -> None: ...

    assert steps(workflow) == ["charge"]
    assert Workflow("flow", Order).context is Order  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("guess", "said"),
    [
        (
            lambda: flow().add_stage(pay, ship),
            r"add_stage\(\.\.\.\) got more arguments than it takes: write add_stage\(",
        ),
        (lambda: flow().add_stage(), r"add_stage\(\.\.\.\) missing 1 required argument: 'handler': write add_stage\("),
        (
            lambda: flow().add_stage([pay, ship]),
            r"list of pay, ship as its handler: call add_stage\(pay\) .*, or add_parallel\('checks', \[pay, ship\]\)",
        ),
        (lambda: flow().add_stage(flow()), "a workflow cannot be a stage of another: add its stages here"),
        (lambda: flow().add_stage(Workflow), "a workflow cannot be a stage of another"),
        (lambda: flow().add_stage(fetch({})), "give the async function itself, without calling it"),
        (lambda: flow().add_stage(pay({})), "give the function itself, without calling it"),
        (
            lambda: flow().add_stage("charge"),
            r"a stage has 'charge'.*a string is no handler, write add_stage\(function, id=",
        ),
        (lambda: flow().add_stage([pay]), "^a stage has the list of pay as its handler: call add_stage"),
        (lambda: flow().add_stage(Worker), r"rename its method 'run' to 'execute', or give .* Worker\(\).run"),
        (lambda: flow().add_stage(pay, retries=3), "unknown option 'retries': did you mean 'retry'"),
        (lambda: flow().add_stage(pay, time_out=3), "unknown option 'time_out': did you mean 'timeout'"),
        (lambda: flow().add_stage(pay, workers=3), "unknown option 'workers': did you mean 'actors'"),
        (lambda: Stage(pay, retries=3), r"unexpected keyword argument 'retries'.*write Stage\(handler"),
        (lambda: flow().add_stage(pay, retry=3), r"must be a Retry such as Retry.fixed\(max_attempts=3, delay=1\)"),
        (
            lambda: Retry(max_attempts=3),
            r"write Retry.exponential\(max_attempts=3, initial=1, maximum=30\) or Retry.fi",
        ),
        (
            lambda: Retry(max_attempts=3),
            "^Retry.* does not choose the delays between attempts: write Retry.exponential",
        ),
        (lambda: Retry(3), r"write Retry.exponential\(max_attempts=3"),
        (
            lambda: Retry.exponential(3),
            r"Retry.exponential\(\.\.\.\) missing .*write Retry.exponential\(max_attempts=3",
        ),
        (lambda: Retry.fixed(attempts=3, delay=1), r"unexpected keyword argument 'attempts'.*write Retry.fixed\("),
        (lambda: flow().add_parallel("both"), r"add_parallel\(.*write add_parallel\(id, \[handler, \.\.\.\]\)"),
        (lambda: flow().add_parallel(7), "write add_parallel"),
        (lambda: flow().add_branch("kind", {"a": [pay]}), "write add_branch"),
        (lambda: flow().add_conditional(pay), r"missing.*'when': write add_conditional\(handler, when="),
        (lambda: flow().add_map("each", pay), r"missing.*'over': write add_map\("),
        (lambda: flow().add_map("each", pay, over="items"), "over of map stage 'each' must be a function"),
        (lambda: flow().add_http_stage("http://bank/"), r"missing.*'url': write add_http_stage\(id, url="),
        (lambda: flow().add_http_stage("charge", "http://bank/", "POST"), "write add_http_stage"),
        (lambda: flow().add_remote_stage("stock", "inventory"), r"missing.*'command': write add_remote_stage\("),
        (lambda: flow().add_delay("cool-down"), r"missing.*'duration': write add_delay\(id, seconds\)"),
        (lambda: flow().add_signal("approval", 60), r"write add_signal\(id, timeout="),
        (lambda: Workflow(), r"a workflow needs an id: write Workflow\('order-processing'\)"),
        (lambda: Unnamed(), "empty"),
        (lambda: Unready(), r"class Unready has an __init__ that does not call super.* override configure"),
        (lambda: Workflow("flow", stages=[pay]), r"unexpected keyword argument 'stages'.*write Workflow\(id"),
        (lambda: flow().add_stage(pay).set_compensation("typo", ship), "no stage 'typo'.*its stages are pay"),
        (lambda: flow().add_stage(pay).set_compensation("pya", ship), "no stage 'pya'"),
        (lambda: flow().add_stage(pay, id="charge").set_compensation("chrage", ship), "did you mean 'charge'"),
        (lambda: flow().set_compensation(pay, ship), "has no stage <function pay"),
        (lambda: flow().add_stage(pay, compensation=[ship]), "the compensation of stage 'pay' must be a function"),
        (lambda: flow().add_stage(pay, compensation="ship"), "the compensation of stage 'pay' must be a function"),
        (lambda: flow().add_stage(pay, compensation=Stage(ship)), "the compensation of stage 'pay' must be a function"),
        (lambda: flow().add_stage(pay, compensation=Order), "has neither compensate.context. nor execute.context."),
        (lambda: Compensation("ship"), "a compensation must be a function, or a class or object with compensate"),
        (lambda: Compensation(ship, retries=3), r"unexpected keyword argument 'retries'.*write Compensation\(function"),
        (lambda: flow().add_stage(Till.pay), r"method Till.pay without its object.*write Till\(\).pay"),
        (lambda: Runtime(flow(), servces={}), "unexpected keyword argument 'servces' .did you mean 'services'"),
        (lambda: Runtime(Regional), "Regional cannot be constructed without arguments .*'region'.: give an instance"),
        (
            lambda: Breaker(failure=3),
            r"unexpected keyword argument 'failure' .did you mean 'failures'..: write Breaker",
        ),
        (lambda: flow().add_stage(Till().refund).validate({"bank"}), "needs the service 'bnak'.*did you mean 'bank'"),
        (lambda: Config(max_retries=3), r"argument 'max_retries' .did you mean 'max_stage_retries'..: write Config"),
        (lambda: Config("write"), "got more arguments than it takes: write Config.durability='write'"),
        (lambda: Runtime([flow()]), r"write Runtime\(\*workflows\)"),
        (lambda: Runtime(Workflow), "give an instance"),
        (lambda: run(pay, {}), "testing.run takes a workflow"),  # type: ignore[arg-type]
    ],
)
def test_any_other_guess_is_refused_with_the_call_to_write(guess: Callable[[], Any], said: str) -> None:
    with pytest.raises(WorkflowDefinitionError, match=f"(?s){said}") as caught:
        guess()
    assert "\n" not in str(caught.value)


def test_a_type_error_inside_of_a_definition_is_not_taken_for_a_wrong_call() -> None:
    class Broken(Workflow):  # type: ignore[type-arg]
        def configure(self) -> None:
            raise TypeError("missing 1 required positional argument: 'x'")

    with pytest.raises(TypeError, match="missing 1 required"):
        Broken()
