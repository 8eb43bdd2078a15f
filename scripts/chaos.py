#!/usr/bin/env python3
"""Kill a saga's processes at random and audit the outcome.

A saga runs over hundreds of instances while SIGKILLs hit its program, node,
broker, zygote and workers. The audit compares three independent witnesses: the
effect log that the stages append to, the settlements counted from the journal
on disk, and the history at the end; then the doctor examines the directory.
The script kills only the program that it started and its descendants.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

from cluster_tree import BELOW_A_PROGRAM, add_node
from stageflow_actors import Runtime, StageContext, Workflow
from stageflow_actors.core.invariants import ERROR
from stageflow_actors.diagnostics.doctor import run_checks
from stageflow_actors.runtime.system.data_dir import DataDir

STAGES = ("reserve", "charge", "ship")
COMPENSATED = ("charge", "reserve")
"""The compensations of a failed instance, in order: the reverse of its completed stages."""
KINDS = ("program", *BELOW_A_PROGRAM)
FAILING = 5
"""One instance in so many fails at its last stage."""
COMMAND = "import sys; from stageflow_actors.cli.main import main; sys.exit(main())"
VOLLEY_SECONDS = 0.6
"""Seconds within which a second kill may hit a cluster that still recovers from the first."""
STALL_SECONDS = 20.0
"""Longest time without any effect before the run counts as stuck."""

# ── the program under attack ─────────────────────────────────────────────────────────────────────────────────────────


def note(instance: str, what: str, attempt: int) -> None:
    """Append one line with a single write."""
    fd = os.open(os.environ["CHAOS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, f"{instance} {what} {attempt} {os.getpid()}\n".encode())
    finally:
        os.close(fd)


def make_workflow(work: float, actors: int) -> Workflow[dict[str, Any]]:
    """The saga: three stages of about `work` seconds each, the first two with a compensation."""
    saga: Workflow[dict[str, Any]] = Workflow("chaos")

    @saga.stage(actors=actors)
    def reserve(order: dict[str, Any], ctx: StageContext) -> None:
        note(order["id"], "reserve", ctx.attempt)
        time.sleep(random.uniform(0.0, 2.0) * work)

    @reserve.compensation
    def release(order: dict[str, Any], ctx: StageContext) -> None:
        note(order["id"], "undo-reserve", ctx.attempt)

    @saga.stage(actors=actors)
    def charge(order: dict[str, Any], ctx: StageContext) -> None:
        note(order["id"], "charge", ctx.attempt)
        time.sleep(random.uniform(0.0, 2.0) * work)

    @charge.compensation
    def refund(order: dict[str, Any], ctx: StageContext) -> None:
        note(order["id"], "undo-charge", ctx.attempt)

    @saga.stage(actors=actors)
    def ship(order: dict[str, Any], ctx: StageContext) -> None:
        note(order["id"], "ship", ctx.attempt)
        time.sleep(random.uniform(0.0, 2.0) * work)
        if order["fails"]:
            raise ValueError("no such address")

    return saga


def run_program(data: str, out: str, instances: int, work: float, actors: int) -> None:
    """Run the user's script: map with a key, so that a new run resumes where a killed one stopped."""
    saga = make_workflow(work, actors)
    orders = [{"id": f"order-{i:05d}", "fails": i % FAILING == 0} for i in range(instances)]
    rows = []
    with Runtime(saga, data_dir=data) as runtime:
        for result in runtime.map_unordered(saga, orders, key="id"):
            rows.append(
                {
                    "id": result.instance_id,
                    "status": str(result.status),
                    "stages": [[stage.stage_id, str(stage.status)] for stage in result.stages],
                    "undone": [[undo.stage_id, str(undo.status)] for undo in result.compensations],
                }
            )
        listed = [(one.id, str(one.status())) for one in runtime.instances(limit=2 * instances + 10)]
    draft = Path(out).with_suffix(".draft")
    draft.write_text(json.dumps({"results": rows, "listed": listed}))
    draft.replace(out)


# ── the attacker ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Attack:
    """The kills of one run and their effects."""

    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    ended_badly: list[int] = field(default_factory=list)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def victims(program: psutil.Popen) -> dict[str, list[psutil.Process]]:
    """Return the live descendants of `program` by kind."""
    found: dict[str, list[psutil.Process]] = {kind: [] for kind in KINDS}
    try:
        found["program"].append(psutil.Process(program.pid))
        for node in program.children():
            add_node(node, found)
    except psutil.Error:
        pass  # the process has ended in between
    return found


def attack(
    chance: random.Random, command: list[str], log: Path, out: Path, instances: int, kills: int, seconds: float
) -> Attack:
    """Run the program to its end; kill one process each time that the work has progressed by a step.

    One kill in three is followed by another one while the cluster still recovers from it.
    """
    done = Attack()
    began = time.monotonic()
    expected = 3 * instances + 2 * (instances // FAILING)
    steps = sorted(chance.uniform(0.01, 0.9) for _ in range(kills))
    kinds = [KINDS[i % len(KINDS)] for i in range(kills)]
    chance.shuffle(kinds)
    program = None
    volley = float("inf")
    moved, seen = began, -1
    try:
        while not out.exists():
            if program is None or program.poll() is not None:
                if program is not None and program.returncode not in (0, -9):
                    done.ended_badly.append(program.returncode)
                if len(done.ended_badly) > 5:
                    done.problems.append(f"the program ended badly again and again: {done.ended_badly}")
                    return done
                program = psutil.Popen(command, start_new_session=True, env={**os.environ, "CHAOS_LOG": str(log)})
                done.starts += 1
            lines = count_lines(log)
            now = time.monotonic()
            if lines != seen:
                moved, seen = now, lines
            if now - moved > STALL_SECONDS:
                done.problems.append(f"no effect for {STALL_SECONDS:g} s after {lines} effects")
                return done
            if kinds and now - began < seconds and (lines >= steps[0] * expected or now >= volley):
                targets = victims(program)[kinds[0]]
                if targets:
                    time.sleep(chance.uniform(0.0, 0.03))
                    kill(chance.choice(targets), kinds.pop(0), done)
                    steps.pop(0)
                    volley = now + chance.uniform(0.0, VOLLEY_SECONDS) if chance.random() < 1 / 3 else float("inf")
            time.sleep(0.005)
        if program is not None:
            program.wait(60)
    finally:
        if program is not None:
            for process in [p for group in victims(program).values() for p in group]:
                kill(process, "", done)
        done.seconds = time.monotonic() - began
    return done


def kill(process: psutil.Process, kind: str, done: Attack) -> None:
    """Send SIGKILL; psutil checks that the pid still means the same process."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
    if kind:
        done.kills[kind] += 1


def count_lines(log: Path) -> int:
    """Return the number of effects so far."""
    try:
        return log.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


# ── the judge ────────────────────────────────────────────────────────────────────────────────────────────────────────


def judge(instances: int, log: Path, out: Path, data: Path) -> tuple[list[str], int, int]:
    """Return (violations, number of effects, number of repeated effects)."""
    wrong: list[str] = []
    report = json.loads(out.read_text())
    ids = [f"order-{i:05d}" for i in range(instances)]
    failing = set(ids[::FAILING])
    _judge_ends(ids, failing, report, wrong)
    lines = [line.split() for line in log.read_text().splitlines()]
    effects: dict[str, list[str]] = {}
    for words in lines:
        if len(words) != 4:
            wrong.append(f"a torn line in the effect log: {words}")
            continue
        effects.setdefault(words[0], []).append(words[1])
    for id in ids:
        _judge_effects(id, id in failing, effects.pop(id, []), wrong)
    if effects:
        wrong.append(f"effects of instances that were never started: {sorted(effects)[:5]}")
    _judge_journal(ids, failing, data, wrong)
    found = run_checks(DataDir(data, create=False)).findings
    wrong += [f"doctor: {one.where}: {one.what}" for one in found if one.severity == ERROR]
    return wrong, len(lines), len(lines) - len({(words[0], words[1]) for words in lines if len(words) == 4})


def _judge_ends(ids: list[str], failing: set[str], report: dict[str, Any], wrong: list[str]) -> None:
    results = {row["id"]: row for row in report["results"]}
    if Counter(row["id"] for row in report["results"]) != Counter(ids):
        wrong.append(f"the last run gave {len(report['results'])} results for {len(ids)} instances")
    if Counter(id for id, _ in report["listed"]) != Counter(ids):
        wrong.append(f"the cluster lists {len(report['listed'])} instances, not each of {len(ids)} once")
    listed = dict(report["listed"])
    for id in ids:
        row = results.get(id)
        expected = "compensated" if id in failing else "completed"
        if row is None or row["status"] != expected or listed.get(id) != expected:
            wrong.append(f"{id} is {row and row['status']} (listed as {listed.get(id)}), not {expected}")
            continue
        stages = [[stage, "completed"] for stage in STAGES]
        undone: list[list[str]] = []
        if id in failing:
            stages = [["reserve", "compensated"], ["charge", "compensated"], ["ship", "failed"]]
            undone = [[stage, "completed"] for stage in COMPENSATED]
        if row["stages"] != stages or row["undone"] != undone:
            wrong.append(f"{id}: stages {row['stages']}, compensations {row['undone']}")


def _judge_effects(id: str, fails: bool, seen: list[str], wrong: list[str]) -> None:
    """Check that each effect occurs, and none before the effect that it follows from."""
    expected = list(STAGES)
    if fails:
        expected += [f"undo-{stage}" for stage in COMPENSATED]
    firsts = list(dict.fromkeys(seen))
    if firsts != expected:
        wrong.append(f"{id}: effects {firsts}, not {expected}")
        return
    at = 0
    for what in seen:
        place = expected.index(what)
        if place < at:
            # A settled stage never runs again: its successor was delivered only because it had been settled.
            wrong.append(f"{id}: {what} ran again after {expected[at]}: {seen}")
            return
        at = place


def _judge_journal(ids: list[str], failing: set[str], data: Path, wrong: list[str]) -> None:
    stats = subprocess.run(
        [sys.executable, "-c", COMMAND, "journal", "stats", "--data", str(data), "--output", "json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if stats.returncode:
        wrong.append(f"journal stats failed: {stats.stderr.strip()}")
        return
    report = json.loads(stats.stdout)
    for rows, stages_of in (
        (report["settlements"], lambda id: STAGES),
        (report["compensations"], lambda id: COMPENSATED if id in failing else ()),
    ):
        counted = {(row["instance"], row["epoch"], row["stage"]): row["count"] for row in rows}
        expected = {(id, 1, stage): 1 for id in ids for stage in stages_of(id)}
        different = [key for key in counted.keys() | expected.keys() if counted.get(key, 0) != expected.get(key, 0)]
        for key in sorted(different)[:5]:
            wrong.append(f"the journal accepted {counted.get(key, 0)} settlements of {key}, not {expected.get(key, 0)}")
    if report["live_messages"] or report["unnamed"]:
        wrong.append(f"the journal still holds {report['live_messages']} messages, {report['unnamed']} unnamed")


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-n",
    "--instances",
    type=click.IntRange(1),
    default=500,
    show_default=True,
    help="Instances; one in five fails at its last stage.",
)
@click.option(
    "-k",
    "--kills",
    type=click.IntRange(0),
    default=25,
    show_default=True,
    help="SIGKILLs, spread over the run and all kinds of processes.",
)
@click.option("--seconds", default=300.0, show_default=True, help="Stop killing after this many seconds.")
@click.option("--work", default=0.02, show_default=True, help="Mean seconds per stage.")
@click.option("--actors", type=click.IntRange(1), default=2, show_default=True, help="Worker processes per stage.")
@click.option("--seed", type=int, default=None, help="Seed of the plan of kills.")
@click.option("--keep", is_flag=True, help="Keep the data directory and the effect log.")
@click.pass_context
def main(
    context: click.Context, instances: int, kills: int, seconds: float, work: float, actors: int, seed: int, keep: bool
) -> None:
    """Kill the processes of a saga run at random and audit the outcome.

    Exit code 0 if each instance has exactly one terminal state, each
    transition was accepted exactly once, and compensations ran in reverse
    order of completion; else 1.
    """
    if context.invoked_subcommand is not None:
        return
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    place = Path(tempfile.mkdtemp(prefix="stageflow-chaos-"))
    log, out, data = place / "effects", place / "report.json", place / "data"
    command = [sys.executable, __file__, "program", str(data), str(out), str(instances), str(work), str(actors)]
    try:
        done = attack(random.Random(seed), command, log, out, instances, kills, seconds)
        wrong, effects, repeated = list(done.problems), 0, 0
        if out.exists():
            found, effects, repeated = judge(instances, log, out, data)
            wrong += found
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)
    table = Table(title=f"{instances} instances, seed {seed}" + (f", kept in {place}" if keep else ""))
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("seconds", f"{done.seconds:.1f}")
    table.add_row("SIGKILLs", str(done.kills.total()))
    for kind in KINDS:
        table.add_row(f"  {kind}", str(done.kills[kind]))
    table.add_row("program starts", str(done.starts))
    table.add_row("  with a bad exit code", str(len(done.ended_badly)))
    table.add_row("effects", str(effects))
    table.add_row("  repeated", str(repeated))
    table.add_row("violations", str(len(wrong)))
    console = Console()
    console.print(table)
    for text in wrong[:20]:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    sys.exit(1 if wrong else 0)


@main.command(hidden=True)
@click.argument("data")
@click.argument("out")
@click.argument("instances", type=int)
@click.argument("work", type=float)
@click.argument("actors", type=int)
def program(data: str, out: str, instances: int, work: float, actors: int) -> None:
    """Run the program under attack; started by this script."""
    run_program(data, out, instances, work, actors)


if __name__ == "__main__":
    main()
