"""Few file descriptors, threads or processes left: one error that names the limit, or a cluster that works."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from own_programs import Ended

RUN = """
import resource, threading

threading.Thread(target=lambda: (time.sleep(105), print("STILL WAITING", flush=True), os._exit(3)), daemon=True).start()

def fill(left):
    taken = [os.open("/dev/null", 0)]
    try:
        while True:
            taken.append(os.dup(taken[0]))
    except OSError:
        pass
    for _ in range(left):
        os.close(taken.pop())
    return taken

def free(taken):
    for number in taken:
        os.close(number)

def attempt(call):
    try:
        print(call(), flush=True)
    except StageFlowError as error:
        print(type(error).__name__, error, flush=True)

def run():
    with Runtime(flow, data_dir="data") as rt:
        return rt.execute(flow, {"n": 1}, timeout=100).stages[0].data
"""

TOO_FEW = "file descriptors, and {} are free of the 256 that this process may have: close files, or raise the limit"


def test_a_start_with_few_free_descriptors_names_the_limit(run_program: Callable[..., Ended]) -> None:
    ended = run_program(
        RUN
        + """
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import stageflow_actors.runtime.client.remote_client
for left in (1, 5, 11, 39):
    taken = fill(left)
    attempt(run)
    free(taken)
taken = fill(60)
attempt(run)
"""
    )
    for line, left in zip(ended.lines, (1, 5, 11, 39), strict=False):
        assert TOO_FEW.format(left) in line, ended
    assert ended.lines[4:] == ["1"], ended


def test_a_connection_without_free_descriptors_is_refused_and_the_cluster_goes_on(
    run_program: Callable[..., Ended],
) -> None:
    ended = run_program(
        RUN
        + """
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
with Runtime(flow, data_dir="data") as rt, Runtime.connect("data") as client:
    taken = fill(3)
    attempt(lambda: rt.on_event(print))
    attempt(lambda: Runtime.connect("data"))
    attempt(lambda: rt.execute(flow, {"n": 2}, timeout=100).stages[0].data)
    free(taken)
    attempt(lambda: client.execute("flow", {"n": 3}, timeout=100).stages[0].data)
"""
    )
    assert all("a connection to the broker needs" in line for line in ended.lines[:2]), ended
    assert ended.lines[2:] == ["2", "3"], ended


def test_a_cluster_with_a_low_hard_limit_works_or_names_it(run_program: Callable[..., Ended]) -> None:
    ended = run_program(
        RUN
        + """
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
attempt(run)
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
attempt(run)
"""
    )
    assert ended.lines[0] == "1", ended
    assert "the node process needs 64 file descriptors" in ended.lines[1], ended
    assert "Traceback" not in ended.errors


def test_many_workers_run_below_a_low_soft_limit_which_their_handlers_keep(run_program: Callable[..., Ended]) -> None:
    ended = run_program(
        RUN
        + """
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 4096))
flow = Workflow("flow").add_stage(lambda job: resource.getrlimit(resource.RLIMIT_NOFILE)[0], id="one", actors=30)
attempt(run)
"""
    )
    assert ended.lines == ["100"], ended


@pytest.fixture
def own_folder() -> Iterator[Path]:
    """A folder that other users reach."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@cache
def user_with_limits() -> tuple[str, ...]:
    """A command that runs a program as a user for whom limits of processes hold, and who can read all files."""
    capabilities = "-all,+dac_override,+dac_read_search"
    prefix = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", f"--inh-caps={capabilities}")
    prefix += (f"--ambient-caps={capabilities}", f"--bounding-set={capabilities}")
    usable = os.geteuid() == 0 and shutil.which("setpriv") is not None
    return prefix if usable and subprocess.run([*prefix, "true"], check=False).returncode == 0 else ()


@pytest.mark.parametrize(
    ("processes", "words"), [(4, "a cluster needs 6 threads"), (10, "the node process needs 11 threads")]
)
def test_too_few_processes_for_this_user_are_named(
    run_program: Callable[..., Ended], own_folder: Path, processes: int, words: str
) -> None:
    if not user_with_limits():
        pytest.skip("no other user can be used here")
    os.chown(own_folder, 65534, 65534)
    limit = f"resource.setrlimit(resource.RLIMIT_NPROC, ({processes}, {processes}))"
    ended = run_program(
        f"{RUN}\nos.chdir({str(own_folder)!r})\n{limit}\nattempt(run)\n",
        prefix=user_with_limits(),
    )
    assert words in ended.lines[0], ended
    assert "threads, and this process can start no more: raise the limit of processes" in ended.lines[0]
    assert "Traceback" not in ended.errors
