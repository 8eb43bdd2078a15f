"""StageFlow Actors: durable multi-stage workflows and sagas on one host, without a server.

`Workflow` and `Stage` say what is to be done, `Runtime` does it: `definition` holds the first, `runtime` the second;
`core` decides, `history` remembers, `errors` says what went wrong.
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
from stageflow_actors.runtime.client import Client
from stageflow_actors.runtime.config import Config
from stageflow_actors.runtime.context import StageContext
from stageflow_actors.runtime.instance import Instance
from stageflow_actors.runtime.interception import StageCall
from stageflow_actors.runtime.queues import QueueInfo
from stageflow_actors.runtime.runtime import Runtime

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
