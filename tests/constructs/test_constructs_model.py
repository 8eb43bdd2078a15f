"""Random workflows of every construct against a plain interpreter of their meaning.

They run in this process, over the in-memory broker, and through real processes.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from constructs_fixtures import noted
from constructs_interpreter import Meaning, compare
from constructs_plans import Choice, Each, Maker, Part, Pause, Plan, Together, Wait, build, signals_of
from memory_cluster import MemoryCluster

from stageflow_actors import Config, Instance, InstanceNotFound, Runtime
from stageflow_actors.testing import run


def test_any_workflow_ends_in_this_process_as_its_description_requires() -> None:
    for seed in range(600):
        plan = Maker(Random(seed)).plan(longest=6)
        try:
            result = run(build(plan, "w"), {}, signals=signals_of(plan))
            compare(plan, result, noted(result.instance_id, "put back"))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {plan}") from error


@pytest.mark.parametrize("first", range(1000, 1400, 50))
def test_any_workflow_ends_over_the_in_memory_broker_as_its_description_requires(first: int) -> None:
    seeds = range(first, first + 50)
    made = {f"w{seed}": Maker(Random(seed)).plan(longest=6) for seed in seeds}
    workflows = {name: build(plan, name) for name, plan in made.items()}
    with MemoryCluster(workflows.values()) as client:
        for name, plan in made.items():
            instance = client.submit(workflows[name], {}, instance_id=name)
            give_signals(instance, plan)
        for name, plan in made.items():
            (result,) = client.map(workflows[name], [{}], key=lambda context, id=name: id)
            try:
                compare(plan, result, noted(name, "put back"))
            except AssertionError as error:
                raise AssertionError(f"{name}: {plan}") from error


def give_signals(instance: Instance[Any], plan: Plan) -> None:
    """All that the plan waits for, unless it has come to a bad end before that."""
    with suppress(InstanceNotFound):
        for name, payload in signals_of(plan):
            instance.signal(name, payload)


SEEDS = range(34, 54)


def plans() -> list[Plan]:
    return [Maker(Random(seed)).plan(longest=3) for seed in SEEDS]


def test_the_random_workflows_use_every_construct_and_come_to_every_kind_of_end() -> None:
    ends = {Meaning(plan).status for plan in plans()}
    assert ends == {"completed", "failed", "compensated", "compensation_failed", "parked"}
    kinds = {type(place) for plan in plans() for place in plan.places}
    assert kinds == {Part, Together, Choice, Each, Pause, Wait}


@pytest.mark.timeout(120)
def test_any_workflow_ends_through_real_processes_as_its_description_requires(tmp_path: Path) -> None:
    made = plans()
    workflows = [build(plan, f"w{seed}") for seed, plan in zip(SEEDS, made, strict=True)]
    with Runtime(*workflows, data_dir=tmp_path / "data", config=Config(durability="write")) as runtime:
        for plan, workflow in zip(made, workflows, strict=True):
            instance = runtime.submit(workflow, {}, instance_id=workflow.id)
            give_signals(instance, plan)
        for plan, workflow in zip(made, workflows, strict=True):
            (result,) = runtime.map(workflow, [{}], key=lambda context, id=workflow.id: id)
            compare(plan, result, noted(result.instance_id, "put back"))
