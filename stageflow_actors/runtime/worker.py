"""The worker process: one actor in the main thread, the broker connection in another.

The zygote forks it and calls `main`. User code runs in the main thread, where signals, C libraries and event loops want
it (blocking handlers of which several run at once have threads of their own); the connection's thread lays deliveries
into a deque and tells the actor once per batch. It ends when its process is killed, or with `EXIT_RECYCLED` when it has
done the work it was made for.
"""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Any

import msgspec

from stageflow_actors.core.failures import describe_error
from stageflow_actors.definition.shipping import loads
from stageflow_actors.runtime.actor import CompensationActor, StageActor, WorkActor
from stageflow_actors.runtime.compensation_work import CompensationWork
from stageflow_actors.runtime.handler_work import HandlerWork
from stageflow_actors.runtime.lanes import TaskActor, ThreadActor
from stageflow_actors.runtime.mailbox import Mailbox
from stageflow_actors.runtime.programs import WorkerPayload
from stageflow_actors.runtime.slots import Slot
from stageflow_actors.runtime.transport import connect
from stageflow_actors.runtime.versions import Versions
from stageflow_actors.runtime.work import Work
from stageflow_actors.runtime.works import WORKS

__all__ = ["EXIT_RECYCLED", "EXIT_UNLOADABLE", "main"]

EXIT_RECYCLED = 99
"""Exit code of a worker that has done the work it was made for: none that a handler, or Python, would end with."""
EXIT_UNLOADABLE = 78
"""Exit code of a worker whose code could not be loaded or whose services could not be made (`EX_CONFIG`)."""

LAST_WORDS_SECONDS = 60.0
"""How long a worker that has done its share waits for its settlements to be durable: a broker restarts in that time."""


def main(payload: bytes, slot: Slot | None) -> int:
    """Entry of the forked process."""
    given = msgspec.msgpack.decode(payload, type=WorkerPayload)
    logging.basicConfig(level=given.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    assert slot is not None
    mailbox = Mailbox(given.queue)
    try:
        work = _load(given, slot, mailbox)
    except BaseException as error:  # noqa: BLE001 - user modules and factories may do anything
        traceback.print_exc()
        sys.stderr.write(f"stageflow: worker {given.worker_id} cannot start: {describe_error(error)}\n")
        return EXIT_UNLOADABLE
    actor: WorkActor = _actor_for(work, given.lanes)(work, mailbox, given, slot)
    mailbox.actor = actor
    mailbox.broker = connect(given.address, mailbox, peer=given.peer, role="worker", name=given.worker_id)
    mailbox.broker.consume(given.queue, actor.least)
    actor.serve()
    mailbox.broker.close(timeout=LAST_WORDS_SECONDS)
    return EXIT_RECYCLED


def _actor_for(work: Work | CompensationWork | Versions, lanes: int) -> Any:
    """The kind of actor that does such work: async handlers are awaited together, blocking ones have threads."""
    if isinstance(work, (HandlerWork, Versions)):
        if work.awaits:
            return TaskActor
        if lanes > 1 and work.threads:
            return ThreadActor
    return CompensationActor if isinstance(work, CompensationWork) else StageActor


def _load(given: WorkerPayload, slot: Slot, mailbox: Mailbox) -> Work | CompensationWork | Versions:
    """The work of this worker's queue, for each version that is registered."""
    programs = [(one.plan, loads(one.code)) for one in given.programs]
    factories = {name: factory for _, program in programs for name, factory in program.factories.items()}
    services = {name: factory() for name, factory in factories.items()}
    common = (given.naming, services, slot, mailbox.steps_of)
    limit = given.max_message_bytes
    if given.kind == "compensation":
        undoing = [CompensationWork(own, plan, *common, max_message_bytes=limit, limits=True) for plan, own in programs]
        return undoing[0] if len(undoing) == 1 else Versions(undoing)
    # Only where it is async in every version can it be awaited: else each runs it to its end.
    tasks = all(program.stage is not None and program.stage.call.is_async for _, program in programs)
    works: list[Work] = []
    for plan, program in programs:
        place = plan.stage(program.place)
        assert place is not None, f"{program.place} is not in its own plan"
        kind: Any = WORKS[place.kind]
        options: dict[str, Any] = {"tasks": tasks} if issubclass(kind, HandlerWork) else {}
        works.append(kind(program, plan, *common, max_message_bytes=limit, **options))
    return works[0] if len(works) == 1 else Versions(works)
