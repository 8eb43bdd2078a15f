#!/usr/bin/env python3
"""Signal a saga's processes at each failpoint and audit.

Each run gets one SIGKILL, SIGSTOP or SIGTERM at one point, is then run to its
end, and is audited as by `scripts/chaos.py`: effect log, settlements counted
from the journal, and history must agree. The points and their meaning are in
`stageflow_brokers.failpoints`.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click

import chaos
from stageflow_brokers.failpoints import FAILPOINT_ENV, FAILPOINTS

SIGNALS = ("kill", "stop", "term")
LIMIT_SECONDS = 60.0
"""Seconds that one start of the program may take at most."""
STARTS = 6
"""Starts after which a run counts as endless."""


class Run:
    """The outcome of one signal at one point."""

    def __init__(self, point: str, signal: str, nth: int) -> None:
        self.point, self.signal, self.nth = point, signal, nth
        self.reached = False
        self.starts = 0
        self.repeated = 0
        self.seconds = 0.0
        self.wrong: list[str] = []


def try_point(point: str, signal: str, nth: int, instances: int) -> Run:
    """Run the saga with that accident, start the program again until it has finished, and audit."""
    run = Run(point, signal, nth)
    began = time.monotonic()
    with TemporaryDirectory(prefix="stageflow-point-", ignore_cleanup_errors=True) as directory:
        _try_in(Path(directory), run, instances)
    run.seconds = time.monotonic() - began
    return run


def _try_in(place: Path, run: Run, instances: int) -> None:
    log, out, data, mark = place / "effects", place / "report.json", place / "data", place / "mark"
    command = [sys.executable, chaos.__file__, "program", str(data), str(out), str(instances), "0.002", "1"]
    env = {**os.environ, "CHAOS_LOG": str(log), FAILPOINT_ENV: f"{run.point}:{run.signal}:{run.nth}:{mark}"}
    while not out.exists() and run.starts < STARTS:
        run.starts += 1
        program = subprocess.Popen(command, start_new_session=True, env=env, stderr=subprocess.PIPE, text=True)
        try:
            _, stderr = program.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            program.kill()
            program.communicate()
            run.wrong.append(f"the program did not end within {LIMIT_SECONDS:g} s")
            break
        if program.returncode not in (0, -9, -15) and not mark.exists():
            run.wrong.append(f"the program ended with {program.returncode} before the accident: {stderr[-500:]}")
            break
    run.reached = mark.exists()
    if not out.exists():
        run.wrong.append(f"no result after {run.starts} starts")
        return
    # The accident may have hit the cluster while it stopped: the next start, without an accident, finishes the rest.
    out.unlink()
    last = subprocess.run(
        command, env={**env, FAILPOINT_ENV: ""}, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    if last.returncode or not out.exists():
        run.wrong.append(f"the last start ended with {last.returncode}: {last.stderr[-500:]}")
        return
    found, _, run.repeated = chaos.judge(instances, log, out, data)
    run.wrong += found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-n",
    "--instances",
    type=click.IntRange(1),
    default=40,
    show_default=True,
    help="Instances of each run; one in five fails.",
)
@click.option("--point", "points", multiple=True, metavar="NAME", help="Only these points (default: all).")
@click.option("--signal", "signals", multiple=True, type=click.Choice(SIGNALS), help="Only these (default: all).")
@click.option("--hours", default=0.0, help="Repeat for this many hours, with other counts each time.")
@click.option("--seed", default=1, show_default=True, help="Seed that picks at which pass a point fires.")
@click.option("--list", "listing", is_flag=True, help="List the points and exit.")
def main(
    instances: int, points: tuple[str, ...], signals: tuple[str, ...], hours: float, seed: int, listing: bool
) -> None:
    """Signal the processes of a saga at each named point, then audit the run.

    Exit code 0 if in each run each instance had exactly one terminal state,
    each transition was accepted exactly once, and each point was reached.
    """
    unknown = sorted(set(points) - FAILPOINTS.keys())
    if unknown:
        raise click.UsageError(f"unknown point {unknown[0]!r}; see --list")
    if listing:
        for name, meaning in FAILPOINTS.items():
            click.echo(f"{name:28} {meaning}")
        return
    chance = random.Random(seed)
    until = time.monotonic() + hours * 3600
    runs: list[Run] = []
    while True:
        for point in points or FAILPOINTS:
            for signal in signals or SIGNALS:
                nth = chance.choice((1, 1, 2, 4)) if runs_often(point) else 1
                run = try_point(point, signal, nth, instances)
                if not run.reached and nth > 1:
                    run = try_point(point, signal, 1, instances)
                runs.append(run)
                verdict = "; ".join(run.wrong[:3]) if run.wrong else "ok" if run.reached else "not reached"
                click.echo(
                    f"{point:28} {signal:4} at {run.nth}: {run.starts} starts, {run.repeated} repeated, "
                    f"{run.seconds:4.1f} s  {verdict}"
                )
        if time.monotonic() >= until:
            break
    wrong = sum(bool(run.wrong) for run in runs)
    missed = sum(not run.reached for run in runs)
    places = len({run.point for run in runs})
    click.echo(
        f"{len(runs)} runs at {places} points: {wrong} with violations, {missed} not reached, "
        f"{sum(run.repeated for run in runs)} side effects repeated"
    )
    sys.exit(1 if wrong or missed else 0)


def runs_often(point: str) -> bool:
    """Return True if each process that reaches the point reaches it many times."""
    return point.partition(".")[0] in ("client", "coordinator", "broker", "journal", "worker") and point not in (
        "worker.born",
        "worker.loaded",
        "worker.consuming",
        "broker.recovered",
        "broker.started",
    )


if __name__ == "__main__":
    main()
