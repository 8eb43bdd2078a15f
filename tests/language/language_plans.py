"""Random workflows of every construct: as plans, and as code. What they mean is told in `language_meaning`."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, Literal, NamedTuple

import language_world

from stageflow_actors import Compensation, Retry, Stage, Workflow

NEVER = 99


class Pace(NamedTuple):
    """How long it takes until something that has failed is tried again, in seconds."""

    kind: Literal["linear", "exponential"]
    initial: float
    maximum: float

    def after(self, attempt: int) -> float:
        """The wait behind that attempt."""
        grown = self.initial * (attempt if self.kind == "linear" else 2 ** (attempt - 1))
        return min(grown, self.maximum)


class Part(NamedTuple):
    """A stage. It raises in its first `fails` attempts of `attempts`; `clash` is what it writes for all to see."""

    name: str
    required: bool
    after: tuple[str, ...]
    wanted: bool | None
    fails: int
    attempts: int
    result: Any
    undone: bool
    undo_fails: int
    undo_attempts: int
    clash: int | None = None
    pace: Pace | None = None
    undo_pace: Pace | None = None


class Together(NamedTuple):
    name: str
    branches: tuple[Part, ...]


class Choice(NamedTuple):
    name: str
    chosen: str
    arms: dict[str, tuple[Part, ...]]
    default: str | None


class Each(NamedTuple):
    """A map: `items` are (fails, attempts) of each; `stage` is what it is as a stage."""

    stage: Part
    items: tuple[int, ...]
    max_failures: int
    into: bool


class Pause(NamedTuple):
    name: str


class Wait(NamedTuple):
    """A signal stage: `payload` is given early, or the time is up and `late` says what becomes of that."""

    name: str
    payload: Any
    given: bool
    handled: bool
    late: Literal["fails", "goes on"]


Place = Part | Together | Choice | Each | Pause | Wait


class Plan(NamedTuple):
    on_failure: Literal["compensate", "park"]
    places: tuple[Place, ...]


# random plans


class Maker:
    """Draws plans of which about every second one comes to a bad end, somewhere. `paced`: with waits between attempts,
    for which there had better be a clock that is not real, and with more maps."""

    def __init__(self, random: Random, *, paced: bool = False) -> None:
        self.random = random
        self.paced = paced
        self.names: list[str] = []

    def one_in(self, count: int) -> bool:
        return self.random.randint(1, count) == 1

    def name(self, kind: str) -> str:
        made = f"{kind}{len(self.names)}"
        self.names.append(made)
        return made

    def pace(self) -> Pace | None:
        if not self.paced or self.one_in(3):
            return None
        kind: Literal["linear", "exponential"] = "linear" if self.one_in(2) else "exponential"
        return Pace(kind, self.random.choice((0.02, 0.1, 0.4)), 0.6)

    def part(self, before: list[str], kind: str = "s", clash: int | None = None) -> Part:
        random = self.random
        troubled, undo_troubled = self.one_in(5), self.one_in(5)
        name = self.name(kind)
        return Part(
            name=name,
            required=not self.one_in(3),
            after=tuple(one for one in before if self.one_in(14)),
            wanted=(None, None, None, True, False)[random.randint(0, 4)],
            fails=(1, 2, NEVER)[random.randint(0, 2)] if troubled else 0,
            attempts=random.randint(1, 3),
            result=(None, 7, {"receipt": name}, [name, b"\xff"])[random.randint(0, 3)],
            undone=not self.one_in(4),
            undo_fails=(1, NEVER)[random.randint(0, 1)] if undo_troubled else 0,
            undo_attempts=random.randint(1, 2),
            clash=clash,
            pace=self.pace(),
            undo_pace=self.pace(),
        )

    def place(self, before: list[str]) -> Place:
        random = self.random
        kind = 7 if self.paced and self.one_in(6) else random.randint(0, 9)
        if kind <= 2:
            return self.part(before)
        if kind <= 4:
            count = random.randint(1, 3)
            clashes = [random.randint(0, 1) if self.one_in(6) else None for _ in range(count)]
            return Together(self.name("p"), tuple(self.part(before, "b", clash) for clash in clashes))
        if kind <= 6:
            arms: dict[str, tuple[Part, ...]] = {}
            for key in ("left", "right")[: random.randint(1, 2)]:
                inside: list[Part] = []
                for _ in range(random.randint(0, 2)):
                    inside.append(self.part([*before, *(one.name for one in inside)], "a"))
                arms[key] = tuple(inside)
            default = "left" if self.one_in(3) else None
            return Choice(self.name("c"), ("left", "right", "nowhere")[random.randint(0, 2)], arms, default)
        if kind == 7:
            stage = self.part(before, "m")._replace(fails=0, result=None)
            failing = [
                (1, 2, NEVER)[random.randint(0, 2)] if self.one_in(4) else 0 for _ in range(random.randint(0, 4))
            ]
            return Each(stage, tuple(failing), random.randint(0, 2), random.randint(0, 1) == 1)
        if kind == 8:
            return Pause(self.name("d"))
        given = not self.one_in(3)
        late: Literal["fails", "goes on"] = "fails" if self.one_in(2) else "goes on"
        return Wait(self.name("w"), random.randint(0, 9), given, self.one_in(2), late)

    def plan(self, longest: int) -> Plan:
        places: list[Place] = []
        before: list[str] = []
        for _ in range(self.random.randint(1, longest)):
            place = self.place(before)
            places.append(place)
            before += [part.name for part in parts_of(place)]
            if isinstance(place, (Together, Choice, Pause, Wait)):
                before.append(place.name)
        return Plan("park" if self.one_in(6) else "compensate", tuple(places))


def parts_of(place: Place) -> list[Part]:
    if isinstance(place, Part):
        return [place]
    if isinstance(place, Together):
        return list(place.branches)
    if isinstance(place, Choice):
        return [part for arm in place.arms.values() for part in arm]
    return [place.stage] if isinstance(place, Each) else []


# the same plan as code


def build(plan: Plan, name: str, *, at_most: float | None = None, **each: Any) -> Workflow[dict[str, Any]]:
    """The workflow of a plan, and how long it may run; `each` are further options of its stages."""
    workflow = Workflow(name, on_failure=plan.on_failure, timeout=at_most)
    for place in plan.places:
        if isinstance(place, Part):
            workflow.add_stage(stage_of(place, each))
        elif isinstance(place, Together):
            workflow.add_parallel(place.name, [stage_of(part, each) for part in place.branches])
        elif isinstance(place, Choice):
            arms = {key: [stage_of(part, each) for part in arm] for key, arm in place.arms.items()}
            workflow.add_branch(place.name, selector(place.chosen), arms, default=place.default)
        elif isinstance(place, Each):
            workflow.add_map(
                place.stage.name,
                item_handler(place.items),
                over=numbers(len(place.items)),
                into=place.stage.name if place.into else None,
                max_failures=place.max_failures,
                **options_of(place.stage, items=True),
                **each,
            )
        elif isinstance(place, Pause):
            workflow.add_delay(place.name, 0.001)
        else:
            workflow.add_signal(
                place.name,
                timeout=3600 if place.given else 0.02,
                on_signal=taker(place.name) if place.handled else None,
                on_timeout=(lambda context: "went on") if place.late == "goes on" else None,
            )
    return workflow


def stage_of(part: Part, each: dict[str, Any]) -> Stage:
    return Stage(handler(part), id=part.name, **options_of(part), **each)


def options_of(part: Part, *, items: bool = False) -> dict[str, Any]:
    wanted = part.wanted
    undo = (undo_item if items else undo_stage)(part)
    return {
        "required": part.required,
        "after": part.after,
        "when": None if wanted is None else (lambda context: wanted),
        "retry": retry(part.attempts, part.pace),
        "compensation": Compensation(undo, retry=retry(part.undo_attempts, part.undo_pace)) if part.undone else None,
    }


def retry(attempts: int, pace: Pace | None) -> Retry | None:
    if attempts <= 1:
        return None
    if pace is None:
        return Retry.fixed(attempts, 0)
    if pace.kind == "linear":
        return Retry.linear(attempts, pace.initial, pace.maximum)
    return Retry.exponential(attempts, pace.initial, pace.maximum, jitter=False)


def handler(part: Part) -> Any:
    def handle(context: dict[str, Any], ctx: Any) -> Any:
        language_world.note(ctx.instance_id, "did", part.name, ctx.attempt)
        context[part.name] = ctx.attempt
        if part.clash is not None:
            context["clash"] = part.clash
        if part.result == 7:
            ctx.step("once", language_world.note, ctx.instance_id, "step", part.name)
            language_world.note(ctx.instance_id, "kept", part.name)
        if ctx.attempt <= part.fails:
            context["left behind"] = ctx.attempt
            raise ValueError(f"{part.name} broke in attempt {ctx.attempt}")
        return part.result

    return handle


def undo_stage(part: Part) -> Any:
    def compensate(context: dict[str, Any], ctx: Any) -> None:
        language_world.note(ctx.instance_id, "undid", part.name, ctx.attempt)
        context[f"undone {part.name}"] = ctx.results[part.name]
        if ctx.attempt <= part.undo_fails:
            raise KeyError(f"no {part.name}")

    return compensate


def item_handler(fails: tuple[int, ...]) -> Any:
    def handle(item: int, ctx: Any) -> int:
        language_world.note(ctx.instance_id, "did", f"{ctx.stage_id}[{item}]", ctx.attempt)
        if ctx.attempt <= fails[item]:
            raise ValueError(f"item {item} broke")
        return item * 10

    return handle


def undo_item(part: Part) -> Any:
    def compensate(item: int, ctx: Any) -> None:
        language_world.note(ctx.instance_id, "put back", part.name, item)
        language_world.note(ctx.instance_id, "undid", f"{part.name}[{item}]", ctx.attempt)
        assert ctx.results[part.name] == item * 10
        if ctx.attempt <= part.undo_fails:
            raise KeyError(f"no {part.name}")

    return compensate


def selector(key: str) -> Any:
    return lambda context: key


def numbers(count: int) -> Any:
    return lambda context: range(count)


def taker(name: str) -> Any:
    def take(context: dict[str, Any], payload: Any) -> None:
        context[name] = payload

    return take


def signals_of(plan: Plan) -> Iterator[tuple[str, Any]]:
    return ((place.name, place.payload) for place in plan.places if isinstance(place, Wait) and place.given)
