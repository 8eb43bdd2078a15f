"""`MapIterator`: a workflow over any number of contexts, with a bounded number of instances in flight.

All work is done in the caller's thread: it pulls the input, publishes starts and yields results. The connection's
thread only queues the notifications that it receives. The error of a refused context is raised in the place of its
result, and the iterator can go on after it.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from stageflow_actors.core.result import WorkflowResult, result_of_outcome
from stageflow_actors.errors import InstanceConflict, InvalidContext, StageFlowError
from stageflow_actors.runtime.client.completion import Completion
from stageflow_actors.runtime.client.conflicts import conflict_with_live, conflict_with_row
from stageflow_actors.runtime.client.progress_bar import ProgressBar
from stageflow_actors.runtime.client.session import POLL_SECONDS, Session
from stageflow_actors.runtime.client.wait_notes import NOTE_SECONDS, describe_waits
from stageflow_actors.runtime.client.waiters import Waiters
from stageflow_actors.runtime.client.workflow_ref import StartRequest, WorkflowRef
from stageflow_actors.runtime.messaging.errors import translate_error
from stageflow_brokers import api as port
from stageflow_brokers.api import PublishAnswer

__all__ = ["MapIterator"]

logger = logging.getLogger("stageflow_actors.client")

C = TypeVar("C")

MAX_IN_FLIGHT = 8_000
"""Most instances that are started and have not ended."""
MAX_PENDING_RESULTS = 16_000
"""Most results that wait for an earlier one, in `map`, together with the instances in flight."""
BATCH_CONTEXTS = 100
"""Most contexts that are published with one call."""
BATCH_BYTES = 8 << 20
"""A batch also ends with the context that brings it to this many bytes."""
SLOW_PULL_SECONDS = 0.005
"""An input that yields less than a batch in this time is slow: the contexts it has yielded are started."""
RESULT_WAIT_SHARE = 0.5
MAX_RESULT_WAIT_SECONDS = 1.0
"""After a slow pull, the iterator waits for results before the next pull: for `RESULT_WAIT_SHARE` of the duration of
that pull, but never longer than `MAX_RESULT_WAIT_SECONDS`."""
QUEUE_FULL_RETRY_SECONDS = 0.05
"""Time before a batch that was refused with `QueueFull` is published again."""
MAX_ENVELOPE_BYTES = 4096
"""Upper bound of the bytes that an envelope adds to its context."""

_PARKED, _LEFT = object(), object()


class MapIterator(Iterator[WorkflowResult[C]], Generic[C]):
    """The iterator that `map` and `map_unordered` return."""

    def __init__(
        self,
        session: Session,
        ref: WorkflowRef,
        contexts: Iterable[C],
        key: Callable[[C], Any] | str | None,
        progress: bool,
        retry_failed: bool,
        *,
        ordered: bool,
    ) -> None:
        self._index: dict[str, int] = {}
        self._waiter = _MapWaiter()
        self._unsent: deque[list[StartRequest]] = deque()
        """Batches that the first stage's queue had no room for."""
        self._session = session
        self._ref = ref
        self._source = iter(contexts)
        self._large_bytes = session.max_message_bytes - MAX_ENVELOPE_BYTES
        self._key = _key_function(key)
        self._retry_failed = retry_failed
        self._ordered = ordered
        self._pulled = 0
        self._next = 0
        self._exhausted = False
        self._next_pull_at = 0.0
        self._duplicates: dict[str, list[int]] = {}
        self._duplicate_count = 0
        self._retried: dict[str, int] = {}
        self._history_current = not retry_failed
        self._digests: dict[str, bytes | None] = {}
        self._arrived = self._waiter.arrived
        self._event = self._waiter.event
        self._ready: dict[int, WorkflowResult[C] | BaseException] = {}
        self._retry_full_at = 0.0
        self._bar = _bar(contexts) if progress else None
        self._quiet_since = time.monotonic()
        self._noted = False

    def __iter__(self) -> MapIterator[C]:
        return self

    def __next__(self) -> WorkflowResult[C]:
        while True:
            self._take_arrived()
            found = self._pop_ready()
            if found is not None:
                if self._bar is not None:
                    self._bar.advance()
                if isinstance(found, BaseException):
                    raise found
                return found
            if self._waiter.error is not None:
                raise self._waiter.error
            if self._unsent:
                self._probe()
            if not self._exhausted and not self._unsent and self._has_room():
                left = self._next_pull_at - time.monotonic() if self._next_pull_at and self._index else 0.0
                if left > 0:
                    self._event.wait(left)
                else:
                    self._next_pull_at = 0.0
                    self._pull()
            elif self._exhausted and not self._index and not self._ready and not self._arrived:
                self.close()
                raise StopIteration
            else:
                self._wait()

    def _note_wait(self) -> None:
        """Log what the instances wait for if no result has arrived for some time, once until one arrives."""
        now = time.monotonic()
        if now - self._quiet_since < NOTE_SECONDS:
            return
        self._quiet_since = now
        text, is_held = describe_waits(self._session, self._index)
        self._noted = is_held
        if is_held:
            logger.warning("no result for %g s: %s", NOTE_SECONDS, text)

    def close(self) -> None:
        """Stop pulling; the instances in flight go on, and the history keeps their results."""
        self._exhausted = True
        bar, self._bar = self._bar, None
        if bar is not None and not self._session.is_inherited:
            bar.close()

    def __del__(self) -> None:
        waiter, waiters = self._waiter, self._session.waiters
        waiter.dropped = waiters
        for instance_id in self._index:
            waiters.abandon(instance_id, waiter)
        for batch in self._unsent:
            waiter.abandon_refused(batch, None)
        for batch_or_id, answer in waiter.arrived:
            if isinstance(batch_or_id, list):
                waiter.abandon_refused(batch_or_id, answer)

    # results

    def _pop_ready(self) -> WorkflowResult[C] | BaseException | None:
        ready = self._ready
        if not ready:
            return None
        if self._ordered:
            found = ready.pop(self._next, None)
            if found is not None:
                self._next += 1
            return found
        first = next(iter(ready))
        return ready.pop(first)

    def _take_arrived(self) -> None:
        self._session.check_alive()  # before the event, whose lock another thread may have held during a fork
        arrived = self._arrived
        self._event.clear()
        index = self._index
        codec, layout = self._ref.codec, self._ref.layout
        while arrived:
            instance_id, news = arrived.popleft()
            if type(news) is bytes:
                at = index.pop(instance_id, None)
                if at is None:
                    continue
                found: WorkflowResult[C] | BaseException = result_of_outcome(instance_id, news, codec, layout)
            elif news is _PARKED or news is _LEFT:
                at = index.pop(instance_id, None)
                if at is None:
                    continue
                found = self._look_up(instance_id, news)
            else:
                self._handle_answer(instance_id, news)
                continue
            self._put(instance_id, at, found)
            self._retry_full_at = 0.0  # an instance has ended, so there may be room

    def _look_up(self, instance_id: str, news: object) -> WorkflowResult[C] | BaseException:
        completion = Completion(self._session, instance_id, self._ref)
        try:
            if news is _PARKED:
                return completion.parked_result()
            return completion.decode(completion.load_outcome())
        except StageFlowError as error:
            return error

    def _put(self, instance_id: str, at: int, found: WorkflowResult[C] | BaseException) -> None:
        """Make the result or error of an instance ready at each position where the input names the instance."""
        self._ready[at] = found
        if self._key is not None:
            duplicates = self._duplicates.pop(instance_id, ())
            self._duplicate_count -= len(duplicates)
            for duplicate in duplicates:
                self._ready[duplicate] = found
            self._digests.pop(instance_id, None)

    def _refuse(self, instance_id: str, error: BaseException) -> None:
        at = self._index.pop(instance_id, None)
        self._session.waiters.remove(instance_id, self._waiter)
        if at is not None:
            error.instance_id = instance_id  # type: ignore[attr-defined]
            self._put(instance_id, at, error)

    # input

    def _has_room(self) -> bool:
        in_flight = len(self._index) + self._duplicate_count
        return in_flight < MAX_IN_FLIGHT and (not self._ordered or in_flight + len(self._ready) < MAX_PENDING_RESULTS)

    def _pull(self) -> None:
        batch: list[StartRequest] = []
        size = 0
        began = time.perf_counter()
        took = 0.0
        try:
            for context in self._source:
                at = self._pulled
                self._pulled += 1
                request = self._prepare(context, at)
                if request is not None:
                    batch.append(request)
                    size += len(request.data)
                if len(batch) >= BATCH_CONTEXTS or size >= BATCH_BYTES:
                    break
                took = time.perf_counter() - began
                if took > SLOW_PULL_SECONDS:
                    self._next_pull_at = time.monotonic() + min(took * RESULT_WAIT_SHARE, MAX_RESULT_WAIT_SECONDS)
                    break
            else:
                self._exhausted = True
        except Exception as error:  # noqa: BLE001 - the input is user code, and its error belongs to this position
            self._ready[self._pulled] = error
            self._pulled += 1
            self._exhausted = True
        finally:
            # Also when the input was interrupted: the index contains the contexts that it has yielded.
            if batch:
                self._start(batch)

    def _prepare(self, context: C, at: int) -> StartRequest | None:
        key: Any = None
        try:
            if self._key is not None:
                key = self._key(context)
                if key is None:
                    raise InvalidContext("the key that names the instance is None")
                key = key if isinstance(key, str) else str(key)
            request = self._ref.prepare(context, key)
            if len(request.data) > self._large_bytes:
                self._ref.body(request, 0.0, self._session.max_message_bytes)  # raises if it is too large
        except Exception as error:  # noqa: BLE001 - a key function may raise anything: the error belongs to this context
            error.instance_id = key  # type: ignore[attr-defined]
            self._ready[at] = error
            return None
        if request.id in self._index:
            if self._digests.get(request.id) == request.digest:
                self._duplicates.setdefault(request.id, []).append(at)
                self._duplicate_count += 1
            else:
                conflict = InstanceConflict(request.id)
                conflict.instance_id = request.id
                self._ready[at] = conflict
            return None
        self._index[request.id] = at
        if request.digest is not None:
            self._digests[request.id] = request.digest
        return request

    def _start(self, batch: list[StartRequest]) -> bool:
        """Skip the finished instances and publish the others; return True if there were others.

        An error refuses the whole batch.
        """
        waiters = self._session.waiters
        try:
            if not self._history_current:
                # An instance that has just failed may not be in the history yet: it would be joined, not run again.
                self._history_current = True
                self._session.await_history()
            if batch[0].check or self._key is not None:
                batch = self._without_finished(batch)
                if not batch:
                    return False
            waiter, ids = self._waiter, [request.id for request in batch]
            future = self._session.publish(self._ref, batch, on_numbered=lambda: waiters.add_all(ids, waiter))
        except Exception as error:  # noqa: BLE001 - after any error no instance of the batch has been started
            for request in batch:
                self._refuse(request.id, copy.copy(error))
            return False
        on_answer = self._waiter.on_answer
        future.add_done_callback(lambda done: on_answer(batch, done))
        return True

    def _without_finished(self, batch: list[StartRequest]) -> list[StartRequest]:
        history_sequence = self._session.history_sequence
        for request in batch:
            request.history_sequence = history_sequence
        rows = self._session.finished_rows(batch)
        if not rows:
            return batch
        remaining = []
        for request in batch:
            row = rows.get(request.id)
            if row is None:
                remaining.append(request)
            elif (conflict := conflict_with_row(self._ref, request, row)) is not None:
                self._refuse(request.id, conflict)
            elif self._retry_failed and row.status != "completed" and row.epoch != self._retried.get(request.id):
                request.epoch = self._retried[request.id] = row.epoch + 1
                remaining.append(request)
            else:
                self._arrived.append((request.id, row.outcome))
        return remaining

    def _handle_answer(self, batch: list[StartRequest], answer: PublishAnswer | BaseException) -> None:
        probed, self._waiter.probing = self._waiter.probing, False
        if isinstance(answer, port.QueueFull):
            # A batch is accepted whole or not at all, and may be larger than the queue.
            half = (len(batch) + 1) // 2
            parts = [part for part in (batch[:half], batch[half:]) if part]
            if probed:
                self._unsent.extendleft(reversed(parts))
            else:
                self._unsent.extend(parts)
            self._retry_full_at = time.monotonic() + QUEUE_FULL_RETRY_SECONDS
            return
        if isinstance(answer, BaseException):
            for request in batch:
                self._refuse(request.id, translate_error(answer))
            return
        by_id = {request.id: request for request in batch}
        look_again = []
        self._session.advance_history_sequence(answer.history_sequence)
        for _, why, instance_id in answer.refused:
            if why == "conflict":
                conflict = conflict_with_live(self._session, self._ref, [by_id[instance_id]])
                if conflict is not None:
                    self._refuse(instance_id, conflict)
                    continue
                look_again.append(by_id[instance_id])
                self._session.waiters.remove(instance_id, self._waiter)
            elif why == "look-again":
                by_id[instance_id].check = True
                look_again.append(by_id[instance_id])
                # Its outcome may be in the history: then no notification follows.
                self._session.waiters.remove(instance_id, self._waiter)
        if look_again:
            self._start(look_again)

    def _probe(self) -> None:
        """Send the next batch that the first stage's queue had no room for; one at a time until one is accepted."""
        if not self._waiter.probing and time.monotonic() >= self._retry_full_at:
            self._waiter.probing = True
            if not self._start(self._unsent.popleft()):
                self._waiter.probing = False

    def _wait(self) -> None:
        if self._arrived or self._event.wait(QUEUE_FULL_RETRY_SECONDS if self._unsent else POLL_SECONDS):
            self._quiet_since, self._noted = time.monotonic(), False
        elif not self._noted:
            self._note_wait()
        if self._bar is not None:
            self._bar.refresh()


class _MapWaiter:
    """The waiter of an iterator: the connection's thread appends to it, and it does not keep the iterator alive.

    After the iterator is `dropped`, refused starts are not sent again, so the program no longer waits for them.
    """

    __slots__ = ("arrived", "dropped", "error", "event", "probing")

    def __init__(self) -> None:
        self.arrived: deque[tuple[Any, Any]] = deque()
        self.event = threading.Event()
        self.error: StageFlowError | None = None
        self.probing = False
        self.dropped: Waiters | None = None

    def on_answer(self, batch: list[StartRequest], done: Future[PublishAnswer]) -> None:
        """Pass on the broker's answer to a batch, if the iterator has to act on it."""
        answer = done.exception() or done.result()
        if self.probing or not isinstance(answer, PublishAnswer) or answer.refused:
            if self.dropped is not None:
                self.abandon_refused(batch, answer)
                return
            self.arrived.append((batch, answer))
            self.event.set()

    def abandon_refused(self, batch: list[StartRequest], answer: PublishAnswer | BaseException | None) -> None:
        """Stop waiting for the instances of an answered batch that did not start; `answer` None: it was not sent."""
        assert self.dropped is not None
        refused: dict[str, str] = {}
        if isinstance(answer, PublishAnswer):
            refused = {instance_id: why for _, why, instance_id in answer.refused if why != "exists"}
        for request in batch:
            if request.id in refused or not isinstance(answer, PublishAnswer):
                self.dropped.remove_abandoned(request.id)

    # see `Waiter`

    def on_ended(self, instance_id: str, outcome: bytes) -> None:
        self.arrived.append((instance_id, outcome))

    def on_parked(self, instance_id: str) -> None:
        self.arrived.append((instance_id, _PARKED))

    def on_left(self, instance_id: str) -> None:
        self.arrived.append((instance_id, _LEFT))

    def on_failure(self, error: StageFlowError) -> None:
        self.error = error
        self.event.set()

    def wake(self) -> None:
        self.event.set()


def _bar(contexts: Iterable[Any]) -> ProgressBar:
    return ProgressBar("instances", len(contexts) if isinstance(contexts, Sized) else None)


def _key_function(key: Callable[[Any], Any] | str | None) -> Callable[[Any], Any] | None:
    if key is None or callable(key):
        return key
    name = key

    def field(context: Any) -> Any:
        try:
            return context[name] if isinstance(context, dict) else getattr(context, name)
        except (KeyError, AttributeError):
            has = ", ".join(map(repr, context)) if isinstance(context, dict) else type(context).__qualname__
            raise InvalidContext(
                f"context.{name} is missing: key={name!r} takes the instance's id from it; the context is of "
                f"{has or 'no fields'}: name another field, or give a function",
                field=name,
            ) from None

    return field
