"""The messages, settlements and options of the broker port, and their limits.

Pure data: this module must do no I/O and must not import any other module of the project, so that each broker, and
each user of one, can import it.
"""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from msgspec import Meta, Struct

__all__ = [
    "ACK",
    "ATTEMPT_FAILED",
    "ATTEMPT_SUCCEEDED",
    "ATTEMPT_UNKNOWN",
    "DEAD_LETTER",
    "FLAG_CHECK",
    "FLAG_CLOSE_GROUP",
    "FLAG_START",
    "FLAG_WATCH",
    "MAX_FAILURE_BYTES",
    "MAX_LISTED_GROUPS",
    "MAX_LIST_ITEMS",
    "MAX_NAME_CHARS",
    "MAX_PRIORITY",
    "MAX_TEXT_CHARS",
    "PUSH_ONLY",
    "RETRY",
    "TERMINAL",
    "Ack",
    "Arrival",
    "BrokerStats",
    "CancelResult",
    "DeliveryExtra",
    "DeliveryItem",
    "Digest",
    "EpochResult",
    "Failure",
    "GatherOpen",
    "LeaseList",
    "LookupResult",
    "Many",
    "Move",
    "Name",
    "PingResult",
    "Priority",
    "PublishItem",
    "PurgeResult",
    "QueueOptions",
    "QueueStats",
    "RaiseEpochResult",
    "RequeueResult",
    "SettleItem",
    "TallyResult",
    "Target",
    "Text",
]

MAX_LIST_ITEMS = 1_000_000
"""Limit of entries of a list in a header: items, leases, settlements, names."""

MAX_NAME_CHARS = 1024
"""Limit of characters of a name: of a queue, a group, a gather and its slots, a label, a step."""

MAX_LISTED_GROUPS = 100_000
"""Limit of groups in one answer."""

MAX_TEXT_CHARS = 64 << 10
"""Limit of characters of a reason that a caller gives."""

MAX_FAILURE_BYTES = 1 << 20
"""Limit of bytes of an encoded failure."""

MAX_PRIORITY = 1_000
"""Priorities lie between -MAX_PRIORITY and this; each has a lane of its own."""

TERMINAL = 1
"""Target flag: the body is the end of the group, so it is pushed to the watchers of the group."""
PUSH_ONLY = 2
"""Target flag: the body goes to watchers of the group and to no queue."""

FLAG_START = 1
"""Publish flag: the group must not be live yet."""
FLAG_WATCH = 2
"""Publish flag: the sender watches the group."""
FLAG_CHECK = 4
"""Publish flag: a user chose the id, so the history may contain it. The item is refused with `look-again` if a group of
this id may have been closed since `history_sequence`."""

FLAG_CLOSE_GROUP = 1
"""Ack flag: the group has ended; the broker deletes its id and its remaining messages."""

ACK, RETRY, DEAD_LETTER = 0, 1, 2
"""Outcomes of a settlement."""

ATTEMPT_UNKNOWN, ATTEMPT_FAILED, ATTEMPT_SUCCEEDED = 0, 1, 2
"""Result of the attempt, for the breaker of the queue; a move counts as succeeded."""

Name = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
Text = Annotated[str, Meta(max_length=MAX_TEXT_CHARS)]
Failure = Annotated[bytes, Meta(max_length=MAX_FAILURE_BYTES)]
Priority = Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
Digest = Annotated[bytes, Meta(max_length=1024)]
Many = Meta(max_length=MAX_LIST_ITEMS)
LeaseList = Annotated[list[tuple[int, int]], Many]


class Target(Struct, array_like=True, gc=False):
    """A destination of bodies: named once per frame, referred to by position.

    Attributes:
        queue: The name of the queue.
        label: The label of the messages. Default: empty.
        flags: `TERMINAL`, `PUSH_ONLY`, or 0. Default: 0.
    """

    queue: Name
    label: Name = ""
    flags: int = 0


class PublishItem(Struct, array_like=True, gc=False):
    """One new message.

    Attributes:
        target: Position of its target in the frame.
        size: Size of its body in bytes.
        group: The id of its group; in a settlement empty for the group and epoch of the settled message.
        epoch: The epoch of the group. Default: 0.
        flags: `FLAG_START`, `FLAG_WATCH`, `FLAG_CHECK`, combined. Default: 0.
        priority: From -1,000 to 1,000; higher ones are delivered first. Default: 0.
        delay: Seconds until it is ready. Default: 0.
        ttl: Seconds that it may wait in the queue; 0 for no limit. Default: 0.
        digest: Hash of the input, to recognise the same start. Default: None.
        history_sequence: The `PublishAnswer.history_sequence` that the sender knows, for `FLAG_CHECK`. Default: 0.
    """

    target: int
    size: int
    group: Name = ""
    epoch: int = 0
    flags: int = 0
    priority: Priority = 0
    delay: float = 0.0
    ttl: float = 0.0
    digest: Digest | None = None
    history_sequence: int = 0


class GatherOpen(Struct, array_like=True, gc=False):
    """Wait for arrivals, then publish one message.

    Its body is the base body, followed by the bodies of the arrivals.

    Attributes:
        key: The name of the gather in its group.
        need: Number of arrivals.
        target: Position of the target of that message in the frame.
        size: Size of the base body in bytes.
        group: The id of the group; in a settlement empty for that of the settled message.
        epoch: The epoch of the group. Default: 0.
        deadline: Seconds after which the message is published with the arrivals so far; 0 for no limit. Default: 0.
    """

    key: Name
    need: int
    target: int
    size: int
    group: Name = ""
    epoch: int = 0
    deadline: float = 0.0


class Arrival(Struct, array_like=True, gc=False):
    """One arrival at a gather. A slot counts once.

    Attributes:
        key: The name of the gather.
        slot: The name of the arrival.
        size: Size of its body in bytes.
        group: The id of the group; in a settlement empty for that of the settled message.
        epoch: The epoch of the group. Default: 0.
    """

    key: Name
    slot: Name
    size: int
    group: Name = ""
    epoch: int = 0


Move = tuple[int, int, int, int, Name]
"""(id, lease, target, size, group): done, and one message of the same group and epoch follows, with priority 0."""
Ack = tuple[int, int, int, Name]
"""(id, lease, flags, group): done, and nothing follows."""


class SettleItem(Struct, array_like=True):
    """A settlement of any form. Either all of its leases count, or none.

    Attributes:
        leases: (id, lease) of the messages.
        outcome: `ACK`, `RETRY` (another attempt) or `DEAD_LETTER` (dead letter).
        publishes: Messages that follow. Default: none.
        delay: Seconds before the next attempt. Default: 0.
        failure: Opaque bytes, kept with the message. Default: None.
        opens: Gathers to open. Default: none.
        arrivals: Arrivals at gathers. Default: none.
        close_group: The id of the group if it has ended. Default: empty.
        attempt_result: `ATTEMPT_SUCCEEDED`, `ATTEMPT_FAILED` or 0, for the breaker of the queue. Default: 0.
    """

    leases: LeaseList
    outcome: int
    publishes: Annotated[list[PublishItem], Many] = []
    delay: float = 0.0
    failure: Failure | None = None
    opens: Annotated[list[GatherOpen], Many] = []
    arrivals: Annotated[list[Arrival], Many] = []
    close_group: Name = ""
    attempt_result: int = ATTEMPT_UNKNOWN


class DeliveryItem(Struct, array_like=True, gc=False):
    """One delivered message.

    Attributes:
        id: Number of the message.
        lease: Number of the lease, for its settlement.
        size: Size of its body in bytes.
        group: The id of its group.
        epoch: The epoch of the group in which the message was published; `epoch_now` of `extra` is the present one.
        extra: State of a message that is not new and plain; None otherwise. Default: None.
    """

    id: int
    lease: int
    size: int
    group: str
    epoch: int
    extra: DeliveryExtra | None = None


class DeliveryExtra(Struct, array_like=True):
    """State of a message from before this delivery.

    Attributes:
        attempts: Number of failed attempts.
        deaths: Number of consumers that died while they handled it.
        failure: The last failure, opaque bytes, or None.
        fresh: True if no consumer has judged that failure yet: the broker has recorded a death or an expiry. The next
            consumer decides on a retry before anything else.
        steps: Results of steps by name, or None.
        parts: (slot, size) of the parts of a gathered body, or None.
        label: The label of the message.
        priority: Its priority.
        cancelled: Reason of a cancellation: pass the message through without work. None if not cancelled.
        epoch_now: The present epoch of the group, to which the following messages belong.
    """

    attempts: int = 0
    deaths: int = 0
    failure: bytes | None = None
    fresh: bool = False
    steps: dict[str, bytes] | None = None
    parts: list[tuple[str, int]] | None = None
    label: str = ""
    priority: int = 0
    cancelled: str | None = None
    epoch_now: int = 0


class QueueOptions(Struct, array_like=True, frozen=True):
    """How a queue treats its messages.

    Attributes:
        name: The name of the queue.
        max_deaths: Number of consumers that a message may kill before it becomes a dead letter; 0 for no limit.
        evidence: True if such a dead letter cannot be requeued, because the receiver at `notify_queue` takes over.
        notify_queue: The queue that is notified of such dead letters; empty for none.
        notify_label: The label of that message.
        max_length: Number of waiting messages from which on new starts are refused; 0 for no limit.
        breaker_failures: Number of failed attempts in a row that stop deliveries; 0 for no breaker.
        breaker_reset: Seconds until one message is tried.

    Example:
        >>> from stageflow_brokers.api import QueueOptions
        >>> QueueOptions("orders", max_deaths=3).max_length
        0
    """

    name: str
    max_deaths: int = 0
    evidence: bool = False
    notify_queue: str = ""
    notify_label: str = ""
    max_length: int = 0
    breaker_failures: int = 0
    breaker_reset: float = 0.0


class QueueStats(TypedDict):
    """The figures of one queue. `oldest` in seconds; `breaker` is its state, empty without one.

    `reason`: why its consumers cannot start; `next_start_at`: the time of the next attempt in seconds since the Unix
    epoch, past during one, 0 for none; `starting`: how far consumers are that take long to start.
    """

    name: str
    ready: int
    leased: int
    delayed: int
    dead: int
    oldest: float
    consumers: int
    busy: int
    delivered: int
    settled: int
    breaker: str
    state: str
    reason: str
    next_start_at: float
    starting: str


class BrokerStats(TypedDict):
    """The figures of a broker. `refusing` is the reason why nothing new is started, empty when there is none."""

    epoch: int
    queues: list[QueueStats]
    messages: int
    groups: int
    sessions: int
    live_bytes: int
    left_seq: int
    malformed: int
    refusing: str


class LookupResult(TypedDict):
    """Descriptions of live groups by id. `left_seq` counts the groups closed in this broker epoch."""

    epoch: int
    left_seq: int
    groups: dict[str, dict[str, Any]]


class TallyResult(TypedDict):
    """Counts of live groups: `queues` by the queue where each is, `marks` in the order of the marks."""

    queues: dict[str, int]
    marks: list[int]


class RequeueResult(TypedDict):
    """The number of requeued dead letters, and the ids of those that are evidence and stay."""

    requeued: int
    refused: list[int]


class PurgeResult(TypedDict):
    """How many messages were deleted, and the ids of the groups that ended with them."""

    purged: int
    instances: list[str]


class RaiseEpochResult(TypedDict):
    """The epoch of a group now, its messages in work, and the label of its end (empty: not ended)."""

    epoch: int
    leased: list[int]
    ended: str


class CancelResult(TypedDict):
    """The epoch of a group now, the label of its end (empty: not ended), and why it was cancelled."""

    epoch: int
    ended: str
    reason: str | None


class EpochResult(TypedDict):
    """The epoch of a group after the change."""

    epoch: int


class PingResult(TypedDict):
    """The epoch of the broker; `open` is True if the consumers are known, so that queues deliver."""

    epoch: int
    open: bool
