"""`start()` and `register()` wait until a worker of each pool has loaded its code, and raise if one cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import Config, Runtime, Workflow, WorkflowDefinitionError
from stageflow_actors.core.plan import Naming, compile_plan
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec, pool_specs
from stageflow_actors.runtime.ipc.slots import LOADING, UNLOADABLE, SlotTable
from stageflow_actors.runtime.node.load_watch import LoadWatch
from stageflow_actors.runtime.node.source_watch import SourceWatch
from stageflow_actors.runtime.system.source_files import SourceFile, loaded_sources


class WhenLoaded:
    """Its pickle calls a function in the worker that loads it."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __reduce__(self) -> Any:
        return self.function, ()


def handler_with(value: Any) -> Any:
    return lambda context: value and None


def fails() -> None:
    import no_such_module  # type: ignore[import-not-found] # noqa: F401


def exits() -> None:
    raise SystemExit("no main guard")


def dies() -> None:
    os._exit(3)


def sleeps() -> None:
    time.sleep(60)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with Runtime(Workflow("flow").add_stage(lambda context: 1, id="first"), data_dir=tmp_path / "kept") as runtime:
        yield runtime


@pytest.mark.parametrize(
    ("function", "error"), [(fails, "ModuleNotFoundError: No module named 'no_such_module' "), (exits, "SystemExit: ")]
)
def test_start_raises_what_ends_the_load_and_leaves_nothing(
    function: Any, error: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = (
        Workflow("flow").add_stage(lambda context: 1, id="good").add_stage(handler_with(WhenLoaded(function)), id="bad")
    )
    runtime = Runtime(bad, data_dir=tmp_path)
    with pytest.raises(WorkflowDefinitionError) as raised:
        runtime.start()
    assert str(raised.value).startswith(
        f"stage 'bad' of workflow 'flow': its code cannot be loaded in a worker: {error}"
    )
    assert "test_code_loading.py, line" in str(raised.value)
    assert "cannot start" not in caplog.text + capfd.readouterr().err  # what is raised is not logged too
    with Runtime(Workflow("flow").add_stage(lambda context: 1, id="good"), data_dir=tmp_path) as runtime:
        assert runtime.execute("flow", {}, timeout=20).success


def test_a_worker_that_dies_before_it_has_loaded_does_not_hold_start_up(tmp_path: Path) -> None:
    flow = Workflow("flow").add_stage(handler_with(WhenLoaded(dies)), id="deadly")
    runtime = Runtime(flow, data_dir=tmp_path).start()
    assert runtime.instances() == []
    runtime.stop()


def test_start_returns_after_its_timeout_and_names_the_pool(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flow = Workflow("flow").add_stage(handler_with(WhenLoaded(sleeps)), id="slow")
    runtime = Runtime(flow, data_dir=tmp_path, config=Config(start_timeout=0.3)).start()
    assert "the code of stage 'slow' of workflow 'flow' is not loaded within 0.3 s" in capfd.readouterr().err
    runtime.stop(grace=0)


def test_register_raises_and_keeps_the_pools_from_before(runtime: Runtime) -> None:
    bad = handler_with(WhenLoaded(fails))
    for _ in range(2):
        with pytest.raises(WorkflowDefinitionError, match="stage 'first' of workflow 'flow'"):
            runtime.register(Workflow("flow", version=2).add_stage(bad, id="first"))
        with pytest.raises(WorkflowDefinitionError, match="stage 'only' of workflow 'other'"):
            runtime.register(Workflow("other").add_stage(bad, id="only"))
        with pytest.raises(WorkflowDefinitionError, match="endpoint 'stock'"):
            runtime.endpoint("stock", bad)
    assert runtime.execute("flow", {}, timeout=20).success
    other = Workflow("other").add_stage(lambda context: 2, id="only")
    runtime.register(other)
    runtime.endpoint("stock", lambda command: 3)
    assert runtime.execute(other, {}, timeout=20).stages[0].data == 2


@pytest.mark.parametrize("value", [0, -1, None, "soon", float("inf")])
def test_a_start_timeout_is_a_positive_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Config\.start_timeout"):
        Config(start_timeout=value)


# the watch of the node


@pytest.fixture
def specs() -> list[PoolSpec]:
    flow = Workflow("flow").add_stage(lambda context: 1, id="a").add_stage(lambda context: 1, id="b")
    return pool_specs(flow, compile_plan(flow, Naming("s.", "c.")), {})


def test_a_wait_ends_when_a_worker_of_each_pool_has_loaded(specs: list[PoolSpec]) -> None:
    table = SlotTable.create(2)
    watch = LoadWatch(60)
    lanes = {spec.queue: [table[number]] for number, spec in enumerate(specs)}
    watch.begin(7, specs, now=0)
    assert watch.check(lanes, now=1) == []
    table[0].mark_loaded()
    assert watch.check(lanes, now=2) == []
    table[1].mark_loaded()
    (report,) = watch.check(lanes, now=3)
    assert (report.number, report.error, report.is_final) == (7, "", True)
    assert not watch.is_waiting
    table.close()


def test_a_wait_notes_after_five_seconds_which_pool_is_loading_and_ends_at_its_timeout(specs: list[PoolSpec]) -> None:
    watch = LoadWatch(60)
    watch.begin(0, specs, now=0)
    watch.on_exit(specs[0].queue, LOADING, b"")
    (note,) = watch.check({}, now=5)
    assert note.note == "the code of stage 'b' of workflow 'flow' is not loaded yet; waiting up to 60 s"
    assert not note.is_final
    assert watch.check({}, now=59) == []
    (report,) = watch.check({}, now=61)
    assert report.is_final
    assert not report.error


def test_a_wait_fails_with_the_reason_of_the_first_pool(specs: list[PoolSpec]) -> None:
    watch = LoadWatch(60)
    watch.begin(0, specs, now=0)
    watch.on_exit(specs[1].queue, UNLOADABLE, b"ValueError: x (file, line 3)")
    (report,) = watch.check({}, now=1)
    assert report.error.startswith(
        "stage 'b' of workflow 'flow': its code cannot be loaded in a worker: ValueError: x (file, line 3). "
        "A worker is another process, which imports the modules of the handlers again: compare what their import reads"
    )
    assert report.queues == [specs[1].queue]


def test_a_pool_without_workers_or_with_a_busy_predecessor_is_not_waited_for(specs: list[PoolSpec]) -> None:
    table = SlotTable.create(1)
    table[0].mark_loaded()
    table[0].mark_outdated()
    watch = LoadWatch(60)
    watch.begin(1, specs, now=0)
    lanes: dict[str, Any] = {specs[0].queue: [], specs[1].queue: [table[0]]}
    assert watch.check(lanes, now=0) == [], "the worker of an earlier version counts for nothing"
    table[0].begin(5, 0, 1)
    assert watch.check(lanes, now=0.1) == []
    (report,) = watch.check(lanes, now=0.5)
    assert report.is_final
    table.close()


# modules that change


def test_each_changed_module_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.py"
        path.write_text("x = 1")
        status = path.stat()
        files.append(SourceFile(name, os.fsencode(path), status.st_mtime_ns, status.st_size))
    now = 0.0
    watch = SourceWatch(files, clock=lambda: now)
    (tmp_path / "one.py").write_text("x = 222")
    watch.check(worker_starts=True)
    assert not caplog.records, "not looked at that often"
    now = 1.0
    watch.check()
    assert not caplog.records
    watch.check(worker_starts=True)
    (tmp_path / "two.py").unlink()
    now = 100.0
    watch.check()
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == ["module one"]


def test_only_modules_of_the_program_are_watched() -> None:
    modules = {source.module for source in loaded_sources()}
    assert __name__ in modules
    assert not modules & {"os", "pytest", "stageflow_actors", "stageflow_brokers.api"}


PROGRAM = """
import os, sys, time
import stages
from stageflow_actors import Runtime, Workflow
flow = Workflow("flow").add_stage(stages.flags, id="flags")
if __name__ == "__main__":
    with Runtime(flow, data_dir="data") as runtime:
        print(stages.flags({}) == runtime.execute(flow, {}, timeout=20).stages[0].data)
        with open("stages.py", "a") as file:
            file.write("# changed")
        time.sleep(0.6)
        runtime.scale(flow, "flags", 3)
        for _ in range(3):
            runtime.execute(flow, {}, timeout=20)
"""

STAGES = """
import sys
def flags(context):
    return [
        sys.flags.optimize, sys.flags.dev_mode, sys.flags.dont_write_bytecode, sys.flags.utf8_mode, sys.flags.safe_path,
        list(sys.warnoptions), sorted(map(str, sys._xoptions.items())), __debug__,
    ]
"""


def test_interpreter_flags_hold_in_workers_and_a_changed_module_is_reported(tmp_path: Path) -> None:
    (tmp_path / "stages.py").write_text(STAGES)
    (tmp_path / "program.py").write_text(PROGRAM)
    flags = ["-O", "-B", "-W", "error::DeprecationWarning", "-X", "dev", "-X", "utf8", "-X", "int_max_str_digits=5000"]
    done = subprocess.run(
        [sys.executable, *flags, "program.py"], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert done.stderr.count("module stages (") == 1, done.stderr
    assert not list(tmp_path.rglob("__pycache__"))
