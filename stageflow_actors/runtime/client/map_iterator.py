"""`map`: a workflow over any number of contexts, with a bounded number of them in flight.

One thread pulls, publishes and yields: the caller's. The connection's thread only lays down what has arrived. What a
context is refused for is raised where its result would have been, and the iterator goes on behind it.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from stageflow_actors.core.plural import counted
from stageflow_actors.core.result import WorkflowResult, result_of_outcome
from stageflow_actors.errors import InstanceConflict, InvalidContext, StageFlowError
from stageflow_actors.runtime.client.instance import Instance
from stageflow_actors.runtime.client.progress_bar import ProgressBar
from stageflow_actors.runtime.messaging.errors import translate_error
from stageflow_brokers import api as port
from stageflow_brokers.api import PublishAnswer

if TYPE_CHECKING:
    from stageflow_actors.runtime.client.client import Client
    from stageflow_actors.runtime.client.waiters import Waiters
    from stageflow_actors.runtime.client.workflow_ref import Known, Prepared

__all__ = ["Mapping", "as_completed"]

C = TypeVar("C")

IN_FLIGHT = 8_000
"""Most instances started and not ended."""
WAITING = 16_000
"""Most results that wait for one before them, in `map`, together with what is in flight."""
BATCH = 100
BATCH_BYTES = 8 << 20
"""A batch ends with the context that brings it to this many bytes."""
PULL_SECONDS = 0.005
"""An input that gives less than a batch in that time is slow: what it has given is started."""
SLOW_SHARE = 0.5
SLOW_MOST = 1.0
"""After a slow pull, results are waited for before the next: for that share of the time it took, at most so long."""
FULL_RETRY = 0.05
ENVELOPE_BYTES = 4096
"""What an envelope adds to its context, and more."""

_PARKED, _LEFT = object(), object()


class Mapping(Iterator[WorkflowResult[C]], Generic[C]):
    """The iterator that `map` and `map_unordered` give."""

    def __init__(
        self,
        client: Client,
        known: Known,
        contexts: Iterable[C],
        key: Callable[[C], Any] | str | None,
        progress: bool,
        retry_failed: bool,
        *,
        ordered: bool,
    ) -> None:
        self._index: dict[str, int] = {}
        self._inbox = _Inbox()
        self._full: deque[list[Prepared]] = deque()
        self._client = client
        self._known = known
        self._source = iter(contexts)
        self._large = client._max_message_bytes - ENVELOPE_BYTES
        self._key = _key_function(key)
        self._retry_failed = retry_failed
        self._ordered = ordered
        self._pulled = 0
        self._next = 0
        self._dry = False
        self._pause = 0.0
        self._twins: dict[str, list[int]] = {}
        self._twin_count = 0
        self._retried: dict[str, int] = {}
        self._looked_back = not retry_failed
        self._digests: dict[str, bytes | None] = {}
        self._arrived = self._inbox.arrived
        self._event = self._inbox.event
        self._ready: dict[int, WorkflowResult[C] | BaseException] = {}
        self._full_until = 0.0
        self._bar = _bar(contexts) if progress else None

    def __iter__(self) -> Mapping[C]:
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
            if self._inbox.error is not None:
                raise self._inbox.error
            if self._full:
                self._probe()
            if not self._dry and not self._full and self._room():
                if self._pause and self._index:
                    pause, self._pause = self._pause, 0.0
                    self._event.wait(pause)
                else:
                    self._pull()
            elif self._dry and not self._index and not self._ready and not self._arrived:
                self.close()
                raise StopIteration
            else:
                self._wait()

    def close(self) -> None:
        """Stop pulling; what is in flight goes on, and is in the history when it has ended."""
        self._dry = True
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __del__(self) -> None:
        inbox, waiters = self._inbox, self._client._waiters
        inbox.dropped = waiters
        for instance_id in self._index:
            waiters.abandon(instance_id, inbox)
        for batch in self._full:
            inbox.let_go(batch, None)
        for what, answer in inbox.arrived:
            if isinstance(what, list):
                inbox.let_go(what, answer)

    # giving

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
        arrived = self._arrived
        self._event.clear()
        client, known, index = self._client, self._known, self._index
        codec, order = known.codec, known.order
        while arrived:
            instance_id, what = arrived.popleft()
            if type(what) is bytes:
                at = index.pop(instance_id, None)
                if at is None:
                    continue
                found: WorkflowResult[C] | BaseException = result_of_outcome(instance_id, what, codec, order)
            elif what is _PARKED or what is _LEFT:
                at = index.pop(instance_id, None)
                if at is None:
                    continue
                found = self._look(instance_id, what)
            else:
                self._answered(instance_id, what)
                continue
            self._put(instance_id, at, found)
            self._full_until = 0.0  # something has ended, so there may be room
        client._check_alive()

    def _look(self, instance_id: str, what: object) -> WorkflowResult[C] | BaseException:
        instance: Instance[C] = Instance(self._client, instance_id, self._known)
        try:
            if what is _PARKED:
                return instance._parked_result()
            instance._from_history()
            return instance.result(0)
        except StageFlowError as error:
            return error

    def _put(self, instance_id: str, at: int, found: WorkflowResult[C] | BaseException) -> None:
        """Lay ready what is to be given for an instance, at each place where the input names it."""
        self._ready[at] = found
        if self._key is not None:
            twins = self._twins.pop(instance_id, ())
            self._twin_count -= len(twins)
            for twin in twins:
                self._ready[twin] = found
            self._digests.pop(instance_id, None)

    def _refuse(self, instance_id: str, error: BaseException) -> None:
        at = self._index.pop(instance_id, None)
        self._client._waiters.remove(instance_id, self._inbox)
        if at is not None:
            error.instance_id = instance_id  # type: ignore[attr-defined]
            self._put(instance_id, at, error)

    # taking

    def _room(self) -> bool:
        in_flight = len(self._index) + self._twin_count
        return in_flight < IN_FLIGHT and (not self._ordered or in_flight + len(self._ready) < WAITING)

    def _pull(self) -> None:
        batch: list[Prepared] = []
        size = 0
        began = time.perf_counter()
        took = 0.0
        try:
            for context in self._source:
                at = self._pulled
                self._pulled += 1
                prepared = self._prepare(context, at)
                if prepared is not None:
                    batch.append(prepared)
                    size += len(prepared.data)
                if len(batch) >= BATCH or size >= BATCH_BYTES:
                    break
                took = time.perf_counter() - began
                if took > PULL_SECONDS:
                    self._pause = min(took * SLOW_SHARE, SLOW_MOST)
                    break
            else:
                self._dry = True
        except Exception as error:  # noqa: BLE001 - the input is the user's code, and this is the place for its error
            self._ready[self._pulled] = error
            self._pulled += 1
            self._dry = True
        finally:
            # Also when the input was interrupted: what it has given is counted on.
            if batch:
                self._begin(batch)

    def _prepare(self, context: C, at: int) -> Prepared | None:
        key: Any = None
        try:
            if self._key is not None:
                key = self._key(context)
                if key is None:
                    raise InvalidContext("the key that names the instance is None")
                key = key if isinstance(key, str) else str(key)
            prepared = self._known.prepare(context, key)
            if len(prepared.data) > self._large:
                self._known.body(prepared, 0.0, self._client._max_message_bytes)  # which says so if it is too large
        except Exception as error:  # noqa: BLE001 - a key function may raise anything; it is that context's error
            error.instance_id = key  # type: ignore[attr-defined]
            self._ready[at] = error
            return None
        if prepared.id in self._index:
            if self._digests.get(prepared.id) == prepared.digest:
                self._twins.setdefault(prepared.id, []).append(at)
                self._twin_count += 1
            else:
                conflict = InstanceConflict(prepared.id)
                conflict.instance_id = prepared.id
                self._ready[at] = conflict
            return None
        self._index[prepared.id] = at
        if prepared.digest is not None:
            self._digests[prepared.id] = prepared.digest
        return prepared

    def _begin(self, batch: list[Prepared]) -> bool:
        """Skip what has finished before, publish the rest, and say whether there was any.

        What cannot be published is refused for that reason.
        """
        waiters = self._client._waiters
        try:
            if not self._looked_back:
                # What has just failed may not be in the history yet, and would be joined instead of run anew.
                self._looked_back = True
                self._client._let_history_catch_up()
            if batch[0].check or self._key is not None:
                batch = self._without_finished(batch)
                if not batch:
                    return False
            inbox, ids = self._inbox, [prepared.id for prepared in batch]
            future = self._client._publish(self._known, batch, taken=lambda: waiters.add_all(ids, inbox))
        except Exception as error:  # noqa: BLE001 - whatever it is, none of the batch has been started
            for prepared in batch:
                self._refuse(prepared.id, copy.copy(error))
            return False
        heard = self._inbox.heard
        future.add_done_callback(lambda done: heard(batch, done))
        return True

    def _without_finished(self, batch: list[Prepared]) -> list[Prepared]:
        seen = self._client._seen
        for prepared in batch:
            prepared.seen = seen
        rows = self._client._finished(batch)
        if not rows:
            return batch
        left = []
        for prepared in batch:
            row = rows.get(prepared.id)
            if row is None:
                left.append(prepared)
            elif row.digest != prepared.digest:
                self._refuse(prepared.id, InstanceConflict(prepared.id))
            elif self._retry_failed and row.status != "completed" and row.epoch != self._retried.get(prepared.id):
                prepared.epoch = self._retried[prepared.id] = row.epoch + 1
                left.append(prepared)
            else:
                self._arrived.append((prepared.id, row.outcome))
        return left

    def _answered(self, batch: list[Prepared], answer: PublishAnswer | BaseException) -> None:
        probed, self._inbox.probing = self._inbox.probing, False
        if isinstance(answer, port.QueueFull):
            # A batch is taken whole or not at all, and may be larger than the queue.
            half = (len(batch) + 1) // 2
            parts = [part for part in (batch[:half], batch[half:]) if part]
            if probed:
                self._full.extendleft(reversed(parts))
            else:
                self._full.extend(parts)
            self._full_until = time.monotonic() + FULL_RETRY
            return
        if isinstance(answer, BaseException):
            for prepared in batch:
                self._refuse(prepared.id, translate_error(answer))
            return
        by_id = {prepared.id: prepared for prepared in batch}
        look_again = []
        self._client._seen = max(self._client._seen, answer.history_sequence)
        for _, why, instance_id in answer.refused:
            if why == "conflict":
                self._refuse(instance_id, InstanceConflict(instance_id))
            elif why == "look-again":
                by_id[instance_id].check = True
                look_again.append(by_id[instance_id])
                self._client._waiters.remove(
                    instance_id, self._inbox
                )  # it may be found in the history, and ended there
        if look_again:
            self._begin(look_again)

    def _probe(self) -> None:
        """The first queue was full: try the next part of what waits, and go on at once when it is taken."""
        if not self._inbox.probing and time.monotonic() >= self._full_until:
            self._inbox.probing = True
            if not self._begin(self._full.popleft()):
                self._inbox.probing = False

    def _wait(self) -> None:
        if not self._arrived:
            self._event.wait(FULL_RETRY if self._full else 0.5)
        if self._bar is not None:
            self._bar.refresh()


class _Inbox:
    """Where the connection's thread lays down what an iterator is to hear of; it does not keep the iterator alive.

    Once that is `dropped`, nobody sends again what the broker refuses, so nobody waits for it any more either.
    """

    __slots__ = ("arrived", "dropped", "error", "event", "probing")

    def __init__(self) -> None:
        self.arrived: deque[tuple[Any, Any]] = deque()
        self.event = threading.Event()
        self.error: StageFlowError | None = None
        self.probing = False
        self.dropped: Waiters | None = None

    def heard(self, batch: list[Prepared], done: Future[PublishAnswer]) -> None:
        """Starts have been answered: only what needs attention is passed on."""
        answer = done.exception() or done.result()
        if self.probing or not isinstance(answer, PublishAnswer) or answer.refused:
            if self.dropped is not None:
                self.let_go(batch, answer)
                return
            self.arrived.append((batch, answer))
            self.event.set()

    def let_go(self, batch: list[Prepared], answer: PublishAnswer | BaseException | None) -> None:
        """Of a batch that was answered so (None: never sent), wait no more for what did not start."""
        assert self.dropped is not None
        refused: dict[str, str] = {}
        if isinstance(answer, PublishAnswer):
            refused = {instance_id: why for _, why, instance_id in answer.refused if why != "exists"}
        for prepared in batch:
            if prepared.id in refused or not isinstance(answer, PublishAnswer):
                self.dropped.forsake(prepared.id)

    # see `Waiter`

    def _end(self, instance_id: str, outcome: bytes) -> None:
        self.arrived.append((instance_id, outcome))

    def _park(self, instance_id: str) -> None:
        self.arrived.append((instance_id, _PARKED))

    def _left(self, instance_id: str) -> None:
        self.arrived.append((instance_id, _LEFT))

    def _broken(self, error: StageFlowError) -> None:
        self.error = error
        self.event.set()

    def _wake(self) -> None:
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
            raise InvalidContext(
                f"context.{name} is missing: it is the key that names the instance", field=name
            ) from None

    return field


def as_completed(instances: Iterable[Instance[C]], timeout: float | None) -> Iterator[Instance[C]]:
    """Each instance once, as it ends or is parked. Raises `TimeoutError` after `timeout` seconds."""
    told: deque[Instance[C]] = deque()
    event = threading.Event()
    waiting = list(dict.fromkeys(instances))
    for instance in waiting:

        def tell(one: Instance[C] = instance) -> None:
            told.append(one)
            event.set()

        instance._forget_old_news()
        instance._when_told(tell)
        instance._ensure_watched()
    given: set[str] = set()
    deadline = None if timeout is None else time.monotonic() + timeout
    while len(given) < len(waiting):
        event.clear()
        while told:
            instance = told.popleft()
            if instance._error is not None:
                raise instance._error
            if instance.id not in given:
                given.add(instance.id)
                yield instance
        if len(given) < len(waiting) and not told:
            left = 1.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(
                    f"{counted(len(waiting) - len(given), 'instance')} had not ended after {timeout:g} s"
                )
            event.wait(min(left, 1.0))
