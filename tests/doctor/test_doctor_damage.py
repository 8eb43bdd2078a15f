"""Each damage of a data directory at rest is found and explained; the examination changes nothing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from stageflow_actors.core.plan import COORDINATOR, FINISHED, TIMEOUT, Naming
from stageflow_actors.runtime.messaging.manifest import MANIFEST_FACT, ClusterManifest, write_manifest
from stageflow_actors.runtime.system.socket_dir import runtime_path
from stageflow_brokers.api import FLAG_START
from stageflow_brokers.core import records
from stageflow_brokers.journal.format import SECTOR_BYTES

Doctor = Callable[[Path], Any]
FIRST = "stageflow.orders.stage0"
ENDPOINT = Naming().endpoint("pay")
ITEMS = "stageflow.orders.stage1.lines"
JOIN = "stageflow.orders.stage1"


def test_an_empty_directory_and_one_in_which_all_has_finished_are_sound(books: Any, doctor: Doctor) -> None:
    books.finish("A", "B")
    report = doctor(books.close())
    assert (report.code, report.findings) == (0, [])
    assert report.said["cluster"] == "at rest"
    assert report.said["checked"]["ended_in_journal"] == 2


def test_a_directory_in_which_nothing_has_run_is_reported_as_such(tmp_path: Path, doctor: Doctor) -> None:
    report = doctor(tmp_path)
    assert report.code == 0
    assert "nothing has run" in report.one("info", "journal")["what"]


SOUND: dict[str, Callable[[Any], None]] = {
    "ready": lambda b: b.publish("A"),
    "at the coordinator": lambda b: b.publish("A", COORDINATOR, ":failed"),
    "waiting for a signal": lambda b: b.publish("A", "", opens=[("signal:go", 1, COORDINATOR, 0.0)]),
    "waiting for a signal with a deadline": lambda b: b.publish("A", "", opens=[("signal:go", 1, COORDINATOR, 60.0)]),
    "an early signal": lambda b: (b.publish("A"), b.publish("A", "", arrivals=[("signal:go", "1")])),
    "a workflow's timeout": lambda b: b.publish("A", opens=[(TIMEOUT, 1, COORDINATOR, 60.0)]),
    "a workflow's timeout that is over": lambda b: (b.publish("A"), b.publish("A", COORDINATOR, TIMEOUT, flags=0)),
    "an open request": lambda b: b.publish("A", ENDPOINT, "pay", opens=[("reply:pay:1", 1, FIRST, 0.0)]),
    "a request that has been answered late": lambda b: (b.publish("A"), b.publish("A", ENDPOINT, "pay", flags=0)),
    "a fork": lambda b: (
        b.publish("A", f"{JOIN}.left", "left", opens=[("both", 2, JOIN, 0.0)]),
        b.publish("A", f"{JOIN}.right", "right", flags=0),
    ),
    "a fork with one branch over": lambda b: b.publish(
        "A", f"{JOIN}.left", "left", opens=[("both", 2, JOIN, 0.0)], arrivals=[("both", "right")]
    ),
    "a branch that asks": lambda b: b.publish(
        "A",
        ENDPOINT,
        "pay",
        opens=[("both", 2, JOIN, 0.0), ("reply:left:7", 1, f"{JOIN}.left", 9.0)],
        arrivals=[("both", "right")],
    ),
    "a map": lambda b: [
        b.publish("A", ITEMS, "lines", opens=[("lines", 3, JOIN, 0.0)], arrivals=[("lines", "0")]),
        b.publish("A", ITEMS, "lines", flags=0),
    ],
    "a map not quite split": lambda b: [
        b.publish("A", ITEMS, "lines", opens=[("lines", 9, JOIN, 0.0)], arrivals=[("lines", "0")]),
        b.publish("A", JOIN, "lines", flags=0),
    ],
    "ended, and not in the history yet": lambda b: b.publish("A", "stageflow.finished", FINISHED, terminal=True),
    "ended and in the history, and not gone yet": lambda b: (
        b.publish("A", "stageflow.finished", FINISHED, terminal=True),
        b.record("A"),
    ),
    "run again": lambda b: (b.finish("A"), b.publish("A")),
}


@pytest.mark.parametrize("state", SOUND)
def test_whatever_an_instance_waits_for_is_one_carrier(books: Any, doctor: Doctor, state: str) -> None:
    SOUND[state](books)
    if state == "run again":
        # The second run belongs to the next epoch, as a restart has it.
        books.ask.raise_epoch("A", 2, COORDINATOR, ":x")
    report = doctor(books.close())
    assert (report.code, report.alarms()) == (0, [])


class Planted(NamedTuple):
    """What is done to the books while open, which messages are taken away at rest, and what the doctor says."""

    plant: Callable[[Any], Any]
    forgotten: tuple[int, ...]
    words: str


CARRIERS = {
    "nothing at all": Planted(lambda b: b.publish("A"), (1,), "nothing continues it"),
    "an early signal only": Planted(
        lambda b: (b.publish("A"), b.publish("A", "", arrivals=[("signal:go", "1")])),
        (1,),
        "nothing continues it: no message, gather or timer; signal:go has arrived",
    ),
    "a timeout only": Planted(
        lambda b: b.publish("A", opens=[(TIMEOUT, 1, COORDINATOR, 60.0)]), (1,), "nothing continues it"
    ),
    "two messages": Planted(
        lambda b: (b.publish("A"), b.publish("A", "stageflow.orders.stage1", "pay", flags=0)),
        (),
        "2 messages or gathers continue it, and there must be one (in stageflow.orders.stage0 (ready), "
        "stageflow.orders.stage1 (ready))",
    ),
    "a message and a signal": Planted(
        lambda b: b.publish("A", opens=[("signal:go", 1, COORDINATOR, 0.0)]), (), "it waits at signal:go"
    ),
    "a request that nobody has": Planted(
        lambda b: b.publish("A", ENDPOINT, "pay", opens=[("reply:pay:1", 1, FIRST, 0.0)]),
        (1,),
        "without a deadline, but the request is in no queue",
    ),
    "a lost branch": Planted(
        lambda b: (
            b.publish("A", f"{JOIN}.left", "left", opens=[("both", 2, JOIN, 0.0)]),
            b.publish("A", f"{JOIN}.right", "right", flags=0),
        ),
        (2,),
        "waits for 2 more of its 2 branches or items, and 1 are in work: it will never continue",
    ),
    "an item twice": Planted(
        lambda b: (
            [b.publish("A", ITEMS, "lines", flags=FLAG_START, opens=[("lines", 2, JOIN, 0.0)])]
            + [b.publish("A", ITEMS, "lines", flags=0) for _ in range(2)]
        ),
        (),
        "waits for 2 more of its 2 branches or items, and 3 are in work: some are in work twice",
    ),
    "two joins": Planted(
        lambda b: b.publish("A", opens=[("one", 1, JOIN, 0.0), ("two", 1, JOIN, 0.0)]), (), "two of its stages wait"
    ),
    "an end nobody is told of": Planted(
        lambda b: (
            b.publish("A", "stageflow.finished", FINISHED, terminal=True),
            b.publish("A", flags=0),
        ),
        (1,),
        "it has ended, but has no message for the history",
    ),
    "an end told twice": Planted(
        lambda b: [
            b.publish("A", "stageflow.finished", FINISHED, flags=flags, terminal=True) for flags in (FLAG_START, 0)
        ],
        (),
        "it has ended, but has 2 messages for the history",
    ),
}


@pytest.mark.parametrize("damage", CARRIERS)
def test_an_instance_without_exactly_one_carrier_is_found(books: Any, doctor: Doctor, damage: str) -> None:
    planted = CARRIERS[damage]
    planted.plant(books)
    books.publish("sound")
    path = books.close()
    if planted.forgotten:
        books.forget(*planted.forgotten)
    report = doctor(path)
    assert report.code == 1
    found = report.one("error", "carrier")
    assert found["where"] == "A"
    assert planted.words in found["what"]


def test_many_instances_of_one_kind_are_one_finding(books: Any, doctor: Doctor) -> None:
    for number in range(30):
        for queue in (FIRST, "stageflow.orders.stage1"):
            books.publish(f"A{number}", queue, flags=FLAG_START if queue == FIRST else 0)
    assert doctor(books.close()).one("error", "carrier")["where"] == "A0, A1, A2 and 27 more"


def test_damage_in_the_journal_is_found_with_file_and_offset(books: Any, doctor: Doctor) -> None:
    for number in range(5):
        books.publish(f"A{number}")
    path = books.close()
    segment = path / "journal" / "0000000000000001.journal"
    with segment.open("r+b") as file:
        file.seek(3 * SECTOR_BYTES + 60)
        file.write(b"\xff\x00\xff")
    found = doctor(path).one("error", "journal")
    assert found["where"].startswith(f"{segment} at offset ")
    assert "journal repair" in found["advice"]


def test_after_a_repair_the_directory_is_sound_and_the_copies_are_named(
    books: Any, doctor: Doctor, capfd: pytest.CaptureFixture[str]
) -> None:
    from stageflow_actors.cli.main import main

    for number in range(5):
        books.publish(f"A{number}")
    path = books.close()
    with (path / "journal" / "0000000000000001.journal").open("r+b") as file:
        file.seek(5 * SECTOR_BYTES + 60)
        file.write(b"\xff\x00\xff")
    assert doctor(path).code == 1
    assert main(["journal", "repair", "--yes", "--data", str(path)]) == 0
    report = doctor(path)
    assert (report.code, report.alarms()) == (0, [])
    assert "journal repair" in report.one("info", "copies")["what"]


def test_a_torn_end_is_reported_and_breaks_nothing(books: Any, doctor: Doctor, snapshot: Any) -> None:
    books.publish("A")
    path = books.close()
    segment = path / "journal" / "0000000000000001.journal"
    whole = segment.read_bytes()
    used = len(whole.rstrip(b"\0"))
    with segment.open("r+b") as file:
        file.seek(used - 10)
        file.write(b"\xaa")
    before = snapshot(path)
    report = doctor(path)
    assert report.code == 0
    assert "torn end" in report.one("info", "journal")["what"]
    assert snapshot(path) == before


def test_clocks_that_were_set_back_are_reported(books: Any, doctor: Doctor) -> None:
    books.publish("A")
    path = books.close()
    books.append((records.STARTED, 7), wall=time.time() + 7200)
    report = doctor(path)
    assert report.code == 0
    assert "ahead of this machine's clock" in report.one("warning", "clock")["what"]


def test_files_that_others_may_write_are_reported(books: Any, doctor: Doctor) -> None:
    path = books.close()
    path.chmod(0o777)
    report = doctor(path)
    path.chmod(0o700)
    assert report.code == 0
    assert report.one("warning", "access") == {
        "severity": "warning",
        "check": "access",
        "where": str(path),
        "what": "other users can write to it (mode 777): its content cannot be trusted",
        "advice": f"chmod go-w {path}",
    }


def test_something_in_the_place_of_the_sockets_is_found(
    books: Any, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = books.close()
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    place = runtime_path(path)
    place.mkdir(mode=0o700)
    assert doctor(path).alarms() == []
    place.chmod(0o750)
    found = doctor(path).one("error", "sockets")
    assert (found["where"], found["advice"]) == (str(place), f"chmod 700 {place}")
    place.rmdir()
    place.touch()
    assert "it is not a directory" in doctor(path).one("error", "sockets")["what"]


def test_a_full_disk_is_reported(books: Any, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    path = books.close()
    usage = shutil.disk_usage(path)._replace(free=50 << 20)
    monkeypatch.setattr("stageflow_actors.diagnostics.environment.shutil.disk_usage", lambda _: usage)
    report = doctor(path)
    assert report.code == 0
    assert "52 MB are free" in report.one("warning", "room")["what"]


def test_messages_that_no_workflow_will_take_are_reported(books: Any, doctor: Doctor) -> None:
    books.publish("A", "stageflow.gone.stage0")
    books.ask.set_fact(MANIFEST_FACT, write_manifest(ClusterManifest([], Naming(), 1 << 20)))
    found = doctor(books.close()).one("warning", "unserved")
    assert found["where"] == "stageflow.gone.stage0 (1)"


def test_what_stands_still_on_purpose_is_named_with_its_command(books: Any, doctor: Doctor) -> None:
    books.publish("A")
    books.ask.pause(FIRST)
    report = doctor(books.close())
    assert report.code == 0
    assert report.one("info", "paused")["advice"] == f"stageflow queue resume {FIRST}"


def test_a_record_of_the_cluster_that_cannot_be_read_is_reported(books: Any, doctor: Doctor) -> None:
    path = books.close()
    (path / "cluster.json").write_text("{")
    assert doctor(path).one("warning", "lock")["where"] == str(path / "cluster.json")


def test_a_table_has_place_finding_and_advice(books: Any, capfd: pytest.CaptureFixture[str]) -> None:
    from stageflow_actors.cli.main import main

    books.publish("A")
    books.record("A")
    path = books.close()
    assert main(["doctor", "--data", str(path)]) == 1
    said = capfd.readouterr()
    assert said.err == ""
    first, advice, last = said.out.splitlines()
    assert first.startswith("error    agreement: A: it is live, but the same run of it is in the history")
    assert advice.startswith("         → ")
    assert last == f"1 error: 1 live instance, 1 message, 1 ended (0 of them still in the journal), {path}, at rest"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("doctor", "--data", "nowhere"), 1, "the directory does not exist"),
        (("doctor", "--output", "csv"), 2, "csv"),
        (("doctor", "extra"), 2, "extra"),
    ],
)
def test_what_cannot_be_looked_at_is_one_line(
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    from stageflow_actors.cli.main import main

    monkeypatch.chdir(tmp_path)
    assert main(list(arguments)) == code
    said = capfd.readouterr()
    assert said.out == ""
    assert words in said.err
    assert said.err.count("\n") == 1


def test_a_directory_on_a_network_file_system_is_refused_with_advice(
    books: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stageflow_actors.cli.main import main

    path = books.close()
    monkeypatch.setattr(
        "stageflow_actors.runtime.system.data_dir.file_system_of", lambda path, mounts: ("nfs4", "/mnt")
    )
    assert main(["doctor", "--data", str(path)]) == 1
    said = capfd.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "network file system (nfs4, mounted at /mnt)" in said.err
    assert "local disk" in said.err


def test_a_segment_that_was_cut_short_is_not_called_the_remains_of_a_crash(books: Any, doctor: Doctor) -> None:
    for number in range(20):
        books.publish(f"A{number}")
    path = books.close()
    (segment,) = (path / "journal").glob("*.journal")
    with segment.open("r+b") as file:
        file.truncate(SECTOR_BYTES + 700)
    report = doctor(path)
    found = report.one("warning", "journal")
    assert "No crash causes this; the missing data may be acknowledged" in found["what"]
    assert "restore a backup" in found["advice"]
