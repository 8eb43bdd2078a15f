"""`map`: a workflow over any number of contexts, with a bounded number of them in flight.

One thread pulls, publishes and yields: the caller's. The connection's thread only lays down what has arrived. What a
context is refused for is raised where its result would have been, and the iterator goes on behind it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from brokers.api import PublishAnswer
from brokers.api import QueueFull as PortQueueFull
from stageflow_actors.core.result import WorkflowResult
from stageflow_actors.errors import InstanceConflict, InvalidContext, StageFlowError
from stageflow_actors.runtime.instance import Instance

if TYPE_CHECKING:
    from stageflow_actors.runtime.client import Client, Known

__all__ = ["Mapping", "Prepared", "as_completed"]

C = TypeVar("C")

IN_FLIGHT = 8_000
"""Most instances started and not ended."""
WAITING = 16_000
"""Most results that wait for one before them, in `map`, together with what is in flight."""
BATCH = 100
PULL_SECONDS = 0.005
"""A slow input is not waited for while there are results to give."""
FULL_RETRY = 0.05

_PARKED, _LEFT = object(), object()


class Prepared:
    """A context that was accepted: the id, the encoded context, its digest where the id was chosen by a user."""

    __slots__ = ("data", "digest", "epoch", "id")

    def __init__(self, id: str, data: bytes, digest: bytes | None, epoch: int = 1) -> None:
        self.id = id
        self.data = data
        self.digest = digest
        self.epoch = epoch


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
        self._client = client
        self._known = known
        self._source = iter(contexts)
        self._key = _key_function(key)
        self._retry_failed = retry_failed
        self._ordered = ordered
        self._pulled = 0
        self._next = 0
        self._dry = False
        self._index: dict[str, int] = {}
        self._twins: dict[str, list[int]] = {}
        self._digests: dict[str, bytes | None] = {}
        self._arrived: deque[tuple[Any, Any]] = deque()
        self._event = threading.Event()
        self._ready: dict[int, WorkflowResult[C] | BaseException] = {}
        self._again: list[tuple[float, list[Prepared]]] = []
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
            if self._again:
                self._publish_again()
            if not self._dry and self._room():
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
        sinks = self._client._sinks
        for instance_id in list(self._index):
            if sinks.get(instance_id) is self:
                sinks[instance_id] = _Forgotten()

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
        client, known, ready, index = self._client, self._known, self._ready, self._index
        codec, order = known.codec, known.order
        while arrived:
            instance_id, what = arrived.popleft()
            if type(what) is bytes:
                at = index.pop(instance_id, None)
                if at is None:
                    continue
                found: WorkflowResult[C] | BaseException = WorkflowResult(instance_id, what, codec, order)
            elif what is _PARKED or what is _LEFT:
                at = index.pop(instance_id, None)
                if at is None:
                    continue
                found = self._look(instance_id, what)
            else:
                self._answered(instance_id, what)
                continue
            ready[at] = found
            for twin in self._twins.pop(instance_id, ()):
                ready[twin] = found
            self._digests.pop(instance_id, None)
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

    def _refuse(self, instance_id: str, error: BaseException) -> None:
        at = self._index.pop(instance_id, None)
        self._client._sinks.pop(instance_id, None)
        if at is not None:
            error.instance_id = instance_id  # type: ignore[attr-defined]
            self._ready[at] = error

    # taking

    def _room(self) -> bool:
        in_flight = len(self._index)
        return in_flight < IN_FLIGHT and (not self._ordered or in_flight + len(self._ready) < WAITING)

    def _pull(self) -> None:
        batch: list[Prepared] = []
        began = time.perf_counter()
        for context in self._source:
            at = self._pulled
            self._pulled += 1
            prepared = self._prepare(context, at)
            if prepared is not None:
                batch.append(prepared)
            if len(batch) >= BATCH or time.perf_counter() - began > PULL_SECONDS:
                break
        else:
            self._dry = True
        if batch:
            self._begin(batch)

    def _prepare(self, context: C, at: int) -> Prepared | None:
        key: Any = None
        try:
            if self._key is not None:
                key = self._key(context)
                key = key if isinstance(key, str) else str(key)
            prepared = self._client._prepare(self._known, context, key)
            self._client._body(self._known, prepared, 0.0) if len(prepared.data) > 1 << 19 else None
        except Exception as error:  # noqa: BLE001 - a key function may raise anything; it is that context's error
            error.instance_id = key  # type: ignore[attr-defined]
            self._ready[at] = error
            return None
        if prepared.id in self._index:
            if self._digests.get(prepared.id) == prepared.digest:
                self._twins.setdefault(prepared.id, []).append(at)
            else:
                conflict = InstanceConflict(prepared.id)
                conflict.instance_id = prepared.id
                self._ready[at] = conflict
            return None
        self._index[prepared.id] = at
        if prepared.digest is not None:
            self._digests[prepared.id] = prepared.digest
        return prepared

    def _begin(self, batch: list[Prepared]) -> None:
        """Skip what has finished before, publish the rest."""
        if self._key is not None:
            batch = self._without_finished(batch)
            if not batch:
                return
        sinks = self._client._sinks
        for prepared in batch:
            sinks[prepared.id] = self
        future = self._client._publish(self._known, batch)
        future.add_done_callback(lambda done: self._heard(batch, done))

    def _without_finished(self, batch: list[Prepared]) -> list[Prepared]:
        client = self._client
        rows = client._finished(batch)
        if not rows:
            return batch
        left = []
        for prepared in batch:
            row = rows.get(prepared.id)
            if row is None:
                left.append(prepared)
            elif row.digest != prepared.digest:
                self._refuse(prepared.id, InstanceConflict(prepared.id))
            elif self._retry_failed and row.status != "completed":
                prepared.epoch = row.epoch + 1
                left.append(prepared)
            else:
                self._arrived.append((prepared.id, row.outcome))
        return left

    def _heard(self, batch: list[Prepared], done: Future[PublishAnswer]) -> None:
        """On the connection's thread: only what needs attention is passed on."""
        if done.exception() is not None or done.result().refused:
            self._arrived.append((batch, done))
            self._event.set()

    def _answered(self, batch: list[Prepared], done: Future[PublishAnswer]) -> None:
        error = done.exception()
        if isinstance(error, PortQueueFull):
            self._again.append((time.monotonic() + FULL_RETRY, batch))
            return
        if error is not None:
            try:
                self._client._await(done)
            except Exception as told:  # noqa: BLE001 - the error in our own words
                error = told
            for prepared in batch:
                self._refuse(prepared.id, error)
            return
        answer = done.result()
        by_id = {prepared.id: prepared for prepared in batch}
        look_again = []
        self._client._seen = max(self._client._seen, answer.seen)
        for _, why, instance_id in answer.refused:
            if why == "conflict":
                self._refuse(instance_id, InstanceConflict(instance_id))
            elif why == "look-again":
                look_again.append(by_id[instance_id])
        if look_again:
            self._begin(look_again)

    def _publish_again(self) -> None:
        now = time.monotonic()
        due = [batch for at, batch in self._again if at <= now]
        self._again = [(at, batch) for at, batch in self._again if at > now]
        for batch in due:
            self._begin(batch)

    def _wait(self) -> None:
        if not self._arrived:
            self._event.wait(FULL_RETRY if self._again else 0.5)
        if self._bar is not None:
            self._bar.refresh()

    # what a client tells (a sink)

    def _end(self, instance_id: str, outcome: bytes) -> None:
        self._arrived.append((instance_id, outcome))

    def _park(self, instance_id: str) -> None:
        self._arrived.append((instance_id, _PARKED))

    def _left(self, instance_id: str) -> None:
        self._arrived.append((instance_id, _LEFT))

    def _broken(self, error: StageFlowError) -> None:
        self._event.set()

    def _wake(self) -> None:
        self._event.set()


class _Forgotten:
    """Stands for an iterator that was dropped: its instances are still waited for when the runtime is left."""

    def _end(self, instance_id: str, outcome: bytes) -> None: ...
    def _park(self, instance_id: str) -> None: ...
    def _left(self, instance_id: str) -> None: ...
    def _broken(self, error: StageFlowError) -> None: ...
    def _wake(self) -> None: ...


class _Bar:
    """A progress bar on stderr."""

    def __init__(self, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("instances", total=total)
        self._progress.start()

    def advance(self) -> None:
        self._progress.advance(self._task)

    def refresh(self) -> None:
        self._progress.refresh()

    def close(self) -> None:
        self._progress.stop()


def _bar(contexts: Iterable[Any]) -> _Bar:
    total = len(contexts) if hasattr(contexts, "__len__") else None
    return _Bar(total)


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

        instance._when_told(tell)
        instance._ensure_watched()
    given: set[str] = set()
    deadline = None if timeout is None else time.monotonic() + timeout
    while len(given) < len(waiting):
        event.clear()
        while told:
            instance = told.popleft()
            if instance.id not in given:
                given.add(instance.id)
                yield instance
        if len(given) < len(waiting) and not told:
            left = 1.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{len(waiting) - len(given)} instances had not ended after {timeout:g} s")
            event.wait(min(left, 1.0))
