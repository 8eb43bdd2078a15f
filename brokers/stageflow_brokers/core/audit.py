"""An audit: a summary of the broker's state, and its contradictions.

It is consistent, because it is taken between two frames, and small enough for one answer: groups of the same shape
(the same kinds of messages and gathers) are counted together. The caller judges the shapes. This module must not change
the state, and must not depend on workflows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from stageflow_brokers.core.inspector import Inspector
from stageflow_brokers.core.leases import Leases
from stageflow_brokers.core.message import DELAYED, LEASED, PARKED, READY, Group, Message
from stageflow_brokers.core.queue import Queue
from stageflow_brokers.core.sessions import Session
from stageflow_brokers.core.state import DETACHED, BrokerState
from stageflow_brokers.core.wire import FIRST_EPOCH

__all__ = ["Audit", "contradictions"]

MAX_SHOWN_IDS = 20
"""Limit of ids that are listed for one shape."""

MAX_SHOWN_FAULTS = 100
"""Limit of contradictions that one audit lists."""

_NUMBER = re.compile(r":\d+$")
"""A number at the end of a gather's key. It is left out of shapes, so that gathers of one kind have one shape."""


class Audit:
    """Makes the audits of one machine."""

    def __init__(self, state: BrokerState, leases: Leases, inspector: Inspector) -> None:
        self._state = state
        self._leases = leases
        self._inspector = inspector

    def audit(self, session: Session) -> dict[str, Any]:
        """Return the audit as a dict.

        `shapes`: each shape of groups with its count and the first ids. `live`: the ids of all groups that have not
        ended; `epochs`: the epochs of those that are not in the first. `sessions`: the peers, and the number of
        messages that each holds. `awaited`: queues that stay closed until peers have reported their leases, with their
        number. `faults`: contradictions of the state. An audit takes about 2 µs per message and group, during which the
        broker processes no other frame.
        """
        state = self._state
        shapes: dict[tuple[Any, ...], list[Any]] = {}
        live: list[str] = []
        epochs: dict[str, int] = {}
        for group in state.groups.values():
            entry = shapes.setdefault(_shape(group), [0, []])
            entry[0] += 1
            if entry[0] <= MAX_SHOWN_IDS:
                entry[1].append(group.id)
            if not group.end_label:
                live.append(group.id)
                if group.epoch != FIRST_EPOCH:
                    epochs[group.id] = group.epoch
        faults = []
        for fault in contradictions(state):
            faults.append(fault)
            if len(faults) >= MAX_SHOWN_FAULTS:
                break
        return {
            "epoch": state.epoch,
            "wall": state.wall,
            "messages": len(state.messages),
            "groups": len(state.groups),
            "live": live,
            "epochs": epochs,
            "shapes": [[*shape, count, ids] for shape, (count, ids) in shapes.items()],
            "sessions": [_session(session) for session in state.sessions.values()],
            "awaited": {queue.name: len(queue.awaited_peers) for queue in state.queues.values() if queue.awaited_peers},
            "rostered": self._leases.workers_known,
            "queues": self._inspector.queues(""),
            "facts": dict(state.facts),
            "faults": faults,
        }


def _shape(group: Group) -> tuple[Any, ...]:
    """Return the shape of a group: its end, messages and gathers.

    Messages are (queue, label, state, count); gathers are (key, need, arrived, queue, True with a deadline).
    """
    if group.other_messages:
        counts = Counter((m.queue.name, m.label, m.state()) for m in group.messages())
        messages = tuple(sorted((*kind, count) for kind, count in counts.items()))
    elif group.first_message is not None:
        one = group.first_message
        messages = ((one.queue.name, one.label, one.state(), 1),)
    else:
        messages = ()
    gathers: tuple[Any, ...] = ()
    if group.gathers:
        gathers = tuple(
            (_NUMBER.sub(":", g.key), g.need, len(g.arrivals), g.queue if g.need is not None else "", g.due > 0)
            for g in group.gathers.values()
            if g.need is not None or g.arrivals
        )
    return group.end_label, messages, gathers


def _session(session: Session) -> dict[str, Any]:
    return {
        "peer": session.peer,
        "name": session.name,
        "role": session.role,
        "pid": session.pid,
        "connected": session.connected,
        "held": sum(len(consumer.held) for consumer in session.consumers.values()),
        "queues": sorted(session.consumers),
    }


# contradictions


def contradictions(state: BrokerState) -> Iterator[str]:
    """Yield contradictions of a broker's state.

    There are none, unless the broker has a bug.
    """
    states: dict[Queue, Counter[str]] = {queue: Counter() for queue in state.queues.values()}
    timers = state.timers()
    grouped = size = 0
    for id, message in state.messages.items():
        message_state = message.state()
        size += message.size
        states.setdefault(message.queue, Counter())[message_state] += 1
        if message.id != id:
            yield f"message {message.id} is stored under id {id}"
        group = message.group
        evidence = message.delivery_state is not None and message.delivery_state.evidence
        if group is not None and not evidence:
            grouped += 1
            if state.groups.get(group.id) is not group:
                yield f"message {id} in {message.queue.name} belongs to {group.id}, which is not live"
        if message_state == LEASED:
            yield from _lease_faults(state, message)
        elif message.lease > 0:
            yield f"message {id} in {message.queue.name} has lease {message.lease} but no holder"
        if message_state == DELAYED:
            assert message.delivery_state is not None
            if (message.delivery_state.due, id, "", "") not in timers:
                yield f"message {id} in {message.queue.name} is delayed but has no timer"
        elif message_state == PARKED and message.queue.dead_letters.get(id) is not message:
            yield f"message {id} is not among the dead letters of {message.queue.name}"
    linked = 0
    for group in state.groups.values():
        linked += (group.first_message is not None) + len(group.other_messages or ())
        for gather in (group.gathers or {}).values():
            size += gather.weight
            if state.gathers.get((group.id, gather.key)) is not group:
                yield f"gather {gather.key} of {group.id} is not in the index of gathers"
            if gather.need is not None and gather.due and (gather.due, 0, group.id, gather.key) not in timers:
                yield f"gather {gather.key} of {group.id} has a deadline but no timer"
    if linked != grouped:
        yield f"{grouped} messages name a group, but groups have {linked} messages"
    size_of_steps = sum(0 if m.delivery_state is None else m.delivery_state.step_bytes for m in state.messages.values())
    if size_of_steps != state.step_bytes:
        yield f"all steps have {size_of_steps} bytes, but {state.step_bytes} are counted"
    if size != state.live_bytes:
        yield f"all bodies have {size} bytes, but {state.live_bytes} are counted"
    for queue, counted in states.items():
        yield from _queue_faults(state, queue, counted)


def _lease_faults(state: BrokerState, message: Message) -> Iterator[str]:
    holder = message.holder
    assert holder is not None
    where = f"message {message.id} in {message.queue.name}"
    peer = holder.session.name or holder.session.peer
    if holder is DETACHED:
        yield f"{where} was replaced, but its old object is still stored"
    elif state.sessions.get(holder.session.peer) is not holder.session:
        yield f"{where} is held by {peer}, which has no session"
    elif holder.held.get(message.id) is not message:
        yield f"{where} is held by {peer}, but is not among the messages that it holds"
    elif not message.lease:
        yield f"{where} is held by {peer} without a lease"


def _queue_faults(state: BrokerState, queue: Queue, counted: Counter[str]) -> Iterator[str]:
    figures: Iterable[tuple[str, int, int]] = (
        (READY, counted[READY], queue.ready_count),
        ("to be delivered", counted[READY], sum(1 for m in queue.iterate_ready() if _is_current(state, queue, m))),
        (LEASED, counted[LEASED], sum(len(consumer.held) for consumer in queue.consumers)),
        (DELAYED, counted[DELAYED], queue.delayed_count),
        (PARKED, counted[PARKED], len(queue.dead_letters)),
    )
    for kind, actual, counted_by_queue in figures:
        if actual != counted_by_queue:
            yield f"{queue.name} counts {counted_by_queue} messages as {kind}, but {actual} exist"


def _is_current(state: BrokerState, queue: Queue, message: Message) -> bool:
    return message.queue is queue and state.messages.get(message.id) is message
