"""The worker process: one actor in the main thread, the broker connection in another.

The zygote forks it and calls `main`. User code runs in the main thread, where signals, C libraries and event loops want
it (blocking handlers of which several run at once have threads of their own); the connection's thread lays deliveries
into a deque and tells the actor once per batch. It ends when its process is killed, or with `EXIT_RECYCLED` when it has
done the work it was made for.
"""

from __future__ import annotations

import faulthandler
import fcntl
import logging
import os
import resource
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

import msgspec

from brokers.points import reach
from stageflow_actors.core.failures import describe_error
from stageflow_actors.definition.pickling import loads
from stageflow_actors.runtime.actor import CompensationActor, StageActor, WorkActor
from stageflow_actors.runtime.compensation_work import CompensationExecutor
from stageflow_actors.runtime.handler_work import HandlerExecutor
from stageflow_actors.runtime.ipc.exit_codes import (
    EXIT_CUT_OFF,
    EXIT_DAMAGED,
    EXIT_RECYCLED,
    EXIT_UNHANDLED,
    EXIT_UNLOADABLE,
)
from stageflow_actors.runtime.lanes import TaskActor, ThreadActor
from stageflow_actors.runtime.mailbox import Mailbox
from stageflow_actors.runtime.processes import end_now
from stageflow_actors.runtime.programs import WorkerPayload
from stageflow_actors.runtime.slots import Slot
from stageflow_actors.runtime.transport import connect
from stageflow_actors.runtime.versions import VersionedExecutor
from stageflow_actors.runtime.work import Executor, ExecutorEnvironment
from stageflow_actors.runtime.works import EXECUTORS

__all__ = ["main"]

MIN_OWN_DESCRIPTOR = 200
"""Our own descriptors have numbers from here on where we choose them: handlers close the low ones, for reasons of their
own, and open others in their place."""

CLOSE_TIMEOUT_SECONDS = 60.0
"""How long a worker that has done its share waits for its settlements to be durable: a broker restarts in that time."""


def main(payload: bytes, slot: Slot | None) -> int:
    """Entry of the forked process."""
    reach("worker.born")
    given = msgspec.msgpack.decode(payload, type=WorkerPayload)
    stderr = _own_stderr()
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=given.log_level, format=form, stream=stderr)
    # Where it was when it crashed is the last that a worker writes.
    faulthandler.enable(file=stderr, all_threads=False)
    assert slot is not None
    mailbox = _WorkerMailbox(given.queue)
    try:
        work = _load(given, slot, mailbox, _DescriptorCheck(stderr))
    except BaseException as error:  # noqa: BLE001 - user modules and factories may do anything
        traceback.print_exc()
        sys.stderr.write(f"stageflow: worker {given.worker_id} cannot start: {describe_error(error)}\n")
        return EXIT_UNLOADABLE
    reach("worker.loaded")
    mailbox.low = _occupy_low_descriptors()
    actor: WorkActor = _actor_for(work, given.lanes)(work, mailbox, given, slot)
    mailbox.actor = actor
    mailbox.broker = connect(given.address, mailbox, peer=given.peer, role="worker", name=given.worker_id)
    mailbox.broker.consume(given.queue, actor.min_prefetch)
    reach("worker.consuming")
    actor.serve()
    mailbox.leaving = True
    if actor.held_leases():
        return EXIT_UNHANDLED  # something has made the actor stop in the middle of it
    mailbox.broker.close(timeout=CLOSE_TIMEOUT_SECONDS)
    return EXIT_RECYCLED


class _WorkerMailbox(Mailbox):
    """A mailbox whose worker begins with its connection, and ends with it.

    `low` are descriptors that are given back once all of the connection's own are open.
    """

    def __init__(self, queue: str) -> None:
        super().__init__(queue)
        self.low: list[int] = []
        self.leaving = False

    def on_connected(self, broker_epoch: int) -> None:
        """The connection has all its descriptors."""
        while self.low:
            os.close(self.low.pop())

    def on_closed(self, reason: str) -> None:
        """A worker that nobody can reach must not look alive: what it holds would wait for ever."""
        if not self.leaving:
            end_now(EXIT_CUT_OFF, f"stageflow: this worker ends: {reason}\n")


def _occupy_low_descriptors() -> list[int]:
    """Have what is opened next get high numbers. A handler that closes 0 to 50 then hits nothing of ours."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 4 * MIN_OWN_DESCRIPTOR:
        return []
    taken = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)]
    while taken[-1] < MIN_OWN_DESCRIPTOR:
        taken.append(os.dup(taken[0]))
    return taken


def _own_stderr() -> TextIO:
    """What still leads to stderr when handlers have closed `sys.stderr` or descriptor 2."""
    try:
        fd = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, MIN_OWN_DESCRIPTOR)
    except OSError:
        return sys.stderr  # fewer descriptors are allowed than that
    return open(fd, "w", buffering=1, errors="backslashreplace")


class _DescriptorCheck:
    """Told of each failure of a handler: where a descriptor from 0 to 2 is closed, it may not be of its own making.

    An earlier message has closed it, and everything that writes to it would fail from then on. The worker ends instead,
    and the message is delivered to a sound one.
    """

    def __init__(self, stderr: TextIO) -> None:
        self._stderr = stderr

    def __call__(self, error: BaseException) -> None:
        for fd in range(3):
            try:
                fcntl.fcntl(fd, fcntl.F_GETFD)
            except OSError:
                text = f"stageflow: a handler has closed descriptor {fd} of this worker: {describe_error(error)}\n"
                end_now(EXIT_DAMAGED, text, self._stderr)


def _actor_for(work: Executor | CompensationExecutor | VersionedExecutor, lanes: int) -> Any:
    """The kind of actor that does such work: async handlers are awaited together, blocking ones have threads."""
    if isinstance(work, (HandlerExecutor, VersionedExecutor)):
        if work.awaits:
            return TaskActor
        if lanes > 1 and work.threads:
            return ThreadActor
    return CompensationActor if isinstance(work, CompensationExecutor) else StageActor


def _load(
    given: WorkerPayload, slot: Slot, mailbox: Mailbox, on_error: Callable[[BaseException], None]
) -> Executor | CompensationExecutor | VersionedExecutor:
    """The work of this worker's queue, for each version that is registered."""
    programs = [(one.plan, loads(one.code)) for one in given.programs]
    factories = {name: factory for _, program in programs for name, factory in program.factories.items()}
    services = {name: factory() for name, factory in factories.items()}
    compensates = given.kind == "compensation"
    environment = ExecutorEnvironment(
        naming=given.naming,
        services=services,
        slot=slot,
        step_store=mailbox.steps_of,
        max_message_bytes=given.max_message_bytes,
        on_error=on_error,
        # The actor can await the handler only if every version is async; otherwise each executor blocks on its own.
        awaits_handlers=not compensates
        and all(program.stage is not None and program.stage.spec.is_async for _, program in programs),
        limits_compensations=compensates,
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
