"""`HistoryRow`: one finished instance as plain data, without file access."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["HistoryRow"]


class HistoryRow(NamedTuple):
    """A finished instance. The fields are in column order, so that the tuple is the parameters of the statement.

    `started_at` and `finished_at` are in seconds since the Unix epoch; `status` is a terminal `WorkflowStatus` value;
    `digest` identifies the input of the submit; `outcome` is the `Outcome` as msgpack, which the history does not
    decode.
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
