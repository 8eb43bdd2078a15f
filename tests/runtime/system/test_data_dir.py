"""Ownership and locking of a data directory."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stageflow_actors.errors import JournalLocked
from stageflow_actors.runtime.system import data_dir
from stageflow_actors.runtime.system.data_dir import ClusterRecord, DataDir, DataDirUnusable, file_system_of
from stageflow_actors.runtime.system.processes import start_ticks
from stageflow_actors.runtime.system.socket_dir import remove_runtime_dir, runtime_dir


@pytest.fixture
def ended_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def hold(fd: int) -> subprocess.Popen[bytes]:
    """A process of the cluster: it has inherited the lock and lives until its stdin ends."""
    return subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[fd])


def test_a_new_directory_is_private_and_an_old_one_is_left_as_it_is(tmp_path: Path) -> None:
    made = DataDir(tmp_path / "deep" / "data")
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    tmp_path.chmod(0o755)
    DataDir(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert (made.journal.name, made.history.name) == ("journal", "history.db")
    assert made.journal.is_relative_to(made.path)


def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(DataDirUnusable, match="cannot be used"):
            DataDir(path)
    with pytest.raises(DataDirUnusable, match="does not exist"):
        DataDir(tmp_path / "absent", create=False)
    assert not (tmp_path / "absent").exists()


def test_a_second_program_is_refused_at_once_with_advice(tmp_path: Path) -> None:
    first = DataDir(tmp_path)
    first.acquire(os.getpid())
    with pytest.raises(JournalLocked, match=r"Runtime\.connect") as caught:
        DataDir(tmp_path).acquire(os.getpid(), wait=3600)
    assert caught.value.pid == os.getpid()
    assert caught.value.data_dir == str(tmp_path)
    first.release()
    second = DataDir(tmp_path)
    second.acquire(os.getpid(), wait=0)
    second.release()


OPENING_AND_CLOSING = """
import os, sys
os.dup2(int(sys.argv[1]), 200)
os.close(int(sys.argv[1]))
print("ready", flush=True)
while True:
    for fd in [os.open("/dev/null", os.O_RDONLY) for _ in range(50)]:
        os.close(fd)
"""


def test_a_process_that_opens_and_closes_files_concurrently_is_seen_to_hold_the_lock(tmp_path: Path) -> None:
    data = DataDir(tmp_path)
    fd = data.acquire(os.getpid())
    command = [sys.executable, "-c", OPENING_AND_CLOSING, str(fd)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[fd]) as starting:
        try:
            assert starting.stdout is not None
            starting.stdout.readline()
            assert [data.holders() for _ in range(30)] == [[starting.pid]] * 30
        finally:
            starting.kill()
    data.release()


def test_the_lock_is_held_until_the_last_process_that_inherited_it_has_ended(tmp_path: Path, ended_pid: int) -> None:
    first = DataDir(tmp_path)
    remains = hold(first.acquire(ended_pid))
    first.release()
    with remains:
        second = DataDir(tmp_path)
        with pytest.raises(JournalLocked, match=f"{ended_pid}.*has ended, but process {remains.pid}"):
            second.acquire(os.getpid(), wait=0)
        assert second.holders() == [remains.pid]
        done = threading.Event()

        def acquire() -> None:
            second.acquire(os.getpid(), wait=20)
            done.set()

        waiting = threading.Thread(target=acquire)
        waiting.start()
        assert not done.is_set()
        assert remains.stdin is not None
        remains.stdin.close()
        waiting.join()
    assert done.is_set()
    second.release()


def test_a_number_used_again_by_another_process_is_not_the_old_program(tmp_path: Path) -> None:
    first = DataDir(tmp_path)
    remains = hold(first.acquire(os.getpid()))
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    first.write_cluster(ClusterRecord(program=os.getpid(), program_ticks=ticks - 1))
    first.release()
    with remains:
        with pytest.raises(JournalLocked, match="has ended"):
            DataDir(tmp_path).acquire(os.getpid(), wait=0)
        remains.kill()
    DataDir(tmp_path).acquire(os.getpid(), wait=20)


def test_the_record_of_the_cluster_is_read_as_written_and_damage_is_no_record(tmp_path: Path) -> None:
    data = DataDir(tmp_path)
    assert data.read_cluster() is None
    record = ClusterRecord(program=1, program_ticks=2, node=3, address="ipc:///run/x", started=4.5)
    data.write_cluster(record)
    assert data.read_cluster() == record
    for damage in (
        b"",
        b"{",
        b'{"program": "x"}',
        b"\xff\xfe",
        b'{"program": 1, "address": "\xff"}',
        b'{"program": 1, "address": "\\ud800"}',
        b'{"program": 1, "address": "ipc:///run/a\\u0000b"}',
        b'{"program": 1, "address": ""}',
        b'{"program": 1, "address": ["ipc:///run/x"]}',
        b'{"program": 1, "node": "2"}',
        b'{"program": 1' + b"0" * 5000 + b"}",
        b'{"program": 1, "more": ' + b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
    ):
        data.cluster.write_bytes(damage)
        assert data.read_cluster() is None
    data.remove_cluster()
    data.remove_cluster()
    assert [each.name for each in tmp_path.iterdir()] == []


def test_a_program_that_is_a_zombie_does_not_live(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(process.pid)
    record = ClusterRecord(program=process.pid)
    from stageflow_actors.runtime.system.processes import wait_dead

    assert wait_dead(pidfd, 20)
    os.close(pidfd)
    assert not record.is_program_alive()
    process.wait()
    assert ClusterRecord(program=os.getpid()).is_program_alive()


MOUNTS = """\
/dev/vda / ext4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/export /home nfs4 rw 0 0
/dev/vdb /home/local xfs rw 0 0
share /mnt/my\\040share cifs rw 0 0
old /over nfs rw 0 0
new /over ext4 rw 0 0
x /homely fuse.sshfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/data", "ext4"),
        ("/home/user/data", "nfs4"),
        ("/home/local/data", "xfs"),
        ("/mnt/my share/data", "cifs"),
        ("/over/data", "ext4"),
        ("/homely/data", "fuse.sshfs"),
        ("/homes/data", "ext4"),
    ],
)
def test_the_file_system_is_that_of_the_longest_mount_point(path: str, kind: str) -> None:
    assert file_system_of(Path(path), MOUNTS)[0] == kind


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "9p", "fuse.sshfs", "lustre", "ceph", "glusterfs", "afs"])
def test_a_network_file_system_is_refused_with_advice(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataDirUnusable, match=rf"network file system \({kind}.*local disk"):
        data_dir._check_local_disk(tmp_path, f"x / {kind} rw 0 0\n")


@pytest.mark.parametrize("kind", ["vboxsf", "prl_fs", "vmhgfs", "fuse.vmhgfs-fuse"])
def test_a_shared_folder_of_a_hypervisor_is_refused_with_advice(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataDirUnusable, match=rf"shared folder .*\({kind}.*local disk"):
        data_dir._check_local_disk(tmp_path, f"x / {kind} rw 0 0\n")


@pytest.mark.parametrize(
    "kind", ["fuse", "fuse.blobfuse2", "fuse.mount-s3", "fuse.fuse-nfs", "fuse.hdfs", "fuse.of-tomorrow"]
)
def test_a_fuse_file_system_that_is_not_known_to_be_local_is_refused_with_advice(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataDirUnusable, match=rf"not in the list of local ones \({kind}, .*local disk"):
        data_dir._check_local_disk(tmp_path, f"x / {kind} rw 0 0\n")


@pytest.mark.parametrize(
    "kind",
    [
        "ext4",
        "xfs",
        "tmpfs",
        "overlay",
        "virtiofs",
        "fuseblk",
        "fuse.bindfs",
        "fuse.encfs",
        "fuse.fuse-overlayfs",
        "fuse.gocryptfs",
        "fuse.mergerfs",
        "fuse.unionfs",
    ],
)
def test_a_local_file_system_is_taken(kind: str, tmp_path: Path) -> None:
    data_dir._check_local_disk(tmp_path, f"x / {kind} rw 0 0\n")


@pytest.mark.parametrize(("part", "word"), [("journal", "journal"), ("history.db", "history")])
def test_a_journal_or_history_that_lies_elsewhere_is_looked_at_too(part: str, word: str, tmp_path: Path) -> None:
    data, share = tmp_path / "data", tmp_path / "share"
    data.mkdir()
    share.mkdir()
    linked = f"x / ext4 rw 0 0\ny {share} nfs4 rw 0 0\n"
    mounted = f"x / ext4 rw 0 0\ny {data / part} nfs4 rw 0 0\n"
    data_dir._check_local_disk(data, linked)
    (data / part).touch()
    for mounts in (mounted, linked):
        with pytest.raises(DataDirUnusable, match=rf"the {word} .*network file system \(nfs4") as caught:
            data_dir._check_local_disk(data, mounts)
        assert caught.value.path == data / part
        (data / part).unlink()
        (data / part).symlink_to(share / "not-there-yet")


@pytest.fixture
def umask() -> Iterator[None]:
    """New files give other users no access."""
    before = os.umask(0o777)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_a_new_directory_is_its_owners_whatever_the_umask_takes_away(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "deep" / "data")
    data.acquire(os.getpid())
    data.release()
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (data.path.parent, data.path, data.lock, data.cluster)}
    assert list(modes.values()) == [0o700, 0o700, 0o600, 0o600], modes


def test_sockets_lie_in_a_short_private_directory_that_is_always_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp")
    data = tmp_path / ("long" * 30)
    data.mkdir()
    path = runtime_dir(data)
    try:
        assert runtime_dir(data) == path
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert len(str(path / "broker-12345.socket")) <= 107
        assert runtime_dir(tmp_path) != path
        path.chmod(0o750)
        with pytest.raises(DataDirUnusable, match="other users have access"):
            runtime_dir(data)
    finally:
        remove_runtime_dir(path)
        remove_runtime_dir(runtime_dir(tmp_path))
    assert not path.exists()


def test_a_symbolic_link_in_place_of_the_sockets_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp")
    path = runtime_dir(tmp_path)
    remove_runtime_dir(path)
    path.symlink_to(tmp_path)
    try:
        with pytest.raises(DataDirUnusable, match="not a directory"):
            runtime_dir(tmp_path)
    finally:
        path.unlink()


def test_a_base_directory_too_long_for_sockets_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("d" * 100)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    path = runtime_dir(tmp_path)
    remove_runtime_dir(path)
    assert not path.is_relative_to(long)


def test_the_parents_death_is_seen_by_a_child() -> None:
    watch = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', '''\n"
        "from stageflow_actors.runtime.system.processes import parent_death_fd, wait_dead\n"
        "fd = parent_death_fd()\n"
        "print('watching', flush=True)\n"
        "print(wait_dead(fd, 20), flush=True)\n"
        "'''], stdout=subprocess.PIPE)\n"
    )
    # The child is watched by reading its output through a pipe that outlives the parent.
    read, write = os.pipe()
    code = watch.replace("stdout=subprocess.PIPE", f"stdout={write}") + "sys.stdin.read()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, pass_fds=[write])
    os.close(write)
    with os.fdopen(read) as lines:
        assert lines.readline() == "watching\n"
        parent.kill()
        parent.wait()
        assert parent.stdin is not None
        parent.stdin.close()
        assert lines.readline() == "True\n"
