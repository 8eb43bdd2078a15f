"""Looking: what a peer may see of queues, messages and groups. Plain data, and nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from stageflow_brokers.core.gather import Gather
from stageflow_brokers.core.leases import Leases
from stageflow_brokers.core.message import Group, Message
from stageflow_brokers.core.queue import Queue
from stageflow_brokers.core.record_writer import RecordWriter
from stageflow_brokers.core.sessions import Session
from stageflow_brokers.core.state import BrokerState
from stageflow_brokers.core.wire import MAX_NUMBER
from stageflow_brokers.errors import ProtocolError, Refused
from stageflow_brokers.types import MAX_LISTED_GROUPS

__all__ = ["DLQ_PREFIX", "Inspector", "find_queue"]

DLQ_PREFIX = "dlq."
"""Prefix under which the dead letters of a queue are named."""

MAX_PROGRESS_BYTES = 4_096
MAX_PROGRESS_REPORTS = 10_000
"""Reports of progress that are kept before those are dropped which nobody will see again."""

MAX_SHOWN_PARTS = 100
"""Most arrivals of a gather that are shown."""

HEAD_BYTES = 512
"""How much of a body a group is described with, for those who know how their bodies begin."""

MAX_HEADS = 4
"""Most bodies that do so for one group."""

MAX_ANSWER_BYTES = 64 << 20
"""Most bytes of bodies in one answer about groups; beyond them they are described without."""

MAX_PEEK_BYTES = 16 << 20
"""A list of messages leaves out the bodies beyond this many bytes."""


def find_queue(state: BrokerState, name: str) -> tuple[Queue, bool]:
    """The queue of that name, and whether its dead letters are meant. Raises `Refused` if there is none."""
    if name in state.queues:
        return state.queues[name], False
    if name.startswith(DLQ_PREFIX) and name[len(DLQ_PREFIX) :] in state.queues:
        return state.queues[name[len(DLQ_PREFIX) :]], True
    raise Refused(f"no queue is named {name!r}")


class Inspector:
    """The view into one machine."""

    def __init__(self, state: BrokerState, writer: RecordWriter, leases: Leases) -> None:
        self._state = state
        self._writer = writer
        self._leases = leases
        self._progress: dict[int, tuple[int, float, bytes]] = {}

    def progress(self, session: Session, id: int, lease: int, body: bytes) -> None:
        """How far the holder of a message is, for whoever looks: in no journal, and gone with the lease."""
        if len(body) > MAX_PROGRESS_BYTES:
            raise ProtocolError(f"progress: {len(body)} bytes, {MAX_PROGRESS_BYTES} are the most")
        if self._leases.get_held(session, id, lease) is None:
            return
        known = self._progress
        known[id] = (lease, self._state.wall, body)
        if len(known) > MAX_PROGRESS_REPORTS:
            messages = self._state.messages
            self._progress = {id: it for id, it in known.items() if id in messages and messages[id].lease == it[0]}

    def lookup(self, session: Session, ids: list[str]) -> dict[str, Any]:
        """Those of these groups that are live, and how much has left: `seen` of a submit that comes after."""
        state, budget = self._state, _BodyBudget()
        found = {id: self._group(group, budget) for id in ids if (group := state.groups.get(id)) is not None}
        return {"epoch": state.epoch, "left_seq": state.closed_sequence, "groups": found}

    def inspect(self, session: Session, ids: list[str]) -> dict[str, Any]:
        """The groups with the bodies of their messages, without those that have no room in one answer: to be looked at
        by people, a few at a time."""
        groups, budget = self._state.groups, _BodyBudget()
        return {id: self._group(group, budget, bodies=True) for id in ids if (group := groups.get(id)) is not None}

    def groups(self, session: Session, queue_prefix: str, limit: int) -> list[dict[str, Any]]:
        """Up to `limit` groups with a message in a queue whose name begins so; mostly the latest first."""
        if not 0 <= limit <= MAX_LISTED_GROUPS:
            raise Refused(f"groups: a limit from 0 to {MAX_LISTED_GROUPS:,}, not {limit}")
        found: list[dict[str, Any]] = []
        budget = _BodyBudget()
        for group in reversed(self._state.groups.values()):
            if len(found) >= limit:
                break
            if not queue_prefix or any(m.queue.name.startswith(queue_prefix) for m in group.messages()):
                found.append(self._group(group, budget))
        return found

    def live(self, session: Session) -> list[str]:
        """All groups by id, the latest last."""
        return list(self._state.groups)

    def _group(self, group: Group, budget: _BodyBudget, *, bodies: bool = False) -> dict[str, Any]:
        ended = group.end_label
        return {
            "id": group.id,
            "epoch": group.epoch,
            "digest": group.digest,
            "ended": ended,
            "heads": self._heads(group),
            "messages": [
                self._message(m, body=bool(bodies or (ended and m.label == ended)) and budget.take(_base_size(m)))
                for m in group.messages()
            ],
            "gathers": [_gather(gather, budget if bodies else None) for gather in (group.gathers or {}).values()],
        }

    def _heads(self, group: Group) -> list[bytes]:
        """How the bodies of a group begin: of what its open gathers wait with, then of its messages."""
        heads = [gather.base[:HEAD_BYTES] for gather in (group.gathers or {}).values() if gather.need is not None]
        for message in islice(group.messages(), max(0, MAX_HEADS - len(heads))):
            heads.append(self._writer.head(message, HEAD_BYTES))
        return heads[:MAX_HEADS]

    def tally(self, session: Session, shared: list[str], marks: list[bytes], at: list[int]) -> dict[str, Any]:
        """How many groups have something left that will go on, each counted once: `queues` by the queue where it is.

        Those at a `shared` queue are counted by the first of `marks` (as many numbers in the same order) that their
        body has `at` one of these places, and those with none of them not at all. Parked messages do not go on by
        themselves.
        """
        queues: dict[str, int] = {}
        counts = [0] * len(marks)
        most = max(at, default=0) + max(map(len, marks), default=0)
        common = set(shared)
        known = _MarkFinder(marks, at)
        for group in self._state.groups.values():
            if group.end_label:
                continue
            one = group.first_message
            if (
                one is not None
                and one.delivery_state is None
                and group.gathers is None
                and one.queue.name not in common
            ):
                # Nearly all are so, and there may be a million of them.
                queues[one.queue.name] = queues.get(one.queue.name, 0) + 1
                continue
            for name, head in self._waiting_heads(group, most, common):
                if name not in common:
                    queues[name] = queues.get(name, 0) + 1
                    break
                found = known.first_in(head)
                if found is not None:
                    counts[found] += 1
                    break
        return {"queues": queues, "marks": counts}

    def _waiting_heads(self, group: Group, most: int, shared: set[str]) -> Iterator[tuple[str, bytes]]:
        """Where a group waits, and how the bodies there begin where the queue is a shared one."""
        for gather in (group.gathers or {}).values():
            if gather.need is not None:
                yield gather.queue, gather.base[:most]
        for message in group.messages():
            if message.delivery_state is None or not message.delivery_state.parked:
                name = message.queue.name
                yield name, self._writer.head(message, most) if name in shared else b""

    def _message(self, message: Message, *, body: bool) -> dict[str, Any]:
        delivery_state = message.delivery_state
        described: dict[str, Any] = {
            "id": message.id,
            "queue": message.queue.name,
            "group": "" if message.group is None else message.group.id,
            "epoch": message.epoch,
            "label": message.label,
            "state": message.state(),
            "size": message.size,
            "enqueued": message.location.wall,
            "attempts": 0 if delivery_state is None else delivery_state.attempts,
            "deaths": 0 if delivery_state is None else delivery_state.deaths,
            "failure": None if delivery_state is None else delivery_state.failure,
            "due": 0.0 if delivery_state is None else delivery_state.due_wall,
            "reason": None if delivery_state is None else delivery_state.reason,
            "parked": 0.0 if delivery_state is None else delivery_state.parked_wall,
            "evidence": False if delivery_state is None else delivery_state.evidence,
            "holder": "" if message.holder is None else message.holder.session.name,
        }
        progress = self._progress.get(message.id)
        if progress is not None and message.holder is not None and progress[0] == message.lease:
            described["progress"] = progress[1:]
        if body:
            # Of what was gathered the base: what has arrived for it is of no interest one by one.
            described["base"] = _base_size(message)
            described["body"] = self._writer.head(message, described["base"])
        return described

    def queues(self, prefix: str) -> list[dict[str, Any]]:
        """The queues whose names begin so, by name, with what is in them."""
        return [self._queue(q) for name, q in sorted(self._state.queues.items()) if name.startswith(prefix)]

    def _queue(self, queue: Queue) -> dict[str, Any]:
        first = next(queue.iterate_ready(), None)
        closed = not self._leases.workers_known or bool(queue.awaited_peers)
        return {
            "name": queue.name,
            "ready": queue.ready_count,
            "leased": sum(len(consumer.held) for consumer in queue.consumers),
            "delayed": queue.delayed_count,
            "dead": len(queue.dead_letters),
            "oldest": 0.0 if first is None else max(0.0, self._state.wall - first.location.wall),
            "consumers": len(queue.consumers),
            "busy": sum(1 for consumer in queue.consumers if consumer.held),
            "delivered": queue.delivered_count,
            "settled": queue.settled_count,
            "breaker": "" if queue.breaker is None else queue.breaker.state,
            "state": "paused" if queue.paused else "closed" if closed else "open",
        }

    def peek(self, session: Session, name: str, offset: int, limit: int) -> list[dict[str, Any]]:
        """Messages of a queue that are ready, in their order, or its dead letters; bodies up to 16 MiB in all."""
        queue, dead = find_queue(self._state, name)
        if not 0 <= offset < MAX_NUMBER or not 0 <= limit <= 10_000:
            raise ProtocolError("peek: offset from 0, limit from 0 to 10,000")
        found: list[dict[str, Any]] = []
        budget = MAX_PEEK_BYTES
        for message in islice(queue.dead_letters.values() if dead else queue.iterate_ready(), offset, offset + limit):
            budget -= _base_size(message)
            found.append(self._message(message, body=budget >= 0 or not found))
        return found


class _BodyBudget:
    """How much of bodies goes into one answer."""

    def __init__(self) -> None:
        self._left = MAX_ANSWER_BYTES

    def take(self, size: int) -> bool:
        """Whether there is room for so many bytes, which are taken then."""
        if size > self._left:
            return False
        self._left -= size
        return True


def _base_size(message: Message) -> int:
    delivery_state = message.delivery_state
    return message.size if delivery_state is None or delivery_state.parts is None else delivery_state.parts[0][1]


class _MarkFinder:
    """Finds which of many marks is at one of some places, however many there are."""

    def __init__(self, marks: list[bytes], at: list[int]) -> None:
        self._at = sorted({where for where in at if where >= 0})
        self._by_length: dict[int, dict[bytes, int]] = {}
        for number, mark in enumerate(marks):
            self._by_length.setdefault(len(mark), {}).setdefault(mark, number)

    def first_in(self, head: bytes) -> int | None:
        """The number of the first mark that is there."""
        found = [
            number
            for length, numbers in self._by_length.items()
            for where in self._at
            if (number := numbers.get(head[where : where + length])) is not None
        ]
        return min(found, default=None)


def _gather(gather: Gather, budget: _BodyBudget | None) -> dict[str, Any]:
    described: dict[str, Any] = {"key": gather.key, "need": gather.need, "arrived": len(gather.arrivals)}
    if budget is not None:
        described["base"] = gather.base if budget.take(len(gather.base)) else b""
        # What was gathered of many items is of no interest one by one.
        few = len(gather.arrivals) <= MAX_SHOWN_PARTS and budget.take(gather.weight - len(gather.base))
        described["parts"] = list(gather.arrivals.values()) if few else []
        described["opened"] = gather.location.wall
    return described
