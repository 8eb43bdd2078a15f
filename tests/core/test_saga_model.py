"""Random sagas against a plain interpreter of their meaning, in this process and through real ones.

The interpreter below is written from the description, with lists and loops, and shares no code with the runtime.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stageflow_actors import Compensation, Config, Replace, Retry, Runtime, StageTimeout, Workflow, WorkflowResult
from stageflow_actors.testing import run


class Part(NamedTuple):
    """One stage of a random saga. It raises in its first `fails` attempts, of `attempts` that its policy allows.

    In attempt `unknown` it raises a `StageTimeout`; `uncertain` is the option `when_uncertain` of its compensation.
    """

    name: str
    required: bool
    after: tuple[str, ...]
    wanted: bool | None
    fails: int
    attempts: int
    result: Any
    form: str
    undone: bool
    undo_fails: int
    undo_attempts: int
    unknown: int
    uncertain: bool


class Saga(NamedTuple):
    """A random saga, as data."""

    on_failure: Literal["compensate", "park"]
    parts: tuple[Part, ...]


class Ending(NamedTuple):
    """All of a result but ids and times."""

    status: str
    failed_stage: str | None
    error: str | None
    context: dict[str, Any]
    stages: list[tuple[str, str, int, str | None, Any]]
    compensations: list[tuple[str, str, str | None]]


NAMES = "abcdefg"
NEVER = 99


def make_saga(random: Random, longest: int = 7) -> Saga:
    """A saga in which about every second one comes to a bad end, somewhere."""
    parts: list[Part] = []
    for name in NAMES[: random.randint(1, longest)]:
        earlier = [part.name for part in parts]
        troubled = random.randint(0, 3) == 0
        undo_troubled = random.randint(0, 3) == 0
        parts.append(
            Part(
                name=name,
                required=random.randint(0, 2) > 0,
                after=tuple(one for one in earlier if random.randint(0, 7) == 0),
                wanted=(None, None, None, True, False)[random.randint(0, 4)],
                fails=(1, 2, NEVER)[random.randint(0, 2)] if troubled else 0,
                attempts=random.randint(1, 3),
                result=(None, 7, {"receipt": name}, [name, b"\xff"])[random.randint(0, 3)],
                form=("mutates", "mutates", "replaces", "async", "object")[random.randint(0, 4)],
                undone=random.randint(0, 3) > 0,
                undo_fails=(1, NEVER)[random.randint(0, 1)] if undo_troubled else 0,
                undo_attempts=random.randint(1, 2),
                unknown=random.randint(0, 3),
                uncertain=random.randint(0, 2) > 0,
            )
        )
    return Saga("park" if random.randint(0, 4) == 0 else "compensate", tuple(parts))


# what a saga means


def interpret(saga: Saga) -> Ending:
    """How the saga ends."""
    log: list[str] = []
    stages: dict[str, tuple[str, int, str | None, Any]] = {}
    completed: list[Part] = []
    for part in saga.parts:
        names = [one.name for one in completed]
        missing = [name for name in part.after if name not in names]
        attempts = part.attempts
        if missing:
            error = f"stage {part.name!r} needs {', '.join(map(repr, missing))} to have completed"
            if not part.required:
                stages[part.name] = ("skipped", 0, error, None)
                continue
            error, attempts = f"StageError: {error}", 1
        elif part.wanted is False:
            stages[part.name] = ("skipped", 0, None, None)
            continue
        elif part.fails < part.attempts:
            log.append(f"{part.name} in attempt {part.fails + 1}")
            result = None if part.form == "replaces" else part.result
            stages[part.name] = ("completed", part.fails + 1, None, result)
            completed.append(part)
            continue
        else:
            kind = "StageTimeout" if part.unknown == part.attempts else "ValueError"
            error = f"{kind}: {part.name} broke in attempt {part.attempts}"
        stages[part.name] = ("failed", attempts, error, None)
        if part.required:
            for later in saga.parts[len(stages) :]:
                stages[later.name] = ("pending", 0, None, None)
            if saga.on_failure == "park":
                return Ending("parked", part.name, error, {"log": log}, listed(stages), [])
            # It undoes an effect that any of its attempts may have had.
            first = [part] if not missing and 0 < part.unknown <= attempts and part.uncertain else []
            return undo([*completed, *first], stages, log, part.name, error)
    return Ending("completed", None, None, {"log": log}, listed(stages), [])


def undo(completed: list[Part], stages: dict[str, Any], log: list[str], failed: str, error: str) -> Ending:
    """The last completed stage is undone first; one that cannot be undone does not stop the others."""
    compensations: list[tuple[str, str, str | None]] = []
    for part in reversed([part for part in completed if part.undone]):
        if part.undo_fails < part.undo_attempts:
            log.append(f"undid {part.name} with {stages[part.name][3]} after {error}")
            if part.name != failed:
                stages[part.name] = ("compensated", *stages[part.name][1:])
            compensations.append((part.name, "completed", None))
        else:
            compensations.append((part.name, "failed", f"KeyError: 'no {part.name}'"))
    status = "failed"
    if compensations:
        undone = all(one[1] == "completed" for one in compensations)
        status = "compensated" if undone else "compensation_failed"
    return Ending(status, failed, error, {"log": log}, listed(stages), compensations)


def heal(ending: Ending) -> Ending:
    """How a saga whose compensations failed ends, if it is retried and they succeed."""
    context = {"log": [*ending.context["log"]], "healed": True}
    stages = {name: tuple(facts) for name, *facts in ending.stages}
    done = [one for one in ending.compensations if one[1] == "completed"]
    for name in [name for name, status, _ in ending.compensations if status == "failed"]:
        context["log"].append(f"undid {name} with {stages[name][3]} after {ending.error}")
        done.append((name, "completed", None))
        if name != ending.failed_stage:
            stages[name] = ("compensated", *stages[name][1:])
    listed_stages: Any = [(name, *facts) for name, facts in stages.items()]
    return Ending("compensated", ending.failed_stage, ending.error, context, listed_stages, done)


def listed(stages: dict[str, tuple[str, int, str | None, Any]]) -> list[tuple[str, str, int, str | None, Any]]:
    """As results list them."""
    return [(name, *facts) for name, facts in stages.items()]


# the same saga as code


def build(saga: Saga, name: str = "saga") -> Workflow[dict[str, Any]]:
    """The saga as a workflow."""
    workflow = Workflow(name, on_failure=saga.on_failure)
    for part in saga.parts:
        workflow.add_stage(
            make_handler(part),
            id=part.name,
            required=part.required,
            after=part.after,
            when=None if part.wanted is None else make_predicate(part.wanted),
            retry=Retry.fixed(part.attempts, 0) if part.attempts > 1 else None,
            compensation=make_compensation(part) if part.undone else None,
        )
    return workflow


def make_predicate(wanted: bool) -> Callable[[Any], bool]:
    return lambda context: wanted


def make_handler(part: Part) -> Any:
    def handle(context: dict[str, Any], ctx: Any) -> Any:
        context["log"].append(f"{part.name} in attempt {ctx.attempt}")
        if ctx.attempt <= part.fails:
            context["left behind"] = ctx.attempt
            raise (StageTimeout if ctx.attempt == part.unknown else ValueError)(
                f"{part.name} broke in attempt {ctx.attempt}"
            )
        if part.form == "replaces":
            return Replace({"log": list(context["log"])})
        return part.result

    async def handle_later(context: dict[str, Any], ctx: Any) -> Any:
        await asyncio.sleep(0)
        return handle(context, ctx)

    class Handler:
        def execute(self, context: dict[str, Any], ctx: Any) -> Any:
            return handle(context, ctx)

    return {"async": handle_later, "object": Handler()}.get(part.form, handle)


def make_compensation(part: Part) -> Compensation:
    def compensate(context: dict[str, Any], ctx: Any) -> None:
        context["log"].append(f"undid {part.name} with {ctx.results.get(part.name)} after {ctx.error}")
        if ctx.attempt <= part.undo_fails and not context.get("healed"):
            raise KeyError(f"no {part.name}")

    retry = Retry.fixed(part.undo_attempts, 0) if part.undo_attempts > 1 else None
    return Compensation(compensate, retry=retry, when_uncertain=part.uncertain)


def ending_of(result: WorkflowResult[Any]) -> Ending:
    """What can be compared of a result."""
    return Ending(
        str(result.status),
        result.failed_stage,
        result.error,
        result.context,
        [(s.stage_id, str(s.status), s.attempts, s.error, s.data) for s in result.stages],
        [(c.stage_id, str(c.status), c.error) for c in result.compensations],
    )


@settings(max_examples=400, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_saga_ends_in_this_process_as_its_description_requires(random: Random) -> None:
    saga = make_saga(random)
    assert ending_of(run(build(saga), {"log": []})) == interpret(saga)


def test_the_random_sagas_come_to_every_kind_of_end() -> None:
    ends = [interpret(make_saga(Random(seed), longest=4)) for seed in SEEDS]
    assert {end.status for end in ends} == {"completed", "failed", "compensated", "compensation_failed", "parked"}
    undone = [end for end in ends if end.compensations]
    assert any(end.compensations[0][0] == end.failed_stage for end in undone), "one with an unknown effect"


SEEDS = range(31, 46)


@pytest.mark.timeout(120)
def test_any_saga_ends_through_real_processes_as_its_description_requires(tmp_path: Path) -> None:
    sagas = [make_saga(Random(seed), longest=4) for seed in SEEDS]
    workflows = [build(saga, f"saga-{seed}") for seed, saga in enumerate(sagas)]
    with Runtime(*workflows, data_dir=tmp_path / "data", config=Config(durability="write")) as runtime:
        results = [result for workflow in workflows for result in runtime.map(workflow, [{"log": []}])]
        failed = [result for result in results if str(result.status) == "compensation_failed"]
        healed = [
            runtime.instance(result.instance_id).retry({**result.context, "healed": True}).result(timeout=60)
            for result in failed
        ]
    assert [ending_of(result) for result in results] == [interpret(saga) for saga in sagas]
    assert [ending_of(result) for result in healed] == [heal(ending_of(result)) for result in failed]
    assert failed, "some are retried"
