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
    Layout,
    Outcome,
    StagePlace,
    StageRecord,
    append_record,
    decode_outcome,
    decode_trail,
    encode,
)
from stageflow_actors.core.plan import ITEM_SUFFIX
from stageflow_actors.core.status import StageStatus, WorkflowStatus
from stageflow_actors.core.tracebacks.table import compensation_place, read_tracebacks
from stageflow_actors.core.value_codec import decode_result
from stageflow_actors.definition.guesses import closest
from stageflow_actors.errors import WorkflowFailed

__all__ = [
    "CompensationResult",
    "StageResult",
    "WorkflowResult",
    "all_stages",
    "compensation_results",
    "latest_records",
    "parked_result",
    "result_of_outcome",
]

C = TypeVar("C")

_NIL = bytes(NIL)


class StageResult(Struct, frozen=True, kw_only=True):
    """The result of one stage, as `WorkflowResult.stages` has it.

    Attributes:
        stage_id: The id of the stage.
        status: completed, failed, skipped or compensated; pending if the instance ended or was parked before it.
        attempts: Number of attempts, 0 if it was not started.
        started_at: Start of the last attempt, in seconds since the Unix epoch; 0 if it was not started.
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

    __slots__ = ("_codec", "_context", "_layout", "_outcome", "_read", "_stages", "instance_id")

    instance_id: str
    _outcome: bytes | Raw
    _codec: ContextCodec[C]
    _layout: Layout | None
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
        """The results of all stages of the workflow, in order of definition.

        A stage that was not reached is `pending`, one in an arm that its branch did not choose `skipped`; both have no
        attempts. Only the stages that were reached are known of an instance that completed under a version of the
        workflow that is not registered any more.
        """
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
            KeyError: If the workflow has no stage of this id.

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
        ids = [stage.stage_id for stage in self.stages]
        meant = closest(str(stage_id), ids)
        hint = f"did you mean {meant!r}?" if meant else f"its stages are {', '.join(map(repr, ids)) or 'none'}"
        raise KeyError(f"workflow {self.workflow_id!r} has no stage {stage_id!r}: {hint}")

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
        tracebacks = read_tracebacks(outcome.tracebacks)
        found = [
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
            for record in latest_records(decode_trail(outcome.trail))
        ]
        return all_stages(found, self._places(outcome), outcome.status, outcome.failed_stage)

    def _places(self, outcome: Outcome) -> Sequence[StagePlace]:
        """Return the stages of the version that ran, or none if it is not known."""
        if outcome.places is not None:
            return outcome.places
        layout = self._layout
        if layout is None or (layout.workflow_id, layout.version) != (outcome.workflow_id, outcome.version):
            return ()
        return layout.places

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
        return result_of_outcome, (self.instance_id, bytes(self._outcome), self._codec, self._layout)


def latest_records(records: Iterable[StageRecord]) -> list[StageRecord]:
    """Return the last record of each stage, in order of first appearance.

    A stage that failed, was parked and completed after a requeue is in a trail twice. The completed items of a map
    stage that did not complete have a record of their own, which stands for the stage if that has none.
    """
    latest = {record.stage_id: record for record in records}
    for name in [name for name in latest if name.endswith(ITEM_SUFFIX)]:
        part = latest.pop(name)
        part.stage_id = name.removesuffix(ITEM_SUFFIX)
        latest.setdefault(part.stage_id, part)
    return list(latest.values())


def all_stages(
    found: Iterable[StageResult],
    places: Sequence[StagePlace],
    status: WorkflowStatus | str,
    failed_stage: str | None,
) -> list[StageResult]:
    """Return the stages of an instance in order of definition: those `found`, and each other one of `places`.

    `status` and `failed_stage` are those of the instance. A stage that was not found is pending. It is skipped if its
    branch has chosen another arm, or if the instance completed. Stages that `places` does not contain are last.
    """
    by_id = {stage.stage_id: stage for stage in found}
    listed = []
    for place in places:
        stage = by_id.get(place.stage_id)
        if stage is None:
            outer = by_id.get(place.inside)
            if status == WorkflowStatus.completed or _is_avoided(place, outer):
                stage = StageResult(stage_id=place.stage_id, status=StageStatus.skipped, attempts=0)
            elif place.inside and place.arm is None and outer is not None:
                continue  # the parallel stage has begun, and the record of this branch is not among those at hand
            else:
                stage = _of_branches(place, places, by_id, failed_stage) or StageResult(
                    stage_id=place.stage_id, status=StageStatus.pending, attempts=0
                )
        listed.append(stage)
    known = {place.stage_id for place in places}
    return listed + [stage for stage in by_id.values() if stage.stage_id not in known]


def _is_avoided(place: StagePlace, branch: StageResult | None) -> bool:
    """Return True if the branch has chosen another arm than that of the stage."""
    return (
        place.arm is not None
        and branch is not None
        and branch.status in (StageStatus.completed, StageStatus.compensated)
        and branch.data != place.arm
    )


def _of_branches(
    place: StagePlace, places: Sequence[StagePlace], found: Mapping[str, StageResult], failed_stage: str | None
) -> StageResult | None:
    """Return the result of a parallel stage that ended before its join: only its branches have records.

    It failed with a branch, or it was cancelled.
    """
    inside = [other.stage_id for other in places if other.inside == place.stage_id and other.arm is None]
    if failed_stage in inside and (branch := found.get(failed_stage)) is not None:
        return StageResult(
            stage_id=place.stage_id, status=StageStatus.failed, started_at=branch.started_at, error=branch.error
        )
    if any(stage_id in found for stage_id in inside):
        return StageResult(stage_id=place.stage_id, status=StageStatus.skipped, attempts=0)
    return None


def result_of_outcome(
    instance_id: str, outcome: bytes | Raw, codec: ContextCodec[C], layout: Layout | None = None
) -> WorkflowResult[C]:
    """Return the result in `outcome` (an encoded `Outcome`); `layout` are the stages of the workflow, if known."""
    result: WorkflowResult[C] = WorkflowResult.__new__(WorkflowResult)
    result.instance_id = instance_id
    result._outcome = outcome
    result._codec = codec
    result._layout = layout
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
    records: Iterable[StageRecord] = (),
    tracebacks: bytes | None = None,
    version: int = 1,
    started_at: float = 0.0,
    parked_at: float = 0.0,
    layout: Layout | None = None,
) -> WorkflowResult[C]:
    """Return the result of an instance that waits as a dead letter, as `map` yields it.

    `context` is the encoded context as the failed stage received it, `records` are the stages so far,
    `tracebacks` is their table.
    """
    trail = EMPTY_TRAIL
    for record in records:
        trail = append_record(trail, record)
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
        tracebacks=tracebacks,
    )
    return result_of_outcome(instance_id, encode(outcome), codec, layout)
