#!/usr/bin/env python3
"""Measure throughput, latency and CPU of three no-op stages, or a case.

Cases: `priority` (latency of an urgent message), `pause` (messages begun
after `pause()` returned), `scale` (share of eight workers after a scale-up)
and `efficiency` (sleeping stages of 1, 20 and 1,000 ms).

Throughput counts from the first submit until each result has been delivered
and each row of the history is committed. With `--against SCRIPT` a yardstick
runs in turn with it, and the ratios are printed: absolute figures of a shared
machine mean nothing. The yardstick takes `-n` and prints one JSON line with
`workflows_per_s` and `latency_p50_ms`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any

import click
import psutil

from benching.sharing import CASES
from cluster_tree import add_node
from stageflow_actors import Config, Runtime, Workflow

bench = Workflow("bench")


def _noop(index: int) -> Any:
    def stage(context: dict[str, Any]) -> None:
        context[f"s{index}"] = 1

    return stage


for number in range(3):
    bench.add_stage(_noop(number), id=f"s{number}")


def _contexts(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "values": [0.1 * k for k in range(8)]} for i in range(count)]


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _pieces(runtime: Runtime) -> dict[str, list[psutil.Process]]:
    """Return the processes of the cluster by role."""
    found: dict[str, list[psutil.Process]] = {}
    add_node(psutil.Process(runtime.node_pid), found)
    return {
        "client": [psutil.Process()],
        "node": found["node"],
        "broker": found["broker"],
        "workers": found["worker"],
    }


def run_once(count: int, singles: int, durability: Any) -> dict[str, Any]:
    """Run once on a new data directory."""
    with tempfile.TemporaryDirectory(prefix="stageflow-bench-") as folder:
        config = Config(durability=durability)
        with Runtime(bench, data_dir=folder, config=config) as runtime:
            for _ in runtime.map_unordered(bench, _contexts(2_000)):
                pass
            _await_history(runtime, 2_000)
            pieces = _pieces(runtime)
            before = {name: sum(map(_cpu, found)) for name, found in pieces.items()}
            contexts = _contexts(count)
            began = time.perf_counter()
            delivered = sum(result.instance_id != "" for result in runtime.map_unordered(bench, contexts))
            results = time.perf_counter() - began
            _await_history(runtime, 2_000 + count)
            total = time.perf_counter() - began
            cpu = {name: (sum(map(_cpu, found)) - before[name]) / count * 1e6 for name, found in pieces.items()}
            latencies = []
            for context in _contexts(singles):
                began = time.perf_counter()
                runtime.execute(bench, context)
                latencies.append(time.perf_counter() - began)
            latencies = sorted(latencies[singles // 6 :])
    return {
        "workflows_per_s": round(delivered / total),
        "results_per_s": round(delivered / results),
        "latency_p50_ms": round(median(latencies) * 1e3, 3),
        "latency_p99_ms": round(latencies[int(len(latencies) * 0.99)] * 1e3, 3),
        "cpu_us": {name: round(value, 1) for name, value in cpu.items()},
    }


def _await_history(runtime: Runtime, count: int) -> None:
    while runtime.finished_count() < count:
        time.sleep(0.002)


@click.command(help=__doc__)
@click.option(
    "-n", "count", type=click.IntRange(1), default=60_000, show_default=True, help="Workflows of the throughput part."
)
@click.option(
    "--singles",
    type=click.IntRange(1),
    default=300,
    show_default=True,
    help="Workflows of the latency part, one at a time.",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=1, show_default=True, help="Rounds, in turn with the yardstick."
)
@click.option("--durability", default="fsync", show_default=True, type=click.Choice(["fsync", "write", "memory"]))
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="Run this case instead.")
@click.option("--against", type=click.Path(exists=True, dir_okay=False), help="Yardstick script to run in turn.")
def main(count: int, singles: int, rounds: int, durability: str, cases: tuple[str, ...], against: str | None) -> None:
    """Run the benchmark."""
    for case in cases:
        click.echo(json.dumps({"case": case, **CASES[case](rounds)}))
    if cases:
        return
    throughput, latency = [], []
    for _ in range(rounds):
        ours = run_once(count, singles, durability)
        click.echo(json.dumps(ours))
        if against is None:
            continue
        done = subprocess.run([sys.executable, against, "-n", str(count)], capture_output=True, text=True, check=True)
        theirs = json.loads(done.stdout.splitlines()[-1])
        click.echo(json.dumps({"yardstick": theirs}))
        throughput.append(ours["workflows_per_s"] / theirs["workflows_per_s"])
        latency.append(ours["latency_p50_ms"] / theirs["latency_p50_ms"])
    if throughput:
        summary = {"throughput_ratio": round(median(throughput), 3), "latency_ratio": round(median(latency), 2)}
        click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
