"""The two ways in which a workflow can be run, and one cluster per test module for all that it defines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import constructs_fixtures
import pytest

from stageflow_actors import Runtime, Stage, Workflow, WorkflowResult
from stageflow_actors.testing import run


@pytest.fixture(scope="module", autouse=True)
def effects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The effect log of this module; set before any worker starts."""
    path = tmp_path_factory.mktemp("effects") / "log"
    before = os.environ.get(constructs_fixtures.VARIABLE)
    os.environ[constructs_fixtures.VARIABLE] = str(path)
    yield path
    if before is None:
        del os.environ[constructs_fixtures.VARIABLE]
    else:
        os.environ[constructs_fixtures.VARIABLE] = before


Serve = Callable[..., Runtime]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts runtimes on fresh data directories, and stops them after the module's last test."""
    with ExitStack() as stack:

        def start(*workflows: Workflow[Any], endpoints: Mapping[str, Any] | None = None, **options: Any) -> Runtime:
            options.setdefault("data_dir", tmp_path_factory.mktemp("data"))
            runtime = Runtime(*workflows, **options)
            stack.callback(runtime.stop, grace=0.0)
            for name, given in (endpoints or {}).items():
                handler, more = given if isinstance(given, tuple) else (given, {})
                runtime.endpoint(name, handler, **more)
            return runtime.start()

        yield start


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


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file that handlers wait for; there at the latest when the test is over."""
    path = tmp_path / "gate"
    yield path
    path.touch()
