"""A data directory that release 0.1 left behind when all of its processes were killed.

`data-0.1.tar.xz` holds journal and history of `golden_workflows.py`: 20 completed and 5 compensated instances, 5 that
wait for a signal, 4 parked ones, and 6 that retry their second stage with a completed step. The file is never made
again: each later release opens it, resumes it, and verifies it. `data-paused-by-pool.tar.xz` is of `golden_pauses.py`:
a queue that its pool had paused, one that a person had paused too, and one that a person had paused alone.
"""

from __future__ import annotations

import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stageflow_actors import InstanceConflict, Runtime, StageStatus, Workflow, WorkflowStatus
from stageflow_actors.cli.main import main as stageflow
from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.plan import Naming, compile_plan
from stageflow_actors.runtime.client.workflow_ref import WorkflowRef
from stageflow_brokers.journal import verify

HERE = Path(__file__).parent
WAIT_SECONDS = 60.0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    with tarfile.open(HERE / "data-0.1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "data"


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that ends the troubles of the workflows, once it exists; they are importable in the test."""
    monkeypatch.setenv("GOLDEN_GATE", str(tmp_path / "gate"))
    monkeypatch.syspath_prepend(str(HERE))
    yield tmp_path / "gate"
    for name in ("golden_workflows", "golden_pauses"):
        sys.modules.pop(name, None)


def test_a_killed_directory_of_release_0_1_verifies(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [finding for finding in verify(data / "journal") if finding.damage] == []
    for command in (["journal", "verify"], ["doctor"]):
        assert stageflow([*command, "--data", str(data)]) == 0, capsys.readouterr()


def test_a_killed_directory_of_release_0_1_resumes_and_repeats_nothing(data: Path, gate: Path) -> None:
    from golden_workflows import Parcel, parcels, parked, signed

    gate.touch()
    with Runtime(parcels, parked, signed, data_dir=data) as runtime:
        for number in range(20):
            done = runtime.submit(parcels, Parcel(number), instance_id=f"done-{number}").result(WAIT_SECONDS)
            assert (done.status, done.context) == (
                WorkflowStatus.completed,
                Parcel(number, "", [number], True),
            )
            assert [stage.data for stage in done.stages] == [{"label": f"label-{number}"}, f"sent-{number}"]
        with pytest.raises(InstanceConflict):
            runtime.submit(parcels, Parcel(99), instance_id="done-0")
        for number in range(5):
            lost = runtime.instance(f"lost-{number}").result(WAIT_SECONDS)
            assert lost.status == WorkflowStatus.compensated
            assert lost.error == "ValueError: the parcel is lost"
            assert [(undone.stage_id, undone.status) for undone in lost.compensations] == [("pack", "completed")]
        for number in range(6):
            held = runtime.instance(f"held-{number}").result(WAIT_SECONDS)
            assert held.status == WorkflowStatus.completed
            assert held.context == Parcel(number, "held", [number], True)
            assert held.stages[1].attempts > 1
        for number in range(5):
            waiting = runtime.instance(f"unsigned-{number}")
            assert waiting.status() == WorkflowStatus.waiting
            waiting.signal("receipt", {"by": "post"})
            assert waiting.result(WAIT_SECONDS).context == Parcel(number, "unsigned", [], True)
        for number in range(4):
            heavy = runtime.instance(f"heavy-{number}")
            assert heavy.status() == WorkflowStatus.parked
            heavy.retry()
            result = heavy.result(WAIT_SECONDS)
            assert (result.status, result.stages[0].status) == (WorkflowStatus.completed, StageStatus.completed)
        ended = Counter(one.status() for one in runtime.instances(limit=1000))
        assert ended == {WorkflowStatus.completed: 35, WorkflowStatus.compensated: 5}
    assert verify(data / "journal") == []


def test_an_input_of_release_0_1_is_the_same_start_in_each_equal_form(data: Path, gate: Path) -> None:
    from golden_workflows import Parcel, parcels, parked, signed

    gate.touch()
    with Runtime(parcels, parked, signed, data_dir=data) as runtime:
        done = runtime.instance("done-3").result(WAIT_SECONDS)
        for equal in (Parcel(3), {"number": 3}, {"sent": False, "number": 3}):
            assert runtime.submit(parcels, equal, instance_id="done-3").result(WAIT_SECONDS) == done
        waiting = runtime.submit(signed, Parcel(1, "unsigned"), instance_id="unsigned-1")
        assert waiting.status() == WorkflowStatus.waiting
        assert [one.status for one in runtime.map(parcels, [Parcel(5)], key=lambda _: "done-5")] == ["completed"]
        for number in range(5):
            runtime.instance(f"unsigned-{number}").cancel()
        for other_id in ("done-3", "unsigned-1"):
            with pytest.raises(
                InstanceConflict, match=f"'{other_id}' exists already and was started with another input"
            ):
                runtime.submit(parcels if other_id == "done-3" else signed, Parcel(99), instance_id=other_id)
        with pytest.raises(InstanceConflict, match="another workflow, 'parcels'"):
            runtime.submit(parked, Parcel(3), instance_id="done-3")


def test_a_field_added_since_release_0_1_is_no_other_input(data: Path, gate: Path) -> None:
    import golden_workflows

    @dataclass
    class Parcel(golden_workflows.Parcel):
        colour: str = "brown"
        labels: list[str] = field(default_factory=list)

    parcels = Workflow("parcels", context=Parcel).add_stage(golden_workflows.pack).add_stage(golden_workflows.send)
    ref = WorkflowRef(compile_plan(parcels, Naming()), Parcel)
    request = ref.prepare(Parcel(3), "done-3")
    earlier = ContextCodec(golden_workflows.Parcel)
    written = bytes.fromhex("88f060f319c68b2a996bdb5c4b501cef")  # of done-3, in the history that release 0.1 wrote
    assert next(earlier.earlier_digests(earlier.encode(golden_workflows.Parcel(3)), "parcels")) == written
    assert ref.is_earlier_digest(request, written)
    assert not ref.is_earlier_digest(ref.prepare(Parcel(3, colour="red"), "done-3"), written)
    assert request.digest == ContextCodec(golden_workflows.Parcel).digest(
        earlier.encode(golden_workflows.Parcel(3)), "parcels"
    )


@pytest.fixture
def paused(tmp_path: Path) -> Path:
    """A directory of release 0.1, in which two pools had paused their queues, and a person two queues."""
    with tarfile.open(HERE / "data-paused-by-pool.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "data"


def test_a_pause_that_a_pool_of_release_0_1_left_behind_is_lifted_and_that_of_a_person_stays(
    paused: Path, gate: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from golden_pauses import bank, confirmed, given_up, held

    gate.touch()
    with Runtime(given_up, confirmed, held, data_dir=paused, services={"bank": bank}) as runtime:
        for number in range(2):
            result = runtime.instance(f"given-up-{number}").result(WAIT_SECONDS)
            assert (result.status, result.stages[0].data) == (WorkflowStatus.completed, f"paid {number}")
        states = {queue.name: queue.state for queue in runtime.queues("stageflow.") if queue.state != "open"}
        assert states == {"stageflow.confirmed.stage0": "paused", "stageflow.held.stage0": "paused"}
        for name in states:
            runtime.resume(name)
        for id in ("confirmed-0", "held-0"):
            assert runtime.instance(id).result(WAIT_SECONDS).success
    said = [line for line in capfd.readouterr().err.splitlines() if "is resumed" in line]
    assert len(said) == 1
    assert said[0].startswith("stageflow: queue stageflow.given-up.stage0 is resumed: an earlier release had paused it")
    assert "because 10 of its workers ended in a row before they began a message" in said[0]
