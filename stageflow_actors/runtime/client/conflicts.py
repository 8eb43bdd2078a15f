"""Conflicts of instance ids: a start whose id exists, with another input as it seems.

The broker and the history compare digests only. These functions find out whether the existing instance was started
with the same input by an earlier release, whose digests differ, or belongs to another workflow.
"""

from __future__ import annotations

from stageflow_actors.core.description import version_of
from stageflow_actors.errors import InstanceConflict
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.runtime.client.session import Session
from stageflow_actors.runtime.client.workflow_ref import StartRequest, WorkflowRef

__all__ = ["conflict_with_live", "conflict_with_row"]


def conflict_with_row(ref: WorkflowRef, request: StartRequest, row: HistoryRow) -> InstanceConflict | None:
    """Return the conflict of a start with a finished instance, or None if it had the same input."""
    if row.digest == request.digest:
        return None
    return None if _is_same_input(ref, request, row.digest) else _conflict(ref, request.id, row.workflow_id)


def conflict_with_live(session: Session, ref: WorkflowRef, requests: list[StartRequest]) -> InstanceConflict | None:
    """Return the conflict of starts of one id with a live instance, or None if they are to be sent again.

    The requests are changed so that the broker accepts them, or so that they are looked up in the history.
    """
    request = requests[0]
    if any(other.digest != request.digest for other in requests):
        return InstanceConflict(request.id)
    group = session.lookup([request.id]).get(request.id)
    if group is None:  # it has ended since
        for each in requests:
            each.check = True
        return None
    digest = group["digest"]
    if digest != request.digest and _is_same_input(ref, request, digest):
        for each in requests:
            each.digest = digest
        return None
    version = version_of(group)
    return _conflict(ref, request.id, ref.plan.id if version is None else version[0])


def _is_same_input(ref: WorkflowRef, request: StartRequest, digest: bytes | None) -> bool:
    return digest is not None and request.digest is not None and ref.is_earlier_digest(request, digest)


def _conflict(ref: WorkflowRef, instance_id: str, workflow_id: str) -> InstanceConflict:
    if workflow_id == ref.plan.id:
        return InstanceConflict(instance_id)
    return InstanceConflict(
        instance_id,
        f"instance {instance_id!r} exists already as an instance of another workflow, {workflow_id!r}: all workflows "
        f"share their instance ids; use another instance_id for {ref.plan.id!r}, such as "
        f"'{ref.plan.id}-{instance_id}'",
    )
