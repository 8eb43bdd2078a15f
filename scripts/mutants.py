#!/usr/bin/env python3
"""Plant mistakes and show which named test kills each.

Each mutant is a plausible mistake of a broker, a journal or a saga runtime,
planted into a copy of the code. It dies when each test named beside it fails:
a test that nothing can fail proves nothing. The working tree is only read.

    ./scripts/prove mutants           # all of them: some minutes
    ./scripts/prove mutants no-fence  # one
    ./scripts/prove mutants --list
    ./scripts/prove mutants --check   # only check that each can be planted

The mistakes stand in the tables of `scripts/mutating`, one per area of the
code; add a new one at the end of the table of the file that it changes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from argument_types import script_parser
from mutating import MUTANTS
from mutating.mutant import Mutant

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("brokers", "stageflow_actors", "tests", "examples", "scripts", "pyproject.toml", "README.md")
LIMIT_SECONDS = 300.0


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="MUTANT", help="only these (default: all)")
    parser.add_argument("--list", action="store_true", help="list the mutants and exit")
    parser.add_argument("--check", action="store_true", help="check that each can be planted, and exit")
    given = parser.parse_args()
    known = {mutant.name: mutant for mutant in MUTANTS}
    for name in given.names:
        if name not in known:
            parser.error(f"unknown mutant {name!r}; see --list")
    if given.list:
        for mutant in MUTANTS:
            print(f"{mutant.name:28} {mutant.mistake}")
        return 0
    chosen = [known[name] for name in given.names] or MUTANTS
    for mutant in chosen:
        plant(mutant, ROOT, dry=True)
    if given.check:
        print(f"all {len(chosen)} mutants can be planted")
        return 0
    alive = []
    for mutant in chosen:
        began = time.monotonic()
        blind = survived(mutant)
        if blind:
            alive.append(mutant.name)
        how = f"LIVES, in spite of {', '.join(blind)}" if blind else f"dies by {', '.join(mutant.killers)}"
        print(f"{mutant.name:28} {how}  ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{len(alive)} live: {', '.join(alive)}" if alive else "all mutants died")
    return 1 if alive else 0


def survived(mutant: Mutant) -> list[str]:
    """Return the killers that pass, or do not end, with the mistake in place."""
    with TemporaryDirectory(prefix="stageflow-mutant-", ignore_cleanup_errors=True) as directory:
        place = Path(directory)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, place / name)
        plant(mutant, place)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *mutant.killers]
        env = {**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{place / 'brokers'}"}
        run = subprocess.run(
            command, cwd=place, env=env, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
        )
    if run.returncode not in (0, 1):
        raise SystemExit(f"{mutant.name}: pytest itself failed:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return [killer for killer in mutant.killers if f"FAILED {killer}" not in run.stdout]


def plant(mutant: Mutant, place: Path, *, dry: bool = False) -> None:
    """Make the mistake in the copy. Ends the script if the text to replace is not found exactly once.

    `dry`: only check whether it can be made.
    """
    for file, there, instead in mutant.edits:
        path = place / file
        text = path.read_text()
        if text.count(there) != 1:
            raise SystemExit(f"{mutant.name}: {file} has {text.count(there)} times, not once:\n{there}")
        if not dry:
            path.write_text(text.replace(there, instead))


if __name__ == "__main__":
    sys.exit(main())
