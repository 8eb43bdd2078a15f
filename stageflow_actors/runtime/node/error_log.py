"""One ERROR per failed instance and per dead letter, without a traceback: those of the attempts are logged before.

This module only logs: it makes no decision and calls no other part.
"""

from __future__ import annotations

import logging

import msgspec

from stageflow_actors.core.description import failure_text
from stageflow_actors.core.envelope import Outcome, head_of
from stageflow_actors.core.plan import COMPENSATE, DLQ_PREFIX, ITEM_SUFFIX
from stageflow_actors.core.status import WorkflowStatus

__all__ = ["FAILED_STATUSES", "log_dead_letter", "log_failed_instance"]

logger = logging.getLogger("stageflow_actors.node")

FAILED_STATUSES = frozenset(
    (WorkflowStatus.failed.value, WorkflowStatus.compensated.value, WorkflowStatus.compensation_failed.value)
)
"""The ends of failed instances."""


def log_failed_instance(instance_id: str, outcome: Outcome) -> None:
    """Log the end of an instance whose status is one of `FAILED_STATUSES`."""
    failed = [done.stage_id for done in outcome.compensations if done.status == "failed"]
    undone = f"; the compensations of {', '.join(failed)} failed" if failed else ""
    where = f" at stage {outcome.failed_stage!r}" if outcome.failed_stage else ""
    logger.error(
        "instance %r of workflow %r has ended %s%s: %s%s",
        instance_id,
        outcome.workflow_id,
        outcome.status,
        where,
        outcome.error,
        undone,
        extra={
            "workflow_id": outcome.workflow_id,
            "instance_id": instance_id,
            "stage_id": outcome.failed_stage or "",
        },
    )


def log_dead_letter(
    queue: str, group: str, label: str, attempts: int, evidence: bool, reason: bytes | None, head: bytes
) -> None:
    """Log a message that became a dead letter of `queue`; `head` is the beginning of its body."""
    try:
        workflow_id, _, named = head_of(head) or ("", 0, "")
    except msgspec.MsgspecError:
        workflow_id, named = "", ""
    stage_id = label.removeprefix(COMPENSATE) if label and not label.startswith(":") else named
    stage_id = stage_id.removesuffix(ITEM_SUFFIX)
    place = f"{'the compensation of stage' if label.startswith(COMPENSATE) else 'stage'} {stage_id!r}"
    what = "went on without it" if evidence else f"is parked; `stageflow dlq show {group}` shows it"
    logger.error(
        "dead letter in %s: %s failed for instance %r of workflow %r, which %s: %s",
        f"{DLQ_PREFIX}{queue}",
        place,
        group,
        workflow_id,
        what,
        failure_text(reason) or "no reason is known",
        extra={"workflow_id": workflow_id, "instance_id": group, "stage_id": stage_id, "attempt": attempts},
    )
