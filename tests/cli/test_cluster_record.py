"""A cluster record that no runtime wrote, or with a dead address: one line of error, and no endless wait."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from programs import Stageflow


@pytest.mark.parametrize(
    "arguments", [("instances", "list"), ("queue", "pause", "stageflow.orders.stage0"), ("instances", "cancel", "i1")]
)
def test_a_socket_in_a_deep_directory_that_is_missing_is_one_line(
    stageflow: Stageflow, filled: Any, arguments: tuple[str, ...]
) -> None:
    filled.start("i1", {})
    data: Path = filled.close()
    deep = data / ("d" * 120)
    (data / "cluster.json").write_text(json.dumps({"program": os.getpid(), "address": f"ipc://{deep}/broker"}))
    code, out, err = stageflow(*arguments, "--data", data)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "cannot be reached" in err


def test_a_record_with_a_nul_in_its_address_is_none(stageflow: Stageflow, filled: Any) -> None:
    filled.start("i1", {})
    data: Path = filled.close()
    (data / "cluster.json").write_text(json.dumps({"program": os.getpid(), "address": "ipc:///run/a\0b/broker"}))
    code, out, _ = stageflow("instances", "list", "--data", data, "--output", "json")
    assert code == 0
    assert [row["instance_id"] for row in json.loads(out)] == ["i1"]


@pytest.mark.parametrize(
    "command",
    [("queue", "list"), ("journal", "verify"), ("queue", "pause", "q"), ("journal", "compact")],
    ids=" ".join,
)
def test_a_directory_in_place_of_a_segment_is_named(
    stageflow: Stageflow, tmp_path: Path, command: tuple[str, ...]
) -> None:
    segment = tmp_path / "journal" / "0000000000000001.journal"
    segment.mkdir(parents=True)
    code, out, err = stageflow(*command, "--data", tmp_path)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert str(segment) in err
    assert "Is a directory" in err


def test_the_doctor_names_it_too(stageflow: Stageflow, tmp_path: Path) -> None:
    segment = tmp_path / "journal" / "0000000000000001.journal"
    segment.mkdir(parents=True)
    code, out, err = stageflow("doctor", "--data", tmp_path, "--output", "json")
    assert code == 1
    assert str(segment) in out + err
