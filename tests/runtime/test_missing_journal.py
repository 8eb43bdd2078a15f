"""A data directory that lost its journal is refused: it held live instances."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from stageflow_actors import Config, Runtime, Workflow
from stageflow_actors.history import JournalMissing

waits = Workflow("waits").add_signal("go")


def test_a_history_whose_journal_is_gone_is_refused(tmp_path: Path) -> None:
    with Runtime(waits, data_dir=tmp_path) as runtime:
        runtime.submit(waits, {}, instance_id="A")
    shutil.move(tmp_path / "journal", tmp_path / "aside")
    with pytest.raises(JournalMissing, match="is missing or replaced"), Runtime(waits, data_dir=tmp_path):
        pass
    assert not (tmp_path / "journal").exists()  # the refused start has made none
    shutil.move(tmp_path / "aside", tmp_path / "journal")
    with Runtime(waits, data_dir=tmp_path) as runtime:
        assert runtime.instance("A").status() == "waiting"


def test_a_directory_that_has_never_had_a_journal_may_get_one(tmp_path: Path) -> None:
    with Runtime(waits, data_dir=tmp_path, config=Config(durability="memory")):
        pass
    for _ in range(2):
        with Runtime(waits, data_dir=tmp_path):
            pass
