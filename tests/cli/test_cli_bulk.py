"""Instances and dead letters in bulk: selected by workflow, status and error, confirmed, counted, refused by reason."""

from __future__ import annotations

import _thread
import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from effect_log import note, noted
from programs import Stageflow

from stageflow_actors import Config, Retry, Runtime, Workflow
from stageflow_actors.cli.bulk import Bulk
from stageflow_actors.cli.main import main
from stageflow_actors.core.envelope import Failure
from stageflow_actors.errors import StageFlowError

PAY = "stageflow.orders.stage1"


class Terminal(io.StringIO):
    """A person who answers."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def parked(filled: Any) -> Path:
    """Three instances parked at `pay`, two by one error; a fourth waits behind them."""
    for name in ("i1", "i2", "i3", "i4"):
        filled.start(name, {"name": name}, stage="pay", queue=PAY)
    for error in ("OSError: connection refused", "KeyError: 'card'", "OSError: connection refused"):
        filled.settle_next(PAY, parked=Failure("exception", error, error.partition(":")[0]))
    return Path(filled.close())


def parked_ones(stageflow: Stageflow, data: Path) -> list[str]:
    code, out, _ = stageflow("instances", "list", "--status", "parked", "--data", data, "--output", "json")
    assert code == 0
    return sorted(row["instance_id"] for row in json.loads(out))


def test_a_dry_run_lists_what_is_selected_and_changes_nothing(stageflow: Stageflow, parked: Path) -> None:
    code, out, err = stageflow("instances", "retry", "--error", "refused", "--dry-run", "--data", parked)
    assert (code, err) == (0, "would retry 2 instances (orders: 2 parked)\n")
    assert ("i1" in out, "i2" in out, "i3" in out, "connection refused" in out) == (True, False, True, True)
    code, out, err = stageflow("dlq", "requeue", "--workflow", "orders", "--dry-run", "--data", parked)
    assert (code, err) == (0, "would requeue 3 dead letters (orders: 3)\n")
    assert parked_ones(stageflow, parked) == ["i1", "i2", "i3"]


def test_exactly_the_selected_instances_are_retried(stageflow: Stageflow, parked: Path) -> None:
    arguments = ("instances", "retry", "--workflow", "orders", "--status", "parked", "--error", "refused", "--yes")
    code, out, err = stageflow(*arguments, "--data", parked)
    assert (code, out, err) == (0, "", "2 retried; no cluster runs here: they go on at the next start\n")
    assert parked_ones(stageflow, parked) == ["i2"]
    assert stageflow(*arguments, "--data", parked) == (0, "", "no instance to retry\n")


def test_several_ids_are_acted_on_without_a_question_and_each_refusal_has_its_reason(
    stageflow: Stageflow, parked: Path
) -> None:
    code, out, err = stageflow("instances", "retry", "i1", "nope", "i4", "i3", "--data", parked)
    assert (code, out) == (1, "")
    assert err.splitlines()[0] == "2 retried, 2 refused; no cluster runs here: they go on at the next start"
    assert err.splitlines()[1].startswith("  nope: ")
    assert err.splitlines()[2].startswith("  i4: instance 'i4' is running")
    assert parked_ones(stageflow, parked) == ["i2"]


def test_cancels_at_rest_take_effect_at_the_next_start(stageflow: Stageflow, parked: Path) -> None:
    code, _, err = stageflow("instances", "cancel", "--workflow", "orders", "--yes", "--data", parked)
    assert (code, err) == (0, "4 to be cancelled at the next start\n")


@pytest.mark.parametrize("answer", ["n", "y"])
def test_a_person_is_asked_with_numbers(
    stageflow: Stageflow, parked: Path, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command, question in (
        (("instances", "retry", "--error", "refused"), "retry 2 instances (orders: 2 parked)? [y/N]"),
        (("dlq", "requeue", "--error", "card"), "requeue 1 dead letter (orders: 1)? [y/N]"),
    ):
        monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
        code, _, err = stageflow(*command, "--data", parked)
        assert err.startswith(question)
        assert code == (0 if answer == "y" else 130)
    assert parked_ones(stageflow, parked) == ([] if answer == "y" else ["i1", "i2", "i3"])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("instances", "retry"), 2, "--workflow"),
        (("instances", "cancel", "--workflow", "orders"), 2, "without a terminal, confirm with --yes"),
        (("instances", "restart", "--status", "failed"), 2, "without a terminal, confirm with --yes"),
        (("instances", "retry", "i1", "--workflow", "orders"), 2, "not both"),
        (("instances", "retry", "--status", "compensated", "--yes"), 2, "parked, failed or compensation_failed"),
        (("instances", "cancel", "--status", "completed", "--yes"), 2, "pending, running, waiting or parked"),
        (("instances", "retry", "--error", "x", "--wait", "--yes"), 2, "--wait needs one ID"),
        (("instances", "restart", "i1", "i2", "--json", "{}"), 2, "--json needs one ID"),
        (("instances", "cancel", "i1", "--dry-run"), 2, "--dry-run is for a selection"),
        (("instances", "retry", "--workflow", "ordres", "--yes"), 1, "did you mean 'orders'?"),
        (("instances", "cancel", "--workflow", "ordres", "--dry-run"), 1, "did you mean 'orders'?"),
        (("dlq", "requeue", "--workflow", "orders"), 2, "without a terminal, confirm with --yes"),
        (("dlq", "purge", "--error", "x"), 2, "without a terminal, confirm with --yes"),
        (("dlq", "purge", "i1", "--error", "x", "--yes"), 2, "not both"),
        (("dlq", "requeue", "--workflow", "ordres", "--yes"), 1, "did you mean 'orders'?"),
        (("dlq", "list", "--workflow", "ordres"), 1, "did you mean 'orders'?"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else None,
)
def test_mistakes_are_one_line_and_change_nothing(
    stageflow: Stageflow, parked: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    said = stageflow(*arguments, "--data", parked)
    assert (said[0], said[1], said[2].count("\n")) == (code, "", 1)
    assert words in said[2]
    assert parked_ones(stageflow, parked) == ["i1", "i2", "i3"]


def test_dead_letters_are_selected_requeued_and_deleted_by_error(stageflow: Stageflow, parked: Path) -> None:
    code, out, _ = stageflow("dlq", "list", "--error", "card", "--data", parked, "--output", "json")
    assert (code, [row["instance"] for row in json.loads(out)]) == (0, ["i2"])
    code, _, err = stageflow("dlq", "requeue", "--error", "refused", "--workflow", "orders", "--yes", "--data", parked)
    assert (code, err) == (0, "2 requeued; they resume when a runtime starts on this directory\n")
    code, _, err = stageflow("dlq", "purge", "--queue", PAY, "--error", "card", "--yes", "--data", parked)
    assert (code, err) == (0, "1 dead letter deleted, 1 instance with them\n")
    assert stageflow("dlq", "purge", "--error", "card", "--yes", "--data", parked)[2] == "no dead letter to delete\n"
    assert parked_ones(stageflow, parked) == []


def test_letters_too_large_for_one_answer_are_all_found(stageflow: Stageflow, filled: Any) -> None:
    large = "x" * (6 << 20)
    for number in range(4):
        filled.start(f"i{number}", {"n": number, "large": large}, stage="pay", queue=PAY)
        filled.settle_next(PAY, parked=Failure("exception", "ValueError: no", "ValueError"))
    data = filled.close()
    code, out, _ = stageflow("dlq", "list", "--data", data, "--output", "csv")
    assert (code, len(out.splitlines())) == (0, 5)
    assert stageflow("dlq", "requeue", "--error", "no", "--yes", "--data", data)[2].startswith("4 requeued")


# how it is done


def test_the_first_refusals_are_told_and_the_rest_is_counted(capfd: pytest.CaptureFixture[str]) -> None:
    def act(number: int) -> str:
        if number % 2:
            raise StageFlowError(f"number {number}\nis odd")
        return "done"

    bulk = Bulk("done")
    bulk.run(range(1_000), act, str)
    bulk.report()
    assert (bulk.outcomes, len(bulk.refusals)) == ({"done": 500}, 500)
    lines = capfd.readouterr().err.splitlines()[-7:]
    assert lines[0] == "500 done, 500 refused"
    assert lines[1:6] == [f"  {number}: number {number} is odd" for number in (1, 3, 5, 7, 9)]
    assert lines[6] == "  and 495 more"


def test_ctrl_c_finishes_what_was_begun_and_counts_the_rest(capfd: pytest.CaptureFixture[str]) -> None:
    begun: list[int] = []
    ended: list[int] = []
    struck = threading.Event()

    def act(number: int) -> str:
        begun.append(number)
        if number == 205:
            _thread.interrupt_main()
            struck.set()
        elif number >= 200:
            assert struck.wait(30)
        ended.append(number)
        return "done"

    bulk = Bulk("done")
    with pytest.raises(KeyboardInterrupt):
        bulk.run(range(2_000), act, str)
        struck.wait(30)
    assert sorted(begun) == sorted(ended)
    assert bulk.done == len(ended) < 2_000
    said = f"interrupted: {len(ended)} done, {2_000 - len(ended):,} not begun; the same command goes on with them"
    assert said in capfd.readouterr().err


# a cluster


def first(context: dict[str, Any]) -> None:
    note("first", context["n"])


def second(context: dict[str, Any]) -> None:
    if not Path(context["open"]).exists():
        raise ConnectionError(f"gate {context['n'] % 2} is shut")


@pytest.mark.timeout(120)
def test_instances_of_a_running_cluster_are_cancelled_retried_and_restarted_in_bulk(
    stageflow: Stageflow, tmp_path: Path, eventually: Any
) -> None:
    data, gate = tmp_path / "data", tmp_path / "open"
    failing = Workflow("failing").add_stage(first).add_stage(second, retry=Retry.fixed(2, 0))
    undone = Workflow("undone").add_stage(first, compensation=lambda context: None).add_stage(second)
    waiting = Workflow("waiting").add_signal("word")
    contexts = [{"n": number, "open": str(gate)} for number in range(20)]
    with Runtime(failing, undone, waiting, data_dir=data, config=Config(durability="write")) as runtime:
        for workflow in (failing, undone):
            ids = [f"{workflow.id}-{number}" for number in range(20)]
            for instance in runtime.submit_many(workflow, contexts, instance_ids=ids):
                instance.result(timeout=30)
        runtime.submit_many(waiting, [{}] * 5)
        eventually(lambda: len(runtime.instances(status="waiting")) == 5, "five wait")
        gate.touch()

        def steer(*arguments: str) -> tuple[int, str]:
            code, _, err = stageflow("instances", *arguments, "--data", data, "--yes")
            return code, err

        assert steer("cancel", "--status", "waiting") == (0, "5 cancelled\n")
        assert steer("retry", "--workflow", "failing", "--error", "gate 1") == (0, "10 retried\n")
        assert steer("retry", "--workflow", "failing") == (0, "10 retried\n")
        assert steer("restart", "--workflow", "undone") == (0, "20 restarted\n")
        for number in range(20):
            assert runtime.instance(f"failing-{number}").result(timeout=30).success
            assert runtime.instance(f"undone-{number}").result(timeout=30).success
        # A retry goes on at the second stage, a restart begins at the first.
        assert [len([one for one in noted("first") if one == (str(number),)]) for number in range(20)] == [3] * 20
        assert steer("restart", "--workflow", "failing") == (0, "no instance to restart\n")
    assert main(["instances", "list", "--workflow", "waiting", "--data", str(data), "--output", "json"]) == 0
