"""`check_outcome`: is the stored outcome of a finished instance readable and consistent?

A pure function: the caller passes the columns of the history row and the encoded outcome.
"""

from __future__ import annotations

import math

import msgspec

from stageflow_actors.core.envelope import Outcome, decode_outcome, decode_trail
from stageflow_actors.core.plan import ITEM_SUFFIX
from stageflow_actors.core.routing import completed_stages, uncertain_stages
from stageflow_actors.core.status import StageStatus, WorkflowStatus

__all__ = ["check_outcome"]

_TERMINAL = frozenset(status.value for status in WorkflowStatus if status.terminal)


def check_outcome(
    workflow_id: str, version: int, status: str, error: str | None, failed_stage: str | None, outcome: bytes
) -> str | None:
    """Return the first fault of a history row and its outcome as a clause ("its outcome …"), or None."""
    try:
        read = decode_outcome(outcome)
        decode_trail(read.trail)
        if len(read.context):
            msgspec.msgpack.decode(read.context)
    except (msgspec.MsgspecError, ValueError, RecursionError) as fault:
        return f"its outcome cannot be read: {fault}"
    in_outcome = (read.workflow_id, read.version, read.status, read.error, read.failed_stage)
    for name, column, inside in zip(
        ("workflow", "version", "status", "error", "failed stage"),
        (workflow_id, version, status, error, failed_stage),
        in_outcome,
        strict=True,
    ):
        if column != inside:
            return f"its row says {name} {column!r}, its outcome {inside!r}"
    if status not in _TERMINAL:
        return f"its status {status!r} is not terminal"
    if not (math.isfinite(read.started_at) and math.isfinite(read.finished_at)):
        return f"its times are not finite: it started at {read.started_at} and ended at {read.finished_at}"
    return _contradiction(read)


def _contradiction(read: Outcome) -> str | None:
    failed = [done.stage_id for done in read.compensations if done.status == StageStatus.failed]
    if read.status == WorkflowStatus.completed and read.compensations:
        return f"its status is completed, but {read.compensations[0].stage_id} was compensated"
    if read.status == WorkflowStatus.compensated and (failed or not read.compensations):
        fault = f"the compensation of {failed[0]} failed" if failed else "no stage was"
        return f"its status is compensated, but {fault}"
    if read.status == WorkflowStatus.compensation_failed and not failed:
        return "its status is compensation_failed, but no compensation failed"
    completed = (id.removesuffix(ITEM_SUFFIX) for id in reversed(completed_stages(read.trail)))
    backwards = dict.fromkeys([*uncertain_stages(read.trail), *completed])
    reruns = [done.rerun for done in read.compensations]
    if reruns != sorted(reruns):
        return "its compensations are not in the order in which they ran"
    for rerun in dict.fromkeys(reruns):
        undone = [done.stage_id for done in read.compensations if done.rerun == rerun]
        if undone != [id for id in backwards if id in undone]:
            return f"it compensated {', '.join(undone)}, which is not the reverse order of completion"
    if len({done.stage_id for done in read.compensations}) < len(reruns):
        return "it lists a compensation twice"
    return None
