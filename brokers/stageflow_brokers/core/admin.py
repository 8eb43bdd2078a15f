"""The queries of the broker: named operations with typed arguments.

Each is answered with plain data. Publishing, settling and checkpoints are no queries, because they must be fast. A
query that changes state must record the change; its answer is then sent only after the record is durable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec

from stageflow_brokers.core import records
from stageflow_brokers.core.audit import Audit
from stageflow_brokers.core.gathers import GatherManager
from stageflow_brokers.core.inspector import DLQ_PREFIX, Inspector, find_queue
from stageflow_brokers.core.leases import Leases
from stageflow_brokers.core.limits import LimitChecker
from stageflow_brokers.core.message import DELAYED, LEASED, PARKED, READY, Message, RecordLocation
from stageflow_brokers.core.publish import PublishHandler
from stageflow_brokers.core.queue import Queue
from stageflow_brokers.core.record_writer import RecordWriter
from stageflow_brokers.core.sessions import Session
from stageflow_brokers.core.settle import SettleHandler
from stageflow_brokers.core.state import BrokerState
from stageflow_brokers.core.supervision import Supervision
from stageflow_brokers.core.watches import Watches
from stageflow_brokers.core.wire import MAX_NUMBER, check_consume
from stageflow_brokers.errors import ProtocolError, Refused
from stageflow_brokers.types import MAX_NAME_CHARS, Failure, Name, QueueOptions, Text

__all__ = ["Admin", "Status"]


MAX_NOTICE_BYTES = 64 << 10
"""Limit of bytes of a notice that is passed on to the supervisor."""

_T = TypeVar("_T")
_ShortList = Annotated[list[_T], msgspec.Meta(max_length=10_000)]
"""A list with which each live group may be compared, and which is therefore shorter than other lists."""


class Status:
    """Figures of one broker that are not part of its state.

    Attributes:
        malformed_frames: Number of frames that could not be decoded.
        compacting: True from the request for a compaction until the engine has ended it.
    """

    __slots__ = ("compacting", "malformed_frames")

    def __init__(self) -> None:
        self.malformed_frames = 0
        self.compacting = False


class Admin:
    """Answers the queries of one machine.

    `close_session` ends the session of a peer that disconnects with `bye`.
    """

    def __init__(
        self,
        state: BrokerState,
        writer: RecordWriter,
        *,
        limit_checker: LimitChecker,
        leases: Leases,
        gather_manager: GatherManager,
        publish_handler: PublishHandler,
        settle_handler: SettleHandler,
        supervision: Supervision,
        watches: Watches,
        status: Status,
        close_session: Callable[[Session], None],
    ) -> None:
        self._state = state
        self._writer = writer
        self._limit_checker = limit_checker
        self._leases = leases
        self._gather_manager = gather_manager
        self._publish_handler = publish_handler
        self._settle_handler = settle_handler
        self._supervision = supervision
        self._watches = watches
        self._status = status
        self._close_session = close_session
        inspector = self._inspector = Inspector(state, writer, leases)
        self._queries: dict[str, tuple[Any, Callable[..., Any]]] = {
            "consume": (tuple[Name, int], self._consume),
            "watch": (tuple[list[Name]], self._watch),
            "subscribe": (tuple[bool], watches.subscribe),
            "lookup": (tuple[list[Name]], self._lookup),
            "inspect": (tuple[list[Name]], self._inspect),
            "groups": (tuple[Name, int], inspector.groups),
            "live": (tuple[()], inspector.live),
            "tally": (tuple[_ShortList[Name], _ShortList[bytes], _ShortList[int]], inspector.tally),
            "audit": (tuple[()], Audit(state, leases, inspector).audit),
            "progress": (tuple[int, int, bytes], inspector.progress),
            "declare": (tuple[list[QueueOptions]], self._declare),
            "stats": (tuple[Name], self._stats),
            "peek": (tuple[Name, int, int], inspector.peek),
            "pause": (tuple[Name], self._pause),
            "resume": (tuple[Name], self._resume),
            "requeue": (tuple[Name, list[int]], self._requeue),
            "purge": (tuple[Name, list[int]], self._purge),
            "raise-epoch": (tuple[Name, int, Name, Name], self._raise_epoch),
            "cancel": (tuple[Name, Text, list[Name]], self._cancel),
            "hand-over": (tuple[Name, list[int], Name, Name], self._hand_over),
            "replace": (tuple[Name, int, bytes], self._replace),
            "restart": (tuple[Name, Name, Name, bytes], self._restart),
            "dead": (tuple[int, int | list[int], bool, bool, Failure], supervision.report_death),
            "roster": (tuple[list[tuple[int, list[Name]]]], supervision.set_workers),
            "hold": (tuple[bool], supervision.suspend_delivery),
            "leave": (tuple[list[Name]], supervision.close_groups),
            "recall": (tuple[int], supervision.recall),
            "retire": (tuple[int], supervision.retire),
            "starts": (tuple[list[tuple[Name, bool, Text, float]]], supervision.report_starts),
            "tell": (tuple[Name, Any], supervision.notify_supervisor),
            "fact": (tuple[Name, str | None], self._fact),
            "bye": (tuple[()], self._bye),
            "compact": (tuple[bool], self._compact),
            "ping": (tuple[()], self._ping),
        }

    def call(self, session: Session, name: str, args: msgspec.Raw) -> Any:
        """Answer one query.

        Raise `ProtocolError` if its name or arguments are invalid, `Refused` if it cannot be done.
        """
        query = self._queries.get(name)
        if query is None:
            raise ProtocolError(f"unknown query {name[:40]!r}")
        kind, method = query
        if name == "tell" and len(args) > MAX_NOTICE_BYTES:
            raise Refused(f"tell: a notice of {len(args)} bytes is over the limit of {MAX_NOTICE_BYTES}")
        try:
            values = msgspec.msgpack.decode(args, type=kind)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise ProtocolError(f"query {name}: {error}") from None
        return method(session, *values)

    # consumers

    def _consume(self, session: Session, queue: str, prefetch: int) -> None:
        check_consume(queue, prefetch)
        self._limit_checker.check_queues((queue,))
        self._leases.consume(session, queue, prefetch)

    # groups

    def _watch(self, session: Session, ids: list[str]) -> list[str]:
        self._limit_checker.check_lookup(ids)
        return self._watches.watch(session, ids)

    def _lookup(self, session: Session, ids: list[str]) -> dict[str, Any]:
        self._limit_checker.check_lookup(ids)
        return self._inspector.lookup(session, ids)

    def _inspect(self, session: Session, ids: list[str]) -> dict[str, Any]:
        self._limit_checker.check_lookup(ids, bodies=True)
        return self._inspector.inspect(session, ids)

    def _bye(self, session: Session) -> None:
        """End the session of a peer.

        With a supervisor, messages that it still holds wait until its death is reported.
        """
        self._close_session(session)

    # the broker as a whole

    def _stats(self, session: Session, prefix: str) -> dict[str, Any]:
        state = self._state
        return {
            "epoch": state.epoch,
            "queues": self._inspector.queues(prefix),
            "messages": len(state.messages),
            "groups": len(state.groups),
            "sessions": sum(1 for s in state.sessions.values() if s.connected),
            "live_bytes": state.live_bytes,
            "left_seq": state.closed_sequence,
            "malformed": self._status.malformed_frames,
            "refusing": self._publish_handler.refusal_reason,
        }

    def _fact(self, session: Session, name: str, value: str | None) -> str | None:
        """Set a fact if `value` is given; return its value."""
        facts = self._state.facts
        if value is not None and facts.get(name) != value:
            limits = self._limit_checker.limits
            if name not in facts and len(facts) >= limits.max_facts:
                raise Refused(f"{len(facts)} facts are stored, and max_facts is {limits.max_facts}")
            self._limit_checker.check_body(value.encode())
            size = self._state.fact_bytes + len(value)
            if size > limits.max_facts_bytes:
                raise Refused(f"the facts would have {size} bytes, and max_facts_bytes is {limits.max_facts_bytes}")
            self._state.set_fact(name, value)
            self._writer.record(records.FACT, 0, records.encode((name, value)))
        return facts.get(name)

    def _compact(self, session: Session, begin: bool) -> bool:
        """Begin a compaction if `begin`, even for little space.

        Return True until it has ended.
        """
        if begin:
            self._status.compacting = True
        return self._status.compacting

    def _ping(self, session: Session) -> dict[str, Any]:
        return {"epoch": self._state.epoch, "open": self._leases.workers_known}

    # changing queues

    def _declare(self, session: Session, options: list[QueueOptions]) -> None:
        for option in options:
            if not option.name or option.name.startswith(DLQ_PREFIX):
                raise ProtocolError(
                    f"declare: {option.name!r} is no queue name: it must not be empty or begin with {DLQ_PREFIX!r}"
                )
            if max(len(option.name), len(option.notify_queue), len(option.notify_label)) > MAX_NAME_CHARS:
                raise ProtocolError(
                    f"declare: {option.name[:40]!r}…: a name may have at most {MAX_NAME_CHARS} characters"
                )
            if option.breaker_failures < 0 or not 0 <= option.breaker_reset < float("inf"):
                raise ProtocolError("declare: breaker_failures and breaker_reset must be finite and not negative")
        self._limit_checker.check_queues([option.name for option in options])
        for option in options:
            queue = self._state.queue(option.name)
            queue.owner = session
            if queue.options != option:
                self._state.declare(option)
                self._state.changed_queues[queue] = None
                self._writer.record_queue(queue)

    def _pause(self, session: Session, name: str) -> None:
        self._set_paused(name, True)

    def _resume(self, session: Session, name: str) -> None:
        self._set_paused(name, False)

    def _set_paused(self, name: str, paused: bool) -> None:
        queue, dead = find_queue(self._state, name)
        if dead:
            raise Refused(f"{name} holds dead letters, which are not delivered: pause {queue.name} instead")
        self._state.pause_changes[queue.name] = paused
        if paused:
            self._leases.recalls.recall_all(queue)
        if queue.paused != paused:
            queue.paused = paused
            self._writer.record_queue(queue)
            self._state.changed_queues[queue] = None

    def _requeue(self, session: Session, name: str, ids: list[int]) -> dict[str, Any]:
        queue, _ = find_queue(self._state, name)
        chosen = self._dead_letters(queue, ids)
        refused = [m.id for m in chosen if m.delivery_state is not None and m.delivery_state.evidence]
        if refused and ids:
            raise Refused(
                f"dead letter {refused[0]} of {queue.name} is evidence: its instance continued without it "
                "(it was compensated, or the stage was optional); start the instance again instead"
            )
        evidence = set(refused)
        requeued = [message for message in chosen if message.id not in evidence]
        for message in requeued:
            self._requeue_message(message)
        answer = {"requeued": len(requeued), "refused": refused}
        session.keep_answer(session.received_frame, answer)
        return answer

    def _requeue_message(self, message: Message) -> None:
        queue = message.queue
        del queue.dead_letters[message.id]
        delivery_state = message.ensure_delivery_state()
        delivery_state.parked, delivery_state.parked_wall, delivery_state.reason = False, 0.0, None
        delivery_state.attempts = delivery_state.deaths = 0
        delivery_state.failure, delivery_state.fresh = None, False
        delivery_state.expires = delivery_state.expires_wall = 0.0
        self._writer.record_message_state(message)
        self._state.enqueue(message)
        self._state.changed_queues[queue] = None

    def _dead_letters(self, queue: Queue, ids: list[int]) -> list[Message]:
        if not ids:
            return list(queue.dead_letters.values())
        missing = [id for id in ids if id not in queue.dead_letters]
        if missing:
            raise Refused(f"no dead letter {missing[0]} in {DLQ_PREFIX}{queue.name}")
        return [queue.dead_letters[id] for id in dict.fromkeys(ids)]

    def _purge(self, session: Session, name: str, ids: list[int]) -> dict[str, Any]:
        queue, dead = find_queue(self._state, name)
        if dead:
            chosen = self._dead_letters(queue, ids)
        else:
            selected = set(ids)
            chosen = [message for message in queue.iterate_ready() if not selected or message.id in selected]
        for message in chosen:
            self._state.remove(message)
        if chosen:
            self._writer.record(records.FORGET, 0, records.encode((0, [message.id for message in chosen])))
        groups = {group.id: group for message in chosen if (group := message.group) is not None}
        self._settle_handler.close_idle_groups(list(groups.values()))
        ended = [id for id, group in groups.items() if self._state.groups.get(id) is not group]
        answer = {"purged": len(chosen), "instances": ended}
        session.keep_answer(session.received_frame, answer)
        return answer

    # epochs

    def _raise_epoch(self, session: Session, id: str, epoch: int, queue: str, label: str) -> dict[str, Any]:
        """Raise the epoch of a group.

        Messages of earlier epochs go to (queue, label).

        A repeated request with the same epoch changes nothing. A group that has ended keeps its epoch; the answer has
        the label of its end.
        """
        group = self._state.groups.get(id)
        if group is None:
            raise Refused(f"{id} is not live")
        if not queue or not 0 <= epoch < MAX_NUMBER:
            raise ProtocolError("raise-epoch: needs a valid epoch, and a queue for messages of earlier epochs")
        self._limit_checker.check_queues((queue,))
        if epoch > group.epoch and not group.end_label:
            group.epoch = epoch
            group.divert_to = (queue, label)
            self._writer.record_group(group)
            for message in group.messages():
                if message.is_stale_epoch and message.state() != LEASED:
                    self._leases.divert(self._state.replace(message))
            self._gather_manager.divert_stale_gathers(group)
        leased = [message.id for message in group.messages() if message.state() == LEASED]
        return {"epoch": group.epoch, "leased": leased, "ended": group.end_label}

    def _cancel(self, session: Session, id: str, reason: str, prefixes: list[str]) -> dict[str, Any]:
        """Cancel a group.

        Raise its epoch, and let consumers pass its messages through.

        Its messages of earlier epochs stay in their queues, and their consumers do no work for them. No message waits
        any longer: delayed and parked ones become ready, and the open gathers whose key begins with one of `prefixes`
        publish the arrivals that they have. A message that fails to be passed through is parked again, until it is
        requeued. A repeated cancel changes nothing, and neither does one of a group that has ended.
        """
        group = self._state.groups.get(id)
        if group is None:
            raise Refused(f"{id} is not live")
        if group.cancelled is None and not group.end_label:
            group.cancelled = reason
            group.released_prefixes = tuple(prefixes)
            group.cancel_lease = self._state.next_lease
            group.epoch += 1
            self._writer.record_group(group)
            for message in group.messages():
                state = message.state()
                if state == READY and message.queue.breaker is not None:
                    self._state.enqueue(self._state.replace(message))
                    self._state.changed_queues[message.queue] = None
                elif state in (DELAYED, PARKED):
                    replaced = self._state.replace(message)
                    delivery_state = replaced.ensure_delivery_state()
                    delivery_state.due = delivery_state.due_wall = delivery_state.delay = 0.0
                    delivery_state.parked, delivery_state.parked_wall, delivery_state.reason = False, 0.0, None
                    self._writer.record_message_state(replaced)
                    self._state.enqueue(replaced)
                    self._state.changed_queues[replaced.queue] = None
            self._gather_manager.publish_released(group)
            self._supervision.announce_cancel(group)
        return {"epoch": group.epoch, "ended": group.end_label, "reason": group.cancelled}

    def _hand_over(self, session: Session, id: str, ids: list[int], queue: str, label: str) -> int:
        """Move ready messages of a cancelled group to `queue`.

        Return how many were moved.

        The consumers of `queue` pass them through instead of those of their own queue, which may be busy for a long
        time. Leased and gathered messages stay.
        """
        state, leases = self._state, self._leases
        group = state.groups.get(id)
        if group is None:
            raise Refused(f"{id} is not live")
        if not queue:
            raise ProtocolError("hand-over: needs the name of a queue")
        self._limit_checker.check_queues((queue,))
        count = 0
        for message_id in dict.fromkeys(ids):
            message = state.messages.get(message_id)
            if message is None or message.group is not group or not message.is_cancelled or message.state() != READY:
                continue
            gathered = message.delivery_state is not None and message.delivery_state.parts is not None
            # After a restart a worker may hold the message and not have reported its leases yet.
            if not gathered and leases.workers_known and not message.queue.awaited_peers:
                leases.move(state.replace(message), queue, label)
                count += 1
        session.keep_answer(session.received_frame, count)
        return count

    def _replace(self, session: Session, name: str, id: int, body: bytes) -> dict[str, Any]:
        """Replace the body of a dead letter, or the base of a gathered one.

        It stays a dead letter.
        """
        queue, _ = find_queue(self._state, name)
        message = queue.dead_letters.get(id)
        if message is None:
            raise Refused(f"no dead letter {id} in {DLQ_PREFIX}{queue.name}")
        delivery_state = message.ensure_delivery_state()
        if delivery_state.evidence:
            raise Refused(f"dead letter {id} of {queue.name} is evidence and cannot be changed")
        self._limit_checker.check_body(body)
        if delivery_state.parts is not None:
            (_, size), *arrived = delivery_state.parts
            delivery_state.parts = [("", len(body)), *arrived]
            body += self._writer.body(message)[size:]
        self._state.live_bytes += len(body) - message.size
        message.body, message.size = body, len(body)
        self._writer.record_message(message)
        answer = {"epoch": message.epoch}
        session.keep_answer(session.received_frame, answer)
        return answer

    def _restart(self, session: Session, id: str, queue: str, label: str, body: bytes) -> dict[str, Any]:
        """Restart a parked group in the next epoch, with this one message.

        Its messages are removed. Of its gathers only the arrivals at those that are not open stay.
        """
        state = self._state
        group = state.groups.get(id)
        if group is None:
            raise Refused(f"{id} is not live")
        messages = group.messages()
        if group.end_label or not any(message.state() == PARKED for message in messages):
            raise Refused(f"{id} is not parked")
        working = [message for message in messages if message.state() == LEASED]
        if working:
            raise Refused(f"{id} is in work in {working[0].queue.name}: wait until that ends, or cancel it")
        self._limit_checker.check_queues((queue,))
        self._limit_checker.check_body(body)
        for message in messages:
            state.remove(message)
        self._writer.record(records.FORGET, 0, records.encode((0, [message.id for message in messages])))
        group.epoch += 1
        group.cancelled, group.released_prefixes = None, ()
        self._writer.record_group(group)
        for gather in (group.gathers or {}).values():
            state.live_bytes -= gather.weight
            gather.reset()
            state.live_bytes += gather.weight
            self._writer.record_gather(group, gather)
        target = state.queue(queue)
        first = state.put(target, group, group.epoch, label, 0, body, len(body), RecordLocation(state.wall), 0)
        self._writer.record_message(first)
        state.enqueue(first)
        state.changed_queues[target] = None
        answer = {"epoch": group.epoch}
        session.keep_answer(session.received_frame, answer)
        return answer
