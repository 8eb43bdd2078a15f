"""The words for where an instance and its stages stand. Values are what the wire, the CLI and the history say."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["StageStatus", "WorkflowStatus"]


class WorkflowStatus(StrEnum):
    """Where an instance stands."""

    pending = "pending"
    running = "running"
    waiting = "waiting"
    compensating = "compensating"
    parked = "parked"
    completed = "completed"
    failed = "failed"
    compensated = "compensated"
    compensation_failed = "compensation_failed"
    cancelled = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether nothing will happen any more by itself (a parked instance can still be requeued)."""
        return self in _TERMINAL_WORKFLOW


class StageStatus(StrEnum):
    """Where one stage of an instance stands."""

    pending = "pending"
    running = "running"
    completed = "completed"
    failed = "failed"
    compensated = "compensated"
    skipped = "skipped"

    @property
    def terminal(self) -> bool:
        """Whether the stage is over, whatever came of it."""
        return self not in _OPEN_STAGE


_TERMINAL_WORKFLOW = frozenset(
    {
        WorkflowStatus.completed,
        WorkflowStatus.failed,
        WorkflowStatus.compensated,
        WorkflowStatus.compensation_failed,
        WorkflowStatus.cancelled,
    }
)
_OPEN_STAGE = frozenset({StageStatus.pending, StageStatus.running})
