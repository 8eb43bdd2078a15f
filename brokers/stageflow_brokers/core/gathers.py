"""The gathers of the live broker: open them, count arrivals, publish them.

A gather is published when it is complete, when its deadline passes, or when a new epoch ends its wait. The resulting
message and the remaining gather are recorded after the frame: a replay applies only the openings and arrivals of a
frame, and must not decide whether a gather is complete.
"""

from __future__ import annotations

from stageflow_brokers.core.leases import EXPIRED, Leases
from stageflow_brokers.core.message import Group, RecordLocation
from stageflow_brokers.core.queue import Queue
from stageflow_brokers.core.record_writer import RecordWriter
from stageflow_brokers.core.state import BrokerState
from stageflow_brokers.types import Arrival, GatherOpen

__all__ = ["GatherManager", "ResolvedTargets"]

ResolvedTargets = list[tuple[Queue | None, str, int]]
"""The targets of a frame as (queue, label, flags); without a queue the body is only pushed to watchers."""


class GatherManager:
    """The gathers of one machine.

    Attributes:
        changed: (group, key) of each gather that the frame in hand has changed.
    """

    def __init__(self, state: BrokerState, writer: RecordWriter, leases: Leases) -> None:
        self.state = state
        self._writer = writer
        self._leases = leases
        self.changed: list[tuple[Group, str]] = []

    def apply(
        self,
        opens: list[GatherOpen],
        arrivals: list[Arrival],
        targets: ResolvedTargets,
        blob: bytes,
        offset: int,
        location: RecordLocation,
        priority: int = 0,
    ) -> bool:
        """Apply openings and arrivals, whose bodies begin at `offset` of the blob.

        Return False if some were dropped, because they have no live group. An opening creates its group. An arrival
        does not, because it may be late, and its group would never end.
        """
        state = self.state
        all_accepted = True
        for opening in opens:
            group = state.group(opening.group, opening.epoch, location)
            base = blob[offset : offset + opening.size]
            offset += opening.size
            if group is None:
                all_accepted = False
                continue
            queue, label, _ = targets[opening.target]
            assert queue is not None
            state.open_gather(group, opening, queue.name, label, base, location, priority)
            due = state.gather(group, opening.key, location).due
            if due:
                state.set_timer(due, 0, group.id, opening.key)
            self.changed.append((group, opening.key))
        for arrival in arrivals:
            group = state.groups.get(arrival.group)
            if group is None:
                all_accepted = False
            else:
                state.add_arrival(group, arrival.key, arrival.slot, blob[offset : offset + arrival.size], location)
                self.changed.append((group, arrival.key))
            offset += arrival.size
        if priority:
            # A replay finds the priority at the message that opened the gather, whose record may have been deleted.
            for opening in opens:
                group = state.groups.get(opening.group)
                if group is not None:
                    self._writer.record_gather(group, state.gather(group, opening.key, location))
        return all_accepted

    def publish_complete(self) -> list[tuple[Group, str]]:
        """Publish the gathers that this frame made complete.

        Return all gathers that the frame has changed.
        """
        changed = self.changed
        if changed:
            self.changed = []
            for group, key in changed:
                self._publish_if_over(group, key)
        return changed

    def expire(self, due: float, id: str, key: str) -> None:
        """Publish a gather whose deadline was `due`, if it still has that deadline."""
        group = self.state.groups.get(id)
        gather = None if group is None or group.gathers is None else group.gathers.get(key)
        if group is not None and gather is not None and gather.need is not None and gather.due == due:
            self._publish(group, key, failure=EXPIRED)

    def divert_stale_gathers(self, group: Group) -> None:
        """Publish the open gathers of a group whose epoch was raised.

        Their messages go to the queue that the group diverts to.
        """
        for key in list(group.gathers or ()):
            self._publish_if_over(group, key)

    def publish_released(self, group: Group) -> None:
        """Publish the open gathers for which a cancelled group does not wait."""
        for key in list(group.gathers or ()):
            if (
                group.gathers is not None
                and group.gathers[key].need is not None
                and key.startswith(group.released_prefixes)
            ):
                self._publish(group, key, failure=EXPIRED)

    def _publish_if_over(self, group: Group, key: str) -> None:
        """Publish a gather that is complete, or that is of an earlier epoch and not awaited any more."""
        if self.state.groups.get(group.id) is not group or group.gathers is None:
            return
        gather = group.gathers[key]
        while gather.is_complete:
            self._publish(group, key)
        if gather.need is not None and gather.epoch < group.epoch:
            if group.divert_to is not None:
                self._publish(group, key)
            elif group.cancelled is not None and key.startswith(group.released_prefixes):
                self._publish(group, key, failure=EXPIRED)

    def _publish(self, group: Group, key: str, *, failure: bytes | None = None) -> None:
        state = self.state
        assert group.gathers is not None
        gather = group.gathers[key]
        queue, label, epoch = state.queue(gather.queue), gather.label, gather.epoch
        before = gather.weight
        body, parts = gather.take()
        state.live_bytes += gather.weight - before
        message = state.put(queue, group, epoch, label, gather.priority, body, len(body), gather.location, 0)
        delivery_state = message.ensure_delivery_state()
        delivery_state.parts = parts
        delivery_state.failure, delivery_state.fresh = failure, failure is not None
        self._writer.record_gather(group, gather)
        if message.is_stale_epoch:
            self._leases.divert(message)
            return
        self._writer.record_message(message)
        state.enqueue(message)
        state.changed_queues[queue] = None
