"""`Workflow`: an ordered list of steps over contexts of one type.

Building a workflow runs no handler and has no side effects. Each method validates its own arguments; `validate`
checks the workflow as a whole.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, Unpack, overload

import msgspec

from stageflow_actors.definition.callables import check_function
from stageflow_actors.definition.class_options import attribute_options, warn_misspelt
from stageflow_actors.definition.context_type import check_context_type, fields_of
from stageflow_actors.definition.decorator import CompensationDecorator, StageFunction
from stageflow_actors.definition.duration import Duration, optional_seconds
from stageflow_actors.definition.guesses import (
    adapts,
    branch_arguments,
    closest,
    delay_arguments,
    keyword_arguments,
    map_arguments,
    named_handler,
    parallel_arguments,
)
from stageflow_actors.definition.handler import default_id
from stageflow_actors.definition.http import DEFAULT_TIMEOUT_SECONDS, HttpCall, HttpOptions
from stageflow_actors.definition.ids import check_id
from stageflow_actors.definition.kept_types import check_annotations
from stageflow_actors.definition.notebook import is_defined_again
from stageflow_actors.definition.retry import RetryPolicy, check_policy
from stageflow_actors.definition.stage import (
    CommonOptions,
    Compensation,
    HttpStageOptions,
    Stage,
    StageOptions,
    check_count,
)
from stageflow_actors.definition.steps import Branch, Delay, MapStage, Parallel, Signal, Step, shape_of, stages_of
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["OnFailure", "Workflow", "workflow_of"]

logger = logging.getLogger("stageflow_actors.definition")

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")

OnFailure = Literal["compensate", "park"]


_OPTIONS = {
    "name": None,
    "context": dict,
    "version": 1,
    "timeout": None,
    "on_failure": "compensate",
    "retry": None,
    "stage_timeout": None,
}
"""The options of a workflow, with their defaults."""

_GUESSED_METHODS = {
    **dict.fromkeys(("add_step", "add_task", "add", "then"), "write add_stage(handler), or @workflow.stage"),
    **dict.fromkeys(("step", "task"), "write @workflow.stage, or add_stage(handler)"),
    **dict.fromkeys(("add_sleep", "add_wait", "add_timer"), "write add_delay(id, seconds)"),
    **dict.fromkeys(
        ("run", "execute", "submit", "start", "map"),
        "a Runtime runs it: `with Runtime(workflow) as runtime: runtime.execute(workflow, context)`",
    ),
}
"""Names of methods in other systems, and what to write here."""


def workflow_of(given: Any) -> Any:
    """Return the workflow for a subclass of `Workflow`, made once; everything else as it is."""
    if not isinstance(given, type) or not issubclass(given, Workflow) or given is Workflow:
        return given
    made = given.__dict__.get("_made")
    if made is None:
        try:
            made = given()
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise
            raise WorkflowDefinitionError(
                f"the workflow class {given.__name__} cannot be constructed without arguments ({error}): "
                "give an instance"
            ) from None
        type.__setattr__(given, "_made", made)
    return made


def _declared_options(kind: type[Any]) -> dict[str, Any]:
    """Return the options that the class of a workflow declares as attributes."""
    for name in ("stages", "steps"):
        if not isinstance(getattr(kind, name), property):
            raise WorkflowDefinitionError(
                f"the class {kind.__name__} sets {name!r}, which lists what has been added: "
                f"write `def configure(self): self.add_stage(...)`"
            )
    names = ("id", *_OPTIONS)
    warn_misspelt(kind, f"workflow class {kind.__name__}", names, vars(Workflow))
    return attribute_options(kind, names)


class Workflow(Generic[C]):
    """An ordered list of steps over contexts of one type.

    The methods `stage` and `add_*` append a step; `add_*` return the workflow, so that calls can be chained. Stages,
    branches and parallel steps share one namespace of ids. A `Runtime` runs the workflow, and
    `stageflow_actors.testing.run` runs one instance of it in the calling thread.

    A subclass may set the options below as class attributes, and override `configure`, which adds the steps. A
    `Runtime` takes such a class or an instance of it.

    Args:
        id: Letters, digits, '-', '_' and '.', at most 200 characters. It names queues and must not change while
            instances are in flight. Default: of a subclass its name, as `order-workflow`.
        name: A name for people. Default: the id.
        context: Type of the context: dict, a dataclass, a msgspec Struct or a pydantic model. Default: dict.
        version: Version of the definition, from 1. Instances in flight finish on the version that they started with.
            Default: 1.
        timeout: Seconds (or a `timedelta`) from submit to end of an instance, after which it is cancelled and
            compensated. Default: no limit.
        on_failure: `compensate` to undo the completed stages of a failed instance, `park` to keep its message as a
            dead letter, from which it can be resumed. Default: compensate.
        retry: Policy of stages that have none. Default: one attempt.
        stage_timeout: Seconds for one attempt of stages that have no `timeout`, and for each call of a function of
            parallel, branch and signal steps. Default: no limit.

    Raises:
        WorkflowDefinitionError: If an option has a wrong type or value.

    Example:
        >>> from stageflow_actors import Workflow
        >>> from stageflow_actors.testing import run
        >>> flow = Workflow("orders", on_failure="park")
        >>> @flow.stage
        ... def price(order):
        ...     order["total"] = order["count"] * 450
        >>> run(flow, {"count": 2}).context
        {'count': 2, 'total': 900}
    """

    @overload
    def __init__(
        self: Workflow[dict[str, Any]],
        id: str = ...,
        *,
        name: str | None = None,
        version: int = 1,
        timeout: Duration | None = None,
        on_failure: OnFailure = "compensate",
        retry: RetryPolicy | None = None,
        stage_timeout: Duration | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        id: str = ...,
        *,
        name: str | None = None,
        context: type[C],
        version: int = 1,
        timeout: Duration | None = None,
        on_failure: OnFailure = "compensate",
        retry: RetryPolicy | None = None,
        stage_timeout: Duration | None = None,
    ) -> None: ...

    @adapts(
        "Workflow(id, context=dict, version=1, ...)",
        lambda self, *args, **options: keyword_arguments(self, args, ("id", "context"), options),
    )
    def __init__(
        self,
        id: str | None = None,
        *,
        name: str | None = None,
        context: type[Any] = dict,
        version: int = 1,
        timeout: Duration | None = None,
        on_failure: OnFailure = "compensate",
        retry: RetryPolicy | None = None,
        stage_timeout: Duration | None = None,
    ) -> None:
        kind = type(self)
        if kind is not Workflow:
            given = (name, context, version, timeout, on_failure, retry, stage_timeout)
            declared = _declared_options(kind)
            chosen: list[Any] = [
                declared.get(option, default) if type(value) is type(default) and value == default else value
                for (option, default), value in zip(_OPTIONS.items(), given, strict=True)
            ]
            name, context, version, timeout, on_failure, retry, stage_timeout = chosen
            id = id if id is not None else declared.get("id")
            id = id if id is not None else default_id(kind)
        elif id is None:
            raise WorkflowDefinitionError("a workflow needs an id: write Workflow('order-processing')")
        self.id: str = check_id(id, "the workflow")
        what = f"workflow {id!r}"
        if name is not None and not isinstance(name, str):
            raise WorkflowDefinitionError(f"the name of {what} must be a string, not {name!r}")
        if on_failure not in ("compensate", "park"):
            raise WorkflowDefinitionError(f"on_failure of {what} must be 'compensate' or 'park', not {on_failure!r}")
        self.name: str = name or id
        self.context: type[Any] = check_context_type(context, what)
        self.version: int = check_count(version, f"the version of {what}")
        self.timeout: float | None = optional_seconds(timeout, f"the timeout of {what}")
        self.on_failure: OnFailure = on_failure
        self.retry: RetryPolicy | None = check_policy(retry, f"the retry of {what}")
        self.stage_timeout: float | None = optional_seconds(stage_timeout, f"the stage_timeout of {what}")
        self._stages: dict[str, Stage] = {}
        self._steps: list[Step] = []
        self._ids: set[str] = set()
        self._redefined: set[str] = set()
        self._compensations_redefined: set[str] = set()
        self._running_in: list[str] = []
        self.configure()

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            if name in _GUESSED_METHODS:
                # Without an object, Python does not append a guess of its own.
                raise AttributeError(f"a Workflow has no {name!r}: {_GUESSED_METHODS[name]}", name=name, obj=None)
            if name not in ("id", "_stages", "_steps", "_ids", "_running_in"):
                return self.__getattribute__(name)  # the usual AttributeError
            raise WorkflowDefinitionError(
                f"the workflow class {type(self).__name__} has an __init__ that does not call super().__init__() "
                "first: call it there, or override configure(self) in place of __init__"
            )

    def configure(self) -> None:
        """Add the steps of a subclass, which overrides this.

        Called once, when the workflow is constructed.

        Example:
            >>> from stageflow_actors import Workflow
            >>> from stageflow_actors.testing import run
            >>> class Greeting(Workflow):
            ...     version = 2
            ...     def configure(self):
            ...         self.add_stage(lambda context: f"Hello, {context['name']}!", id="say")
            >>> run(Greeting, {"name": "Ada"}).stages[0].data
            'Hello, Ada!'
        """

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that have a handler, in order of definition.

        The workflow's defaults are filled in. The stages of parallel and branch steps are included, and the stage that
        handles one item of a map step.
        """
        return tuple(self._stages.values())

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps in the order in which they were appended; each has an `id`."""
        return tuple(self._stages[step.id] if isinstance(step, Stage) else step for step in self._steps)

    @overload
    def stage(self, handler: Callable[P, R], /) -> StageFunction[P, R]: ...

    @overload
    def stage(self, /, **options: Unpack[StageOptions]) -> Callable[[Callable[P, R]], StageFunction[P, R]]: ...

    def stage(self, handler: Any = None, /, **options: Any) -> Any:
        """Append a stage, as `@flow.stage` or `@flow.stage(timeout=30, ...)`.

        The decorated function can be called and imported as before. It gets an attribute `compensation`, the decorator
        of the function that undoes the stage.

        Args:
            handler: The function to decorate.
            **options: Options of `Stage`.

        Returns:
            The function itself; with options, a decorator.

        Raises:
            WorkflowDefinitionError: If the function or an option does not fit, or the id is taken.

        Example:
            >>> from stageflow_actors import Workflow
            >>> flow = Workflow("orders")
            >>> @flow.stage(timeout=30)
            ... def pay(order):
            ...     order["paid"] = True
            >>> @pay.compensation(timeout=10)
            ... def refund(order):
            ...     order["paid"] = False
            >>> flow.stages[0].compensation
            Compensation(refund)
        """
        if isinstance(handler, str) and "id" not in options:
            options, handler = {**options, "id": handler}, None
        if handler is None:
            return lambda function: self._decorate(function, options)
        return self._decorate(handler, options)

    @adapts("add_stage(handler, id=..., timeout=...)", named_handler)
    def add_stage(self, handler: Any, /, **options: Unpack[StageOptions]) -> Workflow[C]:
        """Append a stage.

        Args:
            handler: A handler, or a `Stage`.
            **options: Options of `Stage`; none if `handler` is a `Stage`.

        Returns:
            The workflow.

        Raises:
            WorkflowDefinitionError: If the handler or an option does not fit, or the id is taken.

        Example:
            >>> from stageflow_actors import Stage, Workflow
            >>> def pay(order):
            ...     order["paid"] = True
            >>> def ship(order):
            ...     order["shipped"] = True
            >>> Workflow("orders").add_stage(pay, actors=2).add_stage(Stage(ship, id="send"))
            Workflow('orders', stages=[pay, send])
        """
        self._add(handler, options)
        return self

    @adapts("add_parallel(id, [handler, ...])", parallel_arguments)
    def add_parallel(
        self,
        id: str,
        branches: Iterable[Any],
        *,
        merge: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    ) -> Workflow[C]:
        """Append stages that run at the same time, each in a pool of its own.

        The step ends when all of them have ended. Without `merge` their changes of the context are merged field by
        field; two stages that change one field in different ways fail the instance.

        Args:
            id: The id of the step.
            branches: The stages: handlers or `Stage`s.
            merge: Called as `merge(base, branches)` with the context before the step and a dict of the contexts after
                each stage, by stage id; it returns the context to go on with. Default: merge by field.

        Returns:
            The workflow.

        Raises:
            WorkflowDefinitionError: If an argument does not fit, or an id is taken.

        Example:
            >>> from stageflow_actors import Workflow
            >>> from stageflow_actors.testing import run
            >>> def reserve(order):
            ...     order["reserved"] = True
            >>> def pay(order):
            ...     order["paid"] = True
            >>> run(Workflow("orders").add_parallel("checkout", [reserve, pay]), {}).context
            {'reserved': True, 'paid': True}
        """
        step = Parallel(id, branches, merge=merge)
        self._claim(step.id)
        for stage in step.branches:
            self._keep(stage)
        self._steps.append(step)
        return self

    @adapts("add_conditional(handler, when=lambda context: ...)")
    def add_conditional(self, handler: Any, /, when: Callable[[Any], Any], **options: Any) -> Workflow[C]:
        """Append a stage that is skipped unless a predicate is true.

        Args:
            handler: A handler, or a `Stage`.
            when: Predicate on the context.
            **options: Options of `Stage`; none if `handler` is a `Stage`.

        Returns:
            The workflow.

        Raises:
            WorkflowDefinitionError: If an argument does not fit, or the id is taken.

        Example:
            >>> from stageflow_actors import Workflow
            >>> from stageflow_actors.testing import run
            >>> flow = Workflow("orders").add_conditional(print, when=lambda order: order["total"] > 100, id="check")
            >>> str(run(flow, {"total": 5}).stages[0].status)
            'skipped'
        """
        if isinstance(handler, Stage):
            self._add(handler.replace(when=check_function(when, f"when of stage {handler.id!r}")), options)
        else:
            self._add(handler, {**options, "when": when})
        return self

    @adapts("add_branch(id, selector, {'key': [handler, ...]})", branch_arguments)
    def add_branch(
        self,
        id: str,
        selector: Callable[[Any], Any],
        arms: Mapping[str, Iterable[Any]],
        *,
        default: str | None = None,
    ) -> Workflow[C]:
        """Append a choice between lists of stages.

        Args:
            id: The id of the step.
            selector: Function of the context that returns the key of an arm.
            arms: By key, the stages to run one after the other: handlers or `Stage`s. A list may be empty.
            default: Key of the arm for keys that are not in `arms`. Default: such a key fails the instance.

        Returns:
            The workflow.

        Raises:
            WorkflowDefinitionError: If an argument does not fit, or an id is taken.

        Example:
            >>> from stageflow_actors import Workflow
            >>> from stageflow_actors.testing import run
            >>> def home(order):
            ...     order["carrier"] = "post"
            >>> def abroad(order):
            ...     order["carrier"] = "air"
            >>> flow = Workflow("orders")
            >>> arms = {"DE": [home], "else": [abroad]}
            >>> flow = flow.add_branch("shipping", lambda order: order["country"], arms, default="else")
            >>> run(flow, {"country": "FR"}).context["carrier"]
            'air'
        """
        step = Branch(id, selector, arms, default=default)
        self._claim(step.id)
        for stages in step.arms.values():
            for stage in stages:
                self._keep(stage)
        self._steps.append(step)
        return self

    @adapts("add_map(id, handler, over=lambda context: ...)", map_arguments)
    def add_map(
        self,
        id: str,
        handler: Any,
        *,
        over: Callable[[Any], Iterable[Any]],
        into: str | None = None,
        max_failures: int = 0,
        **options: Any,
    ) -> Workflow[C]:
        """Append a stage that handles each item of a list, in any number of actors.

        Items are plain values, or of the type with which the handler's first parameter is annotated. Results are plain
        values, or of the type that the field `into` is a list of. The compensation of the stage is a function of an
        item; `ctx.results[id]` is the result of that item.

        Args:
            id: The id of the step.
            handler: Called as `handler(item)` or `handler(item, ctx)`.
            over: Function of the context that returns the items.
            into: Field of the context for the list of results, in the order of the items. Default: the results are the
                result of the stage only.
            max_failures: Number of items that may fail before the stage fails, from 0. The result of a failed item is
                None. Default: 0.
            **options: Options of `Stage`; `timeout` is that of one attempt at one item, and of one call of `over`.

        Returns:
            The workflow.

        Raises:
            WorkflowDefinitionError: If an argument does not fit, or the id is taken.

        Example:
            >>> from stageflow_actors import Workflow
            >>> from stageflow_actors.testing import run
            >>> flow = Workflow("orders").add_map("price", lambda n: n * 2, over=lambda o: o["net"], into="gross")
            >>> run(flow, {"net": [1, 2, 3]}).context["gross"]
            [2, 4, 6]
        """
        step = MapStage(id, handler, over=over, into=into, max_failures=max_failures, **options)
        self._keep(step.item)
        self._steps.append(step)
        return self

    @adapts(
        "add_remote_stage(id, endpoint='name', command=lambda context: ...)",
        lambda self, *args, **options: keyword_arguments(
            self, args, ("id", "endpoint", "command", "on_reply"), options
        ),
    )
    def add_remote_stage(
        self,
        id: str,
        *,
        endpoint: str,
        command: Callable[[Any], Any],
        on_reply: Callable[[Any, Any], Any] | None = None,
        timeout: Duration | None = None,
        **options: Any,
    ) -> Workflow[C]:
        """Append a stage that sends a request to an endpoint; see `Stage.remote`.

        Args:
            id: The id of the stage.
            endpoint: The name of the endpoint.
            command: Function of the context that returns the request, a plain value.
            on_reply: Called as `on_reply(context, reply)`. Default: the reply is the result of the stage.
            timeout: Seconds to wait for the reply. Default: the limit of `StageContext.request`.
            **options: Other options of `Stage`.

        Returns:
            The workflow.

        Raises:
            WorkflowDefinitionError: If an argument does not fit, or the id is taken.

        Example:
            >>> from stageflow_actors import Workflow
            >>> from stageflow_actors.testing import run
            >>> def keep(order, price):
            ...     order["price"] = price
            >>> flow = Workflow("orders")
            >>> flow = flow.add_remote_stage("ask", endpoint="prices", command=lambda o: o["sku"], on_reply=keep)
            >>> run(flow, {"sku": "tea"}, endpoints={"prices": lambda sku: {"tea": 450}[sku]}).context
            {'sku': 'tea', 'price': 450}
        """
        self._check_options(options)
        stage = Stage.remote(id, endpoint=endpoint, command=command, on_reply=on_reply, timeout=timeout, **options)
        self._add(stage, {})
        return self

    @adapts(
        "add_http_stage(id, url='https://…')",
        lambda self, *args, **options: keyword_arguments(self, args, ("id", "url"), options),
    )
    def add_http_stage(
        self,
        id: str,
        *,
        url: str | Callable[[Any], str],
        timeout: Duration | None = None,
        **options: Unpack[HttpStageOptions],
    ) -> Workflow[C]:
        """Append a stage that sends an HTTP request; see `Stage.http`.

        It needs httpx: `pip install 'stageflow-actors[http]'`.

        Args:
            id: The id of the stage.
            url: The URL, in which `{field}` stands for a field of the context; or a function of the context.
            method: The HTTP method. Default: POST.
            request: Function of the context that returns the JSON to send. Default: no body.
            on_response: Called as `on_response(context, response)` with the JSON of the answer. Default: the JSON is
                the result of the stage.
            headers: A dict of headers, or a function of the context that returns one.
            timeout: Seconds to wait for the answer. Default: the whole attempt may take the workflow's `stage_timeout`,
                or else 30 seconds.
            **options: `method`, `request`, `on_response`, `headers`, and other options of `Stage`.

        Returns:
            The workflow.

        Raises:
            WorkflowDefinitionError: If an argument does not fit, the id is taken, or httpx is not installed.

        Example:
            >>> from stageflow_actors import Retry, Workflow
            >>> flow = Workflow("orders")
            >>> url = "https://bank.example/accounts/{account}/payments"
            >>> flow.add_http_stage("pay", url=url, timeout=5, retry=Retry.fixed(max_attempts=3, delay=1))
            Workflow('orders', stages=[pay])
        """
        self._check_options({name: value for name, value in options.items() if name not in HttpOptions.__annotations__})
        self._add(Stage.http(id, url=url, timeout=timeout, **options), {})
        return self

    @adapts("add_delay(id, seconds)", delay_arguments)
    def add_delay(self, id: str, duration: Duration) -> Workflow[C]:
        """Append a wait. It occupies no worker.

        Args:
            id: The id of the step.
            duration: Seconds (or a `timedelta`) to wait, from 0.

        Returns:
            The workflow.

        Raises:
            WorkflowDefinitionError: If `duration` is no finite duration, or the id is taken.

        Example:
            >>> from stageflow_actors import Workflow
            >>> Workflow("orders").add_delay("cool-down", 3600).steps
            (Delay('cool-down', 3600),)
        """
        step = Delay(id, duration)
        self._claim(step.id)
        self._steps.append(step)
        return self

    @adapts("add_signal(id, timeout=..., on_signal=lambda context, payload: ...)")
    def add_signal(
        self,
        id: str,
        *,
        name: str | None = None,
        timeout: Duration | None = None,
        on_signal: Callable[[Any, Any], Any] | None = None,
        on_timeout: Callable[[Any], Any] | None = None,
    ) -> Workflow[C]:
        """Append a wait for a signal from outside the instance. It occupies no worker.

        `Instance.signal` and `stageflow instances signal` send one.

        Args:
            id: The id of the step.
            name: The name of the signal. Default: the id.
            timeout: Seconds to wait for the signal. Default: no limit.
            on_signal: Called as `on_signal(context, payload)`. Default: the payload is the result of the step.
            on_timeout: Called with the context if the signal did not arrive in time. Default: the step fails with
                `StageTimeout`.

        Returns:
            The workflow.

        Raises:
            WorkflowDefinitionError: If an argument does not fit, or the id is taken.

        Example:
            >>> from stageflow_actors import Workflow
            >>> from stageflow_actors.testing import run
            >>> def note(order, payload):
            ...     order["approved_by"] = payload["name"]
            >>> flow = Workflow("orders").add_signal("approval", timeout=86400, on_signal=note)
            >>> run(flow, {}, signals={"approval": {"name": "Ida"}}).context
            {'approved_by': 'Ida'}
        """
        step = Signal(id, name=name, timeout=timeout, on_signal=on_signal, on_timeout=on_timeout)
        self._claim(step.id)
        self._steps.append(step)
        return self

    def validate(self, services: Collection[str] = ()) -> None:
        """Check the workflow as a whole. `Runtime` and `testing.run` call it.

        Args:
            services: Names of the services that the runtime provides. Default: none.

        Raises:
            WorkflowDefinitionError: If the workflow has no stages, `after` of a stage names a stage that is not before
                it, or a handler needs a service that is not provided.

        Example:
            >>> from stageflow_actors import Workflow, WorkflowDefinitionError
            >>> try:
            ...     Workflow("orders").validate()
            ... except WorkflowDefinitionError as error:
            ...     print(error)
            workflow 'orders' has no stages: add one with @workflow.stage or add_stage(handler)
        """
        if not self._steps:
            raise WorkflowDefinitionError(
                f"workflow {self.id!r} has no stages: add one with @workflow.stage or add_stage(handler)"
            )
        check_annotations(f"workflow {self.id!r}", self.context, self._stages.values(), self._steps)
        before: set[str] = set()
        for step in self.steps:
            own = [self._stages[stage.id] for stage in stages_of(step)]
            parallel = isinstance(step, Parallel)
            for stage in own:
                for wanted in stage.after:
                    self._check_after(stage, wanted, before)
                self._check_services(stage, services)
                if not parallel:
                    before.add(stage.id)
            before.update(stage.id for stage in own)
            before.add(step.id)

    def fingerprint(self) -> str:
        """Return a hash of what instances in flight depend on.

        Ids, order, `required`, `after`, which stages have a compensation or a predicate, `on_failure` and the fields of
        the context count. The code of handlers and the options of speed (actors, timeouts, retries) do not.

        Returns:
            32 hexadecimal digits, the same in every process.

        Example:
            >>> from stageflow_actors import Workflow
            >>> one = Workflow("orders").add_stage(print, id="show")
            >>> two = Workflow("orders").add_stage(print, id="show", actors=8, timeout=5)
            >>> one.fingerprint() == two.fingerprint()
            True
        """
        parts = [
            self.id,
            self.on_failure,
            fields_of(self.context),
            [
                [s.id, s.required, sorted(s.after), s.compensation is not None, s.when is not None]
                for s in self._stages.values()
            ],
            *([[type(s).__name__, s.id, shape_of(s)] for s in self._steps if not isinstance(s, Stage)]),
        ]
        return hashlib.blake2b(msgspec.json.encode(parts), digest_size=16).hexdigest()

    def set_compensation(self, stage_id: str, compensation: Callable[..., Any] | Compensation) -> None:
        """Register the compensation of a stage. A stage has at most one.

        Args:
            stage_id: The id of the stage.
            compensation: A function of the context, or a `Compensation`.

        Raises:
            WorkflowDefinitionError: If the workflow has no such stage, the stage already has a compensation, or the
                function does not fit.
        """
        stage = self._stages.get(stage_id) if isinstance(stage_id, str) else None
        if stage is None:
            meant = closest(stage_id, self._stages) if isinstance(stage_id, str) else None
            raise WorkflowDefinitionError(
                f"workflow {self.id!r} has no stage {stage_id!r} that a compensation could be set for"
                + (f": did you mean {meant!r}?" if meant else f": its stages are {', '.join(self._stages) or 'none'}")
            )
        replaces = stage.compensation is not None and self._replaces_compensation(stage, compensation)
        if not replaces:
            self._check_not_running(f"the compensation of stage {stage_id!r}")
        if stage.compensation is not None and not replaces:
            raise WorkflowDefinitionError(
                f"stage {stage_id!r} of workflow {self.id!r} already has a compensation "
                f"({stage.compensation!r}): combine both in one function"
            )
        self._compensations_redefined.discard(stage_id)
        made = compensation if isinstance(compensation, Compensation) else Compensation(compensation)
        self._stages[stage_id] = stage.replace(compensation=made)

    def _decorate(self, handler: Any, options: dict[str, Any]) -> Any:
        stage = self._add(handler, options)
        existing = getattr(handler, "compensation", None)
        places = existing.places if isinstance(existing, CompensationDecorator) else ()
        try:
            handler.compensation = CompensationDecorator((*places, (self, stage.id)))
        except (AttributeError, TypeError):
            pass  # bound methods and builtins accept no attributes: for them there is the option compensation=
        return handler

    def _add(self, handler: Any, options: Any) -> Stage:
        stage = self._as_stage(handler, options)
        if not stage.id:
            stage = stage.replace(id=f"stage-{len(self._steps) + 1}")
        if self._replaces(stage):
            return self._replace(stage)
        stage = self._keep(stage)
        self._steps.append(stage)
        return stage

    def _replaces(self, stage: Stage) -> bool:
        """Return True if this stage is the same function as an earlier one, defined again in a notebook."""
        earlier = self._stages.get(stage.id)
        if earlier is None or not any(step.id == stage.id and isinstance(step, Stage) for step in self._steps):
            return False
        return is_defined_again(earlier.handler, stage.handler)

    def _replace(self, stage: Stage) -> Stage:
        """Put a stage in the place of the earlier one, whose compensation stays if this one brings none."""
        earlier = self._stages[stage.id]
        if stage.compensation is None and earlier.compensation is not None:
            stage = stage.replace(compensation=earlier.compensation)
            self._compensations_redefined.add(stage.id)
        if stage.id not in self._redefined:
            self._redefined.add(stage.id)
            late = ", and takes effect when the runtime is started again" if self._running_in else ""
            logger.warning(
                "stage %r of workflow %r is defined again: this definition replaces the earlier one%s",
                stage.id,
                self.id,
                late,
            )
        stage = self._stages[stage.id] = self._with_defaults(stage)
        return stage

    def _replaces_compensation(self, stage: Stage, given: Any) -> bool:
        """Return True if a notebook defines the compensation again, or the stage since it got this one."""
        if stage.id in self._compensations_redefined:
            self._compensations_redefined.discard(stage.id)
            return True
        function = given.function if isinstance(given, Compensation) else given
        return stage.compensation is not None and is_defined_again(stage.compensation.function, function)

    def _keep(self, stage: Stage) -> Stage:
        """Add a stage and return it with the workflow's defaults filled in."""
        self._claim(stage.id)
        stage = self._stages[stage.id] = self._with_defaults(stage)
        return stage

    def _with_defaults(self, stage: Stage) -> Stage:
        if isinstance(stage.handler, HttpCall):
            self._check_url(stage, stage.handler)
        if stage.retry is None and self.retry is not None:
            stage = stage.replace(retry=self.retry)
        if stage.timeout is None and self.stage_timeout is not None:
            stage = stage.replace(timeout=self.stage_timeout)
        if stage.timeout is None and isinstance(stage.handler, HttpCall):
            stage = stage.replace(timeout=DEFAULT_TIMEOUT_SECONDS)
        return stage

    def _check_not_running(self, what: str) -> None:
        """Raise `WorkflowDefinitionError` while a runtime runs this workflow: its workers have the code already."""
        if self._running_in:
            raise WorkflowDefinitionError(
                f"{what} is added to workflow {self.id!r} while it runs in {self._running_in[0]}, whose workers would "
                f"not know it: add it before start(), or register() it as Workflow({self.id!r}, "
                f"version={self.version + 1})"
            )

    def _claim(self, id: str) -> None:
        self._check_not_running(f"stage {id!r}")
        if id in self._ids:
            raise WorkflowDefinitionError(
                f"workflow {self.id!r} already has a stage {id!r}: choose another id with id=..."
            )
        self._ids.add(id)

    def _as_stage(self, handler: Any, options: dict[str, Any]) -> Stage:
        if isinstance(handler, Stage):
            if options:
                raise WorkflowDefinitionError(
                    f"stage {handler.id!r} of workflow {self.id!r} is a Stage and cannot take options here "
                    f"({', '.join(options)}): pass them to Stage(...)"
                )
            return handler
        self._check_options(options)
        return Stage(handler, **options)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        known = sorted({*StageOptions.__annotations__, *CommonOptions.__annotations__})
        unknown = options.keys() - set(known)
        if unknown:
            meant = closest(min(unknown), known)
            raise WorkflowDefinitionError(
                f"a stage of workflow {self.id!r} has the unknown option {min(unknown)!r}: "
                + (f"did you mean {meant!r}? " if meant else "")
                + f"the options are {', '.join(known)}"
            )

    def _check_after(self, stage: Stage, wanted: str, before: set[str]) -> None:
        if wanted in before:
            return
        what = f"stage {stage.id!r} of workflow {self.id!r}"
        if wanted == stage.id:
            raise WorkflowDefinitionError(f"{what} names itself in after: remove {wanted!r}")
        if wanted in self._stages:
            raise WorkflowDefinitionError(
                f"{what} names {wanted!r} in after, which runs later and cannot have completed: "
                f"add {wanted!r} before {stage.id!r}"
            )
        meant = closest(wanted, self._stages)
        raise WorkflowDefinitionError(
            f"{what} names {wanted!r} in after, which is not a stage of it"
            + (f" (did you mean {meant!r}?)" if meant else "")
            + f": the stages are {', '.join(self._stages)}"
        )

    def _check_url(self, stage: Stage, call: HttpCall) -> None:
        if self.context is dict:
            return
        known = fields_of(self.context)[1:]
        for name in call.fields():
            if name not in known and not hasattr(self.context, name):
                meant = closest(name, known)
                raise WorkflowDefinitionError(
                    f"the url of HTTP stage {stage.id!r} names {{{name}}}, and {self.context.__name__} has no such "
                    f"field{f' (did you mean {{{meant}}}?)' if meant else ''}: it has {', '.join(known)}"
                )

    def _check_services(self, stage: Stage, provided: Collection[str]) -> None:
        for spec, what in (
            (stage.spec, f"stage {stage.id!r}"),
            (stage.compensation.spec if stage.compensation else None, f"the compensation of stage {stage.id!r}"),
        ):
            missing = [] if spec is None else sorted(set(spec.services) - set(provided))
            if spec is not None and missing:
                name = missing[0]
                place = "a parameter of its constructor" if spec.is_constructed_with(name) else "a parameter"
                meant = closest(name, provided)
                raise WorkflowDefinitionError(
                    f"{what} of workflow {self.id!r} needs the service {name!r} ({place}), which is not provided"
                    + (f" (did you mean {meant!r}?): rename the one to the other, or " if meant else ": ")
                    + f"add services={{{name!r}: factory}} to the Runtime, or give the parameter a default"
                )

    def __repr__(self) -> str:
        return f"Workflow({self.id!r}, stages=[{', '.join(self._stages)}])"
