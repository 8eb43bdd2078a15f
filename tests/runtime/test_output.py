"""Output of handlers reaches the program's stdout and stderr in whole lines, and no reader can harm a stage."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster_fixtures import Serve, serve
from programs import launch

from stageflow_actors import Runtime, Workflow

__all__ = ["launch", "serve"]

Row = dict[str, Any]

LINES = 2_000


def print_in_all_ways(row: Row) -> None:
    print("printed", row["n"])
    print("on stderr", row["n"], file=sys.stderr)
    os.write(1, b"written\n")
    subprocess.run(["sh", "-c", "echo by a child; echo by a child on stderr >&2"], check=True)
    print("half a pair \ud800 of", "ä")
    print("never ended", end="")
    sys.stdout.flush()


def print_lines(row: Row) -> None:
    for number in range(LINES):
        print(f"line {row['n']} {number:05d}", "." * 60)


def print_parts(row: Row) -> None:
    for _ in range(50):
        print("a part", end=" ", flush=True)
        print("and the rest")


ways: Workflow[Row] = Workflow("ways").add_stage(print_in_all_ways)
lines: Workflow[Row] = Workflow("lines").add_stage(print_lines, actors=2).add_stage(print_parts, actors=2)


@pytest.fixture(scope="module")
def cluster(serve: Serve) -> Runtime:
    return serve(ways, lines)


@contextlib.contextmanager
def replaced_streams() -> Any:
    """Replace the streams by objects without a descriptor, as a notebook does."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


def test_whatever_writes_in_a_handler_reaches_the_streams_that_the_program_has_at_the_time(
    cluster: Runtime, eventually: Callable[..., Any]
) -> None:
    for number in (1, 2):  # each cell of a notebook has streams of its own
        with replaced_streams() as (out, err):
            cluster.execute(ways, {"n": number}, timeout=30)
            eventually(lambda: "never ended" in out.getvalue(), "stdout")
            eventually(lambda: "by a child on stderr" in err.getvalue(), "stderr")
            shown = out.getvalue().splitlines()
            assert f"printed {number}" in shown
            assert {"written", "by a child", "half a pair \\ud800 of ä"} <= set(shown)
            assert f"on stderr {number}" in err.getvalue().splitlines()


def test_lines_of_several_workers_are_whole_and_complete(cluster: Runtime, eventually: Callable[..., Any]) -> None:
    with replaced_streams() as (out, _):
        instances = cluster.submit_many(lines, [{"n": n} for n in range(2)])
        assert all(instance.result(timeout=30).success for instance in instances)
        eventually(lambda: out.getvalue().count("\n") >= 2 * LINES + 100, "all lines")
    found = [line for line in out.getvalue().splitlines() if "never ended" not in line and line]
    assert {line for line in found if not re.fullmatch(r"line \d \d{5} \.{60}", line)} == {"a part and the rest"}
    for n in range(2):
        numbers = [int(line[7:12]) for line in found if line.startswith(f"line {n}")]
        assert numbers == list(range(LINES))


def test_a_stream_that_fails_harms_no_stage(cluster: Runtime, eventually: Callable[..., Any]) -> None:
    class Broken(io.StringIO):
        tried = 0

        def write(self, text: str) -> int:
            self.tried += 1
            raise BrokenPipeError("the reader has gone")

    broken = Broken()
    with contextlib.redirect_stdout(broken):
        assert cluster.execute(ways, {"n": 3}, timeout=30).success
        eventually(lambda: broken.tried, "an attempt to write")
    with replaced_streams() as (out, _):
        assert cluster.execute(ways, {"n": 4}, timeout=30).success
        eventually(lambda: "printed 4" in out.getvalue(), "output on the next stream")


PROGRAM = """
import sys
from stageflow_actors import Runtime, Workflow

flow = Workflow("flow").add_stage(lambda job: 1, id="book", compensation=lambda job: None)

@flow.stage
def show(job: dict) -> int:
    print("working on", job["n"], "x" * 3000)
    for number in range(job["lines"]):
        print("line", number, "y" * 200)
    return job["n"]

if __name__ == "__main__":
    with Runtime(flow, data_dir="data") as runtime:
        results = [runtime.execute(flow, {"n": n, "lines": int(sys.argv[1])}, timeout=30) for n in range(3)]
    open("statuses", "w").write(" ".join(result.status.value for result in results))
"""


def run_program(folder: Path, shell: str, number_of_lines: int = 0, **options: Any) -> tuple[str, int]:
    """Run the program with its stdout redirected by the shell. Return the statuses, and its exit code."""
    (folder / "program.py").write_text(PROGRAM)
    command = f"{sys.executable} program.py {number_of_lines} 2>errors {shell}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=folder,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
        **options,
    )
    return (folder / "statuses").read_text(), done.returncode


@pytest.mark.parametrize("shell", ["| head -1 >first", ">/dev/full", "<&- >&- 2>&-"])
def test_a_reader_that_is_gone_or_full_harms_neither_a_stage_nor_the_program(tmp_path: Path, shell: str) -> None:
    assert run_program(tmp_path, shell) == ("completed completed completed", 0)
    if "head" in shell:
        assert (tmp_path / "first").read_text().startswith("working on 0 xxx")


def test_a_terminal_that_hung_up_harms_no_stage(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    (tmp_path / "program.py").write_text(PROGRAM)
    program = subprocess.Popen(
        [sys.executable, "program.py", "0"],
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(theirs)
    assert os.read(ours, 1)
    os.close(ours)
    assert program.wait(30) == 0
    assert (tmp_path / "statuses").read_text() == "completed completed completed"


def test_a_reader_that_stalls_holds_up_neither_stage_nor_stop_and_lines_are_counted(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    try:
        assert run_program(tmp_path, "", 40_000, stdout=theirs) == ("completed completed completed", 0)
    finally:
        os.close(theirs)
    errors = (tmp_path / "errors").read_text()
    dropped = sum(int(number) for number in re.findall(r"WARNING stageflow_actors: (\d+) lines", errors))
    written = b""
    while chunk := os.read(ours, 1 << 20):
        written += chunk
    os.close(ours)
    assert written.count(b"\n") + dropped == pytest.approx(3 * 40_001, abs=1000)
