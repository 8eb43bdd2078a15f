"""`stageflow queue` on directories at rest."""

import csv
import io
import json
from typing import Any

import pytest
from programs import Stageflow


def rows(stageflow: Stageflow, *arguments: object) -> Any:
    code, out, err = stageflow(*arguments, "--output", "json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_list_shows_what_waits_in_each_queue(stageflow: Stageflow, filled: Any) -> None:
    filled.start("i1", {"n": 1})
    filled.start("i2", {"n": 2})
    filled.start("i3", {"n": 3}, stage="pay", queue="stageflow.orders.stage1")
    data = filled.close()
    found = {row["name"]: row["ready"] for row in rows(stageflow, "queue", "list", "--data", data)}
    assert found == {"stageflow.orders.stage0": 2, "stageflow.orders.stage1": 1}
    only = rows(stageflow, "queue", "list", "--data", data, "--prefix", "stageflow.orders.stage1")
    assert [row["name"] for row in only] == ["stageflow.orders.stage1"]


def test_a_table_and_csv_show_the_same(stageflow: Stageflow, filled: Any) -> None:
    filled.start("i1", {"n": 1})
    data = filled.close()
    code, out, _ = stageflow("queue", "list", "--data", data)
    assert code == 0
    assert out.splitlines()[0].split()[:3] == ["name", "ready", "leased"]
    assert out.splitlines()[2].split()[:3] == ["stageflow.orders.stage0", "1", "0"]
    code, out, _ = stageflow("queue", "list", "--data", data, "--output", "csv")
    assert next(csv.DictReader(io.StringIO(out)))["ready"] == "1"


def test_looking_leaves_a_directory_at_rest_as_it_was(stageflow: Stageflow, filled: Any) -> None:
    filled.start("i1", {"n": 1})
    data = filled.close()

    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in data.rglob("*") if path.is_file()}

    before = contents()
    for look in (("queue", "list"), ("instances", "list"), ("dlq", "list"), ("journal", "verify"), ("stats",)):
        assert stageflow(*look, "--data", data)[0] == 0
    assert contents() == before


def test_peek_shows_messages_with_their_contexts_and_takes_none(stageflow: Stageflow, filled: Any) -> None:
    for number in range(3):
        filled.start(f"i{number}", {"n": number})
    data = filled.close()
    for _ in range(2):
        found = rows(stageflow, "queue", "peek", "stageflow.orders.stage0", "--data", data, "--limit", "2")
        assert [(row["instance"], row["context"]) for row in found] == [("i0", {"n": 0}), ("i1", {"n": 1})]


def test_a_paused_queue_stays_paused_until_it_is_resumed(stageflow: Stageflow, filled: Any) -> None:
    filled.start("i1", {"n": 1})
    data = filled.close()
    name = "stageflow.orders.stage0"
    assert stageflow("queue", "pause", name, "--data", data)[0] == 0
    assert rows(stageflow, "queue", "list", "--data", data)[0]["state"] == "paused"
    assert stageflow("queue", "resume", name, "--data", data)[0] == 0
    assert rows(stageflow, "queue", "list", "--data", data)[0]["state"] == "open"
    assert rows(stageflow, "queue", "list", "--data", data)[0]["breaker"] == ""
    assert not (data / "cluster.json").exists()


def test_purge_asks_first_and_then_throws_away(stageflow: Stageflow, filled: Any) -> None:
    filled.start("i1", {"n": 1})
    data = filled.close()
    purge = ("queue", "purge", "stageflow.orders.stage0", "--data", data)
    code, _, err = stageflow(*purge)
    assert (code, err.count("\n")) == (2, 1)
    assert "--yes" in err
    assert rows(stageflow, "queue", "list", "--data", data)[0]["ready"] == 1
    code, _, err = stageflow(*purge, "--yes")
    assert (code, err) == (0, "1 message of 1 instance deleted\n")
    assert rows(stageflow, "queue", "list", "--data", data)[0]["ready"] == 0


def test_watch_refreshes_as_often_as_its_option_asks(stageflow: Stageflow, filled: Any) -> None:
    filled.start("i1", {"n": 1})
    data = filled.close()
    code, out, _ = stageflow("queue", "watch", "--data", data, "--interval", "0.1", "--count", "2")
    assert code == 0
    assert out.count("stageflow.orders.stage0") == 2


@pytest.mark.parametrize("verb", ["pause", "resume", "peek", "stats"])
def test_a_queue_that_is_not_there_is_one_line(stageflow: Stageflow, filled: Any, verb: str) -> None:
    filled.start("i1", {"n": 1})
    code, out, err = stageflow("queue", verb, "nope", "--data", filled.close())
    assert (code, out) == (1, "")
    assert "'nope'" in err
    assert err.count("\n") == 1


def test_stats_of_a_cluster_at_rest(stageflow: Stageflow, filled: Any) -> None:
    filled.start("i1", {"n": 1})
    data = filled.close()
    figures = rows(stageflow, "stats", "--data", data)
    assert (figures["running"], figures["instances"], figures["ready"]) == (False, 1, 1)
    assert "1 instance" in stageflow("stats", "--data", data)[1]
