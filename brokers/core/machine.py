"""The broker as a machine without sockets, files or clocks: frames and time in, records and frames out.

A round is: `begin(now, wall)`, any number of `receive`, `tick`, then `take_records` (which the caller makes durable),
`placed` with where they lie, and only then `dispatch`, which gives what may leave. Nothing leaves before the record
that caused it is on disk: `receive` never produces output, it only lays it ready. No peer can make it raise: a malformed
frame is counted and answered with a notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from brokers.core import records, wire
from brokers.core.admin import Admin
from brokers.core.message import Group, Message, Place
from brokers.core.queue import Queue
from brokers.core.records import Record
from brokers.core.replay import Replay
from brokers.core.sessions import Consumer, Session
from brokers.core.store import DEEP, Store
from brokers.core.wire import DeliveryExtra, Move, PublishFrame, PublishItem, SettleFrame, SettleItem, Target
from brokers.errors import PayloadTooLarge, ProtocolError, QueueFull, Refused

__all__ = ["Limits", "Machine"]

STALE, CONFLICT, EXISTS, LOOK_AGAIN = "stale", "conflict", "exists", "look-again"

Resolved = list[tuple[Queue | None, str, int]]

LAST_WORDS = 0.005
"""Seconds between the news of a death and its consequences; a settlement that arrives in between counts first."""

DELIVERED_BYTES = 4 << 20
"""A delivery to one consumer ends with the body that reaches this many bytes, whatever its credit."""


class Limits(Struct, frozen=True):
    """Bounds on what peers may do. `max_message_bytes` bounds one body, `max_peers` sessions at once."""

    max_message_bytes: int = 16 << 20
    max_peers: int = 4096


class Machine:
    """The one decision-maker. `read_body(segment, offset, size)` fetches a body that has left memory."""

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        supervised: bool = False,
        paging: bool = False,
        read_body: Callable[[int, int, int], bytes] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.store = Store(paging=paging)
        self.supervised = supervised
        self.rostered = not supervised
        self.held_back = False
        self.refusing = ""
        self.malformed = 0
        self._read_body = read_body
        self._records: list[Record] = []
        self._places: list[Place] = []
        self._touched: set[Queue] = set()
        self._dirty: set[Session] = set()
        self._strangers: set[int] = set()
        self._completing: list[tuple[Group, str]] = []
        self._funerals: list[tuple[float, Callable[[], None]]] = []
        self.admin = Admin(self)
        self._handlers: dict[bytes, Callable[[Session, bytes, bytes], None]] = {
            wire.PUBLISH: self._publish,
            wire.SETTLE: self._settle,
            wire.CHECKPOINT: self._checkpoint,
            wire.RELEASE: self._release,
            wire.QUERY: self._query,
        }

    # a round

    def begin(self, now: float, wall: float) -> None:
        """Time for the round: `now` monotonic, `wall` since the Unix epoch, seconds."""
        self.store.now = now
        self.store.wall = wall

    def receive(self, peer: int, op: bytes, header: bytes, blob: bytes) -> None:
        """One frame of a peer."""
        session = self.store.sessions.get(peer)
        try:
            if op == wire.HELLO:
                self._hello(peer, header)
            elif session is None or not session.connected:
                self._strangers.add(peer)
            else:
                handler = self._handlers.get(op)
                if handler is None:
                    raise ProtocolError(f"unknown operation {op[:8]!r}")
                handler(session, header, blob)
        except ProtocolError as error:
            self.malformed += 1
            if session is not None and session.connected:
                self.notice(session, "malformed", str(error))

    def tick(self) -> None:
        """Do what has become due."""
        for due, id, group_id, key in self.store.due_timers():
            if id:
                self._message_due(due, id)
            else:
                self._gather_due(due, group_id, key)
        while self._funerals and self._funerals[0][0] <= self.store.now:
            self._funerals.pop(0)[1]()

    def next_deadline(self) -> float | None:
        """When `tick` has something to do next, on the monotonic clock."""
        timer = self.store.next_timer()
        if not self._funerals:
            return timer
        funeral = self._funerals[0][0]
        return funeral if timer is None else min(timer, funeral)

    def after_the_last_word(self, funeral: Callable[[], None]) -> None:
        """Run `funeral` a moment from now: what a process sent before it died may still be on its way here."""
        self._funerals.append((self.store.now + LAST_WORDS, funeral))

    def take_records(self) -> list[Record]:
        """The records of this round, to be made durable before anything is dispatched."""
        taken = self._records
        self._records = []
        return taken

    def placed(self, segment: int, offsets: Sequence[int]) -> None:
        """Where the blobs of the records just taken lie."""
        for place, offset in zip(self._places, offsets, strict=True):
            place.segment = segment
            place.offset = offset
        self._places = []

    def dispatch(self) -> list[tuple[int, bytes, bytes]]:
        """What may leave now, as (peer, header, blob)."""
        if self._touched:
            if self.rostered:
                for queue in self._touched:
                    self._pump(queue)
            self._touched.clear()
        out = []
        for session in self._dirty:
            if not session.connected:
                session.forget_talk()
                continue
            header = wire.encode(
                (
                    self.store.epoch,
                    session.last_frame,
                    session.results,
                    session.deliveries,
                    session.pushes,
                    session.notices,
                )
            )
            blob = b"".join(session.bodies + session.push_bodies)
            session.forget_talk()
            out.append((session.peer, header, blob))
        self._dirty.clear()
        for peer in self._strangers:
            out.append((peer, wire.encode((self.store.epoch, -1, (), (), (), [("hello", None)])), b""))
        self._strangers.clear()
        return out

    # what parts of the machine share

    def record(self, kind: int, peer: int, header: bytes, blob: bytes = b"") -> Place:
        """One more record of this round; its place is known once it has been written."""
        place = Place(self.store.wall)
        self._records.append((kind, self.store.next_id, peer, header, blob))
        self._places.append(place)
        return place

    def mark(self, message: Message) -> None:
        """Record the state of a message that the journal knows already."""
        self.record(records.MARK, 0, records.encode(records.message_state(message)))

    def copy(self, message: Message) -> None:
        """Record a message whole; it lies there from now on."""
        body = self.body(message)
        message.place, message.at = self._copied(message, body), 0

    def _copied(self, message: Message, body: bytes) -> Place:
        wall = message.place.wall
        place = self.record(records.COPY, 0, records.encode(records.message_state(message)), body)
        place.wall = wall
        return place

    def keep_group(self, group: Group) -> None:
        """Record the state of a group; it lies there from now on."""
        group.place = self.record(records.GROUP, 0, records.encode(records.group_state(group)))

    def keep_gather(self, group: Group, key: str) -> None:
        """Record the state of a gather; it lies there from now on."""
        gather = self.store.gather(group, key, group.place)
        state = records.GatherState(
            group.id,
            key,
            gather.need,
            gather.queue,
            gather.label,
            gather.epoch,
            gather.base,
            gather.due_wall,
            list(gather.arrivals.items()),
            sorted(gather.seen),
        )
        gather.place = self.record(records.GATHER, 0, records.encode(state))

    def copy_forward(self, segment: int) -> None:
        """Record again whatever lies in `segment` and is alive: once that is durable, the segment may go.

        Queues, facts, frame numbers and the epoch lie in no particular segment and are stated anew each time.
        """
        store = self.store
        for group in [g for g in store.groups.values() if g.place.segment == segment]:
            self.keep_group(group)
        for message in [m for m in store.messages.values() if m.place.segment == segment]:
            self.copy(message)
        for group, gather in [pair for pair in store.all_gathers() if pair[1].place.segment == segment]:
            self.keep_gather(group, gather.key)
        for queue in store.queues.values():
            self.record(records.QUEUE, 0, records.encode(records.QueueState(queue.options, queue.paused)))
        for fact in store.facts.items():
            self.record(records.FACT, 0, records.encode(fact))
        frames = [(s.peer, s.last_frame) for s in store.sessions.values() if s.connected]
        self.record(records.SESSIONS, 0, records.encode(frames))
        self.record(records.STARTED, 0, records.encode(store.epoch))

    def started(self, now: float, wall: float) -> None:
        """After the replay: a new broker epoch, to be made durable before anybody is answered."""
        Replay(self.store).finish(now, wall)
        self.record(records.STARTED, 0, records.encode(self.store.epoch))

    def body(self, message: Message) -> bytes:
        """The body, from memory or read back."""
        if message.body is not None:
            return message.body
        place = message.place
        if self._read_body is None or place.segment < 0:
            raise RuntimeError(f"message {message.id} has neither a body nor a place")
        return self._read_body(place.segment, place.offset + message.at, message.size)

    def touch(self, queue: Queue) -> None:
        """Something may be deliverable here."""
        self._touched.add(queue)

    def touch_all(self) -> None:
        """Something may be deliverable anywhere."""
        self._touched.update(self.store.queues.values())

    def result(self, session: Session, frame: int, value: Any) -> None:
        """Answer a frame, once what it saw is durable."""
        session.results.append((frame, value))
        self._dirty.add(session)

    def notice(self, session: Session, word: str, detail: Any) -> None:
        session.notices.append((word, detail))
        self._dirty.add(session)

    def notify(self, group: Group, word: str) -> None:
        """Tell whoever watches the group."""
        for session in group.watchers or ():
            self.notice(session, word, group.id)

    def push(self, group: Group, label: str, body: bytes) -> None:
        """Send a body to whoever watches the group."""
        for session in group.watchers or ():
            self.push_to(session, group, label, body)

    def push_to(self, session: Session, group: Group, label: str, body: bytes) -> None:
        """Send a body to one session."""
        session.pushes.append((group.id, label, len(body)))
        session.push_bodies.append(body)
        self._dirty.add(session)

    # sessions

    def _hello(self, peer: int, header: bytes) -> None:
        hello = wire.decode_hello(header)
        store = self.store
        session = store.sessions.get(peer)
        if session is None:
            if sum(1 for known in store.sessions.values() if known.connected) >= self.limits.max_peers:
                raise ProtocolError(f"more than {self.limits.max_peers} peers")
            session = store.sessions[peer] = Session(peer)
        session.connected = True
        session.role, session.name, session.pid = hello.role, hello.name, hello.pid
        session.last_frame = max(session.last_frame, hello.next_frame - 1)
        for name, prefetch in hello.consume:
            self.consume(session, name, prefetch)
        lost = [id for id, lease in hello.holding if not self._adopt(session, id, lease)]
        self.heard_of(peer)
        self.notice(session, "welcome", lost)
        if hello.watching:
            self.admin.watch(session, hello.watching)

    def _adopt(self, session: Session, id: int, lease: int) -> bool:
        """Give a worker that outlived a broker the lease it had; False when the message is not its own any more."""
        message = self.store.messages.get(id)
        if message is None:
            return False
        if message.holder is not None:
            return message.holder.session is session and message.lease == lease
        consumer = session.consumers.get(message.queue.name)
        if consumer is None or message.state() != "ready" or lease >= self.store.epoch << 40:
            return False
        message = self.store.replace(message)
        message.holder, message.lease = consumer, lease
        consumer.held[id] = message
        return True

    def consume(self, session: Session, name: str, prefetch: int) -> None:
        """`session` takes messages of a queue, `prefetch` at once."""
        consumer = session.consumers.get(name)
        if consumer is None:
            queue = self.store.queue(name)
            consumer = session.consumers[name] = Consumer(session, queue, prefetch)
            queue.consumers.append(consumer)
        consumer.prefetch = prefetch
        self.touch(consumer.queue)

    def bury(self, session: Session, *, guilty: int = 0, on_guilty: Callable[[Message], None] | None = None) -> None:
        """The session is over: what it held goes back to the head of its queue, in order, uncharged.

        `on_guilty` is given the message it was running, in place of putting it back.
        """
        for consumer in session.consumers.values():
            queue = consumer.queue
            queue.consumers.remove(consumer)
            for message in reversed(consumer.held.values()):
                message.holder, message.lease = None, 0
                if message.id == guilty and on_guilty is not None:
                    continue
                queue.push_front(message)
            if guilty in consumer.held and on_guilty is not None:
                on_guilty(consumer.held[guilty])
            consumer.held.clear()
            self.touch(queue)
        session.consumers.clear()
        session.connected = False
        self.store.sessions.pop(session.peer, None)

    def heard_of(self, peer: int) -> None:
        """The peer has announced what it holds, or is dead: no queue waits for it any longer."""
        for queue in self.store.queues.values():
            if peer in queue.awaiting:
                queue.awaiting.discard(peer)
                self.touch(queue)

    def disconnect(self, peer: int) -> None:
        """The peer cannot be reached. A worker's leases stay until its death is confirmed; anyone else is forgotten."""
        session = self.store.sessions.get(peer)
        if session is not None and not any(consumer.held for consumer in session.consumers.values()):
            self.bury(session)

    # frames that are numbered

    def _fresh(self, session: Session, broker_epoch: int, frame: int) -> bool:
        """Whether this frame is to be taken. One that was taken before is only acknowledged again."""
        self._dirty.add(session)
        if broker_epoch != self.store.epoch:
            self.notice(session, "hello", None)
            return False
        if frame <= session.last_frame:
            return False
        if frame != session.last_frame + 1:
            self.notice(session, "resend", session.last_frame + 1)
            return False
        session.last_frame = frame
        return True

    def _query(self, session: Session, header: bytes, blob: bytes) -> None:
        query = wire.decode_query(header)
        if not self._fresh(session, query.broker_epoch, query.frame):
            return
        try:
            answer = self.admin.call(session, query.name, query.args, blob)
        except Refused as error:
            answer = {"refused": str(error)}
        except ProtocolError as error:
            self.malformed += 1
            answer = {"refused": str(error)}
        self.result(session, query.frame, answer)

    def _release(self, session: Session, header: bytes, blob: bytes) -> None:
        release = wire.decode_release(header)
        if not self._fresh(session, release.broker_epoch, release.frame):
            return
        if release.queue in session.consumers:
            self.consume(session, release.queue, release.prefetch)
        returned = [m for id, lease in release.leases if (m := self._leased(session, id, lease)) is not None]
        for message in reversed(returned):
            assert message.holder is not None
            message.holder.held.pop(message.id, None)
            message.holder, message.lease = None, 0
            message.queue.push_front(message)
            self.touch(message.queue)

    def _leased(self, session: Session, id: int, lease: int) -> Message | None:
        message = self.store.messages.get(id)
        if message is None or message.lease != lease:
            return None
        holder = message.holder
        if holder is None or holder.session is not session:
            return None
        return message

    def _checkpoint(self, session: Session, header: bytes, blob: bytes) -> None:
        frame = wire.decode_checkpoint(header)
        if not self._fresh(session, frame.broker_epoch, frame.frame):
            return
        message = self._leased(session, frame.id, frame.lease)
        if message is None:
            self.result(session, frame.frame, {"refused": f"message {frame.id} is not held under lease {frame.lease}"})
            return
        extra = message.details()
        if extra.steps is None:
            extra.steps = {}
        extra.steps[frame.name] = blob
        self.record(records.KEPT_CHECKPOINT, session.peer, header, blob)

    # publish

    def _publish(self, session: Session, header: bytes, blob: bytes) -> None:
        frame = wire.decode_publish(header, blob)
        if not self._fresh(session, frame.broker_epoch, frame.frame):
            if frame.frame <= session.last_frame and frame.broker_epoch == self.store.epoch:
                self._answer_again(session, frame)
            return
        try:
            refused = self._judge(session, frame)
        except (QueueFull, PayloadTooLarge, Refused) as error:
            self.result(session, frame.frame, {"error": type(error).__name__, "message": str(error)})
            return
        if refused:
            self.result(
                session,
                frame.frame,
                {"left_seq": self.store.left_seq, "epoch": self.store.epoch, "items": refused},
            )
            if frame.atomic and any(status != EXISTS for _, status, _ in refused):
                return
            frame, blob = _without(frame, blob, {index for index, _, _ in refused})
            header = wire.encode(frame)
        if not frame.items and not frame.opens and not frame.arrivals:
            return
        place = self.record(records.KEPT_PUBLISH, session.peer, header, blob)
        at = 0
        targets = self._resolve(frame.targets)
        for item in frame.items:
            self._put_item(item, targets, blob, at, place, None, session)
            at += item.size
        self._gathering(frame.opens, frame.arrivals, targets, blob, at, place, None)
        self._complete_gathers()

    def _judge(self, session: Session, frame: PublishFrame) -> list[tuple[int, str, str]]:
        """Which items are not to be taken, as (index, why, detail). Raises what refuses the whole frame."""
        refused: list[tuple[int, str, str]] = []
        store = self.store
        limit = self.limits.max_message_bytes
        incoming: dict[int, int] = {}
        seen_here: dict[str, bytes | None] = {}
        for index, item in enumerate(frame.items):
            if item.size > limit:
                raise PayloadTooLarge(f"a message of {item.size} bytes is over max_message_bytes={limit}")
            if not item.flags & wire.START:
                continue
            if self.refusing:
                raise Refused(self.refusing)
            group = store.groups.get(item.group)
            if group is not None or item.group in seen_here:
                digest = group.digest if group is not None else seen_here[item.group]
                if digest == item.digest:
                    refused.append((index, EXISTS, item.group))
                    if item.flags & wire.WATCH and group is not None:
                        self.admin.watch(session, [item.group])
                else:
                    refused.append((index, CONFLICT, item.group))
            elif item.flags & wire.CHECK and self._may_have_left(item):
                refused.append((index, LOOK_AGAIN, item.group))
            else:
                if item.flags & wire.CHECK:
                    seen_here[item.group] = item.digest
                incoming[item.target] = incoming.get(item.target, 0) + 1
        for target, count in incoming.items():
            queue = store.queue(frame.targets[target].queue)
            most = queue.options.max_length
            if most and queue.ready_count + queue.delayed + count > most:
                raise QueueFull(
                    f"queue {queue.name} holds {queue.ready_count} messages, its max_queue_length is {most}"
                )
        return refused

    def _may_have_left(self, item: PublishItem) -> bool:
        store = self.store
        epoch, seen = divmod(item.seen, 1 << 40)
        if epoch != store.epoch:
            return True
        return seen < store.left_floor or store.left.get(item.group, 0) > seen

    def _answer_again(self, session: Session, frame: PublishFrame) -> None:
        """A frame sent again after it was taken: say of its starts what is true now."""
        again = []
        for index, item in enumerate(frame.items):
            if item.flags & wire.START:
                group = self.store.groups.get(item.group)
                if group is None:
                    again.append((index, LOOK_AGAIN, item.group))
                elif group.digest != item.digest:
                    again.append((index, CONFLICT, item.group))
                elif item.flags & wire.WATCH:
                    self.admin.watch(session, [item.group])
        if again:
            answer = {"left_seq": self.store.left_seq, "epoch": self.store.epoch, "items": again, "again": True}
            self.result(session, frame.frame, answer)

    def _resolve(self, targets: list[Target]) -> Resolved:
        queue = self.store.queue
        touched = self._touched
        resolved: Resolved = []
        for target in targets:
            found = None if target.flags & wire.PUSH_ONLY else queue(target.queue)
            if found is not None:
                touched.add(found)
            resolved.append((found, target.label, target.flags))
        return resolved

    def _put_item(
        self,
        item: PublishItem,
        targets: Resolved,
        blob: bytes,
        at: int,
        place: Place,
        parent: Message | None,
        session: Session | None,
    ) -> None:
        store = self.store
        queue, label, flags = targets[item.target]
        body = blob[at : at + item.size]
        if item.group or parent is None:
            group = store.group(item.group, item.epoch, place)
            epoch = item.epoch
        else:
            group, epoch = parent.group, parent.epoch
        if item.flags & wire.START and group is not None:
            group.started = True
            group.digest = item.digest
            group.epoch = max(group.epoch, item.epoch)
            if item.flags & wire.WATCH and session is not None:
                group.watchers = [session]
        if queue is None:
            if group is not None:
                self.push(group, label, body)
            return
        message = store.put(queue, group, epoch, label, item.priority, body, place, at)
        if item.delay or item.ttl:
            extra = message.details()
            store.delay(extra, item.delay)
            if item.ttl:
                extra.expires = store.now + item.delay + item.ttl
                extra.expires_wall = store.wall + item.delay + item.ttl
        if flags & wire.TERMINAL and group is not None:
            group.ended = label
            self.push(group, label, body)
        if group is not None and epoch < group.epoch and group.divert is not None:
            self.divert(message, group)
            return
        store.enqueue(message)

    def divert(self, message: Message, group: Group) -> None:
        """A message of an epoch that is over goes to whoever raised the epoch."""
        assert group.divert is not None
        queue_name, label = group.divert
        message.queue = self.store.queue(queue_name)
        message.label = label
        if message.extra is not None:
            message.extra.due = message.extra.due_wall = 0.0
            message.extra.parked = False
        self.copy(message)
        self.store.enqueue(message)
        self.touch(message.queue)

    # settle

    def _settle(self, session: Session, header: bytes, blob: bytes) -> None:
        frame = wire.decode_settle(header, blob)
        if not self._fresh(session, frame.broker_epoch, frame.frame):
            return
        if frame.queue and frame.prefetch >= 0 and frame.queue in session.consumers:
            session.consumers[frame.queue].prefetch = frame.prefetch
            self.touch(session.consumers[frame.queue].queue)
        targets = self._resolve(frame.targets)
        index = len(self._records)
        place = self.record(records.KEPT_SETTLE, session.peer, header, blob)
        stale = self._move(session, frame.moves, targets, blob, place)
        at = sum(move[3] for move in frame.moves) if frame.others else 0
        refused = [frame.moves[i][0] for i in stale]
        bad_acks = self._acknowledge(session, frame.acks)
        refused += [frame.acks[i][0] for i in bad_acks]
        for other in frame.others:
            if not self._settle_other(session, other, targets, blob, at, place):
                refused += [id for id, _ in other.leases]
            at += _other_size(other)
        self._complete_gathers()
        if refused:
            self.result(session, frame.frame, {"stale": refused})
            self._restate(index, frame)

    def _move(self, session: Session, moves: list[Move], targets: Resolved, blob: bytes, place: Place) -> list[int]:
        """The happy path, once per stage of each instance: the message settled becomes the one that follows."""
        store = self.store
        messages = store.messages
        next_id = store.next_id
        at = 0
        grown = 0
        stale: list[int] = []
        diverted: list[Message] = []
        touched = self._touched
        for index, (id, lease, target, size, group_id) in enumerate(moves):
            message = messages.get(id)
            if message is None or message.lease != lease:
                stale.append(index)
                at += size
                continue
            holder = message.holder
            group = message.group
            if (
                holder is None
                or holder.session is not session
                or message.queue is not holder.queue
                or group_id != ("" if group is None else group.id)
                or targets[target][0] is None
            ):
                stale.append(index)
                at += size
                continue
            del messages[id]
            del holder.held[id]
            old = holder.queue
            old.settled += 1
            touched.add(old)
            queue, label, flags = targets[target]
            assert queue is not None
            body = blob[at : at + size]
            grown += size - message.size
            message.id = next_id
            message.queue = queue
            message.label = label
            message.priority = 0
            message.body = body
            message.size = size
            message.place = place
            message.at = at
            message.lease = 0
            message.holder = None
            message.extra = None
            messages[next_id] = message
            next_id += 1
            at += size
            if group is not None:
                if group.more is not None:
                    group.relink(id, message)
                if message.epoch < group.epoch:
                    diverted.append(message)
                    continue
                if flags:
                    group.ended = label
                    if group.watchers is not None:
                        self.push(group, label, body)
            queue.ready.append(message)
            if store.paging and len(queue.ready) > DEEP:
                message.body = None
        store.next_id = next_id
        store.live_bytes += grown
        for message in diverted:
            assert message.group is not None
            if message.group.divert is not None:
                self.divert(message, message.group)
            else:
                store.enqueue(message)
        return stale

    def _acknowledge(self, session: Session, acks: list[wire.Ack]) -> list[int]:
        store = self.store
        bad: list[int] = []
        for index, (id, lease, flags, group_id) in enumerate(acks):
            message = self._leased(session, id, lease)
            if message is None:
                bad.append(index)
                continue
            queue = message.queue
            queue.settled += 1
            self._touched.add(queue)
            store.remove(message)
            if flags & wire.LEAVE:
                store.leave(group_id)
        return bad

    def _settle_other(
        self, session: Session, item: SettleItem, targets: Resolved, blob: bytes, at: int, place: Place
    ) -> bool:
        held = [self._leased(session, id, lease) for id, lease in item.leases]
        messages = [message for message in held if message is not None]
        if len(messages) != len(held):
            return False
        store = self.store
        first = messages[0]
        for message in messages:
            queue = message.queue
            queue.settled += 1
            self._touched.add(queue)
            if item.outcome == wire.DONE:
                store.remove(message)
                continue
            assert message.holder is not None
            message.holder.held.pop(message.id, None)
            message.holder, message.lease = None, 0
            extra = message.details()
            extra.attempts += 1
            extra.failure, extra.fresh = item.failure, False
            if item.outcome == wire.AGAIN:
                self.again(message, item.delay)
            else:
                store.park(message, reason=item.failure, evidence=False)
                if message.group is not None:
                    self.notify(message.group, "parked")
        for publish in item.publishes:
            self._put_item(publish, targets, blob, at, place, first, session)
            at += publish.size
        self._gathering(item.opens, item.arrivals, targets, blob, at, place, first)
        if item.leave:
            store.leave(item.leave)
        return True

    def again(self, message: Message, seconds: float = 0.0) -> None:
        """Deliver once more, after a delay or at once; a message of an epoch that is over is diverted."""
        store = self.store
        group = message.group
        store.delay(message.details(), seconds)
        if group is not None and message.epoch < group.epoch and group.divert is not None:
            self.divert(message, group)
        else:
            store.enqueue(message, front=not seconds)

    def _restate(self, index: int, frame: SettleFrame) -> None:
        """Replace the record of a frame that was taken in part by what came of it: a replay must not take the rest."""
        kind, first_id, peer, _, _ = self._records[index]
        gone = [move[0] for move in frame.moves] + [ack[0] for ack in frame.acks]
        gone += [id for other in frame.others if other.outcome == wire.DONE for id, _ in other.leases]
        messages = self.store.messages
        header = records.encode((frame.frame, [id for id in gone if id not in messages]))
        self._records[index] = (records.FORGET, first_id, peer, header, b"")
        for id in range(first_id, self.store.next_id):
            message = messages.get(id)
            if message is not None:
                self.copy(message)
                if message.group is not None and message.group.ended:
                    self.keep_group(message.group)
        for other in frame.others:
            for id, _ in other.leases if other.outcome != wire.DONE else ():
                if id in messages:
                    self.mark(messages[id])
        left = [ack[3] for ack in frame.acks if ack[2] & wire.LEAVE] + [o.leave for o in frame.others if o.leave]
        left = [id for id in left if id not in self.store.groups]
        if left:
            self.record(records.LEFT, 0, records.encode(left))

    # gathers

    def _gathering(
        self,
        opens: list[wire.GatherOpen],
        arrivals: list[wire.Arrival],
        targets: Resolved,
        blob: bytes,
        at: int,
        place: Place,
        parent: Message | None,
    ) -> None:
        store = self.store
        for opening in opens:
            group = store.group(opening.group, opening.epoch, place) if opening.group else parent and parent.group
            base = blob[at : at + opening.size]
            at += opening.size
            queue, label, _ = targets[opening.target]
            if group is None or queue is None:
                continue
            gather = store.gather(group, opening.key, place)
            epoch = opening.epoch if opening.group or parent is None else parent.epoch
            gather.open(need=opening.need, queue=queue.name, label=label, epoch=epoch, base=base)
            if opening.deadline:
                gather.due = store.now + opening.deadline
                gather.due_wall = store.wall + opening.deadline
                store.timer(gather.due, 0, group.id, gather.key)
            self._completing.append((group, gather.key))
        for arrival in arrivals:
            group = store.group(arrival.group, arrival.epoch, place) if arrival.group else parent and parent.group
            body = blob[at : at + arrival.size]
            at += arrival.size
            if group is None:
                continue
            gather = store.gather(group, arrival.key, place)
            gather.arrive(arrival.slot, body)
            self._completing.append((group, arrival.key))

    def _complete_gathers(self) -> None:
        """Behind all ids that the frame itself makes: a replay makes those of the frame and reads these as copies."""
        for group, key in self._completing:
            while self.store.gather(group, key, group.place).complete:
                self._complete(group, key, expired=False)
        self._completing.clear()

    def _complete(self, group: Group, key: str, *, expired: bool) -> None:
        store = self.store
        gather = store.gather(group, key, group.place)
        queue = store.queue(gather.queue)
        label, epoch = gather.label, gather.epoch
        body, parts = gather.take()
        message = store.put(queue, group, epoch, label, 0, body, group.place, 0)
        extra = message.details()
        extra.parts = parts
        if expired:
            extra.failure, extra.fresh = b"expired", True
        self.copy(message)
        self.keep_gather(group, key)
        store.enqueue(message)
        self.touch(queue)

    def _gather_due(self, due: float, group_id: str, key: str) -> None:
        group = self.store.groups.get(group_id)
        gather = None if group is None or group.gathers is None else group.gathers.get(key)
        if group is not None and gather is not None and gather.need is not None and gather.due == due:
            self._complete(group, key, expired=True)

    def _message_due(self, due: float, id: int) -> None:
        message = self.store.messages.get(id)
        if message is None or message.extra is None or message.extra.due != due or message.holder is not None:
            return
        message.extra.due = message.extra.due_wall = 0.0
        message.queue.delayed -= 1
        message.queue.push(message)
        self.touch(message.queue)

    # deliveries

    def _pump(self, queue: Queue) -> None:
        if queue.paused or queue.awaiting or not queue.consumers:
            return
        free = [c for c in queue.consumers if c.session.connected and len(c.held) < c.prefetch]
        if self.held_back:
            free = [c for c in free if c.session.role == "supervisor"]
        while free and (lane := queue.next_lane()):
            share = -(-len(lane) // len(free))
            consumer = free.pop(0)
            self._deliver(queue, consumer, min(share, consumer.prefetch - len(consumer.held)))
        if len(queue.consumers) > 1:
            queue.consumers.append(queue.consumers.pop(0))

    def _deliver(self, queue: Queue, consumer: Consumer, count: int) -> None:
        session = consumer.session
        held = consumer.held
        lease = self.store.next_lease
        items: list[tuple[Any, ...]] = []
        bodies = session.bodies
        room = DELIVERED_BYTES
        while count > 0 and room > 0 and (lane := queue.next_lane()):
            message = lane.popleft()
            if message.holder is not None:
                queue.skip -= 1
                continue
            extra = message.extra
            if extra is not None and extra.expires and extra.expires <= self.store.now:
                extra.expires = extra.expires_wall = 0.0
                extra.failure, extra.fresh = b"expired", True
            message.lease = lease
            message.holder = consumer
            held[message.id] = message
            body = message.body
            if body is None:
                body = message.body = self.body(message)
            bodies.append(body)
            room -= len(body)
            group = message.group
            items.append(
                (
                    message.id,
                    lease,
                    len(body),
                    "" if group is None else group.id,
                    message.epoch,
                    None if extra is None and not message.priority else _delivered_extra(message),
                )
            )
            lease += 1
            count -= 1
        self.store.next_lease = lease
        if items:
            queue.delivered += len(items)
            session.deliveries.append((queue.name, items))
            self._dirty.add(session)


def _delivered_extra(message: Message) -> DeliveryExtra:
    extra = message.details()
    return DeliveryExtra(
        extra.attempts,
        extra.deaths,
        extra.failure,
        extra.fresh,
        extra.steps,
        extra.parts,
        message.label,
        message.priority,
    )


def _other_size(item: SettleItem) -> int:
    return (
        sum(publish.size for publish in item.publishes)
        + sum(opening.size for opening in item.opens)
        + sum(arrival.size for arrival in item.arrivals)
    )


def _without(frame: PublishFrame, blob: bytes, dropped: set[int]) -> tuple[PublishFrame, bytes]:
    """The frame and its bodies without some of its items."""
    bodies: list[bytes] = []
    items = []
    at = 0
    for index, item in enumerate(frame.items):
        if index not in dropped:
            items.append(item)
            bodies.append(blob[at : at + item.size])
        at += item.size
    bodies.append(blob[at:])
    kept = PublishFrame(
        frame.broker_epoch, frame.frame, frame.targets, items, frame.atomic, frame.opens, frame.arrivals
    )
    return kept, b"".join(bodies)
