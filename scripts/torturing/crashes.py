"""Every way in which a crash may lose and reorder what was not synced, at every call of every scenario.

At each call the disk is asked what a crash just then might leave: each subset of the unsynced writes, sizes and changes
of names (a bounded number where there are many). The law is judged on each of them.
"""

from __future__ import annotations

import random
from collections import Counter

from torturing.scenarios import SCENARIOS

__all__ = ["crash_at_every_call"]


def crash_at_every_call(name: str, figures: Counter[str], *, most: int, chance: random.Random, seed: int = 0) -> None:
    """Play scenario `name`; before each call that changes anything, judge up to `most` states a crash might leave."""
    scenario = SCENARIOS[name]()
    disk = scenario.set(seed)
    looking = False

    def on_call(called: str, path: str) -> None:
        nonlocal looking
        if looking:
            return
        looking = True
        figures["crash points"] += 1
        for state in disk.crash_states(most, chance):
            figures["crash states"] += 1
            scenario.judge(state)
        looking = False

    disk.on_call = on_call
    scenario.act()
