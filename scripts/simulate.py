#!/usr/bin/env python3
"""Run the deterministic simulator for many seeds.

Each seed is a whole cluster in one thread: the production broker core and
journal, coordinator, pools, actors and clients, under a virtual clock, on a
disk that loses unsynced writes, and over a network that breaks. A violation is
printed with its seed; the same seed repeats the same run.

    ./scripts/prove simulate -n 10000                # 10,000 tame, 10,000 wild
    ./scripts/prove simulate --from 183 -n 1 --wild  # one seed in detail
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

from argument_types import from_one, script_parser

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 50


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("-n", type=from_one, default=1_000, metavar="N", help="seeds of each kind (default: 1000)")
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="SEED", help="first seed (default: 0)")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--tame", action="store_true", help="only runs whose accidents no result may show")
    kinds.add_argument("--wild", action="store_true", help="only runs with killed workers, cancels and scaling")
    parser.add_argument("--jobs", type=from_one, default=os.cpu_count() or 1, help="processes (default: one per CPU)")
    parser.add_argument("--most-failures", type=from_one, default=5, metavar="N", help="stop after N failures (5)")
    given = parser.parse_args()
    wilds = [True] if given.wild else [False] if given.tame else [False, True]
    last = given.first + given.n
    work = [(first, min(first + CHUNK, last), wild) for first in range(given.first, last, CHUNK) for wild in wilds]
    began = time.monotonic()
    done = failures = 0
    accidents: dict[str, int] = {}
    with multiprocessing.get_context("spawn").Pool(min(given.jobs, len(work))) as pool:
        for count, violations, happened in pool.imap_unordered(run, work):
            done += count
            for name, times in happened.items():
                accidents[name] = accidents.get(name, 0) + times
            for text in violations:
                failures += 1
                print(f"\r{text}\n", file=sys.stderr)
            if sys.stderr.isatty():
                print(f"\r{done} of {given.n * len(wilds)} seeds, {failures} failures", end="", file=sys.stderr)
            if failures >= given.most_failures:
                pool.terminate()
                break
    seconds = time.monotonic() - began
    print(f"\n{done} seeds in {seconds:.0f} s ({done / seconds:.0f} a second), {failures} failures")
    for name, times in sorted(accidents.items()):
        print(f"  {times:8} × {name.strip('_').replace('_', ' ')}")
    return 1 if failures else 0


def run(part: tuple[int, int, bool]) -> tuple[int, list[str], dict[str, int]]:
    """Run the seeds of one part. Return their number, the violations, and the accidents by kind."""
    for folder in ("tests/simulator", "tests/fixtures", ""):
        path = str(ROOT / folder)
        if path not in sys.path:
            sys.path.insert(0, path)
    logging.disable(logging.WARNING)  # only violations are reported
    simulate: Any = importlib.import_module("simulation").simulate
    first, last, wild = part
    violations = []
    accidents: dict[str, int] = {}
    for seed in range(first, last):
        try:
            ran = simulate(seed, wild=wild)
        except AssertionError as error:
            violations.append(str(error))
            continue
        for name, times in ran.tally().items():
            accidents[name] = accidents.get(name, 0) + times
    return last - first, violations, accidents


if __name__ == "__main__":
    sys.exit(main())
