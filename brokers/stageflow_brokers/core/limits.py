"""Bounds: how much one peer may ask of the broker, so that none can take all of its memory or time from the others.

What comes from outside is refused when it goes beyond them, with an error that names the limit. What work in hand
settles is not: it follows from what was let in. Sizes of frames, names and lists are bounded where frames are
decoded (`wire`). Each check costs the same however much the broker holds.
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
    """Bounds on what peers may do.

    `max_message_bytes`: one body. `max_peers`: sessions at once. `max_queues`: queues in all, as far as peers make them
    by naming them. `max_facts`, `max_facts_bytes`: facts kept, and their bytes in all. `max_prefetch`: credit of one
    consumer, whatever it asks for.
    `max_steps`, `max_steps_bytes`: what is kept of the steps of one message. `max_early`, `max_early_bytes`: arrivals
    from outside that lie at one gather, and their bytes; `max_gathers`: gathers of one group, as far as arrivals from
    outside make them. `max_looked_up`: groups named in one query, `max_inspected`: with all their bodies.
    `max_unread_bytes`: what a peer may leave unread before it is cut off (and told so, once it reads).
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
    """The limits of one machine, held against what is in its store. Each method raises `Refused`."""

    def __init__(self, state: BrokerState, limits: Limits) -> None:
        self.limits = limits
        self._state = state

    @property
    def is_queue_limit_reached(self) -> bool:
        """Whether there are as many queues as there may be, and all of them in use."""
        if len(self._state.queues) < self.limits.max_queues:
            return False
        self._state.forget_idle_queues()
        return len(self._state.queues) >= self.limits.max_queues

    def check_queues(self, names: Iterable[str]) -> None:
        """These may be made, where they are not there yet."""
        state = self._state
        made = {name for name in names if name not in state.queues}
        if made and len(state.queues) + len(made) > self.limits.max_queues:
            state.forget_idle_queues()
        if made and len(state.queues) + len(made) > self.limits.max_queues:
            raise Refused(
                f"there are {len(state.queues)} queues, and max_queues is {self.limits.max_queues}: "
                f"{next(iter(made))[:80]!r} cannot be made"
            )

    def check_arrivals(self, arrivals: list[Arrival]) -> None:
        """There is room for what comes to gathers from outside."""
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
                        f"{limits.max_gathers}: {arrival.key[:80]!r} cannot be made"
                    )
            slot = (arrival.group, arrival.key)
            if slot in coming:
                count, size = coming[slot]
            else:
                count, size = (0, 0) if gather is None else (len(gather.arrivals), gather.weight)
            if count >= limits.max_early and (gather is None or gather.need is None or count >= gather.need):
                raise Refused(
                    f"{count} arrivals lie at {arrival.key[:80]!r} of group {arrival.group[:80]} that nobody has "
                    f"waited for, and max_early is {limits.max_early}"
                )
            if size + arrival.size > limits.max_early_bytes and (gather is None or gather.need is None):
                raise Refused(
                    f"{size} bytes lie at {arrival.key[:80]!r} of group {arrival.group[:80]} that nobody has waited "
                    f"for, and max_early_bytes is {limits.max_early_bytes}"
                )
            coming[slot] = (count + 1, size + arrival.size)

    def check_step(self, message: Message, name: str, value: bytes) -> None:
        """A step of this message may be kept."""
        limits = self.limits
        delivery_state = message.delivery_state
        known = None if delivery_state is None else delivery_state.steps
        if len(value) > limits.max_message_bytes:
            raise Refused(f"its value is {len(value)} bytes, and max_message_bytes is {limits.max_message_bytes}")
        if delivery_state is None or not known:
            return
        if name not in known and len(known) >= limits.max_steps:
            raise Refused(f"{len(known)} steps are kept of this message, and max_steps is {limits.max_steps}")
        kept = delivery_state.step_bytes + (len(name) if name not in known else -len(known[name]))
        if kept + len(value) > limits.max_steps_bytes:
            raise Refused(
                f"the steps of this message would take {kept + len(value)} bytes, and max_steps_bytes is "
                f"{limits.max_steps_bytes}"
            )

    def check_lookup(self, ids: list[str], *, bodies: bool = False) -> None:
        """So many groups may be asked for at once."""
        most = self.limits.max_inspected if bodies else self.limits.max_looked_up
        if len(ids) > most:
            name = "max_inspected" if bodies else "max_looked_up"
            raise Refused(f"{len(ids)} groups in one query, and {name} is {most}: ask for fewer at once")

    def check_body(self, body: bytes) -> None:
        """A body that takes the place of another is no larger than one that is published."""
        if len(body) > self.limits.max_message_bytes:
            raise Refused(f"a body of {len(body)} bytes is over max_message_bytes={self.limits.max_message_bytes}")
