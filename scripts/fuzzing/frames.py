"""Frames that no peer should send, seeded.

Most can be decoded: they lie about sizes and numbers, name the leases of another peer, arrive twice, or lack their end.
Operations that any peer may do to all others (publish into their queues, pause or purge them) only use names of the
attackers: they are permitted, and no attack.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from stageflow_brokers.core import wire
from stageflow_brokers.types import ACK, DEAD_LETTER, FLAG_CHECK, FLAG_CLOSE_GROUP, FLAG_START, FLAG_WATCH, RETRY

__all__ = ["Frames"]

NUMBERS = (0, 1, 2, -1, 255, 2**31, 2**40 + 1, 2**62, 2**63 - 1, 2**64 - 1, -(2**63))
SECONDS = (0.0, 0.0, 0.01, -1.0, float("nan"))
QUEUES = tuple(f"x{number}" for number in range(8))
GROUPS = tuple(f"a{number}" for number in range(24))
KEYS = ("k0", "k1", "k2")
LONG = "n" * 1_100
ROLES = ("client", "worker", "", "supervisor?", LONG)
FRAMES_REMEMBERED = 64
"""Frames remembered, to send again, truncated or corrupted."""

Parts = list[bytes]


class Frames:
    """The frames of one attacker. `held()` returns (id, lease) of a well-behaved peer, `peers` are their numbers."""

    def __init__(self, chance: random.Random, held: Callable[[], tuple[int, int]], peers: Sequence[int]) -> None:
        self.epoch = 1
        self.frame = 0
        self.talk = 0
        self._chance = chance
        self._held = held
        self._peers = list(peers) or [1]
        self._sent: list[Parts] = []
        self._kinds = (
            [self.steal] * 5
            + [self.publish] * 4
            + [self.ask] * 3
            + [self.truncate] * 3
            + [self.corrupt] * 3
            + [self.repeat] * 2
            + [self.noise] * 2
            + [self.step, self.release, self.answer_ping, self.out_of_turn]
        )

    def next(self) -> Parts:
        """Return the parts of the next frame."""
        return self._chance.choice(self._kinds)()

    def hello(self) -> Parts:
        """Return a mostly valid hello: it claims leases of others, and watches foreign groups."""
        self.talk += 1
        chance = self._chance
        consume = [(chance.choice(QUEUES), chance.choice((0, 1, 100, 2**40)))] if chance.random() < 0.2 else []
        holding = [self._held() for _ in range(chance.randrange(3))]
        watching = [chance.choice(GROUPS) for _ in range(chance.randrange(4))]
        role = chance.choice(ROLES[:-1])
        fields = (wire.PROTOCOL, role, "attacker", 1, self.frame + 1, consume, holding, watching, self.talk)
        return [wire.HELLO, wire.encode(fields), b""]

    # operations

    def steal(self) -> Parts:
        """Settle messages that another peer holds."""
        chance = self._chance
        moves: list[Any] = []
        acks: list[Any] = []
        others: list[Any] = []
        bodies: list[bytes] = []
        for _ in range(chance.randrange(1, 4)):
            id, lease = self._lease()
            group = chance.choice((*GROUPS, ""))
            match chance.randrange(3):
                case 0:
                    moves.append((id, lease, 0, 3, group))
                    bodies.append(b"bad")
                case 1:
                    acks.append((id, lease, chance.choice((0, FLAG_CLOSE_GROUP, 7)), group))
                case _:
                    others.append(
                        (
                            [(id, lease)],
                            chance.choice((ACK, RETRY, DEAD_LETTER, 9)),
                            [self._item(1)] if chance.random() < 0.5 else [],
                            chance.choice(SECONDS),
                            chance.choice((None, b"failure")),
                            [],
                            [],
                            chance.choice(("", group)),
                        )
                    )
        size = sum(len(body) for body in bodies) + sum(item[1] for other in others for item in other[2])
        fields = ([(chance.choice(QUEUES), "stolen", chance.choice((0, 0, 1)))], moves, acks, others)
        return self._frame(wire.SETTLE, fields, bytes(size if chance.random() < 0.9 else size + 1))

    def publish(self) -> Parts:
        """Publish into its own queues with arbitrary sizes, targets and times."""
        chance = self._chance
        items = [self._item(chance.randrange(0, 40)) for _ in range(chance.randrange(0, 5))]
        opens, arrivals = [], []
        if chance.random() < 0.2:
            group = chance.choice(GROUPS)
            opens = [(chance.choice(KEYS), chance.choice((0, 1, 2, 5)), 0, 2, group, 1, 0.02)]
        if chance.random() < 0.3:
            arrivals = [(chance.choice(KEYS), f"s{chance.randrange(9)}", 3, chance.choice(GROUPS), 1)]
        if chance.random() < 0.15 and items:
            wrong = list(items[0])
            wrong[chance.randrange(len(wrong))] = chance.choice(NUMBERS)
            items[0] = tuple(wrong)
        size = 0
        for value in (*(item[1] for item in items), *(each[3] for each in opens), *(each[2] for each in arrivals)):
            size += value if isinstance(value, int) and 0 <= value < 1_000 else 0
        targets = [(chance.choice(QUEUES) if chance.random() < 0.98 else LONG, "x") for _ in range(2)]
        blob = bytes(size if chance.random() < 0.85 else chance.randrange(100))
        return self._frame(wire.PUBLISH, (targets, items, chance.random() < 0.3, opens, arrivals), blob)

    def step(self) -> Parts:
        """Record a step on a message of another peer."""
        return self._frame(wire.CHECKPOINT, (*self._lease(), self._chance.choice(("step", LONG))), b"evil")

    def release(self) -> Parts:
        """Release messages that another peer holds."""
        leases = [self._lease() for _ in range(self._chance.randrange(1, 4))]
        return self._frame(wire.RELEASE, (leases, self._chance.choice(QUEUES), self._chance.choice(NUMBERS)), b"")

    def ask(self) -> Parts:
        """Send a query with arguments that may be malformed."""
        chance = self._chance
        group, queue, peer = chance.choice(GROUPS), chance.choice(QUEUES), chance.choice(self._peers)
        id, lease = self._lease()
        name, args = chance.choice(
            (
                ("consume", (queue, chance.choice(NUMBERS))),
                ("watch", ([group] * chance.randrange(5),)),
                ("lookup", ([group, *GROUPS[:3]],)),
                ("inspect", ([group],)),
                ("groups", (queue, 3)),
                ("peek", (queue, chance.choice(NUMBERS), chance.choice(NUMBERS))),
                ("progress", (id, lease, b"nowhere")),
                ("subscribe", (chance.random() < 0.1,)),
                ("declare", ([(queue, chance.choice(NUMBERS), False, "", "", chance.choice((0, 5)))],)),
                ("purge", (queue, [])),
                ("requeue", (queue, [])),
                ("raise-epoch", (group, chance.choice(NUMBERS), queue, "late")),
                ("cancel", (group, "no more", [])),
                ("replace", ("dlq." + queue, id, b"other")),
                ("restart", (group, queue, "x", b"anew")),
                ("fact", (f"f{chance.randrange(200)}", chance.choice((None, "value")))),
                ("stats", (queue,)),
                # Queries reserved to the supervisor, about live peers.
                ("dead", (peer, id, True, True, b"dead")),
                ("roster", ([(peer, [queue])],)),
                ("hold", (True,)),
                ("recall", (peer,)),
                ("retire", (peer,)),
                ("unheard-of", ()),
            )
        )
        if chance.random() < 0.2:
            args = (*args, chance.choice(NUMBERS))
        return self._frame(wire.QUERY, (name, args), b"")

    def answer_ping(self) -> Parts:
        """Answer a ping that was never sent."""
        return [wire.MARK_READ, wire.encode(self._chance.choice(NUMBERS)), b""]

    def out_of_turn(self) -> Parts:
        """Return a frame with a wrong number or epoch."""
        fields = ([(QUEUES[0], "x")], [self._item(1)])
        number, epoch = self._chance.choice(NUMBERS), self._chance.choice((*NUMBERS, self.epoch))
        return [wire.PUBLISH, wire.encode((epoch, number, *fields)), b"1"]

    # variations of earlier frames

    def truncate(self) -> Parts:
        """Return an earlier frame without its end, or without that of its header."""
        parts = list(self._chance.choice(self._sent)) if self._sent else self.noise()
        place = self._chance.randrange(len(parts))
        parts[place] = parts[place][: self._chance.randrange(len(parts[place]) + 1)]
        return parts

    def corrupt(self) -> Parts:
        """Return an earlier frame with some bytes of its header changed."""
        parts = list(self._chance.choice(self._sent)) if self._sent else self.noise()
        header = bytearray(parts[1] if len(parts) > 1 else b"\x90")
        for _ in range(self._chance.randrange(1, 4)):
            if header:
                header[self._chance.randrange(len(header))] = self._chance.choice((0xDD, 0xC1, 0xFF, 0x91, 0, 0xDF))
        return [parts[0], bytes(header), *parts[2:]]

    def repeat(self) -> Parts:
        """Return an earlier frame."""
        return self._chance.choice(self._sent) if self._sent else self.noise()

    def noise(self) -> Parts:
        """Return random bytes in any number of parts."""
        chance = self._chance
        parts = [chance.randbytes(chance.choice((0, 1, 8, 60))) for _ in range(chance.choice((1, 2, 3, 3, 4, 7)))]
        if chance.random() < 0.7:
            parts[0] = chance.choice((b"H", b"P", b"S", b"C", b"R", b"Q", b"A", b"?"))
        return parts

    def _item(self, size: int) -> tuple[Any, ...]:
        chance = self._chance
        group = chance.choice((*GROUPS, "", ""))
        flags = chance.choice((0, FLAG_START, FLAG_START | FLAG_WATCH, FLAG_START | FLAG_CHECK, 8))
        digest = chance.choice((None, b"digest"))
        return (chance.randrange(2), size, group, 1, flags, chance.choice((0, 5)), chance.choice(SECONDS), 0.0, digest)

    def _lease(self) -> tuple[int, int]:
        id, lease = self._held()
        match self._chance.randrange(8):
            case 0:
                return id, lease + self._chance.choice((-1, 1, 1 << 40))
            case 1:
                return self._chance.choice(NUMBERS), self._chance.choice(NUMBERS)
        return id, lease

    def _frame(self, op: bytes, fields: tuple[Any, ...], blob: bytes) -> Parts:
        self.frame += 1
        parts = [op, wire.encode((self.epoch, self.frame, *fields)), blob]
        if len(self._sent) < FRAMES_REMEMBERED:
            self._sent.append(parts)
        else:
            self._sent[self._chance.randrange(FRAMES_REMEMBERED)] = parts
        return parts
