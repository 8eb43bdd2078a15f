"""Stages that harm their own process: each result states the true cause, and no other stage is disturbed."""

from __future__ import annotations

import asyncio
import ctypes
import locale
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from script_runner import run_script

from stageflow_actors import Runtime, Stage, Workflow, WorkflowResult
from stageflow_actors.runtime.system.processes import session_members

Row = dict[str, Any]
Handler = Callable[[Row], Any]


def times_run(context: Row) -> int:
    """How often the handler has begun with this message, this time included."""
    with open(context["mark"], "a") as file:
        file.write("x")
    return os.path.getsize(context["mark"])


def only_the_first_time(handler: Handler) -> Handler:
    def once(context: Row) -> Any:
        if times_run(context) == 1:
            handler(context)
        return os.getpid()

    return once


# deaths


def segfault(context: Row) -> None:
    ctypes.string_at(0)


def leave(context: Row) -> None:
    sys.stderr.write("what was left undone\nis written here\n")
    os._exit(9)


def abort(context: Row) -> None:
    os.abort()


def shoot_itself(context: Row) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Matryoshka:
    def __repr__(self) -> str:
        return repr([self])


def overflow_the_c_stack(context: Row) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(1_000_000_000)
    repr(Matryoshka())


def close_every_descriptor(context: Row) -> None:
    os.closerange(0, 4096)


def close_and_reuse_every_descriptor(context: Row) -> None:
    os.closerange(3, 4096)
    for _ in range(300):
        os.pipe()


def close_streams_and_descriptors(context: Row) -> None:
    sys.stderr.close()
    sys.stdout.close()
    os.closerange(3, 4096)


DEATHS: dict[Handler, tuple[str, ...]] = {
    segfault: ("SIGSEGV (segmentation fault)", "Fatal Python error: Segmentation fault", "in segfault"),
    leave: ("exit code 9", "stderr:\nwhat was left undone\nis written here"),
    abort: ("SIGABRT (abort)", "Fatal Python error: Aborted", "in abort"),
    shoot_itself: ("SIGKILL",),
    overflow_the_c_stack: ("SIGSEGV", "Fatal Python error: Segmentation fault", "in __repr__"),
    close_every_descriptor: (),
    close_and_reuse_every_descriptor: (),
    close_streams_and_descriptors: (),
}


# failures


class Unserialisable:
    pass


def huge_result(context: Row) -> bytes:
    return bytes(64 << 20)


def huge_context(context: Row) -> None:
    context["much"] = ["x" * 1000] * 50_000


def unserialisable_result(context: Row) -> Any:
    return {"it": Unserialisable()}


def socket_in_the_context(context: Row) -> None:
    context["connection"] = socket.socket()


def result_in_itself(context: Row) -> Any:
    inner: list[Any] = []
    inner.append(inner)
    return inner


def system_exit(context: Row) -> None:
    sys.exit("enough")


def interrupted(context: Row) -> None:
    raise KeyboardInterrupt


def interrupts_itself(context: Row) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


def cancelled(context: Row) -> None:
    raise asyncio.CancelledError


def generator_exit(context: Row) -> None:
    raise GeneratorExit


def recursion_without_end(context: Row) -> Any:
    return recursion_without_end(context)


class Nameless(Exception):
    def __str__(self) -> str:
        raise SystemExit(4)


def error_without_a_text(context: Row) -> None:
    raise Nameless


def error_of_ten_megabytes(context: Row) -> None:
    raise ValueError("x" * 10_000_000)


FAILURES: dict[Handler, tuple[str, ...]] = {
    huge_result: ("PayloadTooLarge", "'hostile'", "max_message_bytes"),
    huge_context: ("PayloadTooLarge", "'hostile'", "max_message_bytes"),
    unserialisable_result: ("'hostile'", "Unserialisable"),
    socket_in_the_context: ("'hostile'", "connection"),
    result_in_itself: ("'hostile'",),
    system_exit: ("SystemExit: enough",),
    interrupted: ("KeyboardInterrupt",),
    interrupts_itself: ("KeyboardInterrupt",),
    cancelled: ("CancelledError",),
    generator_exit: ("GeneratorExit",),
    recursion_without_end: ("RecursionError",),
    error_without_a_text: ("Nameless",),
    error_of_ten_megabytes: ("ValueError: xxx",),
}


# what can be lived with


def hold_the_interpreter(context: Row) -> None:
    ctypes.PyDLL(None).sleep(3)


def close_the_low_descriptors(context: Row) -> None:
    os.closerange(0, 51)


def let_threads_run(context: Row) -> None:
    threading.Thread(target=time.sleep, args=(1000,), daemon=False).start()
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()


def close_its_streams(context: Row) -> None:
    sys.stdout.close()
    sys.stderr.close()
    sys.stdin.close()


def take_its_streams_away(context: Row) -> None:
    sys.stdout = sys.stderr = None  # type: ignore[assignment]


def change_the_world(context: Row) -> None:
    os.chdir("/")
    os.umask(0o777)
    locale.setlocale(locale.LC_ALL, "C")
    os.environ.clear()
    sys.path.clear()
    sys.setrecursionlimit(100)
    resource.setrlimit(resource.RLIMIT_NOFILE, (10, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def ignore_all_signals(context: Row) -> None:
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    assert subprocess.run(["true"], check=False).returncode == 0


def ask_the_parent_to_end(context: Row) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(os.getppid(), number)


def ask_its_group_to_end(context: Row) -> None:
    """Programs that it has started and processes that it has forked end; the worker is stopped by its node only."""
    program = subprocess.Popen(["sleep", "1000"])
    ready, theirs = os.pipe()
    forked = os.fork()
    if forked == 0:
        os.write(theirs, b"x")
        time.sleep(1000)
    os.read(ready, 1)
    for number in (signal.SIGTERM, signal.SIGHUP):
        os.killpg(0, number)
    assert program.wait() == -signal.SIGTERM
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == -signal.SIGTERM


SURVIVED = [
    hold_the_interpreter,
    close_the_low_descriptors,
    let_threads_run,
    close_its_streams,
    take_its_streams_away,
    change_the_world,
    ignore_all_signals,
    ask_the_parent_to_end,
    ask_its_group_to_end,
]


def leave_children(context: Row) -> dict[str, int]:
    pipe, theirs = os.pipe()
    plain = subprocess.Popen(["sleep", "1000"]).pid
    own_group = subprocess.Popen(["sleep", "1000"], process_group=0).pid
    forked = os.fork()
    if forked == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(theirs, b"x")
        signal.pause()
    os.read(pipe, 1)
    return {"worker": os.getpid(), "plain": plain, "own_group": own_group, "forked": forked}


def leave_children_or_end(context: Row) -> dict[str, int]:
    if times_run(context) == 2:
        os._exit(0)
    return leave_children(context)


def leave_a_brood(context: Row) -> int:
    """Children in a process group of their own, which have children, and go on having some."""
    if times_run(context) == 2:
        os._exit(0)
    if os.fork() == 0:
        os.setpgid(0, 0)
        for _ in range(4):
            os.fork()
        for _ in range(10):
            if os.fork() == 0:
                signal.pause()
            time.sleep(0.05)
        signal.pause()
    return os.getpid()


def stop_itself(context: Row) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang_with_children(context: Row) -> None:
    away = subprocess.Popen(["sleep", "1000"], start_new_session=True).pid
    Path(context["mark"]).write_text(str(away))
    sys.stderr.write("waiting for nothing\n")
    ctypes.PyDLL(None).sleep(1000)


def daemonise(context: Row) -> int:
    pipe, theirs = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(theirs, str(os.getpid()).encode())
            os.write(2, b"a daemon\n")
            signal.pause()
        os._exit(0)
    os.wait()
    return int(os.read(pipe, 20))


def shoot_the_parent(context: Row) -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def where_am_i(context: Row) -> dict[str, Any]:
    umask = os.umask(0o022)
    os.umask(umask)
    return {"cwd": os.getcwd(), "umask": umask, "home": os.environ.get("HOSTILE_HOME")}


def nothing(context: Row) -> None:
    pass


def workflow_of(handler: Handler, name: str = "", **options: Any) -> Workflow[Row]:
    return Workflow(name or handler.__name__.replace("_", "-")).add_stage(Stage(handler, id="hostile", **options))


WORKFLOWS: dict[Handler, Workflow[Row]] = {
    **{handler: workflow_of(handler) for handler in (*DEATHS, *FAILURES)},
    **{handler: workflow_of(only_the_first_time(handler), handler.__name__) for handler in SURVIVED},
    **{handler: workflow_of(handler) for handler in (leave_children_or_end, leave_a_brood, daemonise, where_am_i)},
    stop_itself: workflow_of(stop_itself, timeout=0.5),
    hang_with_children: workflow_of(hang_with_children, timeout=0.5),
    shoot_the_parent: workflow_of(only_the_first_time(shoot_the_parent), "shoot-the-parent"),
}
others_work: Workflow[Row] = Workflow("others").add_stage(nothing)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    os.environ["HOSTILE_HOME"] = "here"
    runtime = Runtime(*WORKFLOWS.values(), others_work, data_dir=tmp_path_factory.mktemp("data"))
    runtime.start()
    del os.environ["HOSTILE_HOME"]
    yield runtime
    began = time.monotonic()
    runtime.stop(grace=0.0)
    assert time.monotonic() - began < 10, "whatever the workers have done to themselves"


@pytest.fixture(scope="module")
def others(runtime: Runtime, others_of: Callable[..., Any]) -> Iterator[Any]:
    others = others_of(runtime, others_work)
    yield others
    others.stop()


@pytest.fixture
def run(runtime: Runtime, others: Any, tmp_path: Path) -> Callable[[Handler], WorkflowResult[Row]]:
    def run_beside_others(handler: Handler, mark: str = "mark") -> WorkflowResult[Row]:
        with others.go_on():
            return runtime.execute(WORKFLOWS[handler], {"mark": str(tmp_path / mark)}, timeout=30)

    return run_beside_others


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("handler", DEATHS, ids=lambda handler: handler.__name__)
def test_a_stage_that_ends_its_worker_is_a_death_with_its_exit_and_its_last_output(
    run: Callable[[Handler], WorkflowResult[Row]], handler: Handler
) -> None:
    result = run(handler)
    assert result.status == "failed"
    assert result.failed_stage == "hostile"
    assert result.stages[0].attempts == 3
    assert result.error is not None
    assert result.error.startswith("WorkerDied: the worker died while running stage 'hostile': ")
    for words in DEATHS[handler]:
        assert words in result.error


@pytest.mark.parametrize("handler", FAILURES, ids=lambda handler: handler.__name__)
def test_a_stage_that_raises_or_returns_what_it_should_not_fails_and_its_worker_goes_on(
    run: Callable[[Handler], WorkflowResult[Row]], handler: Handler
) -> None:
    result = run(handler)
    assert result.status == "failed"
    assert result.stages[0].attempts == 1
    assert result.error is not None
    assert len(result.error) < 4_000
    for words in FAILURES[handler]:
        assert words in result.error


@pytest.mark.parametrize("handler", SURVIVED, ids=lambda handler: handler.__name__)
def test_what_a_stage_does_to_its_process_is_survived_by_its_message_and_by_the_next_one(
    run: Callable[..., WorkflowResult[Row]], handler: Handler
) -> None:
    first = run(handler)
    assert first.success, first.error
    assert first.stages[0].attempts == 1
    again = run(handler)
    assert again.success, again.error
    assert again.stages[0].data == first.stages[0].data, "the same worker, which nobody had to replace"


def test_children_that_a_stage_leaves_behind_live_as_long_as_its_worker(
    run: Callable[..., WorkflowResult[Row]], eventually: Callable[..., Any]
) -> None:
    left = run(leave_children_or_end).stages[0].data
    assert not any(is_gone(pid) for pid in left.values())
    result = run(leave_children_or_end)
    assert result.success
    assert result.stages[0].attempts == 2
    assert "exit code 0" not in str(result.error)
    eventually(lambda: all(is_gone(pid) for pid in left.values()), "the end of what the worker had started")


def test_of_children_that_go_on_having_children_none_is_left(
    run: Callable[..., WorkflowResult[Row]], eventually: Callable[..., Any]
) -> None:
    worker = run(leave_a_brood).stages[0].data
    eventually(lambda: len(session_members({worker})) > 20, "a brood")
    result = run(leave_a_brood)
    assert result.stages[0].attempts == 2
    eventually(lambda: not session_members({worker}), "the end of all that was the worker's")


def test_a_stage_that_stops_its_process_is_ended_at_its_timeout(run: Callable[..., WorkflowResult[Row]]) -> None:
    result = run(stop_itself)
    assert result.error == "StageTimeout: stage 'hostile' ran longer than its timeout of 0.5 s"


def test_a_stage_that_hangs_in_c_is_ended_with_children_that_have_sessions_of_their_own(
    run: Callable[..., WorkflowResult[Row]], tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    result = run(hang_with_children)
    assert result.status == "failed"
    assert result.error == (
        "StageTimeout: stage 'hostile' ran longer than its timeout of 0.5 s; "
        "the last on its stderr:\nwaiting for nothing"
    )
    away = int((tmp_path / "mark").read_text())
    eventually(lambda: is_gone(away), "the end of a child in a session of its own")


def test_a_daemon_that_a_stage_has_made_outlives_its_worker_and_holds_up_nothing(
    runtime: Runtime, run: Callable[..., WorkflowResult[Row]], eventually: Callable[..., Any]
) -> None:
    daemon = run(daemonise).stages[0].data
    try:
        queue = "stageflow.daemonise.stage0"
        runtime.scale("daemonise", "hostile", 0)
        eventually(lambda: runtime.queues(queue)[0].actors == 0, "the end of the worker")
        assert not is_gone(daemon), "who has left the worker's session on purpose is let live"
    finally:
        os.kill(daemon, signal.SIGKILL)
    runtime.scale("daemonise", "hostile", 1)


def test_what_a_stage_changes_of_its_process_is_not_seen_by_other_stages(
    run: Callable[..., WorkflowResult[Row]],
) -> None:
    before = run(where_am_i).stages[0].data
    assert run(change_the_world).success
    after = run(where_am_i).stages[0].data
    assert after == before
    assert after["cwd"] == os.getcwd()
    assert after["home"] == "here"


def test_a_stage_that_kills_the_process_above_its_worker_is_run_again_and_no_message_is_charged(
    runtime: Runtime, run: Callable[..., WorkflowResult[Row]]
) -> None:
    result = run(shoot_the_parent)
    assert result.success
    assert result.stages[0].attempts == 1, "a zygote's death is no death of a worker"


def test_overall_the_other_stages_worked_as_they_do_without_the_hostile_ones(others: Any) -> None:
    others.all_in_all()


def test_the_script_measures_the_other_stage_beside_each() -> None:
    run = run_script("hostile_stages", "--only", "leave", "system_exit", "--seconds", "0.3")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 hostile stages; the calm stage went on" in run.stdout
    assert "exit code 9" in run.stdout
