"""A program that is process 1 of its container, and one whose /proc is missing or shows other processes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

import pytest
from own_programs import Ended

NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
usable = os.geteuid() == 0 and shutil.which("unshare") is not None
usable = usable and subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode == 0
pytestmark = pytest.mark.skipif(not usable, reason="namespaces of processes cannot be made here")

ORPHANS = """
import psutil, subprocess

def leaves_orphans(job):
    # One in the session of the worker, one in a session of its own; their parents have ended before them.
    subprocess.run(["sh", "-c", "sleep 0.2 & setsid sleep 0.2 & exit 0"])
    return job["n"]

flow = Workflow("flow").add_stage(leaves_orphans, id="one")

def zombies():
    return [p.name() for p in psutil.process_iter() if p.status() == psutil.STATUS_ZOMBIE]

def settle(what):
    for _ in range(1500):
        left = processes("sleep")
        if not left and zombies() == ["sh"]:
            break
        time.sleep(0.02)
    print(what, zombies(), flush=True)

def processes(name):
    return [p for p in psutil.process_iter() if p.name() == name]
"""


def test_no_orphan_of_a_handler_and_no_process_of_a_cluster_stays_a_zombie_of_process_one(
    run_program: Callable[..., Ended],
) -> None:
    ended = run_program(
        ORPHANS
        + """
own = subprocess.Popen(["sh", "-c", "exit 7"], start_new_session=True)
with Runtime(flow, data_dir="data") as rt:
    print(os.getpid(), [rt.execute(flow, {"n": n}, timeout=100).stages[0].data for n in range(2)])
    settle("orphans")
    for name in ("stageflow-work", "stageflow-zyg", "stageflow-brok", "stageflow-node"):
        processes(name)[0].kill()
        print(rt.execute(flow, {"n": 2}, timeout=100).stages[0].data)
        settle(name)
settle("stop")
print(own.wait())
""",
        prefix=NAMESPACE,
    )
    deaths = [
        line
        for name in ("stageflow-work", "stageflow-zyg", "stageflow-brok", "stageflow-node")
        for line in ("2", f"{name} ['sh']")
    ]
    assert ended.lines == ["1 [0, 1]", "orphans ['sh']", *deaths, "stop ['sh']", "7"], ended


def test_a_proc_of_another_namespace_is_refused_by_name(run_program: Callable[..., Ended]) -> None:
    ended = run_program(
        """
        for call in (lambda: Runtime(flow, data_dir="data").start(), lambda: Runtime.connect(".")):
            try: call()
            except StageFlowError as error: print(error)
        """,
        prefix=("unshare", "--pid", "--fork", "--kill-child"),
    )
    assert [line.partition(",")[0] for line in ended.lines] == [
        "/proc shows the processes of another PID namespace"
    ] * 2


def test_a_program_and_a_command_without_proc_are_refused_by_name(run_program: Callable[..., Ended]) -> None:
    ended = run_program(
        """
        from stageflow_actors.cli.main import main
        for call in (lambda: Runtime(flow, data_dir="data").start(), lambda: Runtime.connect(".")):
            try: call()
            except StageFlowError as error: print(error)
        sys.exit(main(["queue", "list", "--data", "."]))
        """,
        prefix=("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"),
    )
    assert [line.partition(",")[0] for line in ended.lines] == ["/proc is not mounted"] * 2
    assert (ended.status, "/proc is not mounted" in ended.errors, ended.errors.count("\n")) == (1, True, 1)
