"""The messages, settlements and options of the broker port, and their limits.

Pure data: this module must do no I/O and must not import any other module of the project, so that each broker, and
each user of one, can import it.
"""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from msgspec import Meta, Struct

__all__ = [
    "AGAIN",
    "ATTEMPT_FAILED",
    "ATTEMPT_WORKED",
    "CHECK",
    "DEAD",
    "DONE",
    "LEAVE",
    "MAX_FAILURE",
    "MAX_ITEMS",
    "MAX_NAME",
    "MAX_PRIORITY",
    "MAX_TEXT",
    "MOST_LISTED",
    "NEITHER",
    "PUSH_ONLY",
    "START",
    "TERMINAL",
    "WATCH",
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
    "Leases",
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

MAX_ITEMS = 1_000_000
"""Most entries of any list in a header: items, leases, settlements, names."""

MAX_NAME = 1024
"""Most characters of any name: of a queue, a group, a gather and its slots, a label, a step."""

MOST_LISTED = 100_000
"""Most groups of one answer."""

MAX_TEXT = 64 << 10
"""Most characters of a reason that somebody gives."""

MAX_FAILURE = 1 << 20
"""Most bytes of what is said of a failure."""

MAX_PRIORITY = 1_000
"""Priorities lie between this and as much below zero: each is a lane of its own."""

TERMINAL = 1
"""Target flag: the body is how the group ends, so it is pushed to whoever watches the group."""
PUSH_ONLY = 2
"""Target flag: the body goes to watchers of the group and to no queue."""

START = 1
"""Publish flag: the group must not be live yet."""
WATCH = 2
"""Publish flag: the sender wants to be told how the group ends."""
CHECK = 4
"""Publish flag: the id was chosen by a user, so the history may know it; refuse if something left since `seen`."""

LEAVE = 1
"""Ack flag: the group has ended; forget its id and purge what it left behind."""

DONE, AGAIN, DEAD = 0, 1, 2
"""Outcomes of a settlement."""

NEITHER, ATTEMPT_FAILED, ATTEMPT_WORKED = 0, 1, 2
"""Verdicts of a settlement on the attempt, for the breaker of the queue; a move says that it worked."""

Name = Annotated[str, Meta(max_length=MAX_NAME)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Failure = Annotated[bytes, Meta(max_length=MAX_FAILURE)]
Priority = Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
Digest = Annotated[bytes, Meta(max_length=1024)]
Many = Meta(max_length=MAX_ITEMS)
Leases = Annotated[list[tuple[int, int]], Many]


class Target(Struct, array_like=True, gc=False):
    """Where bodies go: named once per frame, referred to by position."""

    queue: Name
    label: Name = ""
    flags: int = 0


class PublishItem(Struct, array_like=True, gc=False):
    """One new message. `delay` and `ttl` in seconds, 0 for none.

    In a settlement an empty group stands for that of the message settled, and its epoch.
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
    seen: int = 0


class GatherOpen(Struct, array_like=True, gc=False):
    """Wait for `need` arrivals under `key`, then publish `size` bytes of base body and the arrivals to `target`."""

    key: Name
    need: int
    target: int
    size: int
    group: Name = ""
    epoch: int = 0
    deadline: float = 0.0


class Arrival(Struct, array_like=True, gc=False):
    """One arrival at the gather `key`; a slot counts once."""

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
    """A settlement of any other shape: all of its leases count, or none.

    `delay` in seconds, before an AGAIN; `failure` opaque bytes, kept with the message; `verdict`: how the attempt went.
    """

    leases: Leases
    outcome: int
    publishes: Annotated[list[PublishItem], Many] = []
    delay: float = 0.0
    failure: Failure | None = None
    opens: Annotated[list[GatherOpen], Many] = []
    arrivals: Annotated[list[Arrival], Many] = []
    leave: Name = ""
    verdict: int = NEITHER


class DeliveryItem(Struct, array_like=True, gc=False):
    """One message as delivered. `extra` (None on the first attempt) is attempts, deaths, failure and so on."""

    id: int
    lease: int
    size: int
    group: str
    epoch: int
    extra: DeliveryExtra | None = None


class DeliveryExtra(Struct, array_like=True):
    """What has happened to a message before this delivery. `fresh`: no worker has judged the failure yet.
    `cancelled`: why the message is to be passed through unworked; what follows belongs to `epoch_now`."""

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

    `max_deaths`: a message that has killed this many consumers becomes a dead letter (0: never). `evidence`: such a
    dead letter is kept to be looked at and cannot be requeued, because whoever is told of it at `notify_queue`
    takes over. `max_length`: how many messages may wait in it before new starts are refused (0: any number).
    `breaker_failures` attempts that fail in a row stop deliveries for `breaker_reset` seconds (0: never).
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
    """The figures of one queue. `oldest` in seconds; `breaker` is its state, empty without one."""

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
    """Descriptions of live groups by id. `left_seq` counts, in this broker epoch, the groups that have left."""

    epoch: int
    left_seq: int
    groups: dict[str, dict[str, Any]]


class TallyResult(TypedDict):
    """Counts of live groups: `queues` by the queue where each is, `marks` in the order of the marks."""

    queues: dict[str, int]
    marks: list[int]


class RequeueResult(TypedDict):
    """How many dead letters are ready again, and the ids of those that are evidence and stay."""

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
    """The epoch of the broker, and whether its queues are open: the roster of consumers is known."""

    epoch: int
    open: bool
