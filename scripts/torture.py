#!/usr/bin/env python
"""Damage journals in every way: nothing acknowledged is lost.

The parts, each on a disk in memory (code and checks are in `torturing/`):
  cuts      a journal of some 200 records in 20 segments, cut at every byte:
            as the end of everything (refused within the header, nothing lost
            behind the end mark, elsewhere recovered up to the last whole batch
            with a warning), and with the later segments in place (refused with
            file and offset); each segment deleted
  sectors   each 512-byte sector of the last batch zeroed, set, garbled or left
            as before, and sets of them; sectors of earlier batches (refused);
            each sector unreadable
  flips     each bit of each header, and a share of all other bits, flipped;
            some of these journals are repaired
  faults    each disk call fails once and permanently: EIO, ENOSPC, EINTR,
            short writes; in the scenarios first creation, append and rotation,
            compaction, recovery, repair; and each read of the last two
  crashes   at each call of the same scenarios, each subset of the unsynced
            writes is lost (up to --states subsets)

The law: what was acknowledged survives; damage in it is refused, never
dropped; after a failed write or sync nothing is acknowledged. The first
violation ends the run and prints the seed that repeats it.

  ./scripts/prove torture               # everything once: minutes on one core
  ./scripts/prove torture --bodies 1    # all bits of the bodies too: one hour
  ./scripts/prove torture --share 0.02  # one in fifty
  ./scripts/prove torture --only faults crashes --seeds 100
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter

from argument_types import from_one, script_parser, share
from torturing.crashes import crash_at_every_call
from torturing.faults import FAULTS, LASTING, READING, fail_every_call, fail_every_read
from torturing.journal_at_rest import cut_everywhere, flip_bits, lose_files, lose_sectors, spoil_sectors
from torturing.sample_journal import SampleJournal
from torturing.scenarios import SCENARIOS

PARTS = ("cuts", "sectors", "flips", "faults", "crashes")


def run(seed: int, parts: list[str], share: float, bodies: float, states: int, figures: Counter[str]) -> None:
    """Run all parts with one seed. Raises AssertionError at the first violation of the law."""
    chance = random.Random(f"torture {seed}")
    if {"cuts", "sectors", "flips"} & set(parts):
        sample = SampleJournal.grow(seed, 160)
        figures["states compared with those in memory"] += sample.check_states()
        figures["records in journals"] += sample.records
        figures["bytes of journals"] += sample.size
        if "sectors" in parts:
            lose_sectors(sample, figures, rounds=round(400 * share) + 2, chance=chance)
            spoil_sectors(sample, figures, share=share, chance=chance)
        if "cuts" in parts:
            cut_everywhere(sample, figures, share=share, chance=chance)
            lose_files(sample, figures)
        if "flips" in parts:
            flip_bits(sample, figures, share=share, bodies=min(bodies, share), chance=chance)
    for scenario in SCENARIOS:
        if "faults" in parts:
            for code, name in FAULTS:
                for for_ever in (False, True) if name in LASTING else (False,):
                    fail_every_call(scenario, code, figures, for_ever=for_ever, share=share, chance=chance, seed=seed)
            if scenario in READING:
                fail_every_read(scenario, figures, share=share, chance=chance, seed=seed)
        if "crashes" in parts:
            crash_at_every_call(scenario, figures, most=max(4, round(states * share)), chance=chance, seed=seed)


def main() -> int:
    """Run the chosen parts and print the figures."""
    parser = script_parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="PART", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--seeds", type=from_one, default=1, help="number of seeds (default: 1)")
    parser.add_argument("--first-seed", type=int, default=0, help="first seed, to repeat a violation (default: 0)")
    parser.add_argument("--share", type=share, default=1.0, help="share of bytes, bits and calls tried (default: 1)")
    parser.add_argument("--bodies", type=share, default=0.01, help="share of bits outside headers (default: 0.01)")
    parser.add_argument("--states", type=from_one, default=64, help="crash states per call at most (default: 64)")
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
