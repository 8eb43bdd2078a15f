"""`stageflow up`, and commands on a running cluster: start, signal, scale, health, export, compact."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from polling import wait_until
from programs import STAGEFLOW, Stageflow

from stageflow_actors import Runtime, StageResult, WorkflowResult
from stageflow_actors.runtime.system.data_dir import DataDir

FLOWS = """
import os, time
from dataclasses import dataclass
from stageflow_actors import Runtime, Workflow

orders = Workflow("orders")


@orders.stage
def pay(order):
    order["paid"] = True
    if order.get("hold"):
        open("held", "w").close()
        while not os.path.exists("release"):
            time.sleep(0.005)
    if order.get("poor"):
        raise ValueError("no money")
    return {"receipt": 7}


parks = Workflow("parks", on_failure="park").add_stage(pay)


@dataclass
class Parcel:
    weight: float
    label: str | None = None


parcels = Workflow("parcels", context=Parcel).add_stage(lambda parcel: setattr(parcel, "label", "printed"), id="label")
asked = Workflow("asked").add_signal("approval", on_signal=lambda c, payload: c.update(by=payload))
runtime = Runtime(orders, asked, parks, parcels, data_dir="cluster")
"""


class Up:
    """A `stageflow up` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "cluster"
        (folder / "flows.py").write_text(FLOWS)
        self.process = subprocess.Popen(
            [*STAGEFLOW, "up", "flows.py:runtime"],
            cwd=folder,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.said = self.process.stderr.readline()

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate(timeout=30)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    up = Up(tmp_path_factory.mktemp("up"))
    yield up
    up.kill()


@pytest.fixture
def own_up(tmp_path: Path) -> Iterator[Up]:
    up = Up(tmp_path)
    yield up
    up.kill()


def test_it_prints_in_one_line_that_it_is_ready(up: Up) -> None:
    assert up.said == "stageflow: serving orders, asked, parks, parcels from cluster\n"


def test_an_instance_is_started_and_waited_for(up: Up, stageflow: Stageflow) -> None:
    code, out, err = stageflow(
        "start", "orders", "--json", '{"n": 1}', "--id", "A-1", "--wait", "--timeout", 20, "--data", up.data
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["instance_id"], result["status"]) == ("A-1", "completed")
    assert result["context"] == {"n": 1, "paid": True}
    code, out, _ = stageflow("start", "orders", "--json", '{"n": [NaN, -Infinity]}', "--wait", "--data", up.data)
    assert (code, json.loads(out)["context"]["n"]) == (0, ["NaN", "-Infinity"])
    code, out, _ = stageflow("start", "orders", "--json", '{"poor": true}', "--wait", "--data", up.data)
    assert (code, json.loads(out)["error"]) == (1, "ValueError: no money")


def test_without_wait_the_id_is_printed(up: Up, stageflow: Stageflow) -> None:
    code, out, _ = stageflow("start", "orders", "--id", "A-2", "--data", up.data)
    assert (code, out) == (0, "A-2\n")
    code, out, _ = stageflow("start", "orders", "--data", up.data)
    assert (code, len(out.strip())) == (0, 32)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nothing"], 1, "workflow 'nothing' is not served in"),
        (["orders", "--json", "{"], 2, "not valid JSON"),
        (["orders", "--json", "[1]"], 2, "must be a JSON object"),
        (["orders", "--json", '{"other": 1}', "--id", "A-1"], 1, "another input"),
        (["parcels", "--json", '{"weight": "5"}'], 1, "context.weight must be float, not str"),
        (
            ["parcels", "--json", '{"weigth": 5}'],
            1,
            "Parcel has no such field (did you mean 'weight'?); it has label, weight",
        ),
        (["parcels"], 1, "context.weight"),
    ],
)
def test_what_cannot_be_started_is_one_line(
    up: Up, stageflow: Stageflow, arguments: list[str], code: int, said: str
) -> None:
    if "A-1" in arguments:
        stageflow("start", "orders", "--id", "A-1", "--json", '{"n": 1}', "--wait", "--data", up.data)
    got, out, err = stageflow("start", *arguments, "--data", up.data)
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert said in err


def test_an_instance_is_cancelled(up: Up, stageflow: Stageflow) -> None:
    stageflow("start", "asked", "--id", "K-1", "--data", up.data)
    code, out, err = stageflow("instances", "cancel", "K-1", "--reason", "too late", "--data", up.data)
    assert (code, out, err) == (0, "cancelled\n", "")
    shown = json.loads(stageflow("instances", "show", "K-1", "--data", up.data, "--output", "json")[1])
    assert (shown["status"], shown["error"]) == ("cancelled", "cancelled: too late")
    stageflow("start", "orders", "--id", "K-2", "--wait", "--data", up.data)
    assert stageflow("instances", "cancel", "K-2", "--data", up.data) == (1, "completed\n", "")
    code, out, err = stageflow("instances", "cancel", "K-3", "--data", up.data)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "'K-3'" in err


def test_an_instance_is_run_again_from_its_failed_stage_or_from_the_first(up: Up, stageflow: Stageflow) -> None:
    stageflow("start", "parks", "--id", "P-1", "--json", '{"poor": true}', "--data", up.data)
    wait_until(lambda: "parked" in stageflow("instances", "show", "P-1", "--data", up.data)[1])
    again = ("--json", '{"n": 1}', "--wait", "--timeout", 20, "--data", up.data)
    code, out, err = stageflow("instances", "retry", "P-1", *again)
    assert (code, err, json.loads(out)["context"]) == (0, "", {"n": 1, "paid": True})
    code, out, err = stageflow("instances", "retry", "P-1", "--data", up.data)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "is completed: only an instance that is parked" in err
    code, out, err = stageflow("instances", "restart", "P-1", "--json", '{"n": 2}', "--data", up.data)
    assert (code, out, err) == (0, "P-1\n", "")
    with Runtime.connect(up.data) as client:
        assert client.instance("P-1").result(timeout=20).context == {"n": 2, "paid": True}
    assert stageflow("instances", "restart", "P-1", "--json", "[]", "--data", up.data)[0] == 2


def test_at_rest_it_happens_at_the_next_start(own_up: Up, stageflow: Stageflow) -> None:
    at, show = ("--data", own_up.data), ("instances", "show")
    for workflow, name, context in (("asked", "K", "{}"), ("parks", "P", '{"poor": 1}'), ("orders", "R", "{}")):
        stageflow("start", workflow, "--id", name, "--json", context, *at)
    for name, status in (("K", "waiting"), ("P", "parked"), ("R", "completed")):
        wait_until(lambda name=name, status=status: status in stageflow(*show, name, *at)[1])
    own_up.process.terminate()
    assert own_up.end()[0] == 0
    code, out, err = stageflow("instances", "cancel", "K", *at)
    assert (code, out, err) == (0, "", "K is waiting and no cluster runs here: it is cancelled at the next start\n")
    assert stageflow("instances", "cancel", "R", *at) == (1, "completed\n", "")
    for word, name, context in (("retry", "P", '{"n": 1}'), ("restart", "R", '{"n": 2}')):
        code, out, err = stageflow("instances", word, name, "--json", context, *at)
        assert (code, out, err) == (0, f"{name}\n", f"no cluster runs here: {name} goes on at the next start\n")
    code, out, err = stageflow("instances", "restart", "R", "--wait", *at)
    assert (code, out) == (1, "")
    assert "leave out --wait" in err
    again = Up(own_up.folder)
    try:
        with Runtime.connect(again.data) as client:
            ends = {name: client.instance(name).result(timeout=20) for name in "KPR"}
        assert [(end.status, end.context.get("n")) for end in ends.values()] == [
            ("cancelled", None),
            ("completed", 1),
            ("completed", 2),
        ]
    finally:
        again.kill()


def test_starting_needs_a_running_cluster(tmp_path: Path, stageflow: Stageflow) -> None:
    code, _, err = stageflow("start", "orders", "--data", tmp_path)
    assert code == 1
    assert f"no cluster runs on {tmp_path}" in err
    assert "stageflow up" in err


def test_a_signal_is_sent(up: Up, stageflow: Stageflow) -> None:
    stageflow("start", "asked", "--id", "S-1", "--data", up.data)
    code, _, err = stageflow("instances", "signal", "S-1", "aproval", "--data", up.data)
    assert (code, err) == (
        1,
        "stageflow: workflow 'asked' version 1 never waits for a signal 'aproval': it waits for 'approval'\n",
    )
    code, out, err = stageflow("instances", "signal", "S-1", "approval", "--json", '{"who": "me"}', "--data", up.data)
    assert (code, out, err) == (0, "", "")
    with Runtime.connect(up.data) as client:
        assert client.instance("S-1").result(timeout=20).context == {"by": {"who": "me"}}
    code, _, err = stageflow("instances", "signal", "nobody", "approval", "--data", up.data)
    assert (code, err) == (1, "stageflow: no live instance has the id 'nobody'\n")


def test_a_stage_is_scaled(up: Up, stageflow: Stageflow) -> None:
    def actors() -> int:
        queues = json.loads(stageflow("queue", "list", "--output", "json", "--data", up.data)[1])
        return next(queue["actors"] for queue in queues if queue["name"] == "stageflow.orders.stage0")

    assert stageflow("scale", "orders", "pay", 2, "--data", up.data) == (0, "", "")
    wait_until(lambda: actors() == 2)
    code, _, err = stageflow("scale", "orders", "ship", 2, "--data", up.data)
    assert code == 1
    assert "has no stage 'ship'" in err
    assert stageflow("scale", "orders", "pay", -1, "--data", up.data)[0] == 2


def test_health_is_well_until_something_is_not(up: Up, stageflow: Stageflow, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stageflow("health", "--data", up.data) == (0, "healthy\n", "")
    monkeypatch.setattr("stageflow_actors.diagnostics.health.FAULT_CONFIRM_SECONDS", 0.2)
    stageflow("queue", "pause", "stageflow.orders.stage0", "--data", up.data)
    code, out, _ = stageflow("health", "--data", up.data)
    assert (code, out.count("\n")) == (1, 1)
    assert out.startswith("pool stageflow.orders.stage0: it is paused")
    code, out, _ = stageflow("health", "--output", "json", "--data", up.data)
    assert json.loads(out)["healthy"] is False
    assert json.loads(out)["faults"][0]["part"] == "pool stageflow.orders.stage0"
    stageflow("queue", "resume", "stageflow.orders.stage0", "--data", up.data)
    assert stageflow("health", "--output", "json", "--data", up.data)[:2] == (
        0,
        '{\n  "healthy": true,\n  "faults": []\n}\n',
    )


def test_a_directory_without_a_cluster_is_not_healthy(
    tmp_path: Path, stageflow: Stageflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stageflow_actors.diagnostics.health.FAULT_CONFIRM_SECONDS", 0.0)
    code, out, _ = stageflow("health", "--data", tmp_path)
    assert (code, out) == (
        1,
        f"program: no cluster runs on {tmp_path}; start one with Runtime or `stageflow up`\n",
    )
    assert stageflow("health", "--data", tmp_path / "none")[0] == 1


def test_a_stopped_coordinator_is_noticed(own_up: Up, stageflow: Stageflow, monkeypatch: pytest.MonkeyPatch) -> None:
    node = DataDir(own_up.data).read_cluster()
    assert node is not None
    assert node.node is not None
    stageflow("start", "asked", "--data", own_up.data)
    monkeypatch.setattr("stageflow_actors.diagnostics.health.FAULT_CONFIRM_SECONDS", 0.5)
    os.kill(node.node, signal.SIGSTOP)
    try:
        stageflow("start", "orders", "--wait", "--data", own_up.data)
        code, out, _ = stageflow("health", "--data", own_up.data)
        assert code == 1
        assert "coordinator: 1 message waiting in stageflow.finished, and none is processed" in out
    finally:
        os.kill(node.node, signal.SIGCONT)


def test_everything_is_exported(up: Up, stageflow: Stageflow, tmp_path: Path) -> None:
    for name, poor in (("E-1", "false"), ("E-2", "true")):
        stageflow("start", "orders", "--id", name, "--json", f'{{"poor": {poor}}}', "--wait", "--data", up.data)
    stageflow("start", "asked", "--id", "E-3", "--data", up.data)
    with Runtime.connect(up.data) as client:
        wait_until(lambda: client.instance("E-3").status() == "waiting")
    code, _, err = stageflow("instances", "export", tmp_path / "all.jsonl", "--data", up.data)
    rows = {row["instance_id"]: row for row in map(json.loads, (tmp_path / "all.jsonl").read_text().splitlines())}
    assert (code, err) == (0, f"{len(rows):,} instances\n")
    assert [rows[name]["status"] for name in ("E-1", "E-2", "E-3")] == ["completed", "failed", "waiting"]
    assert rows["E-1"]["context"] == {"poor": False, "paid": True}
    assert rows["E-1"]["stages"][0]["data"] == {"receipt": 7}
    assert rows["E-2"]["error"] == "ValueError: no money"
    assert [name for name in rows["E-1"] if not hasattr(WorkflowResult, name)] == ["version"]
    assert rows["E-1"]["stages"][0].keys() <= set(StageResult.__struct_fields__)
    assert [each["stage_id"] for each in rows["E-1"]["stages"]] == ["pay"]
    code, out, _ = stageflow("instances", "export", "--status", "failed", "--format", "csv", "--data", up.data)
    lines = out.splitlines()
    assert (code, lines[0].split(",")[:4]) == (0, ["instance_id", "workflow_id", "version", "status"])
    assert all(",failed," in line for line in lines[1:])
    assert any(line.startswith("E-2,orders,1,failed,") for line in lines)


def test_the_journal_is_compacted_while_the_cluster_runs(up: Up, stageflow: Stageflow) -> None:
    stageflow("start", "asked", "--id", "C-1", "--data", up.data)
    code, out, err = stageflow("journal", "compact", "--data", up.data)
    assert (code, out) == (0, "")
    assert " before; " in err
    assert stageflow("start", "orders", "--wait", "--data", up.data)[0] == 0
    stageflow("instances", "signal", "C-1", "approval", "--data", up.data)
    with Runtime.connect(up.data) as client:
        assert client.instance("C-1").result(timeout=20).success


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_when_the_stages_in_work_are_done(own_up: Up, stageflow: Stageflow, number: int) -> None:
    stageflow("start", "orders", "--id", "H-1", "--json", '{"hold": true}', "--data", own_up.data)
    wait_until((own_up.folder / "held").exists)
    own_up.process.send_signal(number)
    assert own_up.process.stderr is not None
    assert "stopping after the stages in work" in own_up.process.stderr.readline()
    (own_up.folder / "release").touch()
    assert own_up.end() == (0, "", "")
    code, out, _ = stageflow("instances", "show", "H-1", "--output", "json", "--data", own_up.data)
    assert (code, json.loads(out)["status"]) == (0, "completed")


def test_a_second_one_kills_what_is_in_work(own_up: Up, stageflow: Stageflow) -> None:
    stageflow("start", "orders", "--id", "H-1", "--json", '{"hold": true}', "--data", own_up.data)
    wait_until((own_up.folder / "held").exists)
    own_up.process.send_signal(signal.SIGINT)
    assert own_up.process.stderr is not None
    own_up.process.stderr.readline()
    below = psutil.Process(own_up.process.pid).children(recursive=True)
    own_up.process.send_signal(signal.SIGINT)
    assert own_up.end()[0] == 130
    assert not psutil.wait_procs(below, timeout=10)[1], "nothing of it is left"
    code, out, _ = stageflow("instances", "show", "H-1", "--output", "json", "--data", own_up.data)
    assert (code, json.loads(out)["status"]) == (0, "pending"), "it resumes at the next start"


def test_what_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("from stageflow_actors import Runtime\nruntime = Runtime()\n")
    done = subprocess.run(
        [*STAGEFLOW, "up", "broken.py:runtime"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "has no workflows" in done.stderr


def test_a_workflow_is_drawn(tmp_path: Path, stageflow: Stageflow, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drawn_flows.py").write_text(FLOWS + "\n\n@pay.compensation\ndef refund(order, *, bank): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    code, out, err = stageflow("graph", "drawn_flows.py:orders")
    assert (code, err) == (0, "")
    assert out.splitlines()[:3] == ["flowchart TD", '    n0(["orders"])', '    n1["pay"]']
    assert "undone by" in out
    code, _, err = stageflow("graph", "drawn_flows.py:runtime")
    assert code == 2
    assert "not a Workflow" in err
