"""What must hold in a cluster, judged from the broker's audit: one carrier for each instance, no lease without a peer.

The broker tells instances apart by shape and knows nothing of workflows; what a shape means is said here. Pure: the
audit and whatever else is asked for is handed in.
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
"""Most instances that one finding names."""

MAX_LISTED_QUEUES = 20
"""A list of queues ends here."""

WAITING_GATHER_PREFIXES = ("signal:", "reply:", "moved:")
"""How the keys of gathers begin that carry an instance on by themselves. All others join what is in work."""

RESTORE = (
    "restore the directory from a backup, or start the instance anew under another id once you know what it has done "
    "(`stageflow instances show {id}`)"
)


class Finding(NamedTuple):
    """One thing that was found. `check` is the invariant, `where` what it is about, `advice` what to do: a command to
    type, where there is one. Only an error breaks an invariant."""

    severity: str
    check: str
    where: str
    what: str
    advice: str = ""


class MessageCount(NamedTuple):
    """Messages of one kind that an instance has."""

    queue: str
    label: str
    state: str
    number: int


class GatherState(NamedTuple):
    """A gather of an instance; `need` is None where nobody waits for what has arrived."""

    key: str
    need: int | None
    arrived: int
    queue: str
    bounded: bool


def instance_findings(audit: Mapping[str, Any], naming: Naming) -> Iterator[Finding]:
    """Each live instance has exactly one message, gather or timer that carries it on, or one for each piece of it that
    is in work; one that has ended has the event that tells the history."""
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
        what = f"it has ended, and {pluralize(number, 'message') if number else 'no message'} for the history" + _in(
            held
        )
        return ERROR, "carrier", what, RESTORE
    if events[0].state == "dead":
        what = f"it has ended, and the message that tells the history is a dead letter of {events[0].queue}"
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
        if wait.key.startswith("reply:") and not wait.bounded and not asked:
            what = f"it waits for a reply ({wait.key}) to a request that is in no queue, and without a deadline"
            return ERROR, "carrier", what, "stageflow instances cancel {id}"
    if len(joins) > 1:
        what = f"two stages of it wait for their pieces at once: {', '.join(one.key for one in joins)}"
        return ERROR, "carrier", what, RESTORE
    if joins:
        return _of_join(joins[0], tokens, number)
    if number == 1:
        return None
    if number == 0:
        early = [one.key for one in gathers if one.need is None and one.arrived]
        beside = f"; beside it there is {', '.join(early)}, which nobody has asked for yet" if early else ""
        what = f"nothing carries it on: no message, gather or timer{beside}"
        return ERROR, "carrier", what, RESTORE
    keys = f"; it waits at {', '.join(one.key for one in waits)}" if waits else ""
    what = f"{number} messages or gathers carry it on, where there must be one{_in(tokens)}{keys}"
    return ERROR, "carrier", what, "stageflow instances show {id}; " + RESTORE


def _of_join(join: GatherState, tokens: Sequence[MessageCount], number: int) -> _Wrong | None:
    """Of the pieces that a join waits for each is in work once; of a map stage some may still be in one message."""
    assert join.need is not None
    missing = join.need - join.arrived
    unsplit = sum(one.number for one in tokens if one.queue == join.queue and one.label == join.key)
    if missing <= 0:
        return ERROR, "carrier", f"all that stage {join.key} waits for has arrived, and it waits", RESTORE
    if unsplit == 1 and number - 1 < missing:
        return None
    if unsplit == 0 and number == missing:
        return None
    pieces = f"stage {join.key} waits for {missing} more of its {join.need} pieces, and {number} are in work"
    if unsplit == 0 and number < missing:
        return ERROR, "carrier", f"{pieces}: it will never go on", RESTORE
    return ERROR, "carrier", f"{pieces}: some are in work twice{_in(tokens)}", RESTORE


def lease_findings(audit: Mapping[str, Any], alive: Callable[[int], bool]) -> Iterator[Finding]:
    """No lease without a live peer. `alive` tells whether a process, known by its id, lives."""
    for session in audit["sessions"]:
        if not session["held"] or alive(session["pid"]):
            continue
        who = f"{session['name'] or session['role']} (pid {session['pid']})"
        what = (
            f"it holds {pluralize(session['held'], 'message')} of {', '.join(session['queues'])}, and its process has "
            "ended without the broker being told: nobody else is given them"
        )
        yield Finding(ERROR, "lease", who, what, "restart the cluster: what nobody claims is delivered again")
    for queue, peers in audit["awaited"].items():
        what = (
            f"it delivers nothing until {pluralize(peers, 'worker')} announced what they hold, or are known to be dead"
        )
        yield Finding(WARNING, "lease", queue, what, "stageflow health; restart the cluster if it stays so")


def broker_findings(audit: Mapping[str, Any]) -> Iterator[Finding]:
    """The broker's own books agree."""
    for fault in audit["faults"]:
        advice = "restart the cluster: the broker reads its state anew from the journal; report it as a bug"
        yield Finding(ERROR, "books", "broker", fault, advice)


def consumed_queues(plans: Iterable[WorkflowPlan], naming: Naming) -> set[str]:
    """The queues that somebody takes messages from when these workflows are served."""
    names = {naming.finished, naming.coordinator}
    for plan in plans:
        names.update(stage.queue for stage in plan.stages if stage.has_pool)
        names.add(plan.compensation.queue)
    return names


def queue_findings(
    audit: Mapping[str, Any], served: Collection[str] | None, naming: Naming, live: bool
) -> Iterator[Finding]:
    """Messages where nobody serves, and what stands still because somebody wanted it so.

    `served` are the queues of the registered workflows, None where that is not known. `live`: a cluster runs.
    """
    unserved = []
    for queue in audit["queues"]:
        name = queue["name"]
        waiting = queue["ready"] + queue["delayed"]
        if waiting and not _is_served(queue, served, naming, live):
            unserved.append(f"{name} ({waiting})")
        if queue["state"] == "paused":
            what = f"it is paused and holds {pluralize(waiting, 'message')}" if waiting else "it is paused"
            yield Finding(INFO, "paused", name, what, f"stageflow queue resume {name}")
        if queue["dead"]:
            letters = f"{queue['dead']} dead letters: parked instances, or evidence of what killed its workers"
            yield Finding(INFO, "dead letters", f"{DLQ_PREFIX}{name}", letters, f"stageflow dlq list --queue {name}")
        if queue["breaker"] not in ("", "closed"):
            what = f"its circuit breaker is {queue['breaker']}, with {pluralize(waiting, 'message')} waiting"
            yield Finding(INFO, "breaker", name, what, "nothing: it tries again by itself; `stageflow queue stats`")
    if unserved:
        shown = ", ".join(unserved[:MAX_LISTED_QUEUES]) + (
            f" and {len(unserved) - MAX_LISTED_QUEUES} more" if len(unserved) > MAX_LISTED_QUEUES else ""
        )
        whose = "that runs" if live else "that ran last"
        advice = "register the workflow (and version) that they belong to, as in Runtime(workflow, ...)"
        yield Finding(WARNING, "unserved", shown, f"messages wait in queues that no workflow {whose} serves", advice)


def _is_served(queue: Mapping[str, Any], served: Collection[str] | None, naming: Naming, live: bool) -> bool:
    if queue["consumers"] or served is None or queue["name"] in served:
        return True
    # Endpoints are no part of a workflow: of a cluster at rest nobody knows which ones it will have.
    return not live and queue["name"].startswith(naming.endpoint(""))


def _in(held: Sequence[MessageCount]) -> str:
    if not held:
        return ""
    places = [
        f"{one.queue}{f' × {one.number}' if one.number > 1 else ''} ({one.state})" for one in held[:MAX_LISTED_QUEUES]
    ]
    return f" (in {', '.join(places)})"


def _named(count: int, ids: Sequence[str]) -> str:
    shown = ", ".join(ids[:MAX_NAMED_INSTANCES])
    return shown if count <= MAX_NAMED_INSTANCES else f"{shown} and {count - MAX_NAMED_INSTANCES} more"
