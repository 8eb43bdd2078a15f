#!/usr/bin/env python3
"""Run the deterministic simulator for as many seeds as there is time for.

Each seed is a whole cluster in one thread — the production broker core and journal, coordinator, pools, actors and
clients — under a virtual clock, a disk that loses what was not synced, and a network that breaks off. What breaks a law
is printed with its seed; the same seed gives the same run again.

    ./scripts/prove simulate -n 10000                 # 10,000 tame and 10,000 wild seeds
    ./scripts/prove simulate --from 183 -n 1 --wild   # one seed again, with what happened in it
"""

from __future__ import annotations

import argparse
import importlib
import logging
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

from argument_types import from_one

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 50


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=from_one, default=1_000, metavar="N", help="seeds of each kind (default: 1000)")
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="SEED", help="the first one (default: 0)")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--tame", action="store_true", help="only accidents that no result may show")
    kinds.add_argument("--wild", action="store_true", help="only those with killed workers, cancels and scaling")
    parser.add_argument("--jobs", type=from_one, default=os.cpu_count() or 1, help="processes (default: one per CPU)")
    parser.add_argument("--most-failures", type=from_one, default=5, metavar="N", help="stop after so many (5)")
    given = parser.parse_args()
    wilds = [True] if given.wild else [False] if given.tame else [False, True]
    last = given.first + given.n
    work = [(first, min(first + CHUNK, last), wild) for first in range(given.first, last, CHUNK) for wild in wilds]
    began = time.monotonic()
    done = failures = 0
    accidents: dict[str, int] = {}
    with multiprocessing.get_context("spawn").Pool(min(given.jobs, len(work))) as pool:
        for count, told, happened in pool.imap_unordered(run, work):
            done += count
            for name, times in happened.items():
                accidents[name] = accidents.get(name, 0) + times
            for text in told:
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
    """The seeds of one part: how many there were, what went wrong, and how often what happened in them."""
    for folder in ("tests/simulator", "tests/fixtures", ""):
        path = str(ROOT / folder)
        if path not in sys.path:
            sys.path.insert(0, path)
    logging.disable(logging.WARNING)  # what is wrong here is a law that is broken, and nothing else
    simulate: Any = importlib.import_module("simulation").simulate
    first, last, wild = part
    told = []
    accidents: dict[str, int] = {}
    for seed in range(first, last):
        try:
            ran = simulate(seed, wild=wild)
        except AssertionError as error:
            told.append(str(error))
            continue
        for name, times in ran.tally().items():
            accidents[name] = accidents.get(name, 0) + times
    return last - first, told, accidents


if __name__ == "__main__":
    sys.exit(main())
