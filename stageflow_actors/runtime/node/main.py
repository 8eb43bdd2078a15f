"""The node process: runs the supervisor, the pools and the coordinator of one cluster.

It is a process of its own because a program that holds the GIL for seconds must not delay the handling of worker
deaths, timeouts and deliveries. The main thread receives the zygote's reports and passes them to the supervisor; other
threads watch the program, keep the broker process running and receive commands; all decisions are made by the actors.
When the program dies, for any reason, the node and everything below it must die too. No user code may run here.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

from stageflow_actors.core.envelope import encode
from stageflow_actors.core.plan import WorkflowPlan
from stageflow_actors.core.plural import pluralize
from stageflow_actors.errors import BrokerUnavailable, StageFlowError
from stageflow_actors.runtime.ipc.control_channel import Channel, NodeConfig, Register, Report, Scale, Stop
from stageflow_actors.runtime.ipc.log_levels import OWN_LOGGERS, LogLevels
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec
from stageflow_actors.runtime.ipc.slots import SlotTable
from stageflow_actors.runtime.ipc.stop_notes import StopNotes, describe_ends, describe_unresponsive, describe_work
from stageflow_actors.runtime.messaging.broker_process import BrokerProcess
from stageflow_actors.runtime.messaging.connect import connect
from stageflow_actors.runtime.messaging.manifest import MANIFEST_FACT, ClusterManifest, write_manifest
from stageflow_actors.runtime.messaging.pauses import PAUSE_REASON_FACT, PAUSED_BY_POOL_FACT
from stageflow_actors.runtime.node.coordinator import AddPlan, Coordinator, Deliveries, Flush
from stageflow_actors.runtime.node.error_log import log_dead_letter
from stageflow_actors.runtime.node.history_consistency import check_journal, forget_finished, open_history
from stageflow_actors.runtime.node.load_watch import LoadWatch
from stageflow_actors.runtime.node.orphans import OrphanedMessages
from stageflow_actors.runtime.node.output_relay import OutputRelay
from stageflow_actors.runtime.node.pool import Cancelled, ScaleTo, ShutDown, Tick
from stageflow_actors.runtime.node.pool_context import PoolContext
from stageflow_actors.runtime.node.program_channel import ProgramChannel
from stageflow_actors.runtime.node.source_watch import SourceWatch
from stageflow_actors.runtime.node.supervisor import AddPools, Supervisor
from stageflow_actors.runtime.system.data_dir import ClusterRecord, DataDir, DataDirUnusable
from stageflow_actors.runtime.system.processes import (
    adopt_orphans,
    has_exited,
    name_process,
    parent_death_fd,
    reap_adopted,
    wait_dead,
)
from stageflow_actors.runtime.system.socket_dir import runtime_dir
from stageflow_actors.runtime.zygote.handle import ZygoteGone, ZygoteHandle
from stageflow_actors.runtime.zygote.protocol import WORKER_NAME
from stageflow_brokers.api import Broker, DeliveryItem, Listener
from stageflow_brokers.failpoints import failpoint
from stageflow_brokers.log_sender import annotate_nothing, send_logs
from stageflow_brokers.pause_flags import PauseFlags
from stageflow_brokers.resources import raise_descriptor_limit, shortage
from stageflow_brokers.signals import reset_signals

__all__ = ["main"]

logger = logging.getLogger("stageflow_actors.node")

T = TypeVar("T")

MAX_REQUESTED_DESCRIPTORS = 65_536
"""The most file descriptors that the node requests from the operating system: it has three for each worker."""
MIN_DESCRIPTORS = 64
"""The fewest with which it starts."""
THREADS = 11
"""The threads of a node, with those of ZeroMQ."""
SLOT_COUNT = 65_536
"""Most lanes of all workers of a node."""
LOAD_CHECK_SECONDS = 0.002
"""Time between two checks of workers that load their code while the program waits."""
TICK_SECONDS = 0.02
"""Time between two checks of the slots: the longest delay after a timeout."""
FINISHED_CREDIT = 4_000
"""Finished instances that the broker delivers before the first of them is settled: two transactions of the history."""
COORDINATOR_CREDIT = 500
"""The same for events that the coordinator decides on."""
DATA_CHECK_SECONDS = 0.5
"""Seconds between checks that the data directory is still there. A check costs three calls of stat."""
SIGTERM_NOTICE_SECONDS = 5.0
"""Time after a SIGTERM in which the program stops the cluster, if the signal was sent to all processes."""
ORPHAN_CHECK_SECONDS = 2.0
"""Time between two searches for queues without a consumer."""
WORKFLOW_ID_OFFSETS = [1, 3]
"""Possible offsets of the first field of an envelope, its workflow id: in a msgpack array of up to fifteen fields, or
of more. The broker counts messages by it without decoding them."""
STOP_POLL_SECONDS = 0.01
"""Time between two checks of a condition during a stop."""
BROKER_ANSWER_SECONDS = 3.0
"""Shortest time that the broker gets to answer during a stop with a deadline, even if the grace is shorter. It answers
within milliseconds unless it is stopped (SIGSTOP) or its disk hangs."""
SILENT_BROKER_STOP_SECONDS = 1.0
"""Time that a broker that has not answered gets to end before it is killed."""
WORKER_KILL_SECONDS = 5.0
"""Longest wait for the exits of workers that have been killed."""
OUTPUT_SECONDS = 2.0
"""Longest time for passing the rest of the output on."""
HISTORY_WRITE_SECONDS = 30.0
"""Longest wait for finished instances that are not in the history yet; they are safe in the broker until then."""
HISTORY_HURRY_SECONDS = 5.0
"""The same during a stop with a deadline."""


class _NodeListener(Listener):
    """Passes deliveries to the coordinator, and restores the node's state in a broker that has restarted.

    That state is the list of live workers, and whether delivery is suspended. `on_request` handles requests that
    clients in other processes send through the broker.
    """

    def __init__(self) -> None:
        self.broker: Broker | None = None
        self.coordinator: Any = None
        self.supervisor: Any = None
        self.pool_context: PoolContext | None = None
        self.on_request: Callable[[str, Any], None] = lambda word, detail: None
        self.delivery_suspended = False

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        self.coordinator.tell(Deliveries(queue, items, bodies))

    def on_notice(self, word: str, detail: Any) -> None:
        if word == "cancel" and self.supervisor is not None:
            for peer, message_id in detail:
                self.supervisor.tell(Cancelled(peer, message_id))
        elif word == "told":
            self.on_request(detail[0], detail[1])
        elif word == "dead-letter":
            log_dead_letter(*detail)

    def on_connected(self, broker_epoch: int) -> None:
        failpoint("node.greeted")
        if self.broker is not None and self.pool_context is not None:
            if self.delivery_suspended:
                self.broker.admin.suspend_delivery(True)  # before `set_workers`, which opens the queues
            self.broker.admin.set_workers([(peer, [queue]) for peer, queue in list(self.pool_context.live.items())])
            self.pool_context.causes.report_again()


def main(control_fd: int) -> NoReturn:
    """Run the node in this process until the program stops it or ends."""
    name_process("stageflow-node")
    reset_signals()
    adopt_orphans()
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are for the program, which stops the node
        signal.signal(ignored, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=control_fd))
    os.set_inheritable(control_fd, False)
    config = channel.receive()
    if not isinstance(config, NodeConfig):
        os._exit(0)
    output = _open_output(config)
    failpoint("node.born")
    try:
        program = parent_death_fd(config.program)
    except ProcessLookupError:
        os._exit(0)
    node = Node(config, channel, program, output)
    try:
        node.start()
    except StageFlowError as error:
        node.fail(error)
    except OSError as error:
        _send_report(channel, Report("failed", f"the cluster could not start: {error}", "StageFlowError"))
        node.abandon(1)
    node.run()


def _open_output(config: NodeConfig) -> ProgramChannel:
    """Open the connection for output, and send this process's log records over it."""
    if config.output_fd >= 0:
        os.set_inheritable(config.output_fd, False)
    channel = ProgramChannel(None if config.output_fd < 0 else socket.socket(fileno=config.output_fd))
    send_logs(channel.send_record, annotate_nothing)
    return channel


def _send_report(channel: Channel, report: Report) -> None:
    try:
        channel.send(report)
    except OSError:
        pass  # the program has ended, which the thread that watches it notices too


class Node:
    """Starts the parts of one cluster in order, and stops them in reverse order."""

    def __init__(self, config: NodeConfig, channel: Channel, program: int, output: ProgramChannel) -> None:
        self._config = config
        self._channel = channel
        self._program = program
        self._data = DataDir(os.fsdecode(config.data_dir))
        self._data.adopt(config.lock_fd)
        os.set_inheritable(config.lock_fd, False)
        self._directory: Path = runtime_dir(self._data.path)
        self._address = f"ipc://{self._directory}/broker"
        self._levels = LogLevels(config.levels_fd)
        os.set_inheritable(config.levels_fd, False)
        self._levels.apply()
        self._output = OutputRelay(output)
        self._pauses = PauseFlags.create()
        self._broker_process = BrokerProcess(
            address=self._address,
            journal=None if config.durability == "memory" else str(self._data.journal),
            durability=config.durability,
            max_message_bytes=config.max_message_bytes,
            keep_fds=(config.lock_fd,),
            pause_fd=self._pauses.fd,
            log_fd=self._output.log_fd,
            log_level=logging.getLogger(OWN_LOGGERS[1]).getEffectiveLevel(),
        )
        self._zygote: ZygoteHandle | None = None
        self._listener = _NodeListener()
        self._stopping: Stop | None = None
        self._lost_zygote: ZygoteHandle | None = None
        self._descriptor_limit = raise_descriptor_limit(MAX_REQUESTED_DESCRIPTORS)
        self._next_tick = self._next_orphan_check = self._next_data_check = 0.0
        self._sigterm_notice_due = float("inf")

    def start(self) -> None:
        """Start broker, connection, history and pools: each needs the one before. The zygote loads in parallel.

        Raises `StageFlowError` if a part cannot start.
        """
        config = self._config
        problem = shortage("the node process", descriptors=MIN_DESCRIPTORS, threads=THREADS)
        if problem:
            raise BrokerUnavailable(problem)
        threading.Thread(target=self._watch_program, name="program-watch", daemon=True).start()
        self._slots = SlotTable.create(SLOT_COUNT)
        self._load_watch = LoadWatch(config.start_timeout)
        self._source_watch = SourceWatch(config.sources)
        self._make_zygote()
        lasting = config.durability != "memory"
        if lasting:
            check_journal(self._data)
        self._broker_process.start()
        failpoint("node.broker-started")
        threading.Thread(
            target=self._broker_process.keep_running,
            args=(self._check_journal, self.fail),
            name="broker-keeper",
            daemon=True,
        ).start()
        self._broker = connect(self._address, self._listener, role="supervisor", name="node")
        self._history = open_history(self._data, self._broker.admin, lasting=lasting)
        forgotten = forget_finished(self._history, self._broker.admin)
        failpoint("node.history-opened")
        pool_context = PoolContext(
            slots=self._slots,
            zygote=self._current_zygote,
            broker=self._broker,
            address=self._address,
            naming=config.naming,
            max_message_bytes=config.max_message_bytes,
            log_level=config.log_level,
            notify=lambda text: _send_report(self._channel, Report("notice", text)),
            output=self._output,
            levels_fd=config.levels_fd,
            pauses=self._pauses,
            has_exited=has_exited,
            worker_stop_timeout=config.worker_stop_timeout,
            start_timeout=config.start_timeout,
            initializer=config.initializer,
            load_watch=self._load_watch,
            source_watch=self._source_watch,
        )
        self._context = pool_context
        self._coordinator = Coordinator.start(
            self._broker, self._history, config.naming, config.plans, config.retention, self._fail_history
        )
        self._listener.coordinator = self._coordinator
        self._listener.pool_context = pool_context
        self._listener.broker = self._broker
        self._broker.consume(config.naming.finished, FINISHED_CREDIT)
        self._broker.consume(config.naming.coordinator, COORDINATOR_CREDIT)
        self._supervisor = Supervisor.start(
            self._make_zygote, pool_context, config.naming, config.max_deaths, self.fail
        )
        self._listener.supervisor = self._supervisor
        resumed = self._resume_given_up(config.pools)
        self._load_watch.begin(0, config.pools, time.monotonic())
        self._supervisor.tell(AddPools(config.pools))
        failpoint("node.pools-added")
        self._listener.on_request = self._on_client_request
        self._orphans = OrphanedMessages(self._broker, config.naming)
        self._orphans.exclude(pool.queue for pool in config.pools)
        notices = self._changed_definitions(config.plans)
        self._publish_plans()
        notices += self._resume_parked(config.plans)
        queues = {queue["name"]: queue for queue in self._broker.admin.stats("").result()["queues"]}
        resuming = self._count_unfinished()
        failpoint("node.before-roster")
        self._broker.admin.set_workers([]).result()
        self._data.write_cluster(ClusterRecord.of_program(config.program, node=os.getpid(), address=self._address))
        _send_report(self._channel, Report("ready", self._address, "", {"resuming": resuming}))
        failpoint("node.ready")
        for text in [*([forgotten] if forgotten else ()), *resumed, *notices]:
            _send_report(self._channel, Report("notice", text))
        for name, queue in queues.items():
            if queue["state"] == "paused" and queue["ready"]:
                held = pluralize(queue["ready"], "message")
                text = f"queue {name} is paused and holds {held}; resume it with `stageflow queue resume {name}`"
                _send_report(self._channel, Report("notice", text))

    def run(self) -> NoReturn:
        """Pass the zygote's reports and ticks to the actors until a stop is requested."""
        threading.Thread(target=self._receive_commands, name="control", daemon=True).start()
        signal.signal(signal.SIGTERM, self._on_sigterm)
        while self._stopping is None:
            self._round(LOAD_CHECK_SECONDS if self._load_watch.is_waiting else TICK_SECONDS)
            self._report_loaded()
        self._stop(self._stopping)

    def _on_sigterm(self, number: int, frame: object) -> None:
        """Remember the signal. A service manager that stops a cluster sends it to all processes at once."""
        self._sigterm_notice_due = time.monotonic() + SIGTERM_NOTICE_SECONDS

    def abandon(self, status: int) -> NoReturn:
        """End this process at once: the program has ended, or the node cannot continue.

        Nothing is sent to other processes, which might block: broker, zygote and workers each notice the end of this
        process. The journal is complete at any time.
        """
        os._exit(status)

    def fail(self, error: StageFlowError) -> NoReturn:
        """Report the error to the program, and end this process."""
        file = getattr(error, "file", None)
        fields = {
            "file": None if file is None else os.fsencode(file),
            "offset": getattr(error, "offset", None),
        }
        self._output.close(timeout=0.5)
        _send_report(self._channel, Report("failed", str(error), type(error).__name__, fields))
        self.abandon(1)

    def _check_journal(self) -> None:
        self._data.check_present(*self._data.contents(self._config.durability)[:1])

    def _check_data(self) -> None:
        """Raise `DataDirUnusable` if the data directory, its journal or its history has been removed."""
        self._data.check_present(*self._data.contents(self._config.durability))

    def _fail_history(self, error: StageFlowError) -> NoReturn:
        """Report that the history is missing, or more exactly that its directory is."""
        try:
            self._check_data()
        except DataDirUnusable as missing:
            error = missing
        self.fail(error)

    # parts

    def _wait_for_answer(self, deadline: float | None, asked: Future[T]) -> T:
        """Return the answer of a broker operation; exits and timeouts of workers are handled during the wait.

        Raises `TimeoutError` at the deadline, or after `BROKER_ANSWER_SECONDS` if that is later.
        """
        if deadline is not None:
            deadline = max(deadline, time.monotonic() + BROKER_ANSWER_SECONDS)
        late = time.monotonic() + BROKER_ANSWER_SECONDS
        while True:
            try:
                return asked.result(STOP_POLL_SECONDS)
            except TimeoutError:
                if deadline is not None and time.monotonic() >= deadline:
                    raise
                if time.monotonic() >= late:
                    self._notes.wait_for(lambda: describe_unresponsive("the broker", self._broker_process.pid))
            self._round(0.0)

    def _resume_given_up(self, pools: Sequence[PoolSpec]) -> list[str]:
        """Resume the queues that pools of an earlier release had paused, and return a notice for each.

        A pause by a person stays.
        """
        admin = self._broker.admin
        asked = {pool.queue: admin.get_fact(PAUSED_BY_POOL_FACT + pool.queue) for pool in pools}
        notices = []
        for queue in [queue for queue, fact in asked.items() if fact.result() == "yes"]:
            why = admin.get_fact(PAUSE_REASON_FACT + queue).result() or "its workers died too fast"
            admin.resume(queue).result()
            admin.set_fact(PAUSED_BY_POOL_FACT + queue, "no").result()
            notices.append(f"queue {queue} is resumed: an earlier release had paused it, because {why}")
        return notices

    def _publish_plans(self) -> None:
        """Publish the manifest of registered workflows, for clients in other processes."""
        config = self._config
        manifest = write_manifest(ClusterManifest(config.plans, config.naming, config.max_message_bytes))
        self._broker.admin.set_fact(MANIFEST_FACT, manifest).result()

    def _on_client_request(self, word: str, detail: Any) -> None:
        """Handle a request that a client in another process sent through the broker; on the connection's thread."""
        try:
            scale = msgspec.convert(detail, tuple[str, int]) if word == "scale" else None
        except msgspec.ValidationError:
            scale = None
        if scale is None or scale[1] < 0:
            logger.warning("a client sent an unknown or invalid request, which is ignored: %r", word[:40])
            return
        queue, actors = scale
        self._supervisor.tell(ScaleTo(queue, actors))
        # The program passes it to the next node, if this one crashes.
        _send_report(self._channel, Report("scaled", "", "", {"queue": queue, "actors": actors}))

    def _count_unfinished(self) -> dict[str, int]:
        """Return the number of unfinished instances of each workflow, including those that wait for a signal."""
        plans, coordinator = self._config.plans, self._config.naming.coordinator
        ids = list(dict.fromkeys(plan.id for plan in plans))
        owners = {stage.queue: plan.id for plan in plans for stage in plan.stages if stage.queue != coordinator}
        owners.update((plan.compensation.queue, plan.id) for plan in plans)
        # Messages in the coordinator's queue are counted by the workflow's id, the first field of an envelope.
        tally = self._broker.admin.tally([coordinator], [encode(id) for id in ids], WORKFLOW_ID_OFFSETS).result()
        found = dict.fromkeys(ids, 0)
        for queue, count in tally["queues"].items():
            if queue in owners:  # versions share queues
                found[owners[queue]] += count
        for id, count in zip(ids, tally["marks"], strict=True):
            found[id] += count
        return {id: count for id, count in found.items() if count}

    def _current_zygote(self) -> ZygoteHandle:
        assert self._zygote is not None
        return self._zygote

    def _make_zygote(self) -> ZygoteHandle:
        config = self._config
        zygote = ZygoteHandle(
            "stageflow_actors.runtime.worker.main:main",
            slots=self._slots,
            keep_fds=(config.lock_fd, self._output.log_fd, config.levels_fd, self._pauses.fd),
            sys_path=[os.fsdecode(entry) for entry in config.sys_path],
            cwd=os.fsdecode(config.cwd) or None,
            flags=config.interpreter_flags,
            descriptor_limit=self._descriptor_limit,
        )
        zygote.start()
        self._zygote = zygote
        return zygote

    def _watch_program(self) -> None:
        wait_dead(self._program, None)
        self.abandon(0)

    def _receive_commands(self) -> None:
        while True:
            message = self._channel.receive()
            if message is None:
                return  # the program has ended, or has closed the channel: its pidfd shows which
            if isinstance(message, Stop):
                if message.kill:
                    self.abandon(0)
                if self._stopping is not None:
                    continue
                self._stopping = message
            elif isinstance(message, Register):
                self._source_watch.add(message.sources)
                self._register(message)
                self._load_watch.begin(message.number, message.pools, time.monotonic())
            elif isinstance(message, Scale):
                self._supervisor.tell(ScaleTo(message.queue, message.actors))

    def _report_loaded(self) -> None:
        """Notify the program of the pools that have loaded their code, or cannot."""
        if not self._load_watch.is_waiting:
            return
        for report in self._load_watch.check(self._context.lanes, time.monotonic()):
            if report.note:
                _send_report(self._channel, Report("notice", report.note))
            if report.is_final:
                fields = {"number": report.number, "queues": report.queues}
                _send_report(self._channel, Report("loaded", report.error, "", fields))

    def _register(self, message: Register) -> None:
        """Add workflows, and resume messages that were parked because these versions were not registered.

        The messages are requeued last: an outdated worker or the coordinator would park them again.
        """
        for text in self._resume_given_up(message.pools):
            _send_report(self._channel, Report("notice", text))
        self._supervisor.ask(AddPools(message.pools))
        self._orphans.exclude(pool.queue for pool in message.pools)
        for plan in message.plans:
            self._coordinator.ask(AddPlan(plan))
        for text in self._changed_definitions(message.plans):
            _send_report(self._channel, Report("notice", text))
        self._config.plans.extend(message.plans)
        self._publish_plans()
        for text in self._resume_parked(message.plans):
            _send_report(self._channel, Report("notice", text))

    def _resume_parked(self, loaded: list[WorkflowPlan]) -> list[str]:
        """Requeue messages that waited for other code, now that `loaded` is here; return a line per workflow."""
        known, given = ({(plan.id, plan.version): plan for plan in plans} for plans in (self._config.plans, loaded))
        return [
            f"resuming {pluralize(count, 'instance')} of {workflow_id} parked because the code that ran before could "
            "not decode their data"
            for workflow_id, count in self._orphans.resume(known, given).items()
        ]

    def _changed_definitions(self, plans: list[WorkflowPlan]) -> list[str]:
        """Return a warning for each definition that has changed since it last ran here under the same version."""
        changed = []
        for plan in plans:
            fact = f"definition:{plan.id}:{plan.version}"
            previous = self._broker.admin.get_fact(fact).result()
            if previous != plan.fingerprint:
                self._broker.admin.set_fact(fact, plan.fingerprint).result()
            if previous not in (None, plan.fingerprint):
                changed.append(
                    f"workflow {plan.id!r} version {plan.version} has changed since it last ran here (its stages, "
                    f"compensations or context): unfinished instances continue with the new definition as far as it "
                    f"fits them. Give it version={plan.version + 1} and keep the old definition registered until its "
                    f"instances have finished"
                )
        return changed

    def _round(self, seconds: float) -> None:
        """Pass on the zygote's reports, waiting `seconds` at most for one; send ticks that are due."""
        zygote = self._current_zygote()
        if zygote is self._lost_zygote:
            time.sleep(0.002)  # the supervisor is starting its successor
        else:
            poller = select.poll()
            poller.register(zygote.fileno(), select.POLLIN)
            until_tick = self._next_tick - time.monotonic()
            poller.poll(max(0.0, min(seconds, until_tick)) * 1000)
            for event in zygote.events():
                self._supervisor.tell(event)
                if isinstance(event, ZygoteGone):
                    self._lost_zygote = zygote
                    zygote.close()
        if time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + TICK_SECONDS
            self._levels.follow()
            self._supervisor.tell(Tick())
            self._coordinator.tell(Flush())
        if time.monotonic() >= self._next_data_check:
            self._next_data_check = time.monotonic() + DATA_CHECK_SECONDS
            try:
                self._check_data()
            except DataDirUnusable as error:
                self.fail(error)
        if time.monotonic() >= self._next_orphan_check:
            self._next_orphan_check = time.monotonic() + ORPHAN_CHECK_SECONDS
            self._orphans.check()
            self._source_watch.check()
            self._explain_sigterm()
            reap_adopted((WORKER_NAME,))  # of a zygote that was killed

    def _explain_sigterm(self) -> None:
        """Say how the cluster is stopped, if a SIGTERM to this process alone was meant to do it."""
        if time.monotonic() >= self._sigterm_notice_due:
            self._sigterm_notice_due = float("inf")
            text = (
                f"the node process, {os.getpid()}, has ignored SIGTERM: send it to the program, process "
                f"{self._config.program}, to stop the cluster; SIGKILL restarts the node"
            )
            _send_report(self._channel, Report("notice", text))

    # the end

    def _stop(self, stop: Stop) -> NoReturn:
        """Suspend delivery, let running messages settle, write the history, end the workers and then the broker."""
        failpoint("node.stopping")
        self._notes = StopNotes(lambda text: _send_report(self._channel, Report("notice", text)))
        self._listener.delivery_suspended = True
        broker_answers = self._wait_for_work(None if stop.grace is None else time.monotonic() + stop.grace)
        self._end_workers(graceful=broker_answers)
        broker_answers = broker_answers and self._write_history(stop.grace is not None)
        self._current_zygote().close()
        if broker_answers:
            self._broker.close(timeout=2.0)
            self._broker_process.stop()
        else:
            logger.warning(
                "the broker does not answer and is stopped; messages that were being processed may be processed again "
                "at the next start"
            )
            self._broker_process.stop(SILENT_BROKER_STOP_SECONDS)
            self._broker.close(timeout=0.0)
        self._coordinator.stop()
        self._history.close()
        self._data.remove_cluster()
        self._output.close(timeout=OUTPUT_SECONDS)
        _send_report(self._channel, Report("stopped"))
        os._exit(0)

    def _wait_for_work(self, deadline: float | None) -> bool:
        """Wait until no worker holds a message, or until the deadline; exits and timeouts are handled.

        Return True if the broker answers.
        """
        own = {self._config.naming.finished, self._config.naming.coordinator}
        try:
            self._wait_for_answer(deadline, self._broker.admin.suspend_delivery(True))
            while deadline is None or time.monotonic() < deadline:
                stats = self._wait_for_answer(deadline, self._broker.admin.stats(""))
                queues = [queue for queue in stats["queues"] if queue["name"] not in own]
                # A queue that a restarted broker has not opened yet may have messages in work.
                if not any(queue["leased"] or queue["state"] == "closed" for queue in queues):
                    break
                self._notes.wait_for(lambda: describe_work(self._context.lanes, time.monotonic_ns()))
                self._round(STOP_POLL_SECONDS)
        except TimeoutError:
            return False
        return True

    def _end_workers(self, graceful: bool) -> None:
        """End the workers as at the end of a Python program, in the time that the pools allow; then kill the rest.

        Without a broker that answers, no worker can be asked to end.
        """
        limit = self._config.worker_stop_timeout
        if graceful and limit > 0:
            self._supervisor.tell(ShutDown(False))
            self._await_workers(limit + WORKER_KILL_SECONDS)
        self._supervisor.tell(ShutDown(True))
        self._await_workers(WORKER_KILL_SECONDS)

    def _await_workers(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._context.live and time.monotonic() < deadline:
            self._notes.wait_for(lambda: describe_ends(self._context.lanes))
            self._round(STOP_POLL_SECONDS)

    def _write_history(self, hurried: bool) -> bool:
        """Wait until every finished instance is in the history; if its disk is full, only for a limited time.

        Instances that are not written then are safe in the broker. Return True if the broker answers.
        """
        own = {self._config.naming.finished}
        deadline = time.monotonic() + (HISTORY_HURRY_SECONDS if hurried else HISTORY_WRITE_SECONDS)
        try:
            while time.monotonic() < deadline:
                queues = self._wait_for_answer(deadline if hurried else None, self._broker.admin.stats(""))["queues"]
                if not any(queue["leased"] or queue["ready"] for queue in queues if queue["name"] in own):
                    break
                self._notes.wait_for(lambda: "finished instances to be written to the history")
                self._round(STOP_POLL_SECONDS)
        except TimeoutError:
            return False
        return True
