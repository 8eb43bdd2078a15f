"""A pool that gives up reports the reason, at once and when asked later."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import Runtime, Workflow
from stageflow_actors.diagnostics import health


def end() -> object:
    os._exit(13)


def use(context: dict[str, Any], *, shop: Any) -> None: ...


broken = Workflow("broken").add_stage(use)


def test_the_exits_of_its_workers_are_reported_and_distinguished_from_a_manual_pause(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FAULT_CONFIRM_SECONDS", 0.0)
    why = "10 of its workers ended in a row before they began a message (the last: exit code 13)"
    with Runtime(broken, data_dir=tmp_path, services={"shop": end}) as runtime:
        (queue,) = runtime.queues("stageflow.broken.")
        said = ""

        def told() -> bool:
            nonlocal said
            said += capfd.readouterr().err
            return "is paused" in said

        eventually(told, "the pause of the pool")
        assert f"pool {queue.name} is paused: {why}" in said
        paused = eventually(lambda: [f.text for f in health.examine(tmp_path) if "is paused" in f.text], "the fault")
        assert paused == [
            f"it is paused by its pool because {why}; fix the cause, then `stageflow queue resume {queue.name}`"
        ]
        runtime.pause(queue.name)
        texts = [fault.text for fault in health.examine(tmp_path)]
        assert f"it is paused: `stageflow queue resume {queue.name}`" in texts
