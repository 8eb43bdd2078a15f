"""`JoinExecutor`: joins the branches of a parallel stage after all have ended, and merges their contexts into one.

It runs in a worker because `merge` is user code. The arrivals are the envelopes of the branches in the order in which
they ended; the base holds the context from before the branches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Raw

from stageflow_actors.core.envelope import Envelope, StageRecord, decode_envelope, encode
from stageflow_actors.core.gather_results import JoinResult, join_branches
from stageflow_actors.core.merge import merge_fields
from stageflow_actors.core.plan import FAILED, WorkflowPlan
from stageflow_actors.core.routing import Publish, Transition
from stageflow_actors.core.status import StageStatus
from stageflow_actors.core.value_codec import decode_context
from stageflow_actors.definition.callables import asks_for_ctx, with_ctx
from stageflow_actors.definition.stage import Replace
from stageflow_actors.errors import InvalidContext, StageError
from stageflow_actors.runtime.ipc.pool_spec import StageCode
from stageflow_actors.runtime.messaging.settlements import Result, Settlement, split_parts
from stageflow_actors.runtime.worker.awaitables import check_not_awaitable
from stageflow_actors.runtime.worker.executors.base import Executor, ExecutorEnvironment
from stageflow_actors.runtime.worker.stage_context import StageContext
from stageflow_brokers.api import DeliveryItem

__all__ = ["JoinExecutor"]


class JoinExecutor(Executor):
    """Executes the join of one parallel stage."""

    def __init__(self, program: StageCode, plan: WorkflowPlan, environment: ExecutorEnvironment) -> None:
        super().__init__(program, plan, environment)
        merge: Callable[..., Any] | None = program.parts["merge"]
        self._merge = None if merge is None else with_ctx(merge, 2)
        self._wants_ctx = asks_for_ctx(merge, 2)

    def _run(self, item: DeliveryItem, body: bytes) -> Result:
        base, arrivals = split_parts(item, body)
        extra = item.extra
        envelope = decode_envelope(base)
        if not self._belongs_here(envelope):
            return self._forward_or_park(item, envelope, body)
        before = envelope.context
        # From here on the envelope contains the branches' results: compensations need them.
        joined = join_branches(self.plan, envelope, arrivals)
        if extra is not None and extra.cancelled is not None:
            return self._skip_cancelled(item, envelope)
        if joined.failure is not None:
            return self._report_branch_failure(item, envelope, joined.failure)
        attempt = 1 if extra is None else extra.attempts + 1
        if extra is not None and extra.fresh:
            return self._handle_lost_attempt(item, envelope, attempt)
        started = self._wall() if envelope.since is None else envelope.since
        self._enter_attempt(item, envelope, attempt)
        try:
            ctx = self._stage_context(item, envelope, attempt) if self._wants_ctx else None
            context = self._joined_or_undecodable(before, envelope.context, joined, ctx)
            record = StageRecord(self.planned.id, StageStatus.completed.value, attempt, started, self._wall() - started)
            return self._complete_stage(item, envelope, record, context)
        except BaseException as error:  # noqa: BLE001 - merge is user code
            self._on_error(error)
            return self._handle_failure(item, envelope, attempt, started, self._wall() - started, error)

    def _report_branch_failure(self, item: DeliveryItem, envelope: Envelope, lost: StageRecord) -> Settlement:
        """Report a failed required branch to the coordinator."""
        envelope.error, envelope.failed_stage = lost.error, lost.stage_id
        return self._settle(item, Transition([Publish(self.naming.coordinator, FAILED, encode(envelope))]))

    def _joined_or_undecodable(self, before: Raw, merged: Raw, joined: JoinResult, ctx: StageContext | None) -> bytes:
        """Return `_joined`. If it fails and one of the contexts cannot be decoded, raise that instead."""
        try:
            return self._joined(before, merged, joined, ctx)
        except InvalidContext:
            for context in (before, *(branch.context for branch in joined.completed.values())):
                decode_context(self.codec, context)
            raise

    def _joined(self, before: Raw, merged: Raw, joined: JoinResult, ctx: StageContext | None) -> bytes:
        """Return the encoded joined context; `merged` is the field-wise merge of all branches."""
        contexts = {name: branch.context for name, branch in joined.completed.items()}
        if self._merge is not None:
            context = self.codec.decode(before)
            given = self._merge(context, {name: self.codec.decode(one) for name, one in contexts.items()}, ctx)
            check_not_awaitable(given, f"merge of parallel stage {self.planned.id!r}")
            if type(given) is Replace:
                given = given.value
            return self.codec.encode(context if given is None else given, stage=self.planned.id)
        conflict = joined.conflict
        if conflict is not None:
            # An unchanged set may be encoded in another order: compare canonical forms before reporting a conflict.
            ordered = {name: self.codec.canonical(one) for name, one in contexts.items()}
            base, known = self.codec.canonical(before), {n: one for n, one in ordered.items() if one is not None}
            if base is not None and len(known) == len(ordered):
                merged, conflict = merge_fields(base, known)
        if conflict is not None:
            field, one, other = conflict
            raise StageError(
                f"branches {one!r} and {other!r} of {self.planned.id!r} changed the field "
                f"{self.codec.field_name(field)!r} differently: let each change fields of its own, or give merge=..."
            )
        return self.codec.encode(self.codec.decode(merged), stage=self.planned.id)
