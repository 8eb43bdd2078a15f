"""The invariants of the broker's audit for leases and queues: each violation has its sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stageflow_actors.core.invariants import lease_findings, queue_findings
from stageflow_actors.core.plan import Naming
from stageflow_brokers.core.audit import contradictions
from stageflow_brokers.core.machine import Machine
from stageflow_brokers.core.message import RecordLocation
from stageflow_brokers.core.sessions import Consumer, Session


def machine() -> Machine:
    """Two ready messages and a delayed one, one leased, one dead, and a gather with a deadline, each of a group."""
    made = Machine()
    store = made.state
    made.begin(100.0, 1000.0)
    queue = store.queue("q")
    messages = []
    for name in ("ready", "later", "leased", "dead", "other"):
        place = RecordLocation(1000.0)
        group = store.group(name, 1, place)
        messages.append(store.put(queue, group, 1, "x", 0, b"body", 4, place, 0))
    ready, later, leased, dead, other = messages
    store.delay(later.ensure_delivery_state(), 5.0)
    for message in (ready, later, other):
        store.enqueue(message)
    store.park(dead, reason=None, evidence=False)
    session = store.sessions[7] = Session(7)
    session.name = "worker"
    consumer = session.consumers["q"] = Consumer(session, queue, 1)
    queue.consumers.append(consumer)
    leased.holder, leased.lease = consumer, 9
    consumer.held[leased.id] = leased
    waiting = store.group("waiting", 1, RecordLocation(1000.0))
    assert waiting is not None
    gather = store.gather(waiting, "k", RecordLocation(1000.0))
    gather.need, gather.due = 1, 200.0
    store.set_timer(200.0, 0, "waiting", "k")
    return made


def lost_from_its_lane(store: Any) -> None:
    store.queues["q"].ready.popleft()


def without_a_session(store: Any) -> None:
    del store.sessions[7]


def without_a_lease(store: Any) -> None:
    store.messages[3].lease = 0


def not_held(store: Any) -> None:
    store.sessions[7].consumers["q"].held.clear()


def lease_left_behind(store: Any) -> None:
    store.messages[1].lease = 4


def timers_lost(store: Any) -> None:
    store._timers.clear()


def group_lost(store: Any) -> None:
    del store.groups["ready"]


def counted_wrong(store: Any) -> None:
    store.queues["q"].delayed_count += 1


def buried_elsewhere(store: Any) -> None:
    store.queues["q"].dead_letters.clear()


def gather_unknown(store: Any) -> None:
    store.gathers.clear()


def bytes_astray(store: Any) -> None:
    store.live_bytes += 1


def known_by_another_number(store: Any) -> None:
    store.messages[99] = store.messages.pop(1)


def test_books_that_agree_have_no_contradictions() -> None:
    assert list(contradictions(machine().state)) == []


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (lost_from_its_lane, "q counts 1 messages as ready, but 2 exist"),
        (without_a_session, "message 3 in q is held by worker, which has no session"),
        (without_a_lease, "message 3 in q is held by worker without a lease"),
        (not_held, "message 3 in q is held by worker, but is not among the messages that it holds"),
        (lease_left_behind, "message 1 in q has lease 4 but no holder"),
        (timers_lost, "message 2 in q is delayed but has no timer"),
        (timers_lost, "gather k of waiting has a deadline but no timer"),
        (group_lost, "message 1 in q belongs to ready, which is not live"),
        (group_lost, "5 messages name a group, but groups have 4 messages"),
        (counted_wrong, "q counts 2 messages as delayed, but 1 exist"),
        (buried_elsewhere, "message 4 is not among the dead letters of q"),
        (gather_unknown, "gather k of waiting is not in the index of gathers"),
        (bytes_astray, "all bodies have 20 bytes, but 21 are counted"),
        (known_by_another_number, "message 1 is stored under id 99"),
    ],
)
def test_each_contradiction_is_reported(mistake: Callable[[Any], None], sentence: str) -> None:
    store = machine().state
    mistake(store)
    assert sentence in list(contradictions(store))


def session(**facts: Any) -> dict[str, Any]:
    plain = {"peer": 1, "name": "pay#1", "role": "worker", "pid": 41, "connected": True, "held": 1, "queues": ["q"]}
    return {**plain, **facts}


def test_a_lease_needs_a_process_that_lives() -> None:
    audit = {"sessions": [session(), session(pid=42, name="pay#2"), session(pid=42, held=0)], "awaited": {}}
    assert [one.where for one in lease_findings(audit, lambda pid: pid == 41)] == ["pay#2 (pid 42)"]
    assert list(lease_findings(audit, lambda pid: True)) == []


def test_a_queue_that_waits_for_workers_is_reported() -> None:
    found = list(lease_findings({"sessions": [], "awaited": {"q": 3}}, lambda pid: True))
    assert [(one.severity, one.where) for one in found] == [("warning", "q")]
    assert "3 workers" in found[0].what


def queue(name: str, **facts: Any) -> dict[str, Any]:
    plain = {"name": name, "ready": 0, "delayed": 0, "dead": 0, "consumers": 0, "state": "open", "breaker": ""}
    return {**plain, **facts}


@pytest.mark.parametrize(
    ("described", "live", "found"),
    [
        (queue("a"), True, []),
        (queue("served", ready=1), True, []),
        (queue("a", ready=1, consumers=1), True, []),
        (queue("a", ready=1, delayed=2), True, [("unserved", "a (3)")]),
        (queue("a", ready=1), False, [("unserved", "a (1)")]),
        (queue("stageflow.endpoint.e", ready=1), True, [("unserved", "stageflow.endpoint.e (1)")]),
        (queue("stageflow.endpoint.e", ready=1), False, []),
        (queue("served", state="paused"), True, [("paused", "served")]),
        (queue("served", dead=2), True, [("dead letters", "dlq.served")]),
        (queue("served", breaker="open"), True, [("breaker", "served")]),
        (queue("served", breaker="closed"), True, []),
    ],
)
def test_the_statistics_of_a_queue(described: dict[str, Any], live: bool, found: list[tuple[str, str]]) -> None:
    findings = queue_findings({"queues": [described]}, {"served"}, Naming(), live)
    assert [(one.check, one.where) for one in findings] == found


def test_without_a_manifest_no_message_counts_as_orphaned() -> None:
    assert list(queue_findings({"queues": [queue("a", ready=1)]}, None, Naming(), False)) == []
