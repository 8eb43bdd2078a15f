"""A whole cluster under one seed: random workflows, random accidents, and the laws that must hold whatever happens.

Tame runs have accidents that must not be seen in any result (crashes of the broker, the node, the program, the machine;
broken connections; stopped processes; a full history; paused queues; instances that are run again), so each instance
must end exactly as a plain interpreter of its workflow says. Wild runs also kill single workers, cancel and scale, and
their workflows may run for so long only: there each result must be true to itself, and deaths are counted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from random import Random
from typing import Any

import language_world
from brokerworld import check_whole
from language_meaning import Meaning, compare
from language_plans import Each, Maker, Plan, build, parts_of, signals_of
from laws import Effect, be_true, not_done_over, not_hurried, paces_of, undone_backwards
from virtual_broker import VirtualBroker, disk_error, engine_module, tell_of_recovered
from virtual_deaths import Deaths
from virtual_node import NAMING, History, VirtualNode, pool_module
from virtual_program import Job, VirtualProgram
from virtual_world import World

from brokers.core.message import PARKED
from stageflow_actors import WorkflowResult
from stageflow_actors.core.endings import untrue
from stageflow_actors.core.envelope import decode_outcome, decode_trail
from stageflow_actors.core.plan import compile_plan
from stageflow_actors.runtime.known import Known
from stageflow_actors.runtime.pool import ScaleTo
from stageflow_actors.runtime.programs import pool_specs

LONGEST = 300.0
"""Virtual seconds after which everything has ended, or never will."""


class Simulation:
    """One run. `run` raises `AssertionError` where a law is broken; `history` of what happened is in `world.log`."""

    def __init__(self, seed: int, *, wild: bool = False) -> None:
        self.seed, self.wild = seed, wild
        self.world = World(seed)
        chance = self.world.random
        self.effects: list[Effect] = []
        self.crimes: list[str] = []
        self.deaths = Deaths(chance.choice((1, 2, 3)), self.crimes)
        self.history = History()
        disorder = chance.choice((0, 3, 10))
        self.broker = VirtualBroker(
            self.world, self.crimes, segment_bytes=chance.choice((8, 64, 1024)) << 10, disorder=disorder
        )
        maker = Maker(chance, paced=True)
        self.plans = {f"w{number}": maker.plan(longest=5) for number in range(chance.randint(1, 3))}
        options: dict[str, Any] = {"actors": chance.randint(1, 3), "max_tasks": chance.choice((None, 1, 4))}
        self.at_most: float | None = chance.choice((None, None, 3600.0))
        if wild:
            options["timeout"] = chance.choice((None, 0.2))
            self.at_most = chance.choice((None, None, 0.1, 0.3, 1.0))
        workflows = {name: build(plan, name, at_most=self.at_most, **options) for name, plan in self.plans.items()}
        compiled = {name: compile_plan(workflow, NAMING) for name, workflow in workflows.items()}
        self.compiled = list(compiled.values())
        self.specs = [spec for name, flow in workflows.items() for spec in pool_specs(flow, compiled[name], {})]
        known = {name: Known(plan, dict) for name, plan in compiled.items()}
        self.jobs = []
        for number in range(chance.randint(1, 12)):
            name = chance.choice(sorted(self.plans))
            signals, priority = list(signals_of(self.plans[name])), chance.choice((0, 0, 0, 5, -3))
            self.jobs.append(Job(f"i{number}.{name}", known[name], {}, signals, priority))
        self._pids = itertools.count(1_000)
        self.node: VirtualNode | None = None
        self.program: VirtualProgram | None = None
        self._accidents = 0
        self._pausing: set[str] = set()
        self._ended_workers = wild

    def plan_of(self, job: Job) -> Plan:
        """What the job was made from."""
        return self.plans[job.id.partition(".")[2]]

    # the run

    def run(self) -> None:
        """From the first start to the last end, then the laws."""
        note, kill, peer = language_world.note, pool_module.kill_group, pool_module.new_peer
        replay = engine_module.replay_batch
        language_world.note = self._note
        pool_module.kill_group = lambda pid, pidfd: self.node.kill(pid) if self.node else None  # type: ignore[assignment]
        pool_module.new_peer = lambda: next(self._pids)
        engine_module.replay_batch = tell_of_recovered(self.broker.accounts)
        try:
            with self.world.time():
                self._begin()
                self._plan_accidents()
                self.world.run(self._is_over, LONGEST)
                self._judge()
        finally:
            self._end()
            language_world.note, pool_module.kill_group, pool_module.new_peer = note, kill, peer
            engine_module.replay_batch = replay

    def _note(self, *words: object) -> None:
        id, word, *what = words
        self.effects.append(Effect(self.world.now, str(id), str(word), tuple(what)))

    def _begin(self) -> None:
        self.broker.start()
        self._start_node()
        self._start_program(within=self.world.random.random() * 0.4)

    def _end(self) -> None:
        if self.program is not None:
            self.program.die()
        if self.node is not None:
            self.node.die()

    def _start_node(self) -> None:
        plans, deaths = self.compiled, self.deaths
        self.node = VirtualNode(self.broker, self.history, self.specs, plans, deaths, lambda: next(self._pids))
        self.world.say("node started")

    def _start_program(self, within: float = 0.2) -> None:
        peer = next(self._pids)
        self.program = VirtualProgram(self.broker, self.history, self.jobs, peer, self.crimes, within)

    def _is_over(self) -> bool:
        if self._accidents or not all(job.over for job in self.jobs):
            return False
        engine = self.broker.engine
        if engine is None:
            return False
        store = engine.machine.store
        if any(job.outcome is None and job.id not in store.groups for job in self.jobs):
            return False  # it was parked, and has been cancelled since: how it ended is on its way
        at_rest = all(message.state() == PARKED for message in store.messages.values())
        return at_rest and not any(group.ended for group in store.groups.values())

    # accidents

    def _plan_accidents(self) -> None:
        chance = self.world.random
        kinds: list[Callable[[], None]] = [
            self.broker.kill,
            self._kill_broker_in_a_call,
            self._fail_a_sync,
            self._kill_node,
            self._kill_program,
            self._lose_power,
            self._break_connections,
            self._freeze,
            self._fill_history,
            self._set_the_clock,
            self._pause,
            self._run_again,
            self._run_again,
        ]
        if self.wild:
            kinds += [self._kill_worker, self._kill_worker, self._curse, self._curse]
            kinds += [self._cancel, self._cancel, self._scale]
        span = chance.choice((0.2, 0.6, 2.0))
        for _ in range(chance.choice((0, 1, 4, 10, 25))):
            kind = chance.choice(kinds)
            self._accidents += 1
            self.world.soon(span, lambda kind=kind: self._happen(kind))  # type: ignore[misc]

    def _happen(self, kind: Callable[[], None]) -> None:
        self._accidents -= 1
        self.world.say(f"accident: {kind.__name__}")
        kind()

    def _kill_broker_in_a_call(self) -> None:
        self.broker.fail_at(self.world.random.randint(1, 40), None)

    def _fail_a_sync(self) -> None:
        self.broker.fail_at(self.world.random.randint(1, 10), disk_error())

    def _kill_node(self) -> None:
        """The broker watches the node, and ends with it."""
        self._ended_workers = True
        if self.node is not None:
            self.node.die()
            self.node = None
            self.broker.kill("its node is gone")
            self.world.soon(0.3, self._restart_node)

    def _restart_node(self) -> None:
        if self.node is None:
            self._start_node()

    def _kill_program(self) -> None:
        """The node watches the program, and ends with it; started again, it submits everything once more."""
        if self.program is not None:
            self.program.die()
            self.program = None
            self._kill_node()
            self.world.soon(0.3, self._restart_program)

    def _restart_program(self) -> None:
        if self.program is None:
            self._start_program()

    def _lose_power(self) -> None:
        self._ended_workers = True
        if self.program is not None:
            self.program.die()
            self.program = None
        if self.node is not None:
            self.node.die()
            self.node = None
        self.broker.lose_power(Random(self.world.random.getrandbits(32)))
        self.world.after(0.1, lambda: self.broker.start() if self.broker.engine is None else None)
        self.world.after(0.2, self._restart_node)
        self.world.after(0.3, self._restart_program)

    def _break_connections(self) -> None:
        for client in list(self.broker.clients.values()):
            if self.world.random.random() < 0.5:
                client.break_off()

    def _freeze(self) -> None:
        """SIGSTOP of whoever it may be, and SIGCONT after a while."""
        chance = self.world.random
        if self.node is not None and self.node.workers and chance.random() < 0.7:
            self.node.workers[chance.choice(sorted(self.node.workers))].freeze(chance.random())
        elif self.program is not None:
            self.program.client.link.frozen_until = self.world.now + chance.random()

    def _fill_history(self) -> None:
        self.history.full = True

        def emptied() -> None:
            self.history.full = False

        self.world.soon(2.0, emptied)

    def _set_the_clock(self) -> None:
        self.world.set_clock(self.world.random.uniform(-5, 5))

    def _pause(self) -> None:
        """An operator pauses a queue, and resumes it after a while."""
        queues = sorted({spec.queue for spec in self.specs} - self._pausing)
        if self.program is None or not queues:
            return
        queue = self.world.random.choice(queues)
        self._pausing.add(queue)
        self._accidents += 1

        def paused(answer: Future[Any]) -> None:
            if self.broker.engine is not None and queue in self._pausing and answer.exception() is None:
                self.broker.paused[queue] = self.broker.engine.machine.store.next_lease

        self.program.client.query("pause", queue).add_done_callback(paused)
        self.world.soon(1.0, lambda: self._resume(queue))

    def _resume(self, queue: str) -> None:
        """Whoever is there does it, until it has been done."""
        self.broker.paused.pop(queue, None)
        self._pausing.discard(queue)
        done = False

        def resumed(answer: Future[Any]) -> None:
            nonlocal done
            if answer.exception() is None and not done:
                done = True
                self._accidents -= 1

        def again() -> None:
            if not done:
                if self.program is not None:
                    self.program.client.query("resume", queue).add_done_callback(resumed)
                self.world.after(0.5, again)

        again()

    def _run_again(self, tries: int = 5) -> None:
        """Retry or restart an instance, once there is one that has ended or is parked."""
        over = [job for job in self.jobs if job.over and job.again < 3]
        if self.program is None or not over:
            if tries:
                self._accidents += 1
                self.world.soon(0.5, lambda: self._look_again(tries - 1))
            return
        job, restart = self.world.random.choice(over), self.world.random.random() < 0.5
        at, id = self.world.now, job.id
        if restart:
            self.effects.append(Effect(at, id, "restarted", ()))
        else:
            self.effects.append(Effect(at, id, "retried", tuple(sorted(self._done_by(job)))))
        self.program.run_again(job, restart=restart, requeued=self.deaths.forgive)

    def _look_again(self, tries: int) -> None:
        self._accidents -= 1
        self._run_again(tries)

    def _done_by(self, job: Job) -> set[str]:
        """The stages of one that has ended, or is parked, that have completed."""
        if job.outcome is not None:
            trail = decode_trail(decode_outcome(job.outcome).trail)
            return {record.stage_id for record in trail if record.status == "completed"}
        meaning = Meaning(self.plan_of(job))
        return set() if self.wild or meaning.vague else meaning.done()

    def _kill_worker(self) -> None:
        """Rather one that is at work, if there is one."""
        if self.node is not None and self.node.workers:
            busy = sorted(pid for pid, worker in self.node.workers.items() if worker.busy)
            self.node.workers[self.world.random.choice(busy or sorted(self.node.workers))].die(-9)

    def _curse(self) -> None:
        """What an instance comes to next ends its workers, some times."""
        job = self.world.random.choice(self.jobs)
        self.deaths.cursed[job.id] += self.world.random.randint(1, 4)

    def _cancel(self) -> None:
        under_way = [job for job in self.jobs if job.accepted and not job.over]
        if self.program is not None and under_way:
            self.program.cancel(self.world.random.choice(under_way))

    def _scale(self) -> None:
        if self.node is not None and self.node.pools:
            queue = self.world.random.choice(sorted(self.node.pools))
            self.node.pools[queue].on_receive(ScaleTo(queue, self.world.random.randint(1, 3)))

    def standing(self) -> str:
        """Where everything is, for whoever has to find out why."""
        lines = [
            f"{job.id}: accepted {job.accepted}, parked {job.parked}, ended {job.outcome is not None}, "
            f"written {job.id in self.history.rows}"
            for job in self.jobs
        ]
        if self.broker.engine is not None:
            store = self.broker.engine.machine.store
            for message in store.messages.values():
                group = "" if message.group is None else message.group.id
                lines.append(f"message {message.id} {message.state()} in {message.queue.name} of {group}")
            lines += [f"group {group.id}: {sorted(group.gathers or {})}" for group in store.groups.values()]
            lines += [f"{s.role} {s.name} {s.peer}: {s.connected}" for s in store.sessions.values()]
        return "\n".join(lines)

    # laws

    def _judge(self) -> None:
        engine = self.broker.engine
        assert engine is not None
        for message in engine.machine.store.messages.values():
            extra = message.extra
            if extra is not None and extra.parked and (extra.evidence or extra.fresh):
                self.deaths.parked(message.id, extra.deaths, extra.reason)
        assert self.crimes == [], "; ".join(self.crimes[:5])
        assert self.history.crimes == [], self.history.crimes[0]
        check_whole(engine.machine)
        self._nothing_is_left()
        for job in self.jobs:
            self._ended_well(job)
        self._accepted_once()
        self._kept_for_good()
        for name, plan in self.plans.items():
            hurried = {job.id for job in self.jobs if job.cancelled or (self.wild and self.at_most)}
            not_hurried(
                (
                    effect
                    for effect in self.effects
                    if effect.instance.partition(".")[2] == name
                    and (effect.word == "did" or effect.instance not in hurried)
                ),
                paces_of(plan),
                self.world.jumps,
            )
        undone_backwards(self.effects)
        not_done_over(self.effects)
        if not self._ended_workers:
            self._done_once()

    def _nothing_is_left(self) -> None:
        assert self.broker.engine is not None
        store = self.broker.engine.machine.store
        parked = {job.id for job in self.jobs if job.parked and job.outcome is None}
        assert set(store.groups) <= parked, f"live groups that nobody waits for: {set(store.groups) - parked}"
        for message in store.messages.values():
            evidence = message.extra is not None and message.extra.evidence
            assert evidence or (message.group is not None and message.group.id in parked)

    def _ended_well(self, job: Job) -> None:
        plan = self.plan_of(job)
        if job.outcome is None:
            assert job.parked
            assert job.again or job.id not in self.history.rows
            assert self.wild or Meaning(plan).status == "parked", f"{job.id} is parked, and should have ended"
            assert plan.on_failure == "park"
            return
        row = self.history.rows[job.id]
        assert row.outcome == job.outcome, "what was told is what is written"
        assert untrue(row.workflow_id, row.version, row.status, row.error, row.failed_stage, row.outcome) is None
        result: WorkflowResult[Any] = WorkflowResult.from_outcome(
            job.id, job.outcome, job.known.codec, job.known.plan.order
        )
        if self.wild:
            why = ["not wanted"] if job.cancelled else []
            why += ["StageTimeout: the workflow ran longer than its timeout of .*"] if self.at_most else []
            be_true(plan, result, cancelled="|".join(why), deaths=self.deaths.most)
        elif self._ended_workers or job.again:
            compare(plan, result)
        else:
            mine = [effect for effect in self.effects if effect.instance == job.id]
            compare(plan, result, [tuple(map(str, effect.what)) for effect in mine if effect.word == "put back"])

    def _accepted_once(self) -> None:
        once = {
            (job.id, part.name)
            for job in self.jobs
            for place in self.plan_of(job).places
            if not isinstance(place, Each)
            for part in parts_of(place)
        }
        for (id, epoch, label), count in self.broker.accounts.settled.items():
            if (id, label) in once or label.startswith("compensate:") or label == ":finished":
                assert count == 1, f"{label} of {id} in epoch {epoch} was accepted {count} times"

    def _done_once(self) -> None:
        """Where no worker was ended in the middle of its work, nothing is done twice."""
        again = {job.id for job in self.jobs if job.again}
        did = [effect for effect in self.effects if effect.word == "did" and effect.instance not in again]
        times = Counter((effect.instance, *effect.what) for effect in did)
        twice = {what: count for what, count in times.items() if count > 1}
        assert not twice, f"done more than once: {twice}"

    def _kept_for_good(self) -> None:
        """A step whose result was durable is never run again, unless all is begun anew."""
        kept = set()
        for _, id, word, where in self.effects:
            if word == "kept":
                kept.add((id, where))
            elif word == "restarted":
                kept = {pair for pair in kept if pair[0] != id}
            assert word != "step" or (id, where) not in kept, f"a step of {where} of {id} was run after it was kept"


def simulate(seed: int, *, wild: bool) -> Simulation:
    """Run a seed. What breaks a law is raised with the seed and the last that happened."""
    simulation = Simulation(seed, wild=wild)
    try:
        simulation.run()
    except BaseException as error:
        kind = "wild" if wild else "tame"
        happened = "\n".join(simulation.world.log[-40:])
        told = f"{type(error).__name__}: {error}\n{simulation.standing()}\n{happened}"
        raise AssertionError(f"seed {seed} ({kind}): {told}") from error
    return simulation


__all__ = ["Simulation", "simulate"]
