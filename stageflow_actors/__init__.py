"""Durable multi-stage workflows and sagas on one host, without a server.

`Workflow` and `Stage` define what runs; `Runtime` runs it in worker processes; `Client` is a connection to it.

================  =====================================================================
`definition`      workflows, stages, retry policies: immutable data
`core`            the decisions: which message follows a stage, contexts, results
`history`         finished instances in SQLite
`runtime`         processes: client, node, workers, and the broker connection
`testing`         workflows in the calling thread, for unit tests
`events`          the events of `Client.on_event`
`errors`          the tree of errors
`diagnostics`     health, doctor and the environment check
`cli`             the command `stageflow`
================  =====================================================================

Example:
    >>> from stageflow_actors import Retry, Workflow
    >>> from stageflow_actors.testing import run
    >>> flow = Workflow("orders", retry=Retry.fixed(max_attempts=3, delay=1))
    >>> @flow.stage
    ... def reserve(order):
    ...     order["reserved"] = True
    >>> @reserve.compensation
    ... def release(order):
    ...     order["reserved"] = False
    >>> @flow.stage
    ... def charge(order):
    ...     if order["card"] == "expired":
    ...         raise ValueError("card expired")
    >>> result = run(flow, {"card": "expired"})
    >>> str(result.status), result.error, result.context["reserved"]
    ('compensated', 'ValueError: card expired', False)
"""

from stageflow_actors.core.result import CompensationResult, StageResult, WorkflowResult
from stageflow_actors.core.status import StageStatus, WorkflowStatus
from stageflow_actors.core.timeline import TimelineEntry
from stageflow_actors.definition.breaker import Breaker
from stageflow_actors.definition.retry import Retry, RetryPolicy
from stageflow_actors.definition.stage import Compensation, Replace, Stage
from stageflow_actors.definition.workflow import Workflow
from stageflow_actors.errors import (
    BrokerUnavailable,
    InstanceConflict,
    InstanceNotFound,
    InstanceParked,
    InvalidContext,
    JournalCorrupt,
    JournalLocked,
    PayloadTooLarge,
    QueueFull,
    StageError,
    StageFlowError,
    StageTimeout,
    WorkerDied,
    WorkflowDefinitionError,
    WorkflowFailed,
)
from stageflow_actors.runtime.client.client import Client
from stageflow_actors.runtime.client.instance import Instance
from stageflow_actors.runtime.config import Config
from stageflow_actors.runtime.messaging.queue_info import QueueInfo
from stageflow_actors.runtime.runtime import Runtime
from stageflow_actors.runtime.worker.interceptors import StageCall
from stageflow_actors.runtime.worker.stage_context import StageContext

__all__ = [
    "Breaker",
    "BrokerUnavailable",
    "Client",
    "Compensation",
    "CompensationResult",
    "Config",
    "Instance",
    "InstanceConflict",
    "InstanceNotFound",
    "InstanceParked",
    "InvalidContext",
    "JournalCorrupt",
    "JournalLocked",
    "PayloadTooLarge",
    "QueueFull",
    "QueueInfo",
    "Replace",
    "Retry",
    "RetryPolicy",
    "Runtime",
    "Stage",
    "StageCall",
    "StageContext",
    "StageError",
    "StageFlowError",
    "StageResult",
    "StageStatus",
    "StageTimeout",
    "TimelineEntry",
    "WorkerDied",
    "Workflow",
    "WorkflowDefinitionError",
    "WorkflowFailed",
    "WorkflowResult",
    "WorkflowStatus",
]
