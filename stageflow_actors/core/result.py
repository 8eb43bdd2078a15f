"""`WorkflowResult`: how an instance ended, decoded from the bytes of its last message.

A result is made for each finished instance, and often only counted. So nothing is decoded before it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from msgspec import Raw, Struct

from stageflow_actors.core.codec import ContextCodec, decode_value
from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    NIL,
    CompensationRecord,
    Outcome,
    decode_outcome,
    decode_trail,
    encode,
)
from stageflow_actors.core.plan import ITEM_SUFFIX
from stageflow_actors.core.status import StageStatus, WorkflowStatus
from stageflow_actors.core.tracebacks.table import compensation_place, read_tracebacks
from stageflow_actors.core.value_codec import decode_result
from stageflow_actors.errors import WorkflowFailed

__all__ = [
    "CompensationResult",
    "StageResult",
    "WorkflowResult",
    "compensation_results",
    "parked_result",
    "result_of_outcome",
]

C = TypeVar("C")

_NIL = bytes(NIL)


class StageResult(Struct, frozen=True, kw_only=True):
    """The result of one stage, as `WorkflowResult.stages` has it.

    Attributes:
        stage_id: The id of the stage.
        status: completed, failed, skipped or compensated.
        attempts: Number of attempts.
        started_at: Start of the last attempt, in seconds since the Unix epoch.
        duration: Seconds that the last attempt took.
        error: The error, as `ValueError: no address`, or None.
        traceback: The traceback of the last failed attempt, or None: the frames of user code, with causes, notes and
            the members of exception groups, at most 16 KiB. A stage that completed after a failed attempt has one too.
        data: The value that the handler returned, or None.

    Example:
        >>> from stageflow_actors import Workflow
        >>> from stageflow_actors.testing import run
        >>> stage = run(Workflow("orders").add_stage(lambda order: {"rate": 4}, id="price"), {}).stages[0]
        >>> stage.stage_id, str(stage.status), stage.attempts, stage.data
        ('price', 'completed', 1, {'rate': 4})
    """

    stage_id: str
    status: StageStatus
    attempts: int = 1
    started_at: float = 0.0
    duration: float = 0.0
    error: str | None = None
    data: Any = None
    traceback: str | None = None


class CompensationResult(Struct, frozen=True, kw_only=True):
    """The result of one compensation, as `WorkflowResult.compensations` has it.

    Attributes:
        stage_id: The id of the stage that was undone.
        status: completed or failed.
        error: The error, as `ValueError: no address`, or None.
        duration: Seconds that the last attempt took.
        traceback: The traceback of the last failed attempt, as `StageResult.traceback`, or None.

    Example:
        >>> from stageflow_actors import Workflow
        >>> from stageflow_actors.testing import run
        >>> flow = Workflow("orders").add_stage(lambda order: None, id="pay", compensation=lambda order: None)
        >>> result = run(flow.add_stage(lambda order: 1 / 0, id="ship"), {})
        >>> [(one.stage_id, str(one.status)) for one in result.compensations]
        [('pay', 'completed')]
    """

    stage_id: str
    status: StageStatus
    error: str | None = None
    duration: float = 0.0
    traceback: str | None = None


class WorkflowResult(Generic[C]):
    """How an instance ended, or that it is parked.

    StageFlow makes it; `execute`, `map`, `Instance.result` and `testing.run` return it. Its attributes are decoded when
    they are first read. Reading raises `msgspec.DecodeError` for damaged data, and `InvalidContext` for a context
    that does not fit its type any more.

    Attributes:
        instance_id: The id of the instance.

    Example:
        >>> from stageflow_actors import Workflow
        >>> from stageflow_actors.testing import run
        >>> result = run(Workflow("orders").add_stage(lambda order: order.update(paid=True), id="pay"), {})
        >>> result.success, result.context, [stage.stage_id for stage in result.stages]
        (True, {'paid': True}, ['pay'])
    """

    __slots__ = ("_codec", "_context", "_order", "_outcome", "_read", "_stages", "instance_id")

    instance_id: str
    _outcome: bytes | Raw
    _codec: ContextCodec[C]
    _order: Sequence[str]
    _read: Outcome | None

    def __init__(self) -> None:
        raise TypeError("a WorkflowResult is made by StageFlow: get one from execute, map or Instance.result")

    @property
    def workflow_id(self) -> str:
        """The id of the workflow."""
        return self._outcome_read().workflow_id

    @property
    def status(self) -> WorkflowStatus:
        """How the instance ended, or `parked`."""
        return WorkflowStatus(self._outcome_read().status)

    @property
    def success(self) -> bool:
        """True if the instance completed."""
        return self._outcome_read().status == "completed"

    @property
    def error(self) -> str | None:
        """The error that failed the instance, as `ValueError: no address`, or None."""
        return self._outcome_read().error

    @property
    def failed_stage(self) -> str | None:
        """The id of the stage that failed the instance, or None."""
        return self._outcome_read().failed_stage

    @property
    def started_at(self) -> float:
        """The time of the submit, in seconds since the Unix epoch."""
        return self._outcome_read().started_at

    @property
    def finished_at(self) -> float:
        """The time when it ended or was parked, in seconds since the Unix epoch."""
        return self._outcome_read().finished_at

    @property
    def duration(self) -> float:
        """Seconds from submit to end, time in queues included."""
        outcome = self._outcome_read()
        return max(0.0, outcome.finished_at - outcome.started_at)

    @property
    def context(self) -> C:
        """The context as the last stage or compensation left it."""
        try:
            return self._context
        except AttributeError:
            data = self._outcome_read().context
            # The context may be unknown, as of an instance that an item of a map stage parked.
            self._context: C = decode_value(data) if bytes(data) == _NIL else self._codec.decode(data)
            return self._context

    @property
    def stages(self) -> list[StageResult]:
        """The results of the stages that were reached, in order of definition."""
        try:
            return self._stages
        except AttributeError:
            self._stages: list[StageResult] = self._stages_read()
            return self._stages

    @property
    def compensations(self) -> list[CompensationResult]:
        """The results of the compensations, in the order in which they ran."""
        outcome = self._outcome_read()
        return compensation_results(outcome.compensations, read_tracebacks(outcome.tracebacks))

    def stage(self, stage_id: str) -> StageResult:
        """Return the result of one stage.

        Args:
            stage_id: The id of the stage.

        Returns:
            Its result, one of `stages`.

        Raises:
            KeyError: If this instance has not reached a stage of this id.

        Example:
            >>> from stageflow_actors import Workflow
            >>> from stageflow_actors.testing import run
            >>> def pay(order):
            ...     return order["total"]
            >>> result = run(Workflow("orders").add_stage(pay), {})
            >>> print(result.stage("pay").error)
            KeyError: 'total'
            >>> 'return order["total"]' in result.stage("pay").traceback
            True
        """
        for stage in self.stages:
            if stage.stage_id == stage_id:
                return stage
        reached = ", ".join(repr(stage.stage_id) for stage in self.stages) or "none"
        raise KeyError(f"instance {self.instance_id!r} reached no stage {stage_id!r}, only: {reached}")

    def raise_for_status(self) -> None:
        """Raise `WorkflowFailed` unless the instance completed.

        Raises:
            WorkflowFailed: If the status is not `completed`. Its attribute `result` is this result.

        Example:
            >>> from stageflow_actors import Workflow
            >>> from stageflow_actors.testing import run
            >>> run(Workflow("orders").add_stage(lambda order: None), {}).raise_for_status()
            >>> run(Workflow("orders").add_stage(lambda order: 1 / 0), {}).raise_for_status()
            Traceback (most recent call last):
            ...
            stageflow_actors.errors.WorkflowFailed: instance ... ended failed at stage 'stage-1': ZeroDivisionError: ...
        """
        if not self.success:
            raise WorkflowFailed(self)

    def _outcome_read(self) -> Outcome:
        read = self._read
        if read is None:
            read = self._read = decode_outcome(self._outcome)
        return read

    def _stages_read(self) -> list[StageResult]:
        outcome = self._outcome_read()
        undone = {record.stage_id for record in outcome.compensations if record.status == "completed"}
        # A stage that failed, was parked and went through after a requeue is in the trail twice; the last counts.
        records = {record.stage_id: record for record in decode_trail(outcome.trail)}
        for name in [name for name in records if name.endswith(ITEM_SUFFIX)]:
            # Completed items of a map stage that did not complete: they stand for it unless it has its own record.
            part = records.pop(name)
            part.stage_id = name.removesuffix(ITEM_SUFFIX)
            records.setdefault(part.stage_id, part)
        tracebacks = read_tracebacks(outcome.tracebacks)
        place = {stage_id: index for index, stage_id in enumerate(self._order)}
        found = sorted(records.values(), key=lambda record: place.get(record.stage_id, len(place)))
        return [
            StageResult(
                stage_id=record.stage_id,
                status=StageStatus.compensated
                if record.stage_id in undone and record.status == "completed"
                else StageStatus(record.status),
                attempts=record.attempts,
                started_at=record.started_at,
                duration=record.duration,
                error=record.error,
                data=decode_result(self._codec, record.stage_id, record.data),
                traceback=tracebacks.get(record.stage_id),
            )
            for record in found
        ]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WorkflowResult):
            return NotImplemented
        if self.instance_id != other.instance_id:
            return False
        return bytes(self._outcome) == bytes(other._outcome) or self._facts() == other._facts()

    def __hash__(self) -> int:
        return hash(self.instance_id)

    def _facts(self) -> tuple[Any, ...]:
        return (
            self.workflow_id,
            self.status,
            self.context,
            self.error,
            self.failed_stage,
            self.stages,
            self.compensations,
            self.started_at,
            self.finished_at,
        )

    def __repr__(self) -> str:
        facts = [f"{self.instance_id!r}", f"{self.workflow_id!r}", str(self.status)]
        if self.failed_stage:
            facts.append(f"failed_stage={self.failed_stage!r}")
        if self.error:
            facts.append(f"error={self.error!r}")
        return f"WorkflowResult({', '.join(facts)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return result_of_outcome, (self.instance_id, bytes(self._outcome), self._codec, tuple(self._order))


def result_of_outcome(
    instance_id: str, outcome: bytes | Raw, codec: ContextCodec[C], order: Sequence[str] = ()
) -> WorkflowResult[C]:
    """Return the result in `outcome` (an encoded `Outcome`); `order` are the stage ids as defined."""
    result: WorkflowResult[C] = WorkflowResult.__new__(WorkflowResult)
    result.instance_id = instance_id
    result._outcome = outcome
    result._codec = codec
    result._order = order
    result._read = None
    return result


def compensation_results(
    records: Iterable[CompensationRecord], tracebacks: Mapping[str, str]
) -> list[CompensationResult]:
    """Return the results of compensations; `tracebacks` are those of the instance, by place."""
    return [
        CompensationResult(
            stage_id=record.stage_id,
            status=StageStatus(record.status),
            error=record.error,
            duration=record.duration,
            traceback=tracebacks.get(compensation_place(record.stage_id)),
        )
        for record in records
    ]


def parked_result(
    instance_id: str,
    workflow_id: str,
    codec: ContextCodec[C],
    *,
    error: str | None = None,
    failed_stage: str | None = None,
    context: bytes | Raw = NIL,
    trail: bytes = EMPTY_TRAIL,
    version: int = 1,
    started_at: float = 0.0,
    parked_at: float = 0.0,
    order: Sequence[str] = (),
) -> WorkflowResult[C]:
    """Return the result of an instance that waits as a dead letter, as `map` yields it.

    `context` is the encoded context as the failed stage received it, `trail` the stages before.
    """
    outcome = Outcome(
        workflow_id=workflow_id,
        version=version,
        status=WorkflowStatus.parked.value,
        context=Raw(context),
        trail=trail,
        started_at=started_at,
        finished_at=parked_at or started_at,
        error=error,
        failed_stage=failed_stage,
    )
    return result_of_outcome(instance_id, encode(outcome), codec, order)
