#!/usr/bin/env python3
"""Run hostile stages and measure a calm stage beside them.

Each of these stages harms its own worker: it crashes, hangs, closes
descriptors or fills the memory. It runs repeatedly for some seconds beside a
calm stage. Printed are the rate of the calm stage without and with it, and the
last result of the hostile stage. The rate shares the cores of the machine with
the work of the hostile stage and with the replacement of its workers.

    ./scripts/prove hostile_stages                        # all: some minutes
    ./scripts/prove hostile_stages --only segfault leave  # two of them
    ./scripts/prove hostile_stages --list
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from argument_types import above_zero, script_parser
from stageflow_actors import Runtime, Stage, Workflow

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
T = TypeVar("T")
PATIENCE_SECONDS = 120.0
LEAST_SHARE = 0.1
"""The calm stage must keep at least this share of its usual rate."""
USUAL_RATE = 50.0
"""Instances per second that the calm stage reaches undisturbed on any machine."""
HURTS_ALL = "shoot_the_parent"
"""Kills the process that all workers are forked from: they end with it, and all pools start again."""


def hold_the_interpreter_for_20_s(context: Row) -> None:
    """Sleep in C with the GIL held."""
    ctypes.PyDLL(None).sleep(20)


def ten_megabytes_on_stderr(context: Row) -> None:
    for _ in range(10_000):
        sys.stderr.write("x" * 999 + "\n")


def calm(context: Row) -> None:
    """Do nothing: the stage that is measured."""


def stages() -> dict[str, Workflow[Row]]:
    """Return all hostile stages by name: those of the tests except the one that leaves daemons, and two longer ones."""
    sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("hostile_stages", "fixtures")]
    of_tests: Any = importlib.import_module("test_hostile_stages")
    memory: Any = importlib.import_module("test_max_memory")
    found = {handler.__name__: workflow for handler, workflow in of_tests.WORKFLOWS.items()}
    del found["daemonise"]
    found["memory_bomb"] = memory.bombs[memory.swell]
    for handler in (hold_the_interpreter_for_20_s, ten_megabytes_on_stderr):
        found[handler.__name__] = Workflow(handler.__name__).add_stage(Stage(handler, id="hostile"))
    return found


class CalmLoad:
    """Runs instances of the calm stage one after the other and counts them."""

    def __init__(self, runtime: Runtime, workflow: Workflow[Row]) -> None:
        self.done = 0
        self.wrong: list[str] = []
        self._runtime, self._workflow = runtime, workflow
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="other", daemon=True)
        self._thread.start()

    def rate(self, during: Callable[[], T]) -> tuple[float, T]:
        """Call `during`. Return the instances per second in that time, and the result of the call."""
        began, before = time.monotonic(), self.done
        given = during()
        return (self.done - before) / (time.monotonic() - began), given

    def go_on(self) -> None:
        """Wait until the usual rate is reached again: processes that start take their time."""
        for _ in range(100):
            if self.rate(lambda: time.sleep(0.2))[0] > USUAL_RATE:
                return
        raise SystemExit("the calm stage makes no progress")

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stopping.is_set():
            result = self._runtime.execute(self._workflow, {}, timeout=PATIENCE_SECONDS)
            if result.success:
                self.done += 1
            else:
                self.wrong.append(str(result.error))


def main() -> int:
    """Run the chosen stages and print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="only these (default: all)")
    parser.add_argument("--seconds", type=above_zero, default=2.0, help="seconds per stage at least (default: 2)")
    parser.add_argument("--list", action="store_true", help="list the stages and exit")
    parser.add_argument("--noise", action="store_true", help="show the stderr of the stages")
    given = parser.parse_args()
    known = stages()
    if given.list:
        print("\n".join(known))
        return 0
    if unknown := sorted(set(given.only or ()) - known.keys()):
        parser.error(f"unknown stage {unknown[0]!r}; see --list")
    wanted = {name: known[name] for name in given.only or known}
    console = Console()
    with TemporaryDirectory(prefix="stageflow-hostile-", ignore_cleanup_errors=True) as directory:
        place = Path(directory)
        if not given.noise:
            # Workers write to the stderr of the program, which is the stderr of this script.
            os.dup2(os.open(place / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        return run(wanted, given.seconds, place, console)


def run(wanted: dict[str, Workflow[Row]], seconds: float, place: Path, console: Console) -> int:
    """Run one stage after the other beside the calm one. Return 1 if the calm one stood still or failed."""
    table = Table("hostile stage", "runs", "calm, alone", "beside it", "ratio", "last result")
    for column in table.columns[1:5]:
        column.justify = "right"
    others = Workflow("calm").add_stage(calm)
    wrong: list[str] = []
    runtime = Runtime(*wanted.values(), others, data_dir=place / "data")
    runtime.start()
    other = CalmLoad(runtime, others)
    try:
        for name, workflow in wanted.items():
            other.go_on()
            alone, _ = other.rate(lambda: time.sleep(1.0))
            beside, results = other.rate(partial(run_repeatedly, runtime, workflow, seconds, place))
            ratio = beside / alone
            if ratio < LEAST_SHARE and name != HURTS_ALL:
                wrong.append(f"beside {name} the calm stage kept {ratio:.0%} of its rate")
            figures = (str(len(results)), f"{alone:,.0f}/s", f"{beside:,.0f}/s", f"{ratio:.2f}")
            table.add_row(name, *figures, reason(results[-1]))
    finally:
        other.stop()
        runtime.stop(grace=0.0)
    console.print(table)
    wrong += other.wrong
    console.print("\n".join(wrong) or f"{len(wanted)} hostile stages; the calm stage went on, {other.done:,} instances")
    return 1 if wrong else 0


def reason(error: str) -> str:
    """Return the end of an error, which is the part that differs."""
    first = error.splitlines()[0]
    return first.rpartition("'hostile': ")[2][:60]


def run_repeatedly(runtime: Runtime, workflow: Workflow[Row], seconds: float, place: Path) -> list[str]:
    """Run a hostile stage for so many seconds, at least once. Return its errors."""
    results: list[str] = []
    deadline = time.monotonic() + seconds
    while not results or time.monotonic() < deadline:
        result = runtime.execute(
            workflow, {"mark": str(place / f"{workflow.id}-{len(results)}")}, timeout=PATIENCE_SECONDS
        )
        results.append(result.error or result.status.value)
    return results


if __name__ == "__main__":
    sys.exit(main())
