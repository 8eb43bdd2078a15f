"""Descriptors 0 to 2 that are closed when the program starts, or later: no file or socket of a cluster gets one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from own_programs import Ended

WRITES = """
def one(job):
    print("GARBAGE" * 50)
    for number in (1, 2):
        try: os.write(number, b"GARBAGE" * 1000)
        except OSError: pass
    return job["n"]

flow = Workflow("flow").add_stage(one)

def run(data, count, report):
    with Runtime(flow, data_dir=data) as rt:
        done = sum(rt.execute(flow, {"n": n}, timeout=100).success for n in range(count))
        os.kill(rt.node_pid, signal.SIGKILL)
        done += sum(rt.execute(flow, {"n": n}, timeout=100).success for n in range(count))
        with Runtime.connect(data) as client:
            done += sum(client.execute("flow", {"n": n}, timeout=100).success for n in range(count))
    with open(report, "w") as file:
        print(done, file=file)
"""

CLOSED = ("bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash")


def garbage_below(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".py"]
    return [str(path) for path in files if b"GARBAGE" in path.read_bytes()]


def test_a_program_without_standard_descriptors_runs_and_no_output_gets_into_a_file(
    run_program: Callable[..., Ended], tmp_path: Path
) -> None:
    run_program(WRITES + "\nrun('data', 3, 'report')\n", prefix=CLOSED)
    assert (tmp_path / "report").read_text() == "9\n"
    assert garbage_below(tmp_path) == []


def test_a_program_that_closes_them_after_the_start_keeps_its_cluster(
    run_program: Callable[..., Ended], tmp_path: Path
) -> None:
    """As a daemon does. Its next node and its next connection are made with the descriptors closed."""
    ended = run_program(
        WRITES.replace("        os.kill", "        for number in range(3): os.close(number)\n        os.kill")
        + "\nrun('data', 3, 'report')\n"
    )
    assert (tmp_path / "report").read_text() == "9\n", ended
    assert garbage_below(tmp_path) == []


def test_a_command_without_standard_descriptors_opens_none_of_its_files_as_one(
    run_program: Callable[..., Ended], tmp_path: Path
) -> None:
    """A broker that the command starts would write its warnings into that file."""
    run_program(
        """
        from stageflow_actors.cli.main import main
        status = main(["queue", "list", "--data", "missing"])
        found = [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
        with open("report", "w") as file:
            print(status, found, file=file)
        """,
        prefix=CLOSED,
    )
    assert (tmp_path / "report").read_text() == f"1 {['/dev/null'] * 3}\n"
