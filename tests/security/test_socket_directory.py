"""The socket directory must be private to this user; broker and client both check it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from stageflow_actors.runtime.messaging.connect import connect
from stageflow_actors.runtime.system import data_dir, socket_dir
from stageflow_actors.runtime.system.data_dir import DataDirUnusable
from stageflow_actors.runtime.system.socket_dir import remove_runtime_dir, runtime_dir
from stageflow_brokers.api import Listener
from stageflow_brokers.engine.engine import Engine
from stageflow_brokers.errors import SocketNotPrivate
from stageflow_brokers.zeromq import access
from stageflow_brokers.zeromq.access import check_address, check_listener
from stageflow_brokers.zeromq.client import ZmqClient
from stageflow_brokers.zeromq.server import Server


@pytest.fixture
def open_door(tmp_path: Path) -> Path:
    """A directory that others may look into."""
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o755)
    return directory


def test_a_broker_listens_in_no_directory_that_others_have_access_to(open_door: Path) -> None:
    engine = Engine(journal_dir=None)
    with pytest.raises(SocketNotPrivate, match=r"other users have access to it \(mode 755\).*mode 0700"):
        Server(engine, f"ipc://{open_door}/broker")
    assert list(open_door.iterdir()) == []


def test_a_client_sends_nothing_to_a_socket_in_a_directory_that_others_can_access(open_door: Path) -> None:
    with socket.socket(socket.AF_UNIX) as trap:
        trap.bind(str(open_door / "broker"))
        trap.listen()
        trap.setblocking(False)
        with pytest.raises(SocketNotPrivate, match="other users have access"):
            ZmqClient(f"ipc://{open_door}/broker", Listener())
        with pytest.raises(DataDirUnusable, match="other users have access") as caught:
            connect(f"ipc://{open_door}/broker", Listener(), role="client", name="c")
        assert caught.value.path == open_door
        with pytest.raises(BlockingIOError):
            trap.accept()


def test_a_symbolic_link_in_place_of_the_directory_is_refused_on_both_sides(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(real)
    for use in (lambda: Server(Engine(journal_dir=None), f"ipc://{link}/b"), lambda: check_address(f"ipc://{link}/b")):
        with pytest.raises(SocketNotPrivate, match="symbolic link"):
            use()
    check_address(f"ipc://{real}/b")


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    me = os.geteuid()
    monkeypatch.setattr(access.os, "geteuid", lambda: me + 1)
    with pytest.raises(SocketNotPrivate, match=f"belongs to user id {me}, but this process has user id {me + 1}"):
        check_address(f"ipc://{tmp_path}/broker")


def test_what_is_no_directory_is_refused_and_one_that_is_not_there_yet_only_by_the_broker(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SocketNotPrivate, match="not a directory"):
        check_address(f"ipc://{tmp_path}/file/broker", missing_ok=True)
    check_address(f"ipc://{tmp_path}/absent/broker", missing_ok=True)
    with pytest.raises(SocketNotPrivate, match="mode 0700"):
        check_address(f"ipc://{tmp_path}/absent/broker")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:5555", "ipc://@abstract", "inproc://here", "ipc://"])
def test_an_address_without_a_door_is_refused(address: str) -> None:
    for missing_ok in (False, True):
        with pytest.raises(SocketNotPrivate, match="is not in a private directory"):
            check_address(address, missing_ok=missing_ok)


def test_a_listener_of_another_user_is_found_out_by_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as connection:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        connection.connect(str(tmp_path / "s"))
        check_listener(connection.fileno())
        me = os.geteuid()
        monkeypatch.setattr(access.os, "geteuid", lambda: me + 1)
        with pytest.raises(SocketNotPrivate, match=f"process {os.getpid()} of user id {me}"):
            check_listener(connection.fileno())
        gone = connection.detach()
        os.close(gone)
        check_listener(gone)


class Ears(Listener):
    """Remembers why the connection ended."""

    def __init__(self) -> None:
        self.reason = ""

    def on_closed(self, reason: str) -> None:
        self.reason = reason


def test_a_directory_that_is_replaced_while_the_broker_is_away_is_not_talked_to(tmp_path: Path, eventually) -> None:  # type: ignore[no-untyped-def]
    directory = tmp_path / "sockets"
    ears = Ears()
    client = ZmqClient(f"ipc://{directory}/broker", ears)
    try:
        directory.mkdir()
        directory.chmod(0o777)
        with socket.socket(socket.AF_UNIX) as trap:
            trap.bind(str(directory / "broker"))
            trap.listen()
            said, _ = trap.accept()
            with said:
                eventually(lambda: ears.reason, "the end of the connection")
                assert "has been closed" in ears.reason
                assert "other users have access" in ears.reason
                said.settimeout(20)
                heard = b"".join(iter(lambda: said.recv(65536), b""))
        # The greeting of ZeroMQ itself, and not a word of ours.
        assert len(heard) <= 64
    finally:
        client.close(0)


# what the runtime makes


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short directory of this user's, where the sockets' directory is to be made."""
    made = Path("/tmp") / f"sf-{os.getpid()}"
    made.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(made))
    yield made
    shutil.rmtree(made)


def test_the_umask_takes_nothing_away_from_the_sockets_directory(base: Path, tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        path = runtime_dir(tmp_path)
    finally:
        os.umask(before)
    assert path.parent == base
    assert path.stat().st_mode & 0o777 == 0o700
    check_address(f"ipc://{path}/broker")
    remove_runtime_dir(path)


@pytest.mark.parametrize(("mode", "taken"), [(0o700, True), (0o755, True), (0o1777, True), (0o777, False)])
def test_a_directory_in_which_others_can_replace_what_is_there_is_passed_over(
    base: Path, tmp_path: Path, mode: int, taken: bool
) -> None:
    base.chmod(mode)
    path = runtime_dir(tmp_path)
    assert (path.parent == base) is taken
    remove_runtime_dir(path)


def test_a_sockets_directory_of_another_user_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = runtime_dir(tmp_path)
    me = os.geteuid()
    monkeypatch.setattr(socket_dir, "runtime_path", lambda data: path)  # its name has the id of the user, too
    monkeypatch.setattr(data_dir.os, "geteuid", lambda: me + 1)
    with pytest.raises(DataDirUnusable, match=f"belongs to user id {me}"):
        runtime_dir(tmp_path)


def test_a_file_in_place_of_the_sockets_directory_is_refused(base: Path, tmp_path: Path) -> None:
    path = runtime_dir(tmp_path)
    path.rmdir()
    path.touch()
    with pytest.raises(DataDirUnusable, match="not a directory"):
        runtime_dir(tmp_path)


@pytest.mark.parametrize("kind", sorted(data_dir.NETWORK_FILE_SYSTEMS))
def test_no_data_directory_on_a_network_file_system_is_taken(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_text = Path.read_text
    mounts = f"/dev/root / ext4 rw 0 0\nserver:/export {tmp_path} {kind} rw 0 0\n"
    monkeypatch.setattr(
        Path, "read_text", lambda self, **how: mounts if str(self) == "/proc/self/mounts" else read_text(self, **how)
    )
    data = tmp_path / "data"
    with pytest.raises(DataDirUnusable, match=rf"network file system \({kind}, mounted at .*local disk and copy"):
        data_dir.DataDir(data)


def test_the_types_of_file_systems_that_are_known_to_be_remote_are_all_there() -> None:
    known = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "9p", "lustre", "gpfs", "ceph", "afs", "glusterfs"}
    assert known <= data_dir.NETWORK_FILE_SYSTEMS
    assert not {"ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "f2fs", "apfs"} & data_dir.NETWORK_FILE_SYSTEMS
