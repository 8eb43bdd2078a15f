"""`Instance`: a handle on one run of a workflow, in whichever process.

A handle holds the outcome once it is known, and nothing else: what is not known is asked of the broker and the history.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.description import progress_of, status_of
from stageflow_actors.core.envelope import NIL, decode_envelope, decode_outcome, head_of
from stageflow_actors.core.failures import read_failure
from stageflow_actors.core.plan import DLQ_PREFIX, ITEM_SUFFIX
from stageflow_actors.core.result import WorkflowResult, parked_result, result_of_outcome
from stageflow_actors.core.status import WorkflowStatus
from stageflow_actors.core.timeline import TimelineEntry, timeline_of_group, timeline_of_outcome
from stageflow_actors.definition.duration import Duration, timeout_seconds
from stageflow_actors.errors import InstanceNotFound, InstanceParked, StageFlowError
from stageflow_actors.runtime.client.reruns import cancel, restart, retry

if TYPE_CHECKING:
    from stageflow_actors.runtime.client.client import Client
    from stageflow_actors.runtime.client.workflow_ref import Known

__all__ = ["Instance"]

C = TypeVar("C")


class Instance(Generic[C]):
    """One instance. `id` names it; equal ids are the same instance."""

    __slots__ = ("_callbacks", "_client", "_error", "_event", "_gone", "_known", "_outcome", "_parked", "id")

    _callbacks: list[Callable[[], None]] | None

    def __init__(self, client: Client, id: str, known: Known | None) -> None:
        self.id = id
        self._client = client
        self._known = known
        self._outcome: bytes | None = None
        self._parked = False
        self._gone = False
        self._error: StageFlowError | None = None
        self._event = threading.Event()
        self._callbacks = None

    def status(self) -> WorkflowStatus:
        """Where it stands now. Raises `InstanceNotFound`."""
        if self._outcome is not None:
            return WorkflowStatus(decode_outcome(self._outcome).status)
        group = self._client._lookup([self.id]).get(self.id)
        if group is not None:
            return status_of(group)
        return WorkflowStatus(decode_outcome(self._from_history()).status)

    def done(self) -> bool:
        """Whether it has ended."""
        return self._outcome is not None or self.status().terminal

    def result(self, timeout: Duration | None = None) -> WorkflowResult[C]:
        """Wait for the end. Raises `TimeoutError` after `timeout` seconds (the instance goes on), `InstanceParked`."""
        if self._outcome is None:
            self._wait(timeout_seconds(timeout))
        assert self._outcome is not None
        return self._result(self._outcome)

    def progress(self) -> tuple[float, float, str] | None:
        """(done, total, note) as the stage in work last told by `ctx.progress`; None when it has told nothing."""
        group = None if self._outcome is not None else self._client._lookup([self.id]).get(self.id)
        return None if group is None else progress_of(group)

    def signal(self, name: str, payload: Any = None) -> None:
        """Send a signal; durable when this returns. One that comes before it is awaited is kept, several in order.

        Raises `InstanceNotFound` for an instance that is not live, `InvalidContext` for a payload that cannot travel,
        `StageFlowError` for a name that its workflow never waits for, `ValueError` for what is no name at all.
        """
        self._client._signal(self.id, name, payload)

    def history(self) -> list[TimelineEntry]:
        """What has happened to it so far, in order of time, and where it stands if it has not ended.

        Each entry has `at`, `what`, `stage_id`, `attempt`, `duration`, `error` and `data`. Raises `InstanceNotFound`.
        """
        if self._outcome is None:
            group = self._client._ask(lambda admin: admin.inspect([self.id])).get(self.id)
            if group is not None:
                return timeline_of_group(group)
        return timeline_of_outcome(self._outcome or self._from_history())

    def cancel(self, reason: str = "") -> WorkflowStatus:
        """Cancel it: what has not started does not start, what has completed is compensated.

        A stage in work may end by itself (`ctx.cancelled`), and is killed a second later. Returns what became of the
        instance: `cancelled`, or how it ended if it was faster; where it stands if undoing takes longer than half a
        minute. Raises `InstanceNotFound`.
        """
        return cancel(self._client, self, reason)

    def retry(self, context: C | None = None) -> Instance[C]:
        """Run it again from the failed stage, with another `context` if one is given.

        For an instance that is parked, or that failed with nothing compensated; raises `StageFlowError` for any other.
        It is the same run: steps of the failed stage that have completed do not run again, and idempotency keys stay
        as they are. Of a parallel stage only the branches that failed run again, from the context before it; what the
        others returned and changed is kept, also in another `context`. A map stage that failed is handled anew, each
        item under the key it had, its steps included. `max_message_bytes` is the most that is kept of a stage, beyond
        which a retry is refused.

        While a branch of a parallel stage is parked, another context is given to that branch alone: the fields in which
        it differs from the one before count as changed by the branch. One that another branch has changed, too, is a
        contradiction; `restart(context=...)` begins with one context for all.
        """
        return retry(self._client, self, context)

    def restart(self, context: C | None = None) -> Instance[C]:
        """Run it anew from the first stage, under the same id: with `context`, or with that which the last run left.

        For an instance that has ended or is parked; raises `StageFlowError` for one that is still running.
        """
        return restart(self._client, self, context)

    def __await__(self) -> Generator[Any, None, WorkflowResult[C]]:
        """`await instance` gives its result."""
        return self._awaited().__await__()

    async def _awaited(self) -> WorkflowResult[C]:
        loop = asyncio.get_running_loop()
        told = asyncio.Event()

        def tell() -> None:
            try:
                loop.call_soon_threadsafe(told.set)
            except RuntimeError:
                pass  # the loop has been closed meanwhile: nobody waits there any more

        if self._parked or self._error is not None:
            await asyncio.to_thread(self._forget_old_news)
        if not self._told():
            self._when_told(tell)
            try:
                await asyncio.to_thread(self._ensure_watched)
                if not self._told():
                    await told.wait()
            finally:
                if self._callbacks is not None and tell in self._callbacks:
                    self._callbacks.remove(tell)
        return self._result(self._outcome) if self._outcome is not None else await asyncio.to_thread(self.result)

    def __repr__(self) -> str:
        return f"Instance({self.id!r})"

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, Instance) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    # waiting

    def _wait(self, timeout: float | None, since: float | None = None) -> None:
        """Until there is an outcome; `timeout` seconds from now, or from `since` on the monotonic clock."""
        deadline = None if timeout is None else (time.monotonic() if since is None else since) + timeout
        self._forget_old_news()
        watched = self._ensure_watched()
        while self._outcome is None:
            if self._error is not None:
                raise self._error
            if self._parked:
                raise self._why_parked()
            if self._gone:
                self._from_history()
                return
            left = 1.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                if watched:
                    self._client._waiters.remove(self.id, self)  # it was not started here: leaving need not wait for it
                raise TimeoutError(f"instance {self.id!r} had not ended after {timeout:g} s; it goes on")
            self._client._check_alive()
            self._event.wait(min(left, 1.0))

    def _ensure_watched(self) -> bool:
        """Whether this had to be asked for: nobody had started or watched this instance by this handle."""
        if self._told() or self._client._waiters.has(self.id, self):
            return False
        self._client._watch(self.id, self)
        return True

    def _told(self) -> bool:
        return self._outcome is not None or self._parked or self._gone or self._error is not None

    def _when_told(self, callback: Callable[[], None]) -> None:
        """Call back from the connection's thread once there is news; at once if there is some already."""
        if self._callbacks is None:
            self._callbacks = []
        self._callbacks.append(callback)
        if self._told():
            callback()

    def _forget_old_news(self) -> None:
        """What was parked may have been requeued since, and a client that was stopped may have been started again."""
        if self._error is not None and self._client._dead is None and self._client._broker is not None:
            self._error = None
            self._event.clear()
        if self._parked and self.status() != WorkflowStatus.parked:
            self._parked = False
            self._event.clear()

    def _why_parked(self) -> InstanceParked:
        group = self._client._lookup([self.id]).get(self.id)
        for message in (group or {}).get("messages", ()):
            if message["state"] == "dead":
                failure = read_failure(message["reason"])
                return InstanceParked(
                    self.id, f"{DLQ_PREFIX}{message['queue']}", None if failure is None else failure.message
                )
        return InstanceParked(self.id)

    def _parked_result(self) -> WorkflowResult[C]:
        """What `map` yields of a parked instance."""
        group = self._client._ask(lambda admin: admin.inspect([self.id])).get(self.id) or {}
        for message in group.get("messages", ()):
            if message["state"] != "dead" or "body" not in message:
                continue
            failure = read_failure(message["reason"])
            body = message["body"][: message["base"]]
            self._settle_version(body)
            envelope = decode_envelope(body)
            one = envelope.stage_id.endswith(ITEM_SUFFIX)  # of a map stage: the context waits elsewhere
            return parked_result(
                self.id,
                envelope.workflow_id,
                self._codec(),
                error=None if failure is None else failure.message,
                failed_stage=envelope.stage_id.removesuffix(ITEM_SUFFIX),
                context=NIL if one else envelope.context,
                trail=envelope.trail,
                version=envelope.version,
                started_at=envelope.started_at,
                parked_at=message["parked"],
                order=self._order(),
            )
        raise self._why_parked()

    def _settle_version(self, body: bytes) -> None:
        """Of several versions the one that this instance is of: its bytes say so, its queue does not."""
        head = head_of(body)
        if head is not None:
            self._known = self._client._known_version(head[0], head[1]) or self._known

    def _codec(self) -> ContextCodec[Any]:
        return ContextCodec(dict) if self._known is None else self._known.codec

    def _order(self) -> list[str]:
        return [] if self._known is None else self._known.order

    def _result(self, outcome: bytes) -> WorkflowResult[C]:
        self._settle_version(outcome)
        return result_of_outcome(self.id, outcome, self._codec(), self._order())

    def _from_history(self) -> bytes:
        """The outcome of an instance that the broker has said it does not know (any more): it was written before."""
        row = self._client._row(self.id)
        if row is None:
            raise InstanceNotFound(self.id)
        self._take(row.outcome)
        return row.outcome

    # what a client tells (see `Waiter`)

    def _take(self, outcome: bytes) -> None:
        self._outcome = outcome
        self._event.set()

    def _end(self, instance_id: str, outcome: bytes) -> None:
        self._outcome = outcome

    def _park(self, instance_id: str) -> None:
        self._parked = True

    def _left(self, instance_id: str) -> None:
        self._gone = True  # the history is read by whoever asks, not on the connection's thread

    def _broken(self, error: StageFlowError) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        self._event.set()
        for callback in list(self._callbacks or ()):
            callback()
