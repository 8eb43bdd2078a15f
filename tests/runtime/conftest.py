"""Real clusters for tests of what users type: one per test module, because starting one takes half a second."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import effect_log
import pytest

from stageflow_actors import Runtime, Workflow


@pytest.fixture(scope="module", autouse=True)
def effects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The effect log of this module; set before any worker starts."""
    path = tmp_path_factory.mktemp("effects") / "log"
    before = os.environ.get(effect_log.VARIABLE)
    os.environ[effect_log.VARIABLE] = str(path)
    yield path
    if before is None:
        del os.environ[effect_log.VARIABLE]
    else:
        os.environ[effect_log.VARIABLE] = before


Serve = Callable[..., Runtime]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts runtimes on fresh data directories, and stops them after the module's last test."""
    with ExitStack() as stack:

        def start(*workflows: Workflow[Any], **options: Any) -> Runtime:
            options.setdefault("data_dir", tmp_path_factory.mktemp("data"))
            runtime = Runtime(*workflows, **options)
            stack.callback(runtime.stop, grace=0.0)
            return runtime.start()

        yield start
