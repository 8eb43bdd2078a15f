"""The invariants hold after every round of the broker, in every state of the simulator's seeds.

And in none of these states does the doctor raise a false alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors.core.invariants import broker_findings, instance_findings
from stageflow_actors.core.plan import Naming
from stageflow_brokers.core.sessions import Session
from stageflow_brokers.engine.engine import Engine, Frame, Outgoing

HERE = Path(__file__).resolve().parent
NONE = b"\x90"
"""No arguments, in msgpack."""


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The simulator."""
    for folder in ("brokers", "language", "simulator"):
        monkeypatch.syspath_prepend(str(HERE.parent / folder))
    from simulation import simulate as run

    return run


@pytest.mark.parametrize("wild", [False, True])
def test_the_invariants_hold_after_every_round(
    simulate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, wild: bool
) -> None:
    rounds = Engine.round
    shapes = set()

    def round_and_look(self: Engine, frames: Iterable[Frame], *, more: bool = False) -> list[Outgoing]:
        said = rounds(self, frames, more=more)
        picture = self.machine.admin.call(Session(1), "audit", NONE)
        assert [*instance_findings(picture, Naming()), *broker_findings(picture)] == []
        shapes.update(str(shape[:3]) for shape in picture["shapes"])
        return said

    monkeypatch.setattr(Engine, "round", round_and_look)
    for seed in range(2_000, 2_004):
        simulate(seed, wild=wild)
    assert len(shapes) > 50, "instances have been in many states"


def test_an_instance_that_loses_its_message_is_noticed(
    simulate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = Engine.round
    seen: list[tuple[str, list[str]]] = []

    def lose_and_look(self: Engine, frames: Iterable[Frame], *, more: bool = False) -> list[Outgoing]:
        said = rounds(self, frames, more=more)
        store = self.machine.state
        alone = (g for g in store.groups.values() if g.first_message is not None and not g.other_messages)
        group = next((g for g in alone if not g.gathers), None)
        if group is not None and group.first_message is not None:
            store.remove(group.first_message)
            found = instance_findings(self.machine.admin.call(Session(1), "audit", NONE), Naming())
            seen.append((group.id, [one.where for one in found]))
            pytest.fail("enough")
        return said

    monkeypatch.setattr(Engine, "round", lose_and_look)
    with pytest.raises(AssertionError, match="enough"):
        simulate(2_000, wild=False)
    [(lost, found)] = seen
    assert found == [lost]
