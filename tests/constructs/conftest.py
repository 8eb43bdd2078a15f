"""The two ways to run a workflow, and one cluster per test module for every workflow that it defines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cluster_fixtures import Serve, gate, serve
from effect_log import effects

from stageflow_actors import Runtime, Stage, Workflow, WorkflowResult
from stageflow_actors.testing import run

__all__ = ["effects", "execute", "gate", "runtime", "serve"]


@pytest.fixture(scope="module")
def runtime(request: pytest.FixtureRequest, serve: Serve) -> Runtime:
    """A cluster of real processes that knows every workflow of the test module, and its `ENDPOINTS`."""
    defined = vars(request.module)
    workflows = [value for value in defined.values() if isinstance(value, Workflow)]
    return serve(*workflows, endpoints=defined.get("ENDPOINTS"))


Execute = Callable[..., WorkflowResult[Any]]


@pytest.fixture(params=["in process", "real processes"])
def execute(request: pytest.FixtureRequest) -> Execute:
    """`execute(workflow, context, signals=None)`: one instance to its end, in either way."""
    if request.param == "in process":
        endpoints = {
            name: Stage(given[0], id=name, **given[1]) if isinstance(given, tuple) else given
            for name, given in getattr(request.module, "ENDPOINTS", {}).items()
        }

        def here(workflow: Workflow[Any], context: Any, *, signals: Any = None) -> WorkflowResult[Any]:
            return run(workflow, context, signals=signals, endpoints=endpoints)

        return here
    runtime: Runtime = request.getfixturevalue("runtime")

    def there(workflow: Workflow[Any], context: Any, *, signals: Any = None) -> WorkflowResult[Any]:
        instance = runtime.submit(workflow, context)
        for name, payload in (signals or {}).items():
            instance.signal(name, payload)
        return instance.result(timeout=30)

    return there
