"""`Coordinator`: decides on failures, starts compensations, writes the history and closes instances at the broker.

It runs no user code.

Nothing depends on its memory: each event is a message that stays leased until its consequences are durable. Finished
instances are written to the history in batches, a few milliseconds late, and only then does the broker forget their
ids: the broker must never forget an instance whose row is not durable, or the same id could run again.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
import pykka

from stageflow_actors.core.coordination import UnknownPlan, decide, decide_gathered
from stageflow_actors.core.envelope import Failure, decode_envelope, decode_outcome, encode, head_of
from stageflow_actors.core.failures import describe_error, read_failure, write_failure
from stageflow_actors.core.plan import CANCELLED, TIMEOUT, Naming, WorkflowPlan
from stageflow_actors.core.plan import DEAD as DEAD_EVENT
from stageflow_actors.core.routing import CANCELLABLE_GATHER_PREFIXES, Transition
from stageflow_actors.core.tracebacks.references import refer_to_tracebacks
from stageflow_actors.errors import StageFlowError
from stageflow_actors.history.errors import HistoryMissing, HistoryUnavailable
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.history.writer import HistoryWriter
from stageflow_actors.runtime.ipc.exit_codes import EXIT_NODE_FAILED
from stageflow_actors.runtime.messaging.settlements import (
    Settlement,
    assign_target_numbers,
    park_unknown_version,
    settle_transition,
    split_parts,
)
from stageflow_actors.runtime.node.error_log import FAILED_STATUSES, log_failed_instance
from stageflow_actors.runtime.node.history_consistency import WRITTEN_FACT
from stageflow_actors.runtime.node.orphans import forward_orphan
from stageflow_brokers.api import DEAD_LETTER, FLAG_CLOSE_GROUP, Ack, Broker, DeliveryItem, SettleItem, Target
from stageflow_brokers.failpoints import failpoint

__all__ = ["AddPlan", "Coordinator", "Deliveries", "Flush"]

logger = logging.getLogger("stageflow_actors.node.coordinator")

MAX_ROWS = 2_000
"""Most rows in one transaction."""

WRITE_DELAY_SECONDS = 0.02
"""Time for which a finished instance waits for others to be written with it."""

FULL_RETRY_SECONDS = 1.0
"""Delay before the next attempt after the history could not be written."""


class Deliveries:
    """A batch of deliveries from the broker."""

    __slots__ = ("bodies", "items", "queue")

    def __init__(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        self.queue = queue
        self.items = items
        self.bodies = bodies


class Flush:
    """Time has passed: write the rows that have waited long enough."""


class AddPlan:
    """A workflow version has been registered."""

    __slots__ = ("plan",)

    def __init__(self, plan: WorkflowPlan) -> None:
        self.plan = plan


class Coordinator(pykka.ThreadingActor):
    """Consumes the queues of finished and of failed instances.

    `retention` is the age in seconds at which rows are deleted from the history; None keeps them. `fail` ends the
    cluster with an error; it is called if the history has been removed.
    """

    use_daemon_thread = True

    def __init__(
        self,
        broker: Broker,
        history: HistoryWriter,
        naming: Naming,
        plans: list[WorkflowPlan],
        retention: float | None,
        fail: Callable[[StageFlowError], NoReturn],
    ) -> None:
        super().__init__()
        self._broker = broker
        self._history = history
        self._naming = naming
        self._plans = {(plan.id, plan.version): plan for plan in plans}
        self._retention = retention
        self._fail = fail
        self._pending: list[tuple[DeliveryItem, HistoryRow]] = []
        self._pending_since = 0.0
        self._tracebacks: dict[bytes, bytes] = {}
        self._retry_at = 0.0
        self._batch_rows = MAX_ROWS
        self._pruned_at = time.monotonic()

    def on_failure(self, *args: Any) -> None:
        """End the node: no instance can end without a coordinator. The next node resumes from the broker."""
        sys.stderr.flush()
        os._exit(EXIT_NODE_FAILED)

    def on_receive(self, message: Any) -> None:
        """Handle one message: a batch of deliveries, a flush, or a new plan."""
        if isinstance(message, Deliveries):
            failpoint("coordinator.received")
            if message.queue == self._naming.finished:
                if not self._pending:
                    self._pending_since = time.monotonic()
                self._pending.extend(self._history_rows(message))
                if len(self._pending) >= MAX_ROWS:
                    self._write()
            else:
                # Any other queue is one without a pool: its messages belong to versions that are not registered.
                self._coordinate(message, orphaned=message.queue != self._naming.coordinator)
        elif isinstance(message, Flush):
            now = time.monotonic()
            if self._pending and now >= self._pending_since + WRITE_DELAY_SECONDS:
                self._write()
            if self._retention is not None and now - self._pruned_at > 60:
                self._pruned_at = now
                try:
                    self._history.prune(time.time() - self._retention)
                except HistoryUnavailable as error:
                    logger.warning("the history cannot be pruned now: %s", error)
        elif isinstance(message, AddPlan):
            self._plans[(message.plan.id, message.plan.version)] = message.plan

    # the history

    def _history_rows(self, batch: Deliveries) -> list[tuple[DeliveryItem, HistoryRow]]:
        """Return the rows to write. Park each invalid outcome: the broker would deliver it again at every start."""
        rows: list[tuple[DeliveryItem, HistoryRow]] = []
        parked: list[SettleItem] = []
        for item, body in zip(batch.items, batch.bodies, strict=True):
            try:
                rows.append((item, _history_row(item, body, self._tracebacks)))
            except (msgspec.MsgspecError, ValueError) as error:
                logger.error("the outcome of instance %r is invalid and is parked: %s", item.group, error)
                parked.append(_park(item, error))
        if parked:
            self._broker.settle([], [], [], parked, [])
        return rows

    def _write(self) -> None:
        if time.monotonic() < self._retry_at:
            return
        batch = self._pending[: self._batch_rows]
        rows = [row for _, row in batch]
        failpoint("coordinator.before-history")
        try:
            self._history.write(rows, self._tracebacks)
        except HistoryMissing as error:
            self._fail(error)
        except HistoryUnavailable as error:
            # The instances stay live in the broker, so nothing is lost and no id can be started twice.
            logger.warning("the write of finished instances is delayed: %s", error)
            self._retry_at = time.monotonic() + FULL_RETRY_SECONDS
            # Half of the rows may fit. Each instance that is written lets the journal, which holds it until then, free
            # disk space for the next.
            self._batch_rows = max(1, len(batch) // 2)
            return
        failpoint("coordinator.history-written")
        self._tracebacks.clear()
        del self._pending[: len(batch)]
        self._batch_rows = min(MAX_ROWS, 2 * self._batch_rows)
        self._pending_since = time.monotonic()
        acks: list[Ack] = [(item.id, item.lease, FLAG_CLOSE_GROUP, item.group) for item, _ in batch]
        # Sent before the settlements, and durable no later than they are: an instance that the journal has forgotten
        # is always among the rows that the journal counts.
        self._broker.admin.set_fact(WRITTEN_FACT, str(self._history.written))
        self._broker.settle([], [], acks, [], [])
        failpoint("coordinator.settled")

    # failures

    def _coordinate(self, batch: Deliveries, *, orphaned: bool = False) -> None:
        targets: list[Target] = []
        settled: list[SettleItem] = []
        bodies: list[bytes] = []
        for item, body in zip(batch.items, batch.bodies, strict=True):
            try:
                settlement = forward_orphan(item, body, self._plans) if orphaned else self._handle(item, body)
            except UnknownPlan:
                workflow_id, version, stage_id = head_of(body) or ("?", 0, "?")
                settlement = park_unknown_version(item, workflow_id, version, f"stage {stage_id!r}")
            except Exception as error:  # one invalid event must not stop the others
                logger.exception("the coordinator cannot handle an event of instance %r; it is parked", item.group)
                settled.append(_park(item, error))
                continue
            settled.append(assign_target_numbers(settlement, targets))
            bodies.extend(settlement.bodies)
        failpoint("coordinator.decided")
        self._broker.settle(targets, [], [], settled, bodies)

    def _handle(self, item: DeliveryItem, body: bytes) -> Settlement:
        extra = item.extra
        if extra is not None and extra.label == TIMEOUT:
            self._cancel_timed_out(item, body)
            return settle_transition(item, Transition())
        epoch = 0 if extra is None or extra.cancelled is None else extra.epoch_now
        return settle_transition(item, self._decide(item, body), epoch)

    def _decide(self, item: DeliveryItem, body: bytes) -> Transition:
        extra, plans, naming, now = item.extra, self._plans, self._naming, time.time()
        if extra is None:
            return decide("", body, None, 1, plans, naming, now)
        arrivals: list[tuple[str, bytes]] | None = None
        if extra.parts is not None:
            body, arrivals = split_parts(item, body)
            if extra.label != DEAD_EVENT:
                return decide_gathered(body, arrivals, plans, naming, now, extra.cancelled)
        if extra.label in (DEAD_EVENT, CANCELLED) and extra.steps:
            # A retry needs the steps that the stage had completed before it killed its workers, and a cancel the mark
            # of an attempt whose effect is unknown.
            envelope = decode_envelope(body)
            envelope.steps = {**(envelope.steps or {}), **extra.steps}
            body = encode(envelope)
        failure, attempts = read_failure(extra.failure), extra.attempts + 1
        return decide(extra.label, body, failure, attempts, plans, naming, now, extra.cancelled, arrivals)

    def _cancel_timed_out(self, item: DeliveryItem, body: bytes) -> None:
        """Cancel an instance whose workflow timeout has passed, with that as the reason."""
        base, _ = split_parts(item, body)
        seconds = msgspec.msgpack.decode(base, type=float)
        reason = f"StageTimeout: the workflow ran longer than its timeout of {seconds:g} s"
        self._broker.admin.cancel(item.group, reason, list(CANCELLABLE_GATHER_PREFIXES))


def _park(item: DeliveryItem, error: Exception) -> SettleItem:
    reason = Failure("refused", f"the coordinator cannot handle this event: {describe_error(error)}")
    return SettleItem([(item.id, item.lease)], DEAD_LETTER, [], 0.0, write_failure(reason))


def _history_row(item: DeliveryItem, body: bytes, tracebacks: dict[bytes, bytes]) -> HistoryRow:
    """Return the history's row of a finished instance; add the tracebacks to which it refers to `tracebacks`.

    Raises `ValueError` for an instance that the history cannot hold.
    """
    outcome = decode_outcome(body)
    if outcome.status in FAILED_STATUSES:
        log_failed_instance(item.group, outcome)
    if not item.group or not 0 <= outcome.version < 1 << 63:
        raise ValueError(f"it has no instance id, or an invalid version ({outcome.version})")
    if not math.isfinite(outcome.started_at) or not math.isfinite(outcome.finished_at):
        raise ValueError(f"it has an invalid time (started at {outcome.started_at}, finished at {outcome.finished_at})")
    if outcome.tracebacks is not None:
        outcome.tracebacks, texts = refer_to_tracebacks(outcome.tracebacks)
        tracebacks.update(texts)
        body = encode(outcome)
    return HistoryRow(
        item.group,
        item.epoch,
        outcome.workflow_id,
        outcome.version,
        outcome.status,
        outcome.started_at,
        outcome.finished_at,
        outcome.error,
        outcome.failed_stage,
        outcome.digest,
        body,
    )
