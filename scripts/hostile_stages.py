#!/usr/bin/env python3
"""Run every stage from hell of the tests, and measure what another stage gets done meanwhile.

Each stage does to its worker what should not be done: it crashes, hangs, closes descriptors, fills the memory. It is
run again and again for some seconds, beside a stage that does nothing but be run. Printed are the rate of that other
stage without and with it, and what the result of the bad one says. The rate shares the machine's cores with what the
bad stage burns, and with the replacing of its workers.

    ./scripts/prove hostile_stages                          # all of them, some minutes
    ./scripts/prove hostile_stages --only segfault leave    # two
    ./scripts/prove hostile_stages --list
"""

from __future__ import annotations

import argparse
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

from argument_types import above_zero
from stageflow_actors import Runtime, Stage, Workflow

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
T = TypeVar("T")
PATIENCE = 120.0
LEAST = 0.1
"""The other stage must get at least this part of its usual work done."""
USUAL = 50.0
"""Instances a second that the other stage gets done on any machine, when nothing disturbs it."""
HURTS_ALL = "shoot_the_parent"
"""It kills the process that all workers are forked from, and they end with it: all pools are started again."""


def hold_the_interpreter_for_20_s(context: Row) -> None:
    """In C, with the GIL held."""
    ctypes.PyDLL(None).sleep(20)


def ten_megabytes_on_stderr(context: Row) -> None:
    for _ in range(10_000):
        sys.stderr.write("x" * 999 + "\n")


def calm(context: Row) -> None:
    """The other stage."""


def stages() -> dict[str, Workflow[Row]]:
    """All stages from hell, by name: those of the tests but the one that leaves daemons, and two that take longer."""
    sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("hostile_stages", "fixtures")]
    of_tests: Any = importlib.import_module("test_hostile_stages")
    memory: Any = importlib.import_module("test_max_memory")
    found = {handler.__name__: workflow for handler, workflow in of_tests.WORKFLOWS.items()}
    del found["daemonise"]
    found["memory_bomb"] = memory.bombs[memory.swell]
    for handler in (hold_the_interpreter_for_20_s, ten_megabytes_on_stderr):
        found[handler.__name__] = Workflow(handler.__name__).add_stage(Stage(handler, id="hell"))
    return found


class Other:
    """Has instances of the calm stage run, one after the other, and counts them."""

    def __init__(self, runtime: Runtime, workflow: Workflow[Row]) -> None:
        self.done = 0
        self.wrong: list[str] = []
        self._runtime, self._workflow = runtime, workflow
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="other", daemon=True)
        self._thread.start()

    def rate(self, during: Callable[[], T]) -> tuple[float, T]:
        """Instances a second while this is called, and what it gave."""
        began, before = time.monotonic(), self.done
        given = during()
        return (self.done - before) / (time.monotonic() - began), given

    def go_on(self) -> None:
        """Wait until it works as usual: whoever is being started, or started again, takes its time."""
        for _ in range(100):
            if self.rate(lambda: time.sleep(0.2))[0] > USUAL:
                return
        raise SystemExit("the other stage does nothing at all")

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stopping.is_set():
            result = self._runtime.execute(self._workflow, {}, timeout=PATIENCE)
            if result.success:
                self.done += 1
            else:
                self.wrong.append(str(result.error))


def main() -> int:
    """Run what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="only these (default: all)")
    parser.add_argument(
        "--seconds", type=above_zero, default=2.0, help="for how long each is run, at least (default: 2)"
    )
    parser.add_argument("--list", action="store_true", help="say which there are, and end")
    parser.add_argument("--noise", action="store_true", help="show what the stages write to stderr")
    given = parser.parse_args()
    known = stages()
    if given.list:
        print("\n".join(known))
        return 0
    if unknown := sorted(set(given.only or ()) - known.keys()):
        parser.error(f"there is no stage {unknown[0]!r}; --list says which there are")
    wanted = {name: known[name] for name in given.only or known}
    console = Console()
    with TemporaryDirectory(prefix="stageflow-hostile-", ignore_cleanup_errors=True) as directory:
        place = Path(directory)
        if not given.noise:
            # Workers write to the stderr of the program, which is the stderr of this script.
            os.dup2(os.open(place / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        return run(wanted, given.seconds, place, console)


def run(wanted: dict[str, Workflow[Row]], seconds: float, place: Path, console: Console) -> int:
    """One stage after the other beside the calm one; 1 if that one stood still, or failed."""
    table = Table("stage from hell", "runs", "other, alone", "beside it", "ratio", "what its last result says")
    for column in table.columns[1:5]:
        column.justify = "right"
    others = Workflow("calm").add_stage(calm)
    wrong: list[str] = []
    runtime = Runtime(*wanted.values(), others, data_dir=place / "data")
    runtime.start()
    other = Other(runtime, others)
    try:
        for name, workflow in wanted.items():
            other.go_on()
            alone, _ = other.rate(lambda: time.sleep(1.0))
            beside, said = other.rate(partial(again_and_again, runtime, workflow, seconds, place))
            ratio = beside / alone
            if ratio < LEAST and name != HURTS_ALL:
                wrong.append(f"beside {name} the other stage got {ratio:.0%} of its work done")
            figures = (str(len(said)), f"{alone:,.0f}/s", f"{beside:,.0f}/s", f"{ratio:.2f}")
            table.add_row(name, *figures, what(said[-1]))
    finally:
        other.stop()
        runtime.stop(grace=0.0)
    console.print(table)
    wrong += other.wrong
    console.print(
        "\n".join(wrong) or f"{len(wanted)} stages from hell; the other one went on, {other.done:,} instances"
    )
    return 1 if wrong else 0


def what(error: str) -> str:
    """The end of what a result says, which is what differs."""
    first = error.splitlines()[0]
    return first.rpartition("'hell': ")[2][:60]


def again_and_again(runtime: Runtime, workflow: Workflow[Row], seconds: float, place: Path) -> list[str]:
    """What the results of a bad stage say that is run for so long, or once if that takes longer."""
    said: list[str] = []
    deadline = time.monotonic() + seconds
    while not said or time.monotonic() < deadline:
        result = runtime.execute(workflow, {"mark": str(place / f"{workflow.id}-{len(said)}")}, timeout=PATIENCE)
        said.append(result.error or result.status.value)
    return said


if __name__ == "__main__":
    sys.exit(main())
