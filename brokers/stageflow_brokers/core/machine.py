"""The broker without I/O: frames and time in, records and frames out.

A round: `begin(now, wall)`, any number of `receive`, `tick`, then `take_records` (the caller makes them durable),
`set_record_locations`, and only then `dispatch`, which returns the frames to send. `receive` and `tick` must never
return frames, only fill the outbox: if a frame left before its record is on disk, a crash could undo a decision that a
peer has already received.

No peer can make the machine raise: a frame that cannot be decoded is counted and answered with a notice. The machine
must not use sockets, files or clocks.

This module checks sessions and the order of frames, and calls the handlers of `publish`, `settle`, `gathers`, `leases`,
`supervision`, `watches` and `admin`, which decide the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stageflow_brokers.core import wire
from stageflow_brokers.core.admin import Admin, Status
from stageflow_brokers.core.gathers import GatherManager
from stageflow_brokers.core.leases import Leases
from stageflow_brokers.core.limits import LimitChecker, Limits
from stageflow_brokers.core.message import READY
from stageflow_brokers.core.outbox import UNREAD_PAUSE_BYTES, Outbox, Outgoing
from stageflow_brokers.core.publish import PublishHandler
from stageflow_brokers.core.record_writer import ReadBody, RecordWriter
from stageflow_brokers.core.records import Record
from stageflow_brokers.core.replay import Replay
from stageflow_brokers.core.sessions import Session
from stageflow_brokers.core.settle import SettleHandler
from stageflow_brokers.core.state import BREAKER_TIMER, SHARE_TIMER, BrokerState
from stageflow_brokers.core.supervision import Supervision
from stageflow_brokers.core.watches import Watches
from stageflow_brokers.errors import ProtocolError, Refused

__all__ = ["Limits", "Machine"]

OUT_OF_ORDER, NEW, DUPLICATE = range(3)
"""Results of `Machine._accept_frame`."""

MAX_WAITING_FRAMES = 10_000
"""Frames of one peer that may wait until it has read earlier answers. A peer that sends more is disconnected."""


class Machine:
    """The state of one broker and the handlers of its frames.

    Args:
        limits: Limits of what one peer may use. Default: `Limits()`.
        supervised: True if a supervisor reports deaths. The leases of a disconnected worker then stay until its death
            is reported, and queues stay closed until the workers are known. Default: False.
        paging: True to drop bodies from memory that `read_body` can read. Default: False.
        read_body: `read_body(segment, batch, offset, size)` returns a body from the journal. Default: None.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        supervised: bool = False,
        paging: bool = False,
        read_body: ReadBody | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.supervised = supervised
        self._status = Status()
        self._waiting_sessions: dict[Session, None] = {}
        state = self.state = BrokerState(paging=paging)
        self.limit_checker = LimitChecker(state, self.limits)
        self.writer = RecordWriter(state, read_body)
        self.outbox = Outbox(state, max_unread_bytes=self.limits.max_unread_bytes)
        self.watches = Watches(state, self.writer, self.outbox)
        self.leases = Leases(
            state, self.writer, self.outbox, workers_known=not supervised, max_prefetch=self.limits.max_prefetch
        )
        self.gather_manager = GatherManager(state, self.writer, self.leases)
        self.publish_handler = PublishHandler(
            state,
            self.writer,
            self.outbox,
            self.leases,
            self.gather_manager,
            limit_checker=self.limit_checker,
            watch=self.watches.watch,
        )
        self.settle_handler = SettleHandler(
            state, self.writer, self.outbox, self.leases, self.publish_handler, self.gather_manager, self.limit_checker
        )
        self.supervision = Supervision(state, self.writer, self.outbox, self.leases)
        self.admin = Admin(
            state,
            self.writer,
            limit_checker=self.limit_checker,
            leases=self.leases,
            gather_manager=self.gather_manager,
            publish_handler=self.publish_handler,
            settle_handler=self.settle_handler,
            supervision=self.supervision,
            watches=self.watches,
            status=self._status,
            close_session=self.close_session,
        )
        self._handlers: dict[bytes, Callable[[Session, bytes, bytes], None]] = {
            wire.PUBLISH: self._publish,
            wire.SETTLE: self._settle,
            wire.CHECKPOINT: self._checkpoint,
            wire.RELEASE: self._release,
            wire.QUERY: self._query,
            wire.MARK_READ: self._mark_read,
        }

    @property
    def malformed_frames(self) -> int:
        """Number of frames that could not be decoded."""
        return self._status.malformed_frames

    @malformed_frames.setter
    def malformed_frames(self, count: int) -> None:
        self._status.malformed_frames = count

    @property
    def compacting(self) -> bool:
        """True from the request for a compaction until its end."""
        return self._status.compacting

    @compacting.setter
    def compacting(self, compacting: bool) -> None:
        self._status.compacting = compacting

    @property
    def refusal_reason(self) -> str:
        """Why new starts are refused at present; empty if they are accepted."""
        return self.publish_handler.refusal_reason

    @refusal_reason.setter
    def refusal_reason(self, reason: str) -> None:
        self.publish_handler.refusal_reason = reason

    def begin_epoch(self, now: float, wall: float) -> None:
        """Begin a new broker epoch after the replay.

        Its record must be durable before any peer is answered.
        """
        state = self.state
        Replay(state).finish(now, wall)
        self.writer.record_epoch()
        self.leases.stale_epoch_messages = [
            message
            for group in state.groups.values()
            if group.divert_to is not None
            for message in group.messages()
            if message.is_stale_epoch and message.state() == READY
        ]

    # a round

    def begin(self, now: float, wall: float) -> None:
        """Begin a round at `now` on the monotonic clock, `wall` seconds since the Unix epoch."""
        self.state.now = now
        self.state.wall = wall

    def receive(self, peer: int, op: bytes, header: bytes, blob: bytes) -> None:
        """Process one frame of a peer."""
        session = self.state.sessions.get(peer)
        try:
            if len(header) > wire.MAX_HEADER:
                raise ProtocolError(f"the header has {len(header)} bytes, more than the limit of {wire.MAX_HEADER}")
            if op == wire.HELLO:
                self._hello(peer, header)
            elif session is None or not session.connected:
                self.outbox.add_stranger_notice(peer, "hello", None)
            elif session.waiting_frames and op != wire.MARK_READ:
                self._put_aside(session, op, header, blob)
            else:
                self._handle(session, op, header, blob)
        except ProtocolError as error:
            self.malformed_frames += 1
            if session is None or not session.connected:
                self.outbox.add_stranger_notice(peer, "refused", str(error))
            else:
                self._refuse(session, header, error)

    def _handle(self, session: Session, op: bytes, header: bytes, blob: bytes) -> None:
        handler = self._handlers.get(op)
        if handler is None:
            raise ProtocolError(f"unknown operation {op[:8]!r}")
        if op == wire.QUERY and session.unread_bytes > UNREAD_PAUSE_BYTES:
            self._put_aside(session, op, header, blob)
        else:
            handler(session, header, blob)

    def _put_aside(self, session: Session, op: bytes, header: bytes, blob: bytes) -> None:
        """Keep a frame until the peer has read earlier answers.

        All its later frames wait behind this one.
        """
        session.put_aside(op, header, blob)
        self._waiting_sessions[session] = None
        too_many = len(session.waiting_frames) > MAX_WAITING_FRAMES or session.waiting_bytes > UNREAD_PAUSE_BYTES
        if too_many and session not in self.outbox.slow_peers:
            self.outbox.slow_peers.append(session)

    def _take_waiting_frames(self) -> None:
        """Process waiting frames and pushes of peers that have read enough."""
        for session in list(self._waiting_sessions):
            while session.waiting_frames and session.unread_bytes <= UNREAD_PAUSE_BYTES:
                op, header, blob = session.pop_waiting_frame()
                try:
                    self._handle(session, op, header, blob)
                except ProtocolError as error:
                    self.malformed_frames += 1
                    self._refuse(session, header, error)
            if not session.waiting_frames:
                del self._waiting_sessions[session]
        for session in list(self.watches.pending_sessions):
            self.watches.push_pending_ends(session)

    def tick(self, *, more: bool = False) -> None:
        """Process timers and everything else that is due.

        With `more` frames waiting to be received, reported deaths stay pending: a frame of a dead process may be among
        them.
        """
        for due, id, group_id, key in self.state.due_timers():
            if id > 0:
                self._message_due(due, id)
            elif id == BREAKER_TIMER:
                self.leases.wake_queue(key)
            elif id == SHARE_TIMER:
                self.leases.recalls.share(key)
            else:
                self.gather_manager.expire(due, group_id, key)
        if not more:
            self.supervision.tick()
        if self.leases.stale_epoch_messages:
            self.leases.divert_stale_epochs()
        if self._waiting_sessions or self.watches.pending_sessions:
            self._take_waiting_frames()

    def next_deadline(self) -> float | None:
        """Return the time of the next timer on the monotonic clock, None without one."""
        timer, death = self.state.next_timer(), self.supervision.next_deadline
        if timer is None or death is None:
            return timer if death is None else death
        return min(timer, death)

    def take_records(self) -> list[Record]:
        """Return the records of this round. They must be durable before `dispatch`."""
        return self.writer.take_records()

    def set_record_locations(self, segment: int, batch: int, offsets: Sequence[int]) -> None:
        """Set the locations of the records that `take_records` returned.

        They share a batch; `offsets` are those of the blobs.
        """
        self.writer.set_locations(segment, batch, offsets)

    def dispatch(self) -> list[Outgoing]:
        """Deliver ready messages and return all frames to send.

        Peers that do not read are disconnected.
        """
        self.leases.deliver()
        outgoing = self.outbox.drain()
        if self.outbox.slow_peers:
            for session in self.outbox.slow_peers:
                self.disconnect(session.peer)
                outgoing.append(self.outbox.disconnect_notice(session))
            self.outbox.slow_peers.clear()
        return outgoing

    def probe_peers(self) -> None:
        """Send a confirmation to every connected peer.

        The transport then notices the peers that are unreachable.
        """
        for session in self.state.sessions.values():
            if session.connected:
                self.outbox.dirty[session] = None

    def _message_due(self, due: float, id: int) -> None:
        message = self.state.messages.get(id)
        if (
            message is None
            or message.delivery_state is None
            or message.delivery_state.due != due
            or message.holder is not None
        ):
            return
        message.delivery_state.due = message.delivery_state.due_wall = 0.0
        # Recorded: after a restart with a clock set back, a worker that holds it must not find it delayed again.
        self.writer.record_message_state(message)
        message.queue.delayed_count -= 1
        message.queue.push(message)
        self.state.changed_queues[message.queue] = None

    # sessions

    def _hello(self, peer: int, header: bytes) -> None:
        hello = wire.decode_hello(header)
        state = self.state
        session = state.sessions.get(peer)
        if hello.consume:
            try:
                self.limit_checker.check_queues(name for name, _ in hello.consume)
            except Refused as error:
                raise ProtocolError(str(error)) from None
        if session is None:
            if sum(1 for known in state.sessions.values() if known.connected) >= self.limits.max_peers:
                raise ProtocolError(
                    f"{self.limits.max_peers} peers are connected (max_peers): close other connections first"
                )
            session = state.sessions[peer] = Session(peer)
            session.highest_frame = state.last_frames.pop(peer, 0)
        elif hello.number <= session.hello_number:
            return  # a repeated or late hello: processing it would drop everything sent since the first one
        session.hello_number = hello.number
        session.connected = True
        self._drop_waiting_frames(session)
        session.is_leaving = False
        session.role, session.name, session.pid = hello.role, hello.name, hello.pid
        session.received_frame = hello.next_frame - 1
        session.highest_frame = max(session.highest_frame, session.received_frame)
        session.deferred_frames = [frame for frame in session.deferred_frames if frame > session.received_frame]
        session.answers = {frame: answer for frame, answer in session.answers.items() if frame > session.received_frame}
        # Frames for the connection before are sent again or no longer true.
        session.clear_outgoing()
        for name, prefetch in hello.consume:
            self.leases.consume(session, name, prefetch)
        lost = self.leases.reconcile(session, hello.holding)
        self.leases.stop_awaiting(peer)
        self.outbox.add_notice(session, "welcome", (hello.number, lost))
        for consumer in session.consumers.values():
            if consumer.queue.paused:
                self.leases.recalls.recall(consumer)
        if hello.watching:
            self.watches.watch(session, hello.watching)

    def disconnect(self, peer: int) -> None:
        """Note that a peer is unreachable.

        A supervised worker keeps its leases until its death is reported.
        """
        session = self.state.sessions.get(peer)
        if session is not None:
            self._drop_waiting_frames(session)
            self.state.remember_peer(peer, session.highest_frame)
            self._end_session(session)

    def _drop_waiting_frames(self, session: Session) -> None:
        session.drop_waiting_frames()
        self._waiting_sessions.pop(session, None)
        self.watches.pending_sessions.pop(session, None)

    def close_session(self, session: Session) -> None:
        """End a session at the peer's request. It receives one more frame."""
        session.is_leaving = True
        self._end_session(session)

    def _end_session(self, session: Session) -> None:
        if self.supervised and session.has_leases:
            session.connected = False
        else:
            self.leases.release_all(session)

    # numbered frames

    def _accept_frame(self, session: Session, broker_epoch: int, frame: int) -> int:
        """Return NEW, DUPLICATE or OUT_OF_ORDER for a numbered frame.

        A duplicate was accepted before the last hello of its sender.
        """
        self.outbox.dirty[session] = None
        if broker_epoch != self.state.epoch:
            self.outbox.add_notice(session, "hello", None)
            return OUT_OF_ORDER
        if frame != session.received_frame + 1:
            if frame > session.received_frame:
                self.outbox.add_notice(session, "resend", session.received_frame + 1)
            return OUT_OF_ORDER
        session.received_frame = frame
        if frame <= session.highest_frame:
            return DUPLICATE
        session.highest_frame = frame
        return NEW

    def _resend_answer(self, session: Session, frame: int) -> bool:
        """Send the kept answer of a duplicate frame again.

        Return False if none was kept.
        """
        if frame not in session.answers:
            return False
        self.outbox.add_result(session, frame, session.answers[frame])
        return True

    def _refuse(self, session: Session, header: bytes, error: ProtocolError) -> None:
        """Answer a malformed frame by its number, if that can be read.

        Without an answer its sender would repeat it for ever.
        """
        self.outbox.add_notice(session, "malformed", str(error))
        number = wire.read_frame_number(header)
        if number is not None and self._accept_frame(session, *number) != OUT_OF_ORDER:
            self.outbox.add_result(session, number[1], {"error": "ProtocolError", "message": str(error)})

    def _publish(self, session: Session, header: bytes, blob: bytes) -> None:
        frame = wire.decode_publish(header, blob)
        accepted = self._accept_frame(session, frame.broker_epoch, frame.frame)
        if accepted == NEW:
            self.publish_handler.handle(session, frame, header, blob)
        elif accepted == DUPLICATE:
            if self._resend_answer(session, frame.frame):
                self.publish_handler.watch_groups(session, frame)
            else:
                self.publish_handler.handle_duplicate(session, frame)

    def _settle(self, session: Session, header: bytes, blob: bytes) -> None:
        frame = wire.decode_settle(header, blob)
        accepted = self._accept_frame(session, frame.broker_epoch, frame.frame)
        if accepted == NEW:
            self.settle_handler.handle(session, frame, header, blob)
        elif accepted == DUPLICATE:
            self._resend_answer(session, frame.frame)
            self.settle_handler.handle_duplicate(session, frame)

    def _checkpoint(self, session: Session, header: bytes, blob: bytes) -> None:
        frame = wire.decode_checkpoint(header)
        accepted = self._accept_frame(session, frame.broker_epoch, frame.frame)
        if accepted == NEW:
            self.settle_handler.handle_checkpoint(session, frame, header, blob)
        elif accepted == DUPLICATE and not self._resend_answer(session, frame.frame):
            self.settle_handler.handle_duplicate_checkpoint(session, frame, blob)

    def _release(self, session: Session, header: bytes, blob: bytes) -> None:
        release = wire.decode_release(header)
        if self._accept_frame(session, release.broker_epoch, release.frame) == OUT_OF_ORDER:
            return
        if release.queue in session.consumers and release.prefetch >= 0:
            self.leases.set_prefetch(session.consumers[release.queue], release.prefetch)
        self.settle_handler.handle_release(session, release.leases)

    def _mark_read(self, session: Session, header: bytes, blob: bytes) -> None:
        session.confirm_read(wire.decode_mark_read(header))

    def _query(self, session: Session, header: bytes, blob: bytes) -> None:
        query = wire.decode_query(header)
        accepted = self._accept_frame(session, query.broker_epoch, query.frame)
        if accepted == OUT_OF_ORDER or (accepted == DUPLICATE and self._resend_answer(session, query.frame)):
            return
        try:
            answer = self.admin.call(session, query.name, query.args)
        except Refused as error:
            answer = {"refused": str(error)}
        except ProtocolError as error:
            self.malformed_frames += 1
            answer = {"refused": str(error)}
        self.outbox.add_answer(session, query.frame, answer)
