"""A caller that reruns an instance: the production code of retry and restart.

That code waits for answers, so it has a thread of its own, which returns control while it waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from virtual_node import LIMIT
from virtual_world import World

from stageflow_actors.core.description import status_of
from stageflow_actors.core.envelope import decode_outcome
from stageflow_actors.core.plan import Naming
from stageflow_actors.core.status import WorkflowStatus
from stageflow_actors.errors import InstanceNotFound, StageFlowError
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.runtime.client import reruns
from stageflow_actors.runtime.client.workflow_ref import WorkflowRef
from stageflow_actors.runtime.messaging.errors import translate_error
from stageflow_brokers.admin import BrokerAdmin
from stageflow_brokers.api import BrokerError
from stageflow_brokers.client.query_admin import QueryAdmin

if TYPE_CHECKING:
    from virtual_broker import VirtualClient
    from virtual_program import Job


class Gone(BaseException):
    """The program that made the call is gone."""


class VirtualCaller:
    """One call, of `restart` or else of `retry`. `done` receives its exception, or None.

    To that code it is the session and the completion of the instance.
    """

    def __init__(
        self,
        world: World,
        client: VirtualClient,
        job: Job,
        rows: dict[str, HistoryRow],
        *,
        restart: bool,
        requeued: Callable[[int], None],
        done: Callable[[StageFlowError | None], None],
    ) -> None:
        self.dead = False
        self.instance_id = job.id
        self.naming = Naming()
        self.max_message_bytes = 16 << 20
        self.history_sequence = 0
        self.max_message_bytes = LIMIT
        self._world, self._client, self._job, self._rows = world, client, job, rows
        self._restart, self._requeued, self._done = restart, requeued, done
        self._refused: StageFlowError | None = None
        self._broken: BaseException | None = None
        self._over = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._live, name=f"again {job.id}", daemon=True)
        self._thread.start()
        world.after(0.0, self._hand_over)

    def die(self) -> None:
        """Its program is gone."""
        if self._over or self.dead:
            return
        self.dead = True
        self._go.release()
        self._thread.join()

    # in its own thread

    def _live(self) -> None:
        self._go.acquire()
        caller: Any = self
        try:
            if not self.dead:
                if self._restart:
                    reruns.restart(caller, caller, {})
                else:
                    reruns.retry(caller, caller, None)
        except Gone:
            pass
        except StageFlowError as error:
            self._refused = error
        except BaseException as error:  # reported in the other thread
            self._broken = error
        self._over = True
        self._back.release()

    def _pass(self, seconds: float | None) -> None:
        if seconds is not None:
            self._world.after(seconds, self._hand_over)
        self._back.release()
        self._go.acquire()
        if self.dead:
            raise Gone

    def status(self) -> WorkflowStatus:
        """As `Instance.status` of a handle that has heard nothing."""
        group = self.lookup([self.instance_id]).get(self.instance_id)
        if group is not None:
            return status_of(group)
        row = self.row(self.instance_id)
        if row is None:
            raise InstanceNotFound(self.instance_id)
        return WorkflowStatus(decode_outcome(row.outcome).status)

    def begin_run(self) -> None:
        """The program waits for the outcome."""

    def broker(self) -> VirtualClient:
        return self._client

    def ask(self, operation: Callable[[BrokerAdmin], Future[Any]]) -> Any:
        return self.wait_for(operation(QueryAdmin(self._send)))

    def _send(self, name: str, *args: Any) -> Future[Any]:
        if name == "requeue":
            self._requeued(args[1][0])
        return self._client._query(name, *args)

    def wait_for(self, future: Future[Any]) -> Any:
        if not future.done():
            future.add_done_callback(lambda done: self._world.after(0.0, self._hand_over))
            self._pass(None)
        try:
            return future.result(0)
        except BrokerError as error:
            raise translate_error(error) from None

    def lookup(self, ids: list[str]) -> dict[str, Any]:
        answer = self.ask(lambda admin: admin.lookup(ids))
        self.advance_history_sequence((answer["epoch"] << 40) + answer["left_seq"])
        groups: dict[str, Any] = answer["groups"]
        return groups

    def advance_history_sequence(self, received: int) -> None:
        """See `Session.advance_history_sequence`."""
        self.history_sequence = max(self.history_sequence, received)

    def row(self, instance_id: str) -> HistoryRow | None:
        return self._rows.get(instance_id)

    def workflow_ref(self, workflow_id: str, version: int) -> WorkflowRef:
        return self._job.ref

    # in the world's thread

    def _hand_over(self) -> None:
        if self.dead or self._over:
            return
        world = self._world
        before, world.sleep = world.sleep, self._pass
        self._go.release()
        self._back.acquire()
        world.sleep = before
        if self._broken is not None:
            raise self._broken
        if self._over:
            self._thread.join()
            self._done(self._refused)


__all__ = ["VirtualCaller"]
