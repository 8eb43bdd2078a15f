"""`Client`: start instances, wait for results and control a cluster, from any process of the host.

The broker confirms every start before the call returns. Outcomes are pushed on the connection's thread to the waiters;
the outcome of an instance that has left the broker is read from the history.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from stageflow_actors.core.description import status_of, version_of
from stageflow_actors.core.plan import (
    ITEM,
    item_id,
)
from stageflow_actors.core.plural import pluralize
from stageflow_actors.core.result import WorkflowResult
from stageflow_actors.core.status import WorkflowStatus
from stageflow_actors.definition.duration import Duration, timeout_seconds
from stageflow_actors.definition.guesses import closest
from stageflow_actors.definition.stage import MAX_ACTORS
from stageflow_actors.definition.workflow import Workflow, workflow_of
from stageflow_actors.errors import (
    BrokerUnavailable,
    InvalidContext,
    StageFlowError,
)
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.runtime.client.completion import Completion
from stageflow_actors.runtime.client.conflicts import conflict_with_live, conflict_with_row
from stageflow_actors.runtime.client.event_stream import EventCallback
from stageflow_actors.runtime.client.instance import Instance, as_completed
from stageflow_actors.runtime.client.map_iterator import MapIterator
from stageflow_actors.runtime.client.session import MAX_LOOKUPS, Session
from stageflow_actors.runtime.client.wait_notes import describe_waits
from stageflow_actors.runtime.client.workflow_ref import StartRequest, WorkflowRef
from stageflow_actors.runtime.messaging.pauses import pause
from stageflow_actors.runtime.messaging.queue_info import QueueInfo, queue_infos
from stageflow_brokers import api as port

__all__ = ["Client", "session_of"]

C = TypeVar("C")

MAX_SEARCHED = 10_000
"""Most live instances that are searched for a status or workflow; the newest first."""

DRAIN_NOTE_SECONDS = 30.0
"""Interval between two notices of what leaving a runtime waits for."""
DRAIN_POLL_SECONDS = 0.25
"""Interval between two checks whether all remaining instances wait for a signal or a delay."""

IDS_PER_LOOKUP = 500

MAX_SUBMIT_MANY = 10_000
"""Most contexts of one `submit_many`."""

CLIENT_CLOSED = "this client has been closed; open another one with Runtime.connect(data_dir)"

Pending = list[tuple[StartRequest, Completion]]


class Client:
    """Start instances, wait for results and control a cluster.

    Every process of the host can do so while a runtime serves the data directory. `Runtime` is a client;
    `Runtime.connect` returns one for another process. Safe for use by several threads; each iterator is for one thread.
    Calls wait up to 60 seconds for an answer of the broker, restarts of it included, and raise `BrokerUnavailable`
    after that. They also raise it in a forked child of the process that opened the client, as in a process pool that
    forks: the child calls `Runtime.connect`. Leaving a `with` block there has no effect on the cluster.

    Example:
        >>> import tempfile
        >>> from stageflow_actors import Runtime, Workflow
        >>> square = Workflow("square").add_stage(lambda context: context["n"] ** 2, id="compute")
        >>> with tempfile.TemporaryDirectory() as d, Runtime(square, data_dir=d):
        ...     with Runtime.connect(d) as client:
        ...         instances = client.submit_many("square", [{"n": 2}, {"n": 3}])
        ...         ended = list(client.as_completed(instances, timeout=30))
        ...         print(sorted(instance.result().stages[0].data for instance in ended))
        ...         print([queue.name for queue in client.queues("stageflow.square")])
        ...         print(len(client.instances(status="completed")))
        [4, 9]
        ['stageflow.square.stage0']
        2
    """

    def __init__(self, session: Session | None = None) -> None:
        self._session = session or Session()

    # starting instances

    def submit(
        self,
        workflow: Workflow[C] | type[Workflow[C]] | str,
        context: C,
        *,
        instance_id: str | None = None,
        priority: int = 0,
    ) -> Instance[C]:
        """Start one instance; it is durable when this returns.

        Args:
            workflow: The workflow, or its id: then its highest version is used, and the context is a dict.
            context: The input.
            instance_id: An id of 1 to 256 characters; None (the default) for a new one. The same id with the same
                input returns the existing instance and starts nothing.
            priority: From -1000 to 1000; messages of a higher priority are delivered first. Default: 0.

        Returns:
            The handle of the instance.

        Raises:
            InvalidContext: If the context does not fit the workflow, or the id is malformed.
            PayloadTooLarge: If the context exceeds `max_message_bytes`.
            QueueFull: If the first stage's queue has reached `max_queue_length`, or the disk is full.
            InstanceConflict: If an instance of this id was started with another input.
            StageFlowError: If the workflow is not registered.
            BrokerUnavailable: If the cluster is not running or does not answer; the start may have arrived.
            ValueError: If `priority` is out of range.
        """
        ref = self._session.resolve(workflow)
        return self._start(ref, [ref.prepare(context, instance_id)], priority)[0]

    def submit_many(
        self,
        workflow: Workflow[C] | type[Workflow[C]] | str,
        contexts: Iterable[C],
        *,
        instance_ids: Sequence[str] | None = None,
    ) -> list[Instance[C]]:
        """Start up to 10,000 instances, all or none; `map` takes more.

        Args:
            workflow: The workflow or its id.
            contexts: The inputs.
            instance_ids: One id for each context; None (the default) for new ids.

        Returns:
            The handles, in the order of the contexts.

        Raises:
            InvalidContext: If a context or id is invalid; the message names its position.
            PayloadTooLarge: If a context exceeds `max_message_bytes`.
            QueueFull: If the first stage's queue has no room for all, or the disk is full.
            InstanceConflict: If an instance of one of the ids was started with another input.
            StageFlowError: If the workflow is not registered.
            BrokerUnavailable: If the cluster is not running or does not answer; the starts may have arrived.
            ValueError: If there are too many contexts, or not one id for each.
        """
        ref = self._session.resolve(workflow)
        if isinstance(contexts, (Mapping, str, bytes)):
            raise ValueError(f"submit_many takes a list of contexts, not {contexts!r:.80}: write [context]")
        given = list(contexts)
        if len(given) > MAX_SUBMIT_MANY:
            raise ValueError(f"submit_many takes up to {MAX_SUBMIT_MANY} contexts, not {len(given)}; use map for more")
        if isinstance(instance_ids, (str, bytes)):
            raise ValueError(f"instance_ids must be a list of ids, not {instance_ids!r}")
        if instance_ids is not None and len(instance_ids) != len(given):
            raise ValueError(
                f"there are {len(given)} contexts and {len(instance_ids)} instance_ids: give one id for each context"
            )
        ids = instance_ids if instance_ids is not None else [None] * len(given)
        batch = []
        for number, (context, id) in enumerate(zip(given, ids, strict=True)):
            try:
                batch.append(ref.prepare(context, id))
            except InvalidContext as error:
                raise InvalidContext(f"context {number}: {error}", stage=error.stage, field=error.field) from None
        return self._start(ref, batch, 0) if batch else []

    def execute(
        self,
        workflow: Workflow[C] | type[Workflow[C]] | str,
        context: C,
        *,
        timeout: Duration | None = None,
        instance_id: str | None = None,
        priority: int = 0,
    ) -> WorkflowResult[C]:
        """Start one instance and wait for its result.

        Args:
            workflow: The workflow or its id.
            context: The input.
            timeout: Longest time for the start and the run, in seconds or as `timedelta`; None (the default) for no
                limit.
            instance_id: As in `submit`; None (the default) for a new id.
            priority: As in `submit`. Default: 0.

        Returns:
            The result. A failed instance has one too: see `WorkflowResult.raise_for_status`.

        Raises:
            TimeoutError: If the instance has not ended within `timeout`; it goes on. The message says whether the
                start was confirmed.
            InstanceParked: If the instance is parked; the error names its dead letter.
            InvalidContext: If the context does not fit the workflow, or the id is malformed.
            PayloadTooLarge: If the context exceeds `max_message_bytes`.
            QueueFull: If the first stage's queue has reached `max_queue_length`, or the disk is full.
            InstanceConflict: If an instance of this id was started with another input.
            StageFlowError: If the workflow is not registered.
            BrokerUnavailable: If the cluster is not running, does not answer or stops.
            ValueError: If `timeout` or `priority` is out of range.
        """
        seconds, began = timeout_seconds(timeout), time.monotonic()
        ref = self._session.resolve(workflow)
        request = ref.prepare(context, instance_id)
        within = None if seconds is None else (began + seconds, seconds)
        completion = self._publish(ref, [request], priority, within)[0]
        completion.wait(seconds, began)
        return completion.result(0)

    def map(
        self,
        workflow: Workflow[C] | type[Workflow[C]] | str,
        contexts: Iterable[C],
        *,
        key: Callable[[C], Any] | str | None = None,
        progress: bool = False,
        retry_failed: bool = False,
    ) -> Iterator[WorkflowResult[C]]:
        """Run a workflow over any number of contexts, and yield results in input order.

        At most 8,000 instances are in flight, however long the input is. A refused context raises its error in the
        place of its result, and the iterator can go on; a parked instance yields a result with status `parked`.

        Args:
            workflow: The workflow or its id.
            contexts: The inputs; any iterable.
            key: Returns the instance id of a context, or is the name of the field that contains it. A finished
                instance is not run again: its stored result is yielded. None (the default) for new ids.
            progress: Show a progress bar on stderr. Default: False.
            retry_failed: Run those instances again, as new runs, that have ended with another status than
                `completed`. Default: False.

        Returns:
            An iterator of results; dropping it stops only the input.

        Raises:
            StageFlowError: If the workflow is not registered.
            BrokerUnavailable: If the cluster is not running; the iterator raises it if the cluster stops.

        Example:
            >>> import tempfile
            >>> from stageflow_actors import Runtime, Workflow
            >>> flow = Workflow("double").add_stage(lambda context: 2 * context["n"], id="compute")
            >>> with tempfile.TemporaryDirectory() as d, Runtime(flow, data_dir=d) as runtime:
            ...     results = list(runtime.map(flow, [{"n": n} for n in range(4)], key="n"))
            ...     again = runtime.map_unordered(flow, [{"n": 3}], key="n")
            ...     print([result.stages[0].data for result in results], next(again) == results[3])
            [0, 2, 4, 6] True
        """
        ref = self._session.resolve(workflow)
        return MapIterator(self._session, ref, contexts, key, progress, retry_failed, ordered=True)

    def map_unordered(
        self,
        workflow: Workflow[C] | type[Workflow[C]] | str,
        contexts: Iterable[C],
        *,
        key: Callable[[C], Any] | str | None = None,
        progress: bool = False,
        retry_failed: bool = False,
    ) -> Iterator[WorkflowResult[C]]:
        """Run a workflow over any number of contexts, and yield results as they arrive.

        Args:
            workflow: The workflow or its id.
            contexts: The inputs; any iterable.
            key: As in `map`; None (the default) for new ids.
            progress: Show a progress bar on stderr. Default: False.
            retry_failed: As in `map`. Default: False.

        Returns:
            An iterator of results; dropping it stops only the input.

        Raises:
            StageFlowError: If the workflow is not registered.
            BrokerUnavailable: If the cluster is not running; the iterator raises it if the cluster stops.
        """
        ref = self._session.resolve(workflow)
        return MapIterator(self._session, ref, contexts, key, progress, retry_failed, ordered=False)

    def as_completed(self, instances: Iterable[Instance[C]], timeout: Duration | None = None) -> Iterator[Instance[C]]:
        """Yield instances as they end or are parked.

        Args:
            instances: The handles; equal ones are yielded once.
            timeout: Longest time for all, in seconds or as `timedelta`; None (the default) for no limit.

        Returns:
            An iterator of the handles.

        Raises:
            TimeoutError: By the iterator, if an instance has not ended within `timeout`.
            BrokerUnavailable: By the iterator, if the cluster is not running or stops.
            ValueError: If `timeout` is negative or no number.
        """
        return as_completed(instances, timeout_seconds(timeout))

    # queries

    def instance(self, instance_id: str) -> Instance[Any]:
        """Return the handle of a live or finished instance.

        Args:
            instance_id: Its id.

        Returns:
            The handle.

        Raises:
            InstanceNotFound: If no live or finished instance has this id.
            BrokerUnavailable: If the cluster is not running or does not answer.
            ValueError: If the id cannot be encoded.
        """
        session = self._session
        group = session.lookup([instance_id]).get(instance_id)
        if group is not None:
            return Instance(Completion(session, instance_id, session.ref_of_group(group)))
        row = session.row(instance_id)
        if row is None:
            raise session.no_instance(instance_id)
        return self._finished_instance(row)

    def instances(
        self,
        status: WorkflowStatus | str | None = None,
        workflow: Workflow[Any] | type[Workflow[Any]] | str | None = None,
        limit: int = 100,
    ) -> list[Instance[Any]]:
        """List instances: live ones before finished ones, each newest first.

        Args:
            status: Only instances with this status; None (the default) for any.
            workflow: Only instances of this workflow; None (the default) for any.
            limit: Length of the list. Of live instances at most 100,000 are listed, and 10,000 are searched for a
                status or a workflow. Default: 100.

        Returns:
            The handles.

        Raises:
            BrokerUnavailable: If the cluster is not running or does not answer.
            ValueError: If there is no such status.
            StageFlowError: If the workflow is unknown: not registered, and without instances.
        """
        session = self._session
        wanted = None if status is None else WorkflowStatus(status)
        of: Any = workflow_of(workflow)
        workflow_id: str | None = of.id if isinstance(of, Workflow) else of
        found: list[Instance[Any]] = []
        ids: set[str] = set()
        if wanted is None or not wanted.terminal:
            most = (
                min(max(limit, 0), port.MAX_LISTED_GROUPS) if wanted is None and workflow_id is None else MAX_SEARCHED
            )
            for group in session.ask(lambda admin: admin.list_groups("", most)):
                if len(found) >= limit:
                    break
                if wanted is not None and status_of(group) != wanted:
                    continue
                if workflow_id is not None and (version_of(group) or ("", 0))[0] != workflow_id:
                    continue
                found.append(Instance(Completion(session, group["id"], session.ref_of_group(group))))
                ids.add(group["id"])
        if wanted is None or wanted.terminal:
            if wanted is not None:
                session.await_history()
            reader = session.reader()
            rows = [] if reader is None else reader.list(wanted, workflow_id, max(0, limit - len(found)))
            found += [self._finished_instance(row) for row in rows if row.instance_id not in ids]
        if not found and workflow_id is not None:
            reader = session.reader()
            if reader is None or not reader.list(None, workflow_id, 1):
                session.resolve(workflow_id)
        return found

    def _finished_instance(self, row: HistoryRow) -> Instance[Any]:
        ref = self._session.workflow_ref(row.workflow_id, row.version)
        completion = Completion(self._session, row.instance_id, ref)
        completion.set_outcome(row.outcome)
        return Instance(completion)

    def queues(self, prefix: str = "") -> list[QueueInfo]:
        """Return the figures of the queues whose name begins with `prefix`.

        Args:
            prefix: The beginning of the names; empty (the default) for all queues.

        Returns:
            One `QueueInfo` for each queue.

        Raises:
            BrokerUnavailable: If the cluster is not running or does not answer.
        """
        return queue_infos(self._session.ask(lambda admin: admin.stats(prefix)))

    def stats(self) -> dict[str, Any]:
        """Return the figures of the broker and the history.

        Returns:
            The figures by name; `finished` has the number of finished instances by status.

        Raises:
            BrokerUnavailable: If the cluster is not running or does not answer.
        """
        stats = self._session.ask(lambda admin: admin.stats(""))
        figures: dict[str, Any] = {**stats}
        reader = self._session.reader()
        figures["finished"] = {} if reader is None else reader.count()
        return figures

    def finished_count(self) -> int:
        """Return how many finished instances the history contains.

        Returns:
            The number, over all workflows and statuses.
        """
        reader = self._session.reader()
        return 0 if reader is None else sum(reader.count().values())

    # control

    def pause(self, queue: str) -> None:
        """Let no message of a queue begin until `resume`; also after restarts.

        The call does not wait for messages in work. Messages that workers hold and have not begun return to the queue,
        in order.

        Args:
            queue: The name of the queue, as in `queues`.

        Raises:
            StageFlowError: If there is no such queue.
            BrokerUnavailable: If the cluster is not running or does not answer.
        """
        self._check_queue(queue)
        pause(self._session.ask, queue)

    def resume(self, queue: str) -> None:
        """Deliver the messages of a paused queue again.

        Args:
            queue: The name of the queue, as in `queues`.

        Raises:
            StageFlowError: If there is no such queue.
            BrokerUnavailable: If the cluster is not running or does not answer.
        """
        self._check_queue(queue)
        self._session.ask(lambda admin: admin.resume(queue))

    def scale(self, workflow: Workflow[Any] | type[Workflow[Any]] | str, stage: str, actors: int) -> None:
        """Change the number of worker processes of a stage until the cluster stops.

        For a map stage this is the number of workers that handle its items. When scaling down, idle workers stop first.

        Args:
            workflow: The workflow or its id.
            stage: The id of the stage.
            actors: The number of workers, from 0 to 1,000.

        Raises:
            ValueError: If `actors` is out of range.
            StageFlowError: If the workflow is not registered, or the stage does not exist or has no workers.
            BrokerUnavailable: If the cluster is not running, or its node restarts.
        """
        if isinstance(actors, bool) or not isinstance(actors, int) or not 0 <= actors <= MAX_ACTORS:
            raise ValueError(f"actors must be a whole number from 0 to {MAX_ACTORS:,}, not {actors!r}")
        plan = self._session.resolve(workflow).plan
        planned = plan.stage(item_id(stage)) or plan.stage(stage)
        if planned is None or not planned.has_pool:
            names = ", ".join(s.id for s in plan.stages if s.has_pool and s.kind != ITEM)
            fault = "has no stage" if planned is None else "has no workers at"
            meant = closest(stage, [s.id for s in plan.stages if s.has_pool]) if planned is None else None
            raise StageFlowError(
                f"workflow {plan.id!r} {fault} {stage!r}"
                + (f" (did you mean {meant!r}?)" if meant else "")
                + f": its stages with workers are {names}"
            )
        self._session.scale(planned.queue, actors)

    def on_event(self, callback: EventCallback) -> Callable[[], None]:
        """Call `callback` for each stage that completes and each instance that ends.

        It gets the events of `stageflow_actors.events`, of all instances of the cluster: each at most once, those of
        one instance in order, on a separate thread. Exceptions of the callback are logged. Events are dropped, and
        their number is logged, if the callback is too slow. Before `start`, the callback waits for the start.

        Args:
            callback: A function of one event.

        Returns:
            A function without parameters that removes the callback.

        Raises:
            TypeError: If `callback` is not callable.
            BrokerUnavailable: If the broker does not answer.

        Example:
            >>> from stageflow_actors import Runtime, Workflow
            >>> runtime = Runtime(Workflow("orders").add_stage(print, id="show"))
            >>> remove = runtime.on_event(lambda event: print(event.instance_id))
            >>> remove() is None
            True
        """
        if not callable(callback):
            raise TypeError(f"on_event takes a function of an event, not {callback!r}")
        return self._session.add_event_callback(callback)

    def drain(self, timeout: Duration | None = None) -> None:
        """Wait for the instances that this client has submitted.

        Returns when each of them has ended, is parked, or waits for a signal or a delay.

        Args:
            timeout: Longest wait, in seconds or as `timedelta`; None (the default) for no limit.

        Raises:
            TimeoutError: If instances have not ended within `timeout`; they go on.
            BrokerUnavailable: If the cluster stops or does not answer.
            ValueError: If `timeout` is negative or no number.
        """
        self._drain(timeout_seconds(timeout))

    def _drain(self, limit: float | None, notify: Callable[[str], None] | None = None) -> None:
        """Drain; `notify` receives now and then what is waited for."""
        deadline = None if limit is None else time.monotonic() + limit
        note_at = time.monotonic() + DRAIN_NOTE_SECONDS
        self._session.check_process()
        waiting = self._session.waiters.by_id
        while waiting:
            self._session.check_alive()
            remaining = DRAIN_POLL_SECONDS if deadline is None else deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(f"{pluralize(len(waiting), 'instance')} had not ended after {limit:g} s")
            self._session.waiters.wait_until_empty(min(remaining, DRAIN_POLL_SECONDS))
            if self._all_waiting():
                return
            if notify is not None and time.monotonic() >= note_at:
                note_at = time.monotonic() + DRAIN_NOTE_SECONDS
                text, _ = describe_waits(self._session, list(waiting))
                notify(f"waiting for {pluralize(len(waiting), 'instance')} to end{f': {text}' if text else ''}")

    def _all_waiting(self) -> bool:
        """Return True if every submitted instance waits for a signal or a delay."""
        ids = list(self._session.waiters.by_id)
        for first in range(0, len(ids), IDS_PER_LOOKUP):
            chunk = ids[first : first + IDS_PER_LOOKUP]
            groups = self._session.lookup(chunk)
            if any(id not in groups or status_of(groups[id]) != WorkflowStatus.waiting for id in chunk):
                return False
        return True

    # the connection

    def close(self) -> None:
        """Disconnect from the cluster; submitted instances go on. Idempotent."""
        self._session.disconnect(CLIENT_CLOSED)

    def __enter__(self) -> Self:
        return self

    async def __aenter__(self) -> Self:
        """Enter the `with` block in a thread, so that the event loop goes on."""
        entering = asyncio.ensure_future(asyncio.to_thread(self.__enter__))
        try:
            return await asyncio.shield(entering)
        except asyncio.CancelledError:
            with contextlib.suppress(BaseException):
                await entering
            await asyncio.to_thread(self.close)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the `with` block in a thread; a cancellation ends the wait for instances, as Ctrl-C does."""
        leaving = asyncio.ensure_future(asyncio.to_thread(self.__exit__, kind, error, trace))
        try:
            await asyncio.shield(leaving)
        except asyncio.CancelledError:
            closing = asyncio.ensure_future(asyncio.to_thread(self.close))
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError:
                self._kill()
                raise
            finally:
                with contextlib.suppress(BaseException):
                    await asyncio.shield(leaving)
            raise

    def _kill(self) -> None:
        """Kill the stages in work of a cluster that this client has started."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # publishing

    def _check_queue(self, name: str) -> None:
        """Raise `StageFlowError` if the name is the id of a stage in place of its queue's."""
        plans = [ref.plan for ref in self._session.workflows.values()]
        found = [(plan.id, stage.queue) for plan in plans for stage in plan.stages if stage.id == name and stage.queue]
        if found and not any(stage.queue == name for plan in plans for stage in plan.stages):
            raise StageFlowError(
                f"no queue is named {name!r}: that of stage {name!r} of workflow {found[0][0]!r} is {found[0][1]!r}"
            )

    def _start(self, ref: WorkflowRef, batch: list[StartRequest], priority: int) -> list[Instance[Any]]:
        return [Instance(completion) for completion in self._publish(ref, batch, priority)]

    def _publish(
        self, ref: WorkflowRef, batch: list[StartRequest], priority: int, within: tuple[float, float] | None = None
    ) -> list[Completion]:
        """Publish all or none of `batch`; an existing instance with the same input counts as started.

        `within`: (deadline on the monotonic clock, its length in seconds) of the confirmation, or `TimeoutError`.
        """
        if not isinstance(priority, int) or isinstance(priority, bool) or not -1000 <= priority <= 1000:
            raise ValueError(f"priority must be a whole number from -1000 to 1000, not {priority!r}")
        session = self._session
        completions = [Completion(session, request.id, ref) for request in batch]
        waiting = list(zip(batch, completions, strict=True))

        def check() -> None:
            session.check_alive()
            if within is not None and time.monotonic() >= within[0]:
                raise TimeoutError(
                    f"the start of instance {batch[0].id!r} was not confirmed within {within[1]:g} s; it may go on"
                )

        for _ in range(MAX_LOOKUPS):
            self._take_finished(ref, waiting)
            waiting = [(request, completion) for request, completion in waiting if completion.outcome is None]
            if not waiting:
                return completions
            answer = None
            try:
                batch = [request for request, _ in waiting]
                on_numbered = partial(self._watch, waiting)
                future = session.publish(
                    ref, batch, priority=priority, atomic=True, on_numbered=on_numbered, check=check
                )
                answer = session.wait_for(future, check=check)
            finally:
                if answer is None:
                    self._unwatch(waiting)
            if not answer.refused:
                return completions
            session.advance_history_sequence(answer.history_sequence)
            look_again = {group for _, reason, group in answer.refused if reason == "look-again"}
            conflict = next((group for _, reason, group in answer.refused if reason == "conflict"), None)
            if conflict is None and not look_again:
                return completions
            self._unwatch(waiting)
            if conflict is not None:
                error = conflict_with_live(session, ref, [request for request, _ in waiting if request.id == conflict])
                if error is not None:
                    raise error
                continue
            for request, _ in waiting:
                request.check = request.check or request.id in look_again
        raise BrokerUnavailable("instances of these ids end faster than the history can be searched; try again")

    def _take_finished(self, ref: WorkflowRef, waiting: Pending) -> None:
        """Set the outcome of each instance that has ended. Raises `InstanceConflict` if one had another input."""
        # Before the history is read: the broker refuses a start if instances have left it after this count.
        history_sequence = self._session.history_sequence
        for request, _ in waiting:
            request.history_sequence = history_sequence
        finished = self._session.finished_rows([request for request, _ in waiting if request.check])
        for request, _ in waiting:
            row = finished.get(request.id)
            conflict = None if row is None else conflict_with_row(ref, request, row)
            if conflict is not None:
                raise conflict
        for request, completion in waiting:
            row = finished.get(request.id)
            if row is not None:
                completion.set_outcome(row.outcome)

    def _watch(self, waiting: Pending) -> None:
        for request, completion in waiting:
            self._session.waiters.add(request.id, completion)

    def _unwatch(self, waiting: Pending) -> None:
        for request, completion in waiting:
            self._session.waiters.remove(request.id, completion)


def session_of(client: Client) -> Session:
    """Return the session of a client, for commands that need more than its public methods."""
    return client._session
