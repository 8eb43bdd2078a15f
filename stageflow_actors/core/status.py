"""`WorkflowStatus` and `StageStatus`. Their values are stored and sent, and the CLI prints them."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["StageStatus", "WorkflowStatus"]


class WorkflowStatus(StrEnum):
    """The status of an instance. A string enum: `status == "completed"` works.

    Attributes:
        pending: Submitted; no stage has started.
        running: A stage runs, or waits in its queue.
        waiting: The instance waits for a signal, a reply, a delay, branches or items.
        compensating: Completed stages are being undone.
        parked: The instance waits as a dead letter; a requeue resumes it.
        completed: All stages ended, and no required stage failed. Terminal.
        failed: A required stage failed, and there was nothing to undo. Terminal.
        compensated: A required stage failed, and the completed stages are undone. Terminal.
        compensation_failed: A compensation failed. Terminal.
        cancelled: The instance was cancelled. Terminal.

    Example:
        >>> from stageflow_actors import WorkflowStatus
        >>> WorkflowStatus("completed").terminal, WorkflowStatus.parked.terminal
        (True, False)
        >>> WorkflowStatus.failed == "failed"
        True
    """

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
        """True if the status cannot change without a restart or retry.

        A parked instance is not terminal: it can be requeued.
        """
        return self in _TERMINAL_WORKFLOW


class StageStatus(StrEnum):
    """The status of one stage of an instance. A string enum.

    Attributes:
        pending: The stage has not started.
        running: An attempt runs, or the next one waits.
        completed: The handler returned.
        failed: The last attempt failed.
        compensated: The stage completed and is undone.
        skipped: `when` was false, a stage in `after` of an optional stage has not completed, or its branch has chosen
            another arm.

    Example:
        >>> from stageflow_actors import StageStatus
        >>> [str(status) for status in StageStatus if not status.terminal]
        ['pending', 'running']
    """

    pending = "pending"
    running = "running"
    completed = "completed"
    failed = "failed"
    compensated = "compensated"
    skipped = "skipped"

    @property
    def terminal(self) -> bool:
        """True if the stage has ended or is skipped."""
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
