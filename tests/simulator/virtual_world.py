"""A virtual clock, schedule and network: the same seed gives the same run.

Nothing here knows brokers or workflows. One thread runs at a time, and each thread returns control before the next
event.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

Frame = tuple[int, bytes, bytes, bytes]


MOST = 200_000
"""Things that happen in one run at most: what goes round and round is no progress."""


class Stuck(AssertionError):
    """Nothing that was waited for can happen any more."""


class World:
    """Virtual time, in seconds, and chance. `log` keeps the last events, for diagnosis."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 1_000.0
        self.ahead = 1_700_000_000.0
        self.jumps: list[tuple[float, float]] = []
        self.log: list[str] = []
        self.sleep: Callable[[float], None] = _nobody_sleeps
        self._calendar: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0

    @property
    def wall(self) -> float:
        """Seconds since the Unix epoch, on a clock that may be set."""
        return self.now + self.ahead

    def set_clock(self, seconds: float) -> None:
        """Somebody sets the clock, by that much."""
        self.ahead += seconds
        self.jumps.append((self.now, seconds))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Have something happen; what is due at one time happens in the order in which it was asked for."""
        self._serial += 1
        heapq.heappush(self._calendar, (self.now + seconds, self._serial, action))

    def soon(self, most: float, action: Callable[[], None]) -> None:
        """Have something happen within `most` seconds."""
        self.after(self.random.random() * most, action)

    def say(self, text: str) -> None:
        """Note what has happened."""
        self.log.append(f"{self.now - 1000:9.4f} {text}")

    def run(self, until: Callable[[], bool], most: float) -> None:
        """Let things happen until the condition holds. Raises `Stuck` when it does not within `most` seconds."""
        limit = self.now + most
        while not until():
            if self._serial > MOST:
                raise Stuck(f"{MOST} things have happened, and there is no end")
            if not self._calendar:
                raise Stuck("nothing more will happen")
            due, _, action = heapq.heappop(self._calendar)
            if due > limit:
                raise Stuck(f"not within {most} virtual seconds")
            self.now = max(self.now, due)
            action()

    @property
    def happened(self) -> int:
        """How much has been asked to happen so far: the same for two runs that are the same."""
        return self._serial

    @contextmanager
    def time(self) -> Iterator[None]:
        """Within it, the clocks of this process are virtual, and no code may sleep."""
        clocks: dict[str, Callable[..., Any]] = {
            "time": lambda: self.wall,
            "monotonic": lambda: self.now,
            "perf_counter": lambda: self.now,
            "monotonic_ns": lambda: int(self.now * 1e9),
            "sleep": lambda seconds: self.sleep(seconds),
        }
        before = {name: getattr(time, name) for name in clocks}
        try:
            for name, clock in clocks.items():
                setattr(time, name, clock)
            yield
        finally:
            for name, clock in before.items():
                setattr(time, name, clock)


def _nobody_sleeps(seconds: float) -> None:
    raise AssertionError(f"somebody sleeps for {seconds} s of real time")


class Link:
    """One connection. Frames arrive in order, after a while, or not at all: when it breaks, what is on its way is lost.

    Towards the broker `disorder` frames come twice, or after the next one: what the numbers in them are for.
    `frozen_until`: the peer at the near end is stopped, and hears nothing before that. `said_at`: when the broker has
    said what the peer is hearing.
    """

    def __init__(
        self, world: World, *, up: Callable[[Frame], None], down: Callable[[bytes, bytes], None], disorder: int
    ) -> None:
        self.world = world
        self.broken = False
        self.closed = False
        self.frozen_until = self.said_at = 0.0
        self._up, self._down = up, down
        self._disorder = disorder
        self._generation = 0
        self._last_up = self._last_down = 0.0

    def send(self, frame: Frame) -> None:
        """To the broker."""
        if self.closed:
            return
        chance = self.world.random
        if self.broken and chance.random() < 0.5:
            return
        self._last_up = max(self.world.now + chance.expovariate(5_000), self._last_up)
        self._carry_up(frame, self._last_up)
        if self._disorder and chance.random() < 0.1:
            # Now and then: what is sent again after each disorder must get through some time.
            self._disorder -= 1
            if chance.random() < 0.5:
                self._carry_up(frame, self._last_up + chance.random() * 0.01)
            else:
                self._last_up = max(self.world.now, self._last_up - chance.random() * 0.002)

    def hear(self, header: bytes, blob: bytes) -> None:
        """From the broker."""
        if self.closed or self.broken:
            return
        chance = self.world.random
        self._last_down = max(self.world.now + chance.expovariate(5_000), self._last_down)
        self._carry_down(header, blob, self._last_down, self.world.now)

    def lose(self) -> None:
        """What is on its way will not arrive."""
        self._generation += 1

    def close(self) -> None:
        """The peer is gone."""
        self.closed = True
        self.lose()

    def _carry_up(self, frame: Frame, due: float) -> None:
        generation = self._generation

        def arrive() -> None:
            if generation == self._generation:
                self._up(frame)

        self.world.after(max(0.0, due - self.world.now), arrive)

    def _carry_down(self, header: bytes, blob: bytes, due: float, said_at: float) -> None:
        generation = self._generation

        def arrive() -> None:
            if generation != self._generation:
                return
            if self.world.now < self.frozen_until:
                # Behind all that came before, which waits likewise.
                self._last_down = max(self._last_down, self.frozen_until)
                self._carry_down(header, blob, self.frozen_until, said_at)
            else:
                self.said_at = said_at
                self._down(header, blob)

        self.world.after(max(0.0, due - self.world.now), arrive)
