"""`Runtime`: the composition root. Puts data directory, node and client together; starting is a list, stopping its
reverse.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stageflow_actors.core.plan import Naming, WorkflowPlan, compile_plan
from stageflow_actors.core.plural import counted
from stageflow_actors.definition.callables import check_function
from stageflow_actors.definition.duration import Duration, timeout_seconds
from stageflow_actors.definition.stage import Stage
from stageflow_actors.definition.workflow import Workflow
from stageflow_actors.errors import BrokerUnavailable, StageFlowError, WorkflowDefinitionError
from stageflow_actors.runtime.client.client import Client
from stageflow_actors.runtime.client.workflow_ref import Known
from stageflow_actors.runtime.config import Config
from stageflow_actors.runtime.ipc.control_channel import NodeConfig, Register
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec, endpoint_spec, merged, pool_specs
from stageflow_actors.runtime.node_handle import NodeHandle, remove_cluster_files
from stageflow_actors.runtime.system.data_dir import DataDir, remove_runtime_dir, runtime_dir
from stageflow_actors.runtime.worker.interceptors import check_interceptors

__all__ = ["Runtime"]


class Runtime(Client):
    """Runs workflows on this host: a broker process, a node process and a pool of worker processes per stage.

    `data_dir` holds journal and history: the same directory resumes whatever was unfinished. `services` are factories
    by name, each called once in every worker process that needs it. `interceptors` are objects with
    `around_stage(call, next)` or `around_compensation(call, next)` (or both), called in the workers around every
    handler, the first one outermost: `next(call)` goes on to the handler and gives its result, `call` is a `StageCall`.
    Where the handler or an interceptor further in is async, or the interceptor itself, `next` gives an awaitable.

    Use it in a `with` block, or call `start` and `stop`. Leaving the block normally waits for what this program
    submitted and is not parked; leaving it by an exception or Ctrl-C waits only for the stages in work (a second Ctrl-C
    kills them).
    """

    def __init__(
        self,
        *workflows: Workflow[Any],
        data_dir: str | Path = "stageflow-data",
        services: Mapping[str, Callable[[], Any]] | None = None,
        interceptors: Sequence[Any] = (),
        config: Config | None = None,
    ) -> None:
        super().__init__()
        self.data_dir = Path(data_dir)
        self.config = config or Config()
        self.services = dict(services or {})
        self.interceptors = check_interceptors(interceptors)
        self.workflows: list[Workflow[Any]] = []
        for name, factory in self.services.items():
            if not callable(factory):
                raise WorkflowDefinitionError(
                    f"service {name!r} must be a factory, called once in each worker that needs it, not {factory!r}"
                )
            check_function(factory, f"service {name!r}", ())
        for workflow in workflows:
            self._note(workflow)
        self._naming = Naming(self.config.stage_queue_prefix, self.config.compensation_queue_prefix)
        self._max_message_bytes = self.config.max_message_bytes
        self._ttl = self.config.ttl_seconds
        self._endpoints: list[Stage] = []
        self._queues: dict[str, str] = {}
        self._node: NodeHandle | None = None
        self._data: DataDir | None = None
        self._gate = threading.Lock()

    # starting and stopping

    def start(self) -> Self:
        """Start the cluster and resume what was unfinished; returns when it takes instances.

        Raises `WorkflowDefinitionError` before any process starts; `JournalLocked` when a live program has the
        directory, `JournalCorrupt`, `StageFlowError`.
        """
        with self._gate:
            if self._node is not None:
                raise StageFlowError("this runtime is running already")
            if not self.workflows:
                raise WorkflowDefinitionError("this runtime has no workflows: give it some, as in Runtime(orders)")
            plans, pools = self._compile(self.workflows)
            pools += [self._endpoint_spec(stage) for stage in self._endpoints]
            self._queues = _owners(pools, {}, self._naming)
            data = DataDir(self.data_dir)
            lock_fd = data.acquire(os.getpid())
            try:
                config = NodeConfig(
                    os.fsencode(data.path),
                    lock_fd,
                    os.getpid(),
                    self._naming,
                    plans,
                    merged(pools),
                    self.config.durability,
                    self.config.max_stage_retries,
                    self.config.max_message_bytes,
                    self.config.retention_seconds,
                    self.config.log_level.upper(),
                    os.getcwdb(),
                    _import_path(),
                )
                node = NodeHandle(data, config, _say, self._fail)
                node.start()
                self._data, self._node = data, node
                self._history_path = data.history
                self._dead = None
                self._attach(node.address, f"program {os.getpid()}")
                self._follow(node.address)
            except BaseException:
                if self._node is not None:
                    self._node.kill()
                self._node = None
                remove_cluster_files(data)
                data.release()
                raise
        for workflow_id, count in node.resuming.items():
            _say(f"resuming {counted(count, 'instance')} of {workflow_id}")
        return self

    def stop(self, drain: bool = False, grace: Duration | None = None) -> None:
        """Stop the cluster. What is unfinished resumes at the next start.

        `drain`: first wait for what this program submitted. `grace`: seconds that stages in work get before they are
        killed (None: until they are done). Stopping again does nothing. Ctrl-C while it waits kills what is in work.
        """
        seconds = timeout_seconds(grace, "grace")
        if self._node is None:
            return
        if drain:
            self.drain()
        with self._gate:
            node, data = self._node, self._data
            if node is None or data is None:
                return
            self._node = None
            try:
                node.stop(seconds)
            finally:
                self._detach()
                remove_runtime_dir(runtime_dir(data.path))
                data.release()

    def close(self) -> None:
        """As `stop()`."""
        self.stop()

    @classmethod
    def connect(cls, data_dir: str | Path) -> Client:
        """A client of the cluster that serves `data_dir`: a runtime in another process, or `stageflow up`.

        It submits, waits, looks and steers like the runtime itself. Workflows are given as objects, or by id: then the
        context is a dict, of which names and types of fields are checked here, and the rest by the first worker.
        Close it, or use it in a `with` block; what was submitted goes on. Raises `BrokerUnavailable` when nobody
        serves the directory.
        """
        from stageflow_actors.runtime.client.remote_client import Connection

        return Connection(data_dir)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._node is None:
            return
        if kind is not None:
            self.stop()
            return
        try:
            self.drain()
        except BaseException:
            self.stop()
            raise
        self.stop()

    @property
    def node_pid(self) -> int:
        """The process id of the node, below which all processes of the cluster are. Raises when not running."""
        if self._node is None:
            raise BrokerUnavailable("this runtime is not running: call start(), or use it in a `with` block")
        return self._node.pid

    # workflows

    def register(self, workflow: Workflow[Any]) -> None:
        """Add a workflow, also while running. Raises `WorkflowDefinitionError`."""
        new = workflow not in self.workflows
        self._note(workflow)
        if self._node is None:
            return
        try:
            # With the other versions of it, which share its queues.
            plans, pools = self._compile([known for known in self.workflows if known.id == workflow.id])
            queues = _owners(pools, self._queues, self._naming)
        except WorkflowDefinitionError:
            if new:  # or the next start would fail for it
                self.workflows.remove(workflow)
                self._known.pop((workflow.id, workflow.version), None)
            raise
        self._queues = queues
        own = [plan for plan in plans if plan.version == workflow.version]
        self._node.register(Register(own, merged(pools)))

    def endpoint(self, name: str, handler: Any, **options: Any) -> None:
        """Serve requests to `name` by a pool of its own: `handler(command[, ctx])` returns the reply.

        Options as in `Stage` (actors, timeout, retry, env …). Raises `WorkflowDefinitionError`.
        """
        stage = Stage(handler, id=name, **options)
        if any(known.id == name for known in self._endpoints):
            raise WorkflowDefinitionError(f"endpoint {name!r} is served already")
        spec = self._endpoint_spec(stage)
        queues = _owners([spec], self._queues, self._naming)
        self._endpoints.append(stage)
        self._queues = queues
        if self._node is not None:
            self._node.register(Register([], [spec]))

    def _scale(self, queue: str, actors: int) -> None:
        if self._node is None:
            raise BrokerUnavailable("this runtime is not running: call start(), or use it in a `with` block")
        self._node.scale(queue, actors)

    def _endpoint_spec(self, stage: Stage) -> PoolSpec:
        return endpoint_spec(
            stage,
            self._naming,
            self.services,
            max_concurrency=self.config.max_stage_concurrency,
            max_deaths=self.config.max_stage_retries,
            interceptors=self.interceptors,
        )

    def _adopt(self, workflow: Workflow[Any]) -> Known:
        raise StageFlowError(
            f"workflow {workflow.id!r} is not registered with this runtime: give it to Runtime(...) or call register()"
        )

    def _note(self, workflow: Workflow[Any]) -> None:
        if not isinstance(workflow, Workflow):
            raise WorkflowDefinitionError(f"a Runtime takes workflows, not {workflow!r}")
        for known in self.workflows:
            if known is not workflow and (known.id, known.version) == (workflow.id, workflow.version):
                raise WorkflowDefinitionError(
                    f"two workflows have the id {workflow.id!r} and version {workflow.version}: give one another id"
                )
        if workflow not in self.workflows:
            self.workflows.append(workflow)

    def _compile(self, workflows: list[Workflow[Any]]) -> tuple[list[WorkflowPlan], list[PoolSpec]]:
        plans: list[WorkflowPlan] = []
        pools: list[PoolSpec] = []
        for workflow in workflows:
            workflow.validate(self.services)
            plan = compile_plan(workflow, self._naming, default_ttl=self._ttl)
            plans.append(plan)
            pools.extend(
                pool_specs(
                    workflow,
                    plan,
                    self.services,
                    max_queue_length=self.config.max_queue_length or 0,
                    max_concurrency=self.config.max_stage_concurrency,
                    max_deaths=self.config.max_stage_retries,
                    interceptors=self.interceptors,
                )
            )
            self._known[(workflow.id, workflow.version)] = Known(plan, workflow.context)
        return plans, pools


def _owners(pools: list[PoolSpec], known: dict[str, str], naming: Naming) -> dict[str, str]:
    """Whose each queue is. Raises `WorkflowDefinitionError` where two would share one, as ids with dots can."""
    owners = dict(known) or dict.fromkeys((naming.finished, naming.coordinator), "StageFlow itself")
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
    """The program's import path for its children: '' means the working directory, which is theirs too."""
    return [os.fsencode(entry or os.getcwd()) for entry in sys.path]


def _say(text: str) -> None:
    """A sentence for the user. stdout is the program's own."""
    try:
        sys.stderr.write(f"stageflow: {text}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # closed, or a reader that has gone: nobody is there to be told
