"""A disk whose n-th call fails, or all from the n-th on, for each n, in each scenario.

The error is the one a disk or a kernel gives; a write may also stop half-way without one. Afterwards the process ends
(what it wrote is still to come to the disk) or the whole machine does (any part of it is lost).
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from pathlib import Path

from torturing.scenarios import SCENARIOS, Disk

__all__ = ["FAULTS", "LASTING", "READING", "fail_every_call", "fail_every_read"]

SHORT = 0
FAULTS = [(errno.EIO, "EIO"), (errno.ENOSPC, "ENOSPC"), (errno.EINTR, "EINTR"), (SHORT, "short writes")]
LASTING = ("EIO", "ENOSPC", "short writes")
"""Faults that may be permanent; an interruption is over at once."""
READING = ("recovery", "repair")
"""Scenes in which the journal is read."""


def fail_every_call(
    name: str, code: int, figures: Counter[str], *, for_ever: bool, share: float, chance: random.Random, seed: int = 0
) -> None:
    """Play scenario `name` with a fault at call n, for every n (a `share` of them)."""
    step = 0
    while True:
        for machine_too in (False, True):
            if step and chance.random() >= share:
                continue
            scenario = SCENARIOS[name]()
            disk = scenario.set(seed)
            hit = _arm(disk, step, code, for_ever=for_ever)
            scenario.act()
            if machine_too:
                disk.crash(random.Random(f"{seed} {step}"))
            else:
                disk.kill()
            scenario.judge(disk)
            figures["faults injected"] += len(hit)
            figures.update(f"  first at {call}" for call in hit[:1])
        step += 1
        if step > _calls(name, seed):
            return


def fail_every_read(name: str, figures: Counter[str], *, share: float, chance: random.Random, seed: int = 0) -> None:
    """Play scenario `name` with EIO at read n, for every n (a `share` of them).

    Once: then it is as if nothing had been, for a second try is made. And for ever, of that place; what was refused for
    that is there again when the place can be read again. A repair would give it up: `resting` sees to that.
    """
    left = 0

    def on_read(path: Path, offset: int) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            if for_ever:
                disk.spoil(path, offset)
            raise OSError(errno.EIO, "injected")

    reads = 0
    while True:
        for for_ever in (False, True):
            if (for_ever and name == "repair") or (reads and chance.random() >= share):
                continue
            scenario = SCENARIOS[name]()
            disk = scenario.set(seed)
            left = reads
            disk.on_read = on_read
            scenario.act()
            disk.kill()
            disk.heal()
            scenario.judge(disk)
            figures["reads failed"] += left < 0
            if not for_ever and left >= 0:
                return
        reads += 1


_CALLS: dict[tuple[str, int], int] = {}


def _calls(name: str, seed: int) -> int:
    """How many calls the scenario makes when none fails; the way on after a failure is judged, not counted."""
    if (name, seed) not in _CALLS:
        scenario = SCENARIOS[name]()
        disk = scenario.set(seed)
        disk.calls.clear()
        scenario.act()
        _CALLS[name, seed] = len(disk.calls)
    return _CALLS[name, seed]


def _arm(disk: Disk, step: int, code: int, *, for_ever: bool) -> list[str]:
    hit: list[str] = []
    left = step

    def on_call(name: str, path: str) -> int | None:
        nonlocal left
        left -= 1
        if left >= 0 or (left < -1 and not for_ever):
            return None
        if code == SHORT:
            if name == "pwritev":
                hit.append(name)
                return 300
            return None
        hit.append(name)
        raise OSError(code, "injected")

    disk.on_call = on_call
    return hit
