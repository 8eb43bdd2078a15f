"""What the demo does to processes: it kills all that it started, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import run_demo

# A program with a child in a session of its own, as workers are. Says who they are, then both wait for ever.
FAMILY = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
with open(sys.argv[1], "w") as told:
    told.write(f"{os.getpid()} {child.pid}")
signal.pause()
"""


class Family:
    """The command of such a program, and the processes that it consists of once it has started."""

    def __init__(self, pipe: Path) -> None:
        os.mkfifo(pipe)
        self.pipe = pipe
        self.command = [sys.executable, "-c", FAMILY, str(pipe)]

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(int(pid)) for pid in self.pipe.read_text().split()]


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path / "pids")


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as process:
        yield process
        process.kill()


def test_kill_all_kills_a_program_and_its_descendants_and_no_other_process(
    family: Family, bystander: subprocess.Popen[bytes]
) -> None:
    with subprocess.Popen(family.command) as program:
        processes = family.processes()
        assert run_demo.kill_all(program.pid) == 2
    assert all(run_demo.has_ended(process) for process in processes)
    assert bystander.poll() is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, run_demo.DemoFailed])
def test_nothing_is_left_of_a_run_that_is_broken_off(error: type[BaseException], family: Family) -> None:
    with pytest.raises(error), run_demo.started(family.command, dict(os.environ), grace=0):
        processes = family.processes()
        raise error
    assert len(processes) == 2
    assert all(run_demo.has_ended(process) for process in processes)


def test_a_run_that_exits_is_distinguished_from_one_that_got_far_enough(bystander: subprocess.Popen[bytes]) -> None:
    with run_demo.started([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ)) as program:
        assert run_demo.wait(program) == 3
    looks = iter([False, False, True])
    assert run_demo.wait(bystander, until=lambda: next(looks)) is None
