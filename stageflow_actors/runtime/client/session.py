"""`Session`: one client's connection to the broker, its history reader and the workflows that it knows.

Clients, handles of instances, `map` and reruns stand on it. The connection repeats unanswered queries after a restart
of the broker. An instance that has left the broker is looked up in the history. A session only asks; its callers
interpret the answers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.description import version_of
from stageflow_actors.core.envelope import Layout
from stageflow_actors.core.plan import Naming, compile_plan
from stageflow_actors.definition.guesses import closest
from stageflow_actors.definition.result_types import result_types
from stageflow_actors.definition.workflow import Workflow, workflow_of
from stageflow_actors.errors import (
    BrokerUnavailable,
    InstanceNotFound,
    StageFlowError,
)
from stageflow_actors.history.reader import HistoryReader
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.runtime.client.event_stream import EventCallback, EventSubscriptions
from stageflow_actors.runtime.client.fork_guard import disown_in_children
from stageflow_actors.runtime.client.wait_reason import WaitReason, wait_reason
from stageflow_actors.runtime.client.waiters import Waiter, Waiters
from stageflow_actors.runtime.client.workflow_ref import StartRequest, WorkflowRef
from stageflow_actors.runtime.messaging.connect import connect
from stageflow_actors.runtime.messaging.errors import translate_error
from stageflow_actors.runtime.system.processes import occupy_standard_descriptors
from stageflow_actors.runtime.system.surroundings import check_threads
from stageflow_brokers import api as port
from stageflow_brokers.api import Broker, BrokerAdmin, Listener
from stageflow_brokers.failpoints import failpoint

__all__ = [
    "ANSWER_TIMEOUT_SECONDS",
    "MAX_LOOKUPS",
    "NOT_RUNNING",
    "POLL_SECONDS",
    "RUNTIME_STOPPED",
    "OutcomeListener",
    "Session",
    "check_workflow_id",
    "surrogate_error",
]

T = TypeVar("T")

ANSWER_TIMEOUT_SECONDS = 60.0
"""Longest time that a call waits for an answer of the broker, restarts of the broker included."""

POLL_SECONDS = 0.5
"""Interval between two checks that the cluster is alive while a call waits."""

CHECKED_POLL_SECONDS = 0.05
"""The same interval for a call with a check of its own, such as a deadline."""

HISTORY_LAG_SECONDS = 1.0
"""Longest wait for the history to contain the instances that have ended."""

MAX_LOOKUPS = 50
"""How often a start searches the history again because instances have left the broker since the last search."""

RUNTIME_STOPPED = (
    "this runtime has been stopped: make the call inside the `with` block, or start() it again; unfinished instances "
    "resume when a runtime is started on its data directory"
)

NOT_RUNNING = "this runtime is not running: call start(), or use it in a `with` block"


def check_workflow_id(workflow: object) -> None:
    """Raise `StageFlowError` for a first argument that is neither a workflow nor the id of one."""
    if not isinstance(workflow, str):
        raise StageFlowError(
            f"the first argument is the workflow or its id, and the context comes behind it: not {workflow!r:.120}; "
            "write submit(workflow, context), and execute() and map() likewise"
        )


def surrogate_error(error: UnicodeEncodeError) -> ValueError:
    """Return the error for a name, id or reason that contains a lone surrogate."""
    return ValueError(
        f"{error.object!r} cannot be stored or sent: it has a lone surrogate, as bytes that are not UTF-8 leave one"
    )


class OutcomeListener(Listener):
    """Passes the outcomes that the broker pushes to the waiters.

    `connected` is called each time a broker accepts the connection.
    """

    def __init__(self, waiters: Waiters, connected: Callable[[], None]) -> None:
        self._waiters = waiters
        self._connected = connected

    def on_connected(self, broker_epoch: int) -> None:
        self._connected()

    def on_pushes(self, pushes: list[tuple[str, str, bytes]]) -> None:
        failpoint("client.notified")
        self._waiters.notify_ended(pushes)

    def on_notice(self, word: str, detail: Any) -> None:
        if word == "gone":
            self._waiters.notify_left(detail)
        elif word == "parked":
            self._waiters.notify_parked(detail)

    def watching(self) -> list[str]:
        return list(self._waiters.by_id)


class Session:
    """The state and the queries that all parts of one client share.

    Subclasses decide what a broker's welcome means, whether the cluster is alive, and which workflows are known.
    """

    def __init__(self) -> None:
        self.naming = Naming()
        self.max_message_bytes = 16 << 20
        self.default_ttl_seconds = 0.0
        """How long a message may wait in a stage's queue; 0 for no limit."""
        self.workflows: dict[tuple[str, int], WorkflowRef] = {}
        """The known workflows by (id, version)."""
        self.waiters = Waiters()
        self.events = EventSubscriptions(self.codec_of)
        self.connection: Broker | None = None
        """The connection to the broker; None before `connect` and after `disconnect`."""
        self._ended = ""
        """Why the last connection was closed."""
        self.address = ""
        self.history_path: Path | None = None
        self.history_sequence = 0
        """The broker's count of instances that have left it, as last received by this session."""
        self.live = True
        """False if the broker only shows a data directory at rest: nothing is delivered."""
        self.failure: StageFlowError | None = None
        """Why the cluster cannot go on; None while it can."""
        self.is_inherited = False
        """True in a forked child of the process that opened this session: no call is possible."""
        self._inherited: tuple[Any, ...] = ()
        self._reader: HistoryReader | None = None
        disown_in_children(self)

    # the connection

    def connect(self, address: str, name: str) -> None:
        """Connect to the broker at `address`; `name` identifies this client in the broker's lists."""
        check_threads()
        occupy_standard_descriptors()
        self.address = address
        listener = OutcomeListener(self.waiters, self.on_connected)
        self.connection = connect(address, listener, role="client", name=name)

    def on_connected(self) -> None:
        """Called on the connection's thread each time a broker accepts the connection."""

    def disconnect(self, reason: str = RUNTIME_STOPPED) -> None:
        """Close the connection and the history; waiting calls raise `BrokerUnavailable(reason)`. Idempotent."""
        if self.is_inherited:
            return
        self.events.close()
        if self.connection is not None:
            self.connection.close(timeout=1.0)
            self.connection = None
            self._ended = reason
        self.waiters.notify_failure(BrokerUnavailable(reason), forget=True)
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    @property
    def is_open(self) -> bool:
        """True if this session has a connection, or is about to have one."""
        return self.connection is not None

    def disown(self, parent: int) -> None:
        """Close this session in a forked child of the process `parent`; see `fork_guard`.

        What belongs to the parent is kept, and never closed. Locks that its threads may hold are replaced.
        """
        if not self.is_open and not self.is_inherited:
            return
        self.is_inherited = True
        self._inherited += (self.connection, self.waiters, self.events, self._reader)
        self.connection, self._reader = None, None
        self.waiters, self.events = Waiters(), EventSubscriptions(self.codec_of)
        directory = "data_dir" if self.history_path is None else repr(str(self.history_path.parent))
        self.failure = BrokerUnavailable(
            f"this process, {os.getpid()}, was forked from the process {parent}, and cannot use its connection to the "
            f"cluster: call Runtime.connect({directory}) in this process, and use the client that it returns"
        )

    def no_instance(self, instance_id: str) -> InstanceNotFound:
        """Return the error for an id that is neither live nor finished."""
        return InstanceNotFound(instance_id, data_dir=None if self.history_path is None else self.history_path.parent)

    def check_process(self) -> None:
        """Raise `BrokerUnavailable` in a forked child of the process that opened this session."""
        if self.is_inherited and self.failure is not None:
            raise self.failure

    def broker(self) -> Broker:
        """Return the connection. Raises `BrokerUnavailable` if there is none."""
        if self.connection is None:
            self.check_process()
            raise BrokerUnavailable(self._ended or NOT_RUNNING)
        return self.connection

    def ask(self, operation: Callable[[BrokerAdmin], Future[T]]) -> T:
        """Perform an operation of the broker and return its answer.

        Raises `ValueError` for text that cannot be encoded; nothing is sent then.
        """
        try:
            future = operation(self.broker().admin)
        except port.BrokerError as error:
            raise translate_error(error) from None
        except UnicodeEncodeError as error:
            raise surrogate_error(error) from None
        return self.wait_for(future)

    def wait_for(
        self, future: Future[T], timeout: float = ANSWER_TIMEOUT_SECONDS, check: Callable[[], None] | None = None
    ) -> T:
        """Return the result of a future of the broker; `check` replaces `check_alive` and may raise to give up."""
        deadline = time.monotonic() + timeout
        poll = POLL_SECONDS if check is None else CHECKED_POLL_SECONDS
        while True:
            try:
                return future.result(poll)
            except TimeoutError:
                (check or self.check_alive)()
                if time.monotonic() > deadline:
                    raise BrokerUnavailable(f"the broker has not answered within {timeout:g} s") from None
            except port.BrokerError as error:
                raise translate_error(error) from None

    def check_alive(self) -> None:
        """Raise the error that ended the cluster, if there is one."""
        if self.failure is not None:
            raise self.failure

    def fail(self, error: StageFlowError) -> None:
        """Record that the cluster cannot go on, and notify everything that waits."""
        self.failure = error
        self.waiters.notify_failure(error, forget=False)

    def watch(self, instance_id: str, waiter: Waiter) -> None:
        """Have `waiter` notified of the outcome of an instance that any client may have started."""
        self.waiters.add(instance_id, waiter)
        try:
            self.ask(lambda admin: admin.watch([instance_id]))
        except BaseException:
            self.waiters.remove(instance_id, waiter)
            raise

    def scale(self, queue: str, actors: int) -> None:
        """Have the node run `actors` workers for `queue`. Raises `BrokerUnavailable` while it restarts."""
        if not self.ask(lambda admin: admin.notify_supervisor("scale", [queue, actors])):
            raise BrokerUnavailable("the node of this cluster is restarting; try again")

    # events

    def add_event_callback(self, callback: EventCallback) -> Callable[[], None]:
        """Call `callback` with each event; return a function that removes it."""
        self.check_process()
        self.events.callbacks.append(callback)
        if self.connection is not None:
            self.open_events()

        def remove() -> None:
            if callback in self.events.callbacks:
                self.events.callbacks.remove(callback)
            if not self.events.callbacks:
                self.events.close()

        return remove

    def open_events(self) -> None:
        """Subscribe to events if there are callbacks; returns when the broker has confirmed it."""
        subscribed = self.events.open(self.address)
        if subscribed is not None:
            self.wait_for(subscribed)

    # workflows

    def resolve(self, workflow: Workflow[Any] | type[Workflow[Any]] | str) -> WorkflowRef:
        """Return the workflow, given as an object or by id (the highest version then).

        Raises `StageFlowError` if it is unknown, `BrokerUnavailable` if this session has no connection.
        """
        self.broker()
        workflow = workflow_of(workflow)
        if isinstance(workflow, Workflow):
            ref = self.workflows.get((workflow.id, workflow.version))
            if ref is None:
                ref = self.adopt(workflow)
            elif ref.codec.context_type is not workflow.context:
                raise StageFlowError(
                    f"workflow {workflow.id!r} was registered here with another class as its context than this "
                    f"{workflow.context.__name__}: was the code that defines it run again? Start a Runtime with the "
                    "new workflow, or give it another version and register() it"
                )
            return ref
        check_workflow_id(workflow)
        versions = [ref for (id, _), ref in self.workflows.items() if id == workflow]
        if not versions:
            known = sorted({id for id, _ in self.workflows})
            meant = closest(str(workflow), known)
            raise StageFlowError(
                f"no workflow {workflow!r} is registered here"
                + (f" (did you mean {meant!r}?)" if meant else "")
                + f": registered are {', '.join(map(repr, known)) or 'none'}; register(workflow) adds one"
            )
        return max(versions, key=lambda ref: ref.plan.version)

    def adopt(self, workflow: Workflow[Any]) -> WorkflowRef:
        """Return the reference of a workflow object that this session has not seen, and remember it."""
        ref = WorkflowRef(
            compile_plan(workflow, self.naming, default_ttl=self.default_ttl_seconds),
            workflow.context,
            result_types(workflow),
        )
        self.workflows[(workflow.id, workflow.version)] = ref
        return ref

    def workflow_ref(self, workflow_id: str, version: int) -> WorkflowRef | None:
        """Return a known workflow by id and version, or None."""
        return self.workflows.get((workflow_id, version))

    def ref_of_group(self, group: dict[str, Any]) -> WorkflowRef | None:
        """Return the workflow of a group of messages that the broker has described, or None."""
        version = version_of(group)
        return None if version is None else self.workflow_ref(*version)

    def codec_of(self, workflow_id: str, version: int) -> tuple[ContextCodec[Any], Layout] | None:
        """Return the codec of a workflow's contexts and its stages, or None if it is unknown."""
        ref = self.workflow_ref(workflow_id, version)
        return None if ref is None else (ref.codec, ref.layout)

    # starting instances

    def publish(
        self,
        ref: WorkflowRef,
        batch: list[StartRequest],
        *,
        priority: int = 0,
        atomic: bool = False,
        on_numbered: Callable[[], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> Future[port.PublishAnswer]:
        """Send the starts of `batch` to the broker; the future resolves when they are durable.

        `on_numbered` is called when the frame is sent, `check` while the call waits for room on the connection.
        """
        now = time.time()
        bodies = [ref.body(request, now, self.max_message_bytes) for request in batch]
        items = [ref.item(request, len(body), priority) for request, body in zip(batch, bodies, strict=True)]
        failpoint("client.publishing")
        try:
            published = self.broker().publish(
                [ref.target], items, bodies, atomic=atomic, on_numbered=on_numbered, on_wait=check or self.check_alive
            )
            failpoint("client.published")
            return published
        except port.BrokerError as error:
            raise translate_error(error) from None

    def finished_rows(self, batch: list[StartRequest]) -> dict[str, HistoryRow]:
        """Return the history rows, by id, of those instances that have ended and do not run again."""
        reader = self.reader() if batch else None
        rows = {} if reader is None else reader.get_many([request.id for request in batch])
        if reader is None or not rows:
            return rows
        # A restarted instance has the row of its previous run until the row of the current run is written.
        ended = list(rows.keys() - self.lookup(list(rows)).keys())
        return reader.get_many(ended) if ended else {}

    # history rows and groups of messages

    def await_history(self) -> None:
        """Wait until the history contains every instance that has ended by now, at most `HISTORY_LAG_SECONDS`.

        The history follows the broker with a delay of some milliseconds.
        """
        deadline = time.monotonic() + HISTORY_LAG_SECONDS
        due = None
        while True:
            queues = self.ask(lambda admin: admin.stats(self.naming.finished))["queues"]
            if not queues:
                return
            queue = queues[0]
            if due is None:
                due = queue["settled"] + queue["ready"] + queue["leased"]
            if not queue["ready"] + queue["leased"] or queue["settled"] >= due or time.monotonic() > deadline:
                return
            time.sleep(0.005)

    def reader(self) -> HistoryReader | None:
        """Return the reader of the history, or None while there is no history file."""
        self.check_process()
        if self._reader is None and self.history_path is not None and self.history_path.exists():
            self._reader = HistoryReader.open(self.history_path)
        return self._reader

    def row(self, instance_id: str) -> HistoryRow | None:
        """Return the history row of an instance, or None."""
        reader = self.reader()
        return None if reader is None else reader.get(instance_id)

    def lookup(self, ids: list[str]) -> dict[str, Any]:
        """Return the broker's description of each live instance among `ids`, by id."""
        answer = self.ask(lambda admin: admin.lookup(ids))
        self.advance_history_sequence((answer["epoch"] << 40) + answer["left_seq"])
        groups: dict[str, Any] = answer["groups"]
        return groups

    def wait_reasons(self, ids: list[str], timeout: float = ANSWER_TIMEOUT_SECONDS) -> dict[str, WaitReason | None]:
        """Return what each live instance among `ids` waits for, by id. Raises `BrokerUnavailable` after `timeout`."""
        try:
            admin = self.broker().admin
            looked_up, stats = admin.lookup(ids), admin.stats("")
        except port.BrokerError as error:
            raise translate_error(error) from None
        groups = self.wait_for(looked_up, timeout)["groups"]
        queues = self.wait_for(stats, timeout)["queues"]
        now = time.time()
        return {id: wait_reason(group, queues, self.naming, now, live=self.live) for id, group in groups.items()}

    def advance_history_sequence(self, received: int) -> None:
        """Record a count of departed instances that the broker has sent; it never decreases."""
        self.history_sequence = max(self.history_sequence, received)
