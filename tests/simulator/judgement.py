"""Check that a simulated cluster obeyed the laws, once all its instances have ended or are parked.

It reads the results of the program, the history, the broker and the records kept during the run, and changes nothing. A
violation is an `AssertionError`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from broker_fixtures import check_whole
from constructs_interpreter import Meaning, compare
from constructs_plans import Each, parts_of
from laws import (
    Given,
    be_true,
    expired_truly,
    given_truly,
    not_done_over,
    not_hurried,
    paces_of,
    served,
    undone_backwards,
)
from virtual_broker import GATHERED
from virtual_program import Job
from wider_plans import as_plain, giver

from stageflow_actors import WorkflowResult
from stageflow_actors.core.envelope import decode_outcome, decode_trail
from stageflow_actors.core.outcome_check import check_outcome
from stageflow_actors.core.result import result_of_outcome

if TYPE_CHECKING:
    from simulation import Simulation


class Judgement:
    """That of one run."""

    def __init__(self, run: Simulation) -> None:
        self.run = run

    def check(self) -> None:
        """Raise `AssertionError` where a law is broken."""
        engine = self.run.broker.engine
        assert engine is not None
        for message in engine.machine.state.messages.values():
            extra = message.delivery_state
            if extra is not None and extra.parked and (extra.evidence or extra.fresh):
                self.run.deaths.parked(message.id, extra.deaths, extra.reason)
        assert self.run.crimes == [], "; ".join(self.run.crimes[:5])
        assert self.run.history.crimes == [], self.run.history.crimes[0]
        check_whole(engine.machine)
        self._nothing_is_left()
        for job in self.run.jobs:
            self._ended_well(job)
            self._given_truly(job)
        self._accepted_once()
        self._items_once()
        self._replied_once()
        served(self.run.effects, self._answered())
        self._kept_for_good()
        for name, plan in self.run.plans.items():
            hurried = {job.id for job in self.run.jobs if job.cancelled or (self.run.wild and self.run.at_most)}
            not_hurried(
                (
                    effect
                    for effect in self.run.effects
                    if effect.instance.partition(".")[2] == name
                    and (effect.word == "did" or effect.instance not in hurried)
                ),
                paces_of(plan),
                self.run.world.jumps,
            )
        undone_backwards(self.run.effects)
        not_done_over(self.run.effects)
        if not self.run.ended_workers:
            self._done_once()

    def _nothing_is_left(self) -> None:
        assert self.run.broker.engine is not None
        store = self.run.broker.engine.machine.state
        parked = {job.id for job in self.run.jobs if job.parked and job.outcome is None}
        assert set(store.groups) <= parked, f"live groups that nobody waits for: {set(store.groups) - parked}"
        for message in store.messages.values():
            evidence = message.delivery_state is not None and message.delivery_state.evidence
            assert evidence or (message.group is not None and message.group.id in parked)

    def _ended_well(self, job: Job) -> None:
        plan = self.run.plan_of(job)
        if job.outcome is None:
            assert job.parked
            assert job.again or job.id not in self.run.history.rows
            assert self.run.wild or Meaning(plan).status == "parked", f"{job.id} is parked, and should have ended"
            assert plan.on_failure == "park"
            return
        row = self.run.history.rows[job.id]
        assert row.outcome == job.outcome, "what was told is what is written"
        assert check_outcome(row.workflow_id, row.version, row.status, row.error, row.failed_stage, row.outcome) is None
        result: WorkflowResult[Any] = result_of_outcome(job.id, job.outcome, job.ref.codec, job.ref.layout)
        if self.run.wild:
            why = ["not wanted"] if job.cancelled else []
            why += ["StageTimeout: the workflow ran longer than its timeout of .*"] if self.run.at_most else []
            be_true(
                plan,
                result,
                cancelled="|".join(why),
                deaths=self.run.deaths.most,
                wider=self.run.wider,
            )
            self._expired_truly(job, row.epoch, result)
            return
        plain = as_plain(job.outcome, self.run.wider.asks)
        result = result_of_outcome(job.id, plain, job.ref.codec, job.ref.layout)
        if self.run.ended_workers or job.again:
            compare(plan, result)
        else:
            mine = [effect for effect in self.run.effects if effect.instance == job.id]
            compare(plan, result, [tuple(map(str, effect.what)) for effect in mine if effect.word == "put back"])

    def _expired_truly(self, job: Job, epoch: int, result: WorkflowResult[Any]) -> None:
        # A failure in a cancelled or retried epoch is reported in the next one.
        came_late: dict[str, int] = {}
        for place in job.ref.plan.stages:
            epochs = [at for at in range(epoch + 1) if self.run.waits.expired[job.id, at, place.queue]]
            if place.ttl and epochs:
                came_late[place.id] = epochs[-1]
        excused = bool(self.run.world.jumps or self.run.deaths.caused_by(job.id) or self.run.stage_timeout)
        lately = {name for name, at in came_late.items() if at == epoch and not excused}
        expired_truly(self.run.plan_of(job), result, set(came_late), lately, self.run.wider.patient)

    def _given_truly(self, job: Job) -> None:
        """What each stage was handed is what the one before it has asked for, in the attempt that counts."""
        plan = self.run.plan_of(job)
        if self.run.wild:
            if job.again or job.outcome is None:
                return
            trail = decode_trail(decode_outcome(job.outcome).trail)
            ended = {record.stage_id: record.status for record in trail}
        else:
            ended = {name: end[0] for name, end in Meaning(plan).stages.items()}
        for effect in self.run.effects:
            if effect.word == "given" and effect.instance == job.id:
                name, payload, kept = effect.what
                given = Given(str(name), payload, kept)
                given_truly(job.id, given, giver(plan, self.run.wider, given.stage, ended))

    def _accepted_once(self) -> None:
        once = {
            (job.id, part.name)
            for job in self.run.jobs
            for place in self.run.plan_of(job).places
            if not isinstance(place, Each)
            for part in parts_of(place)
            if part.name not in self.run.wider.asks
        }
        for (id, epoch, label), count in self.run.broker.accounts.settled.items():
            if (id, label) in once or label.startswith("compensate:") or label == ":finished":
                assert count == 1, f"{label} of {id} in epoch {epoch} was accepted {count} times"

    def _items_once(self) -> None:
        """Each item of a map is handed on once, and once more where the map is run again."""
        settled, jobs = self.run.broker.accounts.settled, {job.id: job for job in self.run.jobs}
        for id, epoch in {(id, epoch) for id, epoch, _ in settled if id in jobs}:
            for place in self.run.plan_of(jobs[id]).places:
                if isinstance(place, Each):
                    count, most = settled[id, epoch, place.stage.name], 1 + len(place.items)
                    told = f"{count} messages of {place.stage.name} of {id} in epoch {epoch}"
                    assert count <= most * (1 + jobs[id].again), told

    def _replied_once(self) -> None:
        """Each message of a stage that asks is one request at most, and what came of it is taken in once at most."""
        settled = self.run.broker.accounts.settled
        epochs = {(id, epoch) for id, epoch, _ in settled}
        jobs = {job.id: job for job in self.run.jobs}
        for id, epoch in sorted(pair for pair in epochs if pair[0] in jobs):
            plan = self.run.plan_of(jobs[id])
            # What was to be parked, and is cancelled before that, is passed on as if it were another attempt.
            spare = plan.on_failure == "park"
            for part in (part for place in plan.places for part in parts_of(place) if part.name in self.run.wider.asks):
                asked, taken = settled[id, epoch, part.name], settled[id, epoch, GATHERED + part.name]
                told = f"{part.name} of {id} in epoch {epoch}: {asked} messages, {taken} replies"
                assert taken <= asked <= part.attempts * (1 + jobs[id].again) + spare, told

    def _answered(self) -> set[tuple[str, str]]:
        """Which stages of which instances have completed by the answer of an endpoint."""
        return {
            (job.id, record.stage_id)
            for job in self.run.jobs
            if job.outcome is not None
            for record in decode_trail(decode_outcome(job.outcome).trail)
            if record.status == "completed"
            if record.stage_id in self.run.wider.asks and self.run.wider.asks[record.stage_id].how != "next"
        }

    def _done_once(self) -> None:
        """Where no worker was ended in the middle of its work, nothing is done twice."""
        again = {job.id for job in self.run.jobs if job.again}
        words = ("did", "served", "took in")
        did = [effect for effect in self.run.effects if effect.word in words and effect.instance not in again]
        times = Counter((effect.instance, effect.word, *effect.what) for effect in did)
        twice = {what: count for what, count in times.items() if count > 1}
        assert not twice, f"done more than once: {twice}"

    def _kept_for_good(self) -> None:
        """A step whose result was durable is never run again, except after a restart of the instance."""
        kept = set()
        for _, id, word, where in self.run.effects:
            if word == "kept":
                kept.add((id, where))
            elif word == "restarted":
                kept = {pair for pair in kept if pair[0] != id}
            assert word != "step" or (id, where) not in kept, f"a step of {where} of {id} was run after it was kept"


__all__ = ["Judgement"]
