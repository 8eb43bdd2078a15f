"""The flags of paused queues in shared memory: set after the commit, before the answer, and right after a restart."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_peer import EnginePeer

from stageflow_brokers.core import wire
from stageflow_brokers.engine.engine import Engine
from stageflow_brokers.pause_flags import NOT_PAUSED, PauseFlags


@pytest.fixture
def flags() -> Iterator[PauseFlags]:
    made = PauseFlags.create()
    yield made
    os.close(made.fd)


def paused(flags: PauseFlags, queue: str) -> bool:
    return bool(flags.flag(flags.register(queue))[0])


def test_each_queue_has_one_flag_that_another_process_sees(flags: PauseFlags) -> None:
    one, two = flags.register("one"), flags.register("two")
    assert one != two
    assert flags.register("one") == one
    flag = flags.flag(one)
    theirs = PauseFlags(flags.fd)
    theirs.set("one", True)
    assert (flag[0], flags.flag(two)[0]) == (1, 0)
    theirs.set("one", False)
    assert flag[0] == 0


def test_a_queue_registered_later_is_found_and_one_without_workers_is_ignored(flags: PauseFlags) -> None:
    theirs = PauseFlags(flags.fd)
    theirs.set("late", True)
    flags.register("late")
    theirs.set("late", True)
    theirs.set("nobody", True)
    assert paused(flags, "late")
    assert flags.flag(0) is NOT_PAUSED


def test_all_flags_are_set_again_by_what_a_restarted_broker_knows(flags: PauseFlags) -> None:
    for queue in ("one", "two", "three"):
        flags.register(queue)
    flags.set("one", True)
    flags.set("two", True)
    flags.set_all(["two", "three", "not registered"])
    assert [paused(flags, queue) for queue in ("one", "two", "three")] == [False, True, True]


def test_a_flag_is_set_after_the_commit_and_before_the_answer(
    flags: PauseFlags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(journal_dir=tmp_path / "journal", pause_flags=flags)
    flags.register("q")
    seen: list[tuple[str, bool]] = []
    assert engine.journal is not None
    commit, dispatch = engine.journal.commit, engine.machine.dispatch

    def watched_commit(*batch: object) -> object:
        seen.append(("commit", paused(flags, "q")))
        return commit(*batch)  # type: ignore[arg-type]

    def watched_dispatch() -> object:
        seen.append(("answer", paused(flags, "q")))
        return dispatch()

    monkeypatch.setattr(engine.journal, "commit", watched_commit)
    monkeypatch.setattr(engine.machine, "dispatch", watched_dispatch)
    operator = EnginePeer(engine)
    operator.hello([("q", 1), ("is paused", 1)])
    seen.clear()
    operator.send(wire.QUERY, "pause", ("q",))
    operator.send(wire.QUERY, "resume", ("q",))
    engine.close()
    assert seen == [("commit", False), ("answer", True), ("commit", True), ("answer", False)]


def test_a_pause_that_is_asked_for_again_sets_the_flag_that_was_registered_since(
    flags: PauseFlags, tmp_path: Path
) -> None:
    engine = Engine(journal_dir=tmp_path / "journal", pause_flags=flags)
    operator = EnginePeer(engine)
    operator.hello([("q", 1), ("is paused", 1)])
    operator.send(wire.QUERY, "pause", ("q",))
    assert not paused(flags, "q")
    operator.send(wire.QUERY, "pause", ("q",))
    engine.close()
    assert paused(flags, "q")


def test_a_broker_that_died_between_the_commit_and_the_flag_leaves_no_queue_stuck(
    flags: PauseFlags, tmp_path: Path
) -> None:
    engine = Engine(journal_dir=tmp_path / "journal", pause_flags=flags)
    flags.register("was paused")
    flags.register("is paused")
    operator = EnginePeer(engine)
    operator.hello([("q", 1), ("is paused", 1)])
    operator.send(wire.QUERY, "pause", ("is paused",))
    engine.close()
    flags.set("was paused", True)
    flags.set("is paused", False)
    Engine(journal_dir=tmp_path / "journal", pause_flags=flags).close()
    assert (paused(flags, "was paused"), paused(flags, "is paused")) == (False, True)
