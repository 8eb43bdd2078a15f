"""SIGTERM and SIGHUP to all processes of a cluster at once, or to one of them: only the program stops it."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from polling import wait_until
from programs import STAGEFLOW

FLOWS = """
import os, time
from stageflow_actors import Runtime, Workflow

flow = Workflow("flow")

@flow.stage
def work(job: dict) -> int:
    with open("log", "a") as log:
        log.write("begin\\n")
    while not os.path.exists("release"):
        time.sleep(0.01)
    with open("log", "a") as log:
        log.write("end\\n")
    return 1

runtime = Runtime(flow, data_dir="data")
"""


class Up:
    """`stageflow up` with one stage in work, in a session of its own."""

    def __init__(self, folder: Path, *prefix: str) -> None:
        self.folder = folder
        (folder / "flows.py").write_text(FLOWS)
        self.process = subprocess.Popen(
            [*prefix, *STAGEFLOW, "up", "flows.py:runtime"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "serving flow" in line:
                break
        self.run("start", "flow", "--id", "A")
        wait_until((folder / "log").exists)
        self.cluster = psutil.Process(self.process.pid).children(recursive=True)

    def run(self, *arguments: str) -> str:
        command = [*STAGEFLOW, *arguments, "--data", str(self.folder / "data")]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout

    def send(self, number: signal.Signals) -> None:
        for process in [*self.cluster, psutil.Process(self.process.pid)]:
            process.send_signal(number)

    def release(self) -> None:
        (self.folder / "release").touch()

    def end(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=100)
        return self.process.returncode, err

    @property
    def outcome(self) -> tuple[str, list[int], list[str]]:
        shown = json.loads(self.run("instances", "show", "A", "--output", "json"))
        attempts = [stage["attempts"] for stage in shown["stages"]]
        return shown["status"], attempts, (self.folder / "log").read_text().split()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        psutil.wait_procs(self.cluster, timeout=10)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    up = Up(tmp_path)
    yield up
    up.close()


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGHUP), (signal.SIGHUP, signal.SIGHUP)])
def test_signals_to_all_processes_at_once_stop_a_cluster_after_the_stage_in_work(
    up: Up, numbers: tuple[signal.Signals, ...]
) -> None:
    """As systemd does with `KillMode=control-group`, with `SendSIGHUP=yes`, and the end of a terminal."""
    for number in numbers:
        up.send(number)
    assert up.process.stderr is not None
    assert "stopping after the stages in work" in up.process.stderr.readline()
    assert len(psutil.wait_procs(up.cluster, timeout=0.3)[1]) == len(up.cluster), "nothing has ended"
    up.release()
    assert up.end() == (0, "")
    assert not psutil.wait_procs(up.cluster, timeout=10)[1]
    assert up.outcome == ("completed", [1], ["begin", "end"])


def test_sigterm_to_one_process_of_a_cluster_ends_nothing_and_the_node_says_what_does(up: Up) -> None:
    for process in up.cluster:
        process.send_signal(signal.SIGTERM)
    assert up.process.stderr is not None
    line = up.process.stderr.readline()
    assert f"has ignored SIGTERM: send it to the program, process {up.process.pid}, to stop the cluster" in line
    assert all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in up.cluster)
    up.release()
    wait_until(lambda: up.outcome == ("completed", [1], ["begin", "end"]))
    up.process.send_signal(signal.SIGTERM)
    assert up.end()[0] == 0


def test_nohup_keeps_a_cluster_when_its_terminal_ends(tmp_path: Path) -> None:
    up = Up(tmp_path, "nohup")
    try:
        up.send(signal.SIGHUP)
        up.release()
        wait_until(lambda: up.outcome == ("completed", [1], ["begin", "end"]))
        up.process.send_signal(signal.SIGTERM)
        assert up.end()[0] == 0
    finally:
        up.close()


def test_a_command_started_with_stop_signals_blocked_and_ignored_is_stopped_by_them(tmp_path: Path) -> None:
    """As a shell starts a job in the background, or a supervisor that waits for signals with `sigwait`."""
    blocks = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT]); "
        "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    up = Up(tmp_path, STAGEFLOW[0], "-c", blocks)
    try:
        up.process.send_signal(signal.SIGTERM)
        up.release()
        assert up.end()[0] == 0
        assert up.outcome[2] == ["begin", "end"]
    finally:
        up.close()
