"""Real workers of a real zygote, started and killed."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

import stageflow_actors
from stageflow_actors.runtime.ipc.slots import SlotTable
from stageflow_actors.runtime.system.processes import kill_group, wait_dead
from stageflow_actors.runtime.zygote.handle import Event, Exited, Spawned, ZygoteGone, ZygoteHandle, describe_exit

HERE = str(Path(__file__).parent)
PACKAGES = [HERE, str(Path(stageflow_actors.__file__).parents[1]), *sys.path]
PATIENCE = 20.0


class Node:
    """A zygote, a pipe on which its workers talk, and everything that was heard of them."""

    def __init__(self, slots: SlotTable | None = None, path: str = HERE, **options: object) -> None:
        self.hear, self.talk = os.pipe()
        self.go_read, self.go_write = os.pipe()
        self.zygote = ZygoteHandle(
            "zygote_entries:entry",
            slots=slots,
            keep_fds=[self.talk, self.go_read],
            sys_path=[path, *PACKAGES],
            **options,  # type: ignore[arg-type]
        )
        self.zygote.start()
        self.heard: list[Event] = []
        self.lines = os.fdopen(self.hear, "rb", buffering=0)
        self._rest = b""

    def spawn(self, worker_id: str, *command: object, **options: object) -> None:
        self.zygote.spawn(worker_id, json.dumps(command).encode(), **options)  # type: ignore[arg-type]

    def until(self, enough: Callable[[], object]) -> None:
        """Takes events until `enough`; fails when it takes too long."""
        poller = select.poll()
        poller.register(self.zygote.fileno(), select.POLLIN)
        while not enough():
            assert poller.poll(PATIENCE * 1000), f"nothing more came after {self.heard}"
            self.heard += self.zygote.events()

    def spawned(self, worker_id: str) -> Spawned:
        self.until(lambda: any(isinstance(each, Spawned) and each.worker_id == worker_id for each in self.heard))
        return next(each for each in self.heard if isinstance(each, Spawned) and each.worker_id == worker_id)

    def exited(self, worker_id: str) -> Exited:
        self.until(lambda: any(isinstance(each, Exited) and each.worker_id == worker_id for each in self.heard))
        return next(each for each in self.heard if isinstance(each, Exited) and each.worker_id == worker_id)

    def line(self) -> str:
        """The next line that a worker wrote."""
        poller = select.poll()
        poller.register(self.hear, select.POLLIN)
        while b"\n" not in self._rest:
            assert poller.poll(PATIENCE * 1000), "no worker says anything"
            self._rest += os.read(self.hear, 65_536)
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def close(self) -> None:
        self.zygote.close()
        for each in self.heard:
            if isinstance(each, Spawned):
                os.close(each.pidfd)
        self.lines.close()
        for fd in (self.talk, self.go_read, self.go_write):
            os.close(fd)


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.close()


def is_dead(pid: int) -> bool:
    """Waits for the end of a process that is not ours."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return wait_dead(pidfd, PATIENCE)
    finally:
        os.close(pidfd)


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_twenty_workers_live_and_one_that_is_killed_is_reported_alone(node: Node) -> None:
    for n in range(20):
        node.spawn(f"w{n}", "hang", node.talk)
    pids = {f"w{n}": node.spawned(f"w{n}").pid for n in range(20)}
    assert sorted(int(node.line()) for _ in pids) == sorted(pids.values())
    os.kill(pids["w7"], signal.SIGKILL)
    assert node.exited("w7") == Exited("w7", pids["w7"], -signal.SIGKILL)
    assert [each for each in node.heard if isinstance(each, Exited)] == [node.exited("w7")]
    assert len(children_of(node.zygote.pid)) == 19
    node.zygote.close()
    assert all(is_dead(pid) for pid in pids.values())


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("leave", 0), 0),
        (("leave", 3), 3),
        (("leave", None), 0),
        (("system_exit", 9), 9),
        (("system_exit", None), 0),
        (("system_exit", "in words"), 1),
        (("fail",), 70),
        (("no_such_function",), 70),
        (("segfault",), -signal.SIGSEGV),
    ],
)
def test_how_a_worker_ends_is_reported(node: Node, command: tuple[object, ...], status: int) -> None:
    node.spawn("w", *command)
    assert node.exited("w").status == status
    assert [type(each) for each in node.heard] == [Spawned, Exited]
    assert wait_dead(node.spawned("w").pidfd, 0)


def test_a_traceback_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with closing(Node()) as node:
        node.spawn("w", "fail")
        node.exited("w")
    said = capfd.readouterr()
    assert "ValueError: this worker fails" in said.err
    assert said.out == ""


def test_no_zombies_are_left(node: Node) -> None:
    for n in range(10):
        node.spawn(f"w{n}", "leave", n)
    for n in range(10):
        assert node.exited(f"w{n}").status == n
    assert children_of(node.zygote.pid) == []


def test_a_payload_of_megabytes_arrives(node: Node) -> None:
    node.spawn("w", "size", node.talk, "x" * 5_000_000)
    assert node.line() == "5000000"
    assert node.exited("w").status == 0


def test_a_worker_has_its_environment_path_directory_and_session(tmp_path: Path) -> None:
    with closing(Node(cwd=str(tmp_path), path=str(tmp_path))) as node:
        node.spawn("w", "environment", node.talk, "OMP_NUM_THREADS", env={"OMP_NUM_THREADS": "7"})
        told = json.loads(node.line())
        node.spawn("plain", "environment", node.talk, "OMP_NUM_THREADS")
        plain = json.loads(node.line())
    assert told == {
        "value": "7",
        "cwd": str(tmp_path),
        "path": [str(tmp_path)],
        "session": True,
        "argv": [],
        "threads": 1,
    }
    assert plain["value"] == os.environ.get("OMP_NUM_THREADS")


def test_a_worker_holds_nothing_of_the_zygotes_or_of_other_workers(node: Node) -> None:
    node.spawn("other", "hang", node.talk)
    node.line()
    node.spawn("w", "descriptors", node.talk)
    open_fds = json.loads(node.line())
    assert not [target for target in open_fds.values() if target.startswith("socket:") or "pidfd" in target]
    assert {str(node.talk), str(node.go_read)} <= set(open_fds)


def test_libraries_are_imported_before_the_fork_and_no_zeromq_context_exists(node: Node) -> None:
    node.spawn("w", "imported", node.talk)
    assert json.loads(node.line()) == [True, True, True]


def test_a_worker_ignores_ctrl_c_and_the_programs_it_starts_do_not(node: Node) -> None:
    node.spawn("w", "wait_for_byte", node.talk, node.go_read)
    pid = int(node.line())
    os.kill(pid, signal.SIGINT)
    os.write(node.go_write, b"\x05")
    assert node.exited("w").status == 5
    node.spawn("parent", "hang_with_children", node.talk)
    _, child, _ = node.line().split()
    ignored = next(
        line for line in Path(f"/proc/{child}/status").read_text().splitlines() if line.startswith("SigIgn:")
    )
    assert not int(ignored.split()[1], 16) & (1 << (signal.SIGINT - 1))


def test_killing_a_worker_takes_its_children_with_it(node: Node) -> None:
    node.spawn("w", "hang_with_children", node.talk)
    pids = [int(pid) for pid in node.line().split()]
    spawned = node.spawned("w")
    kill_group(spawned.pid, spawned.pidfd)
    assert wait_dead(spawned.pidfd, PATIENCE)
    assert all(is_dead(pid) for pid in pids)
    assert node.exited("w").status == -signal.SIGKILL


def test_children_of_a_worker_that_exits_are_gone_when_it_is_reported(node: Node) -> None:
    node.spawn("w", "leave_children", node.talk)
    _, *children = [int(pid) for pid in node.line().split()]
    assert node.exited("w").status == 4
    assert all(is_dead(pid) for pid in children)


def test_killing_a_group_twice_or_late_harms_no_other_process(node: Node) -> None:
    node.spawn("w", "hang", node.talk)
    spawned = node.spawned("w")
    kill_group(spawned.pid, spawned.pidfd)
    kill_group(spawned.pid, spawned.pidfd)
    node.exited("w")
    kill_group(spawned.pid, spawned.pidfd)  # reaped by now
    kill_group(os.getpid(), spawned.pidfd)  # as if its number had been given to us
    assert os.getpid() > 0


def test_workers_die_with_a_zygote_that_is_killed(node: Node) -> None:
    for n in range(3):
        node.spawn(f"w{n}", "hang", node.talk)
    pids = [int(node.line()) for _ in range(3)]
    node.until(lambda: len(node.heard) == 3)
    os.kill(node.zygote.pid, signal.SIGKILL)
    node.until(lambda: ZygoteGone(-signal.SIGKILL) in node.heard)
    assert all(is_dead(pid) for pid in pids)
    node.spawn("late", "leave", 0)  # lost without harm, as announced
    assert node.zygote.events() == []


def test_children_of_workers_can_be_killed_after_the_zygote_and_they_are_gone(node: Node) -> None:
    node.spawn("w", "hang_with_children", node.talk)
    pids = [int(pid) for pid in node.line().split()]
    spawned = node.spawned("w")
    os.kill(node.zygote.pid, signal.SIGKILL)
    node.until(lambda: ZygoteGone(-signal.SIGKILL) in node.heard)
    assert wait_dead(spawned.pidfd, PATIENCE)
    kill_group(spawned.pid, spawned.pidfd)
    assert all(is_dead(pid) for pid in pids)


def test_children_are_found_even_when_their_session_leader_has_been_reaped() -> None:
    leader = subprocess.Popen(
        ["sh", "-c", "sleep 3600 >/dev/null & echo $!"], stdout=subprocess.PIPE, start_new_session=True, text=True
    )
    pidfd = os.pidfd_open(leader.pid)
    output, _ = leader.communicate()
    kill_group(leader.pid, pidfd)
    os.close(pidfd)
    assert is_dead(int(output))


def test_a_zygote_ignores_what_is_meant_for_the_program(node: Node) -> None:
    node.spawn("first", "leave", 0)
    node.exited("first")  # so that it is up
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(node.zygote.pid, number)
    node.spawn("w", "leave", 2)
    assert node.exited("w").status == 2
    assert os.getsid(node.zygote.pid) == node.zygote.pid


@pytest.mark.timeout(60)
def test_a_node_that_does_not_listen_for_a_while_does_not_block_the_zygote(node: Node) -> None:
    # Far more reports than the zygote's socket holds, and few requests in the node's: each side would wait for the
    # other forever if the zygote blocked.
    node.zygote._connection().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    for n in range(300):
        node.spawn(f"w{n}", "leave", 0)
    node.until(lambda: len(node.heard) == 600)
    assert sorted(type(each).__name__ for each in node.heard) == ["Exited"] * 300 + ["Spawned"] * 300


def test_a_worker_writes_its_slot(tmp_path: Path) -> None:
    slots = SlotTable.create(3)
    with closing(Node(slots)) as node:
        node.spawn("w", "hang", node.talk, slot=2)
        node.line()
        state = slots[2].read()
        idle = slots[1].read()
        node.spawn("x", "leave", 0)
        node.exited("x")
    slots.close()
    assert (state.message_id, state.started, state.finished, state.is_busy) == (1_001, 1, 0, True)
    assert idle.started == 0


def test_a_zygote_whose_imports_fail_reports_it_by_its_exit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "needy.py").write_text("import not_installed")
    with closing(Node(path=str(tmp_path), preload=["needy"])) as node:
        node.until(lambda: ZygoteGone(1) in node.heard)
    assert "No module named 'not_installed'" in capfd.readouterr().err


def test_a_preload_that_starts_a_thread_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "busy.py").write_text(
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"
    )
    with closing(Node(path=str(tmp_path), preload=["busy"])) as node:
        node.until(lambda: ZygoteGone(1) in node.heard)
    assert "must have one thread" in capfd.readouterr().err


def test_a_preload_that_is_not_installed_is_not_needed() -> None:
    with closing(Node(preload=["not_installed", "zygote_entries.nothing"])) as node:
        node.spawn("w", "leave", 6)
        assert node.exited("w").status == 6


NODE = """
import json, os, signal, sys
from stageflow_actors.runtime.zygote.handle import ZygoteHandle
read, write = os.pipe()
zygote = ZygoteHandle("zygote_entries:entry", keep_fds=[write], sys_path=sys.path)
zygote.start()
for n in range(4):
    zygote.spawn(f"w{n}", json.dumps(["hang_with_children", write]).encode())
lines = os.fdopen(read, buffering=1)
print(zygote.pid, *(lines.readline().strip() for _ in range(4)), flush=True)
signal.pause()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_node_dies_nothing_that_came_from_it_lives_a_second_later(how: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in PACKAGES if each)}
    node = subprocess.Popen([sys.executable, "-c", NODE], stdout=subprocess.PIPE, text=True, env=environment)
    with node:
        assert node.stdout is not None
        pids = [int(pid) for pid in node.stdout.readline().split()]
        assert len(pids) == 1 + 4 * 3
        pidfds = [os.pidfd_open(pid) for pid in pids]
        start = time.monotonic()
        node.send_signal(how)
    try:
        assert all(wait_dead(pidfd, start + 1.0 - time.monotonic()) for pidfd in pidfds)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (-11, "killed by SIGSEGV (segmentation fault)"),
        (-9, "killed by SIGKILL (out of memory, or killed by a person)"),
        (-10, "killed by SIGUSR1"),
        (-40, "killed by signal 40"),
    ],
)
def test_an_end_is_described_in_words(status: int, words: str) -> None:
    assert describe_exit(status) == words
