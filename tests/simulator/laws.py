"""The laws that results and effects of any run must obey."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from constructs_plans import Each, Pace, Part, Plan, Together, parts_of
from virtual_deaths import DIED
from virtual_waits import EXPIRED_TEXT
from wider_plans import Ask, Wider

from stageflow_actors import WorkflowResult

TIMED_OUT = "StageTimeout: "
EARLY = 1e-6
"""Seconds by which clocks may disagree that add up the same in another order."""


class Effect(NamedTuple):
    """What a handler has noted, and when, in seconds of virtual time."""

    at: float
    instance: str
    word: str
    what: tuple[object, ...]


class Given(NamedTuple):
    """What a stage has noted of its payload, and `kept`: which attempt at asking for it the context is of."""

    stage: str
    payload: Any
    kept: Any


def be_true(plan: Plan, result: WorkflowResult[Any], *, cancelled: str, deaths: int, wider: Wider) -> None:
    """Whatever happened to the instance: what its result says fits together.

    `cancelled` is why it may have been, "" where it was not; `deaths` how many workers a message may end.
    """
    told_by = _Reasons(cancelled, wider)
    parts = {part.name: part for place in plan.places for part in parts_of(place)}
    maps = {place.stage.name for place in plan.places if isinstance(place, Each)}
    status = str(result.status)
    assert status in {"completed", "failed", "compensated", "compensation_failed", "cancelled"}
    assert status != "cancelled" or cancelled
    told = [(one.stage_id, str(one.status)) for one in result.compensations]
    assert len({name for name, _ in told}) == len(told), "each is compensated once"
    failed = [name for name, end in told if end == "failed"]
    stages = {stage.stage_id: stage for stage in result.stages}
    if status == "completed":
        assert told == []
        assert result.error is None
    else:
        assert result.error is not None
        due = {
            name
            for name, stage in stages.items()
            if name in parts and parts[name].undone and str(stage.status) in ("completed", "compensated")
        }
        assert due - {name for name, _ in told} == set(), "what has completed is compensated"
        broken = {
            name: stage.error
            for name, stage in stages.items()
            if name in parts and stage.status == "failed" and stage.error
        }
        unsure = {name for name in broken if parts[name].uncertain and parts[name].undone and parts[name].required}
        ended = {name for name, error in broken.items() if re.match(f"{DIED}|{TIMED_OUT}", error)}
        assert (unsure & ended) - maps <= {name for name, _ in told}, (
            f"{unsure & ended} may have had an effect; compensated: {told}"
        )
        assert {name for name, _ in told} - due <= maps | unsure, "and nothing else, but the items of a map"
        assert (status == "compensation_failed") == bool(failed)
        assert status != "compensated" or told
        assert status != "failed" or not told
        in_order(plan, result, unsure - due - maps)
        if result.failed_stage is None:
            assert re.fullmatch(cancelled, result.error), result.error
        elif result.failed_stage in parts:
            told_by.check(parts[result.failed_stage], result.error)
    for name, stage in stages.items():
        if name not in parts:
            continue
        part = parts[name]
        if str(stage.status) in ("completed", "compensated"):
            if name not in maps:
                assert stage.data in (part.result, None)
                _tried_enough(part, stage.attempts, deaths * 2 - 1 if name in wider.asks else deaths)
        elif stage.error is not None:
            told_by.check(part, stage.error)
    for one in result.compensations:
        if one.error is not None:
            told_by.check(parts[one.stage_id], one.error, undone=True)


def in_order(plan: Plan, result: WorkflowResult[Any], unsure: set[str]) -> None:
    """In each run: first the compensations of stages that have not completed, then in reverse of completion."""
    records = result._outcome_read().compensations
    reruns = [record.rerun for record in records]
    assert reruns == sorted(reruns)
    for rerun in set(reruns):
        names = [record.stage_id for record in records if record.rerun == rerun]
        first = [name in unsure for name in names]
        assert first == sorted(first, reverse=True), f"{unsure} come first in {names}"
        groups = [_place_of(plan, name) for name in names if name not in unsure]
        assert groups == sorted(groups, reverse=True), "in reverse of completion"


def _tried_enough(part: Part, attempts: int, deaths: int) -> None:
    """Return the attempts that may have worked: those that do not fail and that the policy allows."""
    most = part.attempts if part.attempts > 1 else deaths
    assert part.fails < attempts <= max(most, 1), f"{part.name} has worked in attempt {attempts}"


class _Reasons:
    """Return the failures that may be reported: those that happened."""

    def __init__(self, cancelled: str, wider: Wider) -> None:
        self._cancelled = cancelled
        self._wider = wider

    def check(self, part: Part, error: str, *, undone: bool = False) -> None:
        """Raise `AssertionError` where an error is none that the part, or undoing it, can have had."""
        inner = re.sub(r"^.*; the first was item \d+: ", "", error)
        if undone:
            where = "a compensation of .*"
            reasons = [rf"KeyError: 'no {part.name}'", *_ended(where)]
        else:
            where = rf"stage '{part.name}(\[item\])?'"
            own = rf"ValueError: ({part.name} broke in attempt \d+|item \d+ broke)"
            needs = rf"(StageError: )?stage '{part.name}' needs .* to have completed"
            reasons = [own, needs, *_ended(where)]
            if part.name in self._wider.ttls:
                reasons.append(re.escape(EXPIRED_TEXT))
            if part.name in self._wider.asks:
                reasons += _unanswered(self._wider.asks[part.name], own, self._cancelled)
        reasons += ["StageError: the instance was cancelled", *([self._cancelled] if self._cancelled else [])]
        told = f"{part.name} is said to fail by {error}"
        assert any(re.fullmatch(reason, inner, re.DOTALL) for reason in reasons), told


def _ended(where: str) -> list[str]:
    """How a worker may have been ended there."""
    return [rf"{DIED}{where}: killed by SIGKILL.*", rf"{TIMED_OUT}{where} ran longer than its timeout of .*"]


def _unanswered(ask: Ask, own: str, cancelled: str) -> list[str]:
    """How a request may have failed."""
    answers = [own, *_ended(rf"(stage|endpoint) '{ask.endpoint}'"), *([cancelled] if cancelled else [])]
    late = rf"{TIMED_OUT}endpoint '(nobody|{ask.endpoint})' did not answer within .* s"
    return [late, *(f"StageError: endpoint '{ask.endpoint}' answered with an error: ({answer})" for answer in answers)]


def _place_of(plan: Plan, name: str) -> tuple[int, int]:
    for number, place in enumerate(plan.places):
        for inner, part in enumerate(parts_of(place)):
            if part.name == name:
                return number, 0 if isinstance(place, (Together, Part, Each)) else inner
    raise AssertionError(name)


def not_hurried(
    effects: Iterable[Effect], paces: Mapping[tuple[str, str], Pace], jumps: Sequence[tuple[float, float]]
) -> None:
    """No attempt begins before the time is up that its policy has asked for after the one before.

    `paces` by (word, stage); `jumps` are (when, by how much) the clock was set: a broker that starts after it was set
    ahead cannot know.
    """
    begun: dict[tuple[object, ...], float] = {}
    for effect in effects:
        if effect.word not in ("did", "undid"):
            continue
        name, attempt = str(effect.what[0]), int(str(effect.what[1]))
        pace = paces.get((effect.word, name.partition("[")[0]))
        before = begun.get((effect.instance, effect.word, name, attempt - 1))
        if pace is not None and before is not None:
            ahead = sum(by for at, by in jumps if before <= at <= effect.at and by > 0)
            due = before + pace.after(attempt - 1) - ahead
            told = f"attempt {attempt} at {name} of {effect.instance} began {effect.at - before:.3f} s after the last"
            assert effect.at >= due - EARLY, told
        begun[effect.instance, effect.word, name, attempt] = effect.at


def paces_of(plan: Plan) -> dict[tuple[str, str], Pace]:
    """By (word, stage): how long each waits before it is tried, or undone, once more."""
    found = {}
    for place in plan.places:
        for part in parts_of(place):
            if part.pace is not None and part.attempts > 1:
                found["did", part.name] = part.pace
            if part.undo_pace is not None and part.undo_attempts > 1:
                found["undid", part.name] = part.undo_pace
    return found


def undone_backwards(effects: Iterable[Effect]) -> None:
    """The items of a map are undone last one first; what is done again after a crash does not count."""
    last: dict[tuple[object, ...], int] = {}
    seen: set[tuple[object, ...]] = set()
    runs: Counter[str] = Counter()
    for effect in effects:
        runs[effect.instance] += effect.word in ("restarted", "retried")
        if effect.word != "undid" or "[" not in str(effect.what[0]):
            continue
        name, _, number = str(effect.what[0]).rstrip("]").partition("[")
        run = (effect.instance, runs[effect.instance], name, effect.what[1])
        if (*run, number) in seen:
            continue
        seen.add((*run, number))
        before = last.get(run)
        assert before is None or int(number) < before, f"item {number} of {name} of {effect.instance} was undone late"
        last[run] = int(number)


def not_done_over(effects: Iterable[Effect]) -> None:
    """What had completed when an instance was retried is not done again, unless it is restarted later."""
    done: dict[str, set[object]] = {}
    for effect in effects:
        if effect.word == "retried":
            done[effect.instance] = set(effect.what)
        elif effect.word == "restarted":
            done.pop(effect.instance, None)
        elif effect.word == "did":
            name = str(effect.what[0]).partition("[")[0]
            assert name not in done.get(effect.instance, ()), f"{name} of {effect.instance} was done again by a retry"


def expired_truly(
    plan: Plan, result: WorkflowResult[Any], came_late: set[str], lately: set[str], patient: set[str]
) -> None:
    """A message reported as expired came late, and a late message was not accepted.

    `lately`: in the run that the result is of, and nothing else can have been put in the place of that failure, as a
    death, a timeout, or a clock that is set may do.
    """
    plain = {part.name for place in plan.places if not isinstance(place, Each) for part in parts_of(place)}
    for stage in result.stages:
        name, status = stage.stage_id, str(stage.status)
        if name not in plain or result.status == "cancelled":
            continue
        if stage.error == EXPIRED_TEXT:
            assert name in came_late, f"{name} is said to have expired, and came in time"
        elif name in lately:
            told = f"a message of {name} came late, and it has {status} in attempt {stage.attempts} ({stage.error})"
            assert name in patient, told
            assert status == "skipped" or stage.attempts > 1, told


def given_truly(instance: str, given: Given, giver: str | None) -> None:
    """A stage is given the reply to what `giver` has asked, in the attempt that its context is of, and nothing else."""
    told = f"{given.stage} of {instance} was given {given.payload} with a context of attempt {given.kept}, by {giver}"
    if giver is None:
        assert given.payload is None, told
    else:
        assert given.payload == [giver, instance, given.kept], told


def served(effects: Iterable[Effect], answered: Iterable[tuple[str, str]]) -> None:
    """An endpoint has worked for each answered (instance, stage), and for none without a request."""
    asked: set[tuple[str, object, object]] = set()
    worked: set[tuple[str, object]] = set()
    for effect in effects:
        if effect.word == "did":
            asked.add((effect.instance, effect.what[0], effect.what[1]))
        elif effect.word == "served":
            stage, attempt, at, _ = effect.what
            told = f"{stage} of {effect.instance} was served in attempt {attempt}, which had not begun"
            assert (effect.instance, stage, attempt) in asked, told
            assert effect.at >= float(str(at)), told
            worked.add((effect.instance, stage))
    missing = set(answered) - worked
    assert not missing, f"nobody has worked for {missing}"


__all__ = ["Effect", "Given", "be_true", "expired_truly", "given_truly", "in_order", "not_done_over", "not_hurried"]
__all__ += ["paces_of", "served", "undone_backwards"]
