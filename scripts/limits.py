#!/usr/bin/env python
"""Measure memory and recovery of a broker with deep queues.

A broker process is filled with messages that no worker takes, each an instance
of its own: first a quarter of -n, then -n. Its memory (RSS) is read when all
are durable; then it is killed and started again, and its recovery time and
memory are measured. Checked: memory, recovery time, and that the recovery of a
message of the larger backlog costs at most --slack times the CPU time of one of
the smaller. Not its elapsed time: that of a small backlog is short, and other
programs on the machine change it several times over.

  ./scripts/prove limits                        # 1,000,000 messages of 1,000
                                                # bytes: 1.5 GB, two minutes
  ./scripts/prove limits -n 50000 --memory 120  # a small one

Exit code 1 if a limit is broken, else 0.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil

from argument_types import above_zero, from_one, script_parser
from broker_launcher import start_broker
from stageflow_brokers.api import FLAG_START, Listener, PublishItem, Target
from stageflow_brokers.zeromq.client import ZmqClient

BATCH = 1000


class Filled:
    """Figures of one backlog: `memory`, `memory_recovered` and `journal` in bytes, times in seconds.

    `recovery` is elapsed time; `empty_start_cpu` and `recovery_cpu` are CPU time of the broker, until it is ready.
    """

    def __init__(self, count: int, size: int, where: Path | None) -> None:
        self.count = count
        temporary = tempfile.TemporaryDirectory
        with temporary(prefix="limits-", dir=where) as journal, temporary(prefix="sf-") as sockets:
            self._run(Path(journal) / "journal", Path(sockets), size)

    def _run(self, journal: Path, sockets: Path, size: int) -> None:
        address = f"ipc://{sockets}/broker"
        broker, _ = timed_start(journal, address)
        try:
            self.empty_start_cpu = cpu_seconds(broker)
            began = time.monotonic()
            self._publish(address, size)
            self.publishing = time.monotonic() - began
            self.memory = psutil.Process(broker.pid).memory_info().rss
            self.journal = sum(file.stat().st_blocks * 512 for file in journal.iterdir())
        finally:
            end(broker, signal.SIGKILL)
        broker, self.recovery = timed_start(journal, address)
        try:
            self.recovery_cpu = cpu_seconds(broker)
            self.memory_recovered = psutil.Process(broker.pid).memory_info().rss
            client = ZmqClient(address, Listener(), role="client", name="limits")
            self.recovered = client.admin.stats("").result(60)["messages"]
            client.close(timeout=1)
        finally:
            end(broker, signal.SIGTERM)

    def _publish(self, address: str, size: int) -> None:
        client = ZmqClient(address, Listener(), role="client", name="limits")
        body = os.urandom(size)
        waiting: list[Future[Any]] = []
        for first in range(0, self.count, BATCH):
            names = range(first, min(first + BATCH, self.count))
            items = [PublishItem(0, size, f"instance-{number:09d}", 1, FLAG_START) for number in names]
            waiting.append(client.publish([Target("deep", "stage")], items, [body] * len(items)))
            if len(waiting) > 8:
                waiting.pop(0).result(60)
        for each in waiting:
            each.result(60)
        client.close(timeout=5)


def timed_start(journal: Path, address: str) -> tuple[subprocess.Popen[bytes], float]:
    """Return a ready broker process and the seconds of its start, that of Python included."""
    began = time.monotonic()
    process = start_broker({"address": address, "journal": str(journal), "supervised": False})
    return process, time.monotonic() - began


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """Return the CPU time that the process has used, in user code and in the kernel."""
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def end(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal and wait for the end."""
    process.send_signal(number)
    process.wait(60)


def main() -> int:
    """Measure, print and check."""
    parser = script_parser(__doc__)
    parser.add_argument("-n", type=from_one, default=1_000_000, help="messages in the larger backlog (1000000)")
    parser.add_argument("--bytes", type=from_one, default=1000, help="bytes per body (default: 1000)")
    parser.add_argument("--memory", type=above_zero, default=700, help="RSS at most, in MB (default: 700)")
    parser.add_argument("--recovery", type=above_zero, default=10, help="seconds of recovery at most (default: 10)")
    parser.add_argument("--slack", type=above_zero, default=2, help="factor above linear at most (default: 2)")
    parser.add_argument("--directory", type=Path, default=None, help="directory for the journals (default: temporary)")
    args = parser.parse_args()
    small, large = (Filled(count, args.bytes, args.directory) for count in (max(args.n // 4, 1), args.n))
    for run in (small, large):
        print(
            f"{run.count:>12,} messages of {args.bytes:,} bytes: {run.memory / 1e6:,.0f} MB, "
            f"{run.memory_recovered / 1e6:,.0f} MB once recovered; recovery {run.recovery:.2f} s; "
            f"published in {run.publishing:.1f} s; journal {run.journal / 1e6:,.0f} MB"
        )
    base = min(small.empty_start_cpu, large.empty_start_cpu)
    # The kernel counts CPU time in steps of 0.01 s.
    each = [max(run.recovery_cpu - base, 0.01) / run.count * 1e6 for run in (small, large)]
    print(f"{'':>12} CPU time of recovery per message: {each[0]:.2f} and {each[1]:.2f} µs")
    broken = [
        what
        for what, fails in {
            f"memory is over {args.memory:g} MB": max(large.memory, large.memory_recovered) > args.memory * 1e6,
            f"recovery takes over {args.recovery:g} s": large.recovery > args.recovery,
            f"recovery is over {args.slack:g} times linear": each[1] > args.slack * each[0],
            "messages are missing": (small.recovered, large.recovered) != (small.count, large.count),
        }.items()
        if fails
    ]
    print("all limits hold" if not broken else "broken: " + "; ".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
