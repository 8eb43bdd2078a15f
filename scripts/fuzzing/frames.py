"""Frames that no peer should send, as many as are wanted, each the same for the same seed.

Most speak the language well enough to be decoded: they lie about sizes and numbers, name what another peer holds, come
twice, or lack their end. What any peer may do to all others (publish into their queues, pause or purge them) is
done to names of the attackers' own only: that is the right of the user whose broker it is, and no attack.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from stageflow_brokers.core import wire
from stageflow_brokers.types import AGAIN, CHECK, DEAD, DONE, LEAVE, START, WATCH

__all__ = ["Frames"]

NUMBERS = (0, 1, 2, -1, 255, 2**31, 2**40 + 1, 2**62, 2**63 - 1, 2**64 - 1, -(2**63))
SECONDS = (0.0, 0.0, 0.01, -1.0, float("nan"))
QUEUES = tuple(f"x{number}" for number in range(8))
GROUPS = tuple(f"a{number}" for number in range(24))
KEYS = ("k0", "k1", "k2")
LONG = "n" * 1_100
ROLES = ("client", "worker", "", "supervisor?", LONG)
ENOUGH = 64
"""How many frames are remembered to be sent again, cut or bent."""

Parts = list[bytes]


class Frames:
    """One attacker's frames. `held()` gives (id, lease) that an honest peer holds at present, `peers` their numbers."""

    def __init__(self, chance: random.Random, held: Callable[[], tuple[int, int]], peers: Sequence[int]) -> None:
        self.epoch = 1
        self.frame = 0
        self.talk = 0
        self._chance = chance
        self._held = held
        self._peers = list(peers) or [1]
        self._said: list[Parts] = []
        self._kinds = (
            [self.steal] * 5
            + [self.publish] * 4
            + [self.ask] * 3
            + [self.cut] * 3
            + [self.bend] * 3
            + [self.again] * 2
            + [self.mumble] * 2
            + [self.step, self.give_back, self.heard, self.out_of_turn]
        )

    def next(self) -> Parts:
        """The next frame's parts."""
        return self._chance.choice(self._kinds)()

    def hello(self) -> Parts:
        """A hello that is right in the main: it claims what others hold, and watches what is not its own."""
        self.talk += 1
        chance = self._chance
        consume = [(chance.choice(QUEUES), chance.choice((0, 1, 100, 2**40)))] if chance.random() < 0.2 else []
        holding = [self._held() for _ in range(chance.randrange(3))]
        watching = [chance.choice(GROUPS) for _ in range(chance.randrange(4))]
        role = chance.choice(ROLES[:-1])
        fields = (wire.PROTOCOL, role, "attacker", 1, self.frame + 1, consume, holding, watching, self.talk)
        return [wire.HELLO, wire.encode(fields), b""]

    # what it does

    def steal(self) -> Parts:
        """Settle what another holds."""
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
                    acks.append((id, lease, chance.choice((0, LEAVE, 7)), group))
                case _:
                    others.append(
                        (
                            [(id, lease)],
                            chance.choice((DONE, AGAIN, DEAD, 9)),
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
        """Publish into queues of its own, with sizes, targets and times that may be anything."""
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
        """Keep a step with what another holds."""
        return self._frame(wire.CHECKPOINT, (*self._lease(), self._chance.choice(("step", LONG))), b"evil")

    def give_back(self) -> Parts:
        """Return what another holds."""
        leases = [self._lease() for _ in range(self._chance.randrange(1, 4))]
        return self._frame(wire.RELEASE, (leases, self._chance.choice(QUEUES), self._chance.choice(NUMBERS)), b"")

    def ask(self) -> Parts:
        """A query with arguments that may or may not be of the right shape."""
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
                # What only the supervisor may say, of peers that live and work.
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

    def heard(self) -> Parts:
        """Answer a mark that was never made."""
        return [wire.HEARD, wire.encode(self._chance.choice(NUMBERS)), b""]

    def out_of_turn(self) -> Parts:
        """A frame of another number, or of another broker's time."""
        fields = ([(QUEUES[0], "x")], [self._item(1)])
        number, epoch = self._chance.choice(NUMBERS), self._chance.choice((*NUMBERS, self.epoch))
        return [wire.PUBLISH, wire.encode((epoch, number, *fields)), b"1"]

    # what becomes of what it has said before

    def cut(self) -> Parts:
        """A frame that lacks its end, or whose header does."""
        parts = list(self._chance.choice(self._said)) if self._said else self.mumble()
        place = self._chance.randrange(len(parts))
        parts[place] = parts[place][: self._chance.randrange(len(parts[place]) + 1)]
        return parts

    def bend(self) -> Parts:
        """A frame with some bytes of its header turned into others."""
        parts = list(self._chance.choice(self._said)) if self._said else self.mumble()
        header = bytearray(parts[1] if len(parts) > 1 else b"\x90")
        for _ in range(self._chance.randrange(1, 4)):
            if header:
                header[self._chance.randrange(len(header))] = self._chance.choice((0xDD, 0xC1, 0xFF, 0x91, 0, 0xDF))
        return [parts[0], bytes(header), *parts[2:]]

    def again(self) -> Parts:
        """A frame that was sent before."""
        return self._chance.choice(self._said) if self._said else self.mumble()

    def mumble(self) -> Parts:
        """Anything, in any number of parts."""
        chance = self._chance
        parts = [chance.randbytes(chance.choice((0, 1, 8, 60))) for _ in range(chance.choice((1, 2, 3, 3, 4, 7)))]
        if chance.random() < 0.7:
            parts[0] = chance.choice((b"H", b"P", b"S", b"C", b"R", b"Q", b"A", b"?"))
        return parts

    def _item(self, size: int) -> tuple[Any, ...]:
        chance = self._chance
        group = chance.choice((*GROUPS, "", ""))
        flags = chance.choice((0, START, START | WATCH, START | CHECK, 8))
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
        if len(self._said) < ENOUGH:
            self._said.append(parts)
        else:
            self._said[self._chance.randrange(ENOUGH)] = parts
        return parts
