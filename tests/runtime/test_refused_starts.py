"""A refused start raises one line with the reason in the caller, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import Runtime, Workflow
from stageflow_actors.diagnostics.doctor import run_checks
from stageflow_actors.errors import BrokerUnavailable
from stageflow_actors.history import HistoryMissing
from stageflow_actors.runtime import node_handle
from stageflow_actors.runtime import runtime as runtime_module
from stageflow_actors.runtime.client.session import Session
from stageflow_actors.runtime.system.data_dir import DataDir, DataDirUnusable
from stageflow_actors.runtime.system.socket_dir import runtime_path

waits = Workflow("waits").add_signal("go")


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[Path]:
    """Where the sockets of a cluster on `tmp_path` would be, cleared away at the end."""
    path = runtime_path(tmp_path)
    yield path
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        path.rmdir()


def test_neither_sockets_nor_record_are_left(tmp_path: Path, sockets: Path) -> None:
    with Runtime(waits, data_dir=tmp_path) as runtime:
        runtime.submit(waits, {}, instance_id="A")
    for file in tmp_path.glob("history.db*"):
        file.unlink()
    with pytest.raises(HistoryMissing):
        Runtime(waits, data_dir=tmp_path).start()
    assert not sockets.exists()
    assert not DataDir(tmp_path).cluster.exists()
    assert not [found for found in run_checks(DataDir(tmp_path)).findings if "kill" in found.what]


def test_a_start_that_fails_before_any_process_leaves_no_record(
    tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable() -> object:
        raise PermissionError(13, "the sources of the program cannot be read")

    monkeypatch.setattr(runtime_module, "loaded_sources", unreadable)
    with pytest.raises(PermissionError):
        Runtime(waits, data_dir=tmp_path).start()
    assert not DataDir(tmp_path).cluster.exists()
    monkeypatch.undo()
    with Runtime(waits, data_dir=tmp_path):
        pass


def test_a_cluster_that_its_program_cannot_reach_is_ended_and_leaves_nothing(
    tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(self: Session, *arguments: object) -> None:
        raise BrokerUnavailable("no descriptors are left")

    monkeypatch.setattr(Session, "connect", unreachable)
    with pytest.raises(BrokerUnavailable, match="no descriptors"):
        Runtime(waits, data_dir=tmp_path).start()
    assert not sockets.exists()
    assert not DataDir(tmp_path).cluster.exists()


def test_a_cluster_that_is_killed_in_its_stop_is_not_on_record_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(pidfd: int, timeout: float | None) -> bool:
        monkeypatch.undo()
        raise KeyboardInterrupt

    runtime = Runtime(waits, data_dir=tmp_path).start()
    monkeypatch.setattr(node_handle, "wait_dead", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runtime.stop()
    assert not DataDir(tmp_path).cluster.exists()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path, aside: path.mkdir() or path.chmod(0o777), "other users have access to it"),
        (lambda path, aside: aside.mkdir(mode=0o700) or path.symlink_to(aside), "it is a symbolic link"),
    ],
)
def test_sockets_that_would_not_be_private_are_reported_to_the_caller(
    tmp_path: Path, sockets: Path, capfd: pytest.CaptureFixture[str], spoil: Any, why: str
) -> None:
    aside = tmp_path / "aside"
    spoil(sockets, aside)
    with pytest.raises(DataDirUnusable, match=why) as caught:
        Runtime(waits, data_dir=tmp_path).start()
    assert caught.value.path == sockets
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert sockets.exists()
    assert not DataDir(tmp_path).cluster.exists()


@pytest.mark.parametrize("name", ["lock", "cluster.json"])
def test_a_directory_in_place_of_a_file_is_reported_with_advice(tmp_path: Path, sockets: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DataDirUnusable, match=rf"{name} cannot be (opened|written).*move it away") as caught:
        Runtime(waits, data_dir=tmp_path).start()
    assert caught.value.path == tmp_path
    assert [each.name for each in tmp_path.iterdir() if each.name != "lock"] == [name][: name != "lock"]
    (tmp_path / name).rmdir()
    with Runtime(waits, data_dir=tmp_path):
        pass
