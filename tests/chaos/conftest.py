"""Real clusters to be broken: how they are started, looked at from outside, and known to have ended."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest


class Effects:
    """A file to which handlers append one line each; `path` is what they are told."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __call__(self, *beginning: object) -> list[list[str]]:
        """The words behind `beginning` of each line that begins so, in the order written."""
        wanted = [str(word) for word in beginning]
        try:
            lines = [line.split() for line in Path(self.path).read_text().splitlines()]
        except FileNotFoundError:
            return []
        return [line[len(wanted) :] for line in lines if line[: len(wanted)] == wanted]


@pytest.fixture
def effects(tmp_path: Path) -> Effects:
    """An empty effect log."""
    return Effects(tmp_path / "effects")


class Cluster:
    """The processes below a program, by kind, held by pidfds so that none is mistaken for another."""

    def __init__(self, program: int, data: Path | None = None) -> None:
        self.nodes: list[psutil.Process] = []
        self.brokers: list[psutil.Process] = []
        self.zygotes: list[psutil.Process] = []
        self.workers: list[psutil.Process] = []
        self.pidfds: dict[int, int] = {}
        others: list[psutil.Process] = []
        wanted = None if data is None else json.loads((data / "cluster.json").read_text()).get("node")
        for node in psutil.Process(program).children():
            if wanted not in (None, node.pid) or "stageflow_actors.runtime.node" not in _words(node):
                continue
            self.nodes.append(node)
            for child in _children(node):
                if "brokers.zeromq.process" in _words(child):
                    self.brokers.append(child)
                else:
                    self.zygotes.append(child)
                    self.workers += _children(child)
                    others += _children(child, recursive=True)
        everyone = {p.pid for p in [*self.nodes, *self.brokers, *self.zygotes, *self.workers, *others]}
        self.pidfds = {pid: fd for pid in everyone if (fd := _pidfd(pid)) >= 0}

    def __del__(self) -> None:
        for fd in self.pidfds.values():
            os.close(fd)

    def end_within(self, seconds: float) -> list[int]:
        """Waits for the end of all; the pids of those still alive after `seconds`."""
        deadline = time.monotonic() + seconds
        left = []
        for pid, fd in self.pidfds.items():
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                left.append(pid)
        return left


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # it has just ended


def _children(process: psutil.Process, *, recursive: bool = False) -> list[psutil.Process]:
    try:
        return process.children(recursive=recursive)
    except psutil.Error:
        return []


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


@pytest.fixture(scope="session")
def cluster() -> Callable[..., Cluster]:
    """`cluster(pid, data=dir)`: the clusters that a program, this one by default, has started; or the one on `data`."""
    return lambda program=None, data=None: Cluster(os.getpid() if program is None else program, data)


Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts a program in a session of its own; whatever is left of it is killed at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        script = tmp_path / f"program{len(started)}.py"
        script.write_text(code)
        process = subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()  # its cluster follows it
        process.communicate()
