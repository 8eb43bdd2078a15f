"""The end of a worker is that of a Python program: nothing that handlers have left behind is lost or stays."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import gzip
import logging.handlers
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
import zipfile
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import Config, Runtime, Workflow
from stageflow_actors.runtime.system.processes import start_ticks

KEPT: list[Any] = []
"""What handlers leave behind lives here until the end of the worker."""

TRAP = """
import pathlib, signal, sys, time
def end(*_):
    time.sleep(0.1)
    pathlib.Path(sys.argv[1]).write_text("whole")
    sys.exit()
signal.signal(signal.SIGTERM, end)
print(flush=True)
time.sleep(60)
"""


def write(path: Path) -> None:
    path.write_text("whole")


def write_late(path: Path) -> None:
    time.sleep(0.2)
    path.write_text("whole")


def text_file(path: Path) -> None:
    KEPT.append(path.open("w"))
    KEPT[-1].write("whole")


def binary_file(path: Path) -> None:
    KEPT.append(path.open("wb"))
    KEPT[-1].write(b"whole")


def gzip_file(path: Path) -> None:
    KEPT.append(gzip.open(path, "wb"))  # noqa: SIM115 - it is left open
    KEPT[-1].write(b"whole")


def zip_file(path: Path) -> None:
    KEPT.append(zipfile.ZipFile(path, "w"))
    KEPT[-1].writestr("name", "whole")


def atexit_function(path: Path) -> None:
    atexit.register(write, path)


def finalizer(path: Path) -> None:
    KEPT.append(threading.Event())
    weakref.finalize(KEPT[-1], write, path)


class Deleted:
    def __init__(self, path: Path) -> None:
        self.path, self.write = path, write

    def __del__(self) -> None:
        self.write(self.path)


def object_with_del(path: Path) -> None:
    KEPT.append(Deleted(path))


def suspended(path: Path) -> Iterator[None]:
    keep = write
    try:
        yield
    finally:
        keep(path)


def generator(path: Path) -> None:
    KEPT.append(suspended(path))
    next(KEPT[-1])


def thread(path: Path) -> None:
    threading.Thread(target=write_late, args=(path,)).start()


def executor(path: Path) -> None:
    KEPT.append(concurrent.futures.ThreadPoolExecutor(1))
    KEPT[-1].submit(write_late, path)


def process(path: Path) -> None:
    multiprocessing.get_context("fork").Process(target=write_late, args=(path,)).start()


def child_that_cleans_up(path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", TRAP, str(path)], stdout=subprocess.PIPE)
    KEPT.append(child)
    assert child.stdout is not None
    child.stdout.readline()


def log_handler(path: Path) -> None:
    KEPT.append(logging.handlers.MemoryHandler(1000, target=logging.FileHandler(path)))
    KEPT[-1].emit(logging.LogRecord("x", logging.INFO, "x", 1, "whole", None, None))


def task_of_the_loop(path: Path) -> None:
    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            write(path)

    KEPT.append(asyncio.get_running_loop().create_task(wait()))


WHOLE: dict[str, Callable[[Path], None]] = {
    each.__name__: each
    for each in (
        text_file,
        binary_file,
        gzip_file,
        zip_file,
        atexit_function,
        finalizer,
        object_with_del,
        generator,
        thread,
        executor,
        process,
        child_that_cleans_up,
        log_handler,
    )
}


def temporary_directory(path: Path) -> str:
    KEPT.append(tempfile.TemporaryDirectory(dir=path.parent))
    return str(KEPT[-1].name)


def temporary_file(path: Path) -> str:
    KEPT.append(tempfile.NamedTemporaryFile(dir=path.parent))  # noqa: SIM115
    return str(KEPT[-1].name)


def shared_segment(path: Path) -> str:
    KEPT.append(shared_memory.SharedMemory(create=True, size=64))
    assert resource_tracker._resource_tracker._pid is not None  # type: ignore[attr-defined]
    return f"/dev/shm/{KEPT[-1].name}"


def child(path: Path) -> str:
    return str(subprocess.Popen(["sleep", "60"]).pid)


def child_in_a_session(path: Path) -> str:
    return str(subprocess.Popen(["sleep", "60"], start_new_session=True).pid)


def daemon_process(path: Path) -> str:
    started = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    started.start()
    KEPT.append(started)
    return str(started.pid)


GONE: dict[str, Callable[[Path], str]] = {
    each.__name__: each
    for each in (temporary_directory, temporary_file, shared_segment, child, child_in_a_session, daemon_process)
}


def leave(context: dict[str, Any]) -> str | None:
    path = Path(context["path"])
    return ({**WHOLE, **GONE})[context["what"]](path)


def leave_in_a_thread(context: dict[str, Any]) -> None:
    object_with_del(Path(context["path"]))


def leave_file(context: dict[str, Any]) -> None:
    """The only thing that this worker leaves: its interpreter is not finalized."""
    text_file(Path(context["path"]))


async def leave_task(context: dict[str, Any]) -> None:
    task_of_the_loop(Path(context["path"]))


ENDS = ("stopped", "recycled")


@pytest.fixture(scope="module")
def left(serve: Any, eventually: Any, tmp_path_factory: Any) -> tuple[Path, dict[tuple[str, str], Any]]:
    """The directory with what was left behind, and the results of the handlers by end and name."""
    directory: Path = tmp_path_factory.mktemp("left")
    flows = {
        end: Workflow(end).add_stage(leave, id="s", max_tasks=len(WHOLE) + len(GONE) if end == "recycled" else None)
        for end in ENDS
    }
    tasks = {
        end: Workflow(f"{end}-task").add_stage(leave_task, id="s", max_tasks=1 if end == "recycled" else None)
        for end in ENDS
    }
    threads = {
        end: Workflow(f"{end}-threads").add_stage(
            leave_in_a_thread, id="s", concurrency=2, max_tasks=1 if end == "recycled" else None
        )
        for end in ENDS
    }
    files = {
        end: Workflow(f"{end}-file").add_stage(leave_file, id="s", max_tasks=1 if end == "recycled" else None)
        for end in ENDS
    }
    runtime: Runtime = serve(*flows.values(), *tasks.values(), *threads.values(), *files.values())
    results = {}
    for end, flow in flows.items():
        (directory / end).mkdir()
        for what in (*WHOLE, *GONE):
            result = runtime.execute(flow, {"what": what, "path": str(directory / end / what)}, timeout=60)
            assert result.success, result.error
            results[end, what] = result.stages[0].data
        for one, what in ((tasks, "task_of_the_loop"), (threads, "object_of_a_thread"), (files, "file_alone")):
            result = runtime.execute(one[end], {"path": str(directory / end / what)}, timeout=60)
            assert result.success, result.error
    eventually((directory / "recycled" / "atexit_function").exists, "the recycled worker ends")
    assert not (directory / "stopped" / "atexit_function").exists()
    runtime.stop()
    return directory, results


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("what", [*WHOLE, "task_of_the_loop", "object_of_a_thread", "file_alone"])
def test_what_handlers_have_begun_is_whole(what: str, end: str, left: Any) -> None:
    path = left[0] / end / what
    if what == "gzip_file":
        assert gzip.decompress(path.read_bytes()) == b"whole"
    elif what == "zip_file":
        assert zipfile.ZipFile(path).read("name") == b"whole"
    else:
        assert path.read_text().strip() == "whole"


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("what", GONE)
def test_what_handlers_have_started_is_gone(what: str, end: str, left: Any) -> None:
    name = left[1][end, what]
    assert start_ticks(int(name)) is None if name.isdecimal() else not os.path.exists(name)


class Hanging:
    def close(self) -> None:
        note("closing")
        time.sleep(60)


class Failing:
    def close(self) -> None:
        raise ConnectionError("the server has gone")


def use(context: dict[str, Any], service: Any) -> None: ...


def ignores_sigterm(context: dict[str, Any]) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert started.stdout is not None
    started.stdout.readline()
    note("child", started.pid)


def serve_one(serve: Any, handler: Any, service: Any = None, **options: Any) -> tuple[Runtime, Any]:
    flow = Workflow("flow").add_stage(handler, id="s", **options)
    runtime = serve(flow, services={"service": service}, config=Config(worker_stop_timeout=0.5))
    assert runtime.execute(flow, {}, timeout=60).success
    return runtime, flow


def messages(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


def test_a_close_that_hangs_is_killed_and_named(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    runtime, _ = serve_one(serve, use, Hanging)
    began = time.monotonic()
    runtime.stop()
    assert 0.4 < time.monotonic() - began < 5
    assert noted("closing") == [()]
    (warning,) = messages(caplog, "worker_stop_timeout")
    assert warning.startswith("stage 's' of workflow 'flow': a worker is killed")
    assert "within worker_stop_timeout=0.5 s; unfinished: the close of service 'service'" in warning
    assert warning.endswith("make it faster, or raise Config(worker_stop_timeout=...)")


def test_a_close_that_hangs_after_a_scale_down_charges_nobody(
    serve: Any, caplog: pytest.LogCaptureFixture, eventually: Any
) -> None:
    runtime, flow = serve_one(serve, use, Hanging)
    runtime.scale(flow, "s", 0)
    eventually(lambda: messages(caplog, "unfinished: the close of service 'service'"), "killed")
    runtime.scale(flow, "s", 1)
    assert runtime.execute(flow, {}, timeout=60).stages[0].attempts == 1
    assert [info.state for info in runtime.queues("stageflow.flow.stage0")] == ["open"]
    runtime.stop()


def test_a_child_that_ignores_the_request_to_end_is_killed_and_said(
    serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    runtime, _ = serve_one(serve, ignores_sigterm)
    runtime.stop()
    ((pid,),) = noted("child")
    assert start_ticks(int(pid)) is None
    (warning,) = messages(caplog, "worker_stop_timeout")
    assert "unfinished: the end of processes that its handlers started: make it faster, or raise" in warning


def test_a_close_that_fails_is_logged_once_and_changes_nothing(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    runtime, _ = serve_one(serve, use, Failing)
    runtime.stop()
    expected = "service 'service' could not be closed: ConnectionError('the server has gone')"
    assert messages(caplog, "could not be closed") == [expected]
    (record,) = [record for record in caplog.records if record.getMessage() == expected]
    assert (record.name, record.levelname) == ("stageflow_actors.worker", "WARNING")
    assert "ConnectionError: the server has gone" in (record.exc_text or "")


def test_a_second_ctrl_c_ends_the_wait_for_a_close(tmp_path: Any) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGINT)
        while not (tmp_path / "closing").exists():
            time.sleep(0.01)
        began = time.monotonic()
        program.send_signal(signal.SIGINT)
        assert program.wait(20) != 0
        assert time.monotonic() - began < 10


PROGRAM = """
import pathlib, time
from stageflow_actors import Config, Runtime, Workflow

class Hanging:
    def close(self):
        pathlib.Path("closing").touch()
        time.sleep(60)

def use(context, service): pass

if __name__ == "__main__":
    flow = Workflow("flow").add_stage(use)
    config = Config(worker_stop_timeout=30)
    with Runtime(flow, data_dir="data", services={"service": Hanging}, config=config) as runtime:
        runtime.execute(flow, {})
        print("ready", flush=True)
        time.sleep(60)
"""
