"""A few seconds of `scripts/fuzz.py`, and its judge, which must notice each fault."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from script_runner import run_script


@pytest.fixture
def fuzzing() -> Any:
    """The parts of the script."""
    import fuzzing.frames
    import fuzzing.well_behaved_peer

    return fuzzing


def test_arbitrary_frames_harm_no_peer_that_works_at_the_same_time() -> None:
    run = run_script("fuzz", "-n", "30000", "--seed", "11", "--output", "json")
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    figures = json.loads(run.stdout)
    assert figures["wrongs"] == []
    assert figures["frames sent"] == 30_000
    assert figures["malformed, counted by the broker"] > 1_000
    assert figures["well-behaved groups ended"] > 100
    told = {kind: int(count) for count, kind in (each.split() for each in figures["answers to attackers"].split(", "))}
    assert told["stale"] > 50, "what others hold was named, and refused"


def test_the_same_seed_makes_the_same_frames(fuzzing: Any) -> None:
    def frames(seed: int) -> list[list[bytes]]:
        made = fuzzing.frames.Frames(random.Random(seed), lambda: (5, 1 << 40), [7])
        return [made.hello() if number % 50 == 0 else made.next() for number in range(2_000)]

    assert frames(1) == frames(1)
    assert frames(1) != frames(2)


def test_the_judge_sees_what_is_lost_doubled_stolen_or_never_published(fuzzing: Any) -> None:
    def judged(*ends: tuple[str, bytes], sent: tuple[tuple[str, bytes], ...] | None = None) -> list[str]:
        judge = fuzzing.well_behaved_peer.Judge()
        judge.publish("g", b"body")
        for end in ends:
            judge.end(*end)
        for push in ends if sent is None else sent:
            judge.push(*push)
        judge.finish()
        wrongs: list[str] = judge.wrongs
        return wrongs

    whole = ("g", b"body|work|more")
    assert judged(whole) == []
    assert judged() == ["group g was lost"]
    assert judged(whole, sent=()) == ["the end of g was never sent"]
    assert "group g ended 2 times" in judged(whole, whole, sent=(whole,))
    assert "the end of g was sent 2 times" in judged(whole, sent=(whole, whole))
    assert "is not that of its workers" in judged(("g", b"bad"))[0]
    assert "group h ended and was never published" in judged(whole, ("h", b"|work|more"))
