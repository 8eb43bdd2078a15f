"""A result lists every stage of its workflow, wherever it is read: from the end, the history, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import Config, Runtime, Stage, Workflow, WorkflowResult
from stageflow_actors.cli.main import main
from stageflow_actors.testing import run


def work(context: dict[str, Any]) -> str:
    return "done"


def fail(context: dict[str, Any]) -> None:
    raise ValueError("no stock")


def trip(on_failure: Any, version: int = 1) -> Workflow[dict[str, Any]]:
    """Fails in the second branch of `checks`; `late` is nowhere near."""
    return (
        Workflow(f"trip-{on_failure}", on_failure=on_failure, version=version)
        .add_stage(work, id="book", compensation=work)
        .add_conditional(work, id="gift", when=lambda context: False)
        .add_branch(
            "route", lambda context: "home", {"abroad": [Stage(work, id="fly")], "home": [Stage(work, id="drive")]}
        )
        .add_parallel("checks", [Stage(work, id="stock"), Stage(fail, id="pay")])
        .add_map("items", work, over=lambda context: [1])
        .add_delay("rest", 1)
        .add_signal("word")
        .add_stage(work, id="late")
    )


def listed(result: WorkflowResult[Any]) -> dict[str, str]:
    return {stage.stage_id: stage.status.value for stage in result.stages}


NOT_REACHED = dict.fromkeys(("items", "rest", "word", "late"), "pending")
UNDONE = {
    "book": "compensated",
    "gift": "skipped",
    "route": "completed",
    "fly": "skipped",
    "drive": "completed",
    "checks": "failed",
    "stock": "completed",
    "pay": "failed",
    **NOT_REACHED,
}
PARKED = {**UNDONE, "book": "completed", "checks": "running"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data directory of a cluster that has ended; its instances are those of the checks below."""
    data = tmp_path_factory.mktemp("lists") / "data"
    undone, parked = trip("compensate"), trip("park")
    short = Workflow("short").add_stage(work, id="a").add_branch("b", lambda context: "x", {"x": [], "y": [work]})
    with Runtime(undone, parked, short, data_dir=data, config=Config(durability="write")) as runtime:
        result = runtime.execute(undone, {}, instance_id="undone", timeout=30)
        assert list(listed(result).items()) == list(UNDONE.items()), "in order of definition"
        late = result.stage("late")
        assert (late.attempts, late.error, late.data, late.started_at, late.duration) == (0, None, None, 0.0, 0.0)
        assert result.stage("checks").error == "ValueError: no stock"
        assert listed(runtime.instance("undone").result(10)) == UNDONE
        (result,) = runtime.map(parked, [{"id": "parked"}], key="id")
        assert listed(result) == PARKED
        assert result.stage("pay").error == "ValueError: no stock"
        done = runtime.execute(short, {}, instance_id="short", timeout=30)
        assert listed(done) == {"a": "completed", "b": "completed", "work": "skipped"}
    return data


def test_the_history_lists_them_when_the_version_is_not_registered_any_more(data: Path) -> None:
    other = Workflow("trip-compensate", version=2).add_stage(work, id="other")
    with Runtime(other, data_dir=data, config=Config(durability="write")) as runtime:
        result = runtime.instance("undone").result(10)
        assert listed(result) == UNDONE
        assert "other" not in listed(result)


def test_the_command_line_lists_them_live_and_finished(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Runtime(trip("compensate"), trip("park"), data_dir=data, config=Config(durability="write")):
        pass  # its plans are those that the command line knows
    for name, expected in (("undone", UNDONE), ("parked", PARKED)):
        assert main(["instances", "show", name, "--data", str(data), "--output", "json"]) == 0
        stages = json.loads(capfd.readouterr().out)["stages"]
        assert {stage["stage_id"]: stage["status"] for stage in stages} == expected
    assert main(["instances", "export", "--data", str(data)]) == 0
    rows = {row["instance_id"]: row for row in map(json.loads, capfd.readouterr().out.splitlines())}
    assert {stage["stage_id"]: stage["status"] for stage in rows["undone"]["stages"]} == UNDONE
    assert [stage["stage_id"] for stage in rows["short"]["stages"]] == ["a", "b"], "its plan is not known any more"


def test_a_run_in_this_process_lists_them_alike() -> None:
    assert listed(run(trip("compensate"), {})) == UNDONE
    assert listed(run(trip("park"), {})) == PARKED


def test_a_stage_is_found_by_its_id_and_a_typing_error_is_named() -> None:
    result = run(Workflow("orders").add_stage(fail, id="pay").add_stage(work, id="ship"), {})
    assert result.stage("ship") is result.stages[1]
    with pytest.raises(KeyError, match=r"workflow 'orders' has no stage 'shpi': did you mean 'ship'\?"):
        result.stage("shpi")
    with pytest.raises(KeyError, match=r"has no stage 'refund': its stages are 'pay', 'ship'"):
        result.stage("refund")
