"""Messages, groups and where they lie in the journal: the values of the broker core.

Hot values have slots and no behaviour. A message that has never failed, waited or been checkpointed carries no
`DeliveryState`: a million queued messages pay for what happened to them and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stageflow_brokers.core.gather import Gather
    from stageflow_brokers.core.queue import Queue
    from stageflow_brokers.core.sessions import Consumer, Session

__all__ = ["DELAYED", "LEASED", "PARKED", "READY", "DeliveryState", "Group", "Message", "RecordLocation"]

READY, LEASED, DELAYED, PARKED = "ready", "leased", "delayed", "dead"


class RecordLocation:
    """Where the blob of one record lies in the journal, once it has been written; shared by all its messages.

    `batch` is where the batch begins in which it was written.
    """

    __slots__ = ("batch", "offset", "segment", "wall")

    def __init__(self, wall: float, segment: int = -1, offset: int = -1, batch: int = -1) -> None:
        self.wall = wall
        self.segment = segment
        self.offset = offset
        self.batch = batch


class DeliveryState:
    """What has happened to a message: failures, delays, checkpoints, death. Wall times in seconds since the epoch.

    `steps` are set by `BrokerState.keep_steps`, which counts their bytes. `last_death_peer` is the peer whose death was
    last charged to the message, so that a repeated report of this death is not charged again.
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
    """One message. `lease` is (broker epoch << 40 | sequence) while `holder` is not None.

    `body` is None while it lies on disk only, `body_offset` bytes behind the beginning of the blob at `location`.
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
        """Bytes of the body and of what is kept with it."""
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
        """The extra of this message, made on first use."""
        if self.delivery_state is None:
            self.delivery_state = DeliveryState()
        return self.delivery_state

    @property
    def is_stale_epoch(self) -> bool:
        """Whether the epoch of its group has gone on, and somebody waits for what belongs to the one before."""
        group = self.group
        return group is not None and self.epoch < group.epoch and group.divert_to is not None

    @property
    def is_cancelled(self) -> bool:
        """Whether its group was cancelled and it is of before: to be passed through, and not to wait for anything."""
        group = self.group
        return group is not None and group.cancelled is not None and self.epoch < group.epoch

    @property
    def is_cancel_unannounced(self) -> bool:
        """Whether it is unwanted, and was given to its holder before it was: it has yet to be passed through."""
        group = self.group
        return self.is_cancelled and group is not None and self.lease < group.cancel_lease

    def is_expired(self, now: float) -> bool:
        """Whether it has waited for longer than it was to, and still waits."""
        delivery_state = self.delivery_state
        return (
            delivery_state is not None
            and 0 < delivery_state.expires <= now
            and self.holder is None
            and not delivery_state.due
        )

    def state(self) -> str:
        """One of READY, LEASED, DELAYED, PARKED."""
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
    """Messages that belong together (an instance, to those who know of such): one epoch, one end.

    Nearly always there is one message, so it is referred to directly; `more` holds the others when there are any.
    `ended` is the label of its terminal message once that has been published. `cancelled` says why its older messages
    are to be passed through unworked, None where they are not; `released` how the keys of gathers begin that it does
    not wait for any more then; `warned` the first lease that was given out since: whoever has one of before does not
    know of it.
    """

    __slots__ = (
        "cancel_lease",
        "cancelled",
        "digest",
        "divert_to",
        "ended",
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
        self.ended = ""
        self.first_message: Message | None = None
        self.other_messages: dict[int, Message] | None = None
        self.gathers: dict[str, Gather] | None = None
        self.watchers: list[Session] | None = None
        self.divert_to: tuple[str, str] | None = None
        self.cancelled: str | None = None
        self.released_prefixes: tuple[str, ...] = ()
        self.cancel_lease = 0

    def link(self, message: Message) -> None:
        """`message` belongs to this group from now on."""
        if self.first_message is None:
            self.first_message = message
        elif self.other_messages is None:
            self.other_messages = {message.id: message}
        else:
            self.other_messages[message.id] = message

    def unlink(self, message: Message) -> None:
        """`message` belongs to this group no longer."""
        if self.first_message is message:
            self.first_message = None
            if self.other_messages:
                _, self.first_message = self.other_messages.popitem()
        elif self.other_messages is not None:
            self.other_messages.pop(message.id, None)

    def relink(self, old_id: int, message: Message) -> None:
        """`message` keeps its place under a new id."""
        if (
            self.first_message is not message
            and self.other_messages is not None
            and self.other_messages.pop(old_id, None) is not None
        ):
            self.other_messages[message.id] = message

    def is_halted(self, now: float) -> bool:
        """Whether it has dead letters and nothing else that anybody waits for: what has expired unread is no work."""
        found, parked = self.messages(), False
        for message in found:
            if message.state() == PARKED:
                parked = True
            elif not message.is_expired(now):
                return False
        return parked

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left that could ever go on: no message, and no gather that is open or has arrivals."""
        if self.first_message is not None or self.other_messages:
            return False
        return not self.gathers or not any(g.need is not None or g.arrivals for g in self.gathers.values())

    def messages(self) -> list[Message]:
        """All messages of the group, in no particular order."""
        found = [] if self.first_message is None else [self.first_message]
        if self.other_messages:
            found.extend(self.other_messages.values())
        return found
