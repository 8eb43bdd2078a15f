"""The node process: supervisor, pools and coordinator of one cluster, apart from the user's program.

A program that holds the GIL for seconds must not delay deaths, timeouts and deliveries, so none of that lives in it.
The main thread waits on descriptors and passes on what it sees; the actors decide. When the program dies, however it
dies, everything here dies with it.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from brokers.api import Broker, DeliveryItem, Listener
from stageflow_actors.errors import StageFlowError
from stageflow_actors.history.errors import HistoryMissing
from stageflow_actors.history.writer import HistoryWriter
from stageflow_actors.runtime.broker_process import BrokerProcess
from stageflow_actors.runtime.control import Channel, NodeConfig, Register, Report, Scale, Stop
from stageflow_actors.runtime.coordinator import Coordinator, Delivered, Flush, Plan
from stageflow_actors.runtime.datadir import ClusterRecord, DataDir, runtime_dir
from stageflow_actors.runtime.pool import PoolServices, Retire, ScaleTo, Tick
from stageflow_actors.runtime.processes import name_process, parent_death_fd, start_ticks
from stageflow_actors.runtime.slots import SlotTable
from stageflow_actors.runtime.supervisor import AddPools, BrokerEnded, Supervisor
from stageflow_actors.runtime.transport import connect
from stageflow_actors.runtime.zygote import Zygote

__all__ = ["main"]

SLOTS = 4096
TICK = 0.02
"""Seconds between looks at the slots: how late a timeout may be noticed."""
HISTORY_FACT = "history"
STOP_POLL = 0.01


class _NodeListener(Listener):
    """Hands deliveries to the coordinator, and says the roster when a broker comes back."""

    def __init__(self) -> None:
        self.broker: Broker | None = None
        self.coordinator: Any = None
        self.services: PoolServices | None = None
        self.connected = threading.Event()

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        self.coordinator.tell(Delivered(queue, items, bodies))

    def on_connected(self, broker_epoch: int) -> None:
        self.connected.set()
        if self.broker is not None and self.services is not None:
            self.broker.query("roster", [(peer, [queue]) for peer, queue in list(self.services.live.items())])


def main(control_fd: int) -> NoReturn:
    """Run the node in this process until told to stop, or until its program is gone."""
    name_process("stageflow-node")
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=control_fd))
    os.set_inheritable(control_fd, False)
    config = channel.receive()
    if not isinstance(config, NodeConfig):
        os._exit(0)
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        program = parent_death_fd(config.program)
    except ProcessLookupError:
        os._exit(0)
    node = Node(config, channel, program)
    try:
        node.start()
    except StageFlowError as error:
        fields = {name: getattr(error, name, None) for name in ("file", "offset")}
        _tell(channel, Report("failed", str(error), type(error).__name__, fields))
        node.abandon(1)
    except OSError as error:
        _tell(channel, Report("failed", f"the cluster could not start: {error}", "StageFlowError"))
        node.abandon(1)
    node.run()


def _tell(channel: Channel, report: Report) -> None:
    try:
        channel.send(report)
    except OSError:
        pass  # the program is gone; its pidfd says the same


class Node:
    """Puts the parts of one cluster together, in order, and takes them apart in reverse."""

    def __init__(self, config: NodeConfig, channel: Channel, program: int) -> None:
        self._config = config
        self._channel = channel
        self._program = program
        self._data = DataDir(config.data_dir)
        self._data.adopt(config.lock_fd)
        os.set_inheritable(config.lock_fd, False)
        self._directory: Path = runtime_dir(self._data.path)
        self._address = f"ipc://{self._directory}/broker"
        self._broker_process = BrokerProcess(
            address=self._address,
            journal=None if config.durability == "memory" else str(self._data.journal),
            durability=config.durability,
            max_message_bytes=config.max_message_bytes,
            keep_fds=(config.lock_fd,),
        )
        self._zygote: Zygote | None = None
        self._zygotes: list[Zygote] = []
        self._listener = _NodeListener()
        self._stopping: Stop | None = None

    def start(self) -> None:
        """Broker, connection, history, zygote, pools: each needs the one before. Raises `StageFlowError`."""
        config = self._config
        self._broker_process.start()
        self._broker = connect(self._address, self._listener, role="supervisor", name="node")
        self._history = self._open_history()
        self._slots = SlotTable.create(SLOTS)
        self._make_zygote()
        services = PoolServices(
            slots=self._slots,
            zygote=self._current_zygote,
            broker=self._broker,
            address=self._address,
            naming=config.naming,
            max_message_bytes=config.max_message_bytes,
            log_level=config.log_level,
            notify=lambda text: _tell(self._channel, Report("notice", text)),
        )
        self._services = services
        self._coordinator = Coordinator.start(
            self._broker, self._history, config.naming, config.plans, config.retention
        )
        self._listener.coordinator = self._coordinator
        self._listener.services = services
        self._listener.broker = self._broker
        self._broker.consume(config.naming.finished, 4_000)
        self._broker.consume(config.naming.coordinator, 500)
        self._supervisor = Supervisor.start(
            self._broker_process, self._make_zygote, services, config.naming, config.max_deaths, self._fail
        )
        self._supervisor.tell(AddPools(config.pools))
        resuming = self._unfinished()
        self._broker.query("roster", []).result(30)
        self._data.write_cluster(
            ClusterRecord(
                program=config.program,
                program_ticks=start_ticks(config.program),
                node=os.getpid(),
                address=self._address,
                started=time.time(),
            )
        )
        _tell(self._channel, Report("ready", self._address, "", {"resuming": resuming}))

    def run(self) -> NoReturn:
        """Wait on everything that can happen, until it is time to stop."""
        poller = select.poll()
        commands = threading.Thread(target=self._listen, name="control", daemon=True)
        commands.start()
        flush, tick = Flush(), Tick()
        watched = {self._program}
        poller.register(self._program, select.POLLIN)
        next_tick = time.monotonic()
        while self._stopping is None:
            zygote = self._current_zygote()
            wanted = {self._program, self._broker_process.pidfd, zygote.fileno()}
            for fd in watched - wanted:
                poller.unregister(fd)
            for fd in wanted - watched:
                poller.register(fd, select.POLLIN)
            watched = wanted
            for fd, _ in poller.poll(int(TICK * 1000)):
                if fd == self._program:
                    self.abandon(0)
                elif fd == zygote.fileno():
                    for event in zygote.events():
                        self._supervisor.tell(event)
                elif fd == self._broker_process.pidfd:
                    self._supervisor.tell(BrokerEnded())
                    self._wait_for_broker(fd)
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + TICK
                self._supervisor.tell(tick)
                self._coordinator.tell(flush)
        self._stop(self._stopping)

    def abandon(self, status: int) -> NoReturn:
        """End everything at once: the program is gone, or the node cannot go on. The journal has all that counts."""
        self._broker_process.kill()
        for zygote in self._zygotes:
            zygote.close(timeout=1.0)
        os._exit(status)

    # parts

    def _unfinished(self) -> dict[str, int]:
        """Messages of each workflow that wait, counted before anything is delivered."""
        queues = {q["name"]: q for q in self._broker.query("stats", "").result(60)["queues"]}
        found: dict[str, int] = {}
        for plan in self._config.plans:
            names = [stage.queue for stage in plan.stages] + [plan.compensation.queue]
            count = sum(queues[name]["ready"] + queues[name]["delayed"] for name in names if name in queues)
            if count:
                found[plan.id] = count
        return found

    def _open_history(self) -> HistoryWriter:
        known = self._broker.query("fact", HISTORY_FACT, None).result(30)
        history = HistoryWriter.open(self._data.history, create=known is None)
        if known is None:
            self._broker.query("fact", HISTORY_FACT, history.identity).result(30)
        elif history.identity != known:
            raise HistoryMissing(self._data.history)
        return history

    def _current_zygote(self) -> Zygote:
        assert self._zygote is not None
        return self._zygote

    def _make_zygote(self) -> Zygote:
        config = self._config
        zygote = Zygote(
            "stageflow_actors.runtime.worker:main",
            slots=self._slots,
            keep_fds=(config.lock_fd,),
            sys_path=config.sys_path,
            cwd=config.cwd,
        )
        zygote.start()
        self._zygotes.append(zygote)
        self._zygote = zygote
        return zygote

    def _wait_for_broker(self, dead: int) -> None:
        deadline = time.monotonic() + 120
        while self._broker_process.pidfd == dead and time.monotonic() < deadline and self._stopping is None:
            time.sleep(0.002)

    def _fail(self, text: str) -> None:
        _tell(self._channel, Report("failed", text, "BrokerUnavailable"))
        self.abandon(1)

    def _listen(self) -> None:
        while True:
            message = self._channel.receive()
            if message is None:
                return  # the program is gone or has let go: its pidfd tells which
            if isinstance(message, Stop):
                if message.kill:
                    self.abandon(0)
                if self._stopping is not None:
                    continue
                self._stopping = message
            elif isinstance(message, Register):
                for plan in message.plans:
                    self._coordinator.tell(Plan(plan))
                self._supervisor.tell(AddPools(message.pools))
                _tell(self._channel, Report("registered"))
            elif isinstance(message, Scale):
                self._supervisor.tell((message.queue, ScaleTo(message.actors)))

    # the end

    def _stop(self, stop: Stop) -> NoReturn:
        """Deliver nothing more, let what is in work settle, write the history, end the workers, end the broker."""
        self._broker.query("hold", True).result(30)
        deadline = None if stop.grace is None else time.monotonic() + stop.grace
        self._settle_work(deadline)
        self._supervisor.tell(Retire(True))
        self._drain_zygote()
        self._write_history()
        for zygote in self._zygotes:
            zygote.close()
        self._broker.close(timeout=2.0)
        self._broker_process.stop()
        self._history.close()
        self._data.remove_cluster()
        _tell(self._channel, Report("stopped"))
        os._exit(0)

    def _settle_work(self, deadline: float | None) -> None:
        """Until no worker holds a message, pumping events so that deaths and timeouts still count."""
        own = {self._config.naming.finished, self._config.naming.coordinator}
        while deadline is None or time.monotonic() < deadline:
            stats = self._broker.query("stats", "").result(60)
            if not any(queue["leased"] for queue in stats["queues"] if queue["name"] not in own):
                return
            self._pump(STOP_POLL)

    def _drain_zygote(self) -> None:
        deadline = time.monotonic() + 5
        while self._services.live and time.monotonic() < deadline:
            self._pump(STOP_POLL)

    def _write_history(self) -> None:
        own = {self._config.naming.finished}
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            stats = self._broker.query("stats", "").result(60)
            if not any(q["leased"] or q["ready"] for q in stats["queues"] if q["name"] in own):
                return
            self._pump(STOP_POLL)

    def _pump(self, timeout: float) -> None:
        zygote = self._current_zygote()
        poller = select.poll()
        poller.register(zygote.fileno(), select.POLLIN)
        poller.register(self._program, select.POLLIN)
        for fd, _ in poller.poll(int(timeout * 1000)):
            if fd == self._program:
                self.abandon(0)
            for event in zygote.events():
                self._supervisor.tell(event)
        if self._broker_process.reap() is not None:
            self._broker_process.start()
        self._supervisor.tell(Tick())
        self._coordinator.tell(Flush())
