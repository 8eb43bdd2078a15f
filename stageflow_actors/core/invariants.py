"""The invariants of a cluster, checked on the broker's audit: one carrier per instance, no lease without a live worker.

The audit groups instances by their messages and gathers ("shapes"), and has no knowledge of workflows; these functions
interpret the shapes. Pure functions: the caller passes the audit and everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from stageflow_actors.core.plan import DLQ_PREFIX, TIMEOUT, UNANSWERED, Naming, WorkflowPlan
from stageflow_actors.core.plural import pluralize

__all__ = [
    "ERROR",
    "INFO",
    "WARNING",
    "Finding",
    "GatherState",
    "MessageCount",
    "broker_findings",
    "consumed_queues",
    "instance_findings",
    "lease_findings",
    "queue_findings",
]

ERROR, WARNING, INFO = "error", "warning", "info"

MAX_NAMED_INSTANCES = 3
"""Limit of instance ids in one finding."""

MAX_LISTED_QUEUES = 20
"""Limit of queues in one list."""

WAITING_GATHER_PREFIXES = ("signal:", "reply:", "moved:")
"""Prefixes of the gathers that alone continue an instance. All others join branches or items in work."""

RESTORE = (
    "restore the directory from a backup; or check what the instance has done (`stageflow instances show {id}`), and "
    "start it again under another id"
)


class Finding(NamedTuple):
    """One result of a check: the invariant (`check`), the instance, queue or peer (`where`), the fault and the advice.

    The advice is a command if there is one. Only a finding of severity `ERROR` violates an invariant.
    """

    severity: str
    check: str
    where: str
    what: str
    advice: str = ""


class MessageCount(NamedTuple):
    """The number of an instance's messages with the same queue, label and state."""

    queue: str
    label: str
    state: str
    number: int


class GatherState(NamedTuple):
    """A gather of an instance; `need` is None if it is not open, and only has early arrivals."""

    key: str
    need: int | None
    arrived: int
    queue: str
    has_deadline: bool


def instance_findings(audit: Mapping[str, Any], naming: Naming) -> Iterator[Finding]:
    """Check that each instance has exactly one carrier.

    A live instance has one message, gather or timer that continues it, or one for each of its branches or items in
    work. An ended instance has one message for the history.
    """
    for ended, messages, gathers, count, ids in audit["shapes"]:
        held = [MessageCount(*kind) for kind in messages]
        opened = [GatherState(*gather) for gather in gathers]
        wrong = _of_ended(ended, held) if ended else _of_live(held, opened, naming)
        if wrong is not None:
            severity, check, what, advice = wrong
            yield Finding(severity, check, _named(count, ids), what, advice.format(id=ids[0]))


_Wrong = tuple[str, str, str, str]


def _of_ended(label: str, held: Sequence[MessageCount]) -> _Wrong | None:
    events = [one for one in held if one.label == label]
    if sum(one.number for one in events) != 1:
        number = sum(one.number for one in events)
        messages = pluralize(number, "message") if number else "no message"
        what = f"it has ended, but has {messages} for the history{_in(held)}"
        return ERROR, "carrier", what, RESTORE
    if events[0].state == "dead":
        what = f"it has ended, but its message for the history is a dead letter of {events[0].queue}"
        return WARNING, "carrier", what, f"stageflow dlq requeue --queue {events[0].queue}"
    return None


def _of_live(held: Sequence[MessageCount], gathers: Sequence[GatherState], naming: Naming) -> _Wrong | None:
    endpoints = naming.endpoint("")
    asked = [one for one in held if one.queue.startswith(endpoints) or one.label == UNANSWERED]
    tokens = [one for one in held if one not in asked and one.label != TIMEOUT]
    waits = [one for one in gathers if one.need is not None and one.key.startswith(WAITING_GATHER_PREFIXES)]
    joins = [one for one in gathers if one.need is not None and one.key != TIMEOUT and one not in waits]
    number = sum(one.number for one in tokens) + len(waits)
    for wait in waits:
        if wait.key.startswith("reply:") and not wait.has_deadline and not asked:
            what = f"it waits for a reply ({wait.key}) without a deadline, but the request is in no queue"
            return ERROR, "carrier", what, "stageflow instances cancel {id}"
    if len(joins) > 1:
        what = f"two of its stages wait for branches or items at once: {', '.join(one.key for one in joins)}"
        return ERROR, "carrier", what, RESTORE
    if joins:
        return _of_join(joins[0], tokens, number)
    if number == 1:
        return None
    if number == 0:
        early = [one.key for one in gathers if one.need is None and one.arrived]
        unused = f"; {', '.join(early)} has arrived, but no stage waits for it yet" if early else ""
        what = f"nothing continues it: no message, gather or timer{unused}"
        return ERROR, "carrier", what, RESTORE
    keys = f"; it waits at {', '.join(one.key for one in waits)}" if waits else ""
    what = f"{number} messages or gathers continue it, and there must be one{_in(tokens)}{keys}"
    return ERROR, "carrier", what, "stageflow instances show {id}; " + RESTORE


def _of_join(join: GatherState, tokens: Sequence[MessageCount], number: int) -> _Wrong | None:
    """Check that each branch or item that a join waits for is in work once.

    The unpublished items of a map stage are in one message.
    """
    assert join.need is not None
    missing = join.need - join.arrived
    unsplit = sum(one.number for one in tokens if one.queue == join.queue and one.label == join.key)
    if missing <= 0:
        return ERROR, "carrier", f"stage {join.key} waits, although all its branches or items have arrived", RESTORE
    if unsplit == 1 and number - 1 < missing:
        return None
    if unsplit == 0 and number == missing:
        return None
    parts = f"stage {join.key} waits for {missing} more of its {join.need} branches or items, and {number} are in work"
    if unsplit == 0 and number < missing:
        return ERROR, "carrier", f"{parts}: it will never continue", RESTORE
    return ERROR, "carrier", f"{parts}: some are in work twice{_in(tokens)}", RESTORE


def lease_findings(audit: Mapping[str, Any], alive: Callable[[int], bool]) -> Iterator[Finding]:
    """Check that no lease is held by a dead process; `alive` returns True for the pid of a live one."""
    for session in audit["sessions"]:
        if not session["held"] or alive(session["pid"]):
            continue
        who = f"{session['name'] or session['role']} (pid {session['pid']})"
        what = (
            f"it holds {pluralize(session['held'], 'message')} of {', '.join(session['queues'])}, but its process has "
            "ended and the broker was not notified: no other worker receives them"
        )
        yield Finding(ERROR, "lease", who, what, "restart the cluster: messages without a holder are delivered again")
    for queue, peers in audit["awaited"].items():
        what = f"it delivers nothing until {pluralize(peers, 'worker')} reported their messages, or are confirmed dead"
        yield Finding(WARNING, "lease", queue, what, "stageflow health; restart the cluster if this does not change")


def broker_findings(audit: Mapping[str, Any]) -> Iterator[Finding]:
    """Report the contradictions that the broker found in its own state."""
    for fault in audit["faults"]:
        advice = "restart the cluster: the broker rebuilds its state from the journal; report this as a bug"
        yield Finding(ERROR, "books", "broker", fault, advice)


def consumed_queues(plans: Iterable[WorkflowPlan], naming: Naming) -> set[str]:
    """Return the queues that a cluster with these workflows consumes."""
    names = {naming.finished, naming.coordinator}
    for plan in plans:
        names.update(stage.queue for stage in plan.stages if stage.has_pool)
        names.add(plan.compensation.queue)
    return names


def queue_findings(
    audit: Mapping[str, Any], consumed: Collection[str] | None, naming: Naming, live: bool
) -> Iterator[Finding]:
    """Report queues that no worker consumes, and queues that are paused, have dead letters or an open breaker.

    `consumed` are the queues of the registered workflows, None if unknown. `live`: a cluster is running.
    """
    orphaned = []
    for queue in audit["queues"]:
        name = queue["name"]
        waiting = queue["ready"] + queue["delayed"]
        if waiting and not _is_consumed(queue, consumed, naming, live):
            orphaned.append(f"{name} ({waiting})")
        if queue["state"] == "paused":
            what = f"it is paused and holds {pluralize(waiting, 'message')}" if waiting else "it is paused"
            yield Finding(INFO, "paused", name, what, f"stageflow queue resume {name}")
        if queue["dead"]:
            letters = (
                f"{queue['dead']} dead letters: parked instances, or evidence of messages that ended their workers"
            )
            yield Finding(INFO, "dead letters", f"{DLQ_PREFIX}{name}", letters, f"stageflow dlq list --queue {name}")
        if queue["breaker"] not in ("", "closed"):
            what = f"its circuit breaker is {queue['breaker']}, with {pluralize(waiting, 'message')} waiting"
            advice = "nothing: it closes automatically after a success; see `stageflow queue stats`"
            yield Finding(INFO, "breaker", name, what, advice)
    if orphaned:
        others = len(orphaned) - MAX_LISTED_QUEUES
        shown = ", ".join(orphaned[:MAX_LISTED_QUEUES]) + (f" and {others} more" if others > 0 else "")
        whose = "of the running cluster" if live else "of the last run"
        advice = "register the workflow and version that the queues belong to: Runtime(workflow, ...)"
        yield Finding(WARNING, "unserved", shown, f"messages wait in queues that no workflow {whose} consumes", advice)


def _is_consumed(queue: Mapping[str, Any], consumed: Collection[str] | None, naming: Naming, live: bool) -> bool:
    if queue["consumers"] or consumed is None or queue["name"] in consumed:
        return True
    # Endpoints are not part of a workflow, so the endpoints of the next start are unknown while no cluster runs.
    return not live and queue["name"].startswith(naming.endpoint(""))


def _in(held: Sequence[MessageCount]) -> str:
    if not held:
        return ""
    shown = held[:MAX_LISTED_QUEUES]
    places = [f"{one.queue}{f' × {one.number}' if one.number > 1 else ''} ({one.state})" for one in shown]
    return f" (in {', '.join(places)})"


def _named(count: int, ids: Sequence[str]) -> str:
    shown = ", ".join(ids[:MAX_NAMED_INSTANCES])
    return shown if count <= MAX_NAMED_INSTANCES else f"{shown} and {count - MAX_NAMED_INSTANCES} more"
