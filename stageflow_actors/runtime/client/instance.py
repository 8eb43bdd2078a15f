"""`Instance`: the handle of one instance of a workflow, in any process.

A handle keeps only what its `Completion` has been notified of; everything else is queried from the broker and read from
the history.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar

from stageflow_actors.core.description import progress_of
from stageflow_actors.core.plural import pluralize
from stageflow_actors.core.result import WorkflowResult
from stageflow_actors.core.routing import signal_key
from stageflow_actors.core.status import WorkflowStatus
from stageflow_actors.core.timeline import TimelineEntry, timeline_of_group, timeline_of_outcome
from stageflow_actors.core.value_codec import encode_message
from stageflow_actors.definition.duration import Duration, timeout_seconds
from stageflow_actors.runtime.client.completion import WAIT_SECONDS, Completion
from stageflow_actors.runtime.client.reruns import cancel, restart, retry
from stageflow_actors.runtime.client.session import Session, surrogate_error
from stageflow_actors.runtime.client.wait_notes import NOTE_SECONDS, describe_waits
from stageflow_brokers.api import Arrival

__all__ = ["Instance", "as_completed"]

C = TypeVar("C")

logger = logging.getLogger("stageflow_actors.client")


class Instance(Generic[C]):
    """One instance of a workflow; `Client.submit` and `Client.instance` return it.

    It can be awaited: `result = await instance`. Handles with equal ids are equal.

    Attributes:
        id: The id of the instance.

    Example:
        >>> import tempfile
        >>> from stageflow_actors import Runtime, Workflow
        >>> flow = Workflow("approvals").add_signal("approval").add_stage(lambda context: "shipped", id="ship")
        >>> with tempfile.TemporaryDirectory() as d, Runtime(flow, data_dir=d) as runtime:
        ...     instance = runtime.submit(flow, {}, instance_id="order-1")
        ...     instance.signal("approval")
        ...     result = instance.result(timeout=30)
        ...     print(instance.done(), instance.status(), result.stages[-1].data)
        ...     print(instance.restart().cancel("not wanted"))
        ...     print([entry.what for entry in instance.history()])
        True completed shipped
        cancelled
        ['submitted', 'ended: cancelled']
    """

    __slots__ = ("_completion", "id")

    def __init__(self, completion: Completion) -> None:
        self.id = completion.instance_id
        self._completion = completion

    def status(self) -> WorkflowStatus:
        """Return the current status.

        Returns:
            The status; one with `terminal` True if the instance has ended.

        Raises:
            InstanceNotFound: If no live or finished instance has this id.
            BrokerUnavailable: If the cluster is not running or does not answer.
        """
        return self._completion.status()

    def done(self) -> bool:
        """Return True if the instance has ended.

        Returns:
            True for each terminal status, also for failures; False for a parked instance.

        Raises:
            InstanceNotFound: If no live or finished instance has this id.
            BrokerUnavailable: If the cluster is not running or does not answer.
        """
        self._completion.session.check_process()
        return self._completion.outcome is not None or self.status().terminal

    def result(self, timeout: Duration | None = None) -> WorkflowResult[C]:
        """Wait until the instance has ended, and return its result.

        Args:
            timeout: Longest wait, in seconds or as `timedelta`; None (the default) for no limit.

        Returns:
            The result. A failed instance has one too: see `WorkflowResult.raise_for_status`.

        Raises:
            TimeoutError: If the instance has not ended within `timeout`; it goes on.
            InstanceParked: If the instance is parked; the error names its dead letter.
            InstanceNotFound: If no live or finished instance has this id.
            BrokerUnavailable: If the cluster is not running or stops.
            ValueError: If `timeout` is negative or no number.
        """
        return self._completion.result(timeout_seconds(timeout))

    def progress(self) -> tuple[float, float, str] | None:
        """Return the progress that the stage in work has last reported by `ctx.progress`.

        Returns:
            (done, total, note); None if no stage in work has reported any.

        Raises:
            BrokerUnavailable: If the cluster is not running or does not answer.
        """
        completion = self._completion
        completion.session.check_process()
        group = None if completion.outcome is not None else completion.session.lookup([self.id]).get(self.id)
        return None if group is None else progress_of(group)

    def waiting_for(self) -> str | None:
        """Return what the instance waits for.

        Returns:
            One sentence: which workers cannot start and why, which queue is paused, which signal, reply or time is
            awaited, or that others are before it. None if it is at work or has ended.

        Raises:
            InstanceNotFound: If no live or finished instance has this id.
            BrokerUnavailable: If the cluster is not running or does not answer.

        Example:
            >>> import tempfile
            >>> from stageflow_actors import Runtime, Workflow
            >>> flow = Workflow("approvals").add_signal("approval").add_stage(lambda context: "shipped", id="ship")
            >>> with tempfile.TemporaryDirectory() as d, Runtime(flow, data_dir=d) as runtime:
            ...     instance = runtime.submit(flow, {})
            ...     while instance.status() != "waiting":
            ...         pass
            ...     print(instance.waiting_for())
            signal 'approval'
        """
        return self._completion.waiting_for()

    def signal(self, name: str, payload: Any = None) -> None:
        """Send a signal to the instance; it is durable when this returns.

        A signal that arrives before the instance waits for it is kept; several are used in the order of arrival.

        Args:
            name: The name of the signal, as in `Workflow.add_signal`.
            payload: A value for the workflow's `on_signal`; None by default.

        Raises:
            InstanceNotFound: If the instance is not live.
            InvalidContext: If the payload cannot be serialised.
            StageFlowError: If the workflow never waits for a signal of this name.
            ValueError: If `name` is empty or no string.
        """
        _send_signal(self._completion.session, self.id, name, payload)

    def history(self) -> list[TimelineEntry]:
        """Return the timeline of the instance, in order of time.

        Returns:
            The events so far, and the current state of a live instance. Entries have `at`, `what`, `stage_id`,
            `attempt`, `duration`, `error` and `data`.

        Raises:
            InstanceNotFound: If no live or finished instance has this id.
            BrokerUnavailable: If the cluster is not running or does not answer.
        """
        completion = self._completion
        completion.session.check_process()
        if completion.outcome is None:
            group = completion.session.ask(lambda admin: admin.inspect([self.id])).get(self.id)
            if group is not None:
                return timeline_of_group(group)
        return timeline_of_outcome(completion.outcome or completion.load_outcome())

    def cancel(self, reason: str = "") -> WorkflowStatus:
        """Cancel the instance: no more stages start, completed ones are compensated.

        A stage in work can end early (`ctx.cancelled`) and is killed after one second. Waits up to 30 seconds.

        Args:
            reason: A text for the `error` of the result; empty by default.

        Returns:
            The status after the wait: `cancelled`, or the status of an instance that ended first, or `compensating`
            if compensations take longer.

        Raises:
            InstanceNotFound: If no live or finished instance has this id.
            BrokerUnavailable: If the cluster is not running or does not answer.
            ValueError: If `reason` cannot be encoded.
        """
        return cancel(self._completion.session, self._completion, reason)

    def retry(self, context: C | None = None) -> Instance[C]:
        """Run the failed stage, or the failed compensations, again.

        For an instance that is parked, or that failed with nothing compensated: from the failed stage. For one that
        ended `compensation_failed`: the compensations that failed, in their order; those that succeeded do not run
        again. It ends `compensated` (or `cancelled`, if it was cancelled) if all succeed now. The run stays the same:
        completed steps of the failed stage do not run again, and idempotency keys do not change. Of a parallel stage
        only the failed branches run again, from the context before the stage; the results and changes of the other
        branches are kept, also with a new `context`. All items of a failed map stage are handled again, each under its
        key and with its steps. Results of a stage that exceed `max_message_bytes` are not kept, and such a retry is
        refused.

        While a branch of a parallel stage is parked, a new context is given to that branch only: the fields that
        differ from the previous context count as changed by the branch. A field that another branch has changed too is
        a conflict; `restart(context=...)` begins with one context for all.

        Args:
            context: A new context; None (the default) for the context that the failed stage began with, or that the
                last compensation left.

        Returns:
            This handle, which now waits for the new outcome.

        Raises:
            StageFlowError: If the instance is in another state, or its version is not registered here.
            InvalidContext: If `context` does not fit the workflow.
            InstanceNotFound: If no live or finished instance has this id.
            BrokerUnavailable: If the cluster is not running or does not answer.
        """
        retry(self._completion.session, self._completion, context)
        return self

    def restart(self, context: C | None = None) -> Instance[C]:
        """Run the instance again from the first stage, under the same id.

        For an instance that has ended or is parked. It is a new run, with new idempotency keys.

        Args:
            context: The input of the new run; None (the default) for the final context of the last run.

        Returns:
            This handle, which now waits for the new outcome.

        Raises:
            StageFlowError: If the instance is still running, or its version is not registered here.
            InvalidContext: If `context` does not fit the workflow.
            InstanceNotFound: If no live or finished instance has this id.
            BrokerUnavailable: If the cluster is not running or does not answer.
        """
        restart(self._completion.session, self._completion, context)
        return self

    def __await__(self) -> Generator[Any, None, WorkflowResult[C]]:
        """Wait for the result in an event loop."""
        return self._wait_in_loop().__await__()

    async def _wait_in_loop(self) -> WorkflowResult[C]:
        completion = self._completion
        completion.session.check_process()
        loop = asyncio.get_running_loop()
        notified = asyncio.Event()

        def notify() -> None:
            try:
                loop.call_soon_threadsafe(notified.set)
            except RuntimeError:
                pass  # the loop has been closed: no coroutine waits in it

        if completion.needs_refresh:
            await asyncio.to_thread(completion.refresh)
        if not completion.is_over:
            completion.add_callback(notify)
            try:
                await asyncio.to_thread(completion.watch)
                noted = False
                while not completion.is_over:
                    try:
                        await asyncio.wait_for(notified.wait(), None if noted else NOTE_SECONDS)
                    except TimeoutError:
                        noted = await asyncio.to_thread(completion.note_wait)
            finally:
                completion.remove_callback(notify)
        outcome = completion.outcome
        return completion.decode(outcome) if outcome is not None else await asyncio.to_thread(self.result)

    def __repr__(self) -> str:
        return f"Instance({self.id!r})"

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, Instance) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)


def as_completed(instances: Iterable[Instance[C]], timeout: float | None) -> Iterator[Instance[C]]:
    """Yield each instance once, as it ends or is parked. Raises `TimeoutError` after `timeout` seconds."""
    settled: deque[Instance[C]] = deque()
    event = threading.Event()
    waiting = list(dict.fromkeys(instances))
    for instance in waiting:

        def notify(settled_instance: Instance[C] = instance) -> None:
            settled.append(settled_instance)
            event.set()

        completion = instance._completion
        completion.refresh()
        completion.add_callback(notify)
        completion.watch()
    yielded: set[str] = set()
    deadline = None if timeout is None else time.monotonic() + timeout
    note_at = time.monotonic() + NOTE_SECONDS
    while len(yielded) < len(waiting):
        event.clear()
        while settled:
            instance = settled.popleft()
            error = instance._completion.error
            if error is not None:
                raise error
            if instance.id not in yielded:
                yielded.add(instance.id)
                yield instance
        if len(yielded) < len(waiting) and not settled:
            remaining = WAIT_SECONDS if deadline is None else deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(
                    f"{pluralize(len(waiting) - len(yielded), 'instance')} had not ended after {timeout:g} s"
                )
            if event.wait(min(remaining, WAIT_SECONDS)):
                note_at = time.monotonic() + NOTE_SECONDS
            elif time.monotonic() >= note_at:
                pending = [instance for instance in waiting if instance.id not in yielded]
                text, is_held = describe_waits(pending[0]._completion.session, [instance.id for instance in pending])
                note_at = float("inf") if is_held else time.monotonic() + NOTE_SECONDS
                if is_held:
                    logger.warning("no instance has ended for %g s: %s", NOTE_SECONDS, text)


def _send_signal(session: Session, instance_id: str, name: str, payload: Any) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of a signal must be a non-empty string, not {name!r}")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise surrogate_error(error) from None
    data = encode_message(payload, what=f"the payload of signal {name!r}")
    group = session.lookup([instance_id]).get(instance_id)
    if group is None or group["ended"]:
        raise session.no_instance(instance_id)
    ref = session.ref_of_group(group)
    if ref is not None:
        ref.plan.check_signal(name)
    arrival = Arrival(signal_key(name), os.urandom(8).hex(), len(data), instance_id)
    answer = session.wait_for(session.broker().publish([], [], [data], arrivals=[arrival]))
    if answer.refused:
        raise session.no_instance(instance_id)
