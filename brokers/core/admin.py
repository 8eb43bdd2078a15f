"""Everything a peer may ask of the broker that is not hot: named queries with typed arguments.

Each answer is plain data. What changes state is recorded like any other change, so that the answer leaves only
once it is true on disk. Only the supervisor's session may speak of deaths and rosters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from brokers.core import records
from brokers.core.message import PARKED, READY, Group, Message
from brokers.core.queue import Queue, QueueOptions
from brokers.core.sessions import Session
from brokers.errors import ProtocolError, Refused

if TYPE_CHECKING:
    from brokers.core.machine import Machine

__all__ = ["Admin"]

DLQ = "dlq."
"""Prefix under which the dead letters of a queue are named."""


class Admin:
    """The queries of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._queries: dict[str, tuple[Any, Callable[..., Any]]] = {
            "consume": (tuple[str, int], self._consume),
            "cancel": (tuple[str], self._cancel),
            "watch": (tuple[list[str]], self._watch),
            "lookup": (tuple[list[str]], self._lookup),
            "inspect": (tuple[list[str]], self._inspect),
            "groups": (tuple[str, int], self._groups),
            "declare": (tuple[list[QueueOptions]], self._declare),
            "stats": (tuple[str], self._stats),
            "peek": (tuple[str, int, int], self._peek),
            "pause": (tuple[str], self._pause),
            "resume": (tuple[str], self._resume),
            "requeue": (tuple[str, list[int]], self._requeue),
            "purge": (tuple[str, list[int]], self._purge),
            "raise-epoch": (tuple[str, int, str, str], self._raise_epoch),
            "dead": (tuple[int, int, bool, bool, bytes], self._dead),
            "roster": (tuple[list[tuple[int, list[str]]]], self._roster),
            "hold": (tuple[bool], self._hold),
            "recall": (tuple[int], self._recall),
            "fact": (tuple[str, str | None], self._fact),
            "bye": (tuple[()], self._bye),
            "ping": (tuple[()], self._ping),
        }

    def call(self, session: Session, name: str, args: msgspec.Raw, blob: bytes) -> Any:
        """Answer one query. Raises `ProtocolError` for a wrong shape, `Refused` for what cannot be done."""
        known = self._queries.get(name)
        if known is None:
            raise ProtocolError(f"unknown query {name[:40]!r}")
        kind, method = known
        try:
            values = msgspec.msgpack.decode(args, type=kind)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"query {name}: {error}") from None
        return method(session, *values)

    # consuming and watching

    def _consume(self, session: Session, queue: str, prefetch: int) -> None:
        if not queue or prefetch < 0:
            raise ProtocolError("consume: needs a queue and a prefetch of 0 or more")
        self.machine.consume(session, queue, prefetch)

    def _cancel(self, session: Session, queue: str) -> None:
        consumer = session.consumers.get(queue)
        if consumer is not None:
            consumer.prefetch = 0

    def watch(self, session: Session, ids: list[str]) -> list[str]:
        """Tell `session` how these groups end; those that are not live are returned and announced as gone."""
        machine = self.machine
        gone = []
        for id in ids:
            group = machine.store.groups.get(id)
            if group is None:
                gone.append(id)
                machine.notice(session, "gone", id)
                continue
            if group.watchers is None:
                group.watchers = [session]
            elif session not in group.watchers:
                group.watchers = [w for w in group.watchers if w.connected] + [session]
            messages = group.messages()
            if group.ended:
                for message in messages:
                    if message.label == group.ended:
                        machine.push_to(session, group, message.label, machine.body(message))
            elif messages and all(message.state() == PARKED for message in messages):
                machine.notice(session, "parked", id)
        return gone

    def _watch(self, session: Session, ids: list[str]) -> list[str]:
        return self.watch(session, ids)

    # looking

    def _lookup(self, session: Session, ids: list[str]) -> dict[str, Any]:
        store = self.machine.store
        found = {id: self._describe_group(group) for id in ids if (group := store.groups.get(id)) is not None}
        return {"epoch": store.epoch, "left_seq": store.left_seq, "groups": found}

    def _inspect(self, session: Session, ids: list[str]) -> dict[str, Any]:
        """As `lookup`, with the body of every message: to be looked at by people, a few at a time."""
        store = self.machine.store
        return {
            id: self._describe_group(group, bodies=True) for id in ids if (group := store.groups.get(id)) is not None
        }

    def _groups(self, session: Session, queue_prefix: str, limit: int) -> list[dict[str, Any]]:
        found = []
        for group in reversed(self.machine.store.groups.values()):
            if len(found) >= limit:
                break
            messages = group.messages()
            if not queue_prefix or any(message.queue.name.startswith(queue_prefix) for message in messages):
                found.append(self._describe_group(group))
        return found

    def _describe_group(self, group: Group, *, bodies: bool = False) -> dict[str, Any]:
        messages = [self._describe(message, body=bodies) for message in group.messages()]
        if group.ended:
            for described, message in zip(messages, group.messages(), strict=True):
                if message.label == group.ended:
                    described["body"] = self.machine.body(message)
        return {
            "id": group.id,
            "epoch": group.epoch,
            "digest": group.digest,
            "ended": group.ended,
            "messages": messages,
            "gathers": [
                {"key": g.key, "need": g.need, "arrived": len(g.arrivals)} for g in (group.gathers or {}).values()
            ],
        }

    def _describe(self, message: Message, *, body: bool = False) -> dict[str, Any]:
        extra = message.extra
        described: dict[str, Any] = {
            "id": message.id,
            "queue": message.queue.name,
            "group": "" if message.group is None else message.group.id,
            "epoch": message.epoch,
            "label": message.label,
            "state": message.state(),
            "size": message.size,
            "enqueued": message.place.wall,
            "attempts": 0 if extra is None else extra.attempts,
            "deaths": 0 if extra is None else extra.deaths,
            "failure": None if extra is None else extra.failure,
            "due": 0.0 if extra is None else extra.due_wall,
            "reason": None if extra is None else extra.reason,
            "parked": 0.0 if extra is None else extra.parked_wall,
            "evidence": False if extra is None else extra.evidence,
            "holder": "" if message.holder is None else message.holder.session.name,
        }
        if body:
            described["body"] = self.machine.body(message)
        return described

    def _stats(self, session: Session, prefix: str) -> dict[str, Any]:
        machine = self.machine
        store = machine.store
        return {
            "epoch": store.epoch,
            "queues": [self._describe_queue(q) for n, q in sorted(store.queues.items()) if n.startswith(prefix)],
            "messages": len(store.messages),
            "groups": len(store.groups),
            "sessions": sum(1 for s in store.sessions.values() if s.connected),
            "live_bytes": store.live_bytes,
            "left_seq": store.left_seq,
            "malformed": machine.malformed,
            "refusing": machine.refusing,
        }

    def _describe_queue(self, queue: Queue) -> dict[str, Any]:
        lane = queue.next_lane()
        store = self.machine.store
        oldest = max(0.0, store.wall - lane[0].place.wall) if lane and queue.ready_count else 0.0
        closed = not self.machine.rostered or bool(queue.awaiting)
        return {
            "name": queue.name,
            "ready": queue.ready_count,
            "leased": sum(len(consumer.held) for consumer in queue.consumers),
            "delayed": queue.delayed,
            "dead": len(queue.dead),
            "oldest": oldest,
            "consumers": len(queue.consumers),
            "busy": sum(1 for consumer in queue.consumers if consumer.held),
            "delivered": queue.delivered,
            "settled": queue.settled,
            "state": "paused" if queue.paused else "closed" if closed else "open",
        }

    def _peek(self, session: Session, name: str, offset: int, limit: int) -> list[dict[str, Any]]:
        queue, dead = self._named(name)
        if offset < 0 or not 0 <= limit <= 10_000:
            raise ProtocolError("peek: offset from 0, limit from 0 to 10,000")
        messages = list(queue.dead.values()) if dead else [m for m in queue.waiting() if m.state() == READY]
        return [self._describe(message, body=True) for message in messages[offset : offset + limit]]

    def _named(self, name: str) -> tuple[Queue, bool]:
        queues = self.machine.store.queues
        if name in queues:
            return queues[name], False
        if name.startswith(DLQ) and name[len(DLQ) :] in queues:
            return queues[name[len(DLQ) :]], True
        raise Refused(f"no queue is named {name!r}")

    # changing queues

    def _declare(self, session: Session, options: list[QueueOptions]) -> None:
        for option in options:
            if not option.name or option.name.startswith(DLQ):
                raise ProtocolError(f"declare: {option.name!r} cannot be the name of a queue")
            queue = self.machine.store.queue(option.name)
            if queue.options != option:
                queue.options = option
                self._keep_queue(queue)

    def _keep_queue(self, queue: Queue) -> None:
        state = records.QueueState(queue.options, queue.paused)
        self.machine.record(records.QUEUE, 0, records.encode(state))

    def _pause(self, session: Session, name: str) -> None:
        self._set_paused(name, True)

    def _resume(self, session: Session, name: str) -> None:
        self._set_paused(name, False)

    def _set_paused(self, name: str, paused: bool) -> None:
        queue, dead = self._named(name)
        if dead:
            raise Refused(f"{name} holds dead letters; pause {queue.name} instead")
        if queue.paused != paused:
            queue.paused = paused
            self._keep_queue(queue)
            self.machine.touch(queue)

    def _requeue(self, session: Session, name: str, ids: list[int]) -> dict[str, Any]:
        queue, _ = self._named(name)
        chosen = self._chosen(queue, ids)
        refused = [m.id for m in chosen if m.extra is not None and m.extra.evidence]
        if refused and ids:
            raise Refused(
                f"dead letter {refused[0]} of {queue.name} is evidence of an instance that went on without it "
                "(it was compensated, or the stage was optional); start the instance anew instead"
            )
        done = 0
        for message in chosen:
            if message.id not in refused:
                self._revive(message)
                done += 1
        return {"requeued": done, "refused": refused}

    def _revive(self, message: Message) -> None:
        machine = self.machine
        queue = message.queue
        queue.dead.pop(message.id, None)
        extra = message.details()
        extra.parked, extra.parked_wall, extra.reason = False, 0.0, None
        extra.attempts = extra.deaths = 0
        extra.failure, extra.fresh = None, False
        machine.mark(message)
        machine.store.enqueue(message)
        machine.touch(queue)

    def _chosen(self, queue: Queue, ids: list[int]) -> list[Message]:
        if not ids:
            return list(queue.dead.values())
        missing = [id for id in ids if id not in queue.dead]
        if missing:
            raise Refused(f"no dead letter {missing[0]} in dlq.{queue.name}")
        return [queue.dead[id] for id in ids]

    def _purge(self, session: Session, name: str, ids: list[int]) -> dict[str, Any]:
        queue, dead = self._named(name)
        machine = self.machine
        if dead:
            chosen = self._chosen(queue, ids)
        else:
            chosen = [m for m in queue.waiting() if m.state() == READY]
            if ids:
                chosen = [m for m in chosen if m.id in set(ids)]
        for message in chosen:
            machine.store.remove(message)
        if chosen:
            header = records.encode((0, [message.id for message in chosen]))
            machine.record(records.FORGET, 0, header)
        left = [g.id for m in chosen if (g := m.group) is not None and self._abandoned(g)]
        for id in left:
            machine.store.leave(id)
        if left:
            machine.record(records.LEFT, 0, records.encode(left))
        return {"purged": len(chosen), "instances": left}

    def _abandoned(self, group: Group) -> bool:
        return self.machine.store.groups.get(group.id) is group and not group.messages() and not group.gathers

    # epochs

    def _raise_epoch(self, session: Session, id: str, epoch: int, queue: str, label: str) -> dict[str, Any]:
        """Older messages of the group go to (queue, label) from now on; a second call with the same epoch changes nothing."""
        machine = self.machine
        group = machine.store.groups.get(id)
        if group is None:
            raise Refused(f"{id} is not live")
        if epoch > group.epoch:
            group.epoch = epoch
            group.divert = (queue, label)
            machine.keep_group(group)
            for message in group.messages():
                if message.epoch < epoch and message.state() != "leased":
                    self.machine.divert(machine.store.replace(message), group)
        return {"epoch": group.epoch, "leased": [m.id for m in group.messages() if m.state() == "leased"]}

    # the supervisor

    def _supervisor(self, session: Session) -> None:
        if session.role != "supervisor":
            raise Refused("only the supervisor may say this")

    def _dead(self, session: Session, peer: int, guilty: int, charge: bool, attempt: bool, failure: bytes) -> None:
        """The process of `peer` has ended. `guilty` is the message it was running, 0 for none or for nobody's fault.

        `charge` counts a death, `attempt` an attempt; `failure` is delivered with the message.
        """
        self._supervisor(session)
        machine = self.machine

        def blame(message: Message) -> None:
            extra = message.details()
            extra.deaths += charge
            extra.attempts += attempt
            extra.failure, extra.fresh = failure, True
            most = message.queue.options.max_deaths
            if charge and most and extra.deaths >= most:
                self._dead_letter(message, failure)
            else:
                machine.mark(message)
                machine.again(message)

        def funeral() -> None:
            dead = machine.store.sessions.get(peer)
            if dead is not None:
                machine.bury(dead, guilty=guilty, on_guilty=blame if charge or attempt or failure else None)
            machine.heard_of(peer)

        machine.after_the_last_word(funeral)

    def _dead_letter(self, message: Message, reason: bytes) -> None:
        machine = self.machine
        options = message.queue.options
        group = message.group
        machine.store.park(message, reason=reason, evidence=options.evidence)
        machine.mark(message)
        if options.notify_queue:
            queue = machine.store.queue(options.notify_queue)
            told = machine.store.put(
                queue, group, message.epoch, options.notify_label, 0, machine.body(message), message.place, 0
            )
            extra = told.details()
            extra.failure, extra.fresh = reason, True
            extra.attempts, extra.deaths = message.details().attempts, message.details().deaths
            extra.steps = message.details().steps
            machine.copy(told)
            machine.store.enqueue(told)
            machine.touch(queue)
        elif group is not None:
            machine.notify(group, "parked")

    def _roster(self, session: Session, peers: list[tuple[int, list[str]]]) -> None:
        """Which consumers are alive: a queue opens when each of its own has announced what it holds."""
        self._supervisor(session)
        machine = self.machine
        if machine.rostered:
            return
        for peer, queues in peers:
            known = machine.store.sessions.get(peer)
            if known is None or not known.connected:
                for name in queues:
                    machine.store.queue(name).awaiting.add(peer)
        machine.rostered = True
        machine.touch_all()

    def _hold(self, session: Session, held: bool) -> None:
        """Deliver nothing more (or again) but to the supervisor itself, which is about to stop."""
        self._supervisor(session)
        machine = self.machine
        machine.held_back = held
        for other in machine.store.sessions.values():
            if other.consumers and held and other is not session:
                machine.notice(other, "recall", None)
        if not held:
            machine.touch_all()

    def _recall(self, session: Session, peer: int) -> None:
        """Ask a consumer to return what it has not begun: the message it is at takes long."""
        self._supervisor(session)
        other = self.machine.store.sessions.get(peer)
        if other is not None and any(len(consumer.held) > 1 for consumer in other.consumers.values()):
            self.machine.notice(other, "recall", None)

    # odds and ends

    def _fact(self, session: Session, name: str, value: str | None) -> str | None:
        """Read a fact, or keep one."""
        store = self.machine.store
        if value is not None and store.facts.get(name) != value:
            store.facts[name] = value
            self.machine.record(records.FACT, 0, records.encode((name, value)))
        return store.facts.get(name)

    def _bye(self, session: Session) -> None:
        """A peer that holds nothing takes its leave; what it still holds waits for its confirmed death."""
        if not any(consumer.held for consumer in session.consumers.values()):
            self.machine.bury(session)

    def _ping(self, session: Session) -> dict[str, Any]:
        return {"epoch": self.machine.store.epoch, "open": self.machine.rostered}
