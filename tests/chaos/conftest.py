"""Real clusters to break: how tests start them, inspect their processes and wait for their end.

`nursery` makes a pool without processes, so that a test can look at each of its steps.
"""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from programs import launch

from stageflow_actors.core.envelope import Failure
from stageflow_actors.core.failures import read_failure
from stageflow_actors.core.plan import Naming, compile_plan
from stageflow_actors.definition.workflow import Workflow
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec, VersionCode
from stageflow_actors.runtime.ipc.slots import Slot, SlotTable
from stageflow_actors.runtime.node import pool as pool_module
from stageflow_actors.runtime.node.pool import Pool, Tick
from stageflow_actors.runtime.node.pool_context import PoolContext
from stageflow_actors.runtime.node.worker_handle import WorkerHandle
from stageflow_actors.runtime.zygote.handle import Exited, Spawned
from stageflow_actors.runtime.zygote.protocol import ZYGOTE_NAME
from stageflow_brokers.client.query_admin import QueryAdmin

__all__ = ["cluster", "effects", "launch", "nursery"]


class Effects:
    """A file to which handlers append one line each; `path` is passed to them."""

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
            if wanted not in (None, node.pid) or "stageflow_actors.runtime.node.main" not in _words(node):
                continue
            self.nodes.append(node)
            for child in _children(node):
                if "stageflow_brokers.zeromq.process" in _words(child):
                    self.brokers.append(child)
                elif _name(child) == ZYGOTE_NAME:  # the node has also adopted the workers of a zygote that died
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


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


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


class Zygote:
    """Notes what it is asked for, or fails with `error`. It has been `stopped`, or killed."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.asked: list[str] = []
        self.stopped = self.killed = False

    def spawn(self, worker_id: str, payload: bytes, slot: int, env: Any, *, streams: Any) -> None:
        self.asked.append(worker_id)
        if self.error:
            raise OSError(self.error, "no")

    def is_stopped(self) -> bool:
        return self.stopped

    def kill(self) -> bool:
        self.killed = True
        return True


class Broker:
    """Records its queries, and knows its facts and whether the queue is paused."""

    def __init__(self) -> None:
        self.admin = QueryAdmin(self.query)
        self.told: list[tuple[Any, ...]] = []
        self.facts: dict[str, str] = {}
        self.paused = False

    def query(self, name: str, *args: Any) -> Future[Any]:
        self.told.append((name, *args))
        answered: Future[Any] = Future()
        if name == "fact":
            if args[1] is not None:
                self.facts[args[0]] = args[1]
            answered.set_result(self.facts.get(args[0]))
        elif name == "stats":
            answered.set_result({"queues": [{"name": args[0], "state": "paused" if self.paused else "open"}]})
        elif name in ("pause", "resume"):
            self.paused = name == "pause"
            answered.set_result(None)
        return answered


class Nursery:
    """A pool outside any actor system, so that each step is looked at. Its workers are lanes and nothing else.

    `killed` are those of whom it has wanted that, `exited` the pidfds of those that have ended.
    """

    def __init__(self, slots: SlotTable, *, actors: int = 3, kind: str = "stage") -> None:
        self.zygote = Zygote()
        self.broker = Broker()
        self.said: list[str] = []
        self.killed: list[int] = []
        self.exited: set[int] = set()
        self._pid = 1 << 30
        workflow = Workflow("w").add_stage(lambda context: None, id="s")
        plan = compile_plan(workflow, Naming())
        self.pool_context = PoolContext(
            slots=slots,
            zygote=lambda: cast(Any, self.zygote),
            broker=cast(Any, self.broker),
            address="ipc://nowhere",
            naming=Naming(),
            max_message_bytes=1000,
            log_level="WARNING",
            notify=self.said.append,
            has_exited=lambda pidfd: pidfd in self.exited,
        )
        stage = "" if kind == "compensation" else "s"
        self.pool = Pool(PoolSpec("q", "w", stage, kind, actors, {}, [VersionCode(1, b"", plan)]), self.pool_context)

    def new_zygote(self, error: int = 0) -> Any:
        self.zygote = Zygote(error)
        return self.zygote

    def birth(self, id: str = "") -> str:
        """A worker lives: the last one asked for, or another."""
        id = id or self.zygote.asked[-1]
        self._pid += 1
        self.pool.on_receive(Spawned(id, self._pid, os.open(os.devnull, os.O_RDONLY)))
        return id

    def worker(self, id: str) -> WorkerHandle:
        return self.pool._workers[id]

    def lane(self, id: str) -> Slot:
        return self.worker(id).lanes[0]

    def end(self, id: str, status: int) -> None:
        """The zygote reports an end."""
        self.pool.on_receive(Exited(id, self.worker(id).pid, status))

    def death(self, message_id: int = 7, *, settled: int = 0) -> None:
        """The last worker asked for is born, and dies of a message after it has settled others."""
        id = self.ready()
        self.lane(id).count_settled(settled)
        self.lane(id).begin(message_id, 0, time.monotonic_ns())
        self.end(id, -6)

    def idle_end(self) -> None:
        """The last worker asked for is born, and ends before it has begun anything."""
        self.end(self.birth(), 78)

    def ready(self, id: str = "") -> str:
        """The last worker asked for is born, or that of `id` which is, and takes messages."""
        id = id or self.birth()
        self.lane(id).mark_ready()
        return id

    def try_again(self) -> None:
        """The back-off has ended."""
        self.pool._starts.allow_now()
        self.pool.on_receive(Tick())

    def delay_after_failed_start(self) -> float:
        """The back-off ends, and the worker that is asked for then cannot start. The next delay in seconds."""
        self.try_again()
        self.idle_end()
        delay: float = self.pool._starts._back_off.not_before - time.monotonic()
        return delay

    def starts(self) -> list[tuple[str, bool, str, float]]:
        """The states of the pool that were reported to the broker."""
        return [state for told in self.broker.told if told[0] == "starts" for state in told[1]]

    def buried(self) -> list[tuple[list[int], bool, Failure | None]]:
        """(responsible messages, True if charged, reason) of each worker whose end was reported to the broker."""
        told = [told for told in self.broker.told if told[0] == "dead"]
        return [(guilty, charged, read_failure(data) if data else None) for _, _, guilty, charged, _, data in told]


@pytest.fixture
def nursery(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Nursery]]:
    """`nursery(actors=3, kind="stage")`: see `Nursery`. Nobody is killed."""
    slots = SlotTable.create(64)
    made: list[Nursery] = []

    def make(**options: Any) -> Nursery:
        made.append(Nursery(slots, **options))
        return made[-1]

    monkeypatch.setattr(pool_module, "kill_group", lambda pid, pidfd: [each.killed.append(pid) for each in made])
    monkeypatch.setattr(pool_module, "wait_dead", lambda pidfd, timeout: True)
    yield make
    for each in made:
        for worker in each.pool._workers.values():
            if worker.pidfd >= 0:
                os.close(worker.pidfd)
    slots.close()
