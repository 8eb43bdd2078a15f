"""Cancel an instance, or run it again: from the failed stage (retry), or from the first stage (restart).

A message of a cancelled instance that a free worker takes is passed on to the coordinator without being handled. A
message that waits for busy workers goes to the coordinator directly. A message in work is never taken from its worker.
Another run belongs to the next epoch, so that it accepts no result of an earlier run. A retry keeps the idempotency
keys of its run; a restart does not.
"""

from __future__ import annotations

import time
from typing import Any

from msgspec import DecodeError, Raw

from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    Envelope,
    Outcome,
    append_record,
    decode_envelope,
    decode_outcome,
    decode_trail,
    encode,
)
from stageflow_actors.core.plan import BEGIN, CANCELLED, COORDINATOR, DLQ_PREFIX, ITEM, PARALLEL
from stageflow_actors.core.resume_state import TOO_LARGE, resume_branches, unpack_steps
from stageflow_actors.core.routing import CANCELLABLE_GATHER_PREFIXES, repeat_compensation
from stageflow_actors.core.status import StageStatus, WorkflowStatus
from stageflow_actors.errors import InstanceParked, StageFlowError
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.runtime.client.completion import Completion
from stageflow_actors.runtime.client.session import MAX_LOOKUPS, Session
from stageflow_actors.runtime.client.workflow_ref import WorkflowRef
from stageflow_brokers.api import FLAG_CHECK, FLAG_START, FLAG_WATCH, Target

__all__ = ["cancel", "restart", "retry"]

ROW_TIMEOUT_SECONDS = 10.0
"""Longest wait for the row of an instance that has ended."""

CANCEL_TIMEOUT_SECONDS = 30.0
"""How long `cancel` waits for the end before it returns the current status."""

HAND_OVER_INTERVAL_SECONDS = 0.2
"""How long workers have to pass a cancelled message on before it is handed over to the coordinator."""

MAX_HANDED_OVER = 1_000
"""Most messages that are handed over at once."""


def cancel(session: Session, completion: Completion, reason: str) -> WorkflowStatus:
    """See `Instance.cancel`."""
    instance_id = completion.instance_id
    text = f"cancelled: {reason}" if reason else "cancelled"
    status = completion.status()
    if status.terminal or status == WorkflowStatus.compensating:
        return status
    try:
        session.ask(lambda admin: admin.cancel(instance_id, text, list(CANCELLABLE_GATHER_PREFIXES)))
    except StageFlowError:
        return completion.status()  # it has left the broker since the first query
    completion.clear_parked()
    deadline = time.monotonic() + CANCEL_TIMEOUT_SECONDS
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            return completion.result(min(remaining, HAND_OVER_INTERVAL_SECONDS)).status
        except InstanceParked:
            break  # again: no worker can pass the message on, because its version is not registered
        except TimeoutError:
            _hand_over(session, instance_id)
    return completion.status()


def _hand_over(session: Session, instance_id: str) -> None:
    """Let the coordinator pass on the messages that wait for workers which are all busy."""
    group = session.lookup([instance_id]).get(instance_id)
    waiting = [
        message["id"]
        for message in ([] if group is None else group["messages"])
        # In the queue of a stage, the label of its message is the stage's id. Any other label has a colon, or the
        # message is a request.
        if message["state"] == "ready"
        and ":" not in message["label"]
        and not message["queue"].startswith(session.naming.endpoint(""))
    ]
    if waiting:
        try:
            session.ask(lambda admin: admin.hand_over(instance_id, waiting[:MAX_HANDED_OVER], COORDINATOR, CANCELLED))
        except StageFlowError:
            pass  # it has ended since the query


def retry(session: Session, completion: Completion, context: Any) -> None:
    """See `Instance.retry`."""
    instance_id = completion.instance_id
    status = completion.status()
    if status == WorkflowStatus.parked:
        _requeue_dead_letters(session, instance_id, context)
        completion.begin_run()
        return
    row = _ended_row(session, instance_id, status)
    outcome = decode_outcome(row.outcome)
    if status == WorkflowStatus.compensation_failed:
        _retry_compensations(session, row, outcome, context)
        completion.begin_run()
        return
    if status != WorkflowStatus.failed or outcome.compensations or outcome.failed_stage is None:
        raise StageFlowError(
            f"instance {instance_id!r} is {status}: only an instance that is parked, that failed with nothing "
            "compensated, or whose compensations failed, can be retried; restart() runs it from the first stage"
        )
    ref = _registered(session, row.workflow_id, row.version)
    failed = ref.plan.stage(outcome.failed_stage)
    if failed is None:
        raise StageFlowError(f"workflow {row.workflow_id!r} no longer has a stage {outcome.failed_stage!r}")
    place = (ref.plan.stage(failed.joins) if failed.joins else None) or failed
    given = None if context is None else Raw(ref.codec.prepare(context))
    steps = outcome.steps
    if steps is not None and TOO_LARGE in steps:
        raise StageFlowError(
            f"the results that stage {place.id!r} of instance {instance_id!r} had completed before it failed are "
            "larger than max_message_bytes and were not kept: restart() the instance"
        )
    resumed = resume_branches(steps or {}, given) if place.kind == PARALLEL else None
    if resumed is None:
        data = outcome.context if given is None else given
        repeated = {failed.id, place.id}
    else:
        data, steps = resumed
        repeated = {place.id, *place.branches}
    trail = EMPTY_TRAIL
    for record in decode_trail(outcome.trail):
        if record.stage_id not in repeated or (resumed is None and record.status != StageStatus.failed):
            trail = append_record(trail, record)
    direct = place.takes_plain_message and not ref.plan.timeout
    target = Target(place.queue, place.id) if direct else Target(COORDINATOR, BEGIN)
    envelope = _first_envelope(row, place.id, data, trail)
    envelope.payload, envelope.steps, envelope.run = outcome.payload, steps, outcome.run or row.epoch
    envelope.tracebacks = outcome.tracebacks
    if len(encode(envelope)) > session.max_message_bytes:
        envelope.tracebacks = None  # they must not count in the limit, which the broker applies to what a client sends
    _start(session, row, target, envelope)
    completion.begin_run()


def _retry_compensations(session: Session, row: HistoryRow, outcome: Outcome, context: Any) -> None:
    """Run the failed compensations of an instance again."""
    ref = _registered(session, row.workflow_id, row.version)
    for record in outcome.compensations:
        stage = ref.plan.stage(record.stage_id)
        if record.status == StageStatus.failed and (stage is None or not stage.compensated):
            raise StageFlowError(
                f"workflow {row.workflow_id!r} no longer has a compensation of stage {record.stage_id!r}, which "
                "failed: register it again"
            )
    steps = unpack_steps(outcome.steps)
    if any(TOO_LARGE in own for own in (steps or {}).values()):
        raise StageFlowError(
            f"the steps that the failed compensations of instance {row.instance_id!r} had completed are larger than "
            "max_message_bytes and were not kept, so that they would run again: compensate the rest by hand"
        )
    data = outcome.context if context is None else Raw(ref.codec.prepare(context))
    envelope = _first_envelope(row, "", data, outcome.trail)
    envelope.started_at, envelope.tracebacks = outcome.started_at, outcome.tracebacks
    envelope.error, envelope.failed_stage, envelope.run = outcome.error, outcome.failed_stage, outcome.run or row.epoch
    first = repeat_compensation(ref.plan, envelope, outcome.compensations, steps)
    _start(session, row, Target(first.queue, first.label), envelope)


def _requeue_dead_letters(session: Session, instance_id: str, context: Any) -> None:
    dead = _dead_letters(session, instance_id)
    if context is not None:
        for _, _, envelope in dead:
            ref = _registered(session, envelope.workflow_id, envelope.version)
            place = ref.plan.stage(envelope.stage_id)
            if place is not None and place.kind == ITEM:
                raise StageFlowError(
                    f"an item of map stage {place.joins!r} is parked, and an item has no context of its own: "
                    "retry() it as it is, or restart(context=...) the instance"
                )
            envelope.context = Raw(ref.codec.prepare(context))
        for queue, message_id, envelope in dead:  # after the loop above: either all are replaced or none
            _replace(session, queue, message_id, envelope)
    for queue, message_id, _ in dead:
        _requeue(session, queue, message_id)


def restart(session: Session, completion: Completion, context: Any) -> None:
    """See `Instance.restart`."""
    instance_id = completion.instance_id
    status = completion.status()
    if status == WorkflowStatus.parked:
        _, _, envelope = _dead_letters(session, instance_id)[0]
        ref = _registered(session, envelope.workflow_id, envelope.version)
        place = ref.plan.stage(envelope.stage_id)
        if context is None and place is not None and place.kind == ITEM:
            raise StageFlowError(
                f"an item of map stage {place.joins!r} is parked, and an item has no context of its own: "
                "give the context to begin with, as restart(context=...)"
            )
        data = envelope.context if context is None else Raw(ref.codec.prepare(context))
        first = Envelope(
            envelope.workflow_id, envelope.version, ref.first, data, EMPTY_TRAIL, time.time(), digest=envelope.digest
        )
        session.ask(lambda admin: admin.restart(instance_id, ref.target.queue, ref.target.label, encode(first)))
        completion.begin_run()
        return
    row = _ended_row(session, instance_id, status)
    ref = _registered(session, row.workflow_id, row.version)
    data = decode_outcome(row.outcome).context if context is None else Raw(ref.codec.prepare(context))
    _start(session, row, ref.target, _first_envelope(row, ref.first, data, EMPTY_TRAIL))
    completion.begin_run()


def _ended_row(session: Session, instance_id: str, status: WorkflowStatus) -> HistoryRow:
    """Return the row of the last run. Raises `StageFlowError` if the instance has not ended."""
    if not status.terminal:
        raise StageFlowError(f"instance {instance_id!r} is {status}: wait for its end, or cancel() it first")
    deadline = time.monotonic() + ROW_TIMEOUT_SECONDS
    # In this order: the row is written before the id leaves the broker, so a row read after that is of the last run.
    while session.lookup([instance_id]) or (row := session.row(instance_id)) is None:
        if time.monotonic() > deadline:
            raise session.no_instance(instance_id)
        time.sleep(0.01)  # it has ended, and its row is not written yet
    return row


def _registered(session: Session, workflow_id: str, version: int) -> WorkflowRef:
    ref = session.workflow_ref(workflow_id, version)
    if ref is None:
        raise StageFlowError(f"version {version} of workflow {workflow_id!r} is not registered here")
    return ref


def _replace(session: Session, queue: str, message_id: int, envelope: Envelope) -> None:
    session.ask(lambda admin: admin.replace(queue, message_id, encode(envelope)))


def _requeue(session: Session, queue: str, message_id: int) -> None:
    session.ask(lambda admin: admin.requeue(queue, [message_id]))


def _dead_letters(session: Session, instance_id: str) -> list[tuple[str, int, Envelope]]:
    """Return (queue, id, envelope) of each dead letter: several branches or items may be parked."""
    group = session.ask(lambda admin: admin.inspect([instance_id])).get(instance_id) or {}
    found = []
    for message in group.get("messages", ()):
        if message["state"] != "dead" or message["evidence"]:
            continue
        queue = f"{DLQ_PREFIX}{message['queue']}"
        try:
            found.append((queue, message["id"], decode_envelope(message["body"])))
        except (KeyError, DecodeError) as error:
            raise StageFlowError(
                f"dead letter {message['id']} in {queue} cannot be decoded by this release ({error}): "
                f"`stageflow dlq requeue {queue}` requeues it unchanged"
            ) from error
    if not found:
        raise StageFlowError(f"instance {instance_id!r} no longer has a dead letter; look at its status()")
    return found


def _first_envelope(row: HistoryRow, stage_id: str, data: Raw, trail: bytes) -> Envelope:
    return Envelope(row.workflow_id, row.version, stage_id, data, trail, time.time(), digest=row.digest)


def _start(session: Session, row: HistoryRow, target: Target, envelope: Envelope) -> None:
    """Run an instance that has ended again, in the next epoch."""
    body = encode(envelope)
    flags = FLAG_START | FLAG_WATCH | FLAG_CHECK
    for _ in range(MAX_LOOKUPS):
        # Before the history is read: the broker refuses the start if instances have left it after this count.
        history_sequence = session.history_sequence
        latest = session.row(row.instance_id)
        if latest is None or latest.epoch != row.epoch:
            raise StageFlowError(f"another caller has started instance {row.instance_id!r} again")
        item = (0, len(body), row.instance_id, row.epoch + 1, flags, 0, 0.0, 0.0, row.digest, history_sequence)
        answer = session.wait_for(session.broker().publish([target], [item], [body]))
        if not answer.refused:
            return
        session.advance_history_sequence(answer.history_sequence)
        if answer.refused[0][1] != "look-again":
            raise StageFlowError(f"another caller has started instance {row.instance_id!r} again")
    raise StageFlowError(f"instance {row.instance_id!r} ends faster than the history can be searched; try again")
