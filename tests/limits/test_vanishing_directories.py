"""Directories of a running or starting cluster that vanish, are read-only, or belong to another container."""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from stageflow_brokers.api import Listener
from stageflow_brokers.engine.engine import Engine
from stageflow_brokers.zeromq import client as zeromq_client
from stageflow_brokers.zeromq import listening_socket
from stageflow_brokers.zeromq import server as zeromq_server
from stageflow_brokers.zeromq.client import ZmqClient
from stageflow_brokers.zeromq.server import Server
from tests.fixtures.programs import STAGEFLOW

TIMEOUT_SECONDS = 60

PROGRAM = """
import os, shutil, signal, sys
from stageflow_actors import Runtime, Workflow

flow = Workflow("flow")

@flow.stage
def one(job: dict) -> str:
    if job.get("die") and not os.path.exists(job["die"]):
        open(job["die"], "w").close()
        os._exit(3)
    return "ran"

def run(runtime, **job):
    print(runtime.execute(flow, job, timeout=50).stages[0].data, flush=True)

if __name__ == "__main__":
    with Runtime(flow, data_dir=sys.argv[1]) as runtime:
        exec(open("body.py").read())
"""


@functools.cache
def _may_unshare() -> bool:
    try:
        return subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


needs_namespaces = pytest.mark.skipif(not _may_unshare(), reason="needs permission to create mount namespaces")


def _run(tmp_path: Path, body: str, data: Path | str, *, before: list[str] = [], **env: str) -> tuple[str, str, int]:  # noqa: B006
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "body.py").write_text(body)
    done = subprocess.run(
        [*before, sys.executable, str(tmp_path / "program.py"), str(data)],
        cwd=tmp_path,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    return done.stdout, done.stderr, done.returncode


@pytest.fixture
def base() -> Iterator[Path]:
    """A short private directory for sockets, as `/run/user/UID`."""
    made = Path(subprocess.run(["mktemp", "-d", "/tmp/run-XXXXXX"], capture_output=True, text=True).stdout.strip())
    yield made
    shutil.rmtree(made, ignore_errors=True)


def test_a_cluster_goes_on_when_the_directory_of_its_sockets_is_removed_at_logout(tmp_path: Path, base: Path) -> None:
    body = f"""
run(runtime)
shutil.rmtree({str(base)!r})
run(runtime)
run(runtime, die="died")  # another worker has to connect
with Runtime.connect(sys.argv[1]) as client:
    run(client)
"""
    out, err, code = _run(tmp_path, body, tmp_path / "data", XDG_RUNTIME_DIR=str(base))
    assert (out.split(), code) == (["ran"] * 4, 0), err
    moved = re.search(
        r"the broker's socket had been removed; the broker listens at ipc://(/tmp/stageflow-.*)/broker", err
    )
    assert moved is not None
    assert not Path(moved[1]).exists()
    assert not base.exists()


def test_a_broker_that_restarts_without_its_directory_is_found_by_program_node_and_workers(
    tmp_path: Path, base: Path
) -> None:
    body = f"""
import json, psutil
run(runtime)
shutil.rmtree({str(base)!r})
node = psutil.Process(json.load(open(sys.argv[1] + "/cluster.json"))["node"])
broker = next(child for child in node.children() if "stageflow_brokers" in " ".join(child.cmdline()))
broker.kill()
run(runtime)
"""
    out, err, code = _run(tmp_path, body, tmp_path / "data", XDG_RUNTIME_DIR=str(base))
    assert (out.split(), code) == (["ran"] * 2, 0), err


def test_a_socket_directory_that_a_cleaner_removes_is_made_again_at_its_place(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening_socket, "CHECK_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(zeromq_server, "IDLE_SECONDS", 0.01)
    directory = base / "stageflow-sockets"
    with _Serving(f"ipc://{directory}/broker"):
        first = ZmqClient(f"ipc://{directory}/broker", Listener())
        first.admin.ping().result(TIMEOUT_SECONDS)
        shutil.rmtree(directory)
        second = ZmqClient(f"ipc://{directory}/broker", Listener())
        second.admin.ping().result(TIMEOUT_SECONDS)
        first.admin.ping().result(TIMEOUT_SECONDS)
        assert directory.stat().st_mode & 0o777 == 0o700
        first.close()
        second.close()


def test_a_directory_that_cannot_be_made_again_is_named_once(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # `sockets` in a data directory: the data directory itself is never created again.
    directory = base / "data" / "sockets"
    directory.mkdir(parents=True, mode=0o700)
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    try:
        listening = listening_socket.ListeningSocket(router, f"ipc://{directory}/broker")
        monkeypatch.setattr(listening_socket, "CHECK_INTERVAL_SECONDS", 0.0)
        shutil.rmtree(directory.parent)
        listening.check(math.inf)
        listening.check(math.inf)
        listening.close()
    finally:
        router.close(0)
        context.term()
    assert [record.message.partition(",")[0] for record in caplog.records] == ["the directory of the broker's socket"]
    assert str(directory) in caplog.text
    assert not directory.parent.exists()


class _Serving:
    """A server of a memory engine, in a thread."""

    def __init__(self, address: str) -> None:
        self._server = Server(Engine(journal_dir=None), address)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._server.run, args=(self._stopping.is_set,))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(TIMEOUT_SECONDS)
        self._server.close()


@pytest.mark.parametrize("name", ["d" * 120, os.fsdecode(b"d\xff")], ids=["too long", "not UTF-8"])
def test_a_socket_whose_path_zeromq_cannot_use_is_reached(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zeromq_server, "IDLE_SECONDS", 0.01)
    monkeypatch.setattr(zeromq_client, "FIND_SECONDS", 0.01)
    directory = tmp_path / name / "sockets"
    directory.mkdir(parents=True, mode=0o700)
    address = f"ipc://{directory}/broker"
    with _Serving(address):
        client = ZmqClient(address, Listener())
        client.admin.ping().result(TIMEOUT_SECONDS)
    # Another directory with another broker takes the place of the first one.
    shutil.rmtree(directory)
    directory.mkdir(mode=0o700)
    with _Serving(address):
        client.admin.ping().result(TIMEOUT_SECONDS)
        client.close()


@needs_namespaces
@pytest.mark.parametrize("depth", ["short", "long" * 30], ids=["short", "long"])
def test_a_cluster_runs_where_only_its_data_directory_can_be_written(tmp_path: Path, depth: str) -> None:
    data = tmp_path / depth
    data.mkdir()
    read_only = (
        f"mount --bind {data} {data} && mount -o remount,ro,bind / && mount -t tmpfs -o ro none /dev/shm && "
        f"mount -t tmpfs -o ro none /run && (mountpoint -q /tmp && mount -o remount,ro,bind /tmp; true) && "
        '! touch /tmp/written 2>/dev/null && exec "$@"'
    )
    body = """
run(runtime)
with Runtime.connect(sys.argv[1]) as client:
    run(client)
"""
    out, err, code = _run(
        tmp_path, body, data, before=["unshare", "-m", "sh", "-c", read_only, "sh"], XDG_RUNTIME_DIR=""
    )
    assert (out.split(), code) == (["ran"] * 2, 0), err
    assert not (data / "sockets").exists()


@pytest.mark.parametrize(
    ("data", "code", "wanted"),
    [
        ("data", 1, "'data' is relative to the working directory of this program, which has been removed: change to"),
        ("absolute", 0, "ran"),
    ],
)
def test_a_working_directory_that_is_gone_is_named_or_does_not_matter(
    tmp_path: Path, data: str, code: int, wanted: str
) -> None:
    (tmp_path / "gone").mkdir()
    where = tmp_path / "data" if data == "absolute" else data
    leave = f'cd {tmp_path}/gone && rmdir {tmp_path}/gone && exec "$@"'
    (tmp_path / "program.py").write_text(PROGRAM.replace('"body.py"', repr(str(tmp_path / "body.py"))))
    (tmp_path / "body.py").write_text("run(runtime)\n")
    done = subprocess.run(
        ["sh", "-c", leave, "sh", sys.executable, str(tmp_path / "program.py"), str(where)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == code, done.stderr
    assert wanted in done.stdout + done.stderr


def test_workers_start_after_the_working_directory_was_removed(tmp_path: Path) -> None:
    body = f"""
run(runtime)
os.mkdir({str(tmp_path / "here")!r})
shutil.rmtree(os.getcwd())
run(runtime, die={str(tmp_path / "died")!r})
"""
    (tmp_path / "work").mkdir()
    (tmp_path / "program.py").write_text(PROGRAM.replace('"body.py"', repr(str(tmp_path / "body.py"))))
    (tmp_path / "body.py").write_text(body)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "data")],
        cwd=tmp_path / "work",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert (done.stdout.split(), done.returncode) == (["ran"] * 2, 0), done.stderr


def test_a_command_in_a_working_directory_that_is_gone_ends_with_one_line(tmp_path: Path) -> None:
    leave = f'mkdir -p {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; exec "$@"'
    for command in (["queue", "list"], ["graph", "orders:flow"]):
        done = subprocess.run(
            ["sh", "-c", leave, "sh", *STAGEFLOW, *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        assert done.returncode in (1, 2)
        assert "has been removed: change to a directory that exists" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda env: {name: value for name, value in env.items() if name not in (b"HOME", b"USER", b"LOGNAME")},
        lambda env: {**env, b"NOT_TEXT": b"x\xfe\xff", b"NAME_\xff": b"1"},
        lambda env: {**env, b"LC_ALL": b"POSIX", b"PYTHONUTF8": b"0", b"PYTHONCOERCECLOCALE": b"0"},
    ],
    ids=["no home", "not UTF-8", "ASCII locale"],
)
def test_an_environment_without_a_home_or_without_utf8_is_no_obstacle(
    tmp_path: Path, change: Callable[[dict[bytes, bytes]], dict[bytes, bytes]]
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "body.py").write_text("run(runtime)\n")
    done = subprocess.run(
        [sys.executable, "program.py", os.fsencode(tmp_path) + b"/data-\xff"],
        cwd=tmp_path,
        env=change(dict(os.environb)),
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert (done.stdout.split(), done.returncode) == ([b"ran"], 0), done.stderr.decode(errors="replace")


@pytest.mark.skipif(
    not _may_unshare()
    or subprocess.run(["unshare", "--user", "--map-user=54321", "true"], capture_output=True).returncode != 0,
    reason="needs permission to create user namespaces",
)
def test_a_user_id_without_a_name_is_no_obstacle(tmp_path: Path) -> None:
    before = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    out, err, code = _run(tmp_path, "run(runtime)\n", tmp_path / "data", before=before, HOME="/nowhere")
    assert (out.split(), code) == (["ran"], 0), err


@needs_namespaces
def test_a_cluster_of_another_container_is_named_as_such(tmp_path: Path, base: Path) -> None:
    body = "print('up', flush=True)\nsys.stdin.read()\n"
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "body.py").write_text(body)
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "sh", "-c"]
    with subprocess.Popen(
        [*container, 'hostname box; exec "$@"', "sh", sys.executable, "program.py", "data"],
        cwd=tmp_path,
        env={**os.environ, "XDG_RUNTIME_DIR": str(base)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "up\n"

        def stageflow(*arguments: str, before: tuple[str, ...] = ()) -> tuple[int, str]:
            done = subprocess.run(
                [*before, *STAGEFLOW, *arguments, "--data", str(tmp_path / "data")],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
            )
            return done.returncode, done.stdout + done.stderr

        code, text = stageflow("health")  # its socket is visible here: the cluster can be used
        assert (code, text.strip()) == (0, "healthy")
        hide = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs none {base} && exec "$@"', "sh")
        code, text = stageflow("instances", "list", before=hide)
        assert code == 1
        assert "runs in another container (host name 'box'), whose socket" in text
        (tmp_path / "body.py").write_text("")
        _, err, code = _run(tmp_path, "run(runtime)\n", tmp_path / "data")
        assert code == 1
        assert "was started in another container (host name 'box'): stop that container" in err
        program.stdin.close()  # type: ignore[union-attr]
        assert program.wait(TIMEOUT_SECONDS) == 0


@pytest.mark.parametrize("part", ["", "journal", "history.db"], ids=["all", "journal", "history"])
def test_data_that_is_removed_while_the_cluster_runs_ends_it_and_is_not_replaced_by_empty_data(
    tmp_path: Path, part: str
) -> None:
    data = tmp_path / "data"
    body = f"""
run(runtime)
part = os.path.join(sys.argv[1], {part!r})
(os.unlink if os.path.isfile(part) else shutil.rmtree)(part)
while True:
    runtime.execute(flow, {{}}, timeout=50)
"""
    _, err, code = _run(tmp_path, body, data)
    assert code == 1
    missing = data / part if part else data
    notice, _, rest = err.partition("\n")
    assert notice.startswith(f"stageflow: the data directory {data} cannot be used: {missing} was removed or replaced")
    assert "Restore the directory from a backup" in rest.splitlines()[-1]
    assert "Unhandled exception" not in err
    assert not missing.exists()


def test_a_removed_data_directory_is_noticed_at_the_end_if_not_before(tmp_path: Path) -> None:
    body = "run(runtime)\nshutil.rmtree(sys.argv[1])\nruntime.stop()\n"
    out, err, _ = _run(tmp_path, body, tmp_path / "data")
    assert out.split() == ["ran"]
    assert err.count("was removed or replaced while its cluster ran") == 1
    assert not (tmp_path / "data").exists()
