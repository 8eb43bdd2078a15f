"""The limits of `actors`, the worker processes of one stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from stageflow_actors import Runtime, Workflow
from stageflow_actors.errors import WorkflowDefinitionError


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(Workflow("flow").add_stage(lambda order: None, id="pay"), data_dir=tmp_path / "data")


def test_an_endpoint_has_as_many_as_a_stage_at_most(runtime: Runtime) -> None:
    runtime.endpoint("most", lambda command: command, actors=1_000)
    with pytest.raises(WorkflowDefinitionError, match="actors of stage 'more' must be an integer from 1 to 1,000"):
        runtime.endpoint("more", lambda command: command, actors=1_001)


@pytest.mark.parametrize("actors", [1_001, 10**6, -1])
def test_a_stage_is_not_scaled_beyond_that(runtime: Runtime, actors: int) -> None:
    with pytest.raises(ValueError, match=f"actors must be a whole number from 0 to 1,000, not {actors}"):
        runtime.scale("flow", "pay", actors)
