#!/usr/bin/env python
"""Torture of the journal: cut it at every byte, flip its bits, fail its disk at every call, lose what was not synced.

See `--help`; what is done and how it is judged is in `torturing/`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter

from argument_types import from_one, share
from torturing.crashes import crash_at_every_call
from torturing.faults import FAULTS, LASTING, READING, fail_every_call, fail_every_read
from torturing.journal_at_rest import cut_everywhere, flip_bits, lose_files, lose_sectors, spoil_sectors
from torturing.sample_journal import Specimen
from torturing.scenarios import SCENES

PARTS = ("cuts", "sectors", "flips", "faults", "crashes")

EPILOG = """
The parts:
  cuts      a journal of some two hundred records in twenty segments, cut at every byte: once as the end of everything
            (in the header refused, behind the end mark nothing lost, elsewhere recovered up to the last whole batch,
            with a warning), once with the later segments in place (refused: file and offset); each segment deleted
  sectors   every 512-byte sector of the last batch zeroed, set, garbled, or left as it was before; and sets of them;
            sectors of batches before it, with the rest or only the end mark left (refused); each sector unreadable
  flips     every bit of every header, and a share of all other bits; some of the journals are repaired then
  faults    every call of the disk fails, once and for ever: EIO, ENOSPC, EINTR, short writes; in the scenes
            first creation, append and rotation, compaction, recovery, repair; and every read of the last two
  crashes   at every call of the same scenes, every subset of what was not synced is lost (up to --states of them)

The law: what was acknowledged survives; damage in it is refused, never dropped; after a failed write or sync nothing
is acknowledged. The first violation ends the run with the seed that repeats it.

  ./scripts/prove torture                       all of it, once: some minutes on one core
  ./scripts/prove torture --bodies 1            each bit of the bodies flipped too: an hour
  ./scripts/prove torture --share 0.02          one in fifty
  ./scripts/prove torture --only faults crashes --seeds 100
"""


def run(seed: int, parts: list[str], share: float, bodies: float, states: int, figures: Counter[str]) -> None:
    """All parts with one seed. Raises AssertionError at the first violation of the law."""
    chance = random.Random(f"torture {seed}")
    if {"cuts", "sectors", "flips"} & set(parts):
        specimen = Specimen.grow(seed, 160)
        figures["states compared with those in memory"] += specimen.check_states()
        figures["records in journals"] += specimen.records
        figures["bytes of journals"] += specimen.size
        if "sectors" in parts:
            lose_sectors(specimen, figures, rounds=round(400 * share) + 2, chance=chance)
            spoil_sectors(specimen, figures, share=share, chance=chance)
        if "cuts" in parts:
            cut_everywhere(specimen, figures, share=share, chance=chance)
            lose_files(specimen, figures)
        if "flips" in parts:
            flip_bits(specimen, figures, share=share, bodies=min(bodies, share), chance=chance)
    for scene in SCENES:
        if "faults" in parts:
            for code, name in FAULTS:
                for for_ever in (False, True) if name in LASTING else (False,):
                    fail_every_call(scene, code, figures, for_ever=for_ever, share=share, chance=chance, seed=seed)
            if scene in READING:
                fail_every_read(scene, figures, share=share, chance=chance, seed=seed)
        if "crashes" in parts:
            crash_at_every_call(scene, figures, most=max(4, round(states * share)), chance=chance, seed=seed)


def main() -> int:
    """Run what was asked for and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="which parts (default: all)")
    parser.add_argument("--seeds", type=from_one, default=1, help="how many journals and lives (default: 1)")
    parser.add_argument("--first-seed", type=int, default=0, help="where seeds begin; to repeat a violation")
    parser.add_argument("--share", type=share, default=1.0, help="share of the bytes, bits, calls tried (default: 1)")
    parser.add_argument("--bodies", type=share, default=0.01, help="share of the bits outside headers (default: 0.01)")
    parser.add_argument("--states", type=from_one, default=64, help="most crash states at one call (default: 64)")
    args = parser.parse_args()
    figures: Counter[str] = Counter()
    began = time.monotonic()
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        try:
            run(seed, args.only, args.share, args.bodies, args.states, figures)
        except AssertionError as error:
            print(f"seed {seed}: the law is broken: {error}\nrepeat it with --first-seed {seed} and the same options")
            raise
        if sys.stderr.isatty():
            print(f"seed {seed} done, {time.monotonic() - began:.0f} s", file=sys.stderr)
    for name, count in figures.items():
        print(f"{count:>12,}  {name}")
    print(f"{time.monotonic() - began:>12,.0f}  seconds; the law holds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
