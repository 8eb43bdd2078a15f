"""The worker process: one actor in the main thread, the broker connection in another.

The zygote forks the process and calls `main`. User code runs in the main thread, because signals, C libraries and event
loops expect it there; only blocking handlers that run concurrently have threads of their own. The connection's thread
adds deliveries to the mailbox and notifies the actor once per batch. The process ends when it is killed, or with
`EXIT_RECYCLED` after its last message (`max_tasks`) or when it is to retire.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import msgspec

from stageflow_actors.core.failures import describe_error
from stageflow_actors.core.plan import WorkflowPlan
from stageflow_actors.definition.pickling import loads
from stageflow_actors.definition.services import select_services
from stageflow_actors.errors import StageFlowError
from stageflow_actors.runtime.ipc.exit_codes import (
    EXIT_CUT_OFF,
    EXIT_DAMAGED,
    EXIT_RECYCLED,
    EXIT_UNHANDLED,
    EXIT_UNLOADABLE,
)
from stageflow_actors.runtime.ipc.pool_spec import WorkerPayload
from stageflow_actors.runtime.ipc.slots import Slot
from stageflow_actors.runtime.messaging.connect import connect
from stageflow_actors.runtime.system.processes import exit_now
from stageflow_actors.runtime.system.start_guard import importing_for
from stageflow_actors.runtime.system.surroundings import check_threads
from stageflow_actors.runtime.worker.actor import CompensationActor, StageActor, WorkActor
from stageflow_actors.runtime.worker.base_context import BaseContext
from stageflow_actors.runtime.worker.concurrent_actors import TaskActor, ThreadActor
from stageflow_actors.runtime.worker.event_loop import EventLoop
from stageflow_actors.runtime.worker.executors.base import Executor, ExecutorEnvironment
from stageflow_actors.runtime.worker.executors.compensation import CompensationExecutor
from stageflow_actors.runtime.worker.executors.handler import HandlerExecutor
from stageflow_actors.runtime.worker.executors.registry import EXECUTORS
from stageflow_actors.runtime.worker.executors.versions import VersionedExecutor
from stageflow_actors.runtime.worker.failure_log import FailedAttempt, FailureLog
from stageflow_actors.runtime.worker.mailbox import Mailbox
from stageflow_actors.runtime.worker.output import MIN_OWN_DESCRIPTOR, WorkerLogging, own_stderr, prepare_streams
from stageflow_actors.runtime.worker.process_exit import ProcessExit
from stageflow_actors.runtime.worker.services import ServiceScope, services_on_loop
from stageflow_actors.runtime.worker.start_reporter import StartReporter
from stageflow_brokers.api import DeliveryItem
from stageflow_brokers.failpoints import failpoint
from stageflow_brokers.pause_flags import NOT_PAUSED, PauseFlags

__all__ = ["main"]

_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""The directory of this package, whose frames are none of the user's."""

CLOSE_TIMEOUT_SECONDS = 60.0
"""The time in which a retired worker waits for durable settlements: a broker restarts within it."""


def main(data: bytes, slot: Slot | None, report_fd: int = -1) -> int:
    """Run the worker and return its exit code: the entry of the forked process.

    A worker that cannot start writes the reason to `report_fd` instead of stderr: the node reports it once for all.
    """
    failpoint("worker.born")
    payload = msgspec.msgpack.decode(data, type=WorkerPayload)
    prepare_streams()
    stderr = own_stderr()
    assert slot is not None
    report = StartReporter(report_fd, payload.worker_id, slot)
    process = ProcessExit(slot)
    logs = WorkerLogging(payload, slot)
    paused = NOT_PAUSED if payload.pause_fd < 0 else PauseFlags(payload.pause_fd).flag(payload.pause_flag)
    mailbox = _WorkerMailbox(payload.queue, paused, logs)
    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
    event_loop = EventLoop(runner.get_loop)
    services = ServiceScope(runner.get_loop, slot.set_step)
    failed = "its code cannot be loaded"
    try:
        if payload.initializer:
            with logs.loading_code():
                initializer = _load_code(payload.initializer, slot)
            failed = "the initializer failed"
            slot.set_step("the initializer")
            with logs.initializing():
                initializer()
        failed = "its code cannot be loaded"
        with logs.loading_code():
            programs = [(one.plan, _load_code(one.code, slot)) for one in payload.programs]
        slot.mark_loaded()  # `start()` waits for this
        failed = "its threads have been replaced"
        check_threads()
        failed = "its handlers cannot be made"
        failures = FailureLog()
        executor = _make_executor(
            payload, programs, slot, mailbox, _DescriptorCheck(stderr), failures, services, event_loop
        )
    except BaseException as error:  # noqa: BLE001 - user modules and factories may do anything
        report.write(f"service {services.failed!r} cannot be made" if services.failed else failed, error)
        return process.run(services.close, runner, EXIT_UNLOADABLE)
    failpoint("worker.loaded")
    mailbox.placeholders = _occupy_low_descriptors()
    actor: WorkActor = _actor_for(executor, payload.lanes)(executor, mailbox, payload, slot)
    mailbox.actor = actor
    try:
        mailbox.broker = connect(payload.address, mailbox, peer=payload.peer, role="worker", name=payload.worker_id)
    except StageFlowError as error:
        report.write("it cannot connect to its broker", error)
        return process.run(services.close, runner, EXIT_UNLOADABLE)
    mailbox.broker.consume(payload.queue, actor.min_prefetch)
    report.close(stderr)
    slot.mark_ready()
    failpoint("worker.consuming")
    actor.serve()
    failures.close()
    mailbox.closing = True
    if actor.held_leases():
        return EXIT_UNHANDLED  # the actor stopped although messages are in work
    mailbox.broker.close(timeout=CLOSE_TIMEOUT_SECONDS)

    def close_services(on_step: Callable[[str], None]) -> None:
        on_step("the event loop")
        event_loop.stop()  # the thread of this loop, if it has one: the loop ends in this thread
        services.close(on_step)

    return process.run(close_services, runner, EXIT_RECYCLED)


class _WorkerMailbox(Mailbox):
    """A mailbox that ends the worker when its connection is lost permanently.

    `placeholders` are descriptors to close once the connection has opened its own. `closing`: the worker itself closes
    the connection.
    """

    def __init__(self, queue: str, paused: Sequence[int], logs: WorkerLogging) -> None:
        super().__init__(queue, paused)
        self._logs = logs
        self.placeholders: list[int] = []
        self.closing = False

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        """Pass the deliveries on; they run with the program's current log levels."""
        self._logs.follow_levels()
        super().on_deliveries(queue, items, bodies)

    def on_connected(self, broker_epoch: int) -> None:
        """Close the placeholders: the connection has all its descriptors."""
        while self.placeholders:
            os.close(self.placeholders.pop())
        super().on_connected(broker_epoch)

    def on_closed(self, reason: str) -> None:
        """End the process: a worker without a connection must not look alive and hold its messages forever."""
        if not self.closing:
            exit_now(EXIT_CUT_OFF, f"stageflow: this worker ends: {reason}\n")


def _occupy_low_descriptors() -> list[int]:
    """Occupy low descriptors, so that our next ones get high numbers; a handler that closes 0 to 50 hits none."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 4 * MIN_OWN_DESCRIPTOR:
        return []
    taken = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)]
    while taken[-1] < MIN_OWN_DESCRIPTOR:
        taken.append(os.dup(taken[0]))
    return taken


class _DescriptorCheck:
    """Ends the worker after a failure of user code if a descriptor from 0 to 2 is closed.

    An earlier message may have closed it, so that each later message that writes to it fails. The broker delivers the
    message to another worker instead.
    """

    def __init__(self, stderr: TextIO) -> None:
        self._stderr = stderr

    def __call__(self, error: BaseException) -> None:
        for fd in range(3):
            try:
                fcntl.fcntl(fd, fcntl.F_GETFD)
            except OSError:
                text = f"stageflow: a handler has closed descriptor {fd} of this worker: {describe_error(error)}\n"
                exit_now(EXIT_DAMAGED, text, self._stderr)


def _actor_for(executor: Executor | CompensationExecutor | VersionedExecutor, lanes: int) -> Any:
    """Return the actor class for an executor: async handlers share an event loop, blocking ones use threads."""
    if isinstance(executor, (HandlerExecutor, VersionedExecutor)):
        if executor.awaits:
            return TaskActor
        if lanes > 1 and executor.threads:
            return ThreadActor
    return CompensationActor if isinstance(executor, CompensationExecutor) else StageActor


def _load_code(code: bytes, slot: Slot) -> Any:
    """Return the code that the program sent. If an exception ends the load, the slot says why: `start()` raises it."""
    slot.set_step("the load of its code")
    try:
        with importing_for("a worker"):
            return loads(code)
    except BaseException as error:
        slot.mark_unloadable(f"{describe_error(error)}{_place_of(error)}".encode("utf-8", "backslashreplace"))
        raise


def _place_of(error: BaseException) -> str:
    """Return the line of user code that raised, in parentheses; an empty text if none did."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if not frame.filename.startswith(("<frozen", _PACKAGE)) and "cloudpickle" not in frame.filename:
            return f" ({frame.filename}, line {frame.lineno})"
    return ""


def _make_executor(
    payload: WorkerPayload,
    programs: list[tuple[WorkflowPlan, Any]],
    slot: Slot,
    mailbox: Mailbox,
    on_error: Callable[[BaseException], None],
    on_failed_attempt: Callable[[FailedAttempt], None],
    scope: ServiceScope,
    event_loop: EventLoop,
) -> Executor | CompensationExecutor | VersionedExecutor:
    """Return the executor of this worker's queue, for all registered versions."""
    sources = {name: source for _, program in programs for name, source in program.services.items()}
    specs = [spec for _, program in programs for spec in program.handlers]
    base_context = BaseContext()  # what services set is no part of it
    services = scope.make(select_services(sources, sources), services_on_loop(specs, sources))
    compensates = payload.kind == "compensation"
    environment = ExecutorEnvironment(
        naming=payload.naming,
        services=services,
        slot=slot,
        step_store=mailbox.steps_of,
        max_message_bytes=payload.max_message_bytes,
        on_error=on_error,
        on_failed_attempt=on_failed_attempt,
        event_loop=event_loop,
        base_context=base_context,
        paused=mailbox.paused,
        # The actor can await the handler only if every version is async; otherwise each executor blocks on its own.
        awaits_handlers=not compensates
        and all(program.stage is not None and program.stage.spec.is_async for _, program in programs),
    )
    executors: list[Any] = []
    for plan, program in programs:
        if compensates:
            executors.append(CompensationExecutor(program, plan, environment))
        else:
            place = plan.stage(program.place)
            assert place is not None, f"{program.place} is not in its own plan"
            executors.append(EXECUTORS[place.kind](program, plan, environment))
    return executors[0] if len(executors) == 1 else VersionedExecutor(executors)
