"""What a random workflow means: an interpreter with lists and loops, which shares no code with the runtime."""

from __future__ import annotations

from typing import Any

from language_plans import Choice, Each, Part, Pause, Place, Plan, Together, Wait

from stageflow_actors import WorkflowResult

# what a plan means


class Over(Exception):
    """The instance has come to its end early."""


class Meaning:
    """What is known of an instance while one goes through its plan by hand."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.context: dict[str, Any] = {}
        self.stages: dict[str, tuple[str, int, str | None, Any]] = {}
        self.completed: list[list[tuple[str, Part | Each | None]]] = []
        self.half: Each | None = None
        self.culprits: dict[str, str] = {}
        self.status = "completed"
        self.undone: list[set[tuple[str, str, str | None]]] = []
        self.put_back: list[tuple[str, str]] = []
        self.vague = False
        try:
            for place in plan.places:
                self.live_through(place)
        except Over:
            pass

    def done(self) -> set[str]:
        return {name for group in self.completed for name, _ in group}

    def live_through(self, place: Place) -> None:
        if isinstance(place, Part):
            self.try_part(place)
        elif isinstance(place, Together):
            self.fork(place)
        elif isinstance(place, Choice):
            self.choose(place)
        elif isinstance(place, Each):
            self.map(place)
        elif isinstance(place, Pause):
            self.complete(place.name, None, 1, None)
        else:
            self.wait(place)

    def complete(self, name: str, part: Part | Each | None, attempts: int, result: Any) -> None:
        self.stages[name] = ("completed", attempts, None, result)
        self.completed.append([(name, part)])

    def attempt(self, part: Part, done: set[str]) -> tuple[str, int, str | None]:
        """Status, attempts and error of one stage, were it run now."""
        missing = [name for name in part.after if name not in done]
        if missing:
            error = f"stage {part.name!r} needs {', '.join(map(repr, missing))} to have completed"
            return ("failed", 1, f"StageError: {error}") if part.required else ("skipped", 0, error)
        if part.wanted is False:
            return "skipped", 0, None
        if part.fails < part.attempts:
            return "completed", part.fails + 1, None
        return "failed", part.attempts, f"ValueError: {part.name} broke in attempt {part.attempts}"

    def write(self, part: Part, attempts: int) -> None:
        self.context[part.name] = attempts
        if part.clash is not None:
            self.context["clash"] = part.clash

    def try_part(self, part: Part) -> None:
        status, attempts, error = self.attempt(part, self.done())
        if status == "completed":
            self.write(part, attempts)
            self.complete(part.name, part, attempts, part.result)
            return
        if status == "failed" and part.required:
            self.fail(part.name, attempts, str(error))
        self.stages[part.name] = (status, attempts, error, None)

    def fork(self, place: Together) -> None:
        done = self.done()
        ends = [(part, *self.attempt(part, done)) for part in place.branches]
        lost = {part.name: str(error) for part, status, _, error in ends if status == "failed" and part.required}
        if lost and self.plan.on_failure == "park":
            self.vague = True  # which of the branches have got how far is nobody's promise
            self.park(lost)
        well = [(part, attempts) for part, status, attempts, _ in ends if status == "completed"]
        before = self.context.get("clash")
        changes = {part.clash for part, _ in well if part.clash is not None and part.clash != before}
        for part, status, attempts, error in ends:
            self.stages[part.name] = (status, attempts, error, part.result if status == "completed" else None)
        for part, attempts in well:
            self.context[part.name] = attempts
        if well:
            self.completed.append([(part.name, part) for part, _ in well])
        if len(changes) == 1:
            self.context["clash"] = changes.pop()
        elif changes:
            self.context["clash"] = ...  # of two that disagree, and are undone, either may be seen
        if lost:
            self.culprits = lost
            self.undo()
        if changes:
            self.fail(place.name, 1, "changed the field 'clash' differently")
        self.complete(place.name, None, 1, None)

    def choose(self, place: Choice) -> None:
        key = place.chosen if place.chosen in place.arms else place.default
        if key is None:
            arms = ", ".join(map(repr, place.arms))
            error = f"StageError: branch {place.name!r} has no arm {place.chosen!r} and no default: its arms are {arms}"
            self.fail(place.name, 1, error)
        assert key is not None
        self.complete(place.name, None, 1, key)
        for part in place.arms[key]:
            self.try_part(part)

    def map(self, place: Each) -> None:
        part = place.stage
        missing = [name for name in part.after if name not in self.done()]
        if missing or part.wanted is False:
            self.try_part(part)
            return
        lost = [number for number, fails in enumerate(place.items) if fails >= part.attempts]
        if lost and self.plan.on_failure == "park" and not place.max_failures:
            self.vague = True
            # Of several items that are parked any may be the one that is told of.
            which = f"{lost[0]} broke" if len(lost) == 1 else ""
            self.park({part.name: f"ValueError: item {which}"})
        if len(lost) > place.max_failures:
            error = (
                f"StageError: {len(lost)} of {len(place.items)} items of {part.name!r} failed, more than "
                f"max_failures={place.max_failures}; the first was item {lost[0]}: ValueError: item {lost[0]} broke"
            )
            if not part.required:
                self.stages[part.name] = ("failed", 1, error, None)
                return
            self.half = place if part.undone and len(lost) < len(place.items) else None
            self.fail(part.name, 1, error)
        results = [None if number in lost else number * 10 for number in range(len(place.items))]
        if place.into:
            self.context[part.name] = results
        self.complete(part.name, place, 1, None if place.into else results)

    def wait(self, place: Wait) -> None:
        if place.given:
            if place.handled:
                self.context[place.name] = place.payload
            self.complete(place.name, None, 1, None if place.handled else place.payload)
        elif place.late == "goes on":
            self.complete(place.name, None, 1, "went on")
        else:
            self.fail(place.name, 1, f"StageTimeout: no signal {place.name!r} came within 0.02 s")

    # bad ends

    def fail(self, name: str, attempts: int, error: str) -> None:
        if self.plan.on_failure == "park":
            self.park({name: error})
        self.stages[name] = ("failed", attempts, error, None)
        self.culprits = {name: error}
        self.undo()

    def park(self, culprits: dict[str, str]) -> None:
        self.status, self.culprits = "parked", culprits
        raise Over

    def undo(self) -> None:
        groups = [*self.completed]
        if self.half is not None:
            groups.append([(self.half.stage.name, self.half)])
        for group in reversed(groups):
            todo = [(name, what) for name, what in group if what is not None and self.stage_of(what).undone]
            told: set[tuple[str, str, str | None]] = set()
            for name, what in todo:
                part = self.stage_of(what)
                well, error = part.undo_fails < part.undo_attempts, f"KeyError: 'no {name}'"
                if isinstance(what, Each):
                    error = self.put_items_back(what, error)
                    well = well or not error
                elif well:
                    self.context[f"undone {name}"] = self.stages[name][3]
                if well and self.stages[name][0] == "completed":
                    self.stages[name] = ("compensated", *self.stages[name][1:])
                told.add((name, "completed", None) if well else (name, "failed", error))
            if told:
                self.undone.append(told)
        self.status = "failed"
        if self.undone:
            well = all(status == "completed" for group_ in self.undone for _, status, _ in group_)
            self.status = "compensated" if well else "compensation_failed"
        raise Over

    def put_items_back(self, place: Each, error: str) -> str:
        """All items are tried in each attempt, the last one first, as they fail and succeed together. What is said if
        they fail for good; nothing where there is none."""
        part = place.stage
        left = [number for number, fails in enumerate(place.items) if fails < part.attempts]
        tries = min(part.undo_fails + 1, part.undo_attempts)
        self.put_back += [(part.name, str(number)) for number in reversed(left)] * tries
        if not left:
            return ""
        count = len(left)
        return f"{count} of {count} items of {part.name!r} could not be undone; the first was item {left[-1]}: {error}"

    @staticmethod
    def stage_of(what: Part | Each) -> Part:
        return what.stage if isinstance(what, Each) else what


# the comparison


def compare(plan: Plan, result: WorkflowResult[Any], put_back: list[tuple[str, ...]] | None = None) -> None:
    """The result is what the plan means; `put_back` are the items undone, in order, where that is to be looked at."""
    meaning = Meaning(plan)
    assert str(result.status) == meaning.status, (result.error, meaning.culprits)
    if meaning.culprits:
        assert result.failed_stage in meaning.culprits
        expected = meaning.culprits[str(result.failed_stage)]
        assert expected in str(result.error) if meaning.vague or "clash" in expected else expected == result.error
    else:
        assert (result.failed_stage, result.error) == (None, None)
    if meaning.vague:
        return
    context = dict(result.context)
    if meaning.context.get("clash") is ...:
        meaning.context.pop("clash")
        context.pop("clash", None)
    assert context == meaning.context
    found = {s.stage_id: (str(s.status), s.attempts, s.error, s.data) for s in result.stages}
    for name, facts in found.items():
        expected_facts = meaning.stages[name]
        if facts[2] and "differently" in facts[2]:
            facts = (*facts[:2], expected_facts[2], facts[3])
        assert facts == expected_facts, name
    assert found.keys() == meaning.stages.keys()
    told = [(c.stage_id, str(c.status), c.error) for c in result.compensations]
    for group in meaning.undone:
        assert set(told[: len(group)]) == group
        told = told[len(group) :]
    assert told == []
    assert put_back is None or put_back == meaning.put_back
