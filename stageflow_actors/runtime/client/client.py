"""`Client`: starting instances and hearing how they end, from any process of the host.

Every start is numbered and confirmed by the broker before the call returns. Ends arrive pushed, on the connection's
thread, and are handed to whoever waits; what has left the broker is looked up in the history.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from stageflow_actors.core.codec import ContextCodec, encode_value
from stageflow_actors.core.description import status_of, version_of
from stageflow_actors.core.plan import (
    ITEM,
    compile_plan,
    item_id,
)
from stageflow_actors.core.plural import counted
from stageflow_actors.core.result import WorkflowResult
from stageflow_actors.core.routing import signal_key
from stageflow_actors.core.status import WorkflowStatus
from stageflow_actors.definition.duration import Duration, timeout_seconds
from stageflow_actors.definition.stage import MAX_ACTORS
from stageflow_actors.definition.workflow import Workflow
from stageflow_actors.errors import (
    BrokerUnavailable,
    InstanceConflict,
    InstanceNotFound,
    InvalidContext,
    StageFlowError,
)
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.runtime.client.event_stream import Callback, Feed
from stageflow_actors.runtime.client.instance import Instance
from stageflow_actors.runtime.client.map_iterator import Mapping, as_completed
from stageflow_actors.runtime.client.session import STOPPED, Asking, no_text
from stageflow_actors.runtime.client.workflow_ref import Known, Prepared
from stageflow_actors.runtime.messaging.errors import translate_error
from stageflow_actors.runtime.messaging.pauses import pause
from stageflow_actors.runtime.messaging.queue_info import QueueInfo, queue_infos
from stageflow_brokers import api as port
from stageflow_brokers.api import Arrival
from stageflow_brokers.failpoints import failpoint

__all__ = ["Client"]

C = TypeVar("C")

MOST_SEARCHED = 10_000
"""How many live instances are looked through for those of one status or workflow; the latest first."""

DRAIN_SECONDS = 0.25
"""How often a drain looks whether what is left only waits."""

LOOKED_UP = 500
"""Instances asked after at once."""

MOST_AT_ONCE = 10_000
"""Most contexts of one `submit_many`."""

LOOKS = 50
"""How often a start looks into the history again before it gives up: each time something of that id left meanwhile."""


class Client(Asking):
    """The calls that every process of the host may make while a runtime serves the data directory."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[tuple[str, int], Known] = {}
        self._max_message_bytes = 16 << 20
        self._ttl = 0.0
        self._callbacks: list[Callback] = []
        self._feed: Feed | None = None
        self._feed_lock = threading.Lock()

    # starting instances

    def submit(
        self, workflow: Workflow[C] | str, context: C, *, instance_id: str | None = None, priority: int = 0
    ) -> Instance[C]:
        """Start one instance; durable when this returns.

        The same `instance_id` with the same input gives the existing instance. Raises `InvalidContext`,
        `PayloadTooLarge`, `QueueFull`, `InstanceConflict` (that id, another input); nothing is enqueued then.
        """
        known = self._workflow(workflow)
        return self._start(known, [known.prepare(context, instance_id)], priority)[0]

    def submit_many(
        self, workflow: Workflow[C] | str, contexts: Iterable[C], *, instance_ids: Sequence[str] | None = None
    ) -> list[Instance[C]]:
        """Start up to 10,000 instances, all or none; `map` is for more. Raises as `submit` does."""
        known = self._workflow(workflow)
        given = list(contexts)
        if len(given) > MOST_AT_ONCE:
            raise ValueError(f"submit_many takes up to {MOST_AT_ONCE} contexts, not {len(given)}; use map for more")
        if isinstance(instance_ids, (str, bytes)):
            raise ValueError(f"instance_ids is a list of ids, not {instance_ids!r}")
        if instance_ids is not None and len(instance_ids) != len(given):
            raise ValueError(f"{len(given)} contexts were given {len(instance_ids)} instance_ids: one each, please")
        ids = instance_ids if instance_ids is not None else [None] * len(given)
        prepared = []
        for number, (context, id) in enumerate(zip(given, ids, strict=True)):
            try:
                prepared.append(known.prepare(context, id))
            except InvalidContext as error:
                raise InvalidContext(f"context {number}: {error}", stage=error.stage, field=error.field) from None
        return self._start(known, prepared, 0) if prepared else []

    def execute(
        self,
        workflow: Workflow[C] | str,
        context: C,
        *,
        timeout: Duration | None = None,
        instance_id: str | None = None,
        priority: int = 0,
    ) -> WorkflowResult[C]:
        """Start one instance and wait for its end. Raises `TimeoutError` after `timeout`; the instance goes on.

        The start is part of `timeout`; the error says so where it was not confirmed within that.
        """
        seconds, began = timeout_seconds(timeout), time.monotonic()
        known = self._workflow(workflow)
        prepared = known.prepare(context, instance_id)
        within = None if seconds is None else (began + seconds, seconds)
        instance = self._start(known, [prepared], priority, within)[0]
        instance._wait(seconds, began)
        return instance.result(0)

    def map(
        self,
        workflow: Workflow[C] | str,
        contexts: Iterable[C],
        *,
        key: Callable[[C], Any] | str | None = None,
        progress: bool = False,
        retry_failed: bool = False,
    ) -> Iterator[WorkflowResult[C]]:
        """Run a workflow over any number of contexts; results in the order of the input.

        A bounded number is in flight. `key` (a function of the context, or a field's name) names each instance: what
        has finished before is not run again, its stored result is yielded. `retry_failed` runs anew what ended
        otherwise than completed. A refused context raises where its result would have been yielded; the iterator can
        go on.
        """
        return Mapping(self, self._workflow(workflow), contexts, key, progress, retry_failed, ordered=True)

    def map_unordered(
        self,
        workflow: Workflow[C] | str,
        contexts: Iterable[C],
        *,
        key: Callable[[C], Any] | str | None = None,
        progress: bool = False,
        retry_failed: bool = False,
    ) -> Iterator[WorkflowResult[C]]:
        """As `map`, in order of completion."""
        return Mapping(self, self._workflow(workflow), contexts, key, progress, retry_failed, ordered=False)

    def as_completed(self, instances: Iterable[Instance[C]], timeout: Duration | None = None) -> Iterator[Instance[C]]:
        """The instances as they end (or are parked). Raises `TimeoutError` after `timeout` seconds."""
        return as_completed(instances, timeout_seconds(timeout))

    # looking

    def instance(self, instance_id: str) -> Instance[Any]:
        """The instance of that id, live or finished. Raises `InstanceNotFound`."""
        group = self._lookup([instance_id]).get(instance_id)
        if group is not None:
            return Instance(self, instance_id, self._known_of_group(group))
        row = self._row(instance_id)
        if row is None:
            raise InstanceNotFound(instance_id)
        instance: Instance[Any] = Instance(self, instance_id, self._known_version(row.workflow_id, row.version))
        instance._take(row.outcome)
        return instance

    def instances(
        self,
        status: WorkflowStatus | str | None = None,
        workflow: Workflow[Any] | str | None = None,
        limit: int = 100,
    ) -> list[Instance[Any]]:
        """Instances, live ones first, newest first; at most `limit`, and of live ones at most 100,000."""
        wanted = None if status is None else WorkflowStatus(status)
        workflow_id = workflow.id if isinstance(workflow, Workflow) else workflow
        found: list[Instance[Any]] = []
        ids: set[str] = set()
        if wanted is None or not wanted.terminal:
            most = (
                min(max(limit, 0), port.MAX_LISTED_GROUPS) if wanted is None and workflow_id is None else MOST_SEARCHED
            )
            for group in self._ask(lambda admin: admin.list_groups("", most)):
                if len(found) >= limit:
                    break
                if wanted is not None and status_of(group) != wanted:
                    continue
                if workflow_id is not None and (version_of(group) or ("", 0))[0] != workflow_id:
                    continue
                found.append(Instance(self, group["id"], self._known_of_group(group)))
                ids.add(group["id"])
        if wanted is None or wanted.terminal:
            if wanted is not None:
                self._let_history_catch_up()
            reader = self._reader()
            rows = [] if reader is None else reader.list(wanted, workflow_id, max(0, limit - len(found)))
            for row in rows:
                if row.instance_id not in ids:
                    instance: Instance[Any] = Instance(
                        self, row.instance_id, self._known_version(row.workflow_id, row.version)
                    )
                    instance._take(row.outcome)
                    found.append(instance)
        return found

    def queues(self, prefix: str = "") -> list[QueueInfo]:
        """Figures of each queue whose name begins with `prefix`."""
        return queue_infos(self._ask(lambda admin: admin.stats(prefix)))

    def stats(self) -> dict[str, Any]:
        """Figures of the broker and the history."""
        stats = self._ask(lambda admin: admin.stats(""))
        figures: dict[str, Any] = {**stats}
        reader = self._reader()
        figures["finished"] = {} if reader is None else reader.count()
        return figures

    def finished_count(self) -> int:
        """How many instances the history holds."""
        reader = self._reader()
        return 0 if reader is None else sum(reader.count().values())

    def pause(self, queue: str) -> None:
        """Deliver nothing from a queue until it is resumed; survives restarts."""
        pause(self._ask, queue)

    def resume(self, queue: str) -> None:
        """Deliver from a paused queue again."""
        self._ask(lambda admin: admin.resume(queue))

    def scale(self, workflow: Workflow[Any] | str, stage: str, actors: int) -> None:
        """Run a stage with another number of worker processes from now on; of a map stage, what handles its items.

        It holds until the cluster is stopped. Raises `ValueError`, `StageFlowError` for a stage without workers.
        """
        if isinstance(actors, bool) or not isinstance(actors, int) or not 0 <= actors <= MAX_ACTORS:
            raise ValueError(f"actors is a whole number from 0 to {MAX_ACTORS:,}, not {actors!r}")
        plan = self._workflow(workflow).plan
        planned = plan.stage(item_id(stage)) or plan.stage(stage)
        if planned is None or not planned.has_pool:
            names = ", ".join(s.id for s in plan.stages if s.has_pool and s.kind != ITEM)
            what = "has no stage" if planned is None else "has no workers at"
            raise StageFlowError(f"workflow {plan.id!r} {what} {stage!r}: its stages with workers are {names}")
        self._scale(planned.queue, actors)

    def _scale(self, queue: str, actors: int) -> None:
        if not self._ask(lambda admin: admin.notify_supervisor("scale", [queue, actors])):
            raise BrokerUnavailable("the node of this cluster is being started again; try again")

    def on_event(self, callback: Callback) -> Callable[[], None]:
        """Have `callback` told of each stage that completes and each instance that ends, whoever submitted it.

        It is given the events of `stageflow_actors.events`, on a thread of its own: at most once each, those of one
        instance in order. What it raises is logged; what it is too slow for is dropped, and the number logged. Returns
        a function that ends it. Before `start`, it begins with that.
        """
        if not callable(callback):
            raise TypeError(f"on_event takes a function of an event, not {callback!r}")
        self._callbacks.append(callback)
        if self._broker is not None:
            self._follow(self._address)

        def end() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)
            if not self._callbacks:
                self._unfollow()

        return end

    def _follow(self, address: str) -> None:
        """Listen for events, if anybody wants them and it is not done already; returns when the broker tells them."""
        with self._feed_lock:
            if not self._callbacks or self._feed is not None:
                return
            self._feed = Feed(address, f"events {os.getpid()}", self._callbacks, self._form_of)
            subscribed = self._feed.subscribed
        self._await(subscribed)

    def _unfollow(self) -> None:
        with self._feed_lock:
            feed, self._feed = self._feed, None
        if feed is not None:
            feed.close()

    def _form_of(self, workflow_id: str, version: int) -> tuple[ContextCodec[Any], list[str]] | None:
        known = self._known_version(workflow_id, version)
        return None if known is None else (known.codec, known.order)

    def drain(self, timeout: Duration | None = None) -> None:
        """Wait until everything this client submitted has ended, is parked, or waits for a signal or a delay.

        Raises `TimeoutError` after `timeout` seconds.
        """
        most = timeout_seconds(timeout)
        deadline = None if most is None else time.monotonic() + most
        waiting = self._waiters.by_id
        while waiting:
            self._check_alive()
            left = 0.5 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{counted(len(waiting), 'instance')} had not ended after {most:g} s")
            self._waiters.wait_quiet(min(left, DRAIN_SECONDS))
            if self._all_waiting():
                return

    def _all_waiting(self) -> bool:
        """Whether nothing will happen to what this client submitted until a signal comes or a delay is over."""
        ids = list(self._waiters.by_id)
        for first in range(0, len(ids), LOOKED_UP):
            chunk = ids[first : first + LOOKED_UP]
            groups = self._lookup(chunk)
            if any(id not in groups or status_of(groups[id]) != WorkflowStatus.waiting for id in chunk):
                return False
        return True

    # the connection

    def close(self) -> None:
        """Let go of the cluster, which goes on with all that was submitted. Closing again does nothing."""
        self._detach("this client has been closed; open another one with Runtime.connect(data_dir)")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _detach(self, why: str = STOPPED) -> None:
        self._unfollow()
        super()._detach(why)

    # publishing

    def _workflow(self, workflow: Workflow[Any] | str) -> Known:
        self._port()
        if isinstance(workflow, Workflow):
            known = self._known.get((workflow.id, workflow.version))
            if known is None:
                known = self._adopt(workflow)
            elif known.codec.context_type is not workflow.context:
                raise StageFlowError(
                    f"workflow {workflow.id!r} was registered here with another class as its context than this "
                    f"{workflow.context.__name__}: was the code that defines it run again? Start a Runtime with the "
                    "new workflow, or give it another version and register() it"
                )
            return known
        versions = [known for (id, _), known in self._known.items() if id == workflow]
        if not versions:
            names = ", ".join(sorted({repr(id) for id, _ in self._known})) or "none"
            raise StageFlowError(
                f"no workflow {workflow!r} is registered here (there is {names}): use register(workflow)"
            )
        return max(versions, key=lambda known: known.plan.version)

    def _adopt(self, workflow: Workflow[Any]) -> Known:
        """A workflow that this client has not seen: a plain client knows it from now on, a runtime must register it."""
        known = Known(compile_plan(workflow, self._naming, default_ttl=self._ttl), workflow.context)
        self._known[(workflow.id, workflow.version)] = known
        return known

    def _publish(
        self,
        known: Known,
        batch: list[Prepared],
        *,
        priority: int = 0,
        atomic: bool = False,
        taken: Callable[[], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> Future[port.PublishAnswer]:
        now = time.time()
        bodies = [known.body(prepared, now, self._max_message_bytes) for prepared in batch]
        items = [known.item(p, len(body), priority) for p, body in zip(batch, bodies, strict=True)]
        failpoint("client.publishing")
        try:
            published = self._port().publish(
                [known.target], items, bodies, atomic=atomic, taken=taken, waiting=check or self._check_alive
            )
            failpoint("client.published")
            return published
        except port.BrokerError as error:
            raise translate_error(error) from None

    def _start(
        self, known: Known, batch: list[Prepared], priority: int, within: tuple[float, float] | None = None
    ) -> list[Instance[Any]]:
        """Publish all or none of `batch`; what exists already with the same input is given back as it is.

        `within`: (until when on the monotonic clock, in how many seconds) it is to be confirmed, or `TimeoutError`.
        """
        if not isinstance(priority, int) or isinstance(priority, bool) or not -1000 <= priority <= 1000:
            raise ValueError(f"priority is a whole number from -1000 to 1000, not {priority!r}")
        instances: list[Instance[Any]] = [Instance(self, p.id, known) for p in batch]
        waiting = list(zip(batch, instances, strict=True))

        def check() -> None:
            self._check_alive()
            if within is not None and time.monotonic() >= within[0]:
                raise TimeoutError(
                    f"the start of instance {batch[0].id!r} was not confirmed within {within[1]:g} s; it may go on"
                )

        for _ in range(LOOKS):
            self._take_finished(waiting)
            waiting = [(p, instance) for p, instance in waiting if instance._outcome is None]
            if not waiting:
                return instances
            answer = None
            try:
                batch = [p for p, _ in waiting]
                taken = partial(self._rewatch, waiting)
                future = self._publish(known, batch, priority=priority, atomic=True, taken=taken, check=check)
                answer = self._await(future, check=check)
            finally:
                if answer is None:
                    self._unwatch(waiting)
            if not answer.refused:
                return instances
            self._seen = max(self._seen, answer.history_sequence)
            again = {group for _, why, group in answer.refused if why == "look-again"}
            clash = next((group for _, why, group in answer.refused if why == "conflict"), None)
            if clash is None and not again:
                return instances
            self._unwatch(waiting)
            if clash is not None:
                raise InstanceConflict(clash)
            for prepared, _ in waiting:
                prepared.check = prepared.check or prepared.id in again
        raise BrokerUnavailable("instances of these ids end faster than they can be looked up; try again")

    def _signal(self, instance_id: str, name: str, payload: Any) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"the name of a signal is a string that is not empty, not {name!r}")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise no_text(error) from None
        data = encode_value(payload, what=f"the payload of signal {name!r}")
        group = self._lookup([instance_id]).get(instance_id)
        if group is None or group["ended"]:
            raise InstanceNotFound(instance_id)
        known = self._known_of_group(group)
        if known is not None:
            known.plan.check_signal(name)
        arrival = Arrival(signal_key(name), os.urandom(8).hex(), len(data), instance_id)
        answer = self._await(self._port().publish([], [], [data], arrivals=[arrival]))
        if answer.refused:
            raise InstanceNotFound(instance_id)

    def _take_finished(self, waiting: list[tuple[Prepared, Instance[Any]]]) -> None:
        """What has ended before is given its outcome. Raises `InstanceConflict` for one that had another input."""
        seen = self._seen
        for prepared, _ in waiting:
            prepared.seen = seen  # before the history is read: what leaves from now on is found out about
        finished = self._finished([prepared for prepared, _ in waiting if prepared.check])
        for prepared, _ in waiting:
            row = finished.get(prepared.id)
            if row is not None and row.digest != prepared.digest:
                raise InstanceConflict(prepared.id)
        for prepared, instance in waiting:
            row = finished.get(prepared.id)
            if row is not None:
                instance._take(row.outcome)

    def _rewatch(self, waiting: list[tuple[Prepared, Instance[Any]]]) -> None:
        for prepared, instance in waiting:
            self._waiters.add(prepared.id, instance)

    def _unwatch(self, waiting: list[tuple[Prepared, Instance[Any]]]) -> None:
        for prepared, instance in waiting:
            self._waiters.remove(prepared.id, instance)

    def _finished(self, batch: list[Prepared]) -> dict[str, HistoryRow]:
        """The rows of those that have ended and are not under way again."""
        reader = self._reader() if batch else None
        rows = {} if reader is None else reader.get_many([prepared.id for prepared in batch])
        if reader is None or not rows:
            return rows
        # One that was restarted has the row of its last run until the one of this run is written.
        ended = list(rows.keys() - self._lookup(list(rows)).keys())
        return reader.get_many(ended) if ended else {}

    def _known_version(self, workflow_id: str, version: int) -> Known | None:
        return self._known.get((workflow_id, version))

    def _known_of_group(self, group: dict[str, Any]) -> Known | None:
        version = version_of(group)
        return None if version is None else self._known_version(*version)
