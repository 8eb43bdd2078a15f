"""Descriptors 0 to 2 that are closed when the program starts, or later: no file or socket of a cluster gets one."""

from __future__ import annotations

import shlex
import sys
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


def test_commands_without_standard_descriptors_write_no_message_into_a_database(
    run_program: Callable[..., Ended], tmp_path: Path
) -> None:
    run_program("with Runtime(flow, data_dir='data') as rt: rt.execute(flow, {'n': 1}, timeout=100)")
    before = (tmp_path / "data" / "history.db").read_bytes()
    command = (
        f"{shlex.quote(sys.executable)} -c 'from stageflow_actors.cli.main import main; import sys; sys.exit(main())'"
    )
    for arguments in ("instances list --data data", "instances show nobody --data data", "doctor --data data"):
        run_program(
            "import subprocess; subprocess.run(['sh', '-c', sys.argv[1]])", f"{command} {arguments} <&- >&- 2>&-"
        )
    assert (tmp_path / "data" / "history.db").read_bytes() == before
