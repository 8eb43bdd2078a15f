"""The texts of refused calls of a runtime: what is wrong, where, and what to write. One cluster serves all of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster_fixtures import Serve, serve

from stageflow_actors import (
    BrokerUnavailable,
    InstanceNotFound,
    InvalidContext,
    JournalLocked,
    Runtime,
    StageFlowError,
    Workflow,
)

__all__ = ["serve"]


class Texts:
    def next_delay(self, attempt: int, error: Exception) -> Any:
        return "1s"


def fail(order: Any) -> None:
    raise ValueError("no money")


orders: Workflow[Any] = Workflow("orders").add_stage(fail, id="charge", retry=Texts()).add_signal("approval")


@pytest.fixture(scope="module")
def cluster(serve: Serve) -> Runtime:
    return serve(orders)


CALLS: dict[str, tuple[Callable[[Runtime], Any], type[Exception], str]] = {
    "context first": (
        lambda runtime: runtime.submit({}, orders),  # type: ignore[arg-type]
        StageFlowError,
        "the first argument is the workflow or its id, and the context comes behind it: not {}",
    ),
    "a misspelt workflow": (
        lambda runtime: runtime.submit("ordres", {}),
        StageFlowError,
        "no workflow 'ordres' is registered here (did you mean 'orders'?): registered are 'orders'; register(workflow)",
    ),
    "a list in place of one context": (
        lambda runtime: runtime.submit(orders, [{}]),
        InvalidContext,
        "the context must be a dict, not list: [{}]; submit_many and map take more (",
    ),
    "one context in place of a list": (
        lambda runtime: runtime.submit_many(orders, {"a": 1}),
        ValueError,
        "submit_many takes a list of contexts, not {'a': 1}: write [context]",
    ),
    "a key that the contexts do not have": (
        lambda runtime: list(runtime.map(orders, [{"id": 1}], key="order_id")),
        InvalidContext,
        "context.order_id is missing: key='order_id' takes the instance's id from it; the context is of 'id'",
    ),
    "a stage in place of its queue": (
        lambda runtime: runtime.pause("charge"),
        StageFlowError,
        "no queue is named 'charge': that of stage 'charge' of workflow 'orders' is 'stageflow.orders.stage0'",
    ),
    "a misspelt stage": (
        lambda runtime: runtime.scale(orders, "chrage", 2),
        StageFlowError,
        "workflow 'orders' has no stage 'chrage' (did you mean 'charge'?): its stages with workers are charge",
    ),
    "an id that no instance has": (
        lambda runtime: runtime.instance("ORDER-1"),
        InstanceNotFound,
        ": check the id and the data directory (a finished instance is forgotten after `history_retention`)",
    ),
    "a second runtime of the program": (
        lambda runtime: Runtime(orders, data_dir=runtime.data_dir).start(),
        JournalLocked,
        f"is in use by a Runtime of this program with pid {os.getpid()}; connect to its cluster with Runtime.connect(",
    ),
}


@pytest.mark.parametrize("mistake", CALLS)
def test_a_refused_call_says_what_is_wrong_and_what_to_write(cluster: Runtime, mistake: str) -> None:
    call, kind, said = CALLS[mistake]
    with pytest.raises(kind, match=re.escape(said)) as caught:
        call(cluster)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_an_unknown_instance_is_named_with_the_data_directory_that_was_searched(cluster: Runtime) -> None:
    with pytest.raises(InstanceNotFound, match=rf"'ORDER-1' is known in {re.escape(str(cluster.data_dir))}: check"):
        cluster.instance("ORDER-1")


def test_a_policy_that_returns_no_number_is_named_in_the_error_of_its_stage(cluster: Runtime) -> None:
    assert cluster.execute(orders, {}, timeout=60).error == (
        "ValueError: no money (and its retry policy failed: ValueError: Texts.next_delay returned '1s': return a "
        "number of seconds from 0, or None to give up)"
    )


def test_a_call_after_the_end_of_the_block_says_so_and_one_before_its_start_too(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailable, match=r"not running: call start"):
        Runtime(orders, data_dir=tmp_path / "data").submit(orders, {})
    with Runtime(orders, data_dir=tmp_path / "data") as runtime:
        pass
    with pytest.raises(BrokerUnavailable, match="has been stopped: make the call inside the `with` block"):
        runtime.submit(orders, {})


def test_a_data_directory_that_is_a_file_is_refused_once(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(StageFlowError, match=r"data cannot be used: it is a file; choose another directory$") as caught:
        Runtime(orders, data_dir=tmp_path / "data").start()
    assert caught.value.__suppress_context__
