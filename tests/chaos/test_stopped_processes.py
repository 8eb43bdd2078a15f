"""Processes of a cluster that are stopped by SIGSTOP: their dependents continue without them, or end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from stageflow_actors import Runtime, Workflow
from stageflow_actors.diagnostics import health
from stageflow_actors.runtime import node_handle
from stageflow_actors.runtime.ipc import stop_notes
from stageflow_actors.runtime.ipc.slots import SlotTable
from stageflow_actors.runtime.node.pool import UNREPORTED_NS

Row = dict[str, Any]

PATIENT = 20.0
"""Seconds: more than anything here may take."""

brittle: Workflow[Row] = Workflow("brittle")


@brittle.stage(timeout=0.5)
def die_once(context: Row) -> None:
    with open(context["log"], "a") as file:
        file.write(f"run {os.getpid()}\n")
    if not os.path.exists(context["log"] + ".died"):
        open(context["log"] + ".died", "w").close()
        os._exit(3)


lengthy: Workflow[Row] = Workflow("lengthy")


@lengthy.stage(timeout=60)
def take_long(context: Row) -> None:
    with open(context["log"], "a") as file:
        file.write("run 0\n")
    time.sleep(30)


hasty: Workflow[Row] = Workflow("hasty")


@hasty.stage(timeout=0.3)
def hang(context: Row) -> None:
    with open(context["log"], "a") as file:
        file.write("run 0\n")
    time.sleep(30)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def runtime(data: Path, eventually: Callable[..., Any]) -> Iterator[Runtime]:
    runtime = Runtime(brittle, lengthy, hasty, data_dir=data).start()
    eventually(lambda: sum(queue.actors for queue in runtime.queues() if ".stage" in queue.name) == 3, "all workers")
    yield runtime
    runtime.stop(grace=0.0)


def is_dead(pid: str) -> bool:
    try:
        return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_worker_that_has_died_is_not_judged_by_a_timeout_that_passed_since(
    runtime: Runtime, data: Path, cluster: Any, effects: Any, eventually: Callable[..., Any]
) -> None:
    zygote = cluster(data=data).zygotes[0]
    zygote.suspend()
    instance = runtime.submit(brittle, {"log": effects.path})
    eventually(lambda: [pid for (pid,) in effects("run") if is_dead(pid)], "the first attempt's death")
    died = time.monotonic()
    eventually(lambda: time.monotonic() > died + 0.8, "the end of its timeout")
    zygote.resume()
    result = instance.result(timeout=PATIENT)
    assert (result.status, result.stages[0].attempts) == ("completed", 2), result.error


def test_a_death_that_a_stopped_zygote_does_not_report_is_detected(
    runtime: Runtime, data: Path, cluster: Any, effects: Any
) -> None:
    before = cluster(data=data)
    before.zygotes[0].suspend()
    began = time.monotonic()
    result = runtime.execute(brittle, {"log": effects.path}, timeout=PATIENT)
    assert (result.status, result.stages[0].attempts) == ("completed", 2), result.error
    assert time.monotonic() - began > UNREPORTED_NS / 1e9
    assert before.zygotes[0].pid not in [zygote.pid for zygote in cluster(data=data).zygotes]
    assert health.examine(data) == []


def test_a_stage_that_hangs_while_the_zygote_is_stopped_fails_by_its_timeout(
    runtime: Runtime, data: Path, cluster: Any, effects: Any
) -> None:
    cluster(data=data).zygotes[0].suspend()
    result = runtime.execute(hasty, {"log": effects.path}, timeout=PATIENT)
    assert result.status == "failed"
    assert "StageTimeout" in (result.error or "")
    assert len(effects("run")) == 1


def test_a_worker_that_dies_while_it_has_nothing_to_do_is_missed_too(
    runtime: Runtime, data: Path, cluster: Any, eventually: Callable[..., Any]
) -> None:
    before = cluster(data=data)
    before.zygotes[0].suspend()
    before.workers[0].kill()
    eventually(
        lambda: [zygote for zygote in cluster(data=data).zygotes if zygote.pid != before.zygotes[0].pid],
        "another zygote",
    )
    eventually(lambda: len(cluster(data=data).workers) == len(before.workers), "as many workers as before")


def test_health_knows_of_processes_that_are_stopped(
    runtime: Runtime, data: Path, cluster: Any, eventually: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FAULT_CONFIRM_SECONDS", 0.2)
    alive = cluster(data=data)
    for kind, part in (("zygotes", "zygote"), ("nodes", "node")):
        process = getattr(alive, kind)[0]
        process.suspend()
        try:
            eventually(lambda process=process: process.status() == psutil.STATUS_STOPPED, "its stop")
            found = [fault for fault in health.examine(data) if fault.part == part]
        finally:
            process.resume()
        assert [str(process.pid) in fault.text and "stopped" in fault.text for fault in found] == [True]
    assert health.examine(data) == []


@pytest.mark.parametrize("kind", ["brokers", "nodes", "zygotes"])
def test_a_stop_with_a_grace_ends_whatever_is_stopped(
    runtime: Runtime,
    data: Path,
    cluster: Any,
    effects: Any,
    eventually: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    if kind == "nodes":
        monkeypatch.setattr(node_handle, "STOP_MARGIN_SECONDS", 1.0)  # only the program can know then
    instance = runtime.submit(lengthy, {"log": effects.path})
    eventually(lambda: effects("run"), "work")
    alive = cluster(data=data)
    getattr(alive, kind)[0].suspend()
    began = time.monotonic()
    runtime.stop(grace=0.5)
    assert time.monotonic() - began < 0.5 + 10.0
    assert alive.end_within(3.0) == []
    again = Runtime(brittle, lengthy, hasty, data_dir=data).start()
    try:
        assert str(again.instance(instance.id).status()) in ("pending", "running")
    finally:
        again.stop(grace=0.0)


def test_without_a_grace_what_is_in_work_is_waited_for(runtime: Runtime, effects: Any) -> None:
    open(effects.path + ".died", "w").close()
    instances = runtime.submit_many(brittle, [{"log": effects.path} for _ in range(20)])
    for instance in instances:
        assert instance.result(timeout=PATIENT).success
    began = time.monotonic()
    runtime.stop()
    assert time.monotonic() - began < PATIENT


held: Workflow[Row] = Workflow("held").add_stage(lambda context: None, id="s")


def test_the_pause_of_a_person_outlives_the_cluster_and_is_reported(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = "stageflow.held.stage0"
    runtime = Runtime(held, data_dir=data).start()
    runtime.pause(queue)
    instance = runtime.submit(held, {})
    runtime.stop(grace=0.0)
    capsys.readouterr()
    runtime = Runtime(held, data_dir=data).start()
    try:
        assert {q.name: q.state for q in runtime.queues() if q.state != "open"} == {queue: "paused"}
        runtime.resume(queue)
        assert runtime.instance(instance.id).result(timeout=PATIENT).success
    finally:
        runtime.stop(grace=0.0)
    told = [line for line in capsys.readouterr().err.splitlines() if "is paused and holds" in line]
    assert len(told) == 1
    assert f"queue {queue} is paused" in told[0]


LEAVING = """
import sys, time
from stageflow_actors import Runtime, Workflow

work = Workflow("work")

@work.stage(timeout=600)
def long(context):
    with open(context["log"], "a") as file:
        file.write("run 0\\n")
    time.sleep(600)

with Runtime(work, data_dir=sys.argv[1]) as runtime:
    try:
        runtime.execute(work, {"log": sys.argv[2]})
    except KeyboardInterrupt:
        print("leaving", file=sys.stderr, flush=True)
        raise
"""

WAITS = {
    "": "running handlers: stageflow.work.stage0 (1 message, for ",
    "brokers": "the broker (process {pid}), which is stopped: `kill -CONT {pid}` resumes it",
    "nodes": "the node (process {pid}), which is stopped: `kill -CONT {pid}` resumes it",
    "nodes brokers zygotes": "the node (process {pid}), which is stopped",
}


@pytest.mark.parametrize("kinds", WAITS, ids=lambda kinds: kinds or "nothing stopped")
def test_a_stop_prints_what_it_waits_for_and_a_second_ctrl_c_ends_what_is_stopped(
    launch: Any, cluster: Any, effects: Any, data: Path, eventually: Callable[..., Any], kinds: str
) -> None:
    program = launch(LEAVING, data, effects.path)
    eventually(lambda: effects("run"), "work")
    alive = cluster(program.pid)
    stopped = [getattr(alive, kind)[0] for kind in kinds.split()]
    for process in stopped:
        process.suspend()
    program.send_signal(signal.SIGINT)
    said = next(line for line in program.stderr if "the stop waits for" in line)
    assert WAITS[kinds].format(pid=stopped[0].pid if stopped else 0) in said
    program.send_signal(signal.SIGINT)
    assert program.wait(PATIENT) == -signal.SIGINT
    assert "still running" not in program.stderr.read()
    assert alive.end_within(3.0) == []


def test_a_zygote_that_is_stopped_does_not_outlive_a_cluster_that_is_ended_at_once(
    launch: Any, cluster: Any, effects: Any, data: Path, eventually: Callable[..., Any]
) -> None:
    program = launch(LEAVING, data, effects.path)
    eventually(lambda: effects("run"), "work")
    alive = cluster(program.pid)
    alive.zygotes[0].suspend()
    program.send_signal(signal.SIGINT)
    assert program.stderr.readline() == "leaving\n"
    # A second Ctrl-C before the stop has begun would only interrupt the handling of the first one.
    assert "the stop waits for running handlers" in program.stderr.readline()
    program.send_signal(signal.SIGINT)
    assert program.wait(PATIENT) == -signal.SIGINT
    assert alive.end_within(3.0) == []


def test_what_a_stop_waits_for_is_printed_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [100.0], []
    monkeypatch.setattr(stop_notes.time, "monotonic", lambda: now[0])
    notes = stop_notes.StopNotes(said.append)
    for seconds in range(2 * int(stop_notes.NOTE_INTERVAL_SECONDS)):
        now[0] = 100.0 + seconds
        notes.wait_for(lambda: "" if now[0] < 110.0 else f"what it waits for at {now[0]:g}")
    assert [line.split(";")[0] for line in said] == [
        "the stop waits for what it waits for at 110",
        "the stop waits for what it waits for at 170",
    ]


def test_what_is_in_work_is_named_by_queue_the_longest_first() -> None:
    with contextlib.closing(SlotTable.create(10)) as slots:
        lanes = [slots.lanes(number, 1) for number in range(10)]
        assert stop_notes.describe_work({"q": lanes[0]}, 0) == "messages that workers have not settled yet"
        for number, (lane,) in enumerate(lanes):
            lane.begin(number, 0, 90_000_000_000 - number * 1_000_000_000)
        queues = {f"q{number}": lanes[number] for number in range(8)} | {"r": lanes[8] + lanes[9]}
        words = stop_notes.describe_work(queues, 100_000_000_000)
    assert words == (
        "running handlers: r (2 messages, for 19 s), q7 (1 message, for 17 s), q6 (1 message, for 16 s), "
        "q5 (1 message, for 15 s), q4 (1 message, for 14 s) and 4 more queues"
    )
