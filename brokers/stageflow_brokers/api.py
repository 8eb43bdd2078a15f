"""The port: the operations that the runtime needs of a broker.

A `Broker` is one connection. Operations that change state are asynchronous and numbered: a frame is sent again
after a restart of the broker, and performed once; its future resolves when the change is durable. `publish` and
`settle` take batches of messages, with the bodies in a list of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from stageflow_brokers.admin import BrokerAdmin
from stageflow_brokers.errors import (
    BrokerError,
    BrokerUnavailable,
    JournalCorrupt,
    JournalLocked,
    PayloadTooLarge,
    ProtocolError,
    QueueFull,
    Refused,
    StorageFull,
)
from stageflow_brokers.types import (
    ACK,
    ATTEMPT_FAILED,
    ATTEMPT_SUCCEEDED,
    DEAD_LETTER,
    FLAG_CHECK,
    FLAG_CLOSE_GROUP,
    FLAG_START,
    FLAG_WATCH,
    MAX_LISTED_GROUPS,
    PUSH_ONLY,
    RETRY,
    TERMINAL,
    Ack,
    Arrival,
    DeliveryExtra,
    DeliveryItem,
    GatherOpen,
    Move,
    PublishItem,
    QueueOptions,
    SettleItem,
    Target,
)

__all__ = [
    "ACK",
    "ATTEMPT_FAILED",
    "ATTEMPT_SUCCEEDED",
    "DEAD_LETTER",
    "FLAG_CHECK",
    "FLAG_CLOSE_GROUP",
    "FLAG_START",
    "FLAG_WATCH",
    "MAX_LISTED_GROUPS",
    "PUSH_ONLY",
    "RETRY",
    "TERMINAL",
    "Ack",
    "Arrival",
    "Broker",
    "BrokerAdmin",
    "BrokerError",
    "BrokerUnavailable",
    "DeliveryExtra",
    "DeliveryItem",
    "GatherOpen",
    "JournalCorrupt",
    "JournalLocked",
    "Listener",
    "Move",
    "PayloadTooLarge",
    "ProtocolError",
    "PublishAnswer",
    "PublishItem",
    "QueueFull",
    "QueueOptions",
    "Refused",
    "SettleItem",
    "StorageFull",
    "Target",
]


class PublishAnswer:
    """The answer to a publish. All items are durable, except those in `refused`.

    Args:
        history_sequence: Count of the groups that the broker has closed, for `PublishItem.history_sequence`.
            Default: 0.
        refused: (index, reason, group) for each item that was not taken. Arrivals are numbered after the items.
            The reason is `exists` (a live group has this id and the same input), `conflict` (a live group has this
            id and another input), `look-again` (the group may have been closed since the
            `history_sequence` of the item: look it up in the history, then publish again with the new one), or
            `gone` (an arrival for a group that is not live).

    Example:
        >>> from stageflow_brokers.api import PublishAnswer
        >>> PublishAnswer(history_sequence=7, refused=[(0, "exists", "order-1")]).refused
        [(0, 'exists', 'order-1')]
    """

    __slots__ = ("history_sequence", "refused")

    def __init__(self, history_sequence: int = 0, refused: Sequence[tuple[int, str, str]] = ()) -> None:
        self.history_sequence = history_sequence
        self.refused = list(refused)


class Listener:
    """The callbacks of a connection. Override those of interest.

    The thread of the connection calls them; none of them may block.

    Example:
        >>> from stageflow_brokers.api import Listener
        >>> class Bodies(Listener):
        ...     def __init__(self):
        ...         self.received = []
        ...     def on_deliveries(self, queue, items, bodies):
        ...         self.received += bodies
        >>> listener = Bodies()
        >>> listener.on_deliveries("orders", [], [b"one", b"two"])
        >>> listener.received, listener.holding()
        ([b'one', b'two'], [])
    """

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        """Receive messages of a queue that this connection consumes.

        Args:
            queue: The name of the queue.
            items: The messages.
            bodies: Their bodies, in the same order.
        """

    def on_pushes(self, pushes: list[tuple[str, str, bytes]]) -> None:
        """Receive the end of groups that this connection watches.

        Args:
            pushes: (group, label, body) of each.
        """

    def on_notice(self, word: str, detail: Any) -> None:
        """Receive a notice of the broker.

        Args:
            word: `gone` or `parked` (a watched group), `settled` (to subscribers: messages that follow from
                settlements, as (group, epoch, label or key, body)), `told` (to the supervisor: a word from another
                connection), `cancel` (to the supervisor), `dead-letter` (to the supervisor: queue, group, label,
                attempts, whether it is evidence, reason, and the beginning of the body), `recall` (release the
                messages that have not begun), `retire` (as `recall`, then close when the others are settled),
                `malformed` (the broker ignored a frame that it could not read), `refused` (the broker does not accept
                this connection).
            detail: The details, by the kind of notice.
        """

    def on_lost(self, ids: list[int]) -> None:
        """Drop messages that are not leased to this connection any more.

        This follows a restart of the broker.

        Args:
            ids: Numbers of the messages.
        """

    def on_connected(self, broker_epoch: int) -> None:
        """Notice that a broker has accepted the connection, also after a restart.

        Args:
            broker_epoch: Number of starts of this broker.
        """

    def on_stale(self, ids: list[int]) -> None:
        """Notice that settlements were refused.

        These messages are leased to another connection.

        Args:
            ids: Numbers of the messages.
        """

    def on_closed(self, reason: str) -> None:
        """Notice the end of the connection: it was closed, or its thread failed.

        It does not reconnect.

        Args:
            reason: Why it ended.
        """

    def holding(self) -> list[tuple[int, int]]:
        """Return the messages that were delivered and are not settled yet.

        Returns:
            (id, lease) of each message.
        """
        return []

    def watching(self) -> list[str]:
        """Return the groups whose end is still of interest.

        After a restart of the broker they are watched again.

        Returns:
            Ids of groups.
        """
        return []


class Broker(Protocol):
    """One connection to a broker. Thread-safe.

    Example:
        >>> from queue import SimpleQueue
        >>> from stageflow_brokers.api import Listener, PublishItem, Target
        >>> from stageflow_brokers.memory import MemoryBroker
        >>> inbox = SimpleQueue()
        >>> class Inbox(Listener):
        ...     def on_deliveries(self, queue, items, bodies):
        ...         inbox.put(bodies)
        >>> hub = MemoryBroker()
        >>> broker = hub.connect(Inbox())
        >>> broker.consume("orders", prefetch=1)
        >>> broker.publish([Target("orders")], [PublishItem(target=0, size=4)], [b"body"]).result(5).refused
        []
        >>> inbox.get(timeout=5)
        [b'body']
        >>> hub.close()
    """

    peer: int
    """The number of this connection."""

    admin: BrokerAdmin
    """The operations that are not hot: `broker.admin.stats("").result()`."""

    def publish(
        self,
        targets: Sequence[Target],
        items: Sequence[PublishItem | tuple[Any, ...]],
        bodies: Sequence[bytes],
        *,
        atomic: bool = False,
        opens: Sequence[GatherOpen] = (),
        arrivals: Sequence[Arrival] = (),
        on_numbered: Callable[[], None] | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> Future[PublishAnswer]:
        """Publish new messages; the future resolves when they are durable.

        The call waits, before anything is sent, while too many bytes of this connection are unconfirmed. So a program
        cannot publish faster than its broker writes. In the thread of the connection it never waits.

        Args:
            targets: Queues and labels; items name them by position.
            items: The messages, or their fields as tuples.
            bodies: One body for each item, then one for each of `opens`, then one for each of `arrivals`.
            atomic: True to refuse all items if one is refused. Default: False.
            opens: Gathers to open. Default: none.
            arrivals: Arrivals at gathers. Default: none.
            on_numbered: Called at the moment when the frame gets its number; it must not block. A group that is
                watched from then on is never reported as gone before the frame starts it. Default: none.
            on_wait: Called every half second while the call waits; it may raise to stop. Default: none.

        Returns:
            A future of the answer. It fails with `QueueFull`, `PayloadTooLarge` or `Refused`.

        Raises:
            BrokerUnavailable: If the connection is closed.
        """

    def settle(
        self,
        targets: Sequence[Target],
        moves: Sequence[Move],
        acks: Sequence[Ack],
        others: Sequence[SettleItem],
        bodies: Sequence[bytes],
        *,
        queue: str = "",
        prefetch: int = -1,
    ) -> None:
        """Settle messages and publish those that follow.

        Each settlement is one transition.

        Args:
            targets: Queues and labels; moves and settlements name them by position.
            moves: Messages that are done, each followed by one message.
            acks: Messages that are done and followed by none.
            others: Settlements of any other form.
            bodies: The bodies of the moves, then those of the other settlements.
            queue: The queue whose `prefetch` changes. Default: none.
            prefetch: The new limit of messages of `queue` that this connection holds; -1 for no change. Default: -1.
        """

    def checkpoint(self, id: int, lease: int, name: str, value: bytes) -> Future[None]:
        """Store the result of a step with its message.

        Args:
            id: Number of the message.
            lease: The lease under which this connection holds it.
            name: Name of the step.
            value: The encoded result.

        Returns:
            A future that resolves when the result is durable; it fails with `Refused`.
        """

    def release(self, leases: Sequence[tuple[int, int]], queue: str, prefetch: int) -> Future[None]:
        """Release leased messages that were not begun.

        Deliveries that arrive before the future resolves were on their way. They may stand behind the released ones in
        the queue, so release them, too, if the order matters.

        Args:
            leases: (id, lease) of each message.
            queue: Their queue.
            prefetch: The new limit of messages of that queue that this connection holds; -1 for no change.

        Returns:
            A future that resolves when the messages are in their queue again.
        """

    def consume(self, queue: str, prefetch: int) -> None:
        """Consume a queue, from now on and after each reconnect.

        Args:
            queue: The name of the queue.
            prefetch: Number of messages that this connection holds at most; 0 to stop.
        """

    def close(self, timeout: float = 5.0) -> None:
        """Send the waiting frames, then close the connection.

        Args:
            timeout: Seconds to wait for confirmations. Default: 5.
        """


OpenConnection = Callable[[Listener], Broker]
