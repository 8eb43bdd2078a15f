#!/usr/bin/env python3
"""Measure a map of 100,000 items and 10,000 waiting instances.

`map` runs one map undisturbed, and one in which every process gets a SIGKILL
half-way: only the items in work may run again. `waiting` measures the memory
for instances that wait for a signal or in a delay; all still wait after a
restart and can be signalled. Only the program started here is killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

from cluster_tree import add_node
from stageflow_actors import Runtime, StageContext, Workflow

MEGABYTE = 1 << 20
PREFIX = "stageflow-scale-"
PATIENCE_SECONDS = 120.0
"""Seconds to wait for an expected state."""

# ── what is run ──────────────────────────────────────────────────────────────────────────────────────────────────────


def no_op(item: int) -> int:
    """One item of the undisturbed map."""
    return item


def noted(item: int, ctx: StageContext) -> int:
    """One item that appends its number to a file of its worker."""
    with open(f"{os.environ['SCALE_LOG']}.{os.getpid()}", "ab", buffering=0) as log:
        log.write(b"%d\n" % item)
    return item


plain = Workflow("plain").add_map("each", no_op, over=lambda context: range(context["n"]), into="got", actors=2)
counted = Workflow("counted").add_map("each", noted, over=lambda context: range(context["n"]), into="got", actors=2)
signalled = Workflow("signalled").add_signal("go").add_stage(lambda context: None, id="after")
delayed = Workflow("delayed").add_delay("pause", 86_400).add_stage(lambda context: None, id="after")


def until(condition: Callable[[], Any], what: str) -> Any:
    """Return the first true value of `condition`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise click.ClickException(f"{what} has not come true within {PATIENCE_SECONDS:g} s")
        time.sleep(0.01)
    return value


# ── what is looked at ────────────────────────────────────────────────────────────────────────────────────────────────


def processes(node_pid: int) -> dict[str, list[psutil.Process]]:
    """Return the processes of a cluster by kind."""
    found: dict[str, list[psutil.Process]] = {}
    add_node(psutil.Process(node_pid), found)
    return found


def memory(node_pid: int) -> dict[str, float]:
    """Return the unshared memory of the processes of a cluster in MB, by kind."""
    sizes = {}
    for kind, group in processes(node_pid).items():
        total = 0
        for process in group:
            try:
                total += process.memory_full_info().uss
            except psutil.Error:
                pass  # the process has ended in between
        sizes[kind] = total / MEGABYTE
    return sizes


def peak(node_pid: int) -> float:
    """Return the peak resident memory of the broker in MB."""
    (broker,) = processes(node_pid)["broker"]
    for line in Path(f"/proc/{broker.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


# ── the map ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure_map(data: Path, items: int) -> dict[str, float]:
    """Run one map undisturbed."""
    with Runtime(plain, data_dir=data) as runtime:
        before = peak(runtime.node_pid)
        began = time.monotonic()
        result = runtime.execute(plain, {"n": items}, timeout=600)
        seconds = time.monotonic() - began
        if result.context.get("got") != list(range(items)):
            raise click.ClickException(f"the map ended {result.status}: {result.error}")
        return {"seconds": seconds, "broker before, MB": before, "broker at most, MB": peak(runtime.node_pid)}


def run_counted(data: str, out: str, items: int) -> None:
    """Run the program that is killed and started again: the same id resumes."""
    with Runtime(counted, data_dir=data) as runtime:
        Path(f"{out}.node").write_text(str(runtime.node_pid))
        result = runtime.execute(counted, {"n": items}, instance_id="the-map", timeout=600)
    Path(out).write_text(json.dumps({"status": str(result.status), "got": result.context.get("got")}))


def seen(log: Path) -> Counter[int]:
    """Return how often each item was begun."""
    found: Counter[int] = Counter()
    for path in log.parent.glob(f"{log.name}.*"):
        found.update(int(line) for line in path.read_bytes().split(b"\n") if line)
    return found


def measure_killed_map(place: Path, items: int) -> dict[str, float]:
    """Kill all processes of a map at about half of its items, and count the items that ran twice."""
    log, out = place / "items", place / "result.json"
    command = [sys.executable, __file__, "program", str(place / "data"), str(out), str(items)]
    environment = {**os.environ, "SCALE_LOG": str(log)}
    began = time.monotonic()
    first = subprocess.Popen(command, env=environment, start_new_session=True)
    until(lambda: sum(seen(log).values()) >= items // 2, "half of the items")
    everyone = [first.pid, *(process.pid for process in psutil.Process(first.pid).children(recursive=True))]
    for pid in everyone:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    first.wait()
    half = sum(seen(log).values())
    second = subprocess.run(command, env=environment, check=False, start_new_session=True)
    result = json.loads(out.read_text())
    if second.returncode or result["got"] != list(range(items)):
        raise click.ClickException(f"the map ended {result['status']} with the wrong results")
    counts = seen(log)
    return {
        "seconds, both runs": time.monotonic() - began,
        "items begun before the kill": half,
        "items never begun": sum(1 for item in range(items) if not counts[item]),
        "items begun twice": sum(1 for count in counts.values() if count > 1),
    }


# ── what waits ───────────────────────────────────────────────────────────────────────────────────────────────────────


def measure_waiting(data: Path, workflow: Workflow[Any], instances: int) -> dict[str, float]:
    """Start instances, let them wait, restart the cluster, and signal some."""
    runtime = Runtime(workflow, data_dir=data).start()
    try:
        before = memory(runtime.node_pid)
        began = time.monotonic()
        ids: list[str] = []
        while len(ids) < instances:
            batch = [{"n": n} for n in range(min(5_000, instances - len(ids)))]
            ids += [one.id for one in runtime.submit_many(workflow, batch)]
        until(lambda: count_waiting(runtime, instances) == instances, "all wait")
        seconds = time.monotonic() - began
        after = memory(runtime.node_pid)
        busy = sum(queue.ready + queue.leased for queue in runtime.queues(f"stageflow.{workflow.id}."))
    finally:
        runtime.stop()
    runtime = Runtime(workflow, data_dir=data).start()
    try:
        still = count_waiting(runtime, instances)
        again = memory(runtime.node_pid)
        began = time.monotonic()
        chosen = [runtime.instance(id) for id in (ids if workflow is signalled else [])]
        for instance in chosen:
            instance.signal("go", 1)
        ended = sum(instance.result(timeout=120).success for instance in chosen)
        signalling = time.monotonic() - began
    finally:
        runtime.stop(grace=0)
    return {
        "seconds until all wait": seconds,
        "messages at actors": busy,
        "more memory of all processes, MB": sum(after.values()) - sum(before.values()),
        "  of the broker, MB": after["broker"] - before["broker"],
        "  after a restart, MB": sum(again.values()) - sum(before.values()),
        "still waiting after a restart": still,
        "signalled and completed": ended,
        "  in seconds": signalling,
    }


def count_waiting(runtime: Runtime, most: int) -> int:
    """Return the number of waiting instances."""
    return len(runtime.instances("waiting", limit=most + 1))


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def show(title: str, figures: dict[str, float]) -> None:
    """Print one table."""
    table = Table(title=title)
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, figure in figures.items():
        table.add_row(name, f"{figure:,.1f}" if isinstance(figure, float) else f"{figure:,}")
    Console().print(table)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure large maps and many waiting instances."""


@main.command("map")
@click.option("-n", "--items", type=click.IntRange(1), default=100_000, show_default=True)
def map_(items: int) -> None:
    """Run a map undisturbed; then kill all processes in the middle of one."""
    with TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as place:
        show(f"a map of {items:,} items", measure_map(Path(place) / "data", items))
    with TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as place:
        show("everything killed in the middle", measure_killed_map(Path(place), items))


@main.command()
@click.option("-n", "--instances", type=click.IntRange(1), default=10_000, show_default=True)
def waiting(instances: int) -> None:
    """Measure instances that wait for a signal or in a delay."""
    for workflow in (signalled, delayed):
        with TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as place:
            show(f"{instances:,} instances, {workflow.id}", measure_waiting(Path(place) / "data", workflow, instances))


@main.command(hidden=True)
@click.argument("data")
@click.argument("out")
@click.argument("items", type=int)
def program(data: str, out: str, items: int) -> None:
    """Run the program that is killed; started by this script."""
    run_counted(data, out, items)


if __name__ == "__main__":
    main()
