"""The user's program in a simulated cluster: it starts instances, asks again after a crash, and waits.

It follows the production client step by step and must get consistent answers in every run. It never reads the broker:
its knowledge comes from notices, answers and the history.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from virtual_broker import VirtualBroker, VirtualClient
from virtual_caller import VirtualCaller
from virtual_node import LIMIT, History

from stageflow_actors.core.envelope import encode
from stageflow_actors.core.routing import CANCELLABLE_GATHER_PREFIXES, signal_key
from stageflow_actors.runtime.client.workflow_ref import WorkflowRef
from stageflow_brokers.api import Arrival, DeliveryItem, Listener, PublishAnswer
from stageflow_brokers.errors import BrokerUnavailable


class Job:
    """One instance that the program awaits, with the notices about it."""

    def __init__(
        self, id: str, ref: WorkflowRef, context: Any, signals: list[tuple[str, Any]], priority: int = 0
    ) -> None:
        self.id, self.ref, self.signals, self.priority = id, ref, signals, priority
        self.request = ref.prepare(context, id)
        self.accepted = self.parked = False
        self.cancelled = self.calling = False
        self.again = 0
        self.outcome: bytes | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more is to be expected of it."""
        return not self.calling and (self.outcome is not None or self.parked)


class VirtualProgram(Listener):
    """The user's program: it submits each job under its id, sends the signals, and waits. Started again after a crash
    it does the same, and must get the same."""

    def __init__(
        self, broker: VirtualBroker, history: History, jobs: list[Job], peer: int, crimes: list[str], within: float
    ) -> None:
        self.world = broker.world
        self.jobs = {job.id: job for job in jobs}
        self.dead = False
        self._history = history
        self._crimes = crimes
        self._seen = 0
        self._live: set[str] = set()
        self._callers: list[VirtualCaller] = []
        self.client = VirtualClient(broker, self, peer=peer, role="client", name="program")
        for job in jobs:
            self.world.soon(within, lambda job=job: self._submit(job))  # type: ignore[misc]

    def die(self) -> None:
        """The program is gone."""
        self.dead = True
        for caller in self._callers:
            caller.die()
        for job in self.jobs.values():
            job.calling = False
        self.client.close()

    def cancel(self, job: Job) -> None:
        """Cancel an instance, wherever it is."""
        if job.accepted and not self.dead:
            job.cancelled = True
            self.client.admin.cancel(job.id, "not wanted", list(CANCELLABLE_GATHER_PREFIXES))

    def run_again(self, job: Job, *, restart: bool, requeued: Callable[[int], None]) -> None:
        """Retry or restart an instance that has ended or is parked; `requeued` receives its dead letters."""
        job.calling, job.outcome, job.parked = True, None, False
        job.again += 1
        self._live.discard(job.id)

        def done(refused: Exception | None) -> None:
            job.calling = job.parked = False
            if refused is None:
                self._accepted(job)
            self._live.add(job.id)
            self.client.admin.watch([job.id])

        rows = self._history.rows
        self._callers.append(
            VirtualCaller(self.world, self.client, job, rows, restart=restart, requeued=requeued, done=done)
        )

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        raise AssertionError("a program is delivered nothing")

    def on_pushes(self, pushes: list[tuple[str, str, bytes]]) -> None:
        for id, _, outcome in pushes:
            self._ended(self.jobs[id], outcome)

    def on_notice(self, word: str, detail: Any) -> None:
        if word == "gone":
            self._look_up(self.jobs[detail])
        elif word == "parked":
            self.jobs[detail].parked = True

    def watching(self) -> list[str]:
        return sorted(self._live)

    # what follows `Client._publish` step by step

    def _submit(self, job: Job) -> None:
        if self.dead or job.calling:
            return
        seen = self._seen
        row = self._history.rows.get(job.id)
        if row is not None and row.digest != job.request.digest:
            self._crimes.append(f"{job.id} has another digest in the history than it was started with")
        if row is None:
            self._publish(job, seen)
        elif job.again:
            self.client.admin.lookup([job.id]).add_done_callback(lambda future: self._perhaps(job, seen, future))
        else:
            self._ended(job, row.outcome)

    def _perhaps(self, job: Job, seen: int, future: Future[Any]) -> None:
        """The row of one that was run again is that of its last run until the one of this run is written."""
        if self.dead or job.calling or future.exception() is not None:
            return
        if job.id in future.result()["groups"]:
            self._publish(job, seen)
        else:
            self._ended(job, self._history.rows[job.id].outcome)

    def _publish(self, job: Job, seen: int) -> None:
        ref = job.ref
        job.request.history_sequence = seen
        body = ref.body(job.request, self.world.wall, LIMIT)
        item = ref.item(job.request, len(body), job.priority)
        self._live.add(job.id)
        answer = self.client.publish([ref.target], [item], [body], atomic=True)
        answer.add_done_callback(lambda future: self._answered(job, future))

    def _answered(self, job: Job, future: Future[PublishAnswer]) -> None:
        if self.dead or isinstance(future.exception(), BrokerUnavailable):
            return
        answer = future.result()
        why = answer.refused[0][1] if answer.refused else ""
        if why == "look-again":
            self._seen = max(self._seen, answer.history_sequence)
            self._live.discard(job.id)
            self.world.soon(0.01, lambda: self._submit(job))
        elif why == "conflict":
            self._crimes.append(f"{job.id} is said to have another input than it has")
        else:
            self._accepted(job)

    def _accepted(self, job: Job) -> None:
        job.accepted = True
        for number, (name, payload) in enumerate(job.signals):
            data = encode(payload)
            arrival = Arrival(signal_key(name), f"{name}{number}", len(data), job.id)
            self.world.soon(0.5, lambda data=data, arrival=arrival: self._signal(data, arrival))  # type: ignore[misc]

    def _signal(self, data: bytes, arrival: Arrival) -> None:
        if not self.dead:
            self.client.publish([], [], [data], arrivals=[arrival])

    def _look_up(self, job: Job) -> None:
        if self.dead or job.outcome is not None:
            return
        row = self._history.rows.get(job.id)
        if row is None:
            self._crimes.append(f"{job.id} has left the broker, and the history has not heard of it")
        else:
            self._ended(job, row.outcome)

    def _ended(self, job: Job, outcome: bytes) -> None:
        if job.calling:
            return  # of the run before: this one is asked after once the call is over
        self._live.discard(job.id)
        if job.outcome is not None and job.outcome != outcome:
            self._crimes.append(f"{job.id} is said to have ended in two ways")
        job.outcome = outcome


__all__ = ["Job", "VirtualProgram"]
