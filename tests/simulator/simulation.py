"""A whole cluster under one seed: random workflows, random accidents, and the laws that must hold.

Tame runs have accidents that no result may show (crashes of broker, node, program or machine; broken connections;
stopped processes; a full history; paused queues; reruns), so each instance must end exactly as a plain interpreter of
its workflow predicts. Wild runs also kill single workers, cancel and scale, and their workflows have a timeout: there
each result must be consistent, and deaths are counted. In two seeds of three some stages ask endpoints, and some
messages expire (see `wider_plans`).
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from random import Random
from typing import Any

import constructs_fixtures
from constructs_interpreter import Meaning
from constructs_plans import Maker, Plan, build, signals_of
from judgement import Judgement
from laws import Effect
from virtual_broker import VirtualBroker, disk_error, engine_module, tell_of_recovered
from virtual_deaths import Deaths
from virtual_node import NAMING, History, VirtualNode, pool_module
from virtual_program import Job, VirtualProgram
from virtual_starts import Starts
from virtual_waits import Waits
from virtual_world import World
from wider_plans import NOBODY, PATIENT, PLAIN, endpoints, nothing, widen, widen_workflow, with_uncertain

from stageflow_actors import Workflow
from stageflow_actors.core.envelope import decode_outcome, decode_trail
from stageflow_actors.core.plan import compile_plan
from stageflow_actors.runtime.client.workflow_ref import WorkflowRef
from stageflow_actors.runtime.ipc.pool_spec import endpoint_spec, pool_specs
from stageflow_actors.runtime.node.pool import ScaleTo
from stageflow_brokers.core.message import PARKED

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
        self.starts = Starts(self.world, self.crimes)
        self.history = History()
        disorder = chance.choice((0, 3, 10))
        self.broker = VirtualBroker(
            self.world, self.crimes, segment_bytes=chance.choice((8, 64, 1024)) << 10, disorder=disorder
        )
        maker = Maker(chance, paced=True)
        self.plans = {f"w{number}": maker.plan(longest=5) for number in range(chance.randint(1, 3))}
        options: dict[str, Any] = {"actors": chance.randint(1, 3), "max_tasks": chance.choice((None, 1, 4))}
        self.stage_timeout: float | None = None
        self.at_most: float | None = chance.choice((None, None, 3600.0))
        if wild:
            options["timeout"] = self.stage_timeout = chance.choice((None, 0.2))
            self.at_most = chance.choice((None, None, 0.1, 0.3, 1.0))
        workflows = self._defined(options)
        compiled = {name: compile_plan(workflow, NAMING) for name, workflow in workflows.items()}
        self.compiled = list(compiled.values())
        self.specs = [spec for name, flow in workflows.items() for spec in pool_specs(flow, compiled[name], {})]
        if self.wider.asks:
            self.specs += [endpoint_spec(stage, NAMING, {}) for stage in endpoints(self._wider_chance, wild=wild)]
        ttls = {place.queue: place.ttl for plan in self.compiled for place in plan.stages if place.ttl}
        self.waits = Waits(self.world, ttls, self.crimes)
        self.broker.accounts.waits = self.waits if ttls else None
        known = {name: WorkflowRef(plan, dict) for name, plan in compiled.items()}
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
        self.ended_workers = wild

    def _defined(self, options: dict[str, Any]) -> dict[str, Workflow[Any]]:
        """The workflows of the plans, which are made wider by a chance of its own: all else happens as without."""
        self.wider = nothing()
        self._wider_chance = chance = Random(f"wider {self.seed} {self.wild}")
        if self.seed % 3:
            asking, waiting = chance.choice(((True, False), (False, True), (True, True)))
            for name, plan in self.plans.items():
                self.plans[name] = widen(chance, plan, self.wider, asking=asking, waiting=waiting, wild=self.wild)
        if self.wild:
            for name, plan in self.plans.items():
                self.plans[name] = with_uncertain(Random(f"uncertain {self.seed} {name}"), plan)
        workflows = {}
        for name, plan in self.plans.items():
            workflows[name] = build(plan, name, at_most=self.at_most, **options)
            widen_workflow(workflows[name], plan, self.wider, options)
        return workflows

    def plan_of(self, job: Job) -> Plan:
        """What the job was made from."""
        return self.plans[job.id.partition(".")[2]]

    # the run

    def run(self) -> None:
        """From the first start to the last end, then the laws."""
        note, kill, peer = constructs_fixtures.note, pool_module.kill_group, pool_module.new_peer
        replay = engine_module.replay_batch
        constructs_fixtures.note = self._note
        pool_module.kill_group = lambda pid, pidfd: self.node.kill(pid) if self.node else None  # type: ignore[assignment]
        pool_module.new_peer = lambda: next(self._pids)
        engine_module.replay_batch = tell_of_recovered(self.broker.accounts)
        try:
            with self.world.time():
                self._begin()
                self._plan_accidents()
                self.world.run(self._is_over, LONGEST)
                Judgement(self).check()
        finally:
            self._end()
            constructs_fixtures.note, pool_module.kill_group, pool_module.new_peer = note, kill, peer
            engine_module.replay_batch = replay

    def _note(self, *words: object) -> None:
        id, word, *what = words
        # Items of one message are undone one after the other; it may have begun before a pause.
        handling = (
            word in ("did", "undid")
            and "[" not in str(what[0])
            and self.node is not None
            and threading.current_thread().name
        )
        for worker in list(self.node.workers.values()) if handling and self.node is not None else ():
            if worker.id == handling:
                worker.note_handler()
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
        os.close(self.broker.pause_flags.fd)

    def _start_node(self) -> None:
        plans, deaths = self.compiled, self.deaths
        self.node = VirtualNode(
            self.broker, self.history, self.specs, plans, deaths, self.starts, lambda: next(self._pids)
        )
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
        store = engine.machine.state
        if any(job.outcome is None and job.id not in store.groups for job in self.jobs):
            return False  # it was parked, and has been cancelled since: how it ended is on its way
        unserved = NAMING.endpoint(NOBODY)
        at_rest = all(m.state() == PARKED or m.queue.name == unserved for m in store.messages.values())
        return at_rest and not any(group.end_label for group in store.groups.values())

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
            if self.wider.asks:
                kinds += [self._curse_an_endpoint, self._curse_an_endpoint]
        self._plan_failing_starts()
        span = chance.choice((0.2, 0.6, 2.0))
        for _ in range(chance.choice((0, 1, 4, 10, 25))):
            kind = chance.choice(kinds)
            self._accidents += 1
            self.world.soon(span, lambda kind=kind: self._happen(kind))  # type: ignore[misc]

    def _plan_failing_starts(self) -> None:
        """Workers of some queues cannot start for a while, by a chance of its own: other seeds happen as without."""
        if self.seed % 5 != 4:
            return
        chance = Random(f"starts {self.seed} {self.wild}")
        queues = sorted({spec.queue for spec in self.specs})
        for queue in chance.sample(queues, min(len(queues), chance.randint(1, 3))):
            at, seconds = chance.choice((0.0, chance.random())), chance.choice((0.3, 2.0, 8.0))
            self._accidents += 1
            self.world.after(at, lambda queue=queue, seconds=seconds: self._cannot_start(queue, seconds))  # type: ignore[misc]

    def _cannot_start(self, queue: str, seconds: float) -> None:
        """A service of its workers cannot be made; in a wild run those that have started are killed."""
        self._accidents -= 1
        self.world.say(f"accident: workers of {queue} cannot start for {seconds:g} s")
        self.starts.curse(queue, seconds)
        if self.node is not None and self.wild:
            for worker in list(self.node.workers.values()):
                if worker.queue == queue:
                    worker.die(-9)

    def _happen(self, kind: Callable[[], None]) -> None:
        self._accidents -= 1
        self.world.say(f"accident: {kind.__name__}")
        if kind not in (self._pause, self._scale):
            self.broker.shares.disturb()
        kind()

    def _kill_broker_in_a_call(self) -> None:
        self.broker.fail_at(self.world.random.randint(1, 40), None)

    def _fail_a_sync(self) -> None:
        self.broker.fail_at(self.world.random.randint(1, 10), disk_error())

    def _kill_node(self) -> None:
        """The broker watches the node, and ends with it."""
        self.ended_workers = True
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
        self.ended_workers = True
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
        """Send SIGSTOP to a random process, and SIGCONT after a while."""
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
                self.broker.paused[queue] = self.broker.engine.machine.state.next_lease

        self.program.client.admin.pause(queue).add_done_callback(paused)
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
                    self.broker.paused.pop(queue, None)  # it may have been paused again in between
                    self.program.client.admin.resume(queue).add_done_callback(resumed)
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
        self.program.run_again(job, restart=restart, requeued=self._forgive)

    def _forgive(self, message_id: int) -> None:
        self.deaths.forgive(message_id)
        self.waits.forgive(message_id)

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

    def _curse_an_endpoint(self) -> None:
        """What it is asked next ends its workers, some times."""
        queue = NAMING.endpoint(self.world.random.choice((PLAIN, PATIENT)))
        self.deaths.cursed[queue] += self.world.random.randint(1, 4)

    def _cancel(self) -> None:
        under_way = [job for job in self.jobs if job.accepted and not job.over]
        if self.program is not None and under_way:
            self.program.cancel(self.world.random.choice(under_way))

    def _scale(self) -> None:
        if self.node is not None and self.node.pools:
            queue = self.world.random.choice(sorted(self.node.pools))
            self.node.pools[queue].on_receive(ScaleTo(queue, self.world.random.randint(1, 3)))

    def tally(self) -> Counter[str]:
        """How often what has happened: accidents by name, and what is no accident but no matter of course either."""
        accidents = (line.partition("accident: ")[2] for line in self.world.log if "cannot start" not in line)
        counts = Counter(name for name in accidents if name)
        words = Counter(effect.word for effect in self.effects)
        counts["an endpoint has worked"] = words["served"]
        counts["a reply was handed on"] = sum(e.word == "given" and e.what[1] is not None for e in self.effects)
        counts["a reply was taken in"] = words["took in"]
        counts["a worker could not start"] = self.starts.failures
        counts["a message has expired"] = self.waits.expired.total()
        counts.update(self.broker.shares.seen)
        return +counts

    def standing(self) -> str:
        """Return the whole state, for diagnosis."""
        lines = [
            f"{job.id}: accepted {job.accepted}, parked {job.parked}, ended {job.outcome is not None}, "
            f"written {job.id in self.history.rows}"
            for job in self.jobs
        ]
        if self.broker.engine is not None:
            store = self.broker.engine.machine.state
            for message in store.messages.values():
                group = "" if message.group is None else message.group.id
                lines.append(f"message {message.id} {message.state()} in {message.queue.name} of {group}")
            lines += [f"group {group.id}: {sorted(group.gathers or {})}" for group in store.groups.values()]
            lines += [f"{s.role} {s.name} {s.peer}: {s.connected}" for s in store.sessions.values()]
        return "\n".join(lines)


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
