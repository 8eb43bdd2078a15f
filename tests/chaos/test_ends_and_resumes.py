"""A cluster that is killed, interrupted or stopped resumes where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import Runtime, Workflow
from stageflow_actors.history.reader import HistoryReader

Row = dict[str, Any]

PROGRAM = """
import os, subprocess, sys, time
from stageflow_actors import Runtime, Workflow

data, log, count, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])

def note(*words):
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, (" ".join(map(str, words)) + "\\n").encode())
    os.close(fd)

work = Workflow("work")

@work.stage
def one(context):
    note("one", context["n"])
    if seconds > 20:
        subprocess.Popen(["sleep", "1000"])
    time.sleep(seconds)
    note("two", context["n"])

@work.stage
def three(context):
    note("three", context["n"])

with Runtime(work, data_dir=data) as runtime:
    rows = [{"n": n} for n in range(count)]
    for result in runtime.map(work, rows, key="n"):
        assert result.success, result.error
print("done")
"""


def finish(program: subprocess.Popen[str], timeout: float = 20) -> tuple[int, str, str]:
    out, err = program.communicate(timeout=timeout)
    return program.returncode, out, err


def test_nothing_of_a_cluster_lives_three_seconds_after_its_program_was_killed(
    launch: Any, cluster: Any, effects: Any, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    program = launch(PROGRAM, tmp_path / "data", effects.path, 3, 600)
    eventually(lambda: effects("one"), "work")
    eventually(lambda: len(cluster(program.pid).pidfds) >= 6, "node, broker, zygote, two workers and a child")
    alive = cluster(program.pid)
    program.kill()
    assert alive.end_within(3.0) == []


def test_a_program_killed_in_its_work_resumes_on_the_same_directory_without_a_wait_or_a_loss(
    launch: Any, effects: Any, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    program = launch(PROGRAM, tmp_path / "data", effects.path, 30, 0.02)
    eventually(lambda: len(effects("three")) >= 5, "some work")
    program.kill()
    program.wait()
    code, out, err = finish(launch(PROGRAM, tmp_path / "data", effects.path, 30, 0.02))
    assert (code, out) == (0, "done\n"), err
    assert "resuming" in err
    assert sorted({int(n) for (n,) in effects("three")}) == list(range(30))
    assert len(effects("one")) <= 31, "only the one in work runs again"


def test_ctrl_c_waits_for_the_stage_in_work_ends_everything_and_the_rest_resumes(
    launch: Any, cluster: Any, effects: Any, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    program = launch(PROGRAM, tmp_path / "data", effects.path, 5, 0.5)
    eventually(lambda: effects("one"), "work")
    alive = cluster(program.pid)
    os.killpg(program.pid, signal.SIGINT)
    code, out, err = finish(program)
    assert code == -signal.SIGINT, "as any program that was interrupted"
    assert out == ""
    assert err.count("KeyboardInterrupt") == 1, err
    assert alive.end_within(0.5) == [], "it has waited for all of them"
    assert len(effects("one")) == len(effects("two")) > 0, "what was in work was let finish"
    assert len(effects("one")) < 5

    code, out, err = finish(launch(PROGRAM, tmp_path / "data", effects.path, 5, 0.01))
    assert (code, out) == (0, "done\n"), err
    assert sorted(int(n) for (n,) in effects("one")) == list(range(5)), "nothing ran twice"


def test_a_second_ctrl_c_kills_what_is_in_work(
    launch: Any, cluster: Any, effects: Any, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    program = launch(PROGRAM, tmp_path / "data", effects.path, 2, 600)
    eventually(lambda: effects("one"), "work")
    eventually(lambda: len(cluster(program.pid).pidfds) >= 6, "node, broker, zygote, two workers and a child")
    alive = cluster(program.pid)
    os.killpg(program.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.5)
    os.killpg(program.pid, signal.SIGINT)
    began = time.monotonic()
    code, _, err = finish(program)
    assert code == -signal.SIGINT, err
    assert time.monotonic() - began < 3
    assert alive.end_within(0.5) == []


waiting: Workflow[Row] = Workflow("waiting")


@waiting.stage(actors=2)
def wait(context: Row) -> None:
    with open(context["log"], "a") as file:
        file.write(f"ran {context['n']}\n")
    time.sleep(context["seconds"])


def test_after_a_graceful_stop_nothing_runs_and_every_end_is_in_the_history(
    cluster: Any, effects: Any, tmp_path: Path
) -> None:
    runtime = Runtime(waiting, data_dir=tmp_path / "data").start()
    instances = runtime.submit_many(waiting, [{"log": effects.path, "n": n, "seconds": 0.0} for n in range(500)])
    for instance in instances:
        instance.result(timeout=10)
    alive = cluster()
    runtime.stop()
    assert alive.end_within(0.5) == []
    with HistoryReader.open(tmp_path / "data" / "history.db") as history:
        assert sum(history.count().values()) == 500
    assert not (tmp_path / "data" / "cluster.json").exists()
    runtime.stop()  # does nothing


def test_grace_bounds_how_long_a_stop_waits_and_charges_no_message(
    cluster: Any, effects: Any, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    runtime = Runtime(waiting, data_dir=tmp_path / "data").start()
    instance = runtime.submit(waiting, {"log": effects.path, "n": 0, "seconds": 1.2}, instance_id="long")
    eventually(lambda: effects("ran"), "work")
    alive = cluster()
    began = time.monotonic()
    runtime.stop(grace=0.1)
    assert time.monotonic() - began < 1.0
    assert alive.end_within(0.5) == []
    with Runtime(waiting, data_dir=tmp_path / "data") as again:
        result = again.instance("long").result(timeout=10)
    assert result.success
    assert result.stages[0].attempts == 1, "a stop is neither a death nor an attempt"
    assert len(effects("ran")) == 2
    assert instance.id == "long"


def test_a_stop_waits_for_stages_in_work_even_while_the_broker_is_killed(
    cluster: Any, effects: Any, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    runtime = Runtime(waiting, data_dir=tmp_path / "data").start()
    rows = [{"log": effects.path, "n": n, "seconds": 2.0 if n < 2 else 0.0} for n in range(6)]
    runtime.submit_many(waiting, rows, instance_ids=[f"i{n}" for n in range(6)])
    eventually(lambda: len(effects("ran")) == 2, "two in work")
    alive = cluster()
    stopping = threading.Thread(target=runtime.stop)
    stopping.start()
    alive.brokers[0].kill()
    # Again after the successor of the first one was notified that deliveries stop: the next one needs the notice too.
    second = eventually(lambda: next((p for p in cluster().brokers if p != alive.brokers[0]), None), "another broker")
    eventually(lambda: {queue.state for queue in runtime.queues()} == {"open"}, "its queues open")
    second.kill()
    stopping.join(15)
    assert not stopping.is_alive()
    assert alive.end_within(0.5) == []
    assert len(effects("ran")) == 2, "nothing more is begun by a cluster that is about to stop"
    with Runtime(waiting, data_dir=tmp_path / "data") as again:
        for n in range(6):
            assert again.instance(f"i{n}").result(timeout=10).success
    assert len(effects("ran")) == 6, "what was in work had been let finish and was settled"


def test_the_thread_that_started_a_runtime_may_end(effects: Any, tmp_path: Path) -> None:
    runtime = Runtime(waiting, data_dir=tmp_path / "data")
    starter = threading.Thread(target=runtime.start)
    starter.start()
    starter.join()
    assert runtime.execute(waiting, {"log": effects.path, "n": 0, "seconds": 0.3}, timeout=10).success
    runtime.stop()
