"""Deaths at every point of a workflow of every construct, audited by independent witnesses.

The effect log shows the calls, the journal on disk the number of accepted transitions, and the history the end of each
instance.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from constructs_fixtures import note, noted, wait_for_file

from stageflow_actors import Config, Runtime, Stage, StageContext, Workflow, WorkflowResult
from stageflow_brokers.offline.settlements import count_settlements

KINDS = ("worker", "worker", "broker", "zygote", "node")


def does(name: str) -> Callable[..., Any]:
    def handle(order: dict[str, Any], ctx: StageContext) -> str:
        note(ctx.instance_id, name)
        time.sleep(order["work"])
        if name in order.get("gates", ()):
            wait_for_file(order["gate"])
        if name == "last" and order["fails"]:
            raise ValueError("no such address")
        return name

    return handle


def undoes(name: str) -> Callable[..., Any]:
    def compensate(order: dict[str, Any], ctx: StageContext) -> None:
        note(ctx.instance_id, f"undo {name}")

    return compensate


def stage(name: str, **options: Any) -> Stage:
    return Stage(does(name), id=name, compensation=undoes(name), actors=2, **options)


def pick(item: int, ctx: StageContext) -> int:
    note(ctx.instance_id, f"item {item}")
    return item


def put_back(item: int, ctx: StageContext) -> None:
    note(ctx.instance_id, f"undo item {item}")


def take(order: dict[str, Any], payload: Any) -> None:
    order["signalled"] = payload


def answer(command: dict[str, Any], ctx: StageContext) -> int:
    note(ctx.instance_id, "asked")
    return int(command["n"]) + 1


def merge(base: dict[str, Any], branches: dict[str, Any]) -> dict[str, Any]:
    if base.get("merge dies") and not noted(base["id"], "merge died"):
        note(base["id"], "merge died")
        os._exit(9)
    return {**base, "joined": sorted(branches)}


everything = (
    Workflow("everything")
    .add_stage(stage("reserve"))
    .add_parallel("both", [stage("left"), stage("right")], merge=merge)
    .add_map("items", pick, over=lambda order: [1, 2, 3], into="picked", compensation=put_back, actors=2)
    .add_signal("go", on_signal=take)
    .add_delay("pause", 0.05)
    .add_remote_stage("ask", endpoint="stock", command=lambda order: {"n": order["n"]}, timeout=30)
    .add_stage(stage("last"))
)
SETTLED = {"reserve": 1, "left": 1, "right": 1, "both": 1, "items": 5, "go": 1, ":resume": 1, "ask": 2, "stock": 1}
"""How often a message of each name is settled in a run: a map splits, has three items and joins."""
UNDONE = ["undo item 3", "undo item 2", "undo item 1", {"undo left", "undo right"}, "undo reserve"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Runtime, Path]]:
    data = tmp_path_factory.mktemp("data")
    runtime = Runtime(everything, data_dir=data, config=Config(durability="write", max_stage_retries=20))
    runtime.endpoint("stock", answer, actors=2)
    runtime.start()
    yield runtime, data
    runtime.stop(grace=0.0)


def victims(runtime: Runtime, kind: str) -> list[psutil.Process]:
    """The processes of that kind, all of them below this program's own node."""
    try:
        node = psutil.Process(runtime.node_pid)
        if kind == "node":
            return [node]
        below = node.children()
        brokers = [one for one in below if any("stageflow_brokers.zeromq.process" in word for word in one.cmdline())]
        zygotes = [one for one in below if one not in brokers]
        return {"broker": brokers, "zygote": zygotes}.get(kind) or [w for z in zygotes for w in z.children()]
    except psutil.Error:
        return []  # it has ended while we were looking


def kill_one(runtime: Runtime, kind: str, chance: Random) -> bool:
    try:
        chance.choice(victims(runtime, kind)).kill()
    except (IndexError, psutil.Error):
        return False
    return True


def audit(result: WorkflowResult[Any], fails: bool) -> None:
    """The actions of one instance, by its effects and its history."""
    firsts = list(dict.fromkeys(words[0] for words in noted(result.instance_id)))
    firsts = [what for what in firsts if what != "merge died"]
    forward = [what for what in firsts if not what.startswith("undo")]
    assert (forward[0], set(forward[1:3])) == ("reserve", {"left", "right"})
    assert (set(forward[3:6]), forward[6:]) == ({"item 1", "item 2", "item 3"}, ["asked", "last"])
    back = firsts[len(forward) :]
    assert firsts == forward + back, "nothing goes forward once it is undone"
    context = result.context
    assert (context["joined"], context["picked"], context["signalled"]) == (["left", "right"], [1, 2, 3], "go")
    data = {one.stage_id: one.data for one in result.stages}
    assert data["ask"] == context["n"] + 1
    if not fails:
        assert (str(result.status), back) == ("completed", [])
        return
    assert str(result.status) == "compensated"
    assert [*back[:3], set(back[3:5]), *back[5:]] == UNDONE
    told = [one.stage_id for one in result.compensations]
    assert (told[0], set(told[1:3]), told[3:]) == ("items", {"left", "right"}, ["reserve"])


@pytest.mark.timeout(100)
def test_whatever_is_killed_each_construct_ends_once_and_each_transition_is_accepted_once(
    cluster: tuple[Runtime, Path], eventually: Any
) -> None:
    runtime, data = cluster
    chance = Random(7)
    orders = [{"n": n, "work": 0.01, "fails": n % 4 == 0} for n in range(60)]
    instances = runtime.submit_many(everything, orders)
    expected = sum(9 + 8 * order["fails"] for order in orders)
    before = len(noted())
    kinds = [KINDS[i % len(KINDS)] for i in range(10)]
    chance.shuffle(kinds)
    steps = sorted(chance.uniform(0.02, 0.9) for _ in kinds)
    signalled = 0
    for kind, step in zip(kinds, steps, strict=True):
        # Some signals come before they are awaited, some while no process is there to take them.
        while signalled < len(instances) * step:
            instances[signalled].signal("go", "go")
            signalled += 1
        eventually(lambda most=before + step * expected * 0.6: len(noted()) >= most, "the work goes on", 30)
        eventually(lambda kind=kind: kill_one(runtime, kind, chance), f"there is a {kind} to be killed")
    for instance in instances[signalled:]:
        instance.signal("go", "go")
    results = [instance.result(timeout=60) for instance in instances]
    for result, order in zip(results, orders, strict=True):
        audit(result, bool(order["fails"]))
    ids = {instance.id for instance in instances}
    listed = Counter(one.id for one in runtime.instances(limit=1000))
    assert all(listed[id] == 1 for id in ids)
    audit_journal(
        data, {result.instance_id: bool(order["fails"]) for result, order in zip(results, orders, strict=True)}
    )


def audit_journal(data: Path, fails: dict[str, bool]) -> None:
    """Each transition once, as far as the journal still has it: what it says of an instance it says whole."""
    found: dict[str, Counter[str]] = {}
    for (group, epoch, label), count in count_settlements(data / "journal").settled.items():
        if group in fails and label != ":finished":  # which follows some milliseconds behind
            assert epoch == 1
            found.setdefault(group, Counter())[label] += count
    assert found, "the journal has nothing to say"
    for id, settled in found.items():
        wanted = Counter(SETTLED)
        wanted["last"] = 1
        if fails[id]:
            wanted[":failed"] = 1
            wanted.update({f"compensate:{name}": 1 for name in ("items", "left", "right", "reserve")})
        assert settled == wanted, id


@pytest.mark.timeout(100)
@pytest.mark.parametrize("kind", ["worker", "broker", "zygote", "node"])
def test_a_join_survives_the_death_of_any_process_when_its_last_branch_arrives(
    cluster: tuple[Runtime, Path], tmp_path: Path, eventually: Any, kind: str
) -> None:
    runtime, data = cluster
    gate = tmp_path / "gate"
    order = {"work": 0, "fails": True, "gates": ["left", "right"], "gate": str(gate)}
    instances = runtime.submit_many(everything, [{"n": n, **order} for n in range(4)])
    for instance in instances:
        instance.signal("go", "go")
    eventually(lambda: sum(len(noted(one.id, "left")) + len(noted(one.id, "right")) for one in instances) == 4, "full")
    chosen = victims(runtime, kind)
    gate.touch()
    for process in chosen[:1] if kind != "worker" else chosen:
        process.send_signal(signal.SIGKILL)
    results = [instance.result(timeout=60) for instance in instances]
    for result in results:
        audit(result, True)
    audit_journal(data, {instance.id: True for instance in instances})


def test_a_join_survives_the_death_of_the_worker_that_merges(cluster: tuple[Runtime, Path]) -> None:
    runtime, _ = cluster
    order = {"id": "merger", "n": 1, "work": 0, "fails": False, "merge dies": True}
    instance = runtime.submit(everything, order, instance_id="merger")
    instance.signal("go", "go")
    audit(instance.result(timeout=30), False)
    assert len(noted("merger", "merge died")) == 1
