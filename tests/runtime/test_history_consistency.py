"""Journal and history of different age: an instance that finished in one is never run again by the other."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import Runtime, StageContext, Workflow
from stageflow_actors.diagnostics.doctor import run_checks
from stageflow_actors.history import HistoryOutdated
from stageflow_actors.runtime.system.data_dir import DataDir

IDS = [f"i{number}" for number in range(30)]


def work(context: dict[str, Any], ctx: StageContext) -> None:
    with Path(context["log"]).open("a") as log:
        log.write(f"{ctx.instance_id}\n")


flow = Workflow("flow").add_signal("go").add_stage(work, id="work")


class Days:
    """A data directory of which copies are kept: in the first all instances wait, in the second all have finished."""

    def __init__(self, path: Path) -> None:
        self.data = path / "data"
        self.log = path / "log"
        contexts = [{"log": str(self.log)} for _ in IDS]
        with Runtime(flow, data_dir=self.data) as runtime:
            runtime.submit_many(flow, contexts, instance_ids=IDS)
        self.first = Path(shutil.copytree(self.data, path / "first"))
        with Runtime(flow, data_dir=self.data) as runtime:
            for id in IDS:
                runtime.instance(id).signal("go")
            assert all(runtime.instance(id).result(timeout=20).success for id in IDS)
        self.second = Path(shutil.copytree(self.data, path / "second"))
        assert self.runs() == dict.fromkeys(IDS, 1)

    def restore(self, journal: Path, history: Path) -> None:
        shutil.rmtree(self.data / "journal")
        shutil.copytree(journal / "journal", self.data / "journal")
        for file in self.data.glob("history.db*"):
            file.unlink()
        for file in history.glob("history.db*"):
            shutil.copy(file, self.data / file.name)

    def runs(self) -> dict[str, int]:
        return dict(Counter(self.log.read_text().split()))


@pytest.fixture
def days(tmp_path: Path) -> Days:
    return Days(tmp_path)


def test_a_history_older_than_the_journal_is_refused(days: Days) -> None:
    days.restore(journal=days.second, history=days.first)
    for _ in range(2):
        with pytest.raises(HistoryOutdated, match="the last 30 rows"), Runtime(flow, data_dir=days.data):
            pass
    days.restore(journal=days.second, history=days.second)
    with Runtime(flow, data_dir=days.data) as runtime:
        assert runtime.instance("i7").result(timeout=0).success


def test_of_a_journal_older_than_the_history_what_has_finished_is_forgotten(
    days: Days, capfd: pytest.CaptureFixture[str]
) -> None:
    days.restore(journal=days.first, history=days.second)
    with Runtime(flow, data_dir=days.data) as runtime:
        assert runtime.instance("i7").result(timeout=5).success
        runtime.submit(flow, {"log": str(days.log)}, instance_id="i7")
        assert runtime.instances(status="waiting") == []
    assert "30 instances that are live in the journal have finished in the history" in capfd.readouterr().err
    assert days.runs() == dict.fromkeys(IDS, 1)
    assert run_checks(DataDir(days.data)).is_sound
    with Runtime(flow, data_dir=days.data):
        pass
    assert "finished in the history" not in capfd.readouterr().err


def test_an_instance_that_was_restarted_is_not_a_finished_one(days: Days) -> None:
    with Runtime(flow, data_dir=days.data) as runtime:
        runtime.instance("i7").restart()
    restarted = Path(shutil.copytree(days.data, days.data.with_name("restarted")))
    days.restore(journal=restarted, history=days.second)
    with Runtime(flow, data_dir=days.data) as runtime:
        assert runtime.instance("i7").status() == "waiting"


def test_a_history_is_whole_without_its_log_when_the_cluster_has_stopped(days: Days) -> None:
    for name in ("history.db-wal", "history.db-shm"):
        (days.data / name).unlink(missing_ok=True)
    with Runtime(flow, data_dir=days.data) as runtime:
        assert runtime.instance("i7").result(timeout=0).success
