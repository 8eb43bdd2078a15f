"""The texts of refused definitions: each says what is wrong, names the value or the parameter, and what to write."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from stageflow_actors import Config, Retry, Runtime, Stage, Workflow, WorkflowDefinitionError
from stageflow_actors.testing import run


@dataclass
class Order:
    order_id: str = ""


def pay(order: Any) -> None: ...


class Policy:
    def next_delay(self, attempt: int) -> float:
        return 1


def flow() -> Any:
    return Workflow("orders")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    # a value of another kind than the option takes
    "a function by its name": (lambda: Stage(pay, when="paid"), "not 'paid': give the function itself, not its name"),
    "a compensation by its name": (lambda: Stage(pay, compensation="refund"), "give the function itself, not its name"),
    "an exception by its name": (
        lambda: Retry.fixed(3, 1, retry_on="OSError"),  # type: ignore[arg-type]
        "not 'OSError': give the class itself, not its name",
    ),
    "memory as text": (lambda: Stage(pay, max_memory="2GB"), "a number of bytes such as 2_000_000_000, not '2GB'"),  # type: ignore[arg-type]
    "an environment of numbers": (
        lambda: Stage(pay, env={"OMP_NUM_THREADS": 1}),  # type: ignore[dict-item]
        "as in {'OMP_NUM_THREADS': '1'}, not {'OMP_NUM_THREADS': 1}",
    ),
    "a negative timedelta": (lambda: Stage(pay, timeout=timedelta(seconds=-1)), "must be more than 0, not -1 s"),
    "a dict as Config": (lambda: Runtime(flow(), config={"durability": "write"}), "such as Config(durability='write')"),  # type: ignore[arg-type]
    # functions of other parameters
    "a predicate without parameters": (
        lambda: Stage(pay, when=lambda: True),
        "it is called with context, and it has no parameters: write it with (context)",
    ),
    "a policy without the error": (
        lambda: Stage(pay, retry=Policy()),  # type: ignore[arg-type]
        "Policy.next_delay, does not fit: it is called with attempt and error, and its parameters are (attempt)",
    ),
    "a factory of all": (
        lambda: Stage(pay, when=lambda *, order: True),
        "asks for 'order' by keyword, and only handlers receive services: it is called with context",
    ),
    # arguments in another order
    "arms before the selector": (
        lambda: flow().add_branch("kind", {"a": [pay]}, pay),
        "branch 'kind' has its arms before its selector: write add_branch('kind', pay, {...})",
    ),
    "a context before the workflow": (lambda: run({}, flow()), "not {}: write run(workflow, context)"),  # type: ignore[arg-type]
    "a directory in place of workflows": (
        lambda: Runtime("data", flow()),  # type: ignore[arg-type]
        "not 'data': give the workflow itself, not its id; a directory is data_dir='data'",
    ),
    "a function in place of a workflow": (lambda: Runtime(pay), "as in Workflow('orders').add_stage(pay)"),  # type: ignore[arg-type]
    # misspelt names
    "after of a misspelt stage": (
        lambda: flow().add_stage(pay, id="charge").add_stage(pay, id="ship", after=["chrage"]).validate(),
        "names 'chrage' in after, which is not a stage of it (did you mean 'charge'?): the stages are charge, ship",
    ),
    "a misspelt field in a url": (
        lambda: Workflow("orders", context=Order).add_http_stage("charge", url="http://bank/{orderid}"),
        "names {orderid}, and Order has no such field (did you mean {order_id}?): it has order_id",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_refusal_says_what_is_wrong_and_what_to_write(mistake: str) -> None:
    define, said = REFUSED[mistake]
    with pytest.raises(WorkflowDefinitionError, match=re.escape(said)) as caught:
        define()
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)
    assert caught.value.place is not None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("add_step", "a Workflow has no 'add_step': write add_stage(handler), or @workflow.stage"),
        ("task", "a Workflow has no 'task': write @workflow.stage, or add_stage(handler)"),
        ("add_sleep", "a Workflow has no 'add_sleep': write add_delay(id, seconds)"),
        ("run", "a Workflow has no 'run': a Runtime runs it: `with Runtime(workflow) as runtime: runtime.execute("),
    ],
)
def test_a_method_of_other_systems_is_an_attribute_error_that_names_ours(name: str, said: str) -> None:
    with pytest.raises(AttributeError, match=re.escape(said)):
        getattr(flow(), name)
    assert not hasattr(flow(), name)


def test_an_error_of_the_configuration_names_its_option() -> None:
    with pytest.raises(ValueError, match=r"^Config\.durability must be 'fsync', 'write' or 'memory', not 'fsnc'$"):
        Config(durability="fsnc")  # type: ignore[arg-type]
