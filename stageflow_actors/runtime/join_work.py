"""The join of a parallel stage: all branches are over; their changes become one context, or the reason why not.

It runs in a worker because `merge` is the user's code. What the branches did is in their envelopes, in the order in
which they ended; the context before them is in the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Raw

from brokers.api import DeliveryItem
from stageflow_actors.core.codec import decode_value
from stageflow_actors.core.envelope import Envelope, StageRecord, append_record, decode_envelope, decode_trail, encode
from stageflow_actors.core.plan import FAILED
from stageflow_actors.core.routing import Moves, Step
from stageflow_actors.core.status import StageStatus
from stageflow_actors.definition.stage import Replace
from stageflow_actors.errors import StageError
from stageflow_actors.runtime.work import Result, Settled, Work, split_parts

__all__ = ["JoinWork", "merge_fields"]


class JoinWork(Work):
    """Joins the branches of one parallel stage."""

    def __init__(self, program: Any, *args: Any, **options: Any) -> None:
        super().__init__(program, *args, **options)
        self._merge: Callable[[Any, Mapping[str, Any]], Any] | None = program.parts["merge"]

    def _run(self, item: DeliveryItem, body: bytes) -> Result:
        base, arrivals = split_parts(item, body)
        extra = item.extra
        cancelled = extra is not None and extra.cancelled is not None
        opened = decode_envelope(base) if cancelled else self._open(item, base, body)
        if isinstance(opened, Settled):
            return opened
        started = self._wall()
        before = len(decode_trail(opened.trail))
        ended: dict[str, Envelope] = {}
        lost: StageRecord | None = None
        for slot, arrived in arrivals:
            branch = decode_envelope(arrived)
            for record in decode_trail(branch.trail)[before:]:
                opened.trail = append_record(opened.trail, record)
                if record.status == StageStatus.completed:
                    ended[slot] = branch
                elif record.status == StageStatus.failed and lost is None and self._required(slot):
                    lost = record
        attempt = 1 if extra is None else extra.attempts + 1
        if cancelled:
            self._keep_changes(opened, ended)
            return self._pass_through(item, opened)
        if lost is not None:
            return self._lose(item, opened, ended, lost)
        try:
            opened.context = Raw(self._joined(opened, ended))
            record = StageRecord(self.planned.id, StageStatus.completed.value, attempt, started, self._wall() - started)
            return self._record_and_leave(item, opened, record)
        except BaseException as error:  # noqa: BLE001 - merge is user code
            self._raised(error)
            self._keep_changes(opened, ended)
            return self._failed(item, opened, attempt, started, self._wall() - started, error)

    def _keep_changes(self, base: Envelope, ended: Mapping[str, Envelope]) -> None:
        """The branches will not be joined: what they changed, where they agree, is kept for their compensations."""
        merged, _ = merge_fields(base.context, {name: one.context for name, one in ended.items()})
        base.context = Raw(encode(merged))

    def _required(self, branch: str) -> bool:
        stage = self.plan.stage(branch)
        return stage is None or stage.required

    def _lose(
        self, item: DeliveryItem, envelope: Envelope, ended: Mapping[str, Envelope], lost: StageRecord
    ) -> Settled:
        """A required branch has failed."""
        self._keep_changes(envelope, ended)
        envelope.error, envelope.failed_stage = lost.error, lost.stage_id
        return self._settle(item, Moves([Step(self.naming.coordinator, FAILED, encode(envelope))]))

    def _joined(self, base: Envelope, ended: Mapping[str, Envelope]) -> bytes:
        if self._merge is not None:
            contexts = {name: self.codec.decode(one.context) for name, one in ended.items()}
            context = self.codec.decode(base.context)
            merged = self._merge(context, contexts)
            if type(merged) is Replace:
                merged = merged.value
            return self.codec.encode(context if merged is None else merged, stage=self.planned.id)
        fields, clash = merge_fields(base.context, {name: one.context for name, one in ended.items()})
        if clash is not None:
            field, one, other = clash
            raise StageError(
                f"branches {one!r} and {other!r} of {self.planned.id!r} changed the field {field!r} differently: "
                "let each change fields of its own, or give merge=..."
            )
        return self.codec.encode(self.codec.decode(encode(fields)), stage=self.planned.id)


def merge_fields(base: Raw, branches: Mapping[str, Raw]) -> tuple[dict[Any, Any], tuple[str, str, str] | None]:
    """`base` with what each branch changed, field by field; and (field, branch, branch) of the first contradiction.

    Fields are compared as they are encoded, so that NaN equals itself.
    """
    plain: dict[Any, Any] = decode_value(base)
    before = {field: encode(value) for field, value in plain.items()}
    merged = dict(plain)
    changed: dict[Any, tuple[str, bytes | None]] = {}
    clash: tuple[str, str, str] | None = None
    for name, context in branches.items():
        own: dict[Any, Any] = decode_value(context)
        for field in before.keys() | own.keys():
            now = encode(own[field]) if field in own else None
            if now == before.get(field):
                continue
            earlier = changed.get(field)
            if earlier is not None and earlier[1] != now:
                clash = clash or (str(field), earlier[0], name)
                continue
            changed[field] = (name, now)
            if now is None:
                merged.pop(field, None)
            else:
                merged[field] = own[field]
    return merged, clash
