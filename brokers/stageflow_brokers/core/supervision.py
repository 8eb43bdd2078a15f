"""Supervision: what only the supervisor may say. Who has died, who is alive, and whether anything is to be delivered.

Death is news from whoever saw the process exit. What that process sent before may still be on its way here, so its
consequences wait a moment, and the supervisor is answered when they are recorded.
"""

from __future__ import annotations

from typing import Any

from stageflow_brokers.core.leases import Leases
from stageflow_brokers.core.message import READY, Group, Message
from stageflow_brokers.core.outbox import Outbox
from stageflow_brokers.core.record_writer import RecordWriter
from stageflow_brokers.core.sessions import Session
from stageflow_brokers.core.state import BrokerState
from stageflow_brokers.errors import Refused

__all__ = ["Supervision"]

DEATH_DELAY_SECONDS = 0.005
"""Seconds between the news of a death and its consequences; a settlement that arrives in between counts first."""


class _Death:
    """What the supervisor said of one process, until it has its consequences."""

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
    """The supervisor's part of one machine."""

    def __init__(self, state: BrokerState, writer: RecordWriter, outbox: Outbox, leases: Leases) -> None:
        self._state = state
        self._writer = writer
        self._outbox = outbox
        self._leases = leases
        self._deaths: list[_Death] = []

    @property
    def next_deadline(self) -> float | None:
        """When `tick` has something to do next."""
        return self._deaths[0].due if self._deaths else None

    def _check(self, session: Session) -> None:
        if session.role != "supervisor":
            raise Refused("only the supervisor may say this")

    def report_death(
        self, session: Session, peer: int, responsible: int | list[int], charge: bool, attempt: bool, failure: bytes
    ) -> None:
        """The process of `peer` has ended. `responsible` is the message it was running, or all that it was running at
        once; 0 for none or for nobody's fault.

        `charge` counts a death of each, `attempt` an attempt; `failure` is delivered with the message.
        """
        self._check(session)
        due = self._state.now + DEATH_DELAY_SECONDS
        culprits = tuple(responsible) if isinstance(responsible, list) else (responsible,)
        self._deaths.append(_Death(session, peer, culprits, charge, attempt, failure, due))
        session.deferred_frames.append(session.received_frame)

    def tick(self) -> None:
        """Let deaths have their consequences whose last words have been heard."""
        while self._deaths and self._deaths[0].due <= self._state.now:
            death = self._deaths.pop(0)
            self._apply_death(death)
            if death.frame in death.session.deferred_frames:
                death.session.deferred_frames.remove(death.frame)
                self._outbox.dirty[death.session] = None

    def _apply_death(self, death: _Death) -> None:
        state, leases = self._state, self._leases
        innocent = not (death.charge or death.attempt or death.failure)
        unclaimed = self._unclaimed(death)
        session = state.sessions.get(death.peer)
        if session is not None:
            leases.release_all(
                session,
                responsible=death.responsible,
                blame=None if innocent else lambda message: self._charge_message(message, death),
            )
        if not innocent:
            for message in reversed(unclaimed):
                self._charge_message(state.replace(message), death)
        state.last_frames.pop(death.peer, None)
        leases.stop_awaiting(death.peer)

    def _unclaimed(self, death: _Death) -> list[Message]:
        """Guilty messages, if the broker began anew since their worker got them, and nobody has had them since."""
        found = []
        for id in death.responsible:
            message = self._state.messages.get(id)
            if message is None or message.state() != READY:
                continue
            if message.delivery_state is not None and message.delivery_state.last_death_peer == death.peer:
                continue  # the broker has ended before it could say that it knows
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
        most = message.queue.options.max_deaths
        if death.charge and most and delivery_state.deaths >= most and not message.is_stale_epoch:
            self._make_dead_letter(message, death.failure)
        else:
            self._leases.redeliver(message)
            self._writer.mark(message)

    def _make_dead_letter(self, message: Message, reason: bytes) -> None:
        """It has killed as many as it may: a dead letter, and whoever is to be told gets a copy."""
        state = self._state
        options = message.queue.options
        group = message.group
        state.park(message, reason=reason, evidence=options.evidence and bool(options.notify_queue))
        self._writer.mark(message)
        if not options.notify_queue:
            if group is not None:
                self._outbox.notify_watchers(group, "parked")
            return
        queue = state.queue(options.notify_queue)
        body = self._writer.body(message)
        told = state.put(queue, group, message.epoch, options.notify_label, 0, body, len(body), message.location, 0)
        known, delivery_state = message.ensure_delivery_state(), told.ensure_delivery_state()
        delivery_state.failure, delivery_state.fresh = reason, True
        delivery_state.attempts, delivery_state.deaths, delivery_state.parts = known.attempts, known.deaths, known.parts
        state.keep_steps(told, known.steps)
        self._writer.copy(told)
        state.enqueue(told)
        state.touched[queue] = None

    def set_workers(self, session: Session, peers: list[tuple[int, list[str]]]) -> None:
        """Which consumers are alive: a queue opens when each of its own has announced what it holds."""
        self._check(session)
        state, leases = self._state, self._leases
        if leases.workers_known:
            return
        for peer, queues in peers:
            known = state.sessions.get(peer)
            if known is None or not known.connected:
                for name in queues:
                    state.queue(name).awaited_peers.add(peer)
        for death in self._deaths:
            # It has been told of already, and not had its consequences: nobody is given what it was at before.
            for id in death.responsible:
                message = state.messages.get(id)
                if message is not None and message.state() == READY:
                    message.queue.awaited_peers.add(death.peer)
        leases.workers_known = True
        state.touched.update(dict.fromkeys(state.queues.values()))

    def suspend_delivery(self, session: Session, suspended: bool) -> None:
        """Deliver nothing more (or again) but to the supervisor itself, which is about to stop."""
        self._check(session)
        self._leases.delivery_suspended = suspended
        if not suspended:
            self._state.touched.update(dict.fromkeys(self._state.queues.values()))
            return
        for other in self._state.sessions.values():
            if other.consumers and other is not session:
                self._outbox.add_notice(other, "recall", None)

    def close_groups(self, session: Session, ids: list[str]) -> int:
        """Groups that have ended, as is known elsewhere, are forgotten with all that was theirs; how many were live."""
        self._check(session)
        live = [id for id in dict.fromkeys(ids) if id in self._state.groups]
        for id in live:
            self._state.close_group(id)
        if live:
            self._writer.record_closed_groups(live)
        return len(live)

    def announce_cancel(self, group: Group) -> None:
        """Tell the supervisor which of its workers are at messages of a group that has been cancelled. Those that may
        not have begun them, because they hold others, too, are asked to return what waits."""
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
        """Ask a consumer to return what it has not begun: the message it is at takes long."""
        self._check(session)
        other = self._state.sessions.get(peer)
        if other is not None and any(len(c.held) + len(c.removed_ids) > 1 for c in other.consumers.values()):
            self._outbox.add_notice(other, "recall", None)

    def retire(self, session: Session, peer: int) -> bool:
        """Deliver nothing more to a consumer, and ask it to end once it is done with what it is at; whether it can be
        asked now. What it does with that is its own affair: nothing is kept, and nothing is taken from it."""
        self._check(session)
        other = self._state.sessions.get(peer)
        if other is None or not other.connected:
            return False
        for consumer in other.consumers.values():
            consumer.prefetch = 0
        self._outbox.add_notice(other, "retire", None)
        return True

    def notify_supervisor(self, session: Session, word: str, detail: Any) -> bool:
        """Pass a word on to the supervisor, as the notice `told`; whether there is one now. It is not kept."""
        told = False
        for other in self._state.sessions.values():
            if other.role == "supervisor" and other.connected:
                self._outbox.add_notice(other, "told", (word, detail))
                told = True
        return told
