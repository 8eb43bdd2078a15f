"""Broken set-ups, and what is printed: the cause, the place and the remedy, once, without our own frames.

Each entry is a set-up that a reader who knew nothing of the product had to explain from the printed text alone.
"""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.fixtures.programs import STAGEFLOW

TIMEOUT_SECONDS = 120


class SetUp(NamedTuple):
    """A program and a command; `causes` must be printed, each once. A command that serves is stopped after them."""

    code: str
    command: list[str]
    causes: list[str]
    files: dict[str, bytes] = {}
    serves: bool = False
    most_lines: int = 12


RUN = [*STAGEFLOW, "run", "program.py:flow", "--data", "data", "--input"]
UP = [*STAGEFLOW, "up", "program.py:runtime"]
ONE_STAGE = """
from stageflow_actors import *
flow = Workflow("flow")
@flow.stage
def one(row: dict): return 1
"""
NOISY_LINES = gzip.compress(b"".join(b'{"noise": "%s"}\n' % os.urandom(20).hex().encode() for _ in range(100)))

SET_UPS = {
    "a service whose file is missing": SetUp(
        """
        from stageflow_actors import *
        class Database:
            def __init__(self):
                self.file = open("/nowhere/orders.sqlite")
        flow = Workflow("flow")
        @flow.stage(actors=3)
        def reserve(order: dict, *, db: Database): pass
        @flow.stage(actors=3)
        def charge(order: dict, *, db: Database): pass
        runtime = Runtime(flow, data_dir="data", services={"db": Database})
        """,
        UP,
        [
            "workers cannot start: service 'db' cannot be made: FileNotFoundError:",
            "No such file or directory: '/nowhere/orders.sqlite'; they are tried again",
            'program.py", line 5, in __init__',
        ],
        serves=True,
        most_lines=20,
    ),
    "a service that crashes the interpreter": SetUp(
        """
        import ctypes
        from stageflow_actors import *
        class Camera:
            def __init__(self): ctypes.string_at(8)
        flow = Workflow("flow")
        @flow.stage
        def snap(order: dict, *, camera: Camera): pass
        runtime = Runtime(flow, data_dir="data", services={"camera": Camera})
        """,
        UP,
        ["cannot start: killed by SIGSEGV (segmentation fault), during the making of service 'camera'"],
        serves=True,
        most_lines=20,
    ),
    "an initializer without its variable": SetUp(
        """
        import os
        from stageflow_actors import *
        def prepare():
            os.environ["MODEL_DIR_OF_NOBODY"]
        flow = Workflow("flow")
        @flow.stage
        def embed(doc: dict): return 1
        runtime = Runtime(flow, data_dir="data", initializer=prepare)
        """,
        UP,
        [
            "stage 'embed' of workflow 'flow': its workers cannot start: the initializer failed: KeyError: 'MODEL_DIR",
            'program.py", line 5, in prepare',
        ],
        serves=True,
        most_lines=20,
    ),
    "too few descriptors": SetUp(
        """
        import resource
        from stageflow_actors import *
        flow = Workflow("flow")
        @flow.stage
        def one(job: dict): return 1
        if __name__ == "__main__":
            resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
            with Runtime(flow, data_dir="data"):
                pass
        """,
        [sys.executable, "program.py"],
        ["file descriptors, and", "raise the limit (`ulimit -n`, or LimitNOFILE= of a systemd unit)"],
    ),
    "a forked child": SetUp(
        """
        import os
        from stageflow_actors import *
        flow = Workflow("flow")
        @flow.stage
        def one(job: dict): return 1
        if __name__ == "__main__":
            with Runtime(flow, data_dir="data") as runtime:
                if os.fork() == 0:
                    runtime.execute(flow, {})
                else:
                    os.wait()
        """,
        [sys.executable, "program.py"],
        ["was forked from the process", "call Runtime.connect("],
        most_lines=20,
    ),
    "data that is removed by the program itself": SetUp(
        """
        import shutil
        from stageflow_actors import *
        flow = Workflow("flow")
        @flow.stage
        def one(job: dict): return 1
        if __name__ == "__main__":
            runtime = Runtime(flow, data_dir="data").start()
            shutil.rmtree("data")
            runtime.stop()
        """,
        [sys.executable, "program.py"],
        ["was removed or replaced while its cluster ran", "Restore the directory from a backup"],
    ),
    "a Parquet file": SetUp(
        ONE_STAGE,
        [*RUN, "rows.parquet"],
        ["rows.parquet looks like a Parquet file", "export it as CSV or as JSON lines"],
        {"rows.parquet": b"PAR1" + bytes(range(256)) + b"PAR1"},
        most_lines=1,
    ),
    "gzip that ends in the middle": SetUp(
        ONE_STAGE,
        [*RUN, "rows.jsonl.gz"],
        ["rows.jsonl.gz line", "the gzip data are truncated: nothing from here on was read"],
        {"rows.jsonl.gz": NOISY_LINES[: len(NOISY_LINES) // 2]},
    ),
    "a table in another encoding": SetUp(
        ONE_STAGE,
        [*RUN, "kunden.csv"],
        ["kunden.csv line 2: not valid CSV: not valid UTF-8: byte 0xfc at column 2; is it in another encoding?"],
        {"kunden.csv": "name;ort\nMüller;Köln\n".encode("latin-1")},
    ),
}


def _prepare(tmp_path: Path, code: str, files: dict[str, bytes]) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(code))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)


def _run(tmp_path: Path, command: list[str], stop_after: str | None) -> str:
    """Return what the command prints, of both streams; it is stopped by SIGTERM once `stop_after` is printed."""
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            printed = ""
            assert process.stdout is not None
            while stop_after is not None and stop_after not in printed:
                line = process.stdout.readline()
                assert line, f"it ended before {stop_after!r}: {printed}"
                printed += line
            if stop_after is not None:
                process.send_signal(signal.SIGTERM)
            return printed + process.communicate(timeout=TIMEOUT_SECONDS)[0]
        finally:
            process.kill()


@pytest.mark.parametrize("name", SET_UPS)
def test_the_printed_text_names_the_cause_once(name: str, tmp_path: Path) -> None:
    set_up = SET_UPS[name]
    _prepare(tmp_path, set_up.code, set_up.files)
    printed = _run(tmp_path, set_up.command, set_up.causes[-1] if set_up.serves else None)
    for cause in set_up.causes:
        assert printed.count(cause) == 1, printed
    own_frames = [line for line in printed.splitlines() if "/stageflow_actors/runtime/worker/" in line]
    assert own_frames == []
    assert len(printed.splitlines()) <= set_up.most_lines, printed


RENAMED = """
from dataclasses import dataclass
from stageflow_actors import *
@dataclass
class Order:
    id: str
    FIELD
orders = Workflow("orders", context=Order)
@orders.stage
def reserve(order: Order): pass
orders.add_signal("go")
@orders.stage
def ship(order: Order): pass
if __name__ == "__main__":
    with Runtime(orders, data_dir="data") as runtime:
        try:
            START
        except InstanceParked as error:
            print(error)
"""


def test_a_renamed_field_is_named_with_workflow_version_and_stage(tmp_path: Path) -> None:
    first = RENAMED.replace("FIELD", "total: float").replace(
        "START", "runtime.submit(orders, Order('A', 5.0), instance_id='A')"
    )
    then = RENAMED.replace("FIELD", "total_cents: int").replace(
        "START", "order = runtime.instance('A'); order.signal('go'); order.result(100)"
    )
    _prepare(tmp_path, first, {})
    _run(tmp_path, [sys.executable, "program.py"], None)
    _prepare(tmp_path, then, {})
    printed = _run(tmp_path, [sys.executable, "program.py"], None)
    causes = ("context.total_cents is missing", "stage 'ship' of workflow 'orders' version 1 cannot decode its data")
    assert [cause in printed for cause in causes] == [True, True], printed
    shown = _run(tmp_path, [*STAGEFLOW, "dlq", "show", "A", "--data", "data"], None)
    assert [cause in " ".join(shown.split()) for cause in causes] == [True, True], shown
