"""`StageContext`: the attempt that a handler runs in, and its durable steps.

No socket and no executor here: steps and progress go to a `StepStore`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, Protocol, Self

from stageflow_actors.core.codec import ContextCodec, encode_value
from stageflow_actors.core.envelope import Envelope, decode_trail
from stageflow_actors.core.failures import exception_of, read_failure
from stageflow_actors.core.value_codec import UNTYPED, UndecodableData, ValueCodec, decode_payload, result_codec
from stageflow_actors.definition.type_hints import return_type
from stageflow_actors.errors import PayloadTooLarge, StageError
from stageflow_actors.runtime.worker.awaitables import finish, is_awaitable
from stageflow_brokers.api import DeliveryExtra, DeliveryItem

__all__ = [
    "CancelFlag",
    "RememberedSteps",
    "Request",
    "StageContext",
    "StepStore",
    "check_no_request",
    "check_nothing_lost",
    "made_by_attempt",
    "take_made",
    "with_result",
]

REQUEST_TIMEOUT_SECONDS = 60.0
"""The time a request waits for its reply by default."""

AWAITED = ":awaited:"
"""Start of the key of a step that the handler awaits although its function is not `async def`."""

PROGRESS_INTERVAL_SECONDS = 0.2
"""The least time between two progress reports of one attempt."""


class Request:
    """A request to an endpoint, returned by a stage's handler; see `StageContext.request`."""

    __slots__ = ("command", "endpoint", "steps", "timeout")

    def __init__(self, endpoint: str, command: Any, timeout: float, steps: Mapping[str, bytes]) -> None:
        if not isinstance(endpoint, str) or not endpoint:
            raise ValueError(f"a request needs the name of an endpoint, not {endpoint!r}")
        if not timeout > 0:
            raise ValueError(f"the timeout of a request must be more than 0 seconds, not {timeout!r}")
        self.endpoint = endpoint
        self.command = command
        self.timeout = timeout
        self.steps = steps


def check_no_request(value: Any, what: str) -> None:
    """Raise `StageError` if `value` is a request: only a request that a stage's handler returns is sent."""
    if type(value) is Request:
        raise _misplaced_request(value.endpoint, what)


def _misplaced_request(endpoint: str, what: str) -> StageError:
    return StageError(
        f"{what} made ctx.request({endpoint!r}, ...), and the request is not sent: only the handler of a "
        "stage can send a request to an endpoint, by returning it",
        retryable=False,
    )


class _AsyncStep:
    """An async step that a stage's handler has to await; `work` is what the step itself awaits."""

    __slots__ = ("_coroutine", "_work", "name")

    def __init__(self, name: str, coroutine: Coroutine[Any, Any, Any], work: Any = None) -> None:
        self.name = name
        self._coroutine = coroutine
        self._work = work

    def is_lost(self) -> bool:
        """Return True, and close the step, if it was never awaited."""
        if inspect.getcoroutinestate(self._coroutine) != inspect.CORO_CREATED:
            return False
        self._coroutine.close()
        if inspect.iscoroutine(self._work):
            self._work.close()
        return True


made_by_attempt: dict[int, tuple[Envelope, list[Request | _AsyncStep]]] = {}
"""Requests and async steps that handlers in work have made, by the identity of the envelope. Almost always empty."""


def take_made(envelope: Envelope) -> list[Request | _AsyncStep]:
    """Return and forget the requests and the async steps that the attempt with this envelope has made."""
    if not made_by_attempt:
        return []
    return made_by_attempt.pop(id(envelope), (envelope, []))[1]


def check_nothing_lost(made: list[Request | _AsyncStep], value: Any, stage_id: str) -> None:
    """Raise `StageError` if a stage's handler made requests and did not return them, or did not await its steps."""
    unawaited = [step.name for step in made if isinstance(step, _AsyncStep) and step.is_lost()]
    if unawaited:
        raise StageError(
            f"stage {stage_id!r} called ctx.step({unawaited[0]!r}, ...) with an async function and did not await it, "
            "so that it did not run: write `await ctx.step(...)` in an async handler",
            retryable=False,
        )
    lost = [request for request in made if isinstance(request, Request) and request is not value]
    if lost:
        endpoint = lost[0].endpoint
        few = (
            "one request is sent per stage: use a stage for each"
            if value in made
            else "write `return ctx.request(...)`"
        )
        raise StageError(
            f"stage {stage_id!r} made ctx.request({endpoint!r}, ...) and did not return it, so that it is not sent: "
            f"{few}, or leave the call out",
            retryable=False,
        )


class StepStore(Protocol):
    """The store of the completed steps of one message."""

    def keep(self, name: str, value: bytes) -> None:
        """Store the result of a step; durable on return."""

    def report(self, progress: bytes) -> None:
        """Publish the progress of the attempt; may be lost."""


UNKNOWN_WORKFLOW: ContextCodec[Any] = ContextCodec(dict)

_remembering = threading.Lock()
"""Guards `DeliveryExtra.steps`: a handler may store steps from several threads."""


class RememberedSteps:
    """A step store that also adds each step to its delivery, so that the settlement contains it."""

    __slots__ = ("_item", "_store", "report")

    def __init__(self, store: StepStore, item: DeliveryItem) -> None:
        self._store = store
        self._item = item
        self.report = store.report

    def keep(self, name: str, value: bytes) -> None:
        """See `StepStore.keep`."""
        self._store.keep(name, value)
        with _remembering:
            extra = self._item.extra
            if extra is None:
                extra = self._item.extra = DeliveryExtra()
            extra.steps = {**(extra.steps or {}), name: value}


class CancelFlag(Protocol):
    """The place where a cancellation of the message in work is visible."""

    def is_cancelled(self) -> bool:
        """Return True if the message in work is to end."""


class StageContext:
    """One attempt of one stage of one instance, as its handler sees it.

    A handler that has a parameter named `ctx` receives one for each attempt; the runtime creates it. Compensations and
    endpoints receive one too.

    Attributes:
        workflow_id: The id of the workflow.
        instance_id: The id of the instance.
        stage_id: The id of the stage; in a compensation, of the stage that is undone.
        attempt: The number of this attempt, from 1.
        deadline: When the attempt times out, in seconds of `time.monotonic()`; None without a timeout.
        item: In a map stage, the number of the item from 0, as a string; otherwise None.
        error: In a compensation, the error that failed the workflow, such as `"ValueError: boom"`; otherwise None.

    Example:
        >>> from stageflow_actors import StageContext, Workflow
        >>> from stageflow_actors.testing import run
        >>> def charge(order: dict, ctx: StageContext) -> str:
        ...     return ctx.step("charge", lambda: f"{ctx.stage_id}, attempt {ctx.attempt}")
        >>> run(Workflow("orders").add_stage(charge), {}).stages[-1].data
        'charge, attempt 1'
    """

    __slots__ = {
        "_codec": "",
        "_envelope": "",
        "_epoch": "",
        "_failure": "",
        "_limit": "",
        "_place": "",
        "_progress_at": "",
        "_results": "",
        "_scope": "",
        "_slot": "",
        "_steps": "",
        "_store": "",
        "_used_steps": "",
        "attempt": "The number of this attempt, from 1.",
        "deadline": "When the attempt times out, in seconds of `time.monotonic()`; None without a timeout.",
        "error": "In a compensation, the error that failed the workflow; otherwise None.",
        "instance_id": "The id of the instance.",
        "item": "In a map stage, the number of the item from 0, as a string; otherwise None.",
        "stage_id": "The id of the stage; in a compensation, of the stage that is undone.",
        "workflow_id": "The id of the workflow.",
    }

    workflow_id: str
    instance_id: str
    stage_id: str
    attempt: int
    deadline: float | None
    item: str | None
    error: str | None
    _envelope: Envelope
    _codec: ContextCodec[Any]
    _epoch: int
    _failure: bytes | None
    _limit: int
    _place: str
    _progress_at: float
    _results: dict[str, Any] | None
    _scope: str
    _slot: CancelFlag | None
    _steps: dict[str, bytes]
    _store: StepStore
    _used_steps: set[str] | None

    def __init__(self) -> None:
        raise TypeError("the runtime creates each StageContext: to test a handler, use stageflow_actors.testing.run")

    @classmethod
    def _create(
        cls,
        *,
        envelope: Envelope,
        instance_id: str,
        epoch: int,
        stage_id: str,
        attempt: int,
        timeout: float | None,
        failure: bytes | None,
        steps: dict[str, bytes] | None,
        store: StepStore,
        error: str | None = None,
        item: str | None = None,
        limit: int = 16 << 20,
        slot: CancelFlag | None = None,
        place: str = "",
        codec: ContextCodec[Any] = UNKNOWN_WORKFLOW,
    ) -> Self:
        """Return the context of one attempt.

        `failure` is that of the attempt before, `limit` in bytes. `place` names a place in errors that cannot send a
        request to an endpoint; it is empty for the handler of a stage.
        """
        self = cls.__new__(cls)
        self.workflow_id = envelope.workflow_id
        self.instance_id = instance_id
        self.stage_id = stage_id
        self.attempt = attempt
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self.error = error
        self.item = item
        self._codec = codec
        self._epoch = epoch
        self._envelope = envelope
        self._failure = failure
        self._steps = dict(steps) if steps else {}
        self._scope = ""
        self._store = store
        self._limit = limit
        self._slot = slot
        self._progress_at = 0.0
        self._results = None
        self._place = place
        self._used_steps = None
        return self

    def _enter_item(self, number: int, deadline: float | None, results: dict[str, Any]) -> None:
        """Make this the context of one item of a map stage; the item has steps of its own."""
        self.item = str(number)
        self._scope = f"{number}:"
        self._place = f"the compensation of an item of {self.stage_id!r}"
        self.deadline = deadline
        self._results = results

    def _exit_item(self) -> None:
        """Make this the context of the whole map stage again."""
        self.item = None
        self._scope = ""

    @property
    def idempotency_key(self) -> str:
        """The key to pass to external systems with side effects of this stage.

        It is the same for each attempt of this stage of this run of the instance, also after `Instance.retry`; for an
        item of a map stage, for each attempt of this item. `Instance.restart` begins a new run with new keys.

        Example:
            >>> from stageflow_actors import Workflow
            >>> from stageflow_actors.testing import run
            >>> def charge(order, ctx):
            ...     return ctx.idempotency_key == f"orders:{ctx.instance_id}:charge"
            >>> run(Workflow("orders").add_stage(charge), {}).stages[-1].data
            True
        """
        item = "" if self.item is None else f"[{self.item}]"
        run = self._envelope.run or self._epoch
        suffix = item if run <= 1 else f"{item}:{run}"
        return f"{self.workflow_id}:{self.instance_id}:{self.stage_id}{suffix}"

    @property
    def results(self) -> Mapping[str, Any]:
        """The results of the completed stages by stage id.

        In a compensation, `results[stage_id]` is the result that is undone; in a compensation of an item of a map
        stage, the result of this item.

        Example:
            >>> from stageflow_actors import Workflow
            >>> from stageflow_actors.testing import run
            >>> def reserve(order):
            ...     return {"seat": 7}
            >>> def confirm(order, ctx):
            ...     return ctx.results["reserve"]["seat"]
            >>> run(Workflow("trips").add_stage(reserve).add_stage(confirm), {}).stages[-1].data
            7
        """
        if self._results is None:
            self._results = _decode_results(self._codec, self._envelope.trail)
        return self._results

    @property
    def payload(self) -> Any:
        """The reply that the previous stage's request brought, or None.

        It is of the type that the return annotation of the endpoint names, if the endpoint was added to the runtime
        before the workflow was started or registered; else an object is the dict of its fields.

        Delays, branches and skipped stages pass it through to the stage behind them, and each branch of a parallel
        stage receives it. Items of a map, and a stage behind a signal, do not: see `request`.
        """
        return None if self.item is not None else decode_payload(self._codec, self._envelope.payload)

    def request(self, endpoint: str, command: Any, *, timeout: float | None = None) -> Request:
        """Return a request to an endpoint, for the handler to return as its result.

        Only the handler of a stage sends a request, and only by returning it. The next stage reads the reply from
        `ctx.payload`. If no next stage can receive it, the reply is the result of this stage: in the last stage of a
        workflow or of a branch of a parallel stage, and before a map or a signal. The attempt fails if the reply is an
        error or does not arrive in time.

        Args:
            endpoint: The name of the endpoint. `"next"` sends nothing and passes `command` to the next stage.
            command: The value that the endpoint's handler receives; encoded like a result.
            timeout: Seconds to wait for the reply, more than 0; default 60.

        Returns:
            The request. Its content is private.

        Raises:
            ValueError: If `endpoint` is empty or not a string, or `timeout` is not more than 0.
            StageError: If this is not the handler of a stage. A handler that makes a request and does not return it
                fails with this error too.

        Example:
            >>> from stageflow_actors import Workflow
            >>> from stageflow_actors.testing import run
            >>> def ask(order, ctx):
            ...     return ctx.request("stock", {"sku": "A1"}, timeout=5)
            >>> def use(order, ctx):
            ...     return ctx.payload
            >>> flow = Workflow("orders").add_stage(ask).add_stage(use)
            >>> run(flow, {}, endpoints={"stock": lambda command: 12}).stages[-1].data
            12
        """
        seconds = REQUEST_TIMEOUT_SECONDS if timeout is None else float(timeout)
        request = Request(endpoint, command, seconds, self._steps)
        if self._place:
            raise _misplaced_request(endpoint, self._place)
        self._record(request)
        return request

    def _record(self, made: Request | _AsyncStep) -> None:
        made_by_attempt.setdefault(id(self._envelope), (self._envelope, []))[1].append(made)

    @property
    def previous_failure(self) -> Exception | None:
        """The failure of the previous attempt as an exception; None in the first.

        Example:
            >>> from stageflow_actors import Retry, Workflow
            >>> from stageflow_actors.testing import run
            >>> def charge(order, ctx):
            ...     if ctx.previous_failure is None:
            ...         raise OSError("no route")
            ...     return str(ctx.previous_failure)
            >>> flow = Workflow("orders").add_stage(charge, retry=Retry.fixed(2, 1))
            >>> "no route" in run(flow, {}).stages[-1].data
            True
        """
        failure = read_failure(self._failure)
        return None if failure is None else exception_of(failure)

    @property
    def logger(self) -> logging.Logger:
        """The logger named `stageflow.{workflow_id}.{stage_id}`."""
        return logging.getLogger(f"stageflow.{self.workflow_id}.{self.stage_id}")

    @property
    def cancelled(self) -> bool:
        """True if the instance was cancelled during this attempt.

        A handler that reads it and returns soon is not killed.
        """
        return self._slot is not None and self._slot.is_cancelled()

    def progress(self, done: float, total: float, note: str = "") -> None:
        """Report the progress of this stage until the stage ends.

        `Instance.progress()` and `stageflow instances show` display it. A report is not durable and may be lost.
        Handlers may call this in each iteration: reports are sent at most every 0.2 s, and whenever `done` has reached
        `total`.

        Args:
            done: The amount of work that is done, in any unit.
            total: The whole amount of work, in the same unit.
            note: A short text beside the numbers; default empty.

        Raises:
            InvalidContext: If `done` or `total` cannot be encoded.

        Example:
            >>> from stageflow_actors import Workflow
            >>> from stageflow_actors.testing import run
            >>> def load(rows, ctx):
            ...     for number in range(3):
            ...         ctx.progress(number + 1, 3, "rows")
            >>> run(Workflow("imports").add_stage(load), {}).success
            True
        """
        now = time.monotonic()
        if now - self._progress_at >= PROGRESS_INTERVAL_SECONDS or done >= total:
            self._progress_at = now
            self._store.report(encode_value([done, total, str(note)], what=f"the progress of {self.stage_id!r}"))

    def step(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(*args)` once per instance and stage.

        The result is durable when this returns, and later attempts receive it without another call. The first attempt
        also receives the result as it was stored, so that it sees the same value as every later attempt. A crash
        between the call and the storage repeats the call: pass `idempotency_key` to external systems. If the function
        is `async def` or returns an awaitable, this returns an awaitable: `await ctx.step("charge", charge, order)`.

        Args:
            name: The name of the step, not empty; each step of an attempt has a name of its own. In a loop put the
                item into it: `ctx.step(f"charge-{item}", charge, item)`. A step that raised may be tried again.
            function: The function to call, `async def` or not.
            args: The positional arguments of `function`.

        Returns:
            The stored result of `function`, or an awaitable of it if `function` is async.

        Raises:
            ValueError: If `name` is empty or not a string.
            StageError: If another step of this attempt has the name: its result would be returned in place of this
                one's.
            InvalidContext: If the result cannot be kept, even as plain data.
            PayloadTooLarge: If the encoded result is larger than `Config(max_message_bytes)`.
            StageFlowError: If this worker no longer holds the message.

        Example:
            >>> from stageflow_actors import Retry, Workflow
            >>> from stageflow_actors.testing import run
            >>> charged = []
            >>> def pay(order, ctx):
            ...     ctx.step("charge", charged.append, "order-1")
            ...     if ctx.attempt == 1:
            ...         raise OSError("mail server down")
            >>> result = run(Workflow("orders").add_stage(pay, retry=Retry.fixed(2, 1)), {})
            >>> result.success, charged
            (True, ['order-1'])
        """
        if inspect.iscoroutinefunction(function):
            return self._awaited(name, self._async_step(name, function, *args))
        self._begin_step(name)
        if self._awaited_key(name) in self._steps:
            return self._awaited(name, self._stored_step(name, _step_codec(function)))
        if self.is_step_completed(name):
            return self._step_result(name, _step_codec(function))
        try:
            codec, value = _step_codec(function), function(*args)
            if is_awaitable(value):
                return self._awaited(name, self._finish_step(name, value, codec), value)
            return self._keep(name, value, codec)
        except BaseException:
            self._abandon_step(name)
            raise

    def is_step_completed(self, name: str) -> bool:
        """Return True if the step completed in this attempt or an earlier one.

        Args:
            name: The name of the step.

        Returns:
            True also for a step that was only checkpointed.

        Example:
            >>> from stageflow_actors import Workflow
            >>> from stageflow_actors.testing import run
            >>> def send(order, ctx):
            ...     ctx.checkpoint_step("mail")
            ...     return [ctx.is_step_completed("mail"), ctx.is_step_completed("invoice")]
            >>> run(Workflow("orders").add_stage(send), {}).stages[-1].data
            [True, False]
        """
        return f"{self._scope}{name}" in self._steps or self._awaited_key(name) in self._steps

    def get_step_result(self, name: str) -> Any:
        """Return the stored result of a step.

        Args:
            name: The name of the step.

        Returns:
            The result; None if the step has not completed or was only checkpointed.
        """
        return self._step_result(name, UNTYPED)

    def store_step_result(self, name: str, value: Any) -> None:
        """Mark a step as completed, with a result; durable when this returns.

        Args:
            name: The name of the step, not empty.
            value: The result, for `get_step_result`. It replaces an earlier one of this name.

        Raises:
            ValueError: If `name` is empty or not a string.
            InvalidContext: If the value cannot be kept, even as plain data.
            PayloadTooLarge: If the encoded value is larger than `Config(max_message_bytes)`.
            StageFlowError: If this worker no longer holds the message.

        Example:
            >>> from stageflow_actors import Workflow
            >>> from stageflow_actors.testing import run
            >>> def count(rows, ctx):
            ...     ctx.store_step_result("position", 40)
            ...     return ctx.get_step_result("position")
            >>> run(Workflow("imports").add_stage(count), {}).stages[-1].data
            40
        """
        self._keep(name, value)

    def checkpoint_step(self, name: str) -> None:
        """Mark a step as completed, without a result; durable when this returns.

        Args:
            name: The name of the step, not empty.

        Raises:
            ValueError: If `name` is empty or not a string.
            StageFlowError: If this worker no longer holds the message.
        """
        self._keep(name, None)

    def _awaited(self, name: str, step: Coroutine[Any, Any, Any], work: Any = None) -> Coroutine[Any, Any, Any]:
        """Return the step for the handler to await; a stage whose handler does not await it fails."""
        if not self._place:
            self._record(_AsyncStep(name, step, work))
        return step

    async def _async_step(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        self._begin_step(name)
        if self.is_step_completed(name):
            return self._step_result(name, _step_codec(function))
        try:
            value = await function(*args)
            return await asyncio.to_thread(
                self._keep, name, value, _step_codec(function)
            )  # the loop runs other handlers until it is durable
        except BaseException:
            self._abandon_step(name)
            raise

    async def _finish_step(self, name: str, value: Any, codec: ValueCodec) -> Any:
        try:
            value = await finish(value)
            return await asyncio.to_thread(self._keep, name, value, codec, self._awaited_key(name))
        except BaseException:
            self._abandon_step(name)
            raise

    async def _stored_step(self, name: str, codec: ValueCodec) -> Any:
        return self._step_result(name, codec)

    def _awaited_key(self, name: str) -> str:
        """Return the key of a step whose function is not async and returned an awaitable.

        The handler awaits such a step. In a later attempt the function is not called, so that only the key shows it.
        """
        return f"{AWAITED}{self._scope}{name}"

    def _begin_step(self, name: str) -> None:
        """Raise `StageError` if a step of this name has begun in this attempt and has not raised."""
        used, scoped = self._used_steps, f"{self._scope}{name}"
        if used is None:
            used = self._used_steps = set()
        if scoped in used:
            raise StageError(
                f"stage {self.stage_id!r} uses the step {name!r} twice in one attempt, and the second call would "
                f"return the result of the first: give each step a name of its own, such as "
                f"ctx.step(f{name + '-{number}'!r}, ...) in a loop",
                retryable=False,
            )
        used.add(scoped)

    def _abandon_step(self, name: str) -> None:
        """Allow a step whose function raised to be tried again in this attempt."""
        if self._used_steps is not None:
            self._used_steps.discard(f"{self._scope}{name}")

    def _step_result(self, name: str, codec: ValueCodec) -> Any:
        data = self._steps.get(f"{self._scope}{name}") or self._steps.get(self._awaited_key(name))
        return None if data is None else codec.decode_stored(data, what=f"the result of step {name!r}")

    def _keep(self, name: str, value: Any, codec: ValueCodec = UNTYPED, key: str = "") -> Any:
        if not isinstance(name, str) or not name:
            raise ValueError(f"a step needs a name that is a string, not {name!r}")
        what = f"the result of step {name!r} of stage {self.stage_id!r}"
        data, warning = codec.keep(value, what=what)
        if warning is not None:
            _warn_once(f"{self.workflow_id}:{self.stage_id}:{name}", warning)
        if len(data) > self._limit:
            raise PayloadTooLarge(
                f"{what} is {len(data)} bytes, over max_message_bytes={self._limit}; keep large data in files and pass "
                "their names",
                size=len(data),
                limit=self._limit,
            )
        scoped = key or f"{self._scope}{name}"
        self._store.keep(scoped, data)
        self._steps[scoped] = data
        return codec.decode(data)


def _step_codec(function: Callable[..., Any]) -> ValueCodec:
    """Return the codec of the results that a step's function is annotated with."""
    if not getattr(function, "__annotations__", None):
        return UNTYPED
    hint = return_type(function)
    return UNTYPED if hint is Any else ValueCodec(hint)


class _PartialResults(dict[str, Any]):
    """Results of which some cannot be decoded; reading one of these raises its error."""

    def __init__(self, results: Mapping[str, Any], errors: Mapping[str, UndecodableData]) -> None:
        super().__init__(results)
        self._errors = errors

    def __getitem__(self, key: str) -> Any:
        self._check(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the result of a stage, or `default` if it has not completed."""
        self._check(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # overridden, so that `dict(results)` reads each result by `__getitem__`

    def values(self) -> Any:
        """Raise the error of a result that cannot be decoded."""
        self._check(*self)

    def items(self) -> Any:
        """Raise the error of a result that cannot be decoded."""
        self._check(*self)

    def _check(self, *keys: str) -> None:
        for key in keys:
            if key in self._errors:
                raise self._errors[key]


def with_result(results: dict[str, Any], stage_id: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `ctx.results` with `own` in place of the result of one stage."""
    copied = {key: value for key, value in dict.items(results) if key != stage_id}
    copied.update(own)
    if not isinstance(results, _PartialResults):
        return copied
    return _PartialResults(copied, {key: error for key, error in results._errors.items() if key != stage_id})


def _decode_results(codec: ContextCodec[Any], trail: bytes) -> dict[str, Any]:
    """Return the results of the completed stages; reading one that cannot be decoded raises `UndecodableData`."""
    results: dict[str, Any] = {}
    errors: dict[str, UndecodableData] = {}
    for record in decode_trail(trail):
        if record.status != "completed":
            continue
        stage_id = record.stage_id
        what = f"the result of stage {stage_id!r}"
        try:
            results[stage_id] = result_codec(codec, stage_id).decode_stored(record.data, what=what, result_of=stage_id)
            errors.pop(stage_id, None)
        except UndecodableData as error:
            results[stage_id], errors[stage_id] = None, error
    return _PartialResults(results, errors) if errors else results


_warned: set[str] = set()


def _warn_once(place: str, warning: str) -> None:
    if place not in _warned:
        _warned.add(place)
        logging.getLogger("stageflow_actors.worker").warning("%s", warning)
