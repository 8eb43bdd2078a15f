"""Cancelling an instance, and running one again: from the failed stage, or from the first.

What is cancelled keeps flowing through its queues unworked until the coordinator has all of it; what waits for workers
that are busy is handed over to it, and nothing that is in work is snatched away. What runs again belongs to the next
epoch, so that nothing of before is taken for its own. A retry is the same run all the same, and a restart a new one.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from msgspec import DecodeError, Raw

from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    Envelope,
    append_record,
    decode_envelope,
    decode_outcome,
    decode_trail,
    encode,
)
from stageflow_actors.core.plan import BEGIN, BRANCH, CANCELLED, COORDINATOR, DLQ_PREFIX, ITEM, MAP, PARALLEL, STAGE
from stageflow_actors.core.resume_state import TOO_LARGE, take_up_branches
from stageflow_actors.core.routing import CANCELLABLE
from stageflow_actors.core.status import StageStatus, WorkflowStatus
from stageflow_actors.errors import InstanceNotFound, InstanceParked, StageFlowError
from stageflow_brokers.api import FLAG_CHECK, FLAG_START, FLAG_WATCH, Target

if TYPE_CHECKING:
    from stageflow_actors.history.rows import HistoryRow
    from stageflow_actors.runtime.client.client import Client
    from stageflow_actors.runtime.client.instance import Instance
    from stageflow_actors.runtime.client.workflow_ref import Known

__all__ = ["cancel", "restart", "retry"]

HISTORY_SECONDS = 10.0
"""How long an instance that has ended may take to be in the history and nowhere else."""

LOOKS = 50
"""How often a new run looks into the history again because something has left the broker meanwhile."""

CANCEL_SECONDS = 30.0
"""How long `cancel` waits for the end before it says where the instance stands."""

HAND_OVER_SECONDS = 0.2
"""How long workers have to pass a cancelled message through before it is taken from them."""

HANDED_OVER = 1_000
"""Most messages that are taken from them at once."""


def cancel(client: Client, instance: Instance[Any], reason: str) -> WorkflowStatus:
    """See `Instance.cancel`."""
    text = f"cancelled: {reason}" if reason else "cancelled"
    status = instance.status()
    if status.terminal or status == WorkflowStatus.compensating:
        return status
    try:
        client._ask(lambda admin: admin.cancel(instance.id, text, list(CANCELLABLE)))
    except StageFlowError:
        return instance.status()  # it has left the broker meanwhile
    if instance._parked:
        instance._parked = False
        instance._event.clear()
    deadline = time.monotonic() + CANCEL_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        try:
            return instance.result(min(left, HAND_OVER_SECONDS)).status
        except InstanceParked:
            break  # once more: who could pass it through is not there, because its version is not registered
        except TimeoutError:
            _hand_over(client, instance.id)
    return instance.status()


def _hand_over(client: Client, instance_id: str) -> None:
    """What waits for a worker, of which all are busy, is passed through by the coordinator."""
    group = client._lookup([instance_id]).get(instance_id)
    waiting = [
        message["id"]
        for message in ([] if group is None else group["messages"])
        # In the queue of its stage it is labelled with that; everything else has a label with a colon, or is a request.
        if message["state"] == "ready"
        and ":" not in message["label"]
        and not message["queue"].startswith(client._naming.endpoint(""))
    ]
    if waiting:
        try:
            client._ask(lambda admin: admin.hand_over(instance_id, waiting[:HANDED_OVER], COORDINATOR, CANCELLED))
        except StageFlowError:
            pass  # it has ended meanwhile


def retry(client: Client, instance: Instance[Any], context: Any) -> Instance[Any]:
    """See `Instance.retry`."""
    status = instance.status()
    if status == WorkflowStatus.parked:
        dead = _dead_letters(client, instance)
        if context is not None:
            for _, _, envelope in dead:
                known = _known(client, envelope.workflow_id, envelope.version)
                place = known.plan.stage(envelope.stage_id)
                if place is not None and place.kind == ITEM:
                    raise StageFlowError(
                        f"an item of map stage {place.joins!r} is parked, and an item has no context of its own: "
                        "retry() it as it is, or restart(context=...) the instance"
                    )
                envelope.context = Raw(known.codec.prepare(context))
            for queue, message_id, envelope in dead:  # all of them, once none is refused
                _replace(client, queue, message_id, envelope)
        for queue, message_id, _ in dead:
            _requeue(client, queue, message_id)
        return _again(client, instance)
    row = _row(client, instance, status)
    outcome = decode_outcome(row.outcome)
    if status != WorkflowStatus.failed or outcome.compensations or outcome.failed_stage is None:
        raise StageFlowError(
            f"instance {instance.id!r} is {status}: only one that is parked, or that failed with nothing compensated, "
            "can be retried from its failed stage; restart() runs it from the first one"
        )
    known = _known(client, row.workflow_id, row.version)
    failed = known.plan.stage(outcome.failed_stage)
    if failed is None:
        raise StageFlowError(f"workflow {row.workflow_id!r} has no stage {outcome.failed_stage!r} any more")
    place = (known.plan.stage(failed.joins) if failed.joins else None) or failed
    given = None if context is None else Raw(known.codec.prepare(context))
    steps = outcome.steps
    if steps is not None and TOO_LARGE in steps:
        raise StageFlowError(
            f"what stage {place.id!r} of instance {instance.id!r} had completed before it failed is larger than "
            "max_message_bytes, and was not kept: restart() the instance"
        )
    again = take_up_branches(steps or {}, given) if place.kind == PARALLEL else None
    if again is None:
        data = outcome.context if given is None else given
        over = {failed.id, place.id}
    else:
        data, steps = again
        over = {place.id, *place.branches}
    trail = EMPTY_TRAIL
    for record in decode_trail(outcome.trail):
        if record.stage_id not in over or (again is None and record.status != StageStatus.failed):
            trail = append_record(trail, record)
    plain = place.kind in (STAGE, BRANCH, MAP) and not known.plan.timeout
    target = Target(place.queue, place.id) if plain else Target(COORDINATOR, BEGIN)
    envelope = _first(row, place.id, data, trail)
    envelope.payload, envelope.steps, envelope.run = outcome.payload, steps, outcome.run or row.epoch
    _start(client, row, target, envelope)
    return _again(client, instance)


def restart(client: Client, instance: Instance[Any], context: Any) -> Instance[Any]:
    """See `Instance.restart`."""
    status = instance.status()
    if status == WorkflowStatus.parked:
        _, _, envelope = _dead_letters(client, instance)[0]
        known = _known(client, envelope.workflow_id, envelope.version)
        place = known.plan.stage(envelope.stage_id)
        if context is None and place is not None and place.kind == ITEM:
            raise StageFlowError(
                f"an item of map stage {place.joins!r} is parked, and an item has no context of its own: "
                "give the context to begin with, as restart(context=...)"
            )
        data = envelope.context if context is None else Raw(known.codec.prepare(context))
        first = Envelope(
            envelope.workflow_id, envelope.version, known.first, data, EMPTY_TRAIL, time.time(), digest=envelope.digest
        )
        client._ask(lambda admin: admin.restart(instance.id, known.target.queue, known.target.label, encode(first)))
        return _again(client, instance)
    row = _row(client, instance, status)
    known = _known(client, row.workflow_id, row.version)
    data = decode_outcome(row.outcome).context if context is None else Raw(known.codec.prepare(context))
    _start(client, row, known.target, _first(row, known.first, data, EMPTY_TRAIL))
    return _again(client, instance)


def _row(client: Client, instance: Instance[Any], status: WorkflowStatus) -> HistoryRow:
    if not status.terminal:
        raise StageFlowError(f"instance {instance.id!r} is {status}: wait for its end, or cancel() it first")
    deadline = time.monotonic() + HISTORY_SECONDS
    # In this order: the row is written before the id leaves, so what is read after that is of the last run.
    while client._lookup([instance.id]) or (row := client._row(instance.id)) is None:
        if time.monotonic() > deadline:
            raise InstanceNotFound(instance.id)
        time.sleep(0.01)  # it has ended, and its row is on its way
    return row


def _known(client: Client, workflow_id: str, version: int) -> Known:
    known = client._known_version(workflow_id, version)
    if known is None:
        raise StageFlowError(f"version {version} of workflow {workflow_id!r} is not registered here")
    return known


def _replace(client: Client, queue: str, message_id: int, envelope: Envelope) -> None:
    client._ask(lambda admin: admin.replace(queue, message_id, encode(envelope)))


def _requeue(client: Client, queue: str, message_id: int) -> None:
    client._ask(lambda admin: admin.requeue(queue, [message_id]))


def _dead_letters(client: Client, instance: Instance[Any]) -> list[tuple[str, int, Envelope]]:
    """(queue, id, envelope) of each: of several branches or items, several may be parked."""
    group = client._ask(lambda admin: admin.inspect([instance.id])).get(instance.id) or {}
    found = []
    for message in group.get("messages", ()):
        if message["state"] != "dead" or message["evidence"]:
            continue
        queue = f"{DLQ_PREFIX}{message['queue']}"
        try:
            found.append((queue, message["id"], decode_envelope(message["body"])))
        except (KeyError, DecodeError) as error:
            raise StageFlowError(
                f"dead letter {message['id']} in {queue} is not one that this release can read ({error}): "
                f"`stageflow dlq requeue {queue}` sends it on as it is"
            ) from error
    if not found:
        raise StageFlowError(f"instance {instance.id!r} has no dead letter any more; look at its status()")
    return found


def _first(row: HistoryRow, stage_id: str, data: Raw, trail: bytes) -> Envelope:
    return Envelope(row.workflow_id, row.version, stage_id, data, trail, time.time(), digest=row.digest)


def _start(client: Client, row: HistoryRow, target: Target, envelope: Envelope) -> None:
    """Go on with an instance that has ended, in the next epoch."""
    body = encode(envelope)
    flags = FLAG_START | FLAG_WATCH | FLAG_CHECK
    for _ in range(LOOKS):
        seen = client._seen  # before the history is read: what leaves from now on is found out about
        latest = client._row(row.instance_id)
        if latest is None or latest.epoch != row.epoch:
            raise StageFlowError(f"instance {row.instance_id!r} has been started again meanwhile")
        item = (0, len(body), row.instance_id, row.epoch + 1, flags, 0, 0.0, 0.0, row.digest, seen)
        answer = client._await(client._port().publish([target], [item], [body]))
        if not answer.refused:
            return
        client._seen = max(client._seen, answer.history_sequence)
        if answer.refused[0][1] != "look-again":
            raise StageFlowError(f"instance {row.instance_id!r} has been started again meanwhile")
    raise StageFlowError(f"instance {row.instance_id!r} ends faster than it can be looked up; try again")


def _again(client: Client, instance: Instance[Any]) -> Instance[Any]:
    """The handle of the run that has just begun; the old one tells of it, too."""
    instance._outcome, instance._error = None, None
    instance._parked = instance._gone = False
    instance._event.clear()
    instance._ensure_watched()
    return instance
