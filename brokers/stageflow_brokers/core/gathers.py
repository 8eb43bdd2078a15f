"""Gathers of the live broker: what opens, arrives, completes, runs out of time, or is overtaken by a new epoch.

What completes is recorded as the message that it makes and the gather that remains, behind all that the frame itself
makes: a replay takes the frame for its openings and arrivals only.
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
"""The targets of a frame: queue (None: push only), label, flags."""


class GatherManager:
    """The gathers of one machine. `changed`: what the frame in hand has touched, by group and key."""

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
        """Openings and arrivals, whose bodies begin at `offset`. False when some belong to no group, and were dropped.

        An opening makes its group; an arrival does not, for it may be a late one, and its group would never end.
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
            # A replay knows it by the message that opened the gather, which may be gone with its segment by then.
            for opening in opens:
                group = state.groups.get(opening.group)
                if group is not None:
                    self._writer.record_gather(group, state.gather(group, opening.key, location))
        return all_accepted

    def publish_complete(self) -> list[tuple[Group, str]]:
        """Publish what has become complete in this frame. Returns all gathers that the frame has changed."""
        changed = self.changed
        if changed:
            self.changed = []
            for group, key in changed:
                self._settle(group, key)
        return changed

    def expire(self, due: float, id: str, key: str) -> None:
        """The deadline that was `due` has passed."""
        group = self.state.groups.get(id)
        gather = None if group is None or group.gathers is None else group.gathers.get(key)
        if group is not None and gather is not None and gather.need is not None and gather.due == due:
            self._publish(group, key, failure=EXPIRED)

    def divert_stale_gathers(self, group: Group) -> None:
        """The epoch of the group was raised: what waits in its open gathers goes to whoever raised it."""
        for key in list(group.gathers or ()):
            self._settle(group, key)

    def publish_released(self, group: Group) -> None:
        """The group was cancelled: publish what waits in the open gathers that it does not wait for any more."""
        for key in list(group.gathers or ()):
            if (
                group.gathers is not None
                and group.gathers[key].need is not None
                and key.startswith(group.released_prefixes)
            ):
                self._publish(group, key, failure=EXPIRED)

    def _settle(self, group: Group, key: str) -> None:
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
