#!/usr/bin/env python3
"""Send millions of wrong frames while well-behaved peers work.

Attackers are processes with raw ZeroMQ sockets. Their frames lie about sizes
and numbers, lack their end, arrive twice, name leases of other peers and claim
false roles; some sockets never read, and all close without a goodbye. At the
same time well-behaved peers publish, work and settle. Each of their groups
must end exactly once, with a body that only its own workers changed. The
broker must neither end nor grow.

    ./scripts/prove fuzz                      # 200,000 frames
    ./scripts/prove fuzz -n 2000000 --seed 7  # two million others

Exit code 1 if a message was lost, doubled or stolen, or if the broker ended or
grew; else 0.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from argument_types import from_one, script_parser
from broker_launcher import start_broker
from fuzzing.attacker import ANSWERS, SHARED_LEASES, attack
from fuzzing.well_behaved_peer import QUEUES, WellBehavedPeers

ROOT = Path(__file__).resolve().parent.parent

LIMITS = {
    "max_queues": 300,
    "max_facts": 100,
    "max_peers": 64,
    "max_gathers": 50,
    "max_early": 50,
    "max_unread_bytes": 8 << 20,
}
"""Small limits, so that the frames reach them."""

SAMPLE_SECONDS = 0.5
"""Seconds between two samples of the broker's memory and descriptors."""
GROWTH_BYTES = 24 << 20
"""Growth allowed from the first quarter to the last: the allocator's slack."""
MORE_DESCRIPTORS = 8


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("-n", type=from_one, default=200_000, metavar="N", help="frames to send (default: 200000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the frames (default: 1)")
    parser.add_argument("--attackers", type=from_one, default=2, metavar="N", help="attacking processes (default: 2)")
    parser.add_argument(
        "--durability", choices=("fsync", "write"), default="write", help="of the journal (default: write)"
    )
    parser.add_argument("--data", type=Path, help="directory for the journal (default: a temporary one)")
    parser.add_argument("--output", choices=("text", "json"), default="text")
    given = parser.parse_args()
    with TemporaryDirectory(prefix="fuzz-", dir=given.data, ignore_cleanup_errors=True) as directory:
        figures, wrongs = run(Path(directory), given.n, given.seed, given.attackers, given.durability)
    if given.output == "json":
        print(json.dumps({**figures, "wrongs": wrongs}))
    else:
        for name, value in figures.items():
            print(f"{name:32} {value}")
        for wrong in wrongs:
            print(f"WRONG: {wrong}", file=sys.stderr)
    return 1 if wrongs else 0


def run(directory: Path, count: int, seed: int, attackers: int, durability: str) -> tuple[dict[str, Any], list[str]]:
    """Send `count` frames. Return the figures and the violations."""
    address = f"ipc://{directory}/broker"
    options = {
        "address": address,
        "journal": str(directory / "journal"),
        "durability": durability,
        "supervised": False,
        "max_message_bytes": 1 << 20,
        "limits": LIMITS,
        "segment_bytes": 4 << 20,
        "parent": os.getpid(),
    }
    with (directory / "stderr").open("wb") as stderr:
        broker = start_broker(options, stderr=stderr, cwd=ROOT)
    spawn = multiprocessing.get_context("spawn")
    held = spawn.Array("Q", 2 * SHARED_LEASES, lock=False)
    sent, answers = spawn.Value("q", 0), spawn.Array("q", len(ANSWERS))
    began = time.monotonic()
    well_behaved = WellBehavedPeers(address, held, seed)
    share = [count // attackers + (number < count % attackers) for number in range(attackers)]
    processes = [
        spawn.Process(
            target=attack,
            args=(address, seed * 1_000 + number, part, held, well_behaved.peers, sent, answers),
            daemon=True,
        )
        for number, part in enumerate(share)
    ]
    seen: list[tuple[int, int, int]] = []
    watched = psutil.Process(broker.pid)
    for process in processes:
        process.start()
    wrongs: list[str] = []
    stats: dict[str, Any] = {"queues": [], "malformed": 0}
    try:
        while any(process.is_alive() for process in processes) and broker.poll() is None:
            well_behaved.tidy()
            seen.append((sent.value, watched.memory_info().rss, watched.num_fds()))
            processes[0].join(SAMPLE_SECONDS)
            if sys.stderr.isatty():
                print(f"\r{sent.value} frames", end="", file=sys.stderr)
        seconds = time.monotonic() - began
        wrongs += [f"an attacker has failed with {p.exitcode}" for p in processes if p.exitcode not in (0, None)]
        well_behaved.stop()
        well_behaved.tidy()
        stats = well_behaved.ask.stats("")
    except TimeoutError:
        seconds = time.monotonic() - began
        wrongs.append("the broker does not answer any more")
    finally:
        for process in processes:
            process.kill()
    wrongs += well_behaved.judge.wrongs
    well_behaved.close()
    left = {queue["name"]: queue for queue in stats["queues"] if queue["name"] in QUEUES}
    wrongs += [f"{name} holds {q['ready']} messages" for name, q in left.items() if q["ready"] or q["leased"]]
    broker.terminate()
    status = broker.wait(30)
    errors = (directory / "stderr").read_text()
    if status != 0 or "Traceback" in errors:
        wrongs.append(f"the broker ended with {status}: {errors[-2000:]}")
    quarter = max(1, len(seen) // 4)
    first, last = seen[:quarter], seen[-quarter:]
    memory = [max(rss for _, rss, _ in part) for part in (first, last)]
    fds = [max(count for _, _, count in part) for part in (first, last)]
    if memory[1] > memory[0] + GROWTH_BYTES:
        wrongs.append(f"the broker grew from {memory[0] >> 20} to {memory[1] >> 20} MiB")
    if fds[1] > fds[0] + MORE_DESCRIPTORS:
        wrongs.append(f"the broker's descriptors went from {fds[0]} to {fds[1]}")
    figures = {
        "frames sent": sent.value,
        "seconds": round(seconds, 1),
        "frames a second": round(sent.value / seconds),
        "malformed, counted by the broker": stats["malformed"],
        "answers to attackers": ", ".join(f"{n} {kind}" for kind, n in zip(ANSWERS, answers[:], strict=True)),
        "well-behaved groups ended": len(well_behaved.judge.ended),
        "broker's memory, first quarter": f"{memory[0] >> 20} MiB",
        "broker's memory, last quarter": f"{memory[1] >> 20} MiB",
        "broker's descriptors": f"{fds[0]}, then {fds[1]}",
        "wrongs": len(wrongs),
    }
    return figures, wrongs


if __name__ == "__main__":
    sys.exit(main())
