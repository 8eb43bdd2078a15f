"""Messages, groups and record locations: the values of the broker core.

Values have slots and make no decisions. A message that never failed, was delayed or checkpointed has no
`DeliveryState`, so a million plain queued messages need no memory for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stageflow_brokers.core.gather import Gather
    from stageflow_brokers.core.queue import Queue
    from stageflow_brokers.core.sessions import Consumer, Session

__all__ = ["DELAYED", "LEASED", "PARKED", "READY", "DeliveryState", "Group", "Message", "RecordLocation"]

READY, LEASED, DELAYED, PARKED = "ready", "leased", "delayed", "dead"
"""States of a message. A parked message is a dead letter of its queue."""


class RecordLocation:
    """The location of a record's blob in the journal, shared by all messages of the record.

    Attributes:
        wall: Time of the record, in seconds since the Unix epoch.
        segment: Number of the segment; -1 until the record is written.
        offset: Offset of the blob in the segment, in bytes.
        batch: Offset of the batch that holds the record.
    """

    __slots__ = ("batch", "offset", "segment", "wall")

    def __init__(self, wall: float, segment: int = -1, offset: int = -1, batch: int = -1) -> None:
        self.wall = wall
        self.segment = segment
        self.offset = offset
        self.batch = batch


class DeliveryState:
    """The state of a message that is not new and plain.

    It holds failures, delays, steps and the dead letter.

    Times whose name ends with `_wall` are seconds since the Unix epoch; `due` and `expires` are on the monotonic clock.

    Attributes:
        attempts: Number of failed attempts.
        deaths: Number of consumers that died while they handled the message.
        failure: The last failure, opaque bytes.
        fresh: True if no worker has judged that failure yet.
        last_death_peer: The peer whose death was last charged to the message. A repeated report of this death is not
            charged again.
        steps: Results of steps by name. Set only by `BrokerState.set_steps` and `add_step`, which count their bytes.
        step_bytes: Bytes of the steps and their names.
        parts: (slot, size) of the parts of a gathered body.
        due: Time at which a delayed message becomes ready; 0 if it is not delayed.
        delay: Seconds of that delay.
        expires: Time from which the message has waited too long; 0 for never.
        parked: True for a dead letter.
        evidence: True for a dead letter that cannot be requeued.
        reason: Why the message is a dead letter, opaque bytes.
    """

    __slots__ = (
        "attempts",
        "deaths",
        "delay",
        "due",
        "due_wall",
        "evidence",
        "expires",
        "expires_wall",
        "failure",
        "fresh",
        "last_death_peer",
        "parked",
        "parked_wall",
        "parts",
        "reason",
        "step_bytes",
        "steps",
    )

    def __init__(self) -> None:
        self.attempts = 0
        self.deaths = 0
        self.failure: bytes | None = None
        self.fresh = False
        self.last_death_peer = 0
        self.steps: dict[str, bytes] | None = None
        self.step_bytes = 0
        self.parts: list[tuple[str, int]] | None = None
        self.due = 0.0
        self.due_wall = 0.0
        self.delay = 0.0
        self.expires = 0.0
        self.expires_wall = 0.0
        self.parked = False
        self.parked_wall = 0.0
        self.evidence = False
        self.reason: bytes | None = None


class Message:
    """One message.

    Attributes:
        body: The body; None while it is only on disk.
        body_offset: Offset of the body in the blob at `location`, in bytes.
        lease: (broker epoch << 40 | sequence) while `holder` is not None, otherwise 0.
        holder: The consumer that holds the message.
        delivery_state: The state of a message that is not new and plain; None otherwise.
    """

    __slots__ = (
        "body",
        "body_offset",
        "delivery_state",
        "epoch",
        "group",
        "holder",
        "id",
        "label",
        "lease",
        "location",
        "priority",
        "queue",
        "size",
    )

    def __init__(
        self,
        id: int,
        queue: Queue,
        group: Group | None,
        epoch: int,
        label: str,
        priority: int,
        body: bytes | None,
        size: int,
        location: RecordLocation,
        body_offset: int,
    ) -> None:
        self.id = id
        self.queue = queue
        self.group = group
        self.epoch = epoch
        self.label = label
        self.priority = priority
        self.body = body
        self.size = size
        self.location = location
        self.body_offset = body_offset
        self.lease = 0
        self.holder: Consumer | None = None
        self.delivery_state: DeliveryState | None = None

    @property
    def weight(self) -> int:
        """Bytes of the body, the steps and the failures."""
        delivery_state = self.delivery_state
        if delivery_state is None:
            return self.size
        return (
            self.size
            + delivery_state.step_bytes
            + len(delivery_state.failure or b"")
            + len(delivery_state.reason or b"")
        )

    def ensure_delivery_state(self) -> DeliveryState:
        """Return the delivery state; create it on first use."""
        if self.delivery_state is None:
            self.delivery_state = DeliveryState()
        return self.delivery_state

    @property
    def is_stale_epoch(self) -> bool:
        """True if its group has a later epoch, and messages of earlier epochs are diverted."""
        group = self.group
        return group is not None and self.epoch < group.epoch and group.divert_to is not None

    @property
    def is_cancelled(self) -> bool:
        """True if its group was cancelled after it was published.

        Consumers pass it through without work.
        """
        group = self.group
        return group is not None and group.cancelled is not None and self.epoch < group.epoch

    @property
    def is_cancel_unannounced(self) -> bool:
        """True if it was cancelled after its delivery.

        Its holder does not know, so it must be delivered again.
        """
        group = self.group
        return self.is_cancelled and group is not None and self.lease < group.cancel_lease

    def is_expired(self, now: float) -> bool:
        """True if it is waiting in its queue for longer than its time to live."""
        delivery_state = self.delivery_state
        return (
            delivery_state is not None
            and 0 < delivery_state.expires <= now
            and self.holder is None
            and not delivery_state.due
        )

    def state(self) -> str:
        """Return READY, LEASED, DELAYED or PARKED."""
        if self.holder is not None:
            return LEASED
        delivery_state = self.delivery_state
        if delivery_state is not None:
            if delivery_state.parked:
                return PARKED
            if delivery_state.due:
                return DELAYED
        return READY


class Group:
    """Messages that belong together, with one epoch and one end. The runtime has one group per instance.

    Attributes:
        digest: Hash of the input that started the group.
        started: True if the group began with a start.
        end_label: The label of its terminal message, once that is published; empty before.
        first_message: One of its messages. Nearly always there is only one, so a dict would waste memory.
        other_messages: The other messages by id, None if there never were any.
        gathers: Its gathers by key, None if there never were any.
        watchers: Sessions that are notified of its end.
        divert_to: (queue, label) for messages of earlier epochs, None if they stay where they are.
        cancelled: Why its older messages are passed through without work, None if it is not cancelled.
        released_prefixes: Beginnings of the keys of gathers that a cancelled group does not wait for.
        cancel_lease: The first lease after the cancellation: holders of earlier leases do not know of it.
    """

    __slots__ = (
        "cancel_lease",
        "cancelled",
        "digest",
        "divert_to",
        "end_label",
        "epoch",
        "first_message",
        "gathers",
        "id",
        "location",
        "other_messages",
        "released_prefixes",
        "started",
        "watchers",
    )

    def __init__(self, id: str, epoch: int, location: RecordLocation) -> None:
        self.id = id
        self.epoch = epoch
        self.location = location
        self.digest: bytes | None = None
        self.started = False
        self.end_label = ""
        self.first_message: Message | None = None
        self.other_messages: dict[int, Message] | None = None
        self.gathers: dict[str, Gather] | None = None
        self.watchers: list[Session] | None = None
        self.divert_to: tuple[str, str] | None = None
        self.cancelled: str | None = None
        self.released_prefixes: tuple[str, ...] = ()
        self.cancel_lease = 0

    def link(self, message: Message) -> None:
        """Add a message to the group."""
        if self.first_message is None:
            self.first_message = message
        elif self.other_messages is None:
            self.other_messages = {message.id: message}
        else:
            self.other_messages[message.id] = message

    def unlink(self, message: Message) -> None:
        """Remove a message from the group."""
        if self.first_message is message:
            self.first_message = None
            if self.other_messages:
                _, self.first_message = self.other_messages.popitem()
        elif self.other_messages is not None:
            self.other_messages.pop(message.id, None)

    def relink(self, old_id: int, message: Message) -> None:
        """Keep a message in the group under its new id."""
        if (
            self.first_message is not message
            and self.other_messages is not None
            and self.other_messages.pop(old_id, None) is not None
        ):
            self.other_messages[message.id] = message

    def is_halted(self, now: float) -> bool:
        """True if it has dead letters and no other message except expired ones.

        No consumer works on an expired message.
        """
        found, parked = self.messages(), False
        for message in found:
            if message.state() == PARKED:
                parked = True
            elif not message.is_expired(now):
                return False
        return parked

    @property
    def is_idle(self) -> bool:
        """True if it has no message, and no gather that is open or has arrivals."""
        if self.first_message is not None or self.other_messages:
            return False
        return not self.gathers or not any(g.need is not None or g.arrivals for g in self.gathers.values())

    def messages(self) -> list[Message]:
        """Return all messages of the group, in no particular order."""
        found = [] if self.first_message is None else [self.first_message]
        if self.other_messages:
            found.extend(self.other_messages.values())
        return found
