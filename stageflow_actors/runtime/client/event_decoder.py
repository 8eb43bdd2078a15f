"""`EventDecoder`: makes events of the settlements that the broker reports.

An envelope carries the trail of all stages before it, and several messages often carry the same trail; each record
becomes one event. Nothing here waits, queries a broker or calls user code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec

from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.envelope import (
    Layout,
    Outcome,
    StageRecord,
    decode_envelope,
    decode_outcome,
    decode_trail,
    head_of,
)
from stageflow_actors.core.plan import FINISHED, ITEM_SUFFIX
from stageflow_actors.core.result import result_of_outcome
from stageflow_actors.core.status import StageStatus, WorkflowStatus
from stageflow_actors.core.value_codec import decode_result
from stageflow_actors.events import Event, StageCompleted, WorkflowCompensated, WorkflowCompleted, WorkflowFailed

__all__ = ["CodecLookup", "EventDecoder"]

MAX_TRACKED_INSTANCES = 100_000
"""Most live instances whose reported records are remembered; older records of others are not reported again."""

CodecLookup = Callable[[str, int], "tuple[ContextCodec[Any], Layout] | None"]
"""Returns the codec of a workflow's contexts and its stages, by id and version; None if unknown."""


class EventDecoder:
    """Makes events for one stream. Stages that completed before `since` (seconds since the Unix epoch) make none."""

    def __init__(self, since: float, codec_of: CodecLookup) -> None:
        self._since = since
        self._codec_of = codec_of
        self._reported: OrderedDict[str, dict[tuple[str, float], float]] = OrderedDict()

    def events(self, group: str, epoch: int, label: str, body: bytes) -> list[Event]:
        """Return the new events of one message, opening or arrival."""
        if head_of(body) is None:
            return []  # an item, a reply or a signal
        try:
            if label == FINISHED:
                return self._finished(group, epoch, decode_outcome(body), body)
            envelope = decode_envelope(body)
            return self._completed(group, epoch, envelope.workflow_id, envelope.version, envelope.trail)
        except msgspec.DecodeError:
            return []  # a gathered message: its parts were reported when they arrived

    def _completed(self, group: str, epoch: int, workflow_id: str, version: int, trail: bytes) -> list[Event]:
        events: list[Event] = []
        codec, _ = self._codec_of(workflow_id, version) or (ContextCodec(dict), None)
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
                        result=decode_result(codec, record.stage_id, record.data),
                    )
                )
        return events

    def _is_new(self, group: str, record: StageRecord) -> bool:
        if record.status != StageStatus.completed or record.stage_id.endswith(ITEM_SUFFIX):
            return False
        finished = record.started_at + record.duration
        reported = self._reported.get(group)
        if reported is None:
            if finished < self._since:
                return False
            reported = self._reported[group] = {}
            if len(self._reported) > MAX_TRACKED_INSTANCES:
                _, dropped = self._reported.popitem(last=False)
                self._since = max(self._since, *dropped.values())
        key = (record.stage_id, record.started_at)
        if key in reported or finished < self._since:
            return False
        reported[key] = finished
        return True

    def _finished(self, group: str, epoch: int, outcome: Outcome, body: bytes) -> list[Event]:
        events = self._completed(group, epoch, outcome.workflow_id, outcome.version, outcome.trail)
        self._reported.pop(group, None)
        codec, layout = self._codec_of(outcome.workflow_id, outcome.version) or (ContextCodec(dict), None)
        status = WorkflowStatus(outcome.status)
        fields: dict[str, Any] = {
            "workflow_id": outcome.workflow_id,
            "version": outcome.version,
            "instance_id": group,
            "epoch": epoch,
            "status": status,
            "started_at": outcome.started_at,
            "finished_at": outcome.finished_at,
            "duration": max(0.0, outcome.finished_at - outcome.started_at),
            "result": result_of_outcome(group, body, codec, layout),
        }
        if status == WorkflowStatus.completed:
            return [*events, WorkflowCompleted(**fields)]
        kind = WorkflowCompensated if status == WorkflowStatus.compensated else WorkflowFailed
        return [*events, kind(**fields, error=outcome.error, failed_stage=outcome.failed_stage)]
