"""`stageflow journal`: verification and contents."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from programs import Stageflow

from stageflow_actors.history import HistoryWriter
from stageflow_brokers.api import Target

SECTOR_BYTES = 512


@pytest.fixture
def data(filled: Any) -> Path:
    """Two instances, one of them a stage further."""
    filled.start("i1", {"n": 1})
    filled.start("i2", {"n": 2})
    filled.settle_next("stageflow.orders.stage0", to=Target("stageflow.compensation.orders", "compensate:reserve"))
    filled.settle_next("stageflow.compensation.orders")
    return Path(filled.close())


def segment_of(data: Path) -> Path:
    return next((data / "journal").glob("*.journal"))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_sound_journal_is_ok(stageflow: Stageflow, data: Path) -> None:
    assert stageflow("journal", "verify", "--data", data) == (0, f"ok: 1 segment in {data}/journal\n", "")
    assert stageflow("journal", "verify", "--data", data, "--output", "json") == (0, "[]\n", "")


def test_damage_is_named_by_file_and_offset(stageflow: Stageflow, data: Path) -> None:
    flip(segment_of(data), 2 * SECTOR_BYTES + 50)
    code, out, err = stageflow("journal", "verify", "--data", data)
    assert (code, out) == (1, "")
    assert f"{segment_of(data).name} at offset {2 * SECTOR_BYTES}: damaged" in err
    code, out, _ = stageflow("journal", "verify", "--data", data, "--output", "json")
    assert code == 1
    assert [(found["offset"], found["kind"]) for found in json.loads(out)] == [(2 * SECTOR_BYTES, "damage")]


def test_every_command_refuses_a_damaged_journal_in_one_line(stageflow: Stageflow, data: Path) -> None:
    flip(segment_of(data), 2 * SECTOR_BYTES + 50)
    for command in (["queue", "list"], ["dlq", "requeue", "--all"], ["journal", "stats"], ["instances", "show", "i1"]):
        code, out, err = stageflow(*command, "--data", data)
        assert (code, out, err.count("\n")) == (1, "", 1), command
        assert segment_of(data).name in err
        assert str(2 * SECTOR_BYTES) in err


def test_a_torn_end_is_no_damage(stageflow: Stageflow, data: Path) -> None:
    path = segment_of(data)
    content = path.read_bytes()
    last = content.rindex(b"\xd3\xf7\xb1\xff")
    flip(path, last + 45)
    code, out, err = stageflow("journal", "verify", "--data", data)
    assert (code, err) == (0, "")
    assert f"offset {last}: torn end" in out
    assert "ok" in out


def test_stats_count_accepted_settlements(stageflow: Stageflow, data: Path) -> None:
    code, out, _ = stageflow("journal", "stats", "--data", data, "--output", "json")
    stats = json.loads(out)
    assert code == 0
    assert stats["settlements"] == [{"instance": "i1", "epoch": 1, "stage": "reserve", "count": 1}]
    assert stats["compensations"] == [{"instance": "i1", "epoch": 1, "stage": "reserve", "count": 1}]
    assert stats["live_instances"] == 1
    assert stats["segments"][0]["file"] == segment_of(data).name
    assert stats["batches"] == sum(segment["batches"] for segment in stats["segments"])
    code, out, _ = stageflow("journal", "stats", "--data", data)
    assert code == 0
    assert "accepted twice  none" in out


def test_repair_asks_then_keeps_what_comes_before_the_damage(stageflow: Stageflow, data: Path) -> None:
    assert stageflow("journal", "repair", "--data", data)[1] == "no damage found; nothing was changed\n"
    flip(segment_of(data), 2 * SECTOR_BYTES + 50)
    before = segment_of(data).read_bytes()
    code, _, err = stageflow("journal", "repair", "--data", data)
    assert (code, err.count("\n"), segment_of(data).read_bytes()) == (2, 1, before)
    code, out, _ = stageflow("journal", "repair", "--data", data, "--yes")
    assert code == 0
    assert f"offset {2 * SECTOR_BYTES}" in out
    assert stageflow("journal", "verify", "--data", data)[0] == 0
    assert any(path.read_bytes() == before for path in (data / "journal").rglob("*") if path.is_file())


def test_repair_names_what_it_gives_up_and_lists_it_beside_the_copies(stageflow: Stageflow, data: Path) -> None:
    content = segment_of(data).read_bytes()
    begin = content.index(b"i1") // SECTOR_BYTES * SECTOR_BYTES
    flip(segment_of(data), begin + 50)
    damaged = segment_of(data).read_bytes()
    code, out, _ = stageflow("journal", "repair", "--data", data, "--yes")
    assert code == 0
    where, damaged_batch, given_up, listed = out.splitlines()
    assert f"{segment_of(data).name} at offset {begin}: the checksum of batch" in where
    assert given_up.startswith("discarded: ")
    assert given_up.endswith("of 2 instances: i2, i1"), "the start of i1 is in the damage, its settlements behind it"
    assert f"{segment_of(data).name} at offset {begin}, " in damaged_batch
    assert " bytes, 1 record: the checksum" in damaged_batch
    copies = data / "journal" / "repair"
    assert str(copies / "given-up.txt") in listed
    place, *ids = (copies / "given-up.txt").read_text().splitlines()
    assert (place[0], damaged_batch.endswith(place[1:]), ids) == ("#", True, ["i2", "i1"])
    assert (copies / segment_of(data).name).read_bytes() == damaged
    code, out, _ = stageflow("instances", "list", "--data", data, "--output", "json")
    assert (code, json.loads(out)) == (0, [])


def test_repair_names_what_may_have_been_in_the_damaged_batch_itself(stageflow: Stageflow, data: Path) -> None:
    begin = segment_of(data).read_bytes().index(b"i2") // SECTOR_BYTES * SECTOR_BYTES
    flip(segment_of(data), begin + 41)
    _, out, _ = stageflow("journal", "repair", "--data", data, "--yes")
    assert "possibly in the damaged bytes, as far as they can be read: 1 instance: i2\n" in out
    *_, heading, perhaps = (data / "journal" / "repair" / "given-up.txt").read_text().splitlines()
    assert (heading[0], perhaps) == ("#", "i2")


@pytest.mark.parametrize("size", [0, 10])
def test_repair_reports_that_the_only_segment_is_given_up_and_what_to_do_next(
    stageflow: Stageflow, data: Path, size: int
) -> None:
    os.truncate(segment_of(data), size)
    shutil.copytree(data, data.with_name("other"))
    code, out, err = stageflow("journal", "repair", "--data", data, "--yes")
    assert f"0000000000000001.journal: the whole file, {size} bytes" in out
    assert "cannot be determined" in out
    assert (code, err, out.splitlines()[-1].split(":")[0]) == (
        0,
        "",
        "the journal is empty and there is no history",
    )
    data = data.with_name("other")
    HistoryWriter.open(data / "history.db", create=True).close()
    code, _, err = stageflow("journal", "repair", "--data", data, "--yes")
    assert (code, err.count("\n")) == (1, 1)
    assert "Restore journal and history from one backup" in err
    assert "--fresh" in err


def test_a_missing_journal_beside_a_history_is_reported(stageflow: Stageflow, data: Path) -> None:
    shutil.rmtree(data / "journal")
    assert "no cluster has run in it yet" in stageflow("journal", "verify", "--data", data)[2]
    HistoryWriter.open(data / "history.db", create=True).close()
    for command in ("verify", "stats", "repair"):
        code, _, err = stageflow("journal", command, "--data", data)
        assert code == 1
        assert "nothing has run" not in err
        assert "is missing, but the history" in err


def test_repair_of_a_torn_end_gives_up_nothing_whole(stageflow: Stageflow, data: Path) -> None:
    flip(segment_of(data), segment_of(data).read_bytes().rindex(b"\xd3\xf7\xb1\xff") + 45)
    code, out, _ = stageflow("journal", "repair", "--data", data, "--yes")
    assert code == 0
    assert "discarded (a torn end): " in out
    assert "no whole batch was discarded\n" in out
    assert stageflow("journal", "verify", "--data", data)[0] == 0


def test_compact_gives_the_open_segment_back_too_and_keeps_what_is_alive(stageflow: Stageflow, data: Path) -> None:
    def stats() -> Any:
        return json.loads(stageflow("journal", "stats", "--data", data, "--output", "json")[1])

    before = stats()
    assert [segment["file"] for segment in before["segments"]] == ["0000000000000001.journal"]
    code, out, err = stageflow("journal", "compact", "--data", data)
    assert (code, out) == (0, "")
    assert err.startswith(("1 segments, ", "1 segment, "))
    after = stats()
    assert [segment["file"] for segment in after["segments"]] == ["0000000000000002.journal"]
    assert after["settlements"] == [], "what had ended is gone"
    assert (after["live_messages"], after["live_instances"]) == (before["live_messages"], before["live_instances"])
    assert stageflow("journal", "verify", "--data", data)[0] == 0
