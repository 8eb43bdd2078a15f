"""The limits of one peer: no peer can take all memory or time of the broker.

Requests from outside that exceed a limit are refused with an error that names it. Settlements of leased messages are
not limited, except for their steps: they follow from work that was accepted before. `wire` limits the sizes of frames,
names and lists when it decodes them. The cost of a check must not grow with the number of messages in the broker.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from stageflow_brokers.core.message import Message
from stageflow_brokers.core.state import BrokerState
from stageflow_brokers.errors import Refused
from stageflow_brokers.types import Arrival

__all__ = ["LimitChecker", "Limits"]


class Limits(Struct, frozen=True):
    """The limits of one broker.

    Attributes:
        max_message_bytes: Bytes of one body, and of one step's value.
        max_peers: Connected sessions.
        max_queues: Queues, as far as peers create them by naming them.
        max_facts: Facts.
        max_facts_bytes: Bytes of all facts.
        max_prefetch: Credit of one consumer; a larger prefetch is reduced to this.
        max_steps: Steps kept with one message.
        max_steps_bytes: Bytes of these steps, with their names.
        max_early: Arrivals from outside at one gather that is not open.
        max_early_bytes: Bytes at such a gather.
        max_gathers: Gathers of one group, as far as arrivals from outside create them.
        max_looked_up: Groups named in one query.
        max_inspected: Groups named in one query that returns their bodies.
        max_unread_bytes: Unread bytes of one peer; a peer with more is disconnected.
    """

    max_message_bytes: int = 16 << 20
    max_peers: int = 4_096
    max_queues: int = 20_000
    max_facts: int = 50_000
    max_facts_bytes: int = 16 << 20
    max_prefetch: int = 100_000
    max_steps: int = 10_000
    max_steps_bytes: int = 64 << 20
    max_early: int = 10_000
    max_early_bytes: int = 64 << 20
    max_gathers: int = 10_000
    max_looked_up: int = 100_000
    max_inspected: int = 1_000
    max_unread_bytes: int = 256 << 20


class LimitChecker:
    """Compares requests with the limits and the state of one machine.

    Each check raises `Refused`.
    """

    def __init__(self, state: BrokerState, limits: Limits) -> None:
        self.limits = limits
        self._state = state

    @property
    def is_queue_limit_reached(self) -> bool:
        """True if there are `max_queues` queues, and all are in use.

        Forgets idle queues first.
        """
        if len(self._state.queues) < self.limits.max_queues:
            return False
        self._state.forget_idle_queues()
        return len(self._state.queues) >= self.limits.max_queues

    def check_queues(self, names: Iterable[str]) -> None:
        """Raise `Refused` if those of these queues that do not exist would be too many."""
        state = self._state
        new = {name for name in names if name not in state.queues}
        if new and len(state.queues) + len(new) > self.limits.max_queues:
            state.forget_idle_queues()
        if new and len(state.queues) + len(new) > self.limits.max_queues:
            raise Refused(
                f"there are {len(state.queues)} queues, and max_queues is {self.limits.max_queues}: "
                f"{next(iter(new))[:80]!r} cannot be created"
            )

    def check_arrivals(self, arrivals: list[Arrival]) -> None:
        """Raise `Refused` if these arrivals from outside exceed the limits of their gathers or groups."""
        limits, groups = self.limits, self._state.groups
        coming: dict[tuple[str, str], tuple[int, int]] = {}
        opened: dict[str, set[str]] = {}
        for arrival in arrivals:
            group = groups.get(arrival.group)
            gathers = None if group is None else group.gathers
            gather = None if gathers is None else gathers.get(arrival.key)
            if gather is None:
                new = opened.setdefault(arrival.group, set())
                new.add(arrival.key)
                if len(gathers or ()) + len(new) > limits.max_gathers:
                    raise Refused(
                        f"group {arrival.group[:80]} has {len(gathers or ())} gathers, and max_gathers is "
                        f"{limits.max_gathers}: {arrival.key[:80]!r} cannot be created"
                    )
            slot = (arrival.group, arrival.key)
            if slot in coming:
                count, size = coming[slot]
            else:
                count, size = (0, 0) if gather is None else (len(gather.arrivals), gather.weight)
            if count >= limits.max_early and (gather is None or gather.need is None or count >= gather.need):
                raise Refused(
                    f"gather {arrival.key[:80]!r} of group {arrival.group[:80]} has {count} arrivals and waits for no "
                    f"more, and max_early is {limits.max_early}"
                )
            if size + arrival.size > limits.max_early_bytes and (gather is None or gather.need is None):
                raise Refused(
                    f"gather {arrival.key[:80]!r} of group {arrival.group[:80]} is not open and has {size} bytes, "
                    f"and max_early_bytes is {limits.max_early_bytes}"
                )
            coming[slot] = (count + 1, size + arrival.size)

    def check_step(self, message: Message, name: str, value: bytes) -> None:
        """Raise `Refused` if the message cannot keep this step."""
        limits = self.limits
        delivery_state = message.delivery_state
        steps = None if delivery_state is None else delivery_state.steps
        if len(value) > limits.max_message_bytes:
            raise Refused(
                f"the value of the step has {len(value)} bytes, and max_message_bytes is {limits.max_message_bytes}"
            )
        if delivery_state is None or not steps:
            return
        if name not in steps and len(steps) >= limits.max_steps:
            raise Refused(f"the message has {len(steps)} steps, and max_steps is {limits.max_steps}")
        kept = delivery_state.step_bytes + (len(name) if name not in steps else -len(steps[name]))
        if kept + len(value) > limits.max_steps_bytes:
            raise Refused(
                f"the steps of this message would take {kept + len(value)} bytes, and max_steps_bytes is "
                f"{limits.max_steps_bytes}"
            )

    def check_lookup(self, ids: list[str], *, bodies: bool = False) -> None:
        """Raise `Refused` if one query names too many groups."""
        most = self.limits.max_inspected if bodies else self.limits.max_looked_up
        if len(ids) > most:
            name = "max_inspected" if bodies else "max_looked_up"
            raise Refused(f"{len(ids)} groups in one query, and {name} is {most}: ask for fewer at once")

    def check_body(self, body: bytes) -> None:
        """Raise `Refused` if a body that replaces another is larger than a published one may be."""
        if len(body) > self.limits.max_message_bytes:
            raise Refused(f"a body of {len(body)} bytes is over max_message_bytes={self.limits.max_message_bytes}")
