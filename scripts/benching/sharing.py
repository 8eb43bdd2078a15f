"""How soon priority, pause and scale act on messages that workers hold, and how busy sleeping stages keep them.

Handlers append their starts to a file, because the system under test is no witness of itself. Each case first runs
messages that take microseconds, so that the workers hold as many in advance as they ever do.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from stageflow_actors import Runtime, Workflow

__all__ = ["CASES"]

WARM_UP = 4_000
ACTORS = 4


def work(context: dict[str, Any]) -> None:
    """Note the start, then sleep."""
    log = context.get("log")
    if log is not None:
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, f"{time.monotonic()} {os.getpid()} {context['number']}\n".encode())
        os.close(fd)
    if context.get("seconds"):
        time.sleep(context["seconds"])


class _Bench:
    """A cluster of one sleeping stage, and the file of its starts."""

    def __init__(self, folder: str, actors: int) -> None:
        self.flow = Workflow("sleeping").add_stage(work, id="sleep", actors=actors)
        self.queue = "stageflow.sleeping.stage0"
        self.runtime = Runtime(self.flow, data_dir=Path(folder) / "data")
        self.log = Path(folder) / "log"

    def warm_up(self) -> None:
        for _ in self.runtime.map_unordered(self.flow, ({} for _ in range(WARM_UP))):
            pass
        self.log.unlink(missing_ok=True)

    def submit(self, count: int, seconds: float) -> list[Any]:
        """Submit messages, and wait until the first of them begin."""
        contexts = [{"log": str(self.log), "number": number, "seconds": seconds} for number in range(count)]
        submitted: list[Any] = self.runtime.submit_many(self.flow, contexts)
        while len(self.starts()) < 2:
            time.sleep(0.001)
        return submitted

    def starts(self) -> list[tuple[float, int, int]]:
        """Return (time, process, number) of each start."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(float(at), int(pid), int(number)) for at, pid, number in map(str.split, lines)]


def priority(rounds: int) -> dict[str, Any]:
    """Milliseconds until an urgent message begins behind 300 messages of 20 ms, and how many begin before it."""
    latencies, passed = [], []
    with tempfile.TemporaryDirectory(prefix="stageflow-bench-") as folder:
        bench = _Bench(folder, 2)
        with bench.runtime as runtime:
            for _ in range(rounds):
                bench.warm_up()
                many = bench.submit(300, 0.02)
                urgent = runtime.submit(bench.flow, {"log": str(bench.log), "number": -1}, priority=9)
                submitted = time.monotonic()
                urgent.result()
                starts = bench.starts()
                begun = next(at for at, _, number in starts if number == -1)
                latencies.append(max(0.0, begun - submitted) * 1e3)
                passed.append(sum(submitted < at < begun for at, _, _ in starts))
                _finish(many)
    return {
        "latency_ms": round(median(latencies), 1),
        "worst_ms": round(max(latencies), 1),
        "begun_before": max(passed),
    }


def pause(rounds: int) -> dict[str, Any]:
    """Messages that begin after `pause()` has returned, of 300 messages of 5 ms."""
    late = []
    with tempfile.TemporaryDirectory(prefix="stageflow-bench-") as folder:
        bench = _Bench(folder, 2)
        with bench.runtime as runtime:
            for _ in range(rounds):
                bench.warm_up()
                many = bench.submit(300, 0.005)
                runtime.pause(bench.queue)
                returned = time.monotonic()
                time.sleep(0.5)
                late.append(sum(at > returned for at, _, _ in bench.starts()))
                runtime.resume(bench.queue)
                _finish(many)
    return {"begun_after_pause": max(late)}


def scale(rounds: int) -> dict[str, Any]:
    """The share of eight workers after a scale-up from one, and the time against the ideal: 320 messages of 20 ms."""
    shares, ratios = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="stageflow-bench-") as folder:
            bench = _Bench(folder, 1)
            with bench.runtime as runtime:
                bench.warm_up()
                many = bench.submit(320, 0.02)
                runtime.scale(bench.flow, "sleep", 8)
                began = time.monotonic()
                _finish(many)
                ratios.append(320 * 0.02 / 8 / (time.monotonic() - began))
                counts = Counter(pid for _, pid, _ in bench.starts())
                shares.append(min(counts.values()) * 8 / 320 if len(counts) == 8 else 0.0)
    return {"least_share_of_eight": round(median(shares), 2), "of_ideal": round(median(ratios), 2)}


def efficiency(rounds: int) -> dict[str, Any]:
    """The share of the time in which four workers sleep, at 1, 20 and 1,000 ms."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="stageflow-bench-") as folder:
        bench = _Bench(folder, ACTORS)
        with bench.runtime as runtime:
            for milliseconds, count in ((1, 4_000), (20, 400), (1_000, 16)):
                shares = []
                for _ in range(rounds):
                    contexts = [{"seconds": milliseconds / 1e3}] * count
                    for _ in runtime.map_unordered(bench.flow, contexts[: min(count, 8 * ACTORS) // 4]):
                        pass
                    began = time.monotonic()
                    for _ in runtime.map_unordered(bench.flow, contexts):
                        pass
                    shares.append(count * milliseconds / 1e3 / ACTORS / (time.monotonic() - began))
                found[f"{milliseconds}_ms"] = round(median(shares), 3)
    nap = time.perf_counter()
    for _ in range(200):
        time.sleep(0.001)
    found["a_sleep_of_1_ms"] = round(0.2 / (time.perf_counter() - nap), 3)
    return found


def _finish(many: list[Any]) -> None:
    for instance in many:
        instance.result()


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "priority": priority,
    "pause": pause,
    "scale": scale,
    "efficiency": efficiency,
}
"""The cases by name; each takes the number of rounds."""
