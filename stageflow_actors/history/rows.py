"""A row of the history: one instance that has ended. Plain data; nothing here touches a file."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["HistoryRow"]


class HistoryRow(NamedTuple):
    """How one instance ended. A tuple in column order, so that writing it binds it as it is.

    `started_at` and `finished_at` are seconds since the Unix epoch; `status` is a terminal `WorkflowStatus`
    value; `digest` identifies the input the instance was started with; `outcome` is the instance's `Outcome` as
    msgpack, stored and returned unread.
    """

    instance_id: str
    epoch: int
    workflow_id: str
    version: int
    status: str
    started_at: float
    finished_at: float
    error: str | None
    failed_stage: str | None
    digest: bytes | None
    outcome: bytes
