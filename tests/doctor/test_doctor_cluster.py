"""The doctor on a real cluster: no false alarms in any state, and each planted fault is found."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import Client, Runtime, Workflow
from stageflow_actors.core.envelope import Outcome, encode, raw
from stageflow_actors.diagnostics import doctor as doctor_module
from stageflow_actors.history import HistoryRow, HistoryWriter
from stageflow_actors.runtime.system.data_dir import DataDir

Doctor = Callable[[Path], Any]

PROGRAM = """
import os, signal, sys, time
from stageflow_actors import Runtime, Stage, Workflow

data, gate = sys.argv[1:3]


def hold(context, ctx):
    while not os.path.exists(gate):
        time.sleep(0.005)


def hold_first(item):
    while item == 0 and not os.path.exists(gate):
        time.sleep(0.005)
    return item


def fail(context):
    if not os.path.exists(gate):
        raise ValueError("no")


def answer(command):
    while not os.path.exists(gate):
        time.sleep(0.005)
    return command


def nothing(context):
    pass


flows = [
    Workflow("holds", timeout=3600).add_stage(nothing, id="first", compensation=nothing).add_stage(hold, id="held"),
    Workflow("waits").add_signal("go"),
    Workflow("hears").add_signal("go").add_signal("other"),
    Workflow("sleeps").add_delay("long", 3600),
    Workflow("forks").add_parallel("both", [Stage(hold, id="left"), Stage(nothing, id="right")]),
    Workflow("maps").add_map("items", hold_first, over=lambda context: range(context["n"]), into="done"),
    Workflow("asks").add_stage(lambda context, ctx: ctx.request("slow", 7), id="ask"),
    Workflow("parks", on_failure="park").add_stage(nothing, id="first").add_stage(fail, id="failing"),
    Workflow("undoes").add_stage(nothing, id="first", compensation=nothing).add_stage(fail, id="failing"),
]
runtime = Runtime(*flows, data_dir=data)
runtime.endpoint("slow", answer)
runtime.start()
print("up", flush=True)
signal.signal(signal.SIGTERM, lambda *_: (runtime.stop(grace=0.0), os._exit(0)))
while True:
    signal.pause()
"""


def statuses(client: Client) -> dict[str, str]:
    return {one.id: str(one.status()) for one in client.instances()}


def test_a_cluster_is_sound_in_every_state_at_work_killed_resumed_and_stopped(
    tmp_path: Path, launch: Any, doctor: Doctor, eventually: Any, snapshot: Any
) -> None:
    data, gate = tmp_path / "data", tmp_path / "gate"
    program = launch(PROGRAM, data, gate)
    assert program.stdout.readline() == "up\n"
    names = ["holds", "waits", "sleeps", "forks", "asks", "parks", "undoes"]
    expected = {"waits": "waiting", "sleeps": "waiting", "parks": "parked", "undoes": "compensated"}
    with Runtime.connect(data) as client:
        for name in names:
            client.submit(name, {}, instance_id=name)
        client.submit("maps", {"n": 5_000}, instance_id="maps")
        client.submit("sleeps", {}, instance_id="cancelled")
        client.submit("hears", {}, instance_id="early").signal("other")
        eventually(lambda: expected.items() <= statuses(client).items(), "all have come to where they stay")
        client.instance("cancelled").cancel()
        report = doctor(data)
        assert (report.code, report.alarms()) == (0, [])
        assert report.said["cluster"] == "running"
        assert report.one("info", "dead letters")["where"] == "dlq.stageflow.parks.stage1"
        assert report.said["checked"]["instances"] == 8  # but for the cancelled and the compensated one

    program.kill()
    program.wait(20)
    eventually(lambda: DataDir(data).holders() == [], "its cluster has ended with it")
    before = snapshot(data)
    report = doctor(data)
    assert (report.code, report.alarms()) == (0, [])
    assert report.said["cluster"] == "at rest"
    assert report.said["checked"]["instances"] == 8
    assert snapshot(data) == before

    gate.touch()
    program = launch(PROGRAM, data, gate)
    assert program.stdout.readline() == "up\n"
    with Runtime.connect(data) as client:
        assert doctor(data).alarms() == []
        client.instance("parks").retry()
        for name in ("waits", "early"):
            client.instance(name).signal("go")
        done = ["holds", "waits", "forks", "maps", "asks", "parks", "early"]
        eventually(lambda: {name: statuses(client)[name] for name in done} == dict.fromkeys(done, "completed"), "done")
        assert doctor(data).alarms() == []
    program.send_signal(signal.SIGTERM)
    program.wait(20)
    report = doctor(data)
    assert (report.code, report.findings) == (0, [])
    assert report.said["checked"]["instances"] == 1  # which sleeps
    assert report.said["checked"]["ended_in_journal"] == 9


def _work(order: dict[str, Any], ctx: Any) -> None:
    if order["n"] % 40 == 7 and ctx.attempt == 1:
        os._exit(9)
    time.sleep(0.001)


def _last(order: dict[str, Any]) -> None:
    if order["n"] % 5 == 0:
        raise ValueError("no")


def _undo(order: dict[str, Any]) -> None:
    time.sleep(0.001)


def _same(item: Any) -> Any:
    return item


LOAD = (
    Workflow("load")
    .add_stage(_work, id="work", compensation=_undo)
    .add_parallel("both", [_same, _undo])
    .add_map("items", _same, over=lambda order: range(7), into="items")
    .add_delay("moment", 0.01)
    .add_stage(_last, id="last")
)
WAITS = Workflow("waits").add_signal("go")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    runtime = Runtime(LOAD, WAITS, data_dir=tmp_path_factory.mktemp("cluster") / "data").start()
    yield runtime
    runtime.stop(grace=0.0)


def data_of(cluster: Runtime) -> Path:
    return Path(cluster.data_dir)


def test_nothing_is_wrong_with_a_cluster_under_load(cluster: Runtime, doctor: Doctor) -> None:
    results: list[Any] = []

    def load() -> None:
        orders = [{"n": number} for number in range(120)]
        results.extend(cluster.map_unordered(LOAD, orders))

    loading = threading.Thread(target=load)
    loading.start()
    seen = set()
    try:
        while loading.is_alive():
            report = doctor(data_of(cluster))
            assert (report.code, report.alarms()) == (0, [])
            seen.add(report.said["checked"]["instances"])
    finally:
        loading.join()
    assert len(results) == 120
    assert len(seen) > 1, "it was looked at while it worked"


GHOST = """
import sys, time
from stageflow_brokers.api import Listener
from stageflow_brokers.zeromq.client import ZmqClient


class Taker(Listener):
    def on_deliveries(self, queue, items, bodies):
        print("taken", flush=True)


client = ZmqClient(sys.argv[1], Taker(), role="worker", name="ghost")
client.consume("stageflow.ghost.stage0", 1)
client.admin.ping().result(10)
print("consuming", flush=True)
time.sleep(600)
"""


def test_a_lease_of_a_process_that_has_ended_is_found(
    cluster: Runtime, doctor: Doctor, launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = DataDir(data_of(cluster)).read_cluster()
    assert record is not None
    address = record.address
    ghost = launch(GHOST, address)
    assert ghost.stdout.readline() == "consuming\n"  # or the node might take the message as an orphaned one
    publisher = (
        "import sys\n"
        "from stageflow_brokers.api import Listener, PublishItem, Target\n"
        "from stageflow_brokers.zeromq.client import ZmqClient\n"
        "client = ZmqClient(sys.argv[1], Listener(), role='client', name='planter')\n"
        "target, item = Target('stageflow.ghost.stage0', 'x'), PublishItem(0, 1, '', 0)\n"
        "client.publish([target], [item], [b'x']).result(10)\n"
        "client.close()\n"
    )
    assert launch(publisher, address).wait(20) == 0
    assert ghost.stdout.readline() == "taken\n"
    assert doctor(data_of(cluster)).alarms() == []
    ghost.kill()
    ghost.wait(20)
    monkeypatch.setattr(doctor_module, "FAULT_CONFIRM_SECONDS", 0.5)
    report = doctor(data_of(cluster))
    found = report.one("error", "lease")
    assert found["where"] == f"ghost (pid {ghost.pid})"
    assert "it holds 1 message of stageflow.ghost.stage0" in found["what"]


def test_an_instance_that_waits_and_has_a_row_is_found(doctor: Doctor, tmp_path: Path, eventually: Any) -> None:
    with Runtime(WAITS, data_dir=tmp_path / "data") as runtime:
        instance = runtime.submit(WAITS, {}, instance_id="W")
        eventually(lambda: instance.status() == "waiting", "it waits")
        outcome = encode(Outcome("waits", 1, "completed", raw({}), b"\xdd\0\0\0\0", 0.0, 1.0))
        with HistoryWriter.open(tmp_path / "data" / "history.db", create=False) as writer:
            writer.write([HistoryRow("W", 1, "waits", 1, "completed", 0.0, 1.0, None, None, None, outcome)])
        report = doctor(tmp_path / "data")
        assert report.one("error", "agreement")["where"] == "W"
        instance.signal("go")
        instance.result(20)


def test_what_surrounds_a_cluster_is_looked_at(doctor: Doctor, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Runtime(WAITS, data_dir=data) as runtime:
        assert runtime.queues()
        record = DataDir(data).read_cluster()
        assert record is not None
        assert record.address is not None
        sockets = Path(record.address.removeprefix("ipc://")).parent
        sockets.chmod(0o755)
        found = doctor(data).one("error", "sockets")
        assert (found["where"], found["advice"]) == (str(sockets), f"chmod 700 {sockets}")
        sockets.chmod(0o700)
        (data / "lock").unlink()
        found = doctor(data).one("error", "lock")
        assert found["where"] == str(data / "lock")
        assert f"the program with pid {os.getpid()}" in found["what"]
