#!/usr/bin/env python3
"""Run mixed load and check that only the history grows.

A program runs sagas at a steady pace (one in five fails; some retry, some lose
their worker or an optional stage), parallel branches, maps, delays, signals,
requests, parked and cancelled instances, clients that attach and leave, and
instances that live for the whole run. Sampled are memory, descriptors, threads
and processes of program, node, broker, zygote and workers, the size of the
journal, temporary files, and the latency of a one-stage instance. After a
warm-up the medians of the first third are compared with those of the last. At
the end each instance must have ended as expected, and `stageflow doctor` must
find the directory sound.

    ./scripts/prove soak --seconds 600              # ten minutes
    ./scripts/prove soak --seconds 36000 --rate 20  # one night, gently

Exit code 0 if each figure stays within its limit (column `most`), else 1. The
script ends only the program that it started.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from argument_types import above_zero, script_parser
from soaking import judge, load
from soaking.measure import Sample, take
from stageflow_actors.core.invariants import INFO
from stageflow_actors.diagnostics.doctor import run_checks
from stageflow_actors.history import HistoryWriter
from stageflow_actors.runtime.system.data_dir import DataDir

STOP_SECONDS = 180.0
"""Seconds that the program gets to finish its work."""


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--seconds", type=above_zero, default=600.0, metavar="N", help="duration of the load (600)")
    parser.add_argument(
        "--rate",
        type=above_zero,
        default=40.0,
        metavar="N",
        help="sagas per second; half as much of the rest (40)",
    )
    parser.add_argument(
        "--every", type=above_zero, default=None, metavar="N", help="seconds between samples (1/120 of all)"
    )
    parser.add_argument("--warm", type=float, default=None, metavar="N", help="seconds of warm-up (60, at most 1/5)")
    parser.add_argument("--ignore-latency", action="store_true", help="do not check latency, for a busy machine")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write all samples to FILE")
    parser.add_argument("--keep", action="store_true", help="keep the data directory")
    given = parser.parse_args()
    every = given.every or min(5.0, max(0.2, given.seconds / 120))
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        return soak(place, given.seconds, given.rate, every, given.warm, given.ignore_latency, given.json)
    finally:
        if given.keep:
            print(f"kept in {place}", file=sys.stderr)
        else:
            shutil.rmtree(place, ignore_errors=True)


def soak(
    place: Path, seconds: float, rate: float, every: float, warm: float | None, ignore_latency: bool, dump: Path | None
) -> int:
    """Run the load, take samples, print the table. Return the exit code."""
    data, out, log = place / "data", place / "report.json", place / "probes"
    words = [sys.executable, __file__, "program", str(data), str(rate), str(out), str(log)]
    program = subprocess.Popen(words, start_new_session=True)
    wrong: list[str] = []
    try:
        samples, began, ended = _watch(program, data, seconds, every, wrong)
        sockets = _sockets(data)
    finally:
        _stop(program)
    if program.returncode or not out.exists():
        wrong.append(f"the program ended with {program.returncode}")
    if sockets is not None and sockets.exists():
        wrong.append(f"{sockets} still exists after the end")
    report: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"ended": {}, "mistakes": []}
    wrong += report["mistakes"] + _doctor(data)
    probes = [(float(at), float(took)) for at, took in (line.split() for line in log.read_text().splitlines())]
    first, last = judge.thirds(began, ended, warm=min(60.0, seconds / 5) if warm is None else warm)
    try:
        rows = judge.compare(samples, first, last)
        latencies = judge.latencies(probes, first, last)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for row in rows + ([] if ignore_latency else latencies):
        if row.grown:
            wrong.append(f"{row.what} of {row.which} has grown from {_show(row, row.first)} to {_show(row, row.last)}")
    _print(rows + latencies, report["ended"], data, f"{seconds:g} s, {len(samples)} samples, {len(probes)} probes")
    if dump is not None:
        flat = [{"at": s.at - began, **{f"{b} {a}": v for (a, b), v in s.figures.items()}} for s in samples]
        dump.write_text(json.dumps(flat))
    for text in wrong:
        print(text, file=sys.stderr)
    return 1 if wrong else 0


def _watch(
    program: subprocess.Popen[bytes], data: Path, seconds: float, every: float, wrong: list[str]
) -> tuple[list[Sample], float, float]:
    """Return the samples of `seconds` from the start of the cluster, with the times of begin and end.

    The doctor runs three times in between; its findings go to `wrong`.
    """
    deadline = time.monotonic() + 60
    while (first := take(program.pid, data) if _sockets(data) is not None else None) is None:
        if program.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the cluster does not start")
        time.sleep(0.05)
    samples = [first]
    began = first.at
    visits = [began + seconds * part for part in (0.25, 0.5, 0.75)]
    while time.monotonic() < began + seconds and program.poll() is None:
        time.sleep(every)
        sample = take(program.pid, data)
        if sample is not None:
            samples.append(sample)
        if visits and time.monotonic() > visits[0]:
            visits.pop(0)
            wrong += _doctor(data)
    return samples, began, time.monotonic()


def _stop(program: subprocess.Popen[bytes]) -> None:
    """Ask the program to end, and give it time to finish its work."""
    try:
        if program.poll() is None:
            program.send_signal(signal.SIGTERM)
            program.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        program.kill()
        program.wait()


def _doctor(data: Path) -> list[str]:
    found = run_checks(DataDir(data, create=False)).findings
    return [f"doctor: {one.where}: {one.what}" for one in found if one.severity != INFO]


def _sockets(data: Path) -> Path | None:
    """Return the directory of the cluster's sockets, or None before it runs."""
    record = DataDir(data, create=False).read_cluster() if data.is_dir() else None
    return None if record is None or record.address is None else Path(record.address.removeprefix("ipc://")).parent


def _print(rows: list[judge.Row], ended: dict[str, int], data: Path, title: str) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("what", "of", "first third", "last third", "most", ""):
        table.add_column(name, justify="left" if name in ("what", "of", "") else "right")
    for row in rows:
        most = "" if row.most is None else _show(row, row.most)
        table.add_row(row.what, row.which, _show(row, row.first), _show(row, row.last), most, _word(row))
    instances = sum(ended.values())
    HistoryWriter.open(data / "history.db", create=False).close()  # what is in its log goes into the file
    history = (data / "history.db").stat().st_size
    each = f"{history / max(1, instances):,.0f} B an instance, by design"
    table.add_row("disk", "history", "", f"{history / 1e6:.1f} MB", "", each)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"{instances:,} instances: " + ", ".join(f"{number:,} {status}" for status, number in sorted(ended.items())))


def _word(row: judge.Row) -> str:
    return "GROWS" if row.grown else row.why


def _show(row: judge.Row, value: float) -> str:
    if row.what in ("rss", "disk"):
        return f"{value / 1e6:.1f} MB"
    return f"{value * 1000:.2f} ms" if row.what == "latency" else f"{value:,.0f}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["program"]:
        load.main(Path(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
    else:
        sys.exit(main())
