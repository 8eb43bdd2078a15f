"""Describe queues, messages and groups for peers, as plain data.

This module must not change the state. The bytes of bodies in one answer are limited, because the broker holds the
whole answer in memory.
"""

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
"""Prefix of a queue name that selects the dead letters of that queue."""

MAX_PROGRESS_BYTES = 4_096
"""Limit of bytes of one progress report."""

MAX_PROGRESS_REPORTS = 10_000
"""Progress reports in memory from which on those of ended leases are dropped."""

MAX_SHOWN_PARTS = 100
"""A gather with more arrivals is described without their bodies."""

HEAD_BYTES = 512
"""Bytes of the beginning of a body in the description of a group, for callers whose bodies begin with a header."""

MAX_HEADS = 4
"""Limit of such beginnings for one group."""

MAX_ANSWER_BYTES = 64 << 20
"""Limit of bytes of bodies in one answer about groups; further messages are described without their bodies."""

MAX_PEEK_BYTES = 16 << 20
"""Limit of bytes of bodies in one answer to `peek`; further messages are described without their bodies."""


def find_queue(state: BrokerState, name: str) -> tuple[Queue, bool]:
    """Return the queue of that name, and True if its dead letters are selected.

    Raise `Refused` if there is no such queue.
    """
    if name in state.queues:
        return state.queues[name], False
    if name.startswith(DLQ_PREFIX) and name[len(DLQ_PREFIX) :] in state.queues:
        return state.queues[name[len(DLQ_PREFIX) :]], True
    raise Refused(f"no queue is named {name!r}")


class Inspector:
    """Answers the queries about one machine that change nothing."""

    def __init__(self, state: BrokerState, writer: RecordWriter, leases: Leases) -> None:
        self._state = state
        self._writer = writer
        self._leases = leases
        self._progress: dict[int, tuple[int, float, bytes]] = {}

    def progress(self, session: Session, id: int, lease: int, body: bytes) -> None:
        """Store a progress report of the holder of a message.

        It is not recorded in the journal, and ends with the lease.
        """
        if len(body) > MAX_PROGRESS_BYTES:
            raise ProtocolError(f"progress: a report of {len(body)} bytes is over the limit of {MAX_PROGRESS_BYTES}")
        if self._leases.get_held(session, id, lease) is None:
            return
        reports = self._progress
        reports[id] = (lease, self._state.wall, body)
        if len(reports) > MAX_PROGRESS_REPORTS:
            messages = self._state.messages
            self._progress = {
                id: report for id, report in reports.items() if id in messages and messages[id].lease == report[0]
            }

    def lookup(self, session: Session, ids: list[str]) -> dict[str, Any]:
        """Describe those of these groups that are live.

        The answer also has the `history_sequence` for a publish after it.
        """
        state, budget = self._state, _BodyBudget()
        found = {id: self._group(group, budget) for id in ids if (group := state.groups.get(id)) is not None}
        return {"epoch": state.epoch, "left_seq": state.closed_sequence, "groups": found}

    def inspect(self, session: Session, ids: list[str]) -> dict[str, Any]:
        """Describe those of these groups that are live, with message bodies.

        Bodies beyond `MAX_ANSWER_BYTES` are left out.
        """
        groups, budget = self._state.groups, _BodyBudget()
        return {id: self._group(group, budget, bodies=True) for id in ids if (group := groups.get(id)) is not None}

    def groups(self, session: Session, queue_prefix: str, limit: int) -> list[dict[str, Any]]:
        """Describe up to `limit` groups with a message in certain queues.

        These are the queues whose names begin with `queue_prefix`. Groups recorded last come first; these are mostly
        the latest.
        """
        if not 0 <= limit <= MAX_LISTED_GROUPS:
            raise Refused(f"groups: the limit must be from 0 to {MAX_LISTED_GROUPS:,}, not {limit}")
        found: list[dict[str, Any]] = []
        budget = _BodyBudget()
        for group in reversed(self._state.groups.values()):
            if len(found) >= limit:
                break
            if not queue_prefix or any(m.queue.name.startswith(queue_prefix) for m in group.messages()):
                found.append(self._group(group, budget))
        return found

    def live(self, session: Session) -> list[str]:
        """Return the ids of all live groups."""
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
        """Return the beginnings of open gathers' bases, then of message bodies."""
        heads = [gather.base[:HEAD_BYTES] for gather in (group.gathers or {}).values() if gather.need is not None]
        for message in islice(group.messages(), max(0, MAX_HEADS - len(heads))):
            heads.append(self._writer.head(message, HEAD_BYTES))
        return heads[:MAX_HEADS]

    def tally(self, session: Session, shared: list[str], marks: list[bytes], at: list[int]) -> dict[str, Any]:
        """Count the groups that have a message or open gather that is not parked.

        Each group is counted once, under the queue of that message or gather. At a `shared` queue it is counted under
        the first of `marks` that its body has at one of the offsets `at`; without any of them it is not counted.

        Returns:
            `queues`: the count by queue. `marks`: the counts in the order of `marks`.
        """
        queues: dict[str, int] = {}
        counts = [0] * len(marks)
        head_bytes = max(at, default=0) + max(map(len, marks), default=0)
        shared_queues = set(shared)
        finder = _MarkFinder(marks, at)
        for group in self._state.groups.values():
            if group.end_label:
                continue
            one = group.first_message
            if (
                one is not None
                and one.delivery_state is None
                and group.gathers is None
                and one.queue.name not in shared_queues
            ):
                # The fast path for nearly all groups, of which there may be a million.
                queues[one.queue.name] = queues.get(one.queue.name, 0) + 1
                continue
            for name, head in self._waiting_heads(group, head_bytes, shared_queues):
                if name not in shared_queues:
                    queues[name] = queues.get(name, 0) + 1
                    break
                found = finder.find_first(head)
                if found is not None:
                    counts[found] += 1
                    break
        return {"queues": queues, "marks": counts}

    def _waiting_heads(self, group: Group, head_bytes: int, shared: set[str]) -> Iterator[tuple[str, bytes]]:
        """Yield (queue, beginning of the body) of open gathers and messages.

        Parked messages are left out. The beginning is empty for the messages of queues that are not shared.
        """
        for gather in (group.gathers or {}).values():
            if gather.need is not None:
                yield gather.queue, gather.base[:head_bytes]
        for message in group.messages():
            if message.delivery_state is None or not message.delivery_state.parked:
                name = message.queue.name
                yield name, self._writer.head(message, head_bytes) if name in shared else b""

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
            # Of a gathered body only the base: its parts may be a million results of items.
            described["base"] = _base_size(message)
            described["body"] = self._writer.head(message, described["base"])
        return described

    def queues(self, prefix: str) -> list[dict[str, Any]]:
        """Describe the queues with this prefix, sorted by name."""
        return [self._queue(q) for name, q in sorted(self._state.queues.items()) if name.startswith(prefix)]

    def _queue(self, queue: Queue) -> dict[str, Any]:
        first = next(queue.iterate_ready(), None)
        closed = not self._leases.workers_known or bool(queue.awaited_peers)
        failing, text, next_start_at = queue.starts or (False, "", 0.0)
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
            "state": "paused" if queue.paused else "failing" if failing else "closed" if closed else "open",
            "reason": text if failing else "",
            "next_start_at": next_start_at if failing else 0.0,
            "starting": "" if failing else text,
        }

    def peek(self, session: Session, name: str, offset: int, limit: int) -> list[dict[str, Any]]:
        """Describe ready messages of a queue in their order, or its dead letters.

        Bodies beyond `MAX_PEEK_BYTES` are left out, except that of the first message.
        """
        queue, dead = find_queue(self._state, name)
        if not 0 <= offset < MAX_NUMBER or not 0 <= limit <= 10_000:
            raise ProtocolError("peek: the offset must be 0 or more, and the limit from 0 to 10,000")
        found: list[dict[str, Any]] = []
        bytes_left = MAX_PEEK_BYTES
        for message in islice(queue.dead_letters.values() if dead else queue.iterate_ready(), offset, offset + limit):
            bytes_left -= _base_size(message)
            found.append(self._message(message, body=bytes_left >= 0 or not found))
        return found


class _BodyBudget:
    """The bytes of bodies that one answer may still take."""

    def __init__(self) -> None:
        self._bytes_left = MAX_ANSWER_BYTES

    def take(self, size: int) -> bool:
        """Take `size` bytes; return False if fewer are left."""
        if size > self._bytes_left:
            return False
        self._bytes_left -= size
        return True


def _base_size(message: Message) -> int:
    delivery_state = message.delivery_state
    return message.size if delivery_state is None or delivery_state.parts is None else delivery_state.parts[0][1]


class _MarkFinder:
    """Finds which of many marks a body has at one of some offsets.

    Its time does not grow with the number of marks, only with their different lengths.
    """

    def __init__(self, marks: list[bytes], at: list[int]) -> None:
        self._offsets = sorted({offset for offset in at if offset >= 0})
        self._by_length: dict[int, dict[bytes, int]] = {}
        for number, mark in enumerate(marks):
            self._by_length.setdefault(len(mark), {}).setdefault(mark, number)

    def find_first(self, head: bytes) -> int | None:
        """Return the index of the first mark in `head`, None without one."""
        found = [
            number
            for length, numbers in self._by_length.items()
            for offset in self._offsets
            if (number := numbers.get(head[offset : offset + length])) is not None
        ]
        return min(found, default=None)


def _gather(gather: Gather, budget: _BodyBudget | None) -> dict[str, Any]:
    described: dict[str, Any] = {
        "key": gather.key,
        "need": gather.need,
        "arrived": len(gather.arrivals),
        "due": gather.due_wall,
    }
    if budget is not None:
        described["base"] = gather.base if budget.take(len(gather.base)) else b""
        # The parts of a map over many items would be a long list that is not read.
        shows_parts = len(gather.arrivals) <= MAX_SHOWN_PARTS and budget.take(gather.weight - len(gather.base))
        described["parts"] = list(gather.arrivals.values()) if shows_parts else []
        described["opened"] = gather.location.wall
    return described
