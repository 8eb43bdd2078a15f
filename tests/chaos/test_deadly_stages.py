"""Stages that crash, hang, hold the interpreter or run long: which message is charged, and which is unaffected."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import Runtime, StageContext, Workflow

Row = dict[str, Any]


def note(context: Row, *words: object) -> None:
    fd = os.open(context["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, (" ".join(map(str, words)) + "\n").encode())
    os.close(fd)


deadly: Workflow[Row] = Workflow("deadly")


@deadly.stage
def prepare(context: Row) -> None:
    note(context, "prepare", context["n"])


@prepare.compensation
def clean_up(context: Row) -> None:
    note(context, "clean-up", context["n"])


@deadly.stage
def touch_and_go(context: Row) -> None:
    note(context, "run", context["n"], os.getpid())
    if context.get("deadly"):
        ctypes.string_at(0)


@deadly.stage
def conclude(context: Row) -> None:
    note(context, "conclude", context["n"])


harmless: Workflow[Row] = Workflow("harmless")


@harmless.stage
def greet(context: Row) -> None:
    note(context, "greet", os.getpid())


hanging: Workflow[Row] = Workflow("hanging")


@hanging.stage(timeout=0.4)
def hang(context: Row) -> None:
    note(context, "run", context["n"])
    if context.get("hang"):
        child = subprocess.Popen(["sleep", "1000"], process_group=0)
        note(context, "child", child.pid)
        ctypes.PyDLL(None).sleep(1000)  # in C, with the interpreter's lock


lengthy: Workflow[Row] = Workflow("lengthy")


@lengthy.stage(actors=2)
def take_time(context: Row) -> None:
    time.sleep(context["seconds"])
    note(context, "done", context["n"], os.getpid())


recycled: Workflow[Row] = Workflow("recycled")


@recycled.stage(max_tasks=3, actors=2)
def few(context: Row) -> None:
    note(context, "run", context["n"], os.getpid())


undone: Workflow[Row] = Workflow("undone")


@undone.stage
def first(context: Row) -> None:
    pass


@first.compensation
def undo_first(context: Row) -> None:
    note(context, "undo", "first")


@undone.stage
def second(context: Row) -> None:
    pass


@second.compensation
def undo_second(context: Row, ctx: StageContext) -> None:
    note(context, "undo", "second")
    os.abort()


@undone.stage
def third(context: Row) -> None:
    raise ValueError("no")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    workflows = (deadly, harmless, hanging, lengthy, recycled, undone)
    runtime = Runtime(*workflows, data_dir=tmp_path_factory.mktemp("data")).start()
    yield runtime
    runtime.stop(grace=0.0)


def deepen(runtime: Runtime, workflow: Workflow[Row], log: str, **more: object) -> None:
    """Short messages until the workers of a stage take many at once."""
    rows = [{"log": log, "n": -1, **more} for _ in range(400)]
    assert all(result.success for result in runtime.map_unordered(workflow, rows))


def queue_at_once(runtime: Runtime, workflow: Workflow[Row], stage: int, rows: list[Row]) -> list[Any]:
    """Instances that all wait in one queue before the first of them is delivered."""
    name = f"stageflow.{workflow.id}.stage{stage}"
    runtime.pause(name)
    instances = runtime.submit_many(workflow, rows)
    while next(queue.ready for queue in runtime.queues(name)) < len(rows):
        pass
    runtime.resume(name)
    return instances


def test_a_stage_that_segfaults_each_time_becomes_a_dead_letter_and_no_other_message_is_charged(
    runtime: Runtime, effects: Any
) -> None:
    deepen(runtime, deadly, effects.path)
    rows = [{"log": effects.path, "n": n, "deadly": n == 25} for n in range(50)]
    instances = queue_at_once(runtime, deadly, 1, rows)
    beside = [runtime.execute(harmless, {"log": effects.path}, timeout=5) for _ in range(20)]
    results = [instance.result(timeout=20) for instance in instances]

    assert len(effects("run", 25)) == 3, "as many deaths as max_stage_retries allows"
    dead = results.pop(25)
    assert dead.status == "compensated"
    assert dead.failed_stage == "touch-and-go"
    assert dead.error is not None
    assert "WorkerDied" in dead.error
    assert "SIGSEGV" in dead.error
    assert [(c.stage_id, str(c.status)) for c in dead.compensations] == [("prepare", "completed")]
    assert len(effects("clean-up")) == 1
    assert {str(result.status) for result in results} == {"completed"}
    assert {stage.attempts for result in results for stage in result.stages} == {1}, "neighbours are not charged"
    queue = next(queue for queue in runtime.queues("stageflow.deadly.stage1"))
    assert (queue.dead, queue.ready, queue.leased, queue.state) == (1, 0, 0, "open")
    assert all(result.success for result in beside)
    assert len({pid for (pid,) in effects("greet")}) == 1, "the workers of another workflow go on undisturbed"


def test_a_stage_that_hangs_in_c_is_killed_at_its_timeout_with_its_children(
    runtime: Runtime, effects: Any, eventually: Callable[..., Any]
) -> None:
    deepen(runtime, hanging, effects.path)
    rows = [{"log": effects.path, "n": n, "hang": n == 5} for n in range(12)]
    began = time.monotonic()
    instances = queue_at_once(runtime, hanging, 0, rows)
    results = [instance.result(timeout=20) for instance in instances]
    took = time.monotonic() - began

    hung = results.pop(5)
    assert hung.status == "failed"
    assert hung.error is not None
    assert "StageTimeout" in hung.error
    assert "0.4 s" in hung.error
    assert len(effects("run", 5)) == 1, "without a policy a timeout is final"
    assert 0.4 < took < 5
    assert {str(result.status) for result in results} == {"completed"}
    assert {stage.attempts for result in results for stage in result.stages} == {1}
    ((child,),) = effects("child")
    eventually(lambda: not os.path.exists(f"/proc/{child}") or _is_zombie(child), "the end of the stage's child", 3.0)


def _is_zombie(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


BUSY_PROGRAM = """
import ctypes, os, sys, time
from stageflow_actors import Runtime, Workflow

data, log = sys.argv[1:]
once = Workflow("once")

def note(*words):
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, (" ".join(map(str, words)) + "\\n").encode())
    os.close(fd)

@once.stage
def die_once(context):
    mark = f"{log}.{context['n']}"
    note("began", context["n"], time.monotonic())
    if not os.path.exists(mark):
        open(mark, "w").close()
        time.sleep(0.2)
        note("died", context["n"], time.monotonic())
        os._exit(7)

with Runtime(once, data_dir=data) as runtime:
    instances = runtime.submit_many(once, [{"n": n} for n in range(3)])
    began = time.monotonic()
    ctypes.PyDLL(None).sleep(2)  # with the interpreter's lock: nothing else of this program runs, not even a thread
    note("busy", began, time.monotonic())
    for instance in instances:
        result = instance.result(timeout=10)
        assert result.success and result.stages[0].attempts == 2, result
print("done")
"""


def test_a_worker_that_exits_once_is_replaced_and_its_message_delivered_within_200_ms_whatever_the_program_does(
    launch: Any, effects: Any, tmp_path: Path
) -> None:
    out, err = launch(BUSY_PROGRAM, tmp_path / "data", effects.path).communicate(timeout=30)
    assert out == "done\n", err
    ((began, ended),) = effects("busy")
    gaps = []
    for n in range(3):
        ((died,),) = effects("died", n)
        again = effects("began", n)[1][0]
        if float(began) < float(died) < float(again) < float(ended):
            gaps.append(float(again) - float(died))
    assert gaps, "none of it happened while the program held the lock"
    assert min(gaps) < 0.2, f"whatever else this machine has to do: {gaps}"


def test_a_long_message_does_not_hold_back_its_prefetched_neighbours(
    runtime: Runtime, effects: Any, eventually: Callable[..., Any]
) -> None:
    deepen(runtime, lengthy, effects.path, seconds=0)
    rows = [{"log": effects.path, "n": n, "seconds": 3.0 if n == 2 else 0} for n in range(40)]
    instances = queue_at_once(runtime, lengthy, 0, rows)
    del instances[2]
    for instance in instances:
        assert instance.result(timeout=2).success, "whatever waits behind a long message is worked on by others"
    assert not effects("done", 2), "the long one is still in work"
    eventually(lambda: effects("done", 2), "the end of the long message")
    assert len(effects("done")) == 400 + 40, "what was called back ran once"


def test_what_was_done_before_a_long_message_is_handed_on_while_it_runs(runtime: Runtime, effects: Any) -> None:
    runtime.scale(lengthy, "take-time", 1)
    deepen(runtime, lengthy, effects.path, seconds=0)
    rows = [{"log": effects.path, "n": n, "seconds": 1.5 if n == 4 else 0} for n in range(5)]
    instances = queue_at_once(runtime, lengthy, 0, rows)
    for instance in instances[:4]:
        assert instance.result(timeout=1).success
    assert not effects("done", 4)
    assert instances[4].result(timeout=5).success
    runtime.scale(lengthy, "take-time", 2)


def test_a_worker_is_recycled_after_max_tasks_and_nothing_runs_twice(runtime: Runtime, effects: Any) -> None:
    rows = [{"log": effects.path, "n": n} for n in range(30)]
    assert all(result.success for result in runtime.map(recycled, rows))
    runs = effects("run")
    assert sorted(int(n) for n, _ in runs) == list(range(30))
    per_worker = [sum(pid == each for _, pid in runs) for each in {pid for _, pid in runs}]
    assert max(per_worker) <= 3
    assert len(per_worker) >= 10


def test_a_compensation_that_kills_its_worker_each_time_does_not_stop_the_others(
    runtime: Runtime, effects: Any
) -> None:
    result = runtime.execute(undone, {"log": effects.path}, timeout=20)
    assert result.status == "compensation_failed"
    assert [(c.stage_id, str(c.status)) for c in result.compensations] == [("second", "failed"), ("first", "completed")]
    assert "SIGABRT" in (result.compensations[0].error or "")
    assert effects("undo") == [["second"]] * 3 + [["first"]]


def test_a_pool_is_scaled_up_down_to_nothing_and_up_again(
    runtime: Runtime, effects: Any, eventually: Callable[..., Any]
) -> None:
    def actors() -> int:
        return next(queue.actors for queue in runtime.queues("stageflow.lengthy.stage0"))

    runtime.scale(lengthy, "take-time", 4)
    eventually(lambda: actors() == 4, "four actors")
    rows = [{"log": effects.path, "n": n, "seconds": 0.3} for n in range(4)]
    began = time.monotonic()
    assert all(result.success for result in runtime.map(lengthy, rows))
    assert time.monotonic() - began < 0.9, "four at once"
    assert len({pid for _, pid in effects("done")}) == 4
    runtime.scale(lengthy, "take-time", 0)
    eventually(lambda: actors() == 0, "no actors")
    waiting = runtime.submit(lengthy, {"log": effects.path, "n": 9, "seconds": 0})
    with pytest.raises(TimeoutError):
        waiting.result(timeout=0.3)
    runtime.scale(lengthy, "take-time", 2)
    assert waiting.result(timeout=5).success
