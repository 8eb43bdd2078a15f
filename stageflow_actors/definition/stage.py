"""One stage of a workflow and its compensation: values, checked when they are made and never changed after.

What a workflow needs to change (an id for a lambda, a compensation that is registered later) gives a new `Stage`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypedDict

from stageflow_actors.definition.breaker import Breaker, check_breaker
from stageflow_actors.definition.callables import check_function
from stageflow_actors.definition.duration import Duration, optional_seconds
from stageflow_actors.definition.handler import HandlerSpec, default_id, inspect_handler
from stageflow_actors.definition.http import HttpCall, kill_after, shown_url
from stageflow_actors.definition.ids import check_id
from stageflow_actors.definition.remote import RemoteCall
from stageflow_actors.definition.retry import RetryPolicy, check_policy
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["MAX_ACTORS", "Compensation", "Replace", "Stage", "StageOptions"]

MAX_ACTORS = 1_000
"""Each is a process: of more the machine would have nothing left, and the broker takes 4,096 peers in all."""


class Replace:
    """Returned by a handler: `Replace(new)` makes `new` the workflow's context.

    Needed for dict contexts, where a returned dict is a result; a typed context is replaced by returning an
    instance of its type.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Replace({self.value!r})"


class Compensation:
    """What undoes a completed stage: a function of the context, and how long and how often it is tried.

    `timeout` (seconds, of one attempt; None: no limit), `retry` (None: one attempt), `actors` (worker
    processes, up to 1,000).

    Of a map stage it is a function of an item, and `timeout` that of one item. All items are tried in each attempt, the
    last one first, and those that failed are tried again; one that is undone is undone once, unless its worker dies.
    """

    __slots__ = ("actors", "function", "retry", "spec", "timeout")

    def __init__(
        self,
        function: Callable[..., Any],
        timeout: Duration | None = 60,
        retry: RetryPolicy | None = None,
        actors: int = 1,
    ) -> None:
        what = f"compensation {getattr(function, '__name__', repr(function))!r}"
        self.function = function
        self.spec: HandlerSpec = inspect_handler(function, what)
        self.timeout: float | None = optional_seconds(timeout, f"the timeout of {what}")
        self.retry: RetryPolicy | None = check_policy(retry, f"the retry of {what}")
        self.actors: int = check_count(actors, f"actors of {what}", MAX_ACTORS)

    @classmethod
    def http(
        cls,
        url: str | Callable[[Any], str],
        *,
        method: str = "POST",
        request: Callable[[Any], Any] | None = None,
        on_response: Callable[[Any, Any], Any] | None = None,
        headers: Mapping[str, str] | Callable[[Any], Mapping[str, str]] | None = None,
        timeout: Duration | None = 60,
        retry: RetryPolicy | None = None,
        actors: int = 1,
    ) -> Compensation:
        """A request to a server that undoes a stage; its `Idempotency-Key` is not the stage's own. See `Stage.http`."""
        call = HttpCall(
            url,
            what=f"the compensation {method} {shown_url(url) if isinstance(url, str) else ''}".rstrip(),
            method=method,
            request=request,
            on_response=on_response,
            headers=headers,
            timeout=timeout,
            undo=True,
        )
        return cls(call.execute, kill_after(call.timeout), retry, actors)

    def __repr__(self) -> str:
        return f"Compensation({getattr(self.function, '__name__', self.function)})"


class StageOptions(TypedDict, total=False):
    """The options that `Workflow.stage`, `Workflow.add_stage` and `Stage` share."""

    id: str | None
    compensation: Callable[..., Any] | Compensation | None
    retry: RetryPolicy | None
    timeout: Duration | None
    actors: int
    concurrency: int
    required: bool
    after: Iterable[str]
    when: Callable[[Any], Any] | None
    ttl: Duration | None
    env: Mapping[str, str] | None
    breaker: Breaker | None
    max_memory: int | None
    max_tasks: int | None


class Stage:
    """A handler and how it is run.

    `id`: by default made of the handler's name; `compensation`: a function or `Compensation` that undoes it;
    `retry`: policy for failed attempts; `timeout`: seconds of one attempt; `actors`: worker processes,
    up to 1,000; `concurrency`: messages one actor works on at once; `required`: whether its failure fails the workflow;
    `after`: ids of earlier stages that must have completed; `when`: predicate on the context; `ttl`: seconds a
    message may wait in the queue; `env`: environment of the workers;
    `breaker`: when a stage that keeps failing is left alone; `max_memory`: bytes of RSS that a worker, with the
    processes it has started, may use before it is killed (`WorkerDied`, charged to what it is at; looked at ten times
    a second); `max_tasks`: messages before an actor is recycled. Mistakes raise `WorkflowDefinitionError`.

    What a handler changes of its process (working directory, umask, environment, locale, signal handlers, descriptors,
    threads left running) no other stage sees. The next message of the same worker does: `max_tasks=1` gives each a
    process of its own. What a handler has started ends with its worker, except a process that has made itself a daemon.

    `id` is "" for a lambda until a workflow gives it its place; `spec` describes how to call the handler.
    """

    __slots__ = (
        "actors",
        "after",
        "breaker",
        "compensation",
        "concurrency",
        "env",
        "handler",
        "id",
        "max_memory",
        "max_tasks",
        "required",
        "retry",
        "spec",
        "timeout",
        "ttl",
        "when",
    )

    def __init__(
        self,
        handler: Any,
        *,
        id: str | None = None,
        compensation: Callable[..., Any] | Compensation | None = None,
        retry: RetryPolicy | None = None,
        timeout: Duration | None = None,
        actors: int = 1,
        concurrency: int = 1,
        required: bool = True,
        after: Iterable[str] = (),
        when: Callable[[Any], Any] | None = None,
        ttl: Duration | None = None,
        env: Mapping[str, str] | None = None,
        breaker: Breaker | None = None,
        max_memory: int | None = None,
        max_tasks: int | None = None,
    ) -> None:
        if isinstance(handler, Stage):
            raise WorkflowDefinitionError(f"Stage(...) was given the stage {handler.id!r}: give it the handler itself")
        name = default_id(handler) if id is None else id
        self.id: str = name if id is None and not name else check_id(name, f"the stage of {handler!r}")
        what = f"stage {self.id!r}" if self.id else "stage of a lambda"
        self.handler = handler
        self.spec: HandlerSpec = inspect_handler(handler, what)
        self.compensation: Compensation | None = _compensation(compensation, self.spec, what)
        self.retry: RetryPolicy | None = check_policy(retry, f"the retry of {what}")
        self.timeout: float | None = optional_seconds(timeout, f"the timeout of {what}")
        self.actors: int = check_count(actors, f"actors of {what}", MAX_ACTORS)
        self.concurrency: int = check_count(concurrency, f"concurrency of {what}")
        self.required: bool = required if isinstance(required, bool) else _refuse_bool(required, what)
        self.after: tuple[str, ...] = _after(after, what)
        self.when: Callable[[Any], Any] | None = None if when is None else check_function(when, f"when of {what}")
        self.ttl: float | None = optional_seconds(ttl, f"the ttl of {what}")
        self.env: dict[str, str] = _environment(env, what)
        self.breaker: Breaker | None = check_breaker(breaker, f"the breaker of {what}")
        self.max_memory: int | None = _memory(max_memory, what)
        self.max_tasks: int | None = None if max_tasks is None else check_count(max_tasks, f"max_tasks of {what}")

    @property
    def services(self) -> frozenset[str]:
        """The names of the services that the handler takes."""
        own = self.spec
        return frozenset(own.services) | frozenset(own.constructor_services)

    @property
    def compensation_services(self) -> frozenset[str]:
        """The names of the services that the compensation takes."""
        if self.compensation is None:
            return frozenset()
        call = self.compensation.spec
        return frozenset(call.services) | frozenset(call.constructor_services)

    @classmethod
    def http(
        cls,
        id: str,
        *,
        url: str | Callable[[Any], str],
        method: str = "POST",
        request: Callable[[Any], Any] | None = None,
        on_response: Callable[[Any, Any], Any] | None = None,
        headers: Mapping[str, str] | Callable[[Any], Mapping[str, str]] | None = None,
        timeout: Duration | None = None,
        **options: Any,
    ) -> Stage:
        """A stage that asks a server: what `Workflow.add_http_stage` appends, for branches and parallel stages.

        `url`, in which `{field}` stands for a field of the context, or a function of the context; `request(context)`:
        the JSON to send; `on_response(context, response)` takes the JSON of the answer in, and without it that is the
        stage's result; `headers`: a dict, or a function of the context. The `Idempotency-Key` is `ctx.idempotency_key`.

        No answer within `timeout` seconds is a `StageTimeout`, 5xx, 429 and a network that fails are a
        `StageError(retryable=True)` for the stage's `retry`, any other answer than a success is final. What cannot be
        interrupted, as `on_response`, is killed at twice `timeout` and a second. Without `timeout` the whole attempt
        may take what the workflow's `stage_timeout` says, or else 30 seconds. Other options as in `Stage`.
        """
        call = HttpCall(
            url,
            what=f"HTTP stage {id!r}",
            method=method,
            request=request,
            on_response=on_response,
            headers=headers,
            timeout=timeout,
        )
        return cls(call, id=id, timeout=kill_after(call.timeout), **options)

    @classmethod
    def remote(
        cls,
        id: str,
        *,
        endpoint: str,
        command: Callable[[Any], Any],
        on_reply: Callable[[Any, Any], Any] | None = None,
        timeout: Duration | None = None,
        **options: Any,
    ) -> Stage:
        """A stage that asks an endpoint: what `Workflow.add_remote_stage` appends, for branches and parallel stages.

        `command(context)` is sent; `on_reply(context, reply)` takes the reply in, and without it that is the stage's
        result. No reply within `timeout` seconds, or one that is an error, is a failure that the stage's `retry` sees.
        How long `command` and `on_reply` themselves may take the workflow's `stage_timeout` says. Other options as in
        `Stage`.
        """
        what = f"remote stage {id!r}"
        wait = optional_seconds(timeout, f"the timeout of {what}")
        return cls(RemoteCall(endpoint, command, on_reply, wait, what), id=id, **options)

    def replace(self, **changes: Any) -> Stage:
        """A stage like this one with some of `id`, `compensation`, `retry`, `timeout`, `when` set anew."""
        copy = Stage.__new__(Stage)
        for name in _FIELDS:
            setattr(copy, name, changes.pop(name, getattr(self, name)))
        if changes:
            raise TypeError(f"Stage has no field {next(iter(changes))!r}")
        return copy

    def __repr__(self) -> str:
        return f"Stage({self.id!r})"


_FIELDS = Stage.__slots__


def check_count(value: object, what: str, most: int | None = None) -> int:
    """`value` if it is an integer from 1, and not more than `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        to = "" if most is None else f" to {most:,}"
        raise WorkflowDefinitionError(f"{what} must be an integer from 1{to}, not {value!r}")
    return value


MIN_MEMORY_BYTES = 1 << 20
"""A worker that has done nothing yet uses many times as much: whoever asks for less means megabytes."""


def _memory(value: object, what: str) -> int | None:
    if value is None:
        return None
    count = check_count(value, f"max_memory of {what}")
    if count < MIN_MEMORY_BYTES:
        raise WorkflowDefinitionError(
            f"max_memory of {what} is a number of bytes, and {count} is less than any worker uses: "
            f"for {count} MB write max_memory={count}_000_000"
        )
    return count


def _refuse_bool(value: object, what: str) -> NoReturn:
    raise WorkflowDefinitionError(f"required of {what} must be True or False, not {value!r}")


def _compensation(given: Any, call: HandlerSpec, what: str) -> Compensation | None:
    if given is None:
        return None if call.compensate is None else _own_compensation(call.compensate)
    if isinstance(given, Compensation):
        return given
    if isinstance(given, Stage) or not callable(given):
        raise WorkflowDefinitionError(
            f"the compensation of {what} must be a function or Compensation(function, ...), not {given!r}"
        )
    return Compensation(given)


def _own_compensation(spec: HandlerSpec) -> Compensation:
    """Return the compensation that an object or class handler has as its method `compensate`."""
    made = Compensation.__new__(Compensation)
    made.function, made.spec = spec.function, spec
    made.timeout, made.retry, made.actors = 60.0, None, 1
    return made


def _after(given: Any, what: str) -> tuple[str, ...]:
    if isinstance(given, str):
        raise WorkflowDefinitionError(f"after of {what} takes several stage ids: write after=[{given!r}]")
    try:
        ids = tuple(given)
    except TypeError:
        raise WorkflowDefinitionError(f"after of {what} takes a list of stage ids, not {given!r}") from None
    for one in ids:
        check_id(one, f"a stage in after of {what}")
    return ids


def _environment(given: Any, what: str) -> dict[str, str]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise WorkflowDefinitionError(f"env of {what} must be a dict such as {{'OMP_NUM_THREADS': '1'}}, not {given!r}")
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise WorkflowDefinitionError(f"env of {what} takes strings only: {name!r}: {value!r} is not")
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise WorkflowDefinitionError(f"env of {what} has {name!r}, which no environment can hold")
    return dict(given)
