"""`Stage`, `Compensation` and `Replace`: immutable values, validated by their constructors.

A workflow never changes a stage: where it fills in an id or a compensation, it makes a new `Stage`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypedDict, TypeVar, Unpack

from stageflow_actors.definition.breaker import Breaker, check_breaker
from stageflow_actors.definition.callables import check_function
from stageflow_actors.definition.class_options import attribute_options, warn_misspelt
from stageflow_actors.definition.duration import Duration, optional_seconds
from stageflow_actors.definition.guesses import adapts, keyword_arguments, named_handler
from stageflow_actors.definition.handler import (
    HandlerSpec,
    check_methods,
    default_id,
    has_options,
    inspect_compensation,
    inspect_handler,
)
from stageflow_actors.definition.http import HttpCall, HttpOptions, kill_after, redact_url
from stageflow_actors.definition.ids import check_id
from stageflow_actors.definition.remote import RemoteCall
from stageflow_actors.definition.retry import RetryPolicy, check_policy
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = [
    "MAX_ACTORS",
    "Compensation",
    "HttpStageOptions",
    "Replace",
    "Stage",
    "StageOptions",
]

F = TypeVar("F", bound=Callable[..., Any])

MAX_ACTORS = 1_000
"""Each actor is a process. The broker accepts 4,096 peers, and a host runs out of memory long before that."""


class Replace:
    """Return value of a handler that replaces the context of the instance.

    A handler over a dict context needs it: a returned dict is the result of the stage, and the context stays as the
    handler left it. A handler over a typed context returns an instance of its type instead.

    Args:
        value: The new context. It has to be of the workflow's context type.

    Example:
        >>> from stageflow_actors import Replace, Workflow
        >>> from stageflow_actors.testing import run
        >>> flow = Workflow("orders").add_stage(lambda order: Replace({"total": order["net"] * 2}))
        >>> run(flow, {"net": 21}).context
        {'total': 42}
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Replace({self.value!r})"


def _with_class_options(names: tuple[str, ...]) -> Callable[[F], F]:
    """Return a decorator for a constructor: options that are not given are taken from attributes of the handler."""

    def decorate(init: F) -> F:
        ordered = init.__code__.co_varnames[1 : init.__code__.co_argcount]

        @functools.wraps(init)
        def constructed(self: Any, *args: Any, **options: Any) -> None:
            handler = args[0] if args else options.get(ordered[0])
            if not has_options(handler) or isinstance(handler, (HttpCall, RemoteCall)):
                init(self, *args, **options)
                return
            given = {*ordered[: len(args)], *options}
            own = {name: value for name, value in attribute_options(handler, names).items() if name not in given}
            kind = handler if isinstance(handler, type) else type(handler)
            try:
                init(self, *args, **options, **own)
            except WorkflowDefinitionError as error:
                wrong = next((name for name in own if re.search(rf"\b{name}( '[^']*')? of\b", error.message)), None)
                if wrong is None:
                    raise
                raise WorkflowDefinitionError(
                    f"{error.message} (it is the attribute {wrong!r} of {kind.__name__}: plain attributes of a handler "
                    "class that are named like options set them)"
                ) from None
            warn_misspelt(handler, repr(self), names, _METHODS)

        return constructed  # type: ignore[return-value]

    return decorate


_METHODS = ("execute", "compensate")
_COMPENSATION_OPTIONS = ("timeout", "retry", "actors", "when_uncertain")


class Compensation:
    """The function that undoes a completed stage, and how it is attempted.

    The compensation of a map stage is a function of one item, and `timeout` applies to one item. Each attempt
    undoes the items that are not undone yet, the last item first. An item is undone once, unless its worker dies.

    Args:
        function: Called as `function(context)` or `function(context, ctx)`; every other parameter is a service by its
            name. An object with a method `compensate`, or else `execute`, and a class of such objects are accepted,
            too; their plain attributes `timeout`, `retry`, `actors` and `when_uncertain` are defaults of these options.
        timeout: Seconds (or a `timedelta`) for one attempt; None for no limit. Default: 60.
        retry: Policy for failed attempts; None for one attempt. Default: None.
        actors: Number of worker processes, 1 to 1,000. The workflow has one pool for all its compensations; the
            largest number counts. Default: 1.
        when_uncertain: True to run it also for its own stage if that failed with its effect unknown: the last attempt,
            or one before it, ended by `StageTimeout`, by `WorkerDied`, or by the kill of `Instance.cancel`. It then
            runs before all others, and `ctx.results` has no entry for the stage. Never for optional stages; for a map
            stage it undoes such items too. Default: False, for stages that completed only.

    Raises:
        WorkflowDefinitionError: If `function` cannot be called with a context, or an option has a wrong type or value.

    Example:
        >>> from stageflow_actors import Compensation, Retry, Workflow
        >>> from stageflow_actors.testing import run
        >>> def refund(order):
        ...     print("refunded", order["id"])
        >>> def ship(order):
        ...     raise ValueError("no address")
        >>> undo = Compensation(refund, timeout=10, retry=Retry.fixed(max_attempts=3, delay=1))
        >>> flow = Workflow("orders").add_stage(lambda order: None, id="pay", compensation=undo).add_stage(ship)
        >>> str(run(flow, {"id": "A-1"}).status)
        refunded A-1
        'compensated'
    """

    __slots__ = ("actors", "function", "retry", "spec", "timeout", "when_uncertain")

    @adapts("Compensation(function, timeout=60, retry=None, actors=1, when_uncertain=False)")
    @_with_class_options(_COMPENSATION_OPTIONS)
    def __init__(
        self,
        function: Any,
        timeout: Duration | None = 60,
        retry: RetryPolicy | None = None,
        actors: int = 1,
        when_uncertain: bool = False,
    ) -> None:
        what = f"compensation {getattr(function, '__name__', type(function).__name__)!r}"
        if isinstance(function, (Compensation, Stage)) or not (callable(function) or has_options(function)):
            raise WorkflowDefinitionError(
                f"a compensation must be a function, or a class or object with compensate(context), not {function!r}"
            )
        self.function = function
        self.spec: HandlerSpec = inspect_compensation(function, what)
        self.timeout: float | None = optional_seconds(timeout, f"the timeout of {what}")
        self.retry: RetryPolicy | None = check_policy(retry, f"the retry of {what}")
        self.actors: int = check_count(actors, f"actors of {what}", MAX_ACTORS)
        if not isinstance(when_uncertain, bool):
            raise WorkflowDefinitionError(f"when_uncertain of {what} must be True or False, not {when_uncertain!r}")
        self.when_uncertain: bool = when_uncertain

    @classmethod
    def http(
        cls,
        url: str | Callable[[Any], str],
        *,
        timeout: Duration | None = 60,
        retry: RetryPolicy | None = None,
        actors: int = 1,
        when_uncertain: bool = False,
        **options: Unpack[HttpOptions],
    ) -> Compensation:
        """Return a compensation that is an HTTP request.

        The request carries an `Idempotency-Key` that differs from the key of the stage's own request. It needs httpx:
        `pip install 'stageflow-actors[http]'`. See `Stage.http` for the meaning of answers.

        Args:
            url: The URL, in which `{field}` stands for a field of the context; or a function of the context.
            method: The HTTP method. Default: POST.
            request: Function of the context that returns the JSON to send. Default: no body.
            on_response: Called as `on_response(context, response)` with the JSON of the answer. Default: the answer is
                ignored.
            headers: A dict of headers, or a function of the context that returns one.
            timeout: Seconds for one attempt; None for no limit. Default: 60.
            retry: Policy for failed attempts. Default: one attempt.
            actors: Number of worker processes, 1 to 1,000. Default: 1.
            when_uncertain: True to run it also if its own stage failed with its effect unknown. Default: False.
            **options: The options of the request: `method`, `request`, `on_response` and `headers`.

        Returns:
            The compensation, for `Stage(compensation=...)`.

        Raises:
            WorkflowDefinitionError: If an option has a wrong type or value, or httpx is not installed.

        Example:
            >>> from stageflow_actors import Compensation
            >>> undo = Compensation.http("https://shop.example/payments/{id}", method="DELETE", timeout=5)
            >>> undo.actors
            1
        """
        what = f"the compensation {options.get('method', 'POST')} {redact_url(url) if isinstance(url, str) else ''}"
        call = HttpCall(url, what=what.rstrip(), timeout=timeout, undo=True, **options)
        return cls(call.execute, kill_after(call.timeout), retry, actors, when_uncertain)

    def __repr__(self) -> str:
        return f"Compensation({getattr(self.function, '__name__', self.function)})"


class CommonOptions(TypedDict, total=False):
    """The options of each kind of stage with a handler; see `Stage`."""

    compensation: Any
    retry: RetryPolicy | None
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


class StageOptions(CommonOptions, total=False):
    """The options that `Workflow.stage`, `Workflow.add_stage` and `Stage` have in common; see `Stage`."""

    id: str | None
    timeout: Duration | None


class HttpStageOptions(HttpOptions, CommonOptions, total=False):
    """The options that `Workflow.add_http_stage` and `Stage.http` have in common; see `Stage.http`."""


_OPTIONS = tuple(name for name in (*StageOptions.__annotations__, *CommonOptions.__annotations__) if name != "when")


class Stage:
    """A handler, and how it is run.

    A handler changes its own worker process only (working directory, environment, signal handlers, open files,
    threads): no other stage sees it, but the next message of the same worker does. `max_tasks=1` gives each message
    a process of its own. Processes that a handler starts end with the worker, except daemons.

    Args:
        handler: Called as `handler(context)` or `handler(context, ctx)`, where `ctx` is the `StageContext`; every
            other parameter is a service by its name. A function, an async function, an object with a method
            `execute`, or a class of such objects, which is constructed in the worker with services as arguments.
            Plain attributes of the class or object that are named like the options below are their defaults.
        id: Letters, digits, '-', '_' and '.', unique in the workflow. Default: made of the handler's name
            (`charge_card` becomes `charge-card`); a lambda in a workflow is called `stage-N`.
        compensation: What undoes the stage: a function, a class or object with a method `compensate` (or else
            `execute`), or a `Compensation`. None, the default, is the method `compensate` of the handler, or else no
            compensation. Pass the function itself: the result of a call such as `refund({})` is often None.
        retry: Policy for failed attempts. Default: that of the workflow, or else one attempt; the death of a worker is
            retried at once in any case, up to `Config.max_stage_retries` times.
        timeout: Seconds (or a `timedelta`) for one attempt. Default: `stage_timeout` of the workflow, or else no
            limit.
        actors: Number of worker processes, 1 to 1,000. Default: 1.
        concurrency: Number of messages that one actor handles at the same time, from 1: in an event loop if the
            handler is async, in threads otherwise. Default: 1.
        required: True if the failure of the stage fails the instance; if False the failure is recorded and the
            instance goes on. Default: True.
        after: Ids of earlier stages that must have completed. If one has not, a required stage fails and an optional
            one is skipped. Default: none.
        when: Predicate on the context; the stage is skipped where it is false. Default: never skipped.
        ttl: Seconds that a message may wait in the queue of the stage; the stage fails after that. Default: no limit.
        env: Environment variables of the workers, added to those of the program.
        breaker: Circuit breaker over all actors of the stage. Default: none.
        max_memory: Bytes of resident memory that a worker and the processes it started may use, from 1 MiB. A worker
            that uses more is killed, and its attempt fails with `WorkerDied`. Checked ten times per second.
            Default: no limit.
        max_tasks: Number of messages after which a worker is replaced, from 1. Default: no limit.

    Attributes:
        id: The id; empty for a lambda that no workflow has taken yet.
        spec: How the handler is called.

    Raises:
        WorkflowDefinitionError: If the handler cannot be called with a context, or an option has a wrong type or
            value. The message names the stage and the fix.

    Example:
        >>> from stageflow_actors import Stage
        >>> def charge_card(order):
        ...     order["charged"] = True
        >>> Stage(charge_card, timeout=30, actors=2).id
        'charge-card'
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

    @adapts("Stage(handler, id=..., timeout=...)", named_handler)
    @_with_class_options(_OPTIONS)
    def __init__(
        self,
        handler: Any,
        *,
        id: str | None = None,
        compensation: Any = None,
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
            raise WorkflowDefinitionError(f"Stage(...) got the stage {handler.id!r}: pass the handler itself")
        name = default_id(handler) if id is None else id
        self.id: str = name if id is None and not name else check_id(name, f"the stage of {handler!r}")
        what = f"stage {self.id!r}" if self.id else "stage of a lambda"
        if id is None and not callable(handler) and not hasattr(handler, "execute"):
            what = "a stage"  # its default id would be the name of a wrong type
        self.handler = handler
        self.spec: HandlerSpec = inspect_handler(handler, what)
        if compensation is None and has_options(handler):
            check_methods(handler, what)
        self.compensation: Compensation | None = _check_compensation(compensation, self.spec, what)
        self.retry: RetryPolicy | None = check_policy(retry, f"the retry of {what}")
        self.timeout: float | None = optional_seconds(timeout, f"the timeout of {what}")
        self.actors: int = check_count(actors, f"actors of {what}", MAX_ACTORS)
        self.concurrency: int = check_count(concurrency, f"concurrency of {what}")
        self.required: bool = required if isinstance(required, bool) else _refuse_bool(required, what)
        self.after: tuple[str, ...] = _check_after(after, what)
        self.when: Callable[[Any], Any] | None = None if when is None else check_function(when, f"when of {what}")
        self.ttl: float | None = optional_seconds(ttl, f"the ttl of {what}")
        self.env: dict[str, str] = _check_environment(env, what)
        self.breaker: Breaker | None = check_breaker(breaker, f"the breaker of {what}")
        self.max_memory: int | None = _check_memory(max_memory, what)
        self.max_tasks: int | None = None if max_tasks is None else check_count(max_tasks, f"max_tasks of {what}")

    @property
    def services(self) -> frozenset[str]:
        """The services that the handler and its constructor need."""
        return frozenset(self.spec.services)

    @property
    def compensation_services(self) -> frozenset[str]:
        """The services that the compensation needs."""
        return frozenset() if self.compensation is None else frozenset(self.compensation.spec.services)

    @classmethod
    @adapts(
        "Stage.http(id, url='https://…', timeout=5)",
        lambda cls, *args, **options: keyword_arguments(cls, args, ("id", "url"), options),
    )
    def http(
        cls,
        id: str,
        *,
        url: str | Callable[[Any], str],
        timeout: Duration | None = None,
        **options: Unpack[HttpStageOptions],
    ) -> Stage:
        """Return a stage that sends an HTTP request.

        For branches and parallel stages; `Workflow.add_http_stage` appends such a stage. Each request carries
        `ctx.idempotency_key` as its `Idempotency-Key`. It needs httpx: `pip install 'stageflow-actors[http]'`.

        An answer 5xx or 429 and a network failure are a `StageError(retryable=True)`, for which the `retry` policy is
        asked; no answer in time is a `StageTimeout`; every other answer than a success is a final failure.

        Args:
            id: The id of the stage.
            url: The URL, in which `{field}` stands for a field of the context; or a function of the context.
            method: The HTTP method. Default: POST.
            request: Function of the context that returns the JSON to send. Default: no body.
            on_response: Called as `on_response(context, response)` with the JSON of the answer. Default: the JSON is
                the result of the stage.
            headers: A dict of headers, or a function of the context that returns one.
            timeout: Seconds to wait for the answer. An attempt that cannot be interrupted, as in `on_response`, is
                killed after twice `timeout` and one second. Default: the whole attempt may take the workflow's
                `stage_timeout`, or else 30 seconds.
            **options: `method`, `request`, `on_response`, `headers`, and other options of `Stage`.

        Returns:
            The stage.

        Raises:
            WorkflowDefinitionError: If an option has a wrong type or value, or httpx is not installed.

        Example:
            >>> from stageflow_actors import Stage, Workflow
            >>> pay = Stage.http("pay", url="https://bank.example/accounts/{account}/payments", timeout=5)
            >>> Workflow("orders").add_parallel("checkout", [pay]).stages
            (Stage('pay'),)
        """
        own: dict[str, Any] = {**options}
        of_call = {name: own.pop(name) for name in HttpOptions.__annotations__ if name in own}
        call = HttpCall(url, what=f"HTTP stage {id!r}", timeout=timeout, **of_call)
        return cls(call, id=id, timeout=kill_after(call.timeout), **own)

    @classmethod
    @adapts(
        "Stage.remote(id, endpoint='name', command=function)",
        lambda cls, *args, **options: keyword_arguments(cls, args, ("id", "endpoint", "command", "on_reply"), options),
    )
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
        """Return a stage that sends a request to an endpoint.

        For branches and parallel stages; `Workflow.add_remote_stage` appends such a stage. An endpoint is a handler
        that a `Runtime` serves (`Runtime.endpoint`). `command` and `on_reply` themselves may take the
        workflow's `stage_timeout`.

        Args:
            id: The id of the stage.
            endpoint: The name of the endpoint.
            command: Function of the context that returns the request, a plain value.
            on_reply: Called as `on_reply(context, reply)`. Default: the reply is the result of the stage.
            timeout: Seconds to wait for the reply. No reply in time, or an error as reply, is a failure for which the
                `retry` policy is asked. Default: the limit of `StageContext.request`.
            **options: Other options of `Stage`.

        Returns:
            The stage.

        Raises:
            WorkflowDefinitionError: If an option has a wrong type or value.

        Example:
            >>> from stageflow_actors import Stage, Workflow
            >>> from stageflow_actors.testing import run
            >>> ask = Stage.remote("price", endpoint="prices", command=lambda order: order["sku"])
            >>> result = run(Workflow("orders").add_stage(ask), {"sku": "tea"}, endpoints={"prices": lambda sku: 450})
            >>> result.stages[0].data
            450
        """
        what = f"remote stage {id!r}"
        wait = optional_seconds(timeout, f"the timeout of {what}")
        return cls(RemoteCall(endpoint, command, on_reply, wait, what), id=id, **options)

    def _modules(self) -> set[str]:
        """Return the names of the modules that define the handler and the compensation."""
        targets = [self.spec.target] + ([] if self.compensation is None else [self.compensation.spec.target])
        found: set[str] = set()
        for target in targets:
            while isinstance(target, functools.partial):
                target = target.func
            name = getattr(target, "__module__", None)
            found |= {name} if isinstance(name, str) else set()
        return found

    def replace(self, **changes: Any) -> Stage:
        """Return a copy of the stage in which some attributes are replaced.

        Args:
            **changes: The new values, which are not checked again; usually `id`, `compensation`, `retry`, `timeout` or
                `when`.

        Returns:
            A new stage; this one stays as it is.

        Raises:
            TypeError: If a stage has no such attribute.

        Example:
            >>> from stageflow_actors import Stage
            >>> Stage(print, id="show").replace(id="print")
            Stage('print')
        """
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
    """Return `value` if it is an integer from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        to = "" if most is None else f" to {most:,}"
        raise WorkflowDefinitionError(f"{what} must be an integer from 1{to}, not {value!r}")
    return value


MIN_MEMORY_BYTES = 1 << 20
"""An idle worker uses many times as much: a smaller number is most likely meant in megabytes."""


def _check_memory(value: object, what: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int):
        raise WorkflowDefinitionError(
            f"max_memory of {what} must be a number of bytes such as 2_000_000_000, not {value!r}"
        )
    count = check_count(value, f"max_memory of {what}")
    if count < MIN_MEMORY_BYTES:
        raise WorkflowDefinitionError(
            f"max_memory of {what} is a number of bytes, and {count} is less than any worker uses: "
            f"for {count} MB write max_memory={count}_000_000"
        )
    return count


def _refuse_bool(value: object, what: str) -> NoReturn:
    raise WorkflowDefinitionError(f"required of {what} must be True or False, not {value!r}")


def _check_compensation(given: Any, spec: HandlerSpec, what: str) -> Compensation | None:
    if given is None:
        return None if spec.compensate is None else _own_compensation(spec.compensate)
    if isinstance(given, Compensation):
        return given
    if isinstance(given, Stage) or not (callable(given) or has_options(given)):
        raise WorkflowDefinitionError(
            f"the compensation of {what} must be a function, a class or object with compensate(context), or "
            f"Compensation(function, ...), not {given!r}"
            + (": give the function itself, not its name" if isinstance(given, str) else "")
        )
    try:
        return Compensation(given)
    except WorkflowDefinitionError as error:
        raise WorkflowDefinitionError(f"the compensation of {what} does not fit: {error.message}") from None


def _own_compensation(spec: HandlerSpec) -> Compensation:
    """Return the compensation that an object or class handler has as its method `compensate`."""
    made = Compensation.__new__(Compensation)
    made.function, made.spec = spec.function, spec
    made.timeout, made.retry, made.actors, made.when_uncertain = 60.0, None, 1, False
    return made


def _check_after(given: Any, what: str) -> tuple[str, ...]:
    if isinstance(given, str):
        raise WorkflowDefinitionError(f"after of {what} takes several stage ids: write after=[{given!r}]")
    try:
        ids = tuple(given)
    except TypeError:
        raise WorkflowDefinitionError(f"after of {what} takes a list of stage ids, not {given!r}") from None
    for one in ids:
        check_id(one, f"a stage in after of {what}")
    return ids


def _check_environment(given: Any, what: str) -> dict[str, str]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise WorkflowDefinitionError(f"env of {what} must be a dict such as {{'OMP_NUM_THREADS': '1'}}, not {given!r}")
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise WorkflowDefinitionError(
                f"env of {what} takes strings only, as in {{{str(name)!r}: {str(value)!r}}}, not "
                f"{{{name!r}: {value!r}}}"
            )
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise WorkflowDefinitionError(f"env of {what} has {name!r}, which no environment can hold")
    return dict(given)
