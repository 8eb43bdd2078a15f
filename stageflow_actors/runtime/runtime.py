"""`Runtime`: the composition root of data directory, node and client; `stop` reverses the steps of `start`."""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stageflow_actors.core.plan import Naming, WorkflowPlan, compile_plan
from stageflow_actors.core.plural import pluralize
from stageflow_actors.definition.callables import check_function
from stageflow_actors.definition.duration import Duration, timeout_seconds
from stageflow_actors.definition.guesses import adapts
from stageflow_actors.definition.pickling import Script, dumps
from stageflow_actors.definition.result_types import result_types
from stageflow_actors.definition.services import ServiceSource, check_services, inspect_services
from stageflow_actors.definition.stage import Stage
from stageflow_actors.definition.workflow import Workflow, workflow_of
from stageflow_actors.errors import BrokerUnavailable, StageFlowError, WorkflowDefinitionError
from stageflow_actors.runtime.client.client import Client
from stageflow_actors.runtime.client.session import NOT_RUNNING, Session
from stageflow_actors.runtime.client.workflow_ref import WorkflowRef
from stageflow_actors.runtime.config import Config
from stageflow_actors.runtime.ipc.control_channel import NodeConfig, Register
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec, endpoint_spec, merge_pools, pool_specs
from stageflow_actors.runtime.node_handle import NodeHandle, remove_cluster_files
from stageflow_actors.runtime.system.data_dir import DataDir
from stageflow_actors.runtime.system.interpreter import python_interpreter
from stageflow_actors.runtime.system.interpreter_flags import worker_flags
from stageflow_actors.runtime.system.processes import occupy_standard_descriptors
from stageflow_actors.runtime.system.socket_dir import remove_runtime_dir, runtime_dir
from stageflow_actors.runtime.system.source_files import loaded_sources
from stageflow_actors.runtime.system.start_guard import check_may_start
from stageflow_actors.runtime.system.surroundings import check_threads
from stageflow_actors.runtime.worker.interceptors import check_interceptors
from stageflow_brokers.resources import shortage

__all__ = ["Runtime"]

PROGRAM_DESCRIPTORS = 40
"""File descriptors of this process that the start of a cluster, and its use with events, needs at most."""

PROGRAM_THREADS = 6
"""Threads of this process that a cluster needs, with those of ZeroMQ."""


class Runtime(Client):
    """Run workflows on this host, in processes of their own.

    A runtime starts a broker process, a node process and worker processes for each stage. Use it in a `with` block, or
    call `start` and `stop`; in an event loop use `async with`, which does not block the loop. Leaving the block
    normally waits until the instances that this program submitted have ended, are parked, or wait for a signal or a
    delay. Leaving it by an exception or Ctrl-C waits only for the stages in work; a second Ctrl-C kills them.
    Unfinished instances resume at the next start on the same directory. While a runtime runs, its workflows take no
    further stages.

    Args:
        *workflows: The workflows, or subclasses of `Workflow`; `register` adds more.
        data_dir: Directory of journal and history; created if missing. Default: `stageflow-data`.
        services: Factories or values by the name of the service. Each worker that needs a service calls its factory
            once; parameters of the factory without a default are services in turn. A generator function or a function
            of `contextlib.contextmanager` is left when the worker ends; of anything else `close()` or `aclose()` is
            called. What is not callable is a value: it is sent to the workers as it is, and not closed.
        initializer: A function without arguments that each worker calls first, before it loads handlers and makes
            services: the place for seeds, API keys and instrumentation. Default: none.
        interceptors: Objects with `around_stage(call, next)`, `around_compensation(call, next)` or both. Workers call
            them around each handler, the first one outermost: `next(call)` continues to the handler and returns its
            result, `call` is a `StageCall`. With an async handler or interceptor, `next` returns an awaitable.
        config: The settings; None (the default) for `Config()`.

    Attributes:
        data_dir: The directory, as a `Path`.
        config: The settings.
        services: The factories and values by name.
        initializer: The function that each worker calls first, or None.
        interceptors: The interceptors.
        workflows: The registered workflows.

    Raises:
        WorkflowDefinitionError: If an argument is no workflow, two workflows have the same id and version, a factory or
            the initializer cannot be called so, or an interceptor has no such method.

    Example:
        >>> import tempfile
        >>> from stageflow_actors import Config, Runtime, Workflow
        >>> greet = Workflow("greet").add_stage(lambda context: f"Hello, {context['name']}!", id="say")
        >>> with tempfile.TemporaryDirectory() as d:
        ...     with Runtime(greet, data_dir=d, config=Config(durability="write")) as runtime:
        ...         result = runtime.execute(greet, {"name": "Ada"}, timeout=30)
        ...         print(result.status, result.stages[0].data)
        completed Hello, Ada!
    """

    @adapts("Runtime(*workflows, data_dir=..., services=..., config=Config(...))")
    def __init__(
        self,
        *workflows: Workflow[Any] | type[Workflow[Any]],
        data_dir: str | Path = "stageflow-data",
        services: Mapping[str, Any] | None = None,
        initializer: Callable[[], object] | None = None,
        interceptors: Sequence[Any] = (),
        config: Config | None = None,
    ) -> None:
        self._local = _LocalSession()
        super().__init__(self._local)
        self.data_dir = Path(data_dir)
        if config is not None and not isinstance(config, Config):
            raise WorkflowDefinitionError(
                f"config must be a Config such as Config(durability='write'), not {config!r:.120}"
            )
        self.config = config or Config()
        inspect_services({} if services is None else services)
        self.services = dict(services or {})
        self.interceptors = check_interceptors(interceptors)
        self.workflows: list[Workflow[Any]] = []
        self.initializer = initializer
        if initializer is not None:
            check_function(initializer, "initializer", (), ctx=False)
        for workflow in workflows:
            self._add(workflow)
        self._local.naming = Naming(self.config.stage_queue_prefix, self.config.compensation_queue_prefix)
        self._local.max_message_bytes = self.config.max_message_bytes
        self._local.default_ttl_seconds = self.config.ttl_seconds
        self._endpoints: list[Stage] = []
        self._queues: dict[str, str] = {}
        self._data: DataDir | None = None
        self._stopping_node: NodeHandle | None = None
        self._lock = self._local.lock

    # starting and stopping

    def start(self) -> Self:
        """Start the cluster and resume unfinished instances.

        The cluster accepts instances when this returns, and a worker of each stage has loaded its code.

        Returns:
            This runtime.

        Raises:
            WorkflowDefinitionError: If a workflow is invalid, or there is none; or if this is the import of a module by
                a worker or by `stageflow`. No process has been started then. Also if workers cannot load the code of
                a stage; the cluster is stopped then.
            JournalLocked: If another live program uses the directory: see `Runtime.connect`.
            JournalCorrupt: If the journal is damaged.
            StageFlowError: If this runtime is running already, or the cluster cannot start.
        """
        stages = [stage for workflow in self.workflows for stage in workflow.stages] + self._endpoints
        check_may_start({module for stage in stages for module in stage._modules()})
        self._local.check_process()
        with self._lock:
            if self._local.node is not None:
                raise StageFlowError("this runtime is running already")
            if not self.workflows:
                raise WorkflowDefinitionError("this runtime has no workflows: give it some, as in Runtime(orders)")
            plans, pools = self._compile(self.workflows)
            pools += [self._endpoint_spec(stage) for stage in self._endpoints]
            self._queues = _owners(pools, {}, self._local.naming)
            initializer = self._initializer_code()
            check_threads()
            python_interpreter()  # raises if there is none
            occupy_standard_descriptors()
            problem = shortage("a cluster", descriptors=PROGRAM_DESCRIPTORS, threads=PROGRAM_THREADS)
            if problem:
                raise BrokerUnavailable(problem)
            data = DataDir(self.data_dir)
            lock_fd = data.acquire(os.getpid())
            try:
                config = NodeConfig(
                    os.fsencode(data.path),
                    lock_fd,
                    os.getpid(),
                    self._local.naming,
                    plans,
                    merge_pools(pools),
                    self.config.durability,
                    self.config.max_stage_retries,
                    self.config.max_message_bytes,
                    self.config.retention_seconds,
                    self.config.log_level.upper(),
                    _working_directory(),
                    _import_path(),
                    worker_flags(),
                    self.config.worker_stop_seconds,
                    initializer,
                    self.config.start_timeout_seconds,
                    loaded_sources(),
                )
                node = NodeHandle(data, config, _print_notice, self._local.fail)
                node.start()
                self._data, self._local.node = data, node
                self._local.history_path = data.history
                self._local.failure = None
                self._local.connect(node.address, f"program {os.getpid()}")
                self._local.open_events()
                node.wait_loaded()
            except BaseException:
                if self._local.node is not None:
                    self._local.node.kill()
                self._local.node = None
                remove_cluster_files(data)
                data.release()
                raise
            self._mark_running(self.workflows)
        for workflow_id, count in node.resuming.items():
            _print_notice(f"resuming {pluralize(count, 'instance')} of {workflow_id}")
        return self

    def stop(self, drain: bool = False, grace: Duration | None = None) -> None:
        """Stop the cluster; unfinished instances resume at the next start. Idempotent.

        Ctrl-C during the wait kills the stages in work.

        Args:
            drain: First wait as `Client.drain` does. Default: False.
            grace: How long stages in work may continue before they are killed, in seconds or as `timedelta`; None (the
                default) for no limit.

        Raises:
            ValueError: If `grace` is negative or no number.

        Example:
            >>> from stageflow_actors import Runtime, Workflow
            >>> runtime = Runtime(Workflow("orders").add_stage(print, id="show"))
            >>> runtime.stop(grace=5) is None  # it is not running
            True
        """
        seconds = timeout_seconds(grace, "grace")
        self._local.check_process()
        if self._local.node is None:
            return
        if drain:
            self._drain(None, _print_notice)
        with self._lock:
            node, data = self._local.node, self._data
            if node is None or data is None:
                return
            try:
                try:
                    self._local.node, self._stopping_node = None, node
                    place = self._place
                    for workflow in self.workflows:
                        if place in workflow._running_in:
                            workflow._running_in.remove(place)
                except BaseException:  # Ctrl-C: nothing else refers to the node any more
                    node.kill()
                    raise
                node.stop(seconds)
            finally:
                self._stopping_node = None
                self._local.disconnect()
                remove_runtime_dir(runtime_dir(data.path))
                data.release()

    def close(self) -> None:
        """Stop the cluster, as `stop()` does. Idempotent.

        A forked child of the program has no part in the cluster: there it does nothing, as the end of a `with` block.
        """
        if not self._local.is_inherited:
            self.stop()

    @classmethod
    def connect(cls, data_dir: str | Path) -> Client:
        """Connect to the running cluster of a data directory.

        The cluster belongs to a runtime in another process, or to `stageflow up`. The client has the methods of the
        runtime itself. With the id of a workflow instead of the object, contexts are dicts: names and types of their
        fields are checked here, everything else by the first worker.

        Args:
            data_dir: The directory of the cluster.

        Returns:
            A client. Close it, or use it in a `with` block; submitted instances go on.

        Raises:
            BrokerUnavailable: If no cluster runs on the directory, or its broker does not answer.
            StageFlowError: If the cluster is of another release.

        Example:
            >>> from stageflow_actors import BrokerUnavailable, Runtime
            >>> try:
            ...     Runtime.connect("no-such-directory")
            ... except BrokerUnavailable as error:
            ...     print(str(error).partition(":")[2])
             start its program, or `stageflow up MODULE:RUNTIME --data ...no-such-directory`
        """
        from stageflow_actors.runtime.client.remote_client import RemoteClient

        return RemoteClient(data_dir)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._local.node is None:
            return  # also in a forked child of the program, which has no part in the cluster
        if kind is not None:
            self.stop()
            return
        try:
            self._drain(None, _print_notice)
        except BaseException:
            self.stop()
            raise
        self.stop()

    def _kill(self) -> None:
        node = self._stopping_node or self._local.node
        if node is not None and not self._local.is_inherited:
            node.end_stop()

    @property
    def node_pid(self) -> int:
        """The process id of the node, the parent of all other processes of the cluster.

        Raises:
            BrokerUnavailable: If this runtime is not running.

        Example:
            >>> from stageflow_actors import BrokerUnavailable, Runtime, Workflow
            >>> try:
            ...     Runtime(Workflow("orders").add_stage(print, id="show")).node_pid
            ... except BrokerUnavailable as error:
            ...     print(error)
            this runtime is not running: call start(), or use it in a `with` block
        """
        self._local.check_process()
        if self._local.node is None:
            raise BrokerUnavailable(NOT_RUNNING)
        return self._local.node.pid

    # workflows

    def register(self, workflow: Workflow[Any] | type[Workflow[Any]]) -> None:
        """Add a workflow, also while the runtime is running.

        Args:
            workflow: The workflow, a subclass of `Workflow`, or another version of a registered one.

        Raises:
            WorkflowDefinitionError: If the workflow is invalid, its id and version are taken, or it would share a queue
                with another one.
            StageFlowError: If the running cluster cannot start its workers.

        Example:
            >>> from stageflow_actors import Runtime, Workflow
            >>> orders = Workflow("orders").add_stage(print, id="show")
            >>> runtime = Runtime(orders)
            >>> runtime.register(Workflow("orders", version=2).add_stage(print, id="show"))
            >>> [workflow.version for workflow in runtime.workflows]
            [1, 2]
        """
        self._local.check_process()
        added: Workflow[Any] = workflow_of(workflow)
        new = added not in self.workflows
        self._add(added)
        if self._local.node is None:
            return
        earlier = self._queues
        try:
            # With the other versions of it, which share its queues.
            plans, pools = self._compile([other for other in self.workflows if other.id == added.id])
            self._queues = _owners(pools, earlier, self._local.naming)
            own = [plan for plan in plans if plan.version == added.version]
            self._local.node.register(Register(own, merge_pools(pools), sources=loaded_sources()))
        except WorkflowDefinitionError:
            self._queues = earlier
            if new:  # otherwise the next start would fail
                self.workflows.remove(added)
                self._local.workflows.pop((added.id, added.version), None)
            raise
        self._mark_running([added])

    def endpoint(self, name: str, handler: Any, **options: Any) -> None:
        """Add an endpoint: a pool of workers that answers requests of stages.

        Args:
            name: The name that `ctx.request` and `Workflow.add_remote_stage` use.
            handler: Called as `handler(command)` or `handler(command, ctx)`, with services as a stage has them; it
                returns the reply.
            **options: Options of `Stage`: `actors`, `timeout`, `retry`, `env` and others.

        Raises:
            WorkflowDefinitionError: If the name is taken or malformed, or the handler or an option is invalid.
            StageFlowError: If the running cluster cannot start the workers.

        Example:
            >>> from stageflow_actors import Runtime, Workflow, WorkflowDefinitionError
            >>> runtime = Runtime(Workflow("orders").add_stage(print, id="show"))
            >>> runtime.endpoint("stock", lambda command: 3, actors=2)
            >>> try:
            ...     runtime.endpoint("stock", lambda command: 4)
            ... except WorkflowDefinitionError as error:
            ...     print(error)
            endpoint 'stock' exists already
        """
        self._local.check_process()
        stage = Stage(handler, id=name, **options)
        if any(other.id == name for other in self._endpoints):
            raise WorkflowDefinitionError(f"endpoint {name!r} exists already")
        spec = self._endpoint_spec(stage)
        queues = _owners([spec], self._queues, self._local.naming)
        earlier, self._queues = self._queues, queues
        self._endpoints.append(stage)
        if self._local.node is None:
            return
        try:
            self._local.node.register(Register([], [spec], sources=loaded_sources()))
        except WorkflowDefinitionError:
            self._endpoints.remove(stage)
            self._queues = earlier
            raise

    def _endpoint_spec(self, stage: Stage) -> PoolSpec:
        return endpoint_spec(
            stage,
            self._local.naming,
            self._sources(),
            max_concurrency=self.config.max_stage_concurrency,
            max_deaths=self.config.max_stage_retries,
            interceptors=self.interceptors,
            script=Script.of_program(),
        )

    def _initializer_code(self) -> bytes:
        if self.initializer is None:
            return b""
        return dumps(self.initializer, what="the initializer", script=Script.of_program())

    def _sources(self) -> dict[str, ServiceSource]:
        sources = inspect_services(self.services)
        check_services(sources)
        return sources

    def _add(self, workflow: Workflow[Any] | type[Workflow[Any]]) -> None:
        made: Any = workflow_of(workflow)
        if not isinstance(made, Workflow):
            raise _wrong_workflow(made)
        for other in self.workflows:
            if other is not made and (other.id, other.version) == (made.id, made.version):
                raise WorkflowDefinitionError(
                    f"two workflows have the id {made.id!r} and version {made.version}: give one another id"
                )
        if made not in self.workflows:
            self.workflows.append(made)

    @property
    def _place(self) -> str:
        return f"the Runtime of data directory {str(self.data_dir)!r}"

    def _mark_running(self, workflows: list[Workflow[Any]]) -> None:
        for workflow in workflows:
            if self._place not in workflow._running_in:
                workflow._running_in.append(self._place)

    def _compile(self, workflows: list[Workflow[Any]]) -> tuple[list[WorkflowPlan], list[PoolSpec]]:
        plans: list[WorkflowPlan] = []
        pools: list[PoolSpec] = []
        script = Script.of_program()
        sources = self._sources()
        for workflow in workflows:
            workflow.validate(self.services)
            plan = compile_plan(workflow, self._local.naming, default_ttl=self._local.default_ttl_seconds)
            plans.append(plan)
            pools.extend(
                pool_specs(
                    workflow,
                    plan,
                    sources,
                    max_queue_length=self.config.max_queue_length or 0,
                    max_concurrency=self.config.max_stage_concurrency,
                    max_deaths=self.config.max_stage_retries,
                    interceptors=self.interceptors,
                    script=script,
                    endpoints=self._endpoints,
                )
            )
            self._local.workflows[(workflow.id, workflow.version)] = WorkflowRef(
                plan, workflow.context, result_types(workflow)
            )
        return plans, pools


class _LocalSession(Session):
    """The session of a runtime: it knows the registered workflows only, and scales through the node's handle."""

    node: NodeHandle | None = None

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        """Held while the runtime starts or stops."""

    @property
    def is_open(self) -> bool:
        """See `Session.is_open`."""
        return super().is_open or self.node is not None or self.lock.locked()

    def disown(self, parent: int) -> None:
        """See `Session.disown`: the node belongs to the parent too."""
        super().disown(parent)
        if self.is_inherited:
            self._inherited += (self.node,)
            self.node = None

    def scale(self, queue: str, actors: int) -> None:
        self.check_process()
        if self.node is None:
            raise BrokerUnavailable(NOT_RUNNING)
        self.node.scale(queue, actors)

    def adopt(self, workflow: Workflow[Any]) -> WorkflowRef:
        raise StageFlowError(
            f"workflow {workflow.id!r} is not registered with this runtime: give it to Runtime(...) or call register()"
        )


def _wrong_workflow(given: Any) -> WorkflowDefinitionError:
    """Return the error for something that is no workflow, with what is most likely meant."""
    advice, shown = "", f"{given!r:.120}"
    if isinstance(given, (list, tuple, set)):
        advice = ": write Runtime(*workflows)"
    elif given is Workflow:
        advice = ": give an instance, as Workflow('orders')"
    elif isinstance(given, (str, os.PathLike)):
        advice = f": give the workflow itself, not its id; a directory is data_dir={str(given)!r}"
    elif inspect.isroutine(given):
        shown = f"the function {given.__name__}"
        advice = f": add it to one, as in Workflow('orders').add_stage({given.__name__})"
    return WorkflowDefinitionError(f"a Runtime takes workflows, not {shown}{advice}")


def _owners(pools: list[PoolSpec], owned: dict[str, str], naming: Naming) -> dict[str, str]:
    """Return the owner of each queue. Raises `WorkflowDefinitionError` if two share one, as ids with dots can."""
    owners = dict(owned) or dict.fromkeys((naming.finished, naming.coordinator), "StageFlow itself")
    for pool in pools:
        owner = f"endpoint {pool.stage_id!r}" if pool.kind == "endpoint" else f"workflow {pool.workflow_id!r}"
        other = owners.setdefault(pool.queue, owner)
        if other != owner:
            raise WorkflowDefinitionError(
                f"{owner} would share the queue {pool.queue!r} with {other}: give one of them another id, "
                "or the Config other prefixes"
            )
    return owners


def _import_path() -> list[bytes]:
    """Return the program's import path for its children; '' means the working directory, which is the same."""
    working_directory = _working_directory()
    return [os.fsencode(entry) or working_directory for entry in sys.path if entry or working_directory]


def _working_directory() -> bytes:
    """Return the program's working directory; empty if it has been removed, and children only inherit it."""
    try:
        return os.getcwdb()
    except FileNotFoundError:
        return b""


def _print_notice(text: str) -> None:
    """Write a notice for the user to stderr; stdout belongs to the program."""
    try:
        sys.stderr.write(f"stageflow: {text}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # stderr is closed, or its reader has gone
