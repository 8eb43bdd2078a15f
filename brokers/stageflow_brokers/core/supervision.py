"""Supervision: the queries of the supervisor, which no other role may send.

The supervisor reports which workers are alive and which have died. Frames that a process sent before its death may
arrive after the report, so the consequences of a death wait for `DEATH_DELAY_SECONDS`. The report is confirmed only
when they are recorded: without this, a broker that stops in between would forget the death.
"""

from __future__ import annotations

from typing import Any

from stageflow_brokers.core.leases import Leases
from stageflow_brokers.core.message import READY, Group, Message
from stageflow_brokers.core.outbox import REPORTED_BODY_BYTES, Outbox
from stageflow_brokers.core.record_writer import RecordWriter
from stageflow_brokers.core.sessions import Session
from stageflow_brokers.core.state import BrokerState
from stageflow_brokers.errors import Refused

__all__ = ["Supervision"]

DEATH_DELAY_SECONDS = 0.005
"""Seconds from the report of a death to its consequences; a settlement that arrives in between is accepted."""


class _Death:
    """A reported death that has no consequences yet."""

    __slots__ = ("attempt", "charge", "due", "failure", "frame", "peer", "responsible", "session")

    def __init__(
        self,
        session: Session,
        peer: int,
        responsible: tuple[int, ...],
        charge: bool,
        attempt: bool,
        failure: bytes,
        due: float,
    ) -> None:
        self.session = session
        self.frame = session.received_frame
        self.peer = peer
        self.responsible = responsible
        self.charge = charge
        self.attempt = attempt
        self.failure = failure
        self.due = due


class Supervision:
    """The handler of the supervisor's queries of one machine."""

    def __init__(self, state: BrokerState, writer: RecordWriter, outbox: Outbox, leases: Leases) -> None:
        self._state = state
        self._writer = writer
        self._outbox = outbox
        self._leases = leases
        self._deaths: list[_Death] = []

    @property
    def next_deadline(self) -> float | None:
        """The time of the next death's consequences on the monotonic clock, None without one."""
        return self._deaths[0].due if self._deaths else None

    def _check(self, session: Session) -> None:
        if session.role != "supervisor":
            raise Refused("this query is only for the supervisor")

    def report_death(
        self, session: Session, peer: int, responsible: int | list[int], charge: bool, attempt: bool, failure: bytes
    ) -> None:
        """Note that the process of `peer` has ended.

        `responsible` is the message, or the messages, that it was running; 0 if it was idle or no message caused the
        death. `charge` counts a death for each of them, `attempt` a failed attempt; `failure` is delivered with them.
        """
        self._check(session)
        due = self._state.now + DEATH_DELAY_SECONDS
        ids = tuple(responsible) if isinstance(responsible, list) else (responsible,)
        self._deaths.append(_Death(session, peer, ids, charge, attempt, failure, due))
        session.deferred_frames.append(session.received_frame)

    def tick(self) -> None:
        """Apply the deaths that are due, and let their reports be confirmed."""
        while self._deaths and self._deaths[0].due <= self._state.now:
            death = self._deaths.pop(0)
            self._apply_death(death)
            if death.frame in death.session.deferred_frames:
                death.session.deferred_frames.remove(death.frame)
                self._outbox.dirty[death.session] = None

    def _apply_death(self, death: _Death) -> None:
        state, leases = self._state, self._leases
        has_effect = bool(death.charge or death.attempt or death.failure)
        unheld = self._unheld_messages(death)
        session = state.sessions.get(death.peer)
        if session is not None:
            leases.release_all(
                session,
                responsible=death.responsible,
                charge=(lambda message: self._charge_message(message, death)) if has_effect else None,
            )
        if has_effect:
            for message in reversed(unheld):
                self._charge_message(state.replace(message), death)
        state.last_frames.pop(death.peer, None)
        leases.stop_awaiting(death.peer)

    def _unheld_messages(self, death: _Death) -> list[Message]:
        """Return the responsible messages without a holder.

        The broker has restarted since their delivery.
        """
        found = []
        for id in death.responsible:
            message = self._state.messages.get(id)
            if message is None or message.state() != READY:
                continue
            if message.delivery_state is not None and message.delivery_state.last_death_peer == death.peer:
                continue  # the broker stopped after it recorded this death and before it confirmed the report
            if not self._leases.workers_known or death.peer in message.queue.awaited_peers:
                found.append(message)
        return found

    def _charge_message(self, message: Message, death: _Death) -> None:
        if not message.is_stale_epoch:
            self._leases.record_failure(message)
        delivery_state = message.ensure_delivery_state()
        delivery_state.deaths += death.charge
        delivery_state.attempts += death.attempt
        delivery_state.failure, delivery_state.fresh, delivery_state.last_death_peer = death.failure, True, death.peer
        delivery_state.expires = delivery_state.expires_wall = 0.0
        max_deaths = message.queue.options.max_deaths
        if death.charge and max_deaths and delivery_state.deaths >= max_deaths and not message.is_stale_epoch:
            self._make_dead_letter(message, death.failure)
        else:
            self._leases.redeliver(message)
            self._writer.record_message_state(message)

    def _make_dead_letter(self, message: Message, reason: bytes) -> None:
        """Park a message that reached `max_deaths`, and notify `notify_queue`.

        The notification is a copy of the message.
        """
        state = self._state
        options = message.queue.options
        group = message.group
        state.park(message, reason=reason, evidence=options.evidence and bool(options.notify_queue))
        self._writer.record_message_state(message)
        self._outbox.report_dead_letter(message, self._writer.head(message, REPORTED_BODY_BYTES))
        if not options.notify_queue:
            if group is not None:
                self._outbox.notify_watchers(group, "parked")
            return
        queue = state.queue(options.notify_queue)
        body = self._writer.body(message)
        copy = state.put(queue, group, message.epoch, options.notify_label, 0, body, len(body), message.location, 0)
        original, delivery_state = message.ensure_delivery_state(), copy.ensure_delivery_state()
        delivery_state.failure, delivery_state.fresh = reason, True
        delivery_state.attempts, delivery_state.deaths = original.attempts, original.deaths
        delivery_state.parts = original.parts
        state.set_steps(copy, original.steps)
        self._writer.record_message(copy)
        state.enqueue(copy)
        state.changed_queues[queue] = None

    def set_workers(self, session: Session, peers: list[tuple[int, list[str]]]) -> None:
        """Set the consumers that are alive.

        A queue opens when each of them has reported the messages that it holds.
        """
        self._check(session)
        state, leases = self._state, self._leases
        if leases.workers_known:
            return
        for peer, queues in peers:
            worker = state.sessions.get(peer)
            if worker is None or not worker.connected:
                for name in queues:
                    state.queue(name).awaited_peers.add(peer)
        for death in self._deaths:
            # This death is reported and not applied yet: its messages must not be delivered before they are charged.
            for id in death.responsible:
                message = state.messages.get(id)
                if message is not None and message.state() == READY:
                    message.queue.awaited_peers.add(death.peer)
        leases.workers_known = True
        state.changed_queues.update(dict.fromkeys(state.queues.values()))

    def suspend_delivery(self, session: Session, suspended: bool) -> None:
        """Stop deliveries except to the supervisor, which is about to stop, or continue them."""
        self._check(session)
        self._leases.delivery_suspended = suspended
        if not suspended:
            self._state.changed_queues.update(dict.fromkeys(self._state.queues.values()))
            return
        for other in self._state.sessions.values():
            if other.consumers and other is not session:
                self._outbox.add_notice(other, "recall", None)

    def close_groups(self, session: Session, ids: list[str]) -> int:
        """Close groups that the caller knows to have ended. Return how many were live."""
        self._check(session)
        live = [id for id in dict.fromkeys(ids) if id in self._state.groups]
        for id in live:
            self._state.close_group(id)
        if live:
            self._writer.record_closed_groups(live)
        return len(live)

    def announce_cancel(self, group: Group) -> None:
        """Notify the supervisor of the workers that hold messages of a cancelled group.

        Workers that hold other messages, too, may not have begun these; they are asked to release what waits.
        """
        running = []
        several: dict[Session, None] = {}
        for message in group.messages():
            holder = message.holder
            if holder is not None and message.epoch < group.epoch:
                running.append((holder.session.peer, message.id))
                if len(holder.held) > 1:
                    several[holder.session] = None
        for session in several:
            self._outbox.add_notice(session, "recall", None)
        if running:
            for session in self._state.sessions.values():
                if session.role == "supervisor":
                    self._outbox.add_notice(session, "cancel", running)

    def recall(self, session: Session, peer: int) -> None:
        """Ask a consumer to release the messages that it has not begun.

        Its present message takes long.
        """
        self._check(session)
        other = self._state.sessions.get(peer)
        if other is not None and any(len(c.held) + len(c.removed_ids) > 1 for c in other.consumers.values()):
            self._outbox.add_notice(other, "recall", None)

    def retire(self, session: Session, peer: int) -> bool:
        """Stop deliveries to a consumer and ask it to end after its present messages. Return True if it is connected.

        The request is not stored, and the consumer keeps its leases.
        """
        self._check(session)
        other = self._state.sessions.get(peer)
        if other is None or not other.connected:
            return False
        for consumer in other.consumers.values():
            consumer.prefetch = 0
        self._outbox.add_notice(other, "retire", None)
        return True

    def report_starts(self, session: Session, queues: list[tuple[str, bool, str, float]]) -> None:
        """Note what is known of queues whose consumers are not ready: (name, failing, text, next attempt).

        `text` is the reason why they cannot start if `failing`, else how far they are; empty once one is ready. It is
        not recorded: the supervisor sends it again to a broker that has restarted.
        """
        self._check(session)
        for name, failing, text, next_start_at in queues:
            queue = self._state.queues.get(name)
            if queue is not None:
                queue.starts = (failing, text, next_start_at) if text else None

    def notify_supervisor(self, session: Session, word: str, detail: Any) -> bool:
        """Send the notice `told` to the supervisor.

        Return True if one is connected; the notice is not stored.
        """
        notified = False
        for other in self._state.sessions.values():
            if other.role == "supervisor" and other.connected:
                self._outbox.add_notice(other, "told", (word, detail))
                notified = True
        return notified
