#!/usr/bin/env python3
"""Plant mistakes, one at a time, into a copy of the code, and show which named test kills each.

A test that nothing can fail proves nothing. Each mutant here is a mistake that a broker, a journal or a saga runtime
can plausibly have; it dies when the tests named beside it fail. The working tree is only read.

    scripts/mutants.py              # all of them, some minutes
    scripts/mutants.py no-fence     # one
    scripts/mutants.py --list
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("brokers", "stageflow_actors", "tests", "examples", "scripts", "pyproject.toml", "README.md")
LIMIT_SECONDS = 300.0


class Mutant(NamedTuple):
    """`edits` are (file, what is there, what is put in its place), each found exactly once; `tests` go to pytest."""

    name: str
    mistake: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "dispatch-before-fsync",
        "what a round decided leaves before it is on disk",
        (
            (
                "brokers/engine.py",
                "        written = self._commit()\n",
                "        early = machine.dispatch()\n        written = self._commit()\n",
            ),
            ("brokers/engine.py", "        return machine.dispatch()\n", "        return early\n"),
        ),
        ("tests/brokers/test_commit_before_effect.py",),
    ),
    Mutant(
        "no-fence",
        "a settlement counts whatever lease it names",
        (("brokers/core/settling.py", "if message is None or message.lease != lease:", "if message is None:"),),
        ("tests/brokers",),
    ),
    Mutant(
        "no-directory-fsync",
        "a new segment's name is not made durable",
        (
            (
                "brokers/journal/supply.py",
                (
                    "            files.rename(source, self._directory / file_name(number))\n"
                    "            files.fsync_dir(self._directory)\n"
                ),
                "            files.rename(source, self._directory / file_name(number))\n",
            ),
        ),
        ("tests/journal",),
    ),
    Mutant(
        "segment-out-of-order",
        "the newest sealed segment is given back instead of the oldest",
        (
            ("brokers/journal/journal.py", "        oldest = self._sealed[0]\n", "        oldest = self._sealed[-1]\n"),
            ("brokers/journal/journal.py", "        del self._sealed[0]\n", "        del self._sealed[-1]\n"),
        ),
        ("tests/brokers/test_reclaim.py", "tests/journal/test_journal_commit.py"),
    ),
    Mutant(
        "segment-not-copied-forward",
        "a segment is given back though messages in it are alive",
        (
            (
                "brokers/reclaim.py",
                "        if self._machine.ledger.copy_forward(",
                "        if False and self._machine.ledger.copy_forward(",
            ),
        ),
        ("tests/brokers/test_reclaim.py",),
    ),
    Mutant(
        "join-counts-duplicates",
        "an arrival that comes twice fills two slots of a join",
        (
            ("brokers/core/gather.py", "        if slot in self.seen:\n            return False\n", ""),
            (
                "brokers/core/gather.py",
                "self.arrivals[slot] = body",
                'self.arrivals[f"{slot}{len(self.arrivals)}"] = body',
            ),
        ),
        ("tests/brokers/test_contract.py", "-k", "gather"),
    ),
    Mutant(
        "compensation-by-index",
        "all stages before the failed one are compensated, completed or not",
        (
            (
                "stageflow_actors/core/routing.py",
                "for stage_id in reversed(completed_stages(envelope.trail)))\n",
                "for stage_id in [stage.id for stage in reversed(plan.stages)])\n",
            ),
        ),
        ("tests/core", "tests/language/test_language_model.py"),
    ),
    Mutant(
        "failed-fsync-ignored",
        "an error of fdatasync is passed over",
        (
            (
                "brokers/journal/journal.py",
                "                self._files.fdatasync(self._fd)\n",
                (
                    "                try:\n                    self._files.fdatasync(self._fd)\n"
                    "                except OSError:\n                    pass\n"
                ),
            ),
        ),
        ("tests/journal",),
    ),
    Mutant(
        "epoch-not-durable",
        "a broker that starts does not write down its new epoch",
        (("brokers/core/machine.py", "        self.ledger.keep_epoch()\n", ""),),
        ("tests/brokers",),
    ),
    Mutant(
        "roster-not-awaited",
        "after a restart queues open before the workers have said what they hold",
        (("brokers/core/machine.py", "rostered=not supervised,", "rostered=True,"),),
        ("tests/brokers/test_contract.py", "tests/simulator"),
    ),
    Mutant(
        "frames-taken-twice",
        "a frame that was sent again is taken again",
        (
            (
                "brokers/core/machine.py",
                "        if frame <= session.last_frame:\n            return SEEN\n",
                "",
            ),
        ),
        ("tests/brokers",),
    ),
    Mutant(
        "step-not-kept",
        "a step is confirmed and never recorded",
        (
            (
                "brokers/core/settling.py",
                "        self._ledger.record(records.KEPT_CHECKPOINT, session.peer, header, blob)\n",
                "",
            ),
        ),
        ("tests/brokers",),
    ),
    Mutant(
        "id-leaves-before-history",
        "the broker forgets an instance before its row is durable",
        (
            (
                "stageflow_actors/runtime/coordinator.py",
                "        try:\n            self._history.write(rows)\n",
                (
                    "        acks: list[Ack] = [(item.id, item.lease, LEAVE, item.group) for item, _ in batch]\n"
                    "        self._broker.settle([], [], acks, [], [])\n"
                    "        try:\n            self._history.write(rows)\n"
                ),
            ),
        ),
        ("tests/simulator",),
    ),
    Mutant(
        "failed-stage-undone",
        "a stage that failed counts as completed when it comes to undoing",
        (
            (
                "stageflow_actors/core/routing.py",
                "        if record.status == StageStatus.completed:\n            found[",
                "        if True:\n            found[",
            ),
        ),
        ("tests/core", "tests/language/test_accidents.py"),
    ),
    Mutant(
        "failed-compensation-hidden",
        "an instance is called compensated though a compensation failed",
        (
            (
                "stageflow_actors/core/routing.py",
                "    failed = any(done.status == StageStatus.failed for done in task.done)\n",
                "    failed = False\n",
            ),
        ),
        ("tests/core", "tests/language/test_accidents.py"),
    ),
    Mutant(
        "retiring-by-kill",
        "a worker that is not needed any more is killed, whatever it is at",
        (
            (
                "stageflow_actors/runtime/pool.py",
                '        self._services.broker.query("retire", worker.peer).add_done_callback(answered)\n',
                (
                    "        if worker.pidfd >= 0 and not any(lane.busy for lane in worker.lanes):\n"
                    "            worker.killed = ((), Failure('stopped', 'not needed'))\n"
                    "            kill_group(worker.pid, worker.pidfd)\n"
                ),
            ),
        ),
        ("tests/runtime/test_retiring_workers.py",),
    ),
    Mutant(
        "recycled-taken-for-dead",
        "a worker that has done its share is charged like one that died",
        (("stageflow_actors/runtime/pool.py", "event.status == EXIT_RECYCLED and", "event.status == -12345 and"),),
        ("tests/simulator", "tests/runtime/test_retiring_workers.py"),
    ),
    Mutant(
        "greeting-taken-twice",
        "a greeting that comes twice takes back what was delivered since",
        (("brokers/core/machine.py", "elif hello.talk <= session.talk:", "elif False:"),),
        ("tests/brokers/test_talk_accidents.py",),
    ),
    Mutant(
        "not-watched-again",
        "a start that is sent again is answered, and its end never told",
        (
            (
                "brokers/core/machine.py",
                "                self.publishing.watch_again(session, frame)\n",
                "                pass\n",
            ),
        ),
        ("tests/brokers/test_talk_accidents.py",),
    ),
    Mutant(
        "neighbours-charged",
        "everything that a dead worker held is charged with its death",
        (
            (
                "brokers/core/leases.py",
                "else [m for m in consumer.held.values() if m.id in guilty]",
                "else list(consumer.held.values())",
            ),
        ),
        ("tests/brokers/test_contract.py",),
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MUTANT", help="only these (default: all)")
    parser.add_argument("--list", action="store_true", help="say which there are, and end")
    given = parser.parse_args()
    known = {mutant.name: mutant for mutant in MUTANTS}
    for name in given.names:
        if name not in known:
            parser.error(f"there is no mutant {name!r}; --list says which there are")
    if given.list:
        for mutant in MUTANTS:
            print(f"{mutant.name:28} {mutant.mistake}")
        return 0
    for mutant in MUTANTS:
        plant(mutant, ROOT, dry=True)
    alive = []
    for mutant in [known[name] for name in given.names] or MUTANTS:
        began = time.monotonic()
        killer = killer_of(mutant)
        if killer is None:
            alive.append(mutant.name)
        print(
            f"{mutant.name:28} {'LIVES' if killer is None else 'dies by ' + killer}  ({time.monotonic() - began:.0f} s)"
        )
        sys.stdout.flush()
    print(f"{len(alive)} live: {', '.join(alive)}" if alive else "all mutants died")
    return 1 if alive else 0


def killer_of(mutant: Mutant) -> str | None:
    """The first test that fails with the mistake in place; None where all pass."""
    place = Path(tempfile.mkdtemp(prefix="stageflow-mutant-"))
    try:
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, place / name)
        plant(mutant, place)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests]
        env = {**os.environ, "PYTHONPATH": str(place)}
        run = subprocess.run(
            command, cwd=place, env=env, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "a test that does not end"
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if run.returncode == 0:
        return None
    failed = re.search(r"^FAILED (\S+)", run.stdout, re.MULTILINE)
    if failed is None:
        raise SystemExit(f"{mutant.name}: pytest itself failed:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return failed[1]


def plant(mutant: Mutant, place: Path, *, dry: bool = False) -> None:
    """Make the mistake in the copy. Ends the script where the code is not as it was when the mutant was thought of.

    `dry`: only look whether it could be made.
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
