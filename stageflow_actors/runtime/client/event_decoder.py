"""From what the broker says of settlements to events: which stages have completed that were not told of yet.

An envelope carries the trail of all stages before it, and often several messages carry the same one; each record is
told once. Nothing here waits, asks or calls anybody.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec

from stageflow_actors.core.codec import ContextCodec, decode_value
from stageflow_actors.core.envelope import Outcome, StageRecord, decode_envelope, decode_outcome, decode_trail, head_of
from stageflow_actors.core.plan import FINISHED, ITEM_SUFFIX
from stageflow_actors.core.result import result_of_outcome
from stageflow_actors.core.status import StageStatus, WorkflowStatus
from stageflow_actors.events import Event, StageCompleted, WorkflowCompensated, WorkflowCompleted, WorkflowFailed

__all__ = ["Teller"]

REMEMBERED = 100_000
"""Most live instances of which it is known what was told: of those beyond, older records are never told again."""

FormOf = Callable[[str, int], "tuple[ContextCodec[Any], list[str]] | None"]
"""The codec of a workflow's contexts and the order of its stages, by id and version, where they are known."""


class Teller:
    """Makes events for one listener. What completed before `since` (seconds since the Unix epoch) is not told."""

    def __init__(self, since: float, form_of: FormOf) -> None:
        self._floor = since
        self._form_of = form_of
        self._told: OrderedDict[str, dict[tuple[str, float], float]] = OrderedDict()

    def events(self, group: str, epoch: int, label: str, body: bytes) -> list[Event]:
        """What is to be told of one message, opening or arrival."""
        if head_of(body) is None:
            return []  # an item, a reply, a signal
        try:
            if label == FINISHED:
                return self._ended(group, epoch, decode_outcome(body), body)
            envelope = decode_envelope(body)
            return self._completed(group, epoch, envelope.workflow_id, envelope.version, envelope.trail)
        except msgspec.DecodeError:
            return []  # gathered: what is in it was told when it arrived

    def _completed(self, group: str, epoch: int, workflow_id: str, version: int, trail: bytes) -> list[Event]:
        events: list[Event] = []
        for record in decode_trail(trail):
            if self._is_new(group, record):
                events.append(
                    StageCompleted(
                        workflow_id=workflow_id,
                        version=version,
                        instance_id=group,
                        epoch=epoch,
                        stage_id=record.stage_id,
                        attempt=record.attempts,
                        started_at=record.started_at,
                        finished_at=record.started_at + record.duration,
                        duration=record.duration,
                        result=decode_value(record.data),
                    )
                )
        return events

    def _is_new(self, group: str, record: StageRecord) -> bool:
        if record.status != StageStatus.completed or record.stage_id.endswith(ITEM_SUFFIX):
            return False
        finished = record.started_at + record.duration
        told = self._told.get(group)
        if told is None:
            if finished < self._floor:
                return False
            told = self._told[group] = {}
            if len(self._told) > REMEMBERED:
                _, forgotten = self._told.popitem(last=False)
                self._floor = max(self._floor, *forgotten.values())
        key = (record.stage_id, record.started_at)
        if key in told or finished < self._floor:
            return False
        told[key] = finished
        return True

    def _ended(self, group: str, epoch: int, outcome: Outcome, body: bytes) -> list[Event]:
        events = self._completed(group, epoch, outcome.workflow_id, outcome.version, outcome.trail)
        self._told.pop(group, None)
        codec, order = self._form_of(outcome.workflow_id, outcome.version) or (ContextCodec(dict), [])
        status = WorkflowStatus(outcome.status)
        ended: dict[str, Any] = {
            "workflow_id": outcome.workflow_id,
            "version": outcome.version,
            "instance_id": group,
            "epoch": epoch,
            "status": status,
            "started_at": outcome.started_at,
            "finished_at": outcome.finished_at,
            "duration": max(0.0, outcome.finished_at - outcome.started_at),
            "result": result_of_outcome(group, body, codec, order),
        }
        if status == WorkflowStatus.completed:
            return [*events, WorkflowCompleted(**ended)]
        kind = WorkflowCompensated if status == WorkflowStatus.compensated else WorkflowFailed
        return [*events, kind(**ended, error=outcome.error, failed_stage=outcome.failed_stage)]
