"""The program under load: a runtime with mixed work at a steady pace, until SIGTERM.

Sagas of which some fail, retry, lose an optional stage or their worker; parallel branches, maps, signals, delays,
requests; cancels, parked instances that are retried; clients that attach and leave; and instances that live for the
whole run. An unexpected end is a mistake in the report. The program must keep no state that grows with time.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stageflow_actors import InstanceParked, Retry, Runtime, Stage, StageContext, Workflow

RESIDENTS = 50
"""Instances that wait for a signal during the whole run."""

MISTAKES_KEPT = 20

# ── what is run ──────────────────────────────────────────────────────────────────────────────────────────────────────


def reserve(order: dict[str, Any], ctx: StageContext) -> None:
    """Fail once in ten instances, and end the worker once in 300."""
    if ctx.attempt == 1 and order["n"] % 300 == 17:
        os._exit(9)
    if ctx.attempt == 1 and order["n"] % 10 == 3:
        raise OSError("busy")


def release(order: dict[str, Any]) -> None:
    """Undo `reserve`."""
    order["released"] = True


def advise(order: dict[str, Any]) -> None:
    """Fail once in seven instances; the stage is optional."""
    if order["n"] % 7 == 2:
        raise ValueError("no advice")


def charge(order: dict[str, Any], ctx: StageContext) -> dict[str, int]:
    """Fail permanently once in five instances."""
    ctx.step("authorise", lambda: order["n"])
    if order["n"] % 5 == 0:
        raise ValueError("declined")
    return {"receipt": order["n"]}


def nothing(context: dict[str, Any]) -> None:
    """Do nothing."""


def twice(item: int) -> int:
    """One item of a map."""
    return 2 * item


def answer(command: Any) -> Any:
    """The endpoint."""
    return {"answer": command}


def ask(context: dict[str, Any], ctx: StageContext) -> Any:
    """Send a request to the endpoint."""
    return ctx.request("echo", context["n"], timeout=60)


def refuse_once(context: dict[str, Any], ctx: StageContext) -> None:
    """Fail until the context is mended."""
    if not context["mended"]:
        raise ValueError("not yet")


def last_long(context: dict[str, Any], ctx: StageContext) -> None:
    """Work until the end of the run."""
    while not os.path.exists(context["end"]):
        time.sleep(0.2)


def workflows() -> dict[str, Workflow[dict[str, Any]]]:
    """Return all workflows by id."""
    made: list[Workflow[dict[str, Any]]] = [
        Workflow("saga")
        .add_stage(reserve, compensation=release, retry=Retry.fixed(max_attempts=4, delay=0.02))
        .add_stage(advise, required=False)
        .add_stage(charge),
        Workflow("fork").add_parallel("both", [Stage(nothing, id="left"), Stage(nothing, id="right")]),
        Workflow("map").add_map("each", twice, over=lambda context: range(20), into="got"),
        Workflow("wait").add_delay("moment", 0.05).add_signal("go"),
        Workflow("ask").add_stage(ask),
        Workflow("park", on_failure="park").add_stage(refuse_once),
        Workflow("long", timeout=1e6).add_stage(last_long),
        Workflow("probe").add_stage(nothing, id="only"),
    ]
    return {workflow.id: workflow for workflow in made}


# ── the load ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Load:
    """The threads of the load. `rate`: sagas per second; the rest together is about as much."""

    def __init__(self, runtime: Runtime, data: Path, rate: float, log: Path) -> None:
        self.runtime = runtime
        self.ended: Counter[str] = Counter()
        self.mistakes: list[str] = []
        self.flows = workflows()
        self._data = data
        self._rate = rate
        self._log = log
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._number = 0

    def run(self, over: threading.Event) -> None:
        """Run until `over` is set and all started instances have ended."""
        self._over = over
        end = self._data.parent / "end"
        residents = [self.runtime.submit(self.flows["wait"], {}, instance_id=f"resident-{n}") for n in range(RESIDENTS)]
        residents.append(self.runtime.submit(self.flows["long"], {"end": str(end)}, instance_id="resident-long"))
        pace = self._rate
        kinds: list[tuple[Callable[[], None], float]] = [
            (self._fork, pace / 8),
            (self._map, pace / 40),
            (self._wait, pace / 8),
            (self._ask, pace / 8),
            (self._park, pace / 40),
            (self._cancel, pace / 20),
            (self._attach, 0.5),
            (self._probe, 4.0),
        ]
        threads = [threading.Thread(target=self._repeat, args=kind) for kind in kinds]
        threads.append(threading.Thread(target=self._sagas))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for instance in residents:
            if instance.done():
                self._mistake(f"{instance.id} has ended before its time: {instance.result(1).status}")
        end.touch()
        for instance in residents[:RESIDENTS]:
            instance.signal("go")
        for instance in residents:
            self._expect("completed", instance.result(60))

    def _repeat(self, work: Callable[[], None], rate: float) -> None:
        due = time.monotonic()
        while not self._over.wait(max(0.0, due - time.monotonic())):
            due = max(due + 1 / rate, time.monotonic() - 1)
            try:
                work()
            except Exception:  # noqa: BLE001 - any error is a mistake, and the load goes on
                self._mistake(traceback.format_exc(limit=3))

    def _orders(self) -> Iterator[dict[str, Any]]:
        due = time.monotonic()
        number = 0
        while not self._over.wait(max(0.0, due - time.monotonic())):
            due = max(due + 1 / self._rate, time.monotonic() - 1)
            number += 1
            yield {"n": number, "note": "x" * 200}

    def _sagas(self) -> None:
        try:
            for result in self.runtime.map_unordered(self.flows["saga"], self._orders()):
                self._expect("compensated" if result.context["n"] % 5 == 0 else "completed", result)
        except Exception:  # noqa: BLE001 - as above
            self._mistake(traceback.format_exc(limit=3))

    def _fork(self) -> None:
        self._expect("completed", self.runtime.execute(self.flows["fork"], {}, timeout=60))

    def _map(self) -> None:
        result = self.runtime.execute(self.flows["map"], {}, timeout=60)
        self._expect("completed", result)
        if result.context["got"] != [2 * n for n in range(20)]:
            self._mistake(f"a map returned {result.context}")

    def _wait(self) -> None:
        instance = self.runtime.submit(self.flows["wait"], {})
        instance.signal("go")
        self._expect("completed", instance.result(60))

    def _ask(self) -> None:
        self._number += 1
        self._expect("completed", self.runtime.execute(self.flows["ask"], {"n": self._number}, timeout=60))

    def _park(self) -> None:
        instance = self.runtime.submit(self.flows["park"], {"mended": False})
        try:
            instance.result(60)
            self._mistake("an instance that should be parked was not")
        except InstanceParked:
            self._expect("completed", instance.retry({"mended": True}).result(60))

    def _cancel(self) -> None:
        instance = self.runtime.submit(self.flows["wait"], {})
        status = instance.cancel("soaked")
        if status != "cancelled":
            self._mistake(f"a cancelled instance is {status}")
        self._expect("cancelled", instance.result(60))

    def _attach(self) -> None:
        with Runtime.connect(self._data) as client:
            self._expect("completed", client.execute("probe", {}, timeout=60))
            client.queues()

    def _probe(self) -> None:
        began = time.monotonic()
        result = self.runtime.execute(self.flows["probe"], {}, timeout=60)
        took = time.monotonic() - began
        with self._log.open("a") as log:
            log.write(f"{began} {took}\n")
        self._expect("completed", result)

    def _expect(self, status: str, result: Any) -> None:
        with self._lock:
            self.ended[str(result.status)] += 1
        if result.status != status:
            self._mistake(f"{result.workflow_id} {result.instance_id} is {result.status}, not {status}: {result.error}")

    def _mistake(self, text: str) -> None:
        with self._lock:
            if len(self.mistakes) < MISTAKES_KEPT:
                self.mistakes.append(text)


def main(data: Path, rate: float, out: Path, log: Path) -> None:
    """Load the cluster until SIGTERM, then write the report to `out`."""
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the script's Ctrl-C becomes a SIGTERM
    flows = workflows()
    runtime = Runtime(*flows.values(), data_dir=data)
    runtime.endpoint("echo", answer)
    with runtime:
        load = Load(runtime, data, rate, log)
        load.flows = flows
        worker = threading.Thread(target=load.run, args=(over,))
        worker.start()
        worker.join()
        runtime.drain(60)
    draft = out.with_suffix(".draft")
    draft.write_text(json.dumps({"ended": load.ended, "mistakes": load.mistakes}))
    draft.replace(out)
