"""The administrative half of the broker port: every operation of a broker that is not hot, one method each.

Each call is numbered, sent again after a broker restart and performed once; its future resolves when the answer is
durable. Each future may fail with `Refused` (the broker declined; its text says why) or `BrokerUnavailable` (the
connection has ended), and a call raises `BrokerUnavailable` at once on a closed connection.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from stageflow_brokers.types import (
    BrokerStats,
    CancelResult,
    EpochResult,
    LookupResult,
    PingResult,
    PurgeResult,
    QueueOptions,
    RaiseEpochResult,
    RequeueResult,
    TallyResult,
)

__all__ = ["BrokerAdmin"]


class BrokerAdmin(Protocol):
    """The operations of one broker, by name, for one connection. Thread-safe."""

    # the broker as a whole

    @abstractmethod
    def ping(self) -> Future[PingResult]:
        """Return the broker's epoch, and whether its queues are open.

        The answer comes behind everything that this connection sent before.

        Returns:
            A future of the epoch, and whether the queues are open.
        """

    @abstractmethod
    def stats(self, prefix: str) -> Future[BrokerStats]:
        """Return the broker's figures and those of its queues, by name.

        Args:
            prefix: Only queues whose name begins with it are listed; empty for all.

        Returns:
            A future of the figures.
        """

    @abstractmethod
    def audit(self) -> Future[dict[str, Any]]:
        """Return one consistent picture of the broker, and its contradictions.

        Keys: `epoch`, `wall`, `messages`, `groups`, `live` (ids of groups that have not ended), `epochs`, `shapes`,
        `sessions`, `awaited`, `rostered`, `queues`, `facts`, `faults`. Takes about 2 µs per message and group.

        Returns:
            A future of the picture, by key.
        """

    @abstractmethod
    def compact(self, begin: bool) -> Future[bool]:
        """Compact the journal: rewrite live records and delete old segments.

        Args:
            begin: True to start one, False only to read the state.

        Returns:
            A future; True while the compaction goes on.
        """

    @abstractmethod
    def get_fact(self, name: str) -> Future[str | None]:
        """Return the text kept under a name, None if there is none.

        Args:
            name: The name of the fact, at most `MAX_NAME_CHARS` characters.

        Returns:
            A future of the text, or None.
        """

    @abstractmethod
    def set_fact(self, name: str, value: str) -> Future[str | None]:
        """Keep a text under a name, durably. Return that text.

        Args:
            name: The name of the fact, at most `MAX_NAME_CHARS` characters.
            value: The text; it replaces what was kept before.

        Returns:
            A future of the text.

        Raises:
            Refused: From the future, when as many facts or bytes of them are kept as may be.
        """

    @abstractmethod
    def subscribe(self, on: bool) -> Future[Any]:
        """Subscribe to the notices `settled`, or end the subscription.

        A subscription ends with its broker: call again after each `Listener.on_connected`.

        Args:
            on: True to begin, False to end.

        Returns:
            A future; its value has no meaning.
        """

    # queues

    @abstractmethod
    def declare(self, options: Sequence[QueueOptions]) -> Future[None]:
        """Set how queues treat their messages, and make those that do not exist.

        Args:
            options: One `QueueOptions` per queue.

        Raises:
            Refused: From the future, for an impossible name or breaker, or too many queues.
        """

    @abstractmethod
    def peek(self, queue: str, offset: int, limit: int) -> Future[list[dict[str, Any]]]:
        """Return ready messages of a queue in their order, or its dead letters.

        An answer has up to 16 MiB of bodies.

        Args:
            queue: The name of the queue; `dlq.` before it for its dead letters.
            offset: How many messages to skip.
            limit: Most messages to return, 0 to 10,000.

        Returns:
            A future of one dict per message.

        Raises:
            Refused: From the future, for an unknown queue or an impossible offset or limit.
        """

    @abstractmethod
    def pause(self, queue: str) -> Future[None]:
        """Deliver nothing from a queue until it is resumed; survives restarts.

        Its consumers are asked to release what they have not begun, and the call does not wait for them. Where they
        read `PauseFlags`, none of its messages begins after the answer.

        Args:
            queue: The name of the queue.

        Raises:
            Refused: From the future, for an unknown queue or dead letters.
        """

    @abstractmethod
    def resume(self, queue: str) -> Future[None]:
        """Deliver from a paused queue again.

        Args:
            queue: The name of the queue.

        Raises:
            Refused: From the future, for an unknown queue or dead letters.
        """

    @abstractmethod
    def requeue(self, queue: str, ids: Sequence[int]) -> Future[RequeueResult]:
        """Make dead letters ready again, their attempts and deaths reset.

        Args:
            queue: The name of the queue, with or without `dlq.`.
            ids: Numbers of the dead letters; empty for all that are no evidence.

        Returns:
            A future of the number of requeued messages, and the ids of those that are evidence.

        Raises:
            Refused: From the future, for an unknown queue or number, or a letter that is evidence.
        """

    @abstractmethod
    def purge(self, queue: str, ids: Sequence[int]) -> Future[PurgeResult]:
        """Delete ready messages of a queue, or its dead letters.

        Args:
            queue: The name of the queue; `dlq.` before it for its dead letters.
            ids: Numbers of the messages; empty for all.

        Returns:
            A future of the number of deleted messages, and the ids of the groups that ended with them.

        Raises:
            Refused: From the future, for an unknown queue or dead letter.
        """

    @abstractmethod
    def replace(self, queue: str, id: int, body: bytes) -> Future[EpochResult]:
        """Give a dead letter another body; it stays a dead letter.

        Args:
            queue: The name of the queue, with or without `dlq.`.
            id: The number of the dead letter.
            body: The new body; of a gathered message the new base, before the arrivals.

        Returns:
            A future of the epoch of the group.

        Raises:
            Refused: From the future, for an unknown letter, one that is evidence, or too large a body.
        """

    # groups

    @abstractmethod
    def watch(self, ids: Sequence[str]) -> Future[list[str]]:
        """Watch groups: this connection receives their end.

        Args:
            ids: Ids of groups.

        Returns:
            A future of the ids that are not live.

        Raises:
            Refused: From the future, for more ids than one query may name.
        """

    @abstractmethod
    def lookup(self, ids: Sequence[str]) -> Future[LookupResult]:
        """Return descriptions, without bodies, of those of these groups that are live.

        Args:
            ids: Ids of groups.

        Returns:
            A future of the descriptions by id.

        Raises:
            Refused: From the future, for more ids than one query may name.
        """

    @abstractmethod
    def inspect(self, ids: Sequence[str]) -> Future[dict[str, dict[str, Any]]]:
        """Return descriptions of live groups by id, with bodies.

        Bodies that exceed the size of an answer are left out.

        Args:
            ids: Ids of groups, a few at a time.

        Returns:
            A future of the descriptions by id.

        Raises:
            Refused: From the future, for more ids than one query may inspect.
        """

    @abstractmethod
    def list_groups(self, queue_prefix: str, limit: int) -> Future[list[dict[str, Any]]]:
        """Return descriptions of live groups, mostly the latest first.

        Args:
            queue_prefix: Only groups with a message in a queue whose name begins with it; empty for all.
            limit: Most groups to return, 0 to `MAX_LISTED_GROUPS`.

        Returns:
            A future of one dict per group.

        Raises:
            Refused: From the future, for an impossible limit.
        """

    @abstractmethod
    def live_ids(self) -> Future[list[str]]:
        """Return the ids of all live groups, the latest last.

        Returns:
            A future of the ids.
        """

    @abstractmethod
    def tally(self, shared: Sequence[str], marks: Sequence[bytes], at: Sequence[int]) -> Future[TallyResult]:
        """Count the groups that will go on, each once, by the queue where they are.

        Args:
            shared: Queues whose groups are counted by mark instead; those without any mark are not counted.
            marks: Byte strings to look for in the bodies there; the first that is found counts.
            at: Offsets in a body at which a mark may be.

        Returns:
            A future of the counts.
        """

    @abstractmethod
    def raise_epoch(self, group: str, epoch: int, queue: str, label: str) -> Future[RaiseEpochResult]:
        """Raise the epoch of a group; its older messages go to another queue from now on.

        The same epoch once more changes nothing, and so does any epoch of a group that has ended.

        Args:
            group: The id of the group.
            epoch: The new epoch.
            queue: The queue that takes older messages.
            label: The label that they get.

        Returns:
            A future of the epoch, the messages in work, and the label of the end.

        Raises:
            Refused: From the future, for a group that is not live.
        """

    @abstractmethod
    def cancel(self, group: str, reason: str, prefixes: Sequence[str]) -> Future[CancelResult]:
        """Cancel a group.

        Its older messages stay in their queues, and consumers pass them through without work.

        Args:
            group: The id of the group.
            reason: The text that consumers get, at most `MAX_TEXT_CHARS` characters.
            prefixes: Open gathers whose key begins with one of these publish what they have.

        Returns:
            A future of the epoch, the label of the end, and the reason of the cancellation.

        Raises:
            Refused: From the future, for a group that is not live.
        """

    @abstractmethod
    def hand_over(self, group: str, ids: Sequence[int], queue: str, label: str) -> Future[int]:
        """Move ready messages of a cancelled group to another queue.

        Args:
            group: The id of the group.
            ids: Numbers of the messages; those in work or gathered stay.
            queue: The queue whose consumer passes them through.
            label: The label that they get.

        Returns:
            A future of the number of moved messages.

        Raises:
            Refused: From the future, for a group that is not live.
        """

    @abstractmethod
    def restart(self, group: str, queue: str, label: str, body: bytes) -> Future[EpochResult]:
        """Start a parked group again, in the next epoch.

        One message replaces all messages of the group.

        Args:
            group: The id of the group.
            queue: The queue of the first message.
            label: The label of the first message.
            body: The body of the first message.

        Returns:
            A future of the new epoch.

        Raises:
            Refused: From the future, for a group that is not live, not parked, or in work.
        """

    # consumers

    @abstractmethod
    def report_progress(self, id: int, lease: int, progress: bytes) -> Future[None]:
        """Show how far the work on a message is; kept in memory, until the lease ends.

        Args:
            id: The number of the message.
            lease: The lease under which this connection holds it.
            progress: Opaque bytes, at most 4,096.
        """

    @abstractmethod
    def notify_supervisor(self, word: str, detail: Any) -> Future[bool]:
        """Send a word to the supervisor, as the notice `told`.

        The word is not stored: without a supervisor it is lost.

        Args:
            word: What is asked.
            detail: Anything that can be encoded, at most 64 KiB.

        Returns:
            A future; True if a supervisor is connected.
        """

    # the supervisor alone: other roles are refused

    @abstractmethod
    def report_death(
        self, peer: int, responsible: int | Sequence[int], charge: bool, attempt: bool, failure: bytes
    ) -> Future[None]:
        """Report that the process of a peer has ended: the broker releases what it held.

        Args:
            peer: The number of the connection that the process had.
            responsible: Number, or numbers, of the messages that it was running; 0 or none if it was idle.
            charge: True to count the death for these messages (`QueueOptions.max_deaths`).
            attempt: True to count it as a failed attempt of these messages.
            failure: Opaque bytes kept with these messages, at most `MAX_FAILURE_BYTES`.
        """

    @abstractmethod
    def set_workers(self, peers: Sequence[tuple[int, Sequence[str]]]) -> Future[None]:
        """Set the consumers that are alive.

        A queue opens when each of its consumers has reported the messages that it holds.

        Args:
            peers: (number of the connection, names of its queues) of each.
        """

    @abstractmethod
    def suspend_delivery(self, suspended: bool) -> Future[None]:
        """Stop deliveries to all but the supervisor, or continue them.

        Args:
            suspended: True to stop deliveries, False to continue them.
        """

    @abstractmethod
    def forget_groups(self, ids: Sequence[str]) -> Future[int]:
        """Delete groups that are known to have ended, with all their messages.

        Args:
            ids: Ids of groups.

        Returns:
            A future of the number of groups that were live.
        """

    @abstractmethod
    def recall(self, peer: int) -> Future[None]:
        """Ask a consumer to release the messages that it has not begun.

        Args:
            peer: The number of its connection.
        """

    @abstractmethod
    def retire(self, peer: int) -> Future[bool]:
        """Stop deliveries to a consumer and ask it to end.

        Args:
            peer: The number of its connection.

        Returns:
            A future; True if the consumer was connected.
        """

    @abstractmethod
    def report_starts(self, queues: Sequence[tuple[str, bool, str, float]]) -> Future[None]:
        """Report what is known of queues whose consumers are not ready.

        It is kept in memory: report it again to a broker that has restarted.

        Args:
            queues: (name, True if its consumers cannot start, the reason or how far they are, time of the next attempt
                in seconds since the Unix epoch) of each; an empty text once a consumer is ready.
        """
