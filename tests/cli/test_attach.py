"""Attaching to a data directory: live, at rest, locked by another process, or missing."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors.errors import BrokerUnavailable, JournalLocked
from stageflow_actors.runtime.client import attach as module
from stageflow_actors.runtime.client.attach import attach
from stageflow_actors.runtime.messaging.broker_process import BrokerProcess
from stageflow_actors.runtime.messaging.connect import connect
from stageflow_actors.runtime.system.data_dir import ClusterRecord, DataDir, DataDirUnusable
from stageflow_actors.runtime.system.processes import start_ticks
from stageflow_actors.runtime.system.socket_dir import runtime_dir
from stageflow_brokers.api import Listener, PublishItem, Target
from stageflow_brokers.errors import Refused


def test_a_living_cluster_is_asked_not_its_files(filled: Any) -> None:
    filled.start("at rest", {})
    data_dir = DataDir(filled.close())
    process = BrokerProcess(
        address=f"ipc://{runtime_dir(data_dir.path)}/test-{os.getpid()}",
        journal=None,  # so that what it knows can only come from itself
        durability="memory",
        max_message_bytes=1 << 20,
        supervised=False,
    )
    process.start()
    try:
        data_dir.write_cluster(
            ClusterRecord(program=os.getpid(), program_ticks=start_ticks(os.getpid()), address=process.address)
        )
        client = connect(process.address, Listener(), role="client", name="test")
        client.publish([Target("live", "stage")], [PublishItem(0, 1, "living")], [b"x"]).result(5)
        for write in (False, True):
            with attach(data_dir.path, write=write) as attached:
                assert attached.live
                assert [queue["name"] for queue in attached.wait(attached.admin.stats(""))["queues"]] == ["live"]
        client.close()
        assert data_dir.cluster.exists()
    finally:
        process.stop()


def test_what_is_changed_at_rest_is_on_disk(filled: Any) -> None:
    filled.start("i1", {})
    path = filled.close()
    with attach(path, write=True) as attached:
        assert not attached.live
        assert attached.history is None
        attached.wait(attached.admin.pause("stageflow.orders.stage0"))
        with pytest.raises(JournalLocked):
            DataDir(path).acquire(os.getpid(), wait=0)
    with attach(path) as attached:
        assert attached.wait(attached.admin.stats(""))["queues"][0]["state"] == "paused"
    lock = DataDir(path)
    lock.acquire(os.getpid(), wait=0)
    lock.release()


def test_a_change_at_rest_leaves_no_directory_of_sockets_behind(filled: Any) -> None:
    filled.start("i1", {})
    path = filled.close()
    with attach(path, write=True) as attached:
        sockets = runtime_dir(path)
        assert list(sockets.iterdir()) != []
        attached.wait(attached.admin.pause("stageflow.orders.stage0"))
    assert not sockets.exists()


def test_a_cluster_that_was_killed_is_at_rest(filled: Any) -> None:
    filled.start("i1", {})
    data_dir = DataDir(filled.close())
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    data_dir.write_cluster(ClusterRecord(program=gone.pid, program_ticks=1, address="ipc:///nowhere"))
    with attach(data_dir.path) as attached:
        assert not attached.live
        assert attached.wait(attached.admin.stats(""))["groups"] == 1


def test_a_refusal_and_a_silent_broker_are_reported(filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.start("i1", {})
    data_dir = DataDir(filled.close())
    with attach(data_dir.path) as attached, pytest.raises(Refused, match="nope"):
        attached.wait(attached.admin.pause("nope"))
    me = ClusterRecord(program=os.getpid(), program_ticks=start_ticks(os.getpid()), address="ipc:///nowhere/at-all")
    data_dir.write_cluster(me)
    with attach(data_dir.path) as attached, pytest.raises(BrokerUnavailable, match=r"within 0\.05 s"):
        attached.wait(attached.admin.stats(""), timeout=0.05)
    monkeypatch.setattr(module, "ATTACH_TIMEOUT_SECONDS", 0.05)
    data_dir.write_cluster(ClusterRecord(program=me.program, program_ticks=me.program_ticks))
    with pytest.raises(BrokerUnavailable, match="has not started its broker"), attach(data_dir.path):
        pass


def test_what_is_no_data_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(DataDirUnusable, match="directory does not exist"), attach(tmp_path / "nowhere"):
        pass
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(DataDirUnusable, match="no journal"), attach(tmp_path, write=True):
        pass
    assert list(tmp_path.iterdir()) == []
